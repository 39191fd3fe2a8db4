"""The answers of one HTTP request as the event loop sees them, while the engine's thread works on them."""

import asyncio
from collections.abc import AsyncIterator, Sequence

from .engine import Answer, Delta, Engine, Event, Failure
from .errors import ApiError
from .scheduler import CanvasRequest, Job, QueueFull


class Generation:
    """Rows of one request, queued together. Must be made in the event loop, and cancelled when no longer wanted.

    Args:
        engine: where the rows run.
        requests: one per answer; no more than the queue can ever hold.
        timeout_s: seconds from now after which the rows are given up.

    Raises:
        ApiError: 429 when the queue has no room now.
    """

    def __init__(self, engine: Engine, requests: Sequence[CanvasRequest], timeout_s: float) -> None:
        self._engine = engine
        self._timeout_s = timeout_s
        loop = asyncio.get_running_loop()
        self._deadline = loop.time() + timeout_s
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._num_rows = len(requests)

        def listener(index: int):
            return lambda event: loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        try:
            self._jobs: list[Job] = engine.submit(requests, [listener(i) for i in range(len(requests))])
        except QueueFull:
            seconds = engine.retry_after_s
            raise ApiError(
                429,
                f"{engine.num_waiting} answers wait already; try again in {seconds} s",
                code="queue_full",
                headers={"Retry-After": str(seconds)},
            ) from None

    async def events(self) -> AsyncIterator[tuple[int, Delta | Answer]]:
        """What happens to each row, by its index, until all have their answer.

        Raises:
            ApiError: 504 after the timeout, 500 when the model failed, 503 when the server stops.
        """
        unfinished = self._num_rows
        while unfinished:
            try:
                async with asyncio.timeout_at(self._deadline):
                    index, event = await self._events.get()
            except TimeoutError:
                raise ApiError(504, f"no answer within {self._timeout_s:g} s", code="timeout") from None
            if isinstance(event, Failure):
                raise ApiError(event.status, event.message, code=event.code)
            if isinstance(event, Answer):
                unfinished -= 1
            yield index, event

    async def answers(self) -> list[Answer]:
        """All answers, in the order of the requests.

        Raises:
            ApiError: as `events`.
        """
        answers: dict[int, Answer] = {}
        async for index, event in self.events():
            if isinstance(event, Answer):
                answers[index] = event
        return [answers[i] for i in range(self._num_rows)]

    def cancel(self) -> None:
        """Give up the rows that are not finished."""
        self._engine.cancel(self._jobs)
