"""Make a self-contained Hugging Face folder of a CoDA model.

    python save_hf_model.py --checkpoint_dir C --output_dir O [--tokenizer DIR] [--dtype bfloat16] [--overwrite]

C is a pre-training export (or any other CoDA folder), an autoregressive Qwen3, Qwen2 or Llama folder or GGUF file, or
the folder of a published family of diffusion models (see `families`). The weights are kept as they are, and no code of
C is run. O loads with `AutoModel` and `AutoModelForCausalLM` (`trust_remote_code=True`) on a machine without this
repository, which is checked before O appears under its name. Not here: training, and merging adapters.

    python save_hf_model.py ... --push_to_hub OWNER/NAME --license L --backbone NAME=LICENCE --data NAME=LICENCE ...

also writes a model card into O and uploads O as it is; `--dry_run` does the first alone.
"""

import argparse
import errno
import json
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from CoDALanguageModel.errors import UserError, end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()  # imports take seconds; what is begun later is removed by `cleaning_up_when_stopped`

import httpx
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils.logging import disable_progress_bar

import CoDALanguageModel as model_room
from CoDALanguageModel import CoDAConfig, CoDALanguageModel, DiffusionGenerationConfig
from CoDALanguageModel.config_fields import ATTENTIONS, BLOCK_ORIGINS
from CoDALanguageModel.configuration_coda import reading_config, token_ids
from CoDALanguageModel.conversion import (
    DEFAULT_MASK_TOKEN,
    DTYPES,
    build_model,
    cast_weights,
    complete_tokenizer,
    load_source,
    number_of_ids,
)
from CoDALanguageModel.families import AUTOREGRESSIVE_TYPES, Family, family_of, find_mask_token, published_ends
from CoDALanguageModel.run_files import read_json
from CoDALanguageModel.weight_files import (
    check_tokenizer,
    check_weights,
    open_to_readers,
    reading_tokenizer,
    refuse_not_finite,
    weight_files,
)
from model_card import LICENCE, Provenance, model_card, named_licence

logger = logging.getLogger("save_hf_model")

VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
CHECK_TEXT = "def add(a, b):\n    return a + b\n"
# Largest difference of two float32 computations of the same logits, relative to the largest one. Weights of any dtype
# are compared in float32 arithmetic, so that no tolerance has to make room for the rounding of activations.
TOLERANCE = 1e-4

STALE = ["*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.py"]
"""Files of an earlier upload that would stand for something else beside a new one."""

LONGEST_CHECK = 160
"""Tokens of a row of the batch that is compared: two blocks of up to 78."""

# Runs in a process of its own, on the folder alone.
CHECK_PROGRAM = """
import json, sys
sys.modules["CoDALanguageModel"] = None  # an import of the repository's package fails
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, logging
logging.set_verbosity_error()
folder, inputs, outputs, text = sys.argv[1:]
ids = load_file(inputs)["input_ids"]
logits, types = {}, []
for auto_class in (AutoModel, AutoModelForCausalLM):
    model = auto_class.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
    types.append([type(model).__name__, str(model.dtype)])
    with torch.no_grad():
        logits[auto_class.__name__] = model.float()(input_ids=ids, return_dict=True).logits
save_file(logits, outputs)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # it needs no code of the folder
names = ("mask_token_id", "pad_token_id", "eos_token_id", "num_token_ids")
print(json.dumps({
    "types": types,
    "token_ids": tokenizer(text)["input_ids"],
    "tokenizer": [tokenizer.mask_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id],
    "generation": [getattr(model.generation_config, name) for name in names],
    "config": [getattr(model.config, name) for name in names],
}))
"""


@dataclass(frozen=True)
class Agreement:
    """How two computations of the same logits compare.

    Attributes:
        difference: largest difference of two logits, relative to the largest expected one.
        same_best: share of positions with the same best token.
        divergence: largest Kullback-Leibler divergence of a position, in nats, of the found from the expected.
    """

    difference: float
    same_best: float
    divergence: float

    @classmethod
    def of(cls, found: Tensor, expected: Tensor) -> "Agreement":
        """Compare (..., V) logits."""
        found, expected = found.double(), expected.double()
        difference = (found - expected).abs().max() / expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        same_best = (found.argmax(dim=-1) == expected.argmax(dim=-1)).double().mean()
        log_found, log_expected = found.log_softmax(dim=-1), expected.log_softmax(dim=-1)
        divergence = (log_expected.exp() * (log_expected - log_found)).sum(dim=-1).max()
        return cls(difference.item(), same_best.item(), divergence.item())

    @property
    def is_equal(self) -> bool:
        """Whether the two differ by no more than the order of float32 sums; False where a number is not finite."""
        return self.difference <= TOLERANCE and self.divergence <= TOLERANCE

    def __str__(self) -> str:
        return (
            f"max difference {self.difference:.2e} of the largest logit, same best token at {self.same_best:.1%}, "
            f"KL at most {self.divergence:.2e}"
        )


def find_checkpoint(checkpoint_dir: str) -> tuple[Path, dict[str, str]]:
    """Give the folder of a checkpoint and the keyword arguments that loaders need for it (a GGUF file's name).

    Raises:
        UserError: there is no such folder or file, or the folder holds no model.
    """
    path = Path(checkpoint_dir)
    if path.is_file() and path.suffix == ".gguf":
        return path.parent, {"gguf_file": path.name}
    if not path.is_dir():
        raise UserError(f"--checkpoint_dir must be a folder or a .gguf file, got {checkpoint_dir!r}")
    if (path / "config.json").is_file():
        return path, {}
    gguf_files = sorted(path.glob("*.gguf"))
    if len(gguf_files) == 1:
        return path, {"gguf_file": gguf_files[0].name}
    raise UserError(
        f"--checkpoint_dir must hold a config.json or one .gguf file, got {checkpoint_dir!r} with "
        f"{len(gguf_files)} .gguf files and no config.json"
    )


def load_tokenizer(folder: Path, gguf: dict[str, str], family: Family | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder; that of a published family without the code that lies beside it.

    Raises:
        UserError: the folder has none that can be loaded.
    """
    if not gguf and not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise UserError(
            f"{str(folder)!r} holds no tokenizer ({', '.join(VOCABULARY_FILES)}): name its folder with --tokenizer"
        )
    check_tokenizer(folder)
    with reading_tokenizer(f"{str(folder)!r} holds no tokenizer that loads without code of its own"), reading_config():
        if family is None or family.is_autoregressive:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **gguf)
        is_whole = (folder / "tokenizer.json").is_file()
        tokenizer = (PreTrainedTokenizerFast if is_whole else Qwen2Tokenizer).from_pretrained(folder)
    tokenizer.init_kwargs.pop("auto_map", None)  # which names that code, and would be written into the new folder
    return tokenizer


def check_input(num_ids: int, width: int = 16) -> Tensor:
    """A fixed (2, width) batch of ids below `num_ids`."""
    return (torch.arange(2 * width) * 7919 % num_ids).view(2, width)


@torch.no_grad()
def check_source(
    source: torch.nn.Module, model: CoDALanguageModel, family: Family, block_size: int | None = None
) -> Agreement:
    """Compare the logits of transformers' own network with those of its CoDA twin, both float32.

    The network of a published family is told who may attend to whom by a mask, its twin by the configuration. The twin
    of an autoregressive model is given a causal mask, unless its configuration says just that.

    Args:
        source: the network.
        model: its twin.
        family: of the network.
        block_size: tokens per block that the twin must have; None is full attention.

    Raises:
        UserError: they differ.
    """
    vocab_size = source.config.vocab_size
    if family.is_autoregressive:
        ids, rule = check_input(vocab_size), "a causal mask"
        place = torch.arange(ids.shape[1])
    else:
        ids, rule = masked_input(model), f"the attention of {family.title}"
        place = torch.arange(ids.shape[1]) // (block_size or ids.shape[1])
    allowed = (place[:, None] >= place).expand(len(ids), 1, -1, -1)
    knows_rule = block_size == 1 or not family.is_autoregressive
    found = model(input_ids=ids, attention_mask=None if knows_rule else allowed, return_dict=True).logits[
        ..., :vocab_size
    ]
    expected = source(
        input_ids=ids, attention_mask=None if family.is_autoregressive else allowed, return_dict=True
    ).logits
    seen = Agreement.of(found, expected)
    if not seen.is_equal:
        raise UserError(f"the logits differ from the source's under {rule}; nothing written: {seen}")
    logger.info("same as the source under %s: %s", rule, seen)
    return seen


def round_weights(model: CoDALanguageModel, dtype: torch.dtype) -> None:
    """Round the float32 weights of `model` to `dtype` in place, and say what that changes in the logits.

    Raises:
        UserError: a weight is too large for `dtype`.
    """
    if dtype == torch.float32:
        return
    ids = masked_input(model)
    with torch.no_grad():
        before = model(input_ids=ids, return_dict=True).logits
        cast_weights(model, dtype)
        name = str(dtype).removeprefix("torch.")
        refuse_not_finite(model.named_parameters(), f"--dtype {name} ends at {torch.finfo(dtype).max:.3g}")
        cast_weights(model, torch.float32)
        logger.info("rounded to %s: %s", name, Agreement.of(model(input_ids=ids, return_dict=True).logits, before))
    cast_weights(model, dtype)


def decoding_settings(config: CoDAConfig, family: Family | None, source_dir: Path) -> DiffusionGenerationConfig:
    """What the folder will say of decoding, with the ids of this model.

    A CoDA folder says what it said. Others get the published settings, with a length that the context has room for; a
    model of another published family has the schedule of its own sampler.

    Raises:
        UserError: the folder's settings are none.
    """
    file = source_dir / GENERATION_CONFIG_NAME
    if family is None and file.is_file() and not read_json(file).get("_from_model_config"):
        own = DiffusionGenerationConfig.from_pretrained(source_dir)
        eos = config.eos_token_id if own.eos_token_id is None else own.eos_token_id
        return own.merged({**ids_of(config), "eos_token_id": eos})
    defaults = DiffusionGenerationConfig.from_pretrained(Path(model_room.__file__).parent)
    num_tokens = min(defaults.max_new_tokens, max(1, config.max_position_embeddings // 2))
    is_peer = family is not None and not family.is_autoregressive
    schedule = family.schedule if is_peer else defaults.schedule
    return defaults.merged({"max_new_tokens": num_tokens, "steps": num_tokens, "schedule": schedule, **ids_of(config)})


def ids_of(config: CoDAConfig) -> dict[str, int | list[int] | None]:
    """The ids that decoding settings hold too."""
    names = ("mask_token_id", "pad_token_id", "eos_token_id", "num_token_ids", "bos_token_id")
    return {name: getattr(config, name) for name in names}


def masked_input(model: CoDALanguageModel) -> Tensor:
    """A fixed batch of the model's ids, every third one masked: (2, 16), or two blocks and a piece where they fit."""
    width = min(max(16, 2 * (model.config.block_size or 0) + 4), model.config.max_position_embeddings, LONGEST_CHECK)
    ids = check_input(model.config.num_token_ids, width)
    ids[:, ::3] = model.config.mask_token_id
    return ids


def check_folder(folder: Path, model: CoDALanguageModel, tokenizer: PreTrainedTokenizerBase) -> Agreement:
    """Load a folder in a process without this repository and compare, in float32 arithmetic.

    Raises:
        UserError: the folder does not load there, or gives something else than the model in memory.
    """
    config, dtype = model.config, model.dtype
    weights = model.state_dict()
    for file in weight_files(folder):  # the logits of one batch do not touch every row of the embedding
        for name, written in load_file(file).items():
            if not torch.equal(written, weights[name]):
                raise UserError(f"what was written holds another {name}")
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        ids = masked_input(model)
        cast_weights(model, torch.float32)
        expected = model(input_ids=ids, return_dict=True).logits
        cast_weights(model, dtype)
        inputs, outputs = Path(scratch, "inputs.safetensors"), Path(scratch, "outputs.safetensors")
        save_file({"input_ids": ids}, inputs)
        environment = os.environ | {"HF_MODULES_CACHE": str(Path(scratch, "modules")), "HF_HUB_OFFLINE": "1"}
        text = CHECK_TEXT + tokenizer.mask_token
        command = [sys.executable, "-I", "-c", CHECK_PROGRAM, str(folder.resolve()), str(inputs), str(outputs), text]
        done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise UserError(f"what was written does not load on its own: {done.stderr.strip()[-2000:]}")
        seen = json.loads(done.stdout.splitlines()[-1])
        agreements = [Agreement.of(logits, expected) for logits in load_file(outputs).values()]
    ids = [config.mask_token_id, config.pad_token_id, config.eos_token_id]
    wanted = {
        "types": [["CoDALanguageModel", str(dtype)]] * len(agreements),
        "token_ids": tokenizer(text)["input_ids"],
        "tokenizer": [*ids[:2], token_ids(config.eos_token_id)[0]],
        "generation": [*ids[:2], model.generation_config.eos_token_id, config.num_token_ids],
        "config": [*ids, config.num_token_ids],
    }
    for name, value in wanted.items():
        if seen[name] != value:
            raise UserError(f"what was written loads with another {name}: {seen[name]} instead of {value}")
    for agreement in agreements:
        if not agreement.is_equal:
            raise UserError(f"what was written gives other logits when loaded: {agreement}")
    return agreements[0]


@contextmanager
def replacing(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """A new folder beside `output` that takes its place when the body ends well, and vanishes when it does not.

    Raises:
        UserError: `output` is a file, or a non-empty folder without `overwrite`; or the disk is full.
    """
    output = Path(os.path.realpath(output))  # "." has no name, and a link stays where it is
    if output.exists() and not output.is_dir():
        raise UserError(f"--output_dir must be a folder, got the file {str(output)!r}")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise UserError(f"--output_dir must be new or empty, got {str(output)!r} (replace it with --overwrite)")
    made_parents = [parent for parent in output.parents if not parent.exists()]
    # Under a name that is known before it is made: whatever stops the program from here on, it is removed.
    scratch = output.with_name(f".{output.name}.{secrets.token_hex(4)}")
    new, old = scratch / "new", scratch / "old"
    try:
        new.mkdir(parents=True)
        yield new
        if output.exists():
            output.rename(old)
        new.rename(output)
    except Exception as error:
        # safetensors reports a full disk in its own exception, with the system's message.
        if getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error):
            raise UserError(f"no space left for --output_dir {str(output)!r}; nothing was changed there") from error
        raise
    finally:
        if old.exists() and not output.exists():  # stopped between the two renames
            old.rename(output)
        if scratch.exists():
            shutil.rmtree(scratch)
        if not output.exists():
            for parent in made_parents:
                if parent.exists():
                    parent.rmdir()


@contextmanager
def cleaning_up_when_stopped() -> Iterator[None]:
    """Turn the signals that end a program into `SystemExit`, once, so that what it began is removed."""
    stopping = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def stop(number: int, frame: object) -> None:
        for each in stopping:
            signal.signal(each, signal.SIG_IGN)  # a second one must not stop the removal
        sys.exit(128 + number)

    before = {number: signal.getsignal(number) for number in stopping}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def read_family(
    folder: Path, gguf: dict[str, str], asked: Mapping[str, str | int | None]
) -> tuple[Family | None, dict[str, Any], dict[str, Any]]:
    """What is known of a folder before its weights are read: family, config.json, and arguments of `CoDAConfig`.

    A CoDA folder has no family, and says everything itself.

    Raises:
        UserError: the folder or file is broken or of no known family, or what was asked for contradicts it.
    """
    check_weights(folder, gguf.get("gguf_file"))
    # What a GGUF file holds is autoregressive, and which type of it makes no difference here.
    values = {"model_type": AUTOREGRESSIVE_TYPES[0]} if gguf else read_json(folder / "config.json")
    if values.get("model_type") != CoDAConfig.model_type:
        family = family_of(values)
        return family, values, family.settings(values, **asked)
    for name, value in asked.items():
        stated = values.get(name, getattr(CoDAConfig, name))
        if value not in (None, stated):
            allowed = "left out" if stated is None else stated
            raise UserError(
                f"--{name} must be {allowed}, as config.json says, got {value}: a CoDA model is adapted to other "
                f"attention by training, with model.{name} beside model.init_from in pre-training"
            )
    return None, values, {}


def convert(
    checkpoint_dir: str,
    output_dir: str,
    *,
    tokenizer_dir: str | None = None,
    dtype: str = "auto",
    mask_token: str | None = None,
    overwrite: bool = False,
    check: bool = True,
    card: Callable[[CoDALanguageModel, Path], str] | None = None,
    **asked: str | int | None,
) -> CoDALanguageModel:
    """Write the folder and check it; give the model as it was written.

    Args:
        checkpoint_dir: CoDA, autoregressive or published folder, or GGUF file.
        output_dir: folder to make.
        tokenizer_dir: folder of the tokenizer; None means `checkpoint_dir`.
        dtype: a key of `DTYPES`, or "auto" for the source's.
        mask_token: text of the mask token; None means the family's or the tokenizer's own, else `<|mask|>`.
        overwrite: replace a folder that is not empty.
        check: load the folder in a process of its own before it appears.
        card: makes README.md of the model and the folder as it will be.
        **asked: `attention`, `block_size` and `block_origin` of `CoDAConfig`, where the folder leaves them open.

    Raises:
        UserError: what the caller can mend, with the name of the setting.
    """
    for name, path in (("checkpoint_dir", checkpoint_dir), ("tokenizer", tokenizer_dir)):
        if path is not None and Path(output_dir).resolve() in Path(path).resolve().parents:
            raise UserError(
                f"--output_dir {output_dir!r} holds --{name} {path!r}, and would take its place: give another"
            )
    with replacing(Path(output_dir), overwrite=overwrite) as folder:
        source_dir, gguf = find_checkpoint(checkpoint_dir)
        if tokenizer_dir is not None and not Path(tokenizer_dir).is_dir():
            raise UserError(f"--tokenizer must be a folder, got {tokenizer_dir!r}")
        family, values, settings = read_family(source_dir, gguf, asked)
        source, stored = load_source(source_dir, gguf)
        tokenizer = load_tokenizer(Path(tokenizer_dir or source_dir), {} if tokenizer_dir else gguf, family)
        num_rows = source.config.vocab_size
        if number_of_ids(tokenizer) > num_rows:
            raise UserError(
                f"the tokenizer must not define more ids than the model has rows ({num_rows}), got "
                f"{number_of_ids(tokenizer)}: pass the model's own with --tokenizer"
            )
        ends: list[int] = []
        if family is not None and not family.is_autoregressive:
            mask_token = find_mask_token(family, values, tokenizer, num_rows, mask_token)
        if family is not None:
            # A model that stays what it was ends with padding too; one that is to be adapted is trained without it.
            stays = settings["attention"] != "full" or not family.is_autoregressive
            own = source.config.to_dict() if gguf else values
            ends = published_ends(source_dir, own, tokenizer, num_rows, with_padding=stays)
        complete_tokenizer(tokenizer, mask_token)
        if set(ends) - {tokenizer.eos_token_id}:
            settings["eos_token_id"] = list(dict.fromkeys([tokenizer.eos_token_id, *ends]))
        model = build_model(source, tokenizer, settings)
        if family is not None:
            check_source(source, model, family, settings.get("block_size"))
        del source
        round_weights(model, stored if dtype == "auto" else DTYPES[dtype])
        model.generation_config = decoding_settings(model.config, family, source_dir)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        open_to_readers(folder)
        if card is not None:
            (folder / "README.md").write_text(card(model, folder), encoding="utf-8")
        if check:
            logger.info("loaded alone, same logits: %s", check_folder(folder, model, tokenizer))
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    logger.info("%s: %.1f M parameters, %s", output_dir, num_parameters / 1e6, str(model.dtype).removeprefix("torch."))
    return model


def provenance_of(options: argparse.Namespace) -> Provenance | None:
    """What the command line says for the card; None where nothing is to be uploaded.

    Raises:
        UserError: a flag is missing, or not what it must be.
    """
    needed = {"license": "of the weights", "backbone": "with its licence, or none", "data": "with their licences"}
    if options.push_to_hub is None:
        for name in ("dry_run", "private", *needed, "stage", "scores"):
            if getattr(options, name):
                raise UserError(f"--{name} goes with --push_to_hub OWNER/NAME")
        return None
    try:
        validate_repo_id(options.push_to_hub)
        if "/" not in options.push_to_hub:
            raise HFValidationError("it has no owner")
    except HFValidationError as error:
        raise UserError(f"--push_to_hub must be OWNER/NAME, got {options.push_to_hub!r}: {error}") from error
    for name, words in needed.items():
        if not getattr(options, name):
            raise UserError(f"--push_to_hub needs --{name} ({words}), which the model card says")
    if not LICENCE.fullmatch(options.license):
        raise UserError(
            f"--license must be an identifier of the Hub, such as apache-2.0, mit or other, got {options.license!r}"
        )
    return Provenance(
        license=options.license,
        backbone=None if options.backbone == "none" else named_licence(options.backbone, "--backbone"),
        data=tuple(named_licence(text, "--data") for text in options.data),
        stages=tuple(map(Path, options.stage)),
        scores=tuple(map(Path, options.scores)),
    )


def card_of(options: argparse.Namespace, provenance: Provenance) -> Callable[[CoDALanguageModel, Path], str]:
    """A function that makes the card of a folder."""

    def make(model: CoDALanguageModel, folder: Path) -> str:
        weights: list[str] = []
        if provenance.scores:
            try:
                from coda_eval.journal import hash_weights
            except ImportError as error:
                raise UserError(f"--scores needs the evaluation room, whose hashes they hold: {error}") from error
            source, gguf = find_checkpoint(options.checkpoint_dir)
            weights = [hash_weights({"pretrained": str(folder)}), hash_weights({"pretrained": str(source), **gguf})]
        return model_card(options.push_to_hub, model, provenance, weights)

    return make


def upload(folder: Path, repo: str, *, private: bool) -> None:
    """Give the repository on the Hub, which is made if it is not there, the files of the folder.

    Raises:
        OSError: the Hub refuses.
    """
    api = HfApi()
    api.create_repo(repo, private=private, exist_ok=True)
    message = f"Upload {repo.rpartition('/')[2]}"
    api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message, delete_patterns=STALE)
    logger.info("uploaded %s to %s", folder, repo)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="save_hf_model.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint_dir", required=True, help="folder of a supported type, or a GGUF file")
    parser.add_argument("--output_dir", required=True, help="folder to make")
    parser.add_argument("--tokenizer", help="folder of the tokenizer (default: checkpoint_dir)")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="default: as stored")
    parser.add_argument("--mask_token", help=f"default: the folder's own, else {DEFAULT_MASK_TOKEN}")
    parser.add_argument("--attention", choices=ATTENTIONS, help="where the folder leaves it open")
    parser.add_argument("--block_size", type=int, help="with block_causal attention: tokens per block")
    parser.add_argument("--block_origin", choices=BLOCK_ORIGINS, help="with block_causal attention: its first block")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that is not empty")
    hub = parser.add_argument_group("upload")
    hub.add_argument("--push_to_hub", metavar="OWNER/NAME", help="also write a model card, and upload the folder")
    hub.add_argument("--dry_run", action="store_true", help="make the folder as it would be uploaded, and stop there")
    hub.add_argument("--private", action="store_true", help="a repository that is new is private")
    hub.add_argument("--license", help="of the weights, by its identifier on the Hub")
    hub.add_argument("--backbone", metavar="NAME=LICENCE", help="what training began with; none for random weights")
    hub.add_argument("--data", metavar="NAME=LICENCE", nargs="+", default=[], help="what it was trained on")
    hub.add_argument("--stage", metavar="FILE", nargs="+", default=[], help="configurations of its runs, in order")
    hub.add_argument("--scores", metavar="FILE", nargs="+", default=[], help="scores.json of its evaluations")
    options = parser.parse_args(arguments)
    try:
        provenance = provenance_of(options)
        uploads = provenance is not None and not options.dry_run
        if uploads:
            HfApi().whoami()  # before hours of work
        with cleaning_up_when_stopped():
            convert(
                options.checkpoint_dir,
                options.output_dir,
                tokenizer_dir=options.tokenizer,
                dtype=options.dtype,
                mask_token=options.mask_token,
                overwrite=options.overwrite,
                card=None if provenance is None else card_of(options, provenance),
                attention=options.attention,
                block_size=options.block_size,
                block_origin=options.block_origin,
            )
        if uploads:
            upload(Path(options.output_dir), options.push_to_hub, private=options.private)
    except (UserError, OSError, httpx.TransportError) as error:
        unreachable = "the Hub cannot be reached: " if isinstance(error, httpx.TransportError) else ""
        print(f"save_hf_model.py: error: {unreachable}{error}", file=sys.stderr)
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
