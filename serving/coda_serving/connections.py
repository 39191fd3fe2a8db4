"""Connections that nobody can hold for ever: limits that the web server itself has not.

Not here: a body that comes slowly, whose client gets an answer (`gate`).
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MOST_HEAD_BYTES = 64 << 10
"""Bytes of a request line and its headers, about."""


class Connection(HttpToolsProtocol):
    """A connection of uvicorn's that ends when its client neither asks nor reads.

    uvicorn waits without end for the head of a request, however long that is, and for a client to read: its own time
    limit begins behind an answer, with silence.

    Args:
        limit_s: seconds in which a client must have sent the head of a request; also those in which it must have read
            most of what it has been sent, and the rest once the server has closed.
        options: of uvicorn's connection.
    """

    def __init__(self, *, limit_s: float, **options: Any) -> None:
        super().__init__(**options)
        self._limit_s = limit_s
        self._is_in_head = False
        self._num_head_bytes = 0
        self._until_asked: asyncio.TimerHandle | None = None
        self._until_read: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for a request."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing more."""
        self._stop_waiting()
        self._until_read = _cancelled(self._until_read)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on, unless the head of a request has no end."""
        if self._is_in_head:
            self._num_head_bytes += len(data)
            if self._num_head_bytes > MOST_HEAD_BYTES:
                self.send_400_response(f"the head of a request must have at most {MOST_HEAD_BYTES} bytes")
        if not self.transport.is_closing():
            super().data_received(data)
        if self.transport.is_closing():
            self._expect_reading()
        elif self.cycle is None or self.cycle.response_complete:
            self._expect_request()

    def on_message_begin(self) -> None:
        """A request begins."""
        self._is_in_head, self._num_head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Its head is there; the rest is the application's."""
        self._is_in_head = False
        self._stop_waiting()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """Where that was the last answer, what is left of it must be read."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._expect_reading()

    def timeout_keep_alive_handler(self) -> None:
        """Close after a silence."""
        super().timeout_keep_alive_handler()
        self._expect_reading()

    def pause_writing(self) -> None:
        """The client does not read as fast as it is answered."""
        super().pause_writing()
        self._expect_reading()

    def resume_writing(self) -> None:
        """It has read."""
        super().resume_writing()
        if not self.transport.is_closing():
            self._until_read = _cancelled(self._until_read)

    def _expect_request(self) -> None:
        if self._until_asked is None:
            self._until_asked = self.loop.call_later(self._limit_s, self.transport.abort)

    def _stop_waiting(self) -> None:
        self._until_asked = _cancelled(self._until_asked)

    def _expect_reading(self) -> None:
        if self._until_read is None:
            self._until_read = self.loop.call_later(self._limit_s, self.transport.abort)


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
