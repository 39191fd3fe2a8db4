"""Text in: finds the input files, cuts them into pieces of work, and reads the documents of a piece.

A piece is a function of the input alone (never of the number of workers), so each makes the same shard in every run.
Lines of JSONL, rows of parquet and of a Hugging Face data set are documents; a text or source file is one document.
Not here: tokens and shards (``prepare``).
"""

import fnmatch
import glob
import io
import json
import os
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")
PARQUET_ROWS = 1024  # rows held in memory at once
Kind = Literal["jsonl", "parquet", "text", "dataset"]


@dataclass(frozen=True)
class Part:
    """A range of one input: bytes of JSONL, row groups of parquet, rows of a data set, or a whole text file."""

    path: str
    kind: Kind
    start: int
    stop: int
    size: int
    """Bytes of input, for progress and for how much makes a piece."""


@dataclass(frozen=True)
class Document:
    """One document, or the reason why there is none."""

    path: str
    text: str | None
    problem: Literal["undecodable", "empty"] | None = None


def kind_of(path: str, text_suffixes: tuple[str, ...]) -> Kind | None:
    """How a file is read, by its suffix (before that of a compression); None if it is not an input."""
    name = path.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    if name.endswith((".jsonl", ".ndjson")):
        return "jsonl"
    if path.lower().endswith(".parquet"):
        return "parquet"
    return "text" if name.endswith(text_suffixes) and name == path.lower() else None


def find_files(inputs: list[str], exclude: list[str], text_suffixes: tuple[str, ...]) -> list[str]:
    """All input files below the given files, folders and glob patterns, sorted by path, each once.

    Args:
        inputs: files, folders (searched recursively, other suffixes are passed over) and glob patterns.
        exclude: patterns in the manner of ``fnmatch``; a file whose path matches one is left out.
        text_suffixes: lower-case suffixes of files that are one document each.

    Raises:
        ValueError: an input matches nothing, or a file named directly has a suffix that cannot be read.
    """
    found: set[str] = set()
    known = f".jsonl (also compressed: {', '.join(COMPRESSED)}), .parquet, {', '.join(text_suffixes)}"
    for pattern in inputs:
        matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise ValueError(f"--input {pattern}: no such file or folder, and as a pattern it matches nothing")
        files: set[str] = set()
        for match in matches:
            if os.path.isdir(match):
                below = (os.path.join(folder, name) for folder, _, names in os.walk(match) for name in names)
                files.update(path for path in below if kind_of(path, text_suffixes))
            elif kind_of(match, text_suffixes):
                files.add(match)
            elif match == pattern:
                raise ValueError(f"--input {match}: the suffix must be one of {known}; --text_suffixes adds more")
        kept = {path for path in files if not any(fnmatch.fnmatch(path, skip) for skip in exclude)}
        if not kept:
            left_out = f" that --exclude leaves over ({len(files)} before)" if files else ""
            raise ValueError(f"--input {pattern}: holds no file{left_out} with a suffix of {known}")
        found |= kept
    return sorted(found)


def parts_of_file(path: str, text_suffixes: tuple[str, ...], piece_bytes: int) -> Iterator[Part]:
    """Cut one file into parts of about ``piece_bytes``. Compressed and text files are not cut.

    Raises:
        ValueError: a parquet file that cannot be opened.
    """
    kind, size = kind_of(path, text_suffixes), os.path.getsize(path)
    if kind == "jsonl" and not path.lower().endswith(COMPRESSED):
        for start in range(0, size, piece_bytes):
            stop = min(start + piece_bytes, size)
            yield Part(path, kind, start, stop, stop - start)
    elif kind == "parquet":
        try:
            metadata = pq.read_metadata(path)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} is not a parquet file: {error}") from error
        sizes = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
        start = held = 0
        for group, group_size in enumerate(sizes):
            held += group_size
            if held >= piece_bytes or group == len(sizes) - 1:
                yield Part(path, kind, start, group + 1, held)
                start, held = group + 1, 0
    else:
        yield Part(path, kind or "text", 0, size, size)


def parts_of_dataset(name: str, num_rows: int, num_bytes: int, piece_bytes: int) -> Iterator[Part]:
    """Cut a data set of ``num_rows`` rows and about ``num_bytes`` bytes into parts of about ``piece_bytes``."""
    rows = max(1, int(num_rows * piece_bytes / max(num_bytes, 1)))
    for start in range(0, num_rows, rows):
        stop = min(start + rows, num_rows)
        yield Part(name, "dataset", start, stop, int(num_bytes * (stop - start) / num_rows))


def group_parts(parts: Iterator[Part], piece_bytes: int) -> list[tuple[Part, ...]]:
    """Join consecutive parts until each group has at least ``piece_bytes`` (the last may have fewer)."""
    pieces: list[tuple[Part, ...]] = []
    held: list[Part] = []
    size = 0
    for part in parts:
        held.append(part)
        size += part.size
        if size >= piece_bytes:
            pieces.append(tuple(held))
            held, size = [], 0
    return [*pieces, tuple(held)] if held else pieces


def read_documents(part: Part, text_key: str, dataset: Any = None) -> Iterator[Document]:
    """The documents of a part in order, with those that cannot be decoded or hold nothing but white space marked.

    Args:
        part: what to read.
        text_key: field of a JSONL object, column of a parquet file or data set, that holds the text.
        dataset: the loaded data set, for a part of kind ``dataset``.

    Raises:
        ValueError: a record has no ``text_key``, or it holds something other than text.
    """
    readers = {"jsonl": _read_jsonl, "parquet": _read_parquet}
    if part.kind == "text":
        texts: Iterator[str | None] = iter([_read_text_file(part.path)])
    elif part.kind == "dataset":
        texts = _read_dataset(part, text_key, dataset)
    else:
        texts = readers[part.kind](part, text_key)
    for text in texts:
        if text is None:
            yield Document(part.path, None, "undecodable")
        elif not text.strip():
            yield Document(part.path, None, "empty")
        else:
            yield Document(part.path, text)


def _read_text_file(path: str) -> str | None:
    """The text of a file with its line ends as they are; a Python file may declare its encoding (PEP 263)."""
    data = Path(path).read_bytes()
    try:
        encoding = "utf-8-sig"
        if path.endswith(".py"):
            encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        return checked_text(data.decode(encoding))
    except (UnicodeDecodeError, SyntaxError):  # SyntaxError: the declared encoding is unknown or wrong
        return None


def checked_text(text: str) -> str | None:
    r"""``text``, or None if it holds lone surrogates (a JSON ``\ud800``), which no encoding can write."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return None
    return text


def _text_of(value: Any, path: str, text_key: str) -> str | None:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{path}: --text_key {text_key} must hold text, got {type(value).__name__}")
    return checked_text(value)


def _read_jsonl(part: Part, text_key: str) -> Iterator[str | None]:
    """Records of the lines that start in ``[start, stop)``; a line that is not JSON counts as undecodable."""
    whole = part.path.lower().endswith(COMPRESSED)
    with pa.input_stream(part.path, compression="detect") if whole else open(part.path, "rb") as file:
        position = part.start
        if position:
            file.seek(position - 1)
            position += len(file.readline()) - 1  # the rest of a line that belongs to the part before
        lines = _lines(file) if whole else file
        for line in lines:
            if not whole and position >= part.stop:
                return
            position += len(line)
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
            except (UnicodeDecodeError, json.JSONDecodeError):
                yield None
                continue
            if not isinstance(record, dict) or text_key not in record:
                keys = sorted(record) if isinstance(record, dict) else type(record).__name__
                raise ValueError(f"{part.path}: a record has no --text_key {text_key!r}; it has {keys}")
            yield _text_of(record[text_key], part.path, text_key)


def _lines(stream: pa.NativeFile) -> Iterator[bytes]:
    rest = b""
    while block := stream.read(1 << 20):
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
    yield rest


def _read_parquet(part: Part, text_key: str) -> Iterator[str | None]:
    with pq.ParquetFile(part.path) as file:
        if text_key not in file.schema_arrow.names:
            raise ValueError(f"{part.path}: no column --text_key {text_key!r}; it has {file.schema_arrow.names}")
        groups = list(range(part.start, part.stop))
        for batch in file.iter_batches(batch_size=PARQUET_ROWS, row_groups=groups, columns=[text_key]):
            for value in batch.column(0):
                try:
                    plain = value.as_py()
                except UnicodeDecodeError:
                    yield None
                    continue
                yield _text_of(plain, part.path, text_key)


def _read_dataset(part: Part, text_key: str, dataset: Any) -> Iterator[str | None]:
    for start in range(part.start, part.stop, PARQUET_ROWS):
        for value in dataset[start : min(start + PARQUET_ROWS, part.stop)][text_key]:
            yield _text_of(value, part.path, text_key)


def load_dataset(name: str, config: str | None, split: str, text_key: str) -> Any:
    """A Hugging Face data set by name or from a local folder (also one written by ``save_to_disk``).

    Raises:
        ValueError: it cannot be loaded, or has no column ``text_key``.
    """
    import datasets  # seconds to import, and only this input needs it

    try:
        if os.path.isfile(os.path.join(name, "state.json")):
            dataset = datasets.load_from_disk(name)
        elif os.path.isfile(os.path.join(name, "dataset_dict.json")):
            dataset = datasets.load_from_disk(os.path.join(name, split))
        else:
            dataset = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError) as error:
        raise ValueError(f"--hf_dataset {name} (--hf_config {config}, --hf_split {split}): {error}") from error
    if text_key not in dataset.column_names:
        raise ValueError(f"--hf_dataset {name}: no column --text_key {text_key!r}; it has {dataset.column_names}")
    return dataset.select_columns([text_key])
