"""The answers of one HTTP request as the event loop sees them, while the engine's thread works on them."""

import asyncio
import dataclasses
import math
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Sequence

from .engine import Answer, Delta, Engine, Event, Failure
from .errors import ApiError
from .scheduler import CanvasRequest, Job, QueueFull

MOST_UNREAD_CELLS = 1 << 16
"""Cells of canvases that wait for a client that reads slowly, about 10 MB; then several steps become one."""


class Generation:
    """Rows of one request, queued together. Must be made in the event loop, and cancelled when no longer wanted.

    Args:
        engine: where the rows run.
        requests: of each answer, the canvases that compete for it by their scores, of which the first best is kept; no
            more in all than the queue can ever hold.
        timeout_s: seconds from now after which the rows are given up.
        queue_timeout_s: seconds from now after which they are given up if none of them has begun.
        caller: for whom; the engine is fair to callers.

    Raises:
        ApiError: 429 when the queue has no room now.
    """

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[Sequence[CanvasRequest]],
        timeout_s: float,
        queue_timeout_s: float = math.inf,
        caller: str = "",
    ) -> None:
        self.error: ApiError | None = None
        """Why no more events came."""
        self._engine = engine
        self._timeout_s = timeout_s
        self._queue_timeout_s = queue_timeout_s
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        self._deadline, self._queue_deadline = now_s + timeout_s, now_s + queue_timeout_s
        self._events: asyncio.Queue[tuple[int, int]] = asyncio.Queue()
        """Rows of which something has happened, each as the place of its answer, and its own among the candidates."""
        self._unread: dict[tuple[int, int], deque[Event]] = defaultdict(deque)
        """What happened to each."""
        self._num_unread_cells = 0
        self._candidates: list[dict[int, Answer]] = [{} for _ in requests]
        self._num_candidates = [len(candidates) for candidates in requests]

        def listener(index: int, place: int):
            return lambda event: loop.call_soon_threadsafe(self._put, (index, place), event)

        rows = [(i, place, row) for i, candidates in enumerate(requests) for place, row in enumerate(candidates)]
        listeners = [listener(index, place) for index, place, _ in rows]
        try:
            self._jobs: list[Job] = engine.submit([row for _, _, row in rows], listeners, caller)
        except QueueFull:
            raise busy(engine, 429, f"{engine.num_waiting} answers wait already", "queue_full") from None

    async def events(self) -> AsyncIterator[tuple[int, Delta | Answer]]:
        """What happens to each answer, by its index, until all are there; one of several candidates comes whole.

        Raises:
            ApiError: 504 after the timeout, 503 after that of the queue or when the server stops, 500 when the model
                failed.
        """
        unfinished = len(self._candidates)
        while unfinished:
            try:
                index, place, event = await self._next()
            except ApiError as error:
                self.error = error
                raise
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

    async def _next(self) -> tuple[int, int, Event]:
        """The next event of a row, in time."""
        deadlines = [self._deadline]
        if self._queue_deadline <= self._deadline and not self._has_begun:
            deadlines.insert(0, self._queue_deadline)
        for deadline in deadlines:
            try:
                async with asyncio.timeout_at(deadline):
                    row = await self._events.get()
                event = self._unread[row].popleft()
                self._num_unread_cells -= _num_cells(event)
                return *row, event
            except TimeoutError:
                if not self._has_begun and deadline == self._queue_deadline:
                    message = f"no answer was begun within {self._queue_timeout_s:g} s (QUEUE_TIMEOUT_S)"
                    raise busy(self._engine, 503, message, "queue_timeout") from None
        raise ApiError(504, f"no answer within {self._timeout_s:g} s (REQUEST_TIMEOUT_S)", code="timeout")

    def _put(self, row: tuple[int, int], event: Event) -> None:
        """Keep an event for the client; one that only adds to what it is far from having read joins that."""
        unread = self._unread[row]
        self._num_unread_cells += _num_cells(event)
        if self._num_unread_cells > MOST_UNREAD_CELLS and unread and _num_cells(event) and _num_cells(unread[-1]):
            before = unread.pop()
            joined = before.then(event)
            self._num_unread_cells -= _num_cells(before) + _num_cells(event) - _num_cells(joined)
            unread.append(joined)
            return
        unread.append(event)
        self._events.put_nowait(row)

    @property
    def _has_begun(self) -> bool:
        return any(job.begun for job in self._jobs)

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


def busy(engine: Engine, status: int, message: str, code: str) -> ApiError:
    """For requests that would have to wait too long."""
    seconds = engine.retry_after_s
    return ApiError(status, f"{message}; try again in {seconds} s", code=code, headers={"Retry-After": str(seconds)})


def _num_cells(event: Event) -> int:
    """Cells of a canvas that a step has changed, which an event tells of."""
    return len(event.canvas.cells) if isinstance(event, Delta) and event.canvas is not None else 0
