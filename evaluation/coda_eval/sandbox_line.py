"""The line between a candidate and its checker: messages over two pipes, and failures as data.

Runs inside the sandbox: standard library only. What a message carries is `sandbox_values.py`'s.
"""

import os
import struct

from sandbox_values import MAX_BYTES, exception_class

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


def rebuild(failure):
    """The builtin exception that a failure names first; of a class of the candidate's own, the builtin one below."""
    names, text, code = failure
    if "SystemExit" in names:
        return SystemExit(code)
    kind = next((found for name in names if (found := exception_class(name))), Exception)
    try:
        return kind(text)
    except TypeError:  # UnicodeDecodeError and the like want more than a text
        return ValueError(text) if issubclass(kind, ValueError) else Exception(text)
