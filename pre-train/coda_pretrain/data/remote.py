"""Shard files behind a URL: copied into a local cache and verified, or read in ranges."""

import fcntl
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from CoDALanguageModel.errors import UserError
from CoDALanguageModel.run_files import arriving

from ..places import copy_to_local

if TYPE_CHECKING:
    from upath import UPath


def cached_file(file: "UPath", cache: Path, sha256: str) -> Path:
    """A verified local copy, named by its hash, made unless it is there. Processes of one machine wait for each other.

    Raises:
        UserError: the file does not have this hash.
        OSError: it cannot be read, or the cache is full.
    """
    target = cache / f"{sha256}{file.suffix}"
    if target.is_file():  # it got its name after it was verified
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_file():
            try:
                with arriving(target) as partial:
                    _check_hash(file, copy_to_local(file, partial), sha256)
            except OSError as error:
                raise OSError(f"{file} could not be copied into data.cache {cache}: {error}") from error
    return target


def verified_array(file: "UPath", dtype: np.dtype, sha256: str) -> np.ndarray:
    """All of a file as an array.

    Raises:
        UserError: the file does not have this hash.
    """
    data = file.read_bytes()
    _check_hash(file, hashlib.sha256(data).hexdigest(), sha256)
    return np.frombuffer(data, dtype=dtype)


def _check_hash(file: "UPath", got: str, recorded: str) -> None:
    if got != recorded:
        raise UserError(f"{file} has the hash {got}, but its manifest recorded {recorded}")


class RangedArray:
    """A flat file that is read slice by slice. The bytes of a slice are not covered by a hash."""

    def __init__(self, file: "UPath", dtype: np.dtype, length: int) -> None:
        self._file, self._dtype, self._length = file, dtype, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(self._length)
        size = self._dtype.itemsize
        data = self._file.fs.cat_file(self._file.path, start=start * size, end=stop * size)
        if len(data) != (stop - start) * size:
            raise OSError(f"{self._file} gave {len(data)} of {(stop - start) * size} bytes")
        return np.frombuffer(data, dtype=self._dtype)
