"""Files that rooms leave for each other, or for a restart: whole or not there, and rows of JSON, one a line.

Both trainers write `metrics.jsonl` in this way, and whoever draws or continues a run reads it.
"""

import fcntl
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UserError

logger = logging.getLogger(__name__)

LFS_POINTER = b"version https://git-lfs"
"""What a file starts with that stands for the real one, in a repository that was cloned without Git LFS."""


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
        yield descriptor
    finally:
        os.close(descriptor)


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


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; a last line that was not written completely is left out, with a warning.

    Raises:
        UserError: another line is not JSON.
    """
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                if next(lines, None) is not None:
                    raise UserError(f"{path}: line {number} is not JSON; mend it, or remove it") from error
                logger.warning("%s ends in a line that was not written completely; it is left out", path)
    return rows
