"""The line between a candidate and its checker: messages over two pipes, and failures as data.

Runs inside the sandbox: standard library only. What a message carries is `sandbox_values.py`'s.
"""

import os
import struct

from sandbox_values import MAX_BYTES, exception_class, exception_name

MAX_TEXT = 2000
"""Length of the text of a failure."""

_HEAD = struct.Struct("<Qc")
_LENGTH = struct.Struct("<Q")


def describe(error):
    """One bounded line that says what went wrong."""
    return f"{type(error).__name__}: {error}"[:500]


class Gone(BaseException):
    """The candidate's process ended, or answers what is no answer. Tests do not catch it by `except Exception`."""


class Line:
    """Messages over two pipes: length and kind, then parts with their lengths."""

    def __init__(self, reader, writer):
        self.reader = reader
        self.writer = writer
        self.unread = bytearray()

    def send(self, kind, *parts):
        """Send one message."""
        pieces = [_HEAD.pack(sum(map(len, parts)) + _LENGTH.size * len(parts), kind)]
        for part in parts:
            pieces += (_LENGTH.pack(len(part)), part)
        if sum(map(len, pieces)) < 1 << 16:
            pieces = [b"".join(pieces)]
        for piece in map(memoryview, pieces):
            while piece:
                piece = piece[os.write(self.writer, piece) :]

    def receive(self):
        """(kind, parts) of the next message. Raises `Gone` at the end of the stream and for what is no message."""
        size, kind = _HEAD.unpack(self._exactly(_HEAD.size))
        if size > MAX_BYTES:
            raise Gone("sent what is no answer")
        body, parts, at = memoryview(self._exactly(size)), [], 0
        while at < size:
            length = _LENGTH.unpack_from(body, at)[0] if at + _LENGTH.size <= size else size
            at += _LENGTH.size + length
            if at > size:
                raise Gone("sent what is no answer")
            parts.append(body[at - length : at])
        return kind, parts

    def _exactly(self, size):
        while len(self.unread) < size:
            chunk = os.read(self.reader, min(max(size - len(self.unread), 1 << 16), 1 << 20))
            if not chunk:
                raise Gone("ended without an answer")
            self.unread += chunk
        if len(self.unread) == size:  # nothing follows: no copy of what may be large
            data, self.unread = self.unread, bytearray()
        else:
            data, self.unread = self.unread[:size], self.unread[size:]
        return data


def failure_of(error):
    """An exception as data: names of its class and bases, text, exit code, and what it was made of if that is plain."""
    names = [exception_name(kind) for kind in type(error).__mro__[:-1]]
    text, made_of = "", BaseException.args.__get__(error)
    try:
        text = str(error)[:MAX_TEXT]
        if isinstance(error, OSError) and len(made_of) == 2 and error.filename is not None:
            made_of = *made_of, error.filename
        elif "JSONDecodeError" in names:
            made_of = error.msg, error.doc, error.pos
    except BaseException:  # the program's own exception class may do anything
        made_of = None
    if made_of is None or len(made_of) > 8 or not all(map(is_short, made_of)):
        made_of = None
    code = error.code if isinstance(error, SystemExit) else None
    return names, text, code if isinstance(code, (int, str)) else None, made_of


def is_short(value):
    """Whether a value is one that a message about a failure may hold."""
    kind = type(value)
    return kind in (int, float, bool, type(None)) or (kind in (str, bytes) and len(value) <= MAX_TEXT)


def rebuild(failure):
    """The builtin exception that a failure names first; of a class of the candidate's own, the builtin one below."""
    names, text, code, made_of = failure
    if "SystemExit" in names:
        return SystemExit(code)
    kind = next((found for name in names if (found := exception_class(name))), Exception)
    for given in (made_of, (text,)):
        try:
            if given is not None and str(error := kind(*given))[:MAX_TEXT] == text:
                return error
        except Exception:  # UnicodeDecodeError and the like want more than a text, and refuse much
            continue
    try:
        return kind(text)
    except TypeError:
        return ValueError(text) if issubclass(kind, ValueError) else Exception(text)
