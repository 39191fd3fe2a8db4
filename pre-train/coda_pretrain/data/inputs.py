"""Input files: what lies below the given files, folders and patterns, what is passed over, and what cannot be read.

Nothing is left out without a word: a file is an input, or it is unusable and the reason is kept, or it is passed over
(its suffix is not read, or its folder is read under another name) and named as such. Not here: the documents in a file
(`documents`) and how much may be unusable (`skipped`).
"""

import errno
import fnmatch
import glob
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from CoDALanguageModel.errors import UserError
from CoDALanguageModel.run_files import LFS_POINTER

CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}
COMPRESSED = tuple(CODECS)
MAGIC = {"gzip": (b"\x1f\x8b",), "bz2": (b"BZh",), "zstd": (b"\x28\xb5\x2f\xfd",), "lz4": (b"\x04\x22\x4d\x18",)}
SKIPPABLE_FRAME = b"\x2a\x4d\x18"  # bytes 1 to 3 of what zstd and lz4 files may start with too
LFS_POINTER_BYTES = 1024  # none is as long
IS_POINTER = "a Git LFS pointer; `git lfs pull` fetches the file itself"
SAME_FOLDER = "its folder is read under another name"
OWN_OUTPUT = "it is --output"
Kind = Literal["jsonl", "parquet", "text", "dataset"]


class UnreadableFileError(UserError):
    """A file that cannot be read at all, or not to its end; the message is the reason, without the file's name."""


@dataclass
class Listing:
    """What the inputs hold."""

    files: list[str] = field(default_factory=list)
    """Files with a suffix that is read, sorted. Whether they can be opened is not known yet."""

    unusable: dict[str, str] = field(default_factory=dict)
    """Files and folders that cannot be read, and why."""

    passed_over: dict[str, str] = field(default_factory=dict)
    """Files and folders that are not inputs, and why: a suffix, or `SAME_FOLDER`."""

    excluded: int = 0
    """Files that `--exclude` left out."""


def printable(path: str) -> str:
    r"""A path as text that can be written anywhere: bytes that are not UTF-8 as `\xe9`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def codec_of(path: str) -> str | None:
    """The compression that a file's suffix names."""
    return CODECS.get(os.path.splitext(path.lower())[1])


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


def find_files(inputs: list[str], exclude: list[str], text_suffixes: tuple[str, ...], output: str = "") -> Listing:
    """All input files below the given files, folders and glob patterns, sorted by path, each once.

    Links to folders are followed. A folder that is reached twice (a link back into the tree, a loop of links) is read
    under the first of its names, one without links before others.

    Args:
        inputs: files, folders (searched recursively) and glob patterns.
        exclude: patterns in the manner of `fnmatch`; a file whose path matches one is left out.
        text_suffixes: lower-case suffixes of files that are one document each.
        output: folder that the shards go to; where a link or pattern leads to it, it is passed over.

    Raises:
        UserError: an input matches nothing, a file named directly has a suffix that cannot be read, or the output
            lies inside a folder that is an input.
    """
    listing = Listing()
    found: set[str] = set()
    known = f".jsonl (also compressed: {', '.join(COMPRESSED)}), .parquet, {', '.join(text_suffixes)}"
    for pattern in inputs:
        matches = [pattern] if os.path.exists(pattern) else sorted(matches_of(pattern, listing, output))
        if not matches:
            raise UserError(f"--input {pattern}: no such file or folder, and as a pattern it matches nothing")
        if output and matches == [pattern] and Path(output).resolve().is_relative_to(Path(pattern).resolve()):
            raise UserError(f"--output {output} must not lie inside --input {pattern}; choose a folder outside")
        files: set[str] = set()
        broken = len(listing.unusable)
        for match in matches:
            if os.path.isdir(match):
                for path in files_of_folder(match, listing, output):
                    if kind_of(path, text_suffixes):
                        files.add(path)
                    elif os.path.islink(path) and not os.path.exists(path):  # perhaps of a whole folder
                        listing.unusable[path] = _reason_of_link(path)
                    else:
                        listing.passed_over[path] = os.path.splitext(path)[1] or "no suffix"
            elif kind_of(match, text_suffixes):
                files.add(match)
            elif match == pattern:
                raise UserError(f"--input {match}: the suffix must be one of {known}; --text_suffixes adds more")
            else:
                listing.passed_over[match] = os.path.splitext(match)[1] or "no suffix"
        kept = {path for path in files if not _is_excluded(path, exclude)}
        listing.excluded += len(files) - len(kept)
        if not kept and len(listing.unusable) == broken:
            left_out = f" that --exclude leaves over ({len(files)} before)" if files else ""
            raise UserError(f"--input {pattern}: holds no file{left_out} with a suffix of {known}")
        found |= kept
    for left_out in (listing.unusable, listing.passed_over):
        for path in [path for path in left_out if path in found or _is_excluded(path, exclude)]:
            del left_out[path]
    listing.files = sorted(_without_repeated_folders(found, listing))
    return listing


def matches_of(pattern: str, listing: Listing, output: str) -> Iterator[str]:
    """What a pattern matches. `glob` follows links within `**` without end, so that is walked as folders are."""
    whole = pattern.rstrip("/").removesuffix("/**")
    if whole != pattern.rstrip("/") and "**" not in whole:
        yield from glob.glob(whole)  # all below these folders
        return
    start, recursive, rest = pattern.partition("**/")
    if not recursive or (start and not start.endswith("/")):  # two stars within a name are one
        yield from glob.glob(pattern)
        return
    wanted = ("**", *rest.split("/"))
    for folder in sorted(glob.glob(start)) if start else ["."]:
        for path in files_of_folder(folder, listing, output):
            names = os.path.relpath(path, folder).split("/")
            if any(_is_match(names[:depth], wanted) for depth in range(1, len(names) + 1)):
                yield path if start else os.path.relpath(path)


def _is_match(names: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether names of folders and a file fit a pattern in the manner of `glob`, which finds nothing hidden."""
    if not pattern or not names:
        return not names and all(part == "**" for part in pattern)
    visible = not names[0].startswith(".")
    if pattern[0] == "**":
        return _is_match(names, pattern[1:]) or (visible and _is_match(names[1:], pattern))
    fits = fnmatch.fnmatchcase(names[0], pattern[0]) and (visible or pattern[0].startswith("."))
    return fits and _is_match(names[1:], pattern[1:])


def _is_excluded(path: str, exclude: list[str]) -> bool:
    return any(fnmatch.fnmatch(path, pattern) for pattern in exclude)


def files_of_folder(folder: str, listing: Listing, output: str) -> Iterator[str]:
    """Every file below a folder: first those that no link leads to, then those behind links to folders."""
    seen: dict[tuple[int, int], str] = {}
    waiting = [folder]

    def note(error: OSError) -> None:
        listing.unusable[error.filename] = f"a folder that cannot be listed: {error.strerror}"

    while waiting:
        top, links = waiting.pop(0), []
        for current, folders, names in os.walk(top, onerror=note):
            status = os.stat(current)
            is_output = os.path.isdir(output) and os.path.samefile(current, output)
            if is_output or (status.st_dev, status.st_ino) in seen:
                listing.passed_over[current] = OWN_OUTPUT if is_output else SAME_FOLDER
                folders.clear()
                continue
            seen[status.st_dev, status.st_ino] = current
            links += [path for name in folders if os.path.islink(path := os.path.join(current, name))]
            yield from (os.path.join(current, name) for name in names)
        waiting += sorted(links)


def _without_repeated_folders(found: set[str], listing: Listing) -> Iterator[str]:
    """The files whose folder is not also read under a better name, as patterns and several inputs can make it."""
    names: dict[str, set[str]] = {}
    for folder in {os.path.dirname(path) for path in found}:
        names.setdefault(os.path.realpath(folder), set()).add(folder)
    kept = set()
    for real, folders in names.items():
        kept.add(min(folders, key=lambda name: (os.path.abspath(name) != real, len(name), name)))
    for path in found:
        if os.path.dirname(path) in kept:
            yield path
        else:
            listing.passed_over[path] = SAME_FOLDER


def _reason_of_link(path: str) -> str:
    return f"a link to {printable(os.readlink(path))}, which is not there"


def check_openable(path: str, kind: Kind) -> os.stat_result:
    """Look at a file without reading it through.

    Raises:
        UnreadableFileError: it is no regular file, may not be read, or its first bytes are not what its name promises.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        if error.errno == errno.ENOENT and os.path.islink(path):
            raise UnreadableFileError(_reason_of_link(path)) from error
        raise UnreadableFileError(
            "a link that leads back to itself" if error.errno == errno.ELOOP else str(error.strerror)
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableFileError("a FIFO, socket or device, not a file")
    if not os.access(path, os.R_OK):
        raise UnreadableFileError("may not be read by this user")
    if kind == "text":
        return status
    with open(path, "rb") as file:
        start = file.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        raise UnreadableFileError(IS_POINTER)
    if kind == "jsonl":
        _check_codec(start, codec_of(path))
    return status


def _check_codec(start: bytes, codec: str | None) -> None:
    if codec is not None:
        is_frame = codec in ("zstd", "lz4") and start[1:4] == SKIPPABLE_FRAME
        if not start.startswith(MAGIC[codec]) and not is_frame:
            raise UnreadableFileError(f"not {codec}, as its name says" if start else f"empty, and so not {codec}")
        return
    for name, magic in MAGIC.items():
        if start.startswith(magic) and name != "bz2":  # three letters that a broken line may start with
            raise UnreadableFileError(f"{name}, but its name does not say so")
