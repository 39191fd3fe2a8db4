"""What is wrong with the files of a checkpoint, said in one line before or where a loader falls over them.

Not here: whether the weights fit a configuration (`loading_coda` and `conversion` compare names and shapes).
"""

import shutil
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoTokenizer

from .config_fields import check_fields
from .configuration_coda import CoDAConfig, reading_config
from .errors import UserError
from .run_files import LFS_POINTER, read_json

SINGLE_FILES, INDEX_SUFFIX = ("model.safetensors", "pytorch_model.bin"), ".index.json"
QUANTISED = ("I8", "U8", "F8", "F6", "F4")
"""Starts of the names that safetensors has for numbers of at most 8 bits, which mean nothing without their scales."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json")


def check_tokenizer(folder: Path) -> None:
    """Refuse a tokenizer folder that was cloned without its large files, or whose files of JSON are broken.

    Raises:
        UserError: a file is a Git LFS pointer, one of JSON holds no object, or the config.json of a CoDA model a field
            of the wrong kind, over which a loader of tokenizers may fall.
    """
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            refuse_pointer(folder / name)
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        if (folder / name).is_file():
            content = read_json(folder / name)
            if name == "config.json" and content.get("model_type") == CoDAConfig.model_type:
                check_fields(content)


def read_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a folder or of the Hub; no code of its own is run.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    check_tokenizer(Path(folder))
    with reading_tokenizer("no tokenizer can be loaded"), reading_config():
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # None would ask at the terminal


@contextmanager
def reading_tokenizer(words: str) -> Iterator[None]:
    """Tell what a loader finds wrong with the files of a tokenizer: no code but the loader's runs in the block.

    Args:
        words: what the message begins with.

    Raises:
        UserError: they cannot be read.
    """
    try:
        yield
    except UserError:  # of the model's configuration, which is read on the way
        raise
    except Exception as error:  # the tokenizers library has no class of its own for a field that it cannot read
        name = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
        raise UserError(f"{words}: {name}{error}") from error


def check_weights(folder: Path, gguf_file: str | None = None) -> None:
    """Refuse a model folder whose weight files cannot be what they are named.

    Args:
        folder: of the model. What is missing altogether is left for the loader to say.
        gguf_file: the file of `folder` that holds the weights; None means safetensors or PyTorch files.

    Raises:
        UserError: a file is a Git LFS pointer or not whole, a shard is missing, or the weights are quantised (those
            of a GGUF file are turned into floats by its loader).
    """
    if gguf_file is not None:
        _check_gguf(folder / gguf_file)
        return
    config = folder / "config.json"
    if config.is_file():
        refuse_pointer(config)
        settings = read_json(config).get("quantization_config")
        if settings:
            method = settings.get("quant_method") if isinstance(settings, dict) else settings
            raise UserError(f"quantised weights are not supported: {str(config)!r} says quant_method {method!r}")
    for file in weight_files(folder):
        if not file.is_file():
            raise UserError(f"{str(file)!r} is missing, which its index names: download it again")
        refuse_pointer(file)
        if file.suffix == ".safetensors":
            _check_safetensors(file)
        # The table of a zip file stands at its end; older files are pickles.
        elif not (_starts_with(file, b"\x80") or zipfile.is_zipfile(file)):
            raise UserError(f"{str(file)!r} is not a whole PyTorch file, download it again")


def weight_files(folder: Path) -> list[Path]:
    """The files that a loader reads the weights of a folder from, in the order in which transformers looks for them.

    Raises:
        UserError: an index of shards is not valid JSON, or names no files.
    """
    for name in SINGLE_FILES:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / (name + INDEX_SUFFIX)
        if index.is_file():
            refuse_pointer(index)
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                raise UserError(f"{str(index)!r} has no weight_map: download it again")
            return [folder / file for file in sorted(set(weight_map.values()))]
    return []


def open_to_readers(folder: Path) -> None:
    """Give weights the permissions of the configuration beside them.

    safetensors writes a file for its owner alone, so that a server of another user could not read the folder; all
    other files follow the umask.
    """
    for file in folder.glob("*.safetensors"):
        shutil.copymode(next(folder.glob("*config.json")), file)


def refuse_pointer(file: Path) -> None:
    """Refuse a file that stands for the real one in a repository that was cloned without Git LFS.

    Raises:
        UserError: it does.
    """
    if _starts_with(file, LFS_POINTER):
        raise UserError(f"{str(file)!r} is a Git LFS pointer, not the file itself: get it with `git lfs pull`")


def refuse_not_finite(weights: Iterable[tuple[str, Tensor]], what: str) -> None:
    """Refuse weights with NaN or infinite numbers, which every comparison of numbers lets pass.

    Args:
        weights: names and tensors; those without data (where another process has it) are passed over.
        what: whose weights they are, for the message.

    Raises:
        UserError: naming the weights.
    """
    known = ((name, tensor) for name, tensor in weights if tensor.is_floating_point() and not tensor.is_meta)
    broken = [name for name, tensor in known if not torch.isfinite(tensor).all()]
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise UserError(f"{what}: weights are not finite: {', '.join(broken[:3])}{more}")


def _starts_with(file: Path, start: bytes) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(start)) == start


def _check_safetensors(file: Path) -> None:
    try:
        with safe_open(file, framework="pt") as opened:  # compares the table of tensors with the size of the file
            dtypes = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}
    except SafetensorError as error:
        raise UserError(f"{str(file)!r} is not a whole safetensors file, download it again: {error}") from error
    for name, dtype in dtypes.items():
        if dtype.startswith(QUANTISED):
            raise UserError(f"quantised weights are not supported: {name} in {str(file)!r} is {dtype}")


def _check_gguf(file: Path) -> None:
    refuse_pointer(file)
    if not _starts_with(file, b"GGUF"):
        raise UserError(f"{str(file)!r} is not a GGUF file")
