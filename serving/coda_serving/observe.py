"""Counts and logs every response, the whole stream included, and how it ended."""

import logging
import time
import urllib.parse
from collections.abc import Sequence

from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import CLIENT_LEFT
from .gate import CALLER
from .metrics import Metrics

logger = logging.getLogger(__name__)

STATUS = "coda.status"
"""Where the scope of a request has the status that its end would have had, if it came too late to be sent."""


class ObserveMiddleware:
    """ASGI middleware that fills `Metrics.responses`, `caller_responses` and `latency_s`, and writes the access log.

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
        """Pass the request on, then count and log it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s = time.monotonic()
        status = 500
        is_complete = True

        async def observed_send(message: Message) -> None:
            nonlocal status, is_complete
            if message["type"] == "http.response.start":
                status, is_complete = message["status"], False
            await send(message)
            is_complete = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            await self._app(scope, receive, observed_send)
        finally:
            status = scope.get(STATUS, status if is_complete else CLIENT_LEFT)
            seconds = time.monotonic() - started_s
            path, caller = self._pattern(scope), scope.get(CALLER)
            self._metrics.responses.labels(path=path, status=status).inc()
            self._metrics.latency_s.labels(path=path).observe(seconds)
            if caller is not None:
                self._metrics.caller_responses.labels(caller=caller, status=status).inc()
            # No query: it may hold anything. So may the path, and the address that a proxy told.
            place = urllib.parse.quote(scope["path"][:200])
            client = urllib.parse.quote((scope.get("client") or ("-",))[0][:200], safe="/:%")
            logger.info("%s %s %s %s %d %.3f s", client, caller or "-", scope["method"], place, status, seconds)

    def _pattern(self, scope: Scope) -> str:
        """The pattern of a request's route; not its path, or clients could make any number of labels."""
        found = (route for route in self._routes if route.matches(scope)[0] != Match.NONE)
        return getattr(scope.get("route") or next(found, None), "path", "unknown")
