"""Answering a checked request, whole or as a stream. Not here: its canvases (`canvases`), or words (`responses`)."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from typing import Any, Protocol, TypeVar

from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from .canvases import Asked
from .engine import Answer
from .errors import SHUTTING_DOWN, ApiError, client_left
from .gate import caller_of
from .generation import Generation, busy
from .protocol import SamplingRequest
from .responses import Head, Usage
from .scheduler import QueueFull
from .service import Service
from .settings import ServerSettings
from .streaming import EventStream, answer_events, error_event

Result = TypeVar("Result")


class Whole(Protocol):
    """How an endpoint words its answers; `responses.Form` is one."""

    id_prefix: str

    def whole(self, head: Head, answers: list[Answer], usage: Usage) -> BaseModel:
        """The whole response."""


Events = Callable[[Generation, Head, Any, int, Any], AsyncIterator[str]]
"""Frames of streamed answers, as `streaming.answer_events`."""


async def respond(
    service: Service,
    request: Request,
    body: SamplingRequest,
    canvases_of: Callable[[Service, Any], Asked],
    form: Whole,
    *,
    events: Events = answer_events,
    error_frame: Callable[[ApiError], str] = error_event,
) -> Response:
    """Denoise what a body asks for, and say it in the endpoint's form, whole or as it becomes final."""
    settings = service.settings
    if service.engine.is_draining:
        raise SHUTTING_DOWN
    check_model(settings, body.model)
    asked = await _prepare(service, request, body, canvases_of)
    generation = Generation(
        service.engine, asked.answers, settings.request_timeout_s, settings.queue_timeout_s, caller_of(request)
    )
    head = Head.new(form.id_prefix, settings.public_name)
    usage_of = partial(Usage.of, asked.prompt_tokens, regime=asked.regime)
    if body.stream:
        frames = events(generation, head, form, len(asked.answers), usage_of if body.include_usage else None)
        return EventStream(generation, frames, settings.heartbeat_s, error_frame)
    try:
        answers = await _unless_client_leaves(request, generation.answers())
    finally:
        generation.cancel()
    # Written in a thread: long answers would keep the event loop.
    content = await run_in_threadpool(lambda: form.whole(head, answers, usage_of(answers)).model_dump_json())
    return Response(content, media_type="application/json")


async def _prepare(
    service: Service, request: Request, body: SamplingRequest, canvases_of: Callable[[Service, Any], Asked]
) -> Asked:
    """The canvases, made in a thread; in one of its own where that may take long, for callers in turn."""
    is_shaped = getattr(body, "shape", None) is not None or getattr(body, "tools", None)
    if not is_shaped:
        return await run_in_threadpool(canvases_of, service, body)
    limit_s = service.settings.request_timeout_s

    async def in_turn() -> Asked:
        async with service.turns.turn(caller_of(request), service.settings.max_queue):
            return await asyncio.get_running_loop().run_in_executor(service.shaper, canvases_of, service, body)

    try:
        async with asyncio.timeout(limit_s):
            return await _unless_client_leaves(request, in_turn())
    except TimeoutError:
        raise ApiError(504, f"no answer within {limit_s:g} s", code="timeout") from None
    except QueueFull:
        service.metrics.rejected.inc()
        message = f"{len(service.turns)} requests wait already to be prepared"
        raise busy(service.engine, 429, message, "queue_full") from None


async def _unless_client_leaves(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """What comes of `work`, which is given up when the client hangs up first."""

    async def disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            continue

    working = asyncio.ensure_future(work)
    left = asyncio.ensure_future(disconnect())
    try:
        await asyncio.wait([working, left], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise client_left()
    finally:
        for task in (working, left):
            task.cancel()
        await asyncio.gather(working, left, return_exceptions=True)


def check_model(settings: ServerSettings, name: str | None) -> None:
    """Refuse a name that is not served."""
    if name is not None and not settings.is_served(name):
        raise ApiError(
            404,
            f"model {name!r} is not served here; the model is {settings.public_name!r}",
            param="model",
            code="model_not_found",
        )
