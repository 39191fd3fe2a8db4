"""Connections that nobody can hold for ever: limits that the web server itself has not.

Not here: a body that comes slowly, whose client gets an answer (`gate`).
"""

import asyncio
import re
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

MOST_HEAD_BYTES = 64 << 10
"""Bytes of a request line and its headers, about; also of what stands between and behind the parts of a body."""

H2C = re.compile(rb"\r\nupgrade:[ \t]*h2c[ \t]*(?=\r\n)", re.IGNORECASE)
"""The header by which clients ask for HTTP/2, among them Java's and those of JetBrains' editors. A server may pass it
over; uvicorn's parser would take what follows the head for HTTP/2, and the body would be lost."""


class TimeLimit:
    """Ends something after a while, unless it is stopped; may be started again.

    It looks twice, so that what has come in the meantime counts also where the event loop itself was late.

    Args:
        seconds: the while.
        action: the end.
    """

    def __init__(self, seconds: float, action: Callable[[], None]) -> None:
        self._seconds = seconds
        self._action = action
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to wait, if that has not begun."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._seconds / 2, self._look_again)

    def stop(self) -> None:
        """Wait no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look_again(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._seconds / 2, self._action)


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
        self._is_in_request = False
        self._num_head_bytes = 0
        """Of the request, since its head or a part of its body was there."""
        self._unanswered: list[RequestResponseCycle] = []
        self._asking = TimeLimit(limit_s, lambda: self.transport.abort())
        self._reading = TimeLimit(limit_s, lambda: self.transport.abort())

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for a request."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self._asking.start()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing more."""
        self._asking.stop()
        self._reading.stop()
        for cycle in self._unanswered:  # uvicorn tells the last one alone
            cycle.disconnected = not cycle.response_complete
            cycle.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on, unless the head of a request has no end, or what follows its body as a part of it."""
        self._num_head_bytes += len(data)
        end = -1 if self._is_in_request else data.find(b"\r\n\r\n")
        if end >= 0:
            data = H2C.sub(b"", data[: end + 2]) + data[end + 2 :]
        super().data_received(data)
        if self._is_in_request and self._num_head_bytes > MOST_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"the head of a request must have at most {MOST_HEAD_BYTES} bytes")
        if self.transport.is_closing():
            self._reading.start()
        elif self.cycle is None or self.cycle.response_complete:
            self._asking.start()

    def on_message_begin(self) -> None:
        """A request begins."""
        self._is_in_request, self._num_head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Its head is there; the rest is the application's."""
        self._num_head_bytes = 0
        self._asking.stop()
        super().on_headers_complete()
        if self.cycle is not None:
            self._unanswered = [cycle for cycle in self._unanswered if not cycle.response_complete] + [self.cycle]

    def on_body(self, body: bytes) -> None:
        """A part of its body."""
        self._num_head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """All of it is there."""
        self._is_in_request = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Where that was the last answer, what is left of it must be read."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._reading.start()

    def timeout_keep_alive_handler(self) -> None:
        """Close after a silence."""
        super().timeout_keep_alive_handler()
        self._reading.start()

    def pause_writing(self) -> None:
        """The client does not read as fast as it is answered."""
        super().pause_writing()
        self._reading.start()

    def resume_writing(self) -> None:
        """It has read."""
        super().resume_writing()
        if not self.transport.is_closing():
            self._reading.stop()
