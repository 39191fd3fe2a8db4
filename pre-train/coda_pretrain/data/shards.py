"""Token shards on disk: the format, the writer of one shard and the reader of a folder.

A folder holds `manifest.json` and, for each shard, two flat little-endian files: `NAME.bin` (the tokens of all its
documents one after the other, uint16 when every id of the tokenizer fits, else uint32) and `NAME.ends` (uint64, the
position just after each document). A document ends with the tokenizer's document-end token and never crosses shards.

Rows are cut at read time: the shards of a folder form one stream, and row i of length T is the stream's i-th block of
T tokens. The same shards then serve every `seq_len`, a long document continues in the next row, and not a token is
lost or repeated; the document ends say where attention stops. Not here: which text becomes which shard
(`prepare`), and in which order rows are read (`mixture`).
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from CoDALanguageModel.errors import UserError
from CoDALanguageModel.run_files import read_json, write_whole

from ..places import Place, place_of, sha256_of, size_of
from .remote import RangedArray, cached_file, verified_array

MANIFEST_NAME = "manifest.json"
FORMAT = "coda-token-shards"
VERSION = 1
ENDS_DTYPE = np.dtype("<u8")
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
OPEN_SHARDS = 128  # each open shard holds two file descriptors; the usual limit of a process is 1024


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """What the manifest knows about one shard."""

    name: str
    """File name without suffix."""

    documents: int
    tokens: int
    """Tokens, document-end tokens included."""

    tokens_sha256: str
    ends_sha256: str


def token_dtype(largest_id: int) -> str:
    """Name of the smallest dtype of the format that holds `largest_id`: `uint16` or `uint32`."""
    return "uint16" if largest_id < 2**16 else "uint32"


def replace_with_json(path: Path, data: Any) -> None:
    """Write `data` so that `path` holds either its old content or all of the new one, whenever the process dies."""
    write_whole(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


class ShardWriter:
    """Writes one shard, `folder/name`, under temporary names and renames it only when it is whole.

    Used as a context manager; leaving it with an exception removes the temporary files. The file of document ends is
    renamed after the tokens, and the caller records the shard after both, so a shard on record is always complete.
    """

    def __init__(self, folder: Path, name: str, dtype: str) -> None:
        self.folder, self.name, self.dtype = folder, name, DTYPES[dtype]
        self._temporary = {suffix: folder / f".{name}{suffix}.{os.getpid()}.tmp" for suffix in (".bin", ".ends")}
        self._hashes = {suffix: hashlib.sha256() for suffix in self._temporary}
        self._files: dict[str, BinaryIO] = {}  # opened by the first document, so that no document means no file
        self._documents = self._tokens = 0

    @property
    def num_tokens(self) -> int:
        """Tokens added so far."""
        return self._tokens

    def _write(self, suffix: str, array: np.ndarray) -> None:
        if suffix not in self._files:
            self._files[suffix] = self._temporary[suffix].open("wb")
        data = array.tobytes()
        self._hashes[suffix].update(data)
        self._files[suffix].write(data)

    def add(self, token_ids: Iterable[int]) -> None:
        """Append one document. `token_ids` includes the document-end token."""
        tokens = np.asarray(token_ids)
        limit = np.iinfo(self.dtype).max
        assert tokens.size > 0, "a document has at least its document-end token"
        assert 0 <= tokens.min() <= tokens.max() <= limit, f"token ids must be in [0, {limit}]"
        self._tokens += tokens.size
        self._documents += 1
        self._write(".bin", tokens.astype(self.dtype))
        self._write(".ends", np.array([self._tokens], dtype=ENDS_DTYPE))

    def commit(self) -> ShardRecord | None:
        """Flush to the device, rename into place and describe the shard; None (and no file) if it has no document."""
        if not self._documents:
            return None
        for suffix, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            file.close()
            self._temporary[suffix].replace(self.folder / f"{self.name}{suffix}")
        return ShardRecord(
            name=self.name,
            documents=self._documents,
            tokens=self._tokens,
            tokens_sha256=self._hashes[".bin"].hexdigest(),
            ends_sha256=self._hashes[".ends"].hexdigest(),
        )

    def _discard(self) -> None:
        for suffix, file in self._files.items():
            file.close()
            self._temporary[suffix].unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._discard()  # does nothing after commit


def shard_is_intact(folder: Place, record: ShardRecord) -> bool:
    """Whether both files of a shard exist with the recorded hashes."""
    files = {folder / f"{record.name}.bin": record.tokens_sha256, folder / f"{record.name}.ends": record.ends_sha256}
    return all(path.is_file() and sha256_of(path) == expected for path, expected in files.items())


def build_manifest(*, split: str, dtype: str, shards: list[ShardRecord], **facts: Any) -> dict[str, Any]:
    """The content of `manifest.json`: format, split, dtype, totals, shards, and any further `facts`."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "split": split,
        "dtype": dtype,
        "documents": sum(shard.documents for shard in shards),
        "tokens": sum(shard.tokens for shard in shards),
        **facts,
        "shards": [asdict(shard) for shard in shards],
    }


class TokenShards:
    """A folder of token shards, read as one stream of tokens through memory maps.

    A folder behind a URL is read in one of two ways: with a cache folder, whole shards are copied there when they are
    first needed, verified by their hash, and mapped; without one, each row is a ranged read of the store.

    Attributes:
        num_tokens: length of the stream.
        is_remote: whether reading a row is a request to a store, so that several are worth making at once.
        tokenizer: the manifest's facts about the tokenizer (`fingerprint`, `vocab_size`, `document_end_id`).
    """

    def __init__(self, folder: str | Place, cache: str | Path | None = None) -> None:
        """Read the manifest of `folder` and check that every shard file has the recorded size.

        Args:
            folder: a local folder or an fsspec URL.
            cache: local folder for copies of remote shards; one folder serves any number of sources and runs.

        Raises:
            UserError: there is no finished manifest, it is of another format, or a shard is missing or of another
                size. Hashes are not read here (`verify` does), so that opening stays fast at any size.
        """
        self.folder = place_of(folder)
        self.cache = Path(cache) if cache is not None and not isinstance(self.folder, Path) else None
        self.is_remote = not isinstance(self.folder, Path) and cache is None
        manifest_path = self.folder / MANIFEST_NAME
        if not manifest_path.is_file():
            raise UserError(
                f"no {MANIFEST_NAME} in {self.folder}: not a folder of token shards, or its preparation is not "
                "finished (running `python -m coda_pretrain data` again with the same arguments finishes it)"
            )
        manifest = read_json(manifest_path)
        if (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
            got = f"format {manifest.get('format')!r} version {manifest.get('version')!r}"
            raise UserError(f"{manifest_path} must be format {FORMAT!r} version {VERSION}, got {got}")
        if manifest["dtype"] not in DTYPES:
            raise UserError(f"{manifest_path}: dtype must be one of {list(DTYPES)}, got {manifest['dtype']!r}")
        self.dtype = DTYPES[manifest["dtype"]]
        self.tokenizer: dict[str, Any] = manifest["tokenizer"]
        self.shards = [ShardRecord(**record) for record in manifest["shards"]]
        self._check_sizes()
        self._starts = np.concatenate([[0], np.cumsum([shard.tokens for shard in self.shards], dtype=np.int64)])
        self.num_tokens = int(self._starts[-1])
        self._open = lru_cache(maxsize=OPEN_SHARDS)(self._map_shard)

    def _check_sizes(self) -> None:
        if not self.shards:
            raise UserError(f"{self.folder / MANIFEST_NAME} lists no shards")
        sizes = self._sizes()
        for shard in self.shards:
            for suffix, expected in self._expected_sizes(shard).items():
                got = sizes.get(f"{shard.name}{suffix}")
                if got != expected:
                    found = "it is missing" if got is None else f"it has {got}"
                    path = self.folder / f"{shard.name}{suffix}"
                    raise UserError(f"{path} must have {expected} bytes as its manifest says, but {found}")

    def _expected_sizes(self, shard: ShardRecord) -> dict[str, int]:
        return {".bin": shard.tokens * self.dtype.itemsize, ".ends": shard.documents * ENDS_DTYPE.itemsize}

    def _sizes(self) -> dict[str, int]:
        """Bytes of each file in the folder."""
        if isinstance(self.folder, Path):
            return {path.name: size_of(path) for path in self.folder.iterdir() if path.is_file()}
        entries = self.folder.fs.ls(self.folder.path, detail=True)  # one request, also for thousands of shards
        return {e["name"].rstrip("/").rsplit("/", 1)[-1]: e["size"] for e in entries if e["type"] == "file"}

    def _map_shard(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        shard = self.shards[index]
        tokens, ends = self.folder / f"{shard.name}.bin", self.folder / f"{shard.name}.ends"
        if self.is_remote:
            return (
                RangedArray(tokens, self.dtype, shard.tokens),
                verified_array(ends, ENDS_DTYPE, shard.ends_sha256),
            )
        if self.cache is not None:
            tokens = cached_file(tokens, self.cache, shard.tokens_sha256)
            ends = cached_file(ends, self.cache, shard.ends_sha256)
        return np.memmap(tokens, dtype=self.dtype, mode="r"), np.memmap(ends, dtype=ENDS_DTYPE, mode="r")

    def identity(self) -> dict[str, Any]:
        """What tells this stream from any other: a hash over the hashes of its shards in order, and its lengths.

        It comes from the manifest and reads no shard. Names and places of files do not matter.
        """
        digest = hashlib.sha256(f"{self.dtype.name} {self.tokenizer['document_end_id']}".encode())
        for shard in self.shards:
            digest.update(f"\n{shard.tokens_sha256} {shard.ends_sha256}".encode())
        documents = sum(shard.documents for shard in self.shards)
        return {"sha256": digest.hexdigest(), "tokens": self.num_tokens, "documents": documents}

    def verify(self) -> None:
        """Read everything and compare the hashes.

        Raises:
            UserError: the files of a shard are not what the manifest recorded.
        """
        for shard in self.shards:
            if not shard_is_intact(self.folder, shard):
                raise UserError(f"shard {shard.name} in {self.folder} does not have the hash its manifest recorded")

    def num_rows(self, seq_len: int) -> int:
        """Rows of `seq_len` tokens the stream is cut into; the last one may be partly padding."""
        return -(-self.num_tokens // seq_len)

    def read(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens `[start, start + length)` of the stream.

        Returns:
            input_ids: (length,) int32. After the end of the stream: the document-end token.
            segment_ids: (length,) int32: 1, 2, ... for the documents of these tokens in order, 0 after the end.
        """
        assert 0 <= start < self.num_tokens, f"start must be in [0, {self.num_tokens}), got {start}"
        input_ids = np.full(length, self.tokenizer["document_end_id"], dtype=np.int32)
        segment_ids = np.zeros(length, dtype=np.int32)
        filled, segment = 0, 1
        index = int(np.searchsorted(self._starts, start, side="right")) - 1
        while filled < length and index < len(self.shards):
            tokens, ends = self._open(index)
            low = start + filled - int(self._starts[index])
            high = min(low + length - filled, len(tokens))
            part = slice(filled, filled + high - low)
            input_ids[part] = tokens[low:high]
            first = int(np.searchsorted(ends, low, side="right"))  # the document that holds position low
            last = int(np.searchsorted(ends, high, side="left"))  # the document that holds position high - 1
            inner_ends = ends[first:last].astype(np.int64) - low
            segment_ids[part] = segment + np.searchsorted(inner_ends, np.arange(high - low), side="right")
            segment += last - first + 1
            filled += high - low
            index += 1
        return input_ids, segment_ids
