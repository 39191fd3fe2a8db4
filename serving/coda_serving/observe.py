"""Counts every response and its time, the whole stream included."""

import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .metrics import Metrics


class ObserveMiddleware:
    """ASGI middleware that fills ``Metrics.responses`` and ``Metrics.latency_s``.

    Args:
        app: what it wraps.
        metrics: where to count.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, then count it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s = time.monotonic()
        status = 500

        async def observed_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, observed_send)
        finally:
            # The pattern of the route, not the path, so that clients cannot make labels.
            path = getattr(scope.get("route"), "path", "unknown")
            self._metrics.responses.labels(path=path, status=status).inc()
            self._metrics.latency_s.labels(path=path).observe(time.monotonic() - started_s)
