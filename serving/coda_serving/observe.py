"""Counts every response and its time, the whole stream included."""

import time
from collections.abc import Sequence

from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .metrics import Metrics


class ObserveMiddleware:
    """ASGI middleware that fills `Metrics.responses` and `Metrics.latency_s`.

    Args:
        app: what it wraps.
        metrics: where to count.
        routes: those whose patterns tell requests apart that were refused before they got there.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: Sequence[BaseRoute]) -> None:
        self._app = app
        self._metrics = metrics
        self._routes = routes

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
            path = self._pattern(scope)
            self._metrics.responses.labels(path=path, status=status).inc()
            self._metrics.latency_s.labels(path=path).observe(time.monotonic() - started_s)

    def _pattern(self, scope: Scope) -> str:
        """The pattern of a request's route; not its path, or clients could make any number of labels."""
        found = (route for route in self._routes if route.matches(scope)[0] != Match.NONE)
        return getattr(scope.get("route") or next(found, None), "path", "unknown")
