"""The answers of one HTTP request as the event loop sees them, while the engine's thread works on them."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Sequence

from .engine import Answer, Delta, Engine, Event, Failure
from .errors import ApiError
from .scheduler import CanvasRequest, Job, QueueFull


class Generation:
    """Rows of one request, queued together. Must be made in the event loop, and cancelled when no longer wanted.

    Args:
        engine: where the rows run.
        requests: of each answer, the canvases that compete for it by their scores, of which the first best is kept; no
            more in all than the queue can ever hold.
        timeout_s: seconds from now after which the rows are given up.

    Raises:
        ApiError: 429 when the queue has no room now.
    """

    def __init__(self, engine: Engine, requests: Sequence[Sequence[CanvasRequest]], timeout_s: float) -> None:
        self.error: ApiError | None = None
        """Why no more events came."""
        self._engine = engine
        self._timeout_s = timeout_s
        loop = asyncio.get_running_loop()
        self._deadline = loop.time() + timeout_s
        self._events: asyncio.Queue[tuple[int, int, Event]] = asyncio.Queue()
        self._candidates: list[dict[int, Answer]] = [{} for _ in requests]
        self._num_candidates = [len(candidates) for candidates in requests]

        def listener(index: int, place: int):
            return lambda event: loop.call_soon_threadsafe(self._events.put_nowait, (index, place, event))

        rows = [(i, place, row) for i, candidates in enumerate(requests) for place, row in enumerate(candidates)]
        listeners = [listener(index, place) for index, place, _ in rows]
        try:
            self._jobs: list[Job] = engine.submit([row for _, _, row in rows], listeners)
        except QueueFull:
            seconds = engine.retry_after_s
            raise ApiError(
                429,
                f"{engine.num_waiting} answers wait already; try again in {seconds} s",
                code="queue_full",
                headers={"Retry-After": str(seconds)},
            ) from None

    async def events(self) -> AsyncIterator[tuple[int, Delta | Answer]]:
        """What happens to each answer, by its index, until all are there; one of several candidates comes whole.

        Raises:
            ApiError: 504 after the timeout, 500 when the model failed, 503 when the server stops.
        """
        unfinished = len(self._candidates)
        while unfinished:
            try:
                async with asyncio.timeout_at(self._deadline):
                    index, place, event = await self._events.get()
            except TimeoutError:
                self.error = ApiError(504, f"no answer within {self._timeout_s:g} s", code="timeout")
                raise self.error from None
            if isinstance(event, Failure):
                self.error = ApiError(event.status, event.message, code=event.code)
                raise self.error
            if self._num_candidates[index] > 1:
                best = self._choose(index, place, event)
                if best is None:
                    continue
                yield index, Delta(best.text, best.tokens, best.canvas)
                event = best
            if isinstance(event, Answer):
                unfinished -= 1
            yield index, event

    def _choose(self, index: int, place: int, event: Delta | Answer) -> Answer | None:
        """The candidate of the highest score, the first of equals, with the cost of all; None until all are there."""
        answers = self._candidates[index]
        if isinstance(event, Answer):
            answers[place] = event
        if not isinstance(event, Answer) or len(answers) < self._num_candidates[index]:
            return None
        best = max((answers[i] for i in range(len(answers))), key=lambda answer: answer.score)
        forwards, rows = (sum(getattr(answer, name) for answer in answers.values()) for name in ("forwards", "rows"))
        return dataclasses.replace(best, forwards=forwards, rows=rows)

    async def answers(self) -> list[Answer]:
        """All answers, in the order of the requests.

        Raises:
            ApiError: as `events`.
        """
        answers: dict[int, Answer] = {}
        async for index, event in self.events():
            if isinstance(event, Answer):
                answers[index] = event
        return [answers[i] for i in range(len(answers))]

    def cancel(self) -> None:
        """Give up the rows that are not finished."""
        self._engine.cancel(self._jobs)
