"""Files that rooms leave for each other, or for a restart: whole or not there, rows of JSON, and folders of models.

Both trainers write `metrics.jsonl` in this way, and whoever draws or continues a run reads it.
"""

import fcntl
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UserError

logger = logging.getLogger(__name__)

LFS_POINTER = b"version https://git-lfs"
"""What a file starts with that stands for the real one, in a repository that was cloned without Git LFS."""

HUB_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")
"""A name on the Hub."""


def is_hub_id(name: str, *, bare: bool = False) -> bool:
    """Whether `name` can be one of the Hub (`owner/name`; a `bare` one has no owner) and not only a path."""
    return bool(HUB_ID.fullmatch(name)) and (bare or "/" in name)


def refuse_no_model(name: str, *, bare: bool = False) -> None:
    """Refuse what is no folder and no name of the Hub either, before anything is looked up there.

    Raises:
        UserError: it is neither.
    """
    if not Path(name).is_dir() and not is_hub_id(name, bare=bare):
        raise UserError(f"no model folder at {name!r} (a Hub name has the form owner/name)")


@contextmanager
def arriving(target: Path) -> Iterator[Path]:
    """A name beside `target` to write to: it becomes `target` when the block ends well, and vanishes otherwise."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def claimed(folder: Path) -> Iterator[int]:
    """Keep a run's folder from other runs while the block lasts.

    Processes that are forked in the block (the workers of a data loader) write nothing there and do not keep it.

    Yields:
        A descriptor. A program that inherits it keeps the folder as well, also where this process is killed.

    Raises:
        UserError: another run has it.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another run writes to {folder}, or a process of one that was killed: wait for it, end it, or choose "
                "another folder"
            ) from error
        except OSError as error:  # a file system without locks
            logger.warning("that no other run writes to %s is not known: %s", folder, error)
        _CLAIMS.add(descriptor)
        yield descriptor
    finally:
        _CLAIMS.discard(descriptor)
        os.close(descriptor)


_CLAIMS: set[int] = set()
"""Descriptors of the folders that this process keeps."""


def _let_go() -> None:
    """Close the copies that a forked process has: it may outlive this one, by the seconds until it sees that."""
    while _CLAIMS:
        os.close(_CLAIMS.pop())


os.register_at_fork(after_in_child=_let_go)


def write_whole(target: Path, text: str) -> None:
    """Write `text` so that `target` holds what it held or all of it, on the disk, whenever the process dies."""
    with arriving(target) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_json(file: Path, remedy: str = "") -> dict[str, Any]:
    """The object that a file of JSON holds.

    Raises:
        UserError: it is not valid, or holds something else; the message ends with the remedy.
    """
    remedy = remedy and f"; {remedy}"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of the JSON, or of its encoding
        raise UserError(f"{str(file)!r} is not valid JSON: {error}{remedy}") from error
    if not isinstance(content, dict):
        raise UserError(f"{str(file)!r} must hold a JSON object, got {type(content).__name__}{remedy}")
    return content


def whole_lines(path: Path) -> Iterator[tuple[int, Any, int]]:
    """The number of each line of a file, what it holds, and the byte behind it.

    A last line that was not written completely (it has no line break, or is not JSON) is left out, with a warning.

    Raises:
        UserError: another line is not JSON.
    """
    end = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            end += len(line)
            try:
                content, is_whole = json.loads(line), line.endswith(b"\n")
            except (ValueError, RecursionError) as error:  # of the JSON, or of its encoding
                if next(lines, None) is not None:
                    raise UserError(f"{path}: line {number} is not JSON; mend it, or remove it") from error
                is_whole = False
            if not is_whole:
                logger.warning("%s ends in a line that was not written completely; it is left out", path)
                return
            yield number, content, end


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, as `whole_lines` reads it.

    Raises:
        UserError: a line is not JSON.
    """
    return [row for _, row, _ in whole_lines(path)]
