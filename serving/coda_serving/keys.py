"""The keys that callers may show: that of the environment, and those of a file that may change while the server runs.

Not here: which requests need one (`gate`).
"""

import hashlib
import hmac
import logging
import re
import time
from collections.abc import Iterable
from pathlib import Path

from CoDALanguageModel.errors import UserError

logger = logging.getLogger(__name__)

LINE = re.compile(r"(?:(?P<name>[A-Za-z0-9_.-]{1,64}):)?(?P<key>[!-~]+)")

SETTLED_NS = 2_000_000_000
"""A file that was changed longer ago has another time when it changes again: longer than the ticks of a file system."""

UNNAMED = "unnamed"
"""Name of a caller whose key has none."""


def read_keys(path: Path) -> dict[bytes, str]:
    """Names of callers by the digests of their keys, from a file of lines `KEY` or `NAME:KEY`.

    Raises:
        UserError: the file cannot be read, holds no key, or has a wrong line. No message shows a line: it may be a key.
    """
    try:
        if not path.is_file():  # nor a pipe, which could be waited for
            raise UserError("there is no such file")
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read: {error.strerror if isinstance(error, OSError) else error.reason}") from error
    found: dict[bytes, tuple[int, str]] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        match = LINE.fullmatch(line)
        if match is None or (match["name"] is None and ":" in line):
            raise UserError(
                f"line {number} must be KEY or NAME:KEY, a key of visible ASCII characters (and no ':' in one without "
                "a name), a name of up to 64 letters, digits, '_', '.' and '-'"
            )
        digest = _digest(match["key"].encode())
        if digest in found:
            raise UserError(f"line {number} has the key of line {found[digest][0]}")
        found[digest] = number, match["name"] or UNNAMED
    if not found:
        raise UserError("the file holds no key")
    return {digest: name for digest, (_, name) in found.items()}


class Keys:
    """The keys that are valid now. Only digests are kept.

    Args:
        key: one that has no name, if there is one.
        path: a file of more, which is read again whenever it has changed. While it cannot be used, the keys that it
            held before stay valid.

    Raises:
        UserError: as `read_keys`.
    """

    def __init__(self, key: str | None = None, path: Path | None = None) -> None:
        self._own = {} if key is None else {_digest(key.encode()): UNNAMED}
        self._path = path
        self._stamp: tuple[int, ...] | None = None
        self._read: dict[bytes, str] = {}
        self._fault = ""
        if path is not None:
            self._note_stamp(_stamp(path))
            self._read = read_keys(path)

    def __bool__(self) -> bool:
        return bool(self._own or self._read)

    @property
    def is_file_valid(self) -> bool:
        """Whether the last reading of the file went well."""
        return not self._fault

    def caller(self, shown: Iterable[bytes]) -> str | None:
        """The name of who shows one of `shown`; None if none is valid. Takes the same time whichever key it is."""
        self._refresh()
        found = None
        for given in map(_digest, shown):
            for digest, name in (self._own | self._read).items():
                if hmac.compare_digest(digest, given):
                    found = name
        return found

    def _refresh(self) -> None:
        if self._path is None or ((stamp := _stamp(self._path)) == self._stamp and self._is_settled):
            return
        self._note_stamp(stamp)
        before = self._read, self._fault
        try:
            self._read, self._fault = read_keys(self._path), ""
        except UserError as error:
            self._fault = str(error)
        if (self._read, self._fault) == before:
            return
        if self._fault:
            held = len(self._read)
            logger.error("API_KEYS_FILE=%s: %s; the %d keys of before stay valid", self._path, self._fault, held)
        else:
            logger.warning("API_KEYS_FILE=%s has changed: %d keys are valid now", self._path, len(self._read))

    def _note_stamp(self, stamp: tuple[int, ...] | None) -> None:
        """Remember what is about to be read, and whether it could change and still have this stamp."""
        self._stamp = stamp
        self._is_settled = stamp is None or time.time_ns() - stamp[0] > SETTLED_NS


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _stamp(path: Path) -> tuple[int, ...] | None:
    """What changes with a file; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ctime_ns, status.st_mtime_ns, status.st_size, status.st_ino, status.st_dev
