"""`python -m coda_pretrain export`: a checkpoint to safetensors, on any machine: no torch_xla, no training devices.

Writes `model.safetensors` (published weight names), `config.json` and the tokenizer's files. The result starts
another run (`model.init_from`) and is what `save_hf_model.py` turns into a folder that loads by itself.
"""

import argparse
import json
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import yaml
from safetensors.torch import save_file
from torch import Tensor

from CoDALanguageModel import CoDAConfig, CoDALanguageModel
from CoDALanguageModel.conversion import DTYPES, complete_tokenizer
from CoDALanguageModel.errors import UserError, run_program
from CoDALanguageModel.weight_files import open_to_readers, read_tokenizer, refuse_not_finite

from ..places import Place, place_of
from .checkpoint import committed_checkpoints, intact_checkpoint, step_folder, step_of, tensor_reader

logger = logging.getLogger(__name__)

WEIGHT_NAMES = {"model": ("model.", ""), "ema": ("optim.", ".ema")}
"""Prefix and suffix of the names of tensors in a checkpoint."""


def find_checkpoint(folder: Place, step: int | None) -> Place:
    """The verified checkpoint to export.

    Args:
        folder: a run folder, its `checkpoints` folder, or one checkpoint; local or behind a URL.
        step: which step of the run; None for the newest.

    Raises:
        UserError: there is none, or it is corrupt.
    """
    if not folder.is_dir():
        raise UserError(f"--checkpoint_dir: no folder at {str(folder)!r}")
    if step_of(folder) is not None:
        if step is not None and step != step_of(folder):
            raise UserError(f"--step {step} contradicts --checkpoint_dir {folder}")
        return intact_checkpoint(folder)
    run = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    available = committed_checkpoints(run)
    if not available:
        raise UserError(f"--checkpoint_dir {folder} holds no finished checkpoint (step-XXXXXXXX)")
    if step is None:
        return intact_checkpoint(available[-1])
    wanted = step_folder(run, step)
    if wanted not in available:
        raise UserError(f"--step {step} is not in {run}; it has {', '.join(str(step_of(p)) for p in available)}")
    return intact_checkpoint(wanted)


def read_weights(checkpoint: Place, kind: str = "model") -> dict[str, Tensor]:
    """The weights of a checkpoint, whole and on the CPU, under their published names.

    Args:
        checkpoint: its folder.
        kind: `model`, or `ema` for the averages that `optimizer.ema_decay` keeps.

    Raises:
        UserError: the checkpoint has no averages.
    """
    reader = tensor_reader(checkpoint)
    entries = reader.read_metadata().state_dict_metadata
    prefix, suffix = WEIGHT_NAMES[kind]
    weights = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if name.startswith(prefix) and name.endswith(suffix)
    }
    if not weights:
        raise UserError(f"--weights {kind}: {checkpoint} holds none; a run with optimizer.ema_decay keeps averages")
    dcp.load(weights, storage_reader=reader, no_dist=True)
    return {name.removeprefix(prefix).removesuffix(suffix): tensor for name, tensor in weights.items()}


def check_names(weights: dict[str, Tensor], config: CoDAConfig) -> None:
    """Check that the weights are exactly those of the configured model.

    Raises:
        UserError: one is missing, unexpected or of another shape.
    """
    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in CoDALanguageModel(config).named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise UserError(
            f"{len(wrong)} weights do not fit the model's configuration; {name}: expected "
            f"{expected.get(name, 'none')}, the checkpoint has {found.get(name, 'none')}"
        )


def export(
    checkpoint: Place,
    output_dir: Path,
    *,
    dtype: torch.dtype = torch.float32,
    tokenizer: str | None = None,
    weights_kind: str = "model",
) -> None:
    """Write the folder; it appears under its name only when it is whole.

    Args:
        checkpoint: a verified checkpoint.
        output_dir: must not exist, or be empty.
        dtype: of the written weights.
        tokenizer: the tokenizer folder; the one that the run's configuration names when None.
        weights_kind: `model` or `ema`; see `read_weights`.

    Raises:
        UserError: the output exists, the tokenizer is missing, or the weights do not fit or are not finite.
    """
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise UserError(f"--output_dir {output_dir} exists and is not empty; remove it or choose another")
    run_config = yaml.safe_load((checkpoint / "config.yaml").read_text(encoding="utf-8"))
    tokenizer_dir = Path(tokenizer or run_config["model"]["tokenizer"])
    if not tokenizer_dir.is_dir():
        raise UserError(f"the run's tokenizer folder {str(tokenizer_dir)!r} is not here; name it with --tokenizer")
    config = CoDAConfig.from_dict(json.loads((checkpoint / "model_config.json").read_text(encoding="utf-8")))
    config.dtype = str(dtype).removeprefix("torch.")
    weights = read_weights(checkpoint, weights_kind)
    check_names(weights, config)
    refuse_not_finite(weights.items(), str(checkpoint))
    partial = output_dir.with_name(f".{output_dir.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        converted = {name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}
        refuse_not_finite(converted.items(), f"--dtype {config.dtype} ends at {torch.finfo(dtype).max:.3g}")
        save_file(converted, str(partial / "model.safetensors"), metadata={"format": "pt"})
        write_tokenizer(tokenizer_dir, partial, mask_token_id=config.mask_token_id)
        config.save_pretrained(partial)
        open_to_readers(partial)
        if output_dir.exists():
            output_dir.rmdir()
        partial.replace(output_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    logger.info("wrote %s: %d weights of %s", output_dir, len(weights), checkpoint)


def write_tokenizer(source: Path, target: Path, *, mask_token_id: int | None) -> None:
    """Copy a tokenizer's files; where the run added the mask token to an autoregressive model's, write that one.

    Raises:
        UserError: it cannot be loaded, or has another mask token than the model.
    """
    tokenizer = read_tokenizer(source)
    if tokenizer.mask_token_id is None:
        complete_tokenizer(tokenizer, None)
        tokenizer.save_pretrained(target)
    else:
        for file in sorted(source.iterdir()):
            if file.is_file() and file.suffix in TOKENIZER_SUFFIXES and file.name not in MODEL_FILES:
                shutil.copyfile(file, target / file.name)
    if tokenizer.mask_token_id != mask_token_id:
        raise UserError(
            f"the tokenizer in {source} has the mask token id {tokenizer.mask_token_id}, the model {mask_token_id}: "
            "name the run's own with --tokenizer"
        )


TOKENIZER_SUFFIXES = (".json", ".txt", ".jinja", ".model")
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 on success, 2 when the input is at fault."""
    parser = argparse.ArgumentParser(prog="python -m coda_pretrain export", description="Checkpoint to safetensors.")
    parser.add_argument(
        "--checkpoint_dir", required=True, help="a run folder, its checkpoints or one of them; a path or URL"
    )
    parser.add_argument("--output_dir", required=True, help="folder to create")
    parser.add_argument("--step", type=int, help="which step of the run (default: the newest)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="of the weights (default: float32)")
    parser.add_argument(
        "--weights",
        choices=sorted(WEIGHT_NAMES),
        default="model",
        help="the weights or their averages (default: model)",
    )
    parser.add_argument("--tokenizer", help="tokenizer folder, if it is not where the run's configuration says")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        checkpoint = find_checkpoint(place_of(arguments.checkpoint_dir), arguments.step)
        dtype = DTYPES[arguments.dtype]
        export(
            checkpoint,
            Path(arguments.output_dir),
            dtype=dtype,
            tokenizer=arguments.tokenizer,
            weights_kind=arguments.weights,
        )
    except UserError as error:
        sys.stderr.write(f"coda_pretrain export: error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    run_program(main)
