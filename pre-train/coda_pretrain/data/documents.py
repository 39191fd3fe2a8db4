"""Text in: cuts the input files into pieces of work and reads the documents of a piece.

A piece is a function of the input alone (never of the number of workers), so each makes the same shard in every run.
Lines of JSONL, rows of parquet and of a Hugging Face data set are documents; a text or source file is one document.
What cannot be read is a document without text and with a reason; it ends nothing. Not here: which files there are
(`inputs`), tokens and shards (`prepare`).
"""

import codecs
import io
import json
import lzma
import os
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from CoDALanguageModel.errors import UserError, half_surrogate
from CoDALanguageModel.run_files import LFS_POINTER

from .inputs import (
    COMPRESSED,
    IS_POINTER,
    LFS_POINTER_BYTES,
    Kind,
    UnreadableFileError,
    check_openable,
    codec_of,
    kind_of,
)

PARQUET_ROWS = 1024  # rows held in memory at once
MAX_RECORD_BYTES = 1 << 28  # of one line or text file; more is skipped, since a worker holds several copies
MAX_NESTING = 256  # of JSON; well below what the parser can do under any depth of the stack, so the same everywhere
REASON_CHARACTERS = 200


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
    problem: Literal["undecodable", "empty", "unreadable"] | None = None
    """`undecodable`: this record holds no text that can be read. `unreadable`: nor does the rest of the file."""

    reason: str = ""
    where: str = ""
    """The place in the file: a byte counted from 0, a line from 1 or a row from 0; empty for a file that is one."""


def parts_of_file(path: str, text_suffixes: tuple[str, ...], piece_bytes: int, text_key: str) -> Iterator[Part]:
    """Cut one file into parts of about `piece_bytes`. Compressed and text files are not cut.

    Raises:
        UnreadableFileError: it cannot be opened, is not what its name says, or has no text in `text_key`.
    """
    kind = kind_of(path, text_suffixes) or "text"
    size = check_openable(path, kind).st_size
    if kind == "jsonl" and not path.lower().endswith(COMPRESSED):
        for start in range(0, size, piece_bytes):
            stop = min(start + piece_bytes, size)
            yield Part(path, kind, start, stop, stop - start)
    elif kind == "parquet":
        with open(path, "rb") as stream:
            metadata = parquet_metadata(stream, text_key)
        sizes = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
        start = held = 0
        for group, group_size in enumerate(sizes):
            held += group_size
            if held >= piece_bytes or group == len(sizes) - 1:
                yield Part(path, kind, start, group + 1, held)
                start, held = group + 1, 0
    else:
        yield Part(path, kind, 0, size, size)


def parquet_metadata(stream: IO[bytes], text_key: str) -> pq.FileMetaData:
    """The metadata of a parquet file.

    Raises:
        UnreadableFileError: it is no parquet file, or its `text_key` is missing or holds no text.
    """
    try:
        with pq.ParquetFile(stream) as file:
            metadata, schema = file.metadata, file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        _reraise_if_of_the_system(error)
        raise UnreadableFileError(f"not a whole parquet file: {error}") from error
    if text_key not in schema.names:
        raise UnreadableFileError(f"no column --text_key {text_key!r}; it has {schema.names}")
    kind = schema.field(text_key).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    if not any(check(kind) for check in checks):
        raise UnreadableFileError(f"column --text_key {text_key!r} must hold text, got {kind}")
    return metadata


def parts_of_dataset(name: str, num_rows: int, num_bytes: int, piece_bytes: int) -> Iterator[Part]:
    """Cut a data set of `num_rows` rows and about `num_bytes` bytes into parts of about `piece_bytes`."""
    rows = max(1, int(num_rows * piece_bytes / max(num_bytes, 1)))
    for start in range(0, num_rows, rows):
        stop = min(start + rows, num_rows)
        yield Part(name, "dataset", start, stop, int(num_bytes * (stop - start) / num_rows))


def group_parts(parts: Iterator[Part], piece_bytes: int) -> list[tuple[Part, ...]]:
    """Join consecutive parts until each group has at least `piece_bytes` (the last may have fewer)."""
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
    """The documents of a part in order, with those that cannot be read or hold nothing but white space marked.

    Args:
        part: what to read.
        text_key: field of a JSONL object, column of a parquet file or data set, that holds the text.
        dataset: the loaded data set, for a part of kind `dataset`.

    Raises:
        OSError: the system could not read the file, which may be otherwise the next time.
    """
    if part.kind == "text":
        yield _read_text_file(part.path)
    elif part.kind == "dataset":
        yield from _read_dataset(part, text_key, dataset)
    elif part.kind == "parquet":
        with open(part.path, "rb") as stream:
            yield from parquet_documents(part.path, stream, text_key, part.start, part.stop)
    elif codec_of(part.path) is not None:
        with open(part.path, "rb") as stream:
            yield from jsonl_documents(part.path, stream, text_key)
    else:
        yield from _read_jsonl_range(part, text_key)


def document_of(value: Any, path: str, text_key: str, where: str) -> Document:
    """The document of a record's value."""
    if value is None:
        return Document(path, None, "empty", where=where)
    if not isinstance(value, str):
        return _undecodable(path, where, f"--text_key {text_key} must hold text, got {type(value).__name__}")
    if half_surrogate(value) is not None:
        return _undecodable(path, where, "half of a surrogate pair")
    if not value.strip():
        return Document(path, None, "empty", where=where)
    return Document(path, value, where=where)


def _undecodable(path: str, where: str, reason: str) -> Document:
    return Document(path, None, "undecodable", reason[:REASON_CHARACTERS], where)


def _reraise_if_of_the_system(error: BaseException) -> None:
    """Errors of machine and network have a number or a class of their own; those for broken content are plain."""
    if isinstance(error, OSError) and (error.errno is not None or type(error) is not OSError):
        raise error


def _read_text_file(path: str) -> Document:
    """The text of a file with its line ends as they are; a Python file may declare its encoding (PEP 263)."""
    if os.path.getsize(path) > MAX_RECORD_BYTES:
        return _undecodable(path, "", f"more than {MAX_RECORD_BYTES} bytes in one document")
    data = Path(path).read_bytes()
    if data.startswith(LFS_POINTER) and len(data) < LFS_POINTER_BYTES:
        return _undecodable(path, "", IS_POINTER)
    try:
        encoding = "utf-8-sig"
        if path.endswith(".py"):
            encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        text = data.decode(encoding)
    except (ValueError, LookupError, SyntaxError) as error:  # the last two: the declared encoding is unknown or wrong
        return _undecodable(path, "", str(error))
    return document_of(text, path, "", "")


def _read_jsonl_range(part: Part, text_key: str) -> Iterator[Document]:
    """Records of the lines that start in `[start, stop)`."""
    with open(part.path, "rb") as file:
        position = part.start
        if position:
            position = file.seek(position - 1) + _skip_line(file)  # the rest of a line that belongs to the part before
        while position < part.stop:
            line = file.readline(MAX_RECORD_BYTES + 1)
            if not line:
                return
            length = len(line)
            if length > MAX_RECORD_BYTES and not line.endswith(b"\n"):
                length += _skip_line(file)
            yield from _document_of_line(line, part.path, text_key, f"byte {position}", is_first=position == 0)
            position += length


def _skip_line(file: IO[bytes]) -> int:
    """Bytes up to the end of the line, which are read and dropped."""
    skipped = 0
    while block := file.readline(1 << 20):
        skipped += len(block)
        if block.endswith(b"\n"):
            break
    return skipped


def jsonl_documents(path: str, stream: IO[bytes], text_key: str) -> Iterator[Document]:
    """The records of a whole JSONL file, compressed as its name says. A fault of the compression ends it."""
    number = 0
    try:
        with _decompressed(path, stream) as lines:
            while line := lines.readline(MAX_RECORD_BYTES + 1):
                number += 1
                if len(line) > MAX_RECORD_BYTES and not line.endswith(b"\n"):
                    _skip_line(lines)
                yield from _document_of_line(line, path, text_key, f"line {number}", is_first=number == 1)
    except (OSError, EOFError, lzma.LZMAError) as error:
        _reraise_if_of_the_system(error)
        yield Document(path, None, "unreadable", str(error)[:REASON_CHARACTERS], f"after line {number}")


def _decompressed(path: str, stream: IO[bytes]) -> IO[bytes]:
    codec = codec_of(path)
    if codec is not None:
        return io.BufferedReader(pa.CompressedInputStream(stream, codec), 1 << 16)
    if path.lower().endswith(".xz"):
        return lzma.open(stream)
    return io.BufferedReader(stream, 1 << 16)


def _document_of_line(line: bytes, path: str, text_key: str, where: str, *, is_first: bool) -> Iterator[Document]:
    """The document of a line; none if it is blank."""
    if is_first:
        line = line.removeprefix(codecs.BOM_UTF8)
    if not line.strip():
        return
    if len(line) > MAX_RECORD_BYTES:
        yield _undecodable(path, where, f"more than {MAX_RECORD_BYTES} bytes in one line")
        return
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        yield _undecodable(path, where, f"not UTF-8: {error.reason} at byte {error.start} of the line")
    except RecursionError:
        yield _undecodable(path, where, f"JSON nested deeper than {MAX_NESTING}")
    except ValueError as error:  # no JSON, or an integer of more digits than Python reads
        yield _undecodable(path, where, f"not JSON that can be read: {error}")
    else:
        if not isinstance(record, dict):
            yield _undecodable(path, where, f"no --text_key {text_key!r}; it is no object but {type(record).__name__}")
        elif _is_nested_beyond(record, MAX_NESTING):
            yield _undecodable(path, where, f"JSON nested deeper than {MAX_NESTING}")
        elif text_key not in record:
            yield _undecodable(path, where, f"no --text_key {text_key!r}; it has {sorted(record)}")
        else:
            yield document_of(record[text_key], path, text_key, where)


def _is_nested_beyond(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        inner = (child for item in level for child in (item.values() if isinstance(item, dict) else item))
        level = [child for child in inner if isinstance(child, (dict, list))]
        if not level:
            return False
    return True


def parquet_documents(
    path: str, stream: IO[bytes], text_key: str, start: int = 0, stop: int | None = None
) -> Iterator[Document]:
    """The rows of the row groups `[start, stop)`. Content that cannot be decoded ends them."""
    row = 0
    try:
        with pq.ParquetFile(stream) as file:
            groups = list(range(start, file.num_row_groups if stop is None else stop))
            row = sum(file.metadata.row_group(group).num_rows for group in range(start))
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, row_groups=groups, columns=[text_key]):
                for value in batch.column(0):
                    try:
                        yield document_of(value.as_py(), path, text_key, f"row {row}")
                    except UnicodeDecodeError as error:
                        yield _undecodable(path, f"row {row}", f"not UTF-8: {error.reason} at byte {error.start}")
                    row += 1
    except (pa.ArrowException, OSError) as error:
        _reraise_if_of_the_system(error)
        yield Document(path, None, "unreadable", str(error)[:REASON_CHARACTERS], f"row {row} on")


def _read_dataset(part: Part, text_key: str, dataset: Any) -> Iterator[Document]:
    row = part.start
    for start in range(part.start, part.stop, PARQUET_ROWS):
        for value in dataset[start : min(start + PARQUET_ROWS, part.stop)][text_key]:
            yield document_of(value, part.path, text_key, f"row {row}")
            row += 1


def load_dataset(name: str, config: str | None, split: str, text_key: str) -> Any:
    """A Hugging Face data set by name or from a local folder (also one written by `save_to_disk`).

    Raises:
        UserError: it cannot be loaded, or has no column `text_key`.
    """
    import datasets  # seconds to import, and only this input needs it

    try:
        if os.path.isfile(os.path.join(name, "state.json")):
            dataset = datasets.load_from_disk(name)
        elif os.path.isfile(os.path.join(name, "dataset_dict.json")):
            dataset = datasets.load_from_disk(os.path.join(name, split))
        else:
            dataset = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"--hf_dataset {name} (--hf_config {config}, --hf_split {split}): {error}") from error
    if text_key not in dataset.column_names:
        raise UserError(f"--hf_dataset {name}: no column --text_key {text_key!r}; it has {dataset.column_names}")
    return dataset.select_columns([text_key])
