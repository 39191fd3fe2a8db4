"""Make a self-contained Hugging Face folder of a CoDA model.

    python save_hf_model.py --checkpoint_dir C --output_dir O [--tokenizer DIR] [--dtype bfloat16] [--overwrite]

C is a pre-training export (or any other CoDA folder), or an autoregressive Qwen3, Qwen2 or Llama folder or GGUF file,
whose weights are kept as they are: only the attention mask changes. O loads with `AutoModel` and
`AutoModelForCausalLM` (`trust_remote_code=True`) on a machine without this repository, which is checked before O
appears under its name. Not here: training, and merging adapters.
"""

import argparse
import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

import CoDALanguageModel as model_room
from CoDALanguageModel import CoDAConfig, CoDALanguageModel, DiffusionGenerationConfig
from CoDALanguageModel.conversion import (
    DEFAULT_MASK_TOKEN,
    build_model,
    complete_tokenizer,
    load_source,
    number_of_ids,
)

logger = logging.getLogger("save_hf_model")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
CHECK_TEXT = "def add(a, b):\n    return a + b\n"
# Largest difference of two computations of the same logits, relative to the largest logit.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}

# Runs in a process of its own, on the folder alone.
CHECK_PROGRAM = """
import json, sys
sys.modules["CoDALanguageModel"] = None  # an import of the repository's package fails
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, logging
logging.set_verbosity_error()
folder, expected_file, text = sys.argv[1:]
expected = load_file(expected_file)
difference = 0.0
for auto_class in (AutoModel, AutoModelForCausalLM):
    model = auto_class.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
    with torch.no_grad():
        logits = model(input_ids=expected["input_ids"]).logits
    same_type = type(model).__name__ == "CoDALanguageModel" and logits.dtype == expected["logits"].dtype
    difference = max(difference, (logits.double() - expected["logits"].double()).abs().max().item())
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
names = ("mask_token_id", "pad_token_id", "eos_token_id", "num_token_ids")
print(json.dumps({
    "difference": difference,
    "same_type": same_type,
    "token_ids": tokenizer(text)["input_ids"],
    "tokenizer": [tokenizer.mask_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id],
    "generation": [getattr(model.generation_config, name) for name in names],
    "config": [getattr(model.config, name) for name in names],
}))
"""


def find_checkpoint(checkpoint_dir: str) -> tuple[Path, dict[str, str]]:
    """Give the folder of a checkpoint and the keyword arguments that loaders need for it (a GGUF file's name).

    Raises:
        ValueError: there is no such folder or file, or the folder holds no model.
    """
    path = Path(checkpoint_dir)
    if path.is_file() and path.suffix == ".gguf":
        return path.parent, {"gguf_file": path.name}
    if not path.is_dir():
        raise ValueError(f"--checkpoint_dir must be a folder or a .gguf file, got {checkpoint_dir!r}")
    if (path / "config.json").is_file():
        return path, {}
    gguf_files = sorted(path.glob("*.gguf"))
    if len(gguf_files) == 1:
        return path, {"gguf_file": gguf_files[0].name}
    raise ValueError(
        f"--checkpoint_dir must hold a config.json or one .gguf file, got {checkpoint_dir!r} with "
        f"{len(gguf_files)} .gguf files and no config.json"
    )


def load_tokenizer(folder: Path, gguf: dict[str, str]) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder.

    Raises:
        ValueError: the folder has none.
    """
    if not gguf and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(
            f"{str(folder)!r} holds no tokenizer ({', '.join(TOKENIZER_FILES)}): name its folder with --tokenizer"
        )
    return AutoTokenizer.from_pretrained(folder, **gguf)


def check_input(num_ids: int) -> Tensor:
    """A fixed (2, 16) batch of ids below `num_ids`."""
    return (torch.arange(32) * 7919 % num_ids).view(2, 16)


@torch.no_grad()
def causal_difference(source: torch.nn.Module, model: CoDALanguageModel) -> float:
    """Largest difference between the logits of an autoregressive model and of its CoDA twin under a causal mask."""
    vocab_size = source.config.vocab_size
    ids = check_input(vocab_size)
    causal = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril().expand(len(ids), -1, -1, -1)
    expected = source(input_ids=ids).logits
    difference = (model(input_ids=ids, attention_mask=causal).logits[..., :vocab_size] - expected).abs().max().item()
    if difference > TOLERANCES[torch.float32] * max(1.0, expected.abs().max().item()):
        raise ValueError(
            f"the logits differ from the source's by {difference:.3g} under a causal mask; nothing written"
        )
    return difference


def decoding_defaults(config: CoDAConfig) -> DiffusionGenerationConfig:
    """The published decoding settings with the ids of this model, and a length that its context has room for."""
    defaults = DiffusionGenerationConfig.from_pretrained(Path(model_room.__file__).parent)
    num_tokens = min(defaults.max_new_tokens, max(1, config.max_position_embeddings // 2))
    names = ("mask_token_id", "pad_token_id", "eos_token_id", "num_token_ids", "bos_token_id")
    ids = {name: getattr(config, name) for name in names}
    return defaults.merged({"max_new_tokens": num_tokens, "steps": num_tokens, **ids})


def check_folder(folder: Path, model: CoDALanguageModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Load a folder in a process without this repository and compare; give the largest difference of the logits.

    Raises:
        ValueError: the folder does not load there, or gives something else than the model in memory.
    """
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        ids = check_input(model.config.num_token_ids)
        ids[:, ::3] = model.config.mask_token_id
        logits = model(input_ids=ids).logits
        expected = Path(scratch, "expected.safetensors")
        save_file({"input_ids": ids, "logits": logits.contiguous()}, expected)
        environment = os.environ | {"HF_MODULES_CACHE": str(Path(scratch, "modules")), "HF_HUB_OFFLINE": "1"}
        text = CHECK_TEXT + tokenizer.mask_token
        command = [sys.executable, "-I", "-c", CHECK_PROGRAM, str(folder.resolve()), str(expected), text]
        done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(f"what was written does not load on its own: {done.stderr.strip()[-2000:]}")
    seen = json.loads(done.stdout.splitlines()[-1])
    config = model.config
    ids = [config.mask_token_id, config.pad_token_id, config.eos_token_id]
    wanted = {
        "same_type": True,
        "token_ids": tokenizer(text)["input_ids"],
        "tokenizer": ids,
        "generation": [*ids, config.num_token_ids],
        "config": [*ids, config.num_token_ids],
    }
    for name, value in wanted.items():
        if seen[name] != value:
            raise ValueError(f"what was written loads with another {name}: {seen[name]} instead of {value}")
    if seen["difference"] > TOLERANCES[logits.dtype] * max(1.0, logits.abs().max().item()):
        raise ValueError(f"what was written gives other logits when loaded: difference {seen['difference']:.3g}")
    return seen["difference"]


@contextmanager
def replacing(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """A new folder beside `output` that takes its place when the body ends well, and vanishes when it does not.

    Raises:
        ValueError: `output` is a file, or a non-empty folder without `overwrite`; or the disk is full.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output_dir must be a folder, got the file {str(output)!r}")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise ValueError(f"--output_dir must be new or empty, got {str(output)!r} (replace it with --overwrite)")
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        new, old = scratch / "new", scratch / "old"
        new.mkdir()
        yield new
        if output.exists():
            output.rename(old)
        new.rename(output)
    except Exception as error:
        # safetensors reports a full disk in its own exception, with the system's message.
        if getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error):
            raise ValueError(f"no space left for --output_dir {str(output)!r}; nothing was changed there") from error
        raise
    finally:
        shutil.rmtree(scratch)


def convert(
    checkpoint_dir: str,
    output_dir: str,
    *,
    tokenizer_dir: str | None = None,
    dtype: str = "auto",
    mask_token: str | None = None,
    overwrite: bool = False,
    check: bool = True,
) -> CoDALanguageModel:
    """Write the folder and check it; give the model as it was written.

    Args:
        checkpoint_dir: CoDA or autoregressive folder, or GGUF file.
        output_dir: folder to make.
        tokenizer_dir: folder of the tokenizer; None means `checkpoint_dir`.
        dtype: a key of `DTYPES`, or "auto" for the source's.
        mask_token: text of the mask token; None means the tokenizer's own, else `<|mask|>`.
        overwrite: replace a folder that is not empty.
        check: load the folder in a process of its own before it appears.

    Raises:
        ValueError: what the caller can mend, with the name of the setting.
    """
    with replacing(Path(output_dir), overwrite=overwrite) as folder:
        source_dir, gguf = find_checkpoint(checkpoint_dir)
        if tokenizer_dir is not None and not Path(tokenizer_dir).is_dir():
            raise ValueError(f"--tokenizer must be a folder, got {tokenizer_dir!r}")
        source, stored = load_source(source_dir, gguf)
        tokenizer = load_tokenizer(Path(tokenizer_dir or source_dir), {} if tokenizer_dir else gguf)
        if number_of_ids(tokenizer) > source.config.vocab_size:
            raise ValueError(
                f"the tokenizer must not define more ids than the model has rows ({source.config.vocab_size}), got "
                f"{number_of_ids(tokenizer)}: pass the model's own with --tokenizer"
            )
        complete_tokenizer(tokenizer, mask_token)
        model = build_model(source, tokenizer)
        if source.config.model_type != CoDAConfig.model_type:
            logger.info("same as the source under a causal mask: max difference %.2e", causal_difference(source, model))
        del source
        model.to(stored if dtype == "auto" else DTYPES[dtype])
        model.generation_config = decoding_defaults(model.config)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for weights in folder.glob("*.safetensors"):  # written for the owner alone; the other files follow the umask
            shutil.copymode(folder / "config.json", weights)
        if check:
            logger.info("loaded alone, same logits: max difference %.2e", check_folder(folder, model, tokenizer))
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    logger.info("%s: %.1f M parameters, %s", output_dir, num_parameters / 1e6, str(model.dtype).removeprefix("torch."))
    return model


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="save_hf_model.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint_dir", required=True, help="CoDA, Qwen3, Qwen2 or Llama folder, or a GGUF file")
    parser.add_argument("--output_dir", required=True, help="folder to make")
    parser.add_argument("--tokenizer", help="folder of the tokenizer (default: checkpoint_dir)")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="default: as stored")
    parser.add_argument("--mask_token", help=f"default: the tokenizer's own, else {DEFAULT_MASK_TOKEN}")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that is not empty")
    options = parser.parse_args(arguments)
    try:
        convert(
            options.checkpoint_dir,
            options.output_dir,
            tokenizer_dir=options.tokenizer,
            dtype=options.dtype,
            mask_token=options.mask_token,
            overwrite=options.overwrite,
        )
    except (ValueError, OSError) as error:
        print(f"save_hf_model.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    # force: libraries log while they are imported, which configures the root logger before this line.
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout, force=True)
    for name in (logger.name, "CoDALanguageModel.conversion"):
        logging.getLogger(name).setLevel(logging.INFO)
    if not sys.stderr.isatty():
        disable_progress_bar()
    sys.exit(main())
