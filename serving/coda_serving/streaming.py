"""Server-sent events: committed text as it becomes final, and where it is asked for the canvas.

Not here: which text is final (`CoDALanguageModel.answers`).
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Message, Receive, Scope, Send

from CoDALanguageModel.canvas_view import CanvasStep

from .engine import Answer, Delta
from .errors import SHUTTING_DOWN, ApiError
from .generation import Generation
from .observe import STATUS
from .responses import Form, Head, Usage

MakeUsage = Callable[[list[Answer]], Usage]


def data_event(text: str) -> str:
    """A frame without a name."""
    return f"data: {text}\n\n"


def error_event(error: ApiError) -> str:
    """The frame of an error, in OpenAI's shape."""
    return data_event(json.dumps(error.body()))


class EventStream(StreamingResponse):
    """A streamed response that gives up its generation whenever it ends, also before its first event.

    Args:
        generation: the rows behind the events.
        events: their text, framed.
        heartbeat_s: silence after which a comment is sent.
        error_frame: the frame of an error in the endpoint's form.
    """

    def __init__(
        self,
        generation: Generation,
        events: AsyncIterator[str],
        heartbeat_s: float,
        error_frame: Callable[[ApiError], str] = error_event,
    ) -> None:
        super().__init__(
            with_heartbeat(events, heartbeat_s), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
        self._generation = generation
        self._error_frame = error_frame

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events, then let go of the generation; a stream that the server cuts off says so."""
        started = False

        async def noted_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await super().__call__(scope, receive, noted_send)
        except asyncio.CancelledError:  # the web server ends what still runs when its time to stop is over
            if started:
                frame = self._error_frame(SHUTTING_DOWN)
                await send({"type": "http.response.body", "body": frame.encode(), "more_body": False})
                scope[STATUS] = SHUTTING_DOWN.status
            raise
        finally:
            if self._generation.error is not None:
                scope[STATUS] = self._generation.error.status
            self._generation.cancel()


async def with_heartbeat(events: AsyncIterator[str], every_s: float) -> AsyncIterator[str]:
    """`events`, with a comment frame, which clients skip, whenever none came for `every_s` seconds."""
    following = asyncio.ensure_future(anext(events, None))
    try:
        while True:
            done, _ = await asyncio.wait({following}, timeout=every_s)
            if not done:
                yield ": waiting\n\n"
                continue
            event = following.result()
            if event is None:
                return
            yield event
            following = asyncio.ensure_future(anext(events, None))
    finally:
        following.cancel()


async def answer_events(
    generation: Generation,
    head: Head,
    form: Form,
    n: int,
    make_usage: MakeUsage | None,
    events: AsyncIterator[tuple[int, Delta | Answer]] | None = None,
) -> AsyncIterator[str]:
    """Frames of streamed answers.

    Args:
        generation: `n` rows.
        head: id, time and model of all events.
        form: the endpoint's.
        n: number of answers.
        make_usage: gives the usage of the last event; None sends no such event.
        events: of the generation, where something is made of them before.
    """

    def frame(*choices: BaseModel, usage: Usage | None = None, canvas: CanvasStep | None = None) -> str:
        return _frame(form.event(**dict(head), choices=choices, usage=usage), canvas)

    for index in range(n if form.opening else 0):
        yield frame(form.opening(index))
    answers: list[Answer] = []
    try:
        async for index, event in events or generation.events():
            is_end = isinstance(event, Answer)
            if is_end:
                answers.append(event)
            delta, end = (Delta(""), event.finish_reason) if is_end else (event, None)
            if (choice := form.part(index, delta, end)) is not None:
                yield frame(choice, canvas=delta.canvas)
    except ApiError as error:  # the status has been sent already
        yield error_event(error)
        return
    if make_usage is not None:
        yield frame(usage=make_usage(answers))
    yield data_event("[DONE]")


def canvas_body(canvas: CanvasStep) -> dict[str, Any]:
    """What an event says of a step; cells are lists of their fields."""
    length = {} if canvas.length is None else {"length": canvas.length}
    return {"step": canvas.step, **length, "cells": canvas.cells}


def _frame(event: BaseModel, canvas: CanvasStep | None) -> str:
    # Fields at their default of None are left out of a delta, as OpenAI does; finish_reason is always there.
    body = event.model_dump(mode="json")
    for choice in body["choices"]:
        if "delta" in choice:
            choice["delta"] = {name: value for name, value in choice["delta"].items() if value is not None}
        if canvas is not None:
            choice["canvas"] = canvas_body(canvas)
    if body["usage"] is None:
        del body["usage"]
    return data_event(json.dumps(body, ensure_ascii=False))
