"""What a request must pass before anything of it is parsed: the key, then the size of its body.

Pure ASGI, so that a body without a key, or beyond the limit, is never read into memory. Not here: what a body says
(`protocol`).
"""

import asyncio
import contextlib
import json

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import SHUTTING_DOWN, ApiError, body_at
from .keys import UNNAMED, Keys
from .settings import ServerSettings

LINGER_S = 2.0
"""Seconds for which the rest of a refused body is received and thrown away."""

CALLER = "coda.caller"
"""Where the scope of a request has the name of its key."""

GUARDED = frozenset({"/metrics", "/v1", "/infill"})
"""Paths that need a key, besides all below `/v1`."""


def caller_of(request: HTTPConnection) -> str:
    """Whom a request counts for where callers take turns: the name of its key, or else its address."""
    name = request.scope.get(CALLER)
    if name not in (None, UNNAMED):
        return f"key {name}"
    return "" if request.client is None else request.client.host


class BodyRefused(Exception):
    """A body went beyond a limit while it was received, which `fault` tells of."""

    def __init__(self, fault: ApiError) -> None:
        super().__init__(fault.message)
        self.fault = fault


class Gate:
    """ASGI middleware: 401 before a byte of the body is received, 413 at the first byte too many, 408 when it is late.

    It also answers requests that are cut off because the server stops: 503 in OpenAI's shape.

    Args:
        app: what it guards.
        settings: `max_body_bytes`, `client_timeout_s`.
        keys: those that open it; where there is none, all may pass.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, keys: Keys) -> None:
        self._app = app
        self._keys = keys
        self._limit = settings.max_body_bytes
        self._limit_s = settings.client_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        fault = self._fault_of_key(scope, headers) or self._fault_of_length(headers)
        if fault is not None:
            await refuse(send, scope["path"], fault, receive)
            return
        received = 0
        is_whole = False
        started = False
        ends_s = asyncio.get_running_loop().time() + self._limit_s

        async def counted_receive() -> Message:
            nonlocal received, is_whole
            try:
                async with asyncio.timeout_at(None if is_whole else ends_s):
                    message = await receive()
            except TimeoutError:
                raise BodyRefused(self._too_slow()) from None
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self._limit:
                    raise BodyRefused(self._too_large(f"more than {self._limit}"))
            is_whole = not message.get("more_body", False)
            return message

        async def noted_send(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, counted_receive, noted_send)
        except BodyRefused as refused:
            if not started:
                await refuse(send, scope["path"], refused.fault, receive)
        except asyncio.CancelledError:  # the web server ends what still runs when its time to stop is over
            if not started:
                await refuse(send, scope["path"], SHUTTING_DOWN)

    def _fault_of_key(self, scope: Scope, headers: Headers) -> ApiError | None:
        """401 unless a valid key is shown where one is needed; notes in the scope whose key it is."""
        path = scope["path"]
        if not self._keys or not (path in GUARDED or path.startswith("/v1/")):
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        keys = [given] if scheme.lower() == "bearer" else []
        keys += [headers["x-api-key"]] if "x-api-key" in headers else []  # Anthropic's and llama.cpp's clients
        scope[CALLER] = self._keys.caller(key.strip().encode("latin-1") for key in keys)
        if scope[CALLER] is not None:
            return None
        return ApiError(
            401,
            "a valid key is needed: Authorization: Bearer KEY, or x-api-key: KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer", "Connection": "close"},
        )

    def _fault_of_length(self, headers: Headers) -> ApiError | None:
        length = headers.get("content-length", "")
        if length.isdecimal() and length.isascii() and int(length[:20]) > self._limit:
            return self._too_large(length[:20])
        return None

    def _too_slow(self) -> ApiError:
        return ApiError(
            408,
            f"the body was not there within {self._limit_s:g} s (CLIENT_TIMEOUT_S)",
            code="body_timeout",
            headers={"Connection": "close"},
        )

    def _too_large(self, got: str) -> ApiError:
        return ApiError(
            413,
            f"the body must have at most {self._limit} bytes (MAX_BODY_BYTES), got {got}",
            code="body_too_large",
            headers={"Connection": "close"},
        )


async def refuse(send: Send, path: str, error: ApiError, unread: Receive | None = None) -> None:
    """Send `error`; then throw `unread` away for a while.

    A connection that is closed on bytes nobody has read is reset, and a client that is still sending may then never see
    the answer. The whole answer is sent first, its end after the rest of the body or `LINGER_S`.
    """
    body = json.dumps(body_at(path, error)).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    if unread is not None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while (await unread()).get("more_body", False):
                    continue
    await send({"type": "http.response.body"})
