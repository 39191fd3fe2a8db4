"""Which answers are denoised together: a bounded queue, fair to its callers.

A job is one row, and may join any others, each with its own settings, length and stop strings, as long as there is
room. Not here: running them (`engine`), or what a token is.

The rule. What a caller has been given is counted in positions: a canvas of n positions takes n in every step that it
takes part in. A free place goes to the waiting caller that has been given least, the one that has waited longest among
equals; one that comes or comes back begins at the start or above, so that idle time earns nothing. The start is the
level, where the last place was given away, or more: with every step it rises by half of what a caller is given on
average, up to the highest counter of those who wait or run. Or ever new callers would begin where the first one did, be
taken before one that waits and has been given something, and have to be remembered. The requests of one caller take
turns, each turn a row, so that the many answers of one wait for a single one behind them.

The bound. A row runs to its end: let U be the most that the rows of one caller which run together still take to theirs.
While a request waits, no other caller is given more than 2 U beyond what the request's own caller is given: with no row
to be cut short the fair share is a load U for each caller in turn, and nobody waits for more than two. (Virtual token
counters; Sheng et al., "Fairness in Serving Large Language Models", 2024.) Proof: counters of those who wait are never
below the level, which never sinks; no counter, and so no start, is ever more than U above it, since only running rows
raise one. At the last place that another caller gets while the request waits, its counter is at most that of the
request's caller, which began at most U above the level; and after it, it is given at most U.

The queue. Up to its limit anyone's rows may wait. When it is full, a caller whose rows, with those that come, are no
more than its share, the limit divided by those who wait, is let in all the same: one that fills the queue shuts nobody
else out, and nothing that was let in has to give way. So no more than limit (1 + ln limit) rows ever wait. Proof: in
the order in which those who wait last got rows in, the j-th was one of at least j who waited; let J be the last that
came when there was room: the first J have no more than limit together, and every later one no more than limit / j.
"""

import dataclasses
import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from CoDALanguageModel.decoding_settings import DecodingSettings


@dataclass(frozen=True, kw_only=True)
class CanvasRequest:
    """One answer to denoise."""

    prompt_ids: tuple[int, ...]
    """Tokens before the answer; at least one."""

    max_tokens: int
    """Masks to fill."""

    suffix_ids: tuple[int, ...] | None = None
    """Tokens after the answer (infilling); None when the answer is the end of the canvas."""

    options: DecodingSettings
    """How it is denoised; its length and seed are the fields beside."""

    seed: int
    stop: tuple[str, ...] = ()

    more_gaps: tuple[tuple[int, tuple[int, ...]], ...] = ()
    """Gaps behind the suffix: the masks of each, and the tokens behind it."""

    is_candidate: bool = False
    """Whether the answer competes with others by its score: it is then denoised to the end."""

    logprobs: int | None = None
    """Most probable tokens to tell of beside each one committed, besides its log-probability; None tells nothing."""

    shows_canvas: bool = False
    """Whether to show every step of the canvas."""

    forced: tuple[int, ...] | None = None
    """What is committed in the gap whatever the model would choose, which only judges it; to the end."""

    constraint: Any = None
    """What `ModelLimits.constraint` made of the options, where they have one."""

    def with_seed(self, seed: int) -> "CanvasRequest":
        """The same request with another seed."""
        return dataclasses.replace(self, seed=seed)

    @property
    def num_positions(self) -> int:
        """Length of the canvas in tokens."""
        return sum(self.gap_lengths) + sum(map(len, self.pieces))

    @property
    def gap_lengths(self) -> tuple[int, ...]:
        """Masks of each gap, or of the one answer."""
        return self.max_tokens, *(length for length, _ in self.more_gaps)

    @property
    def pieces(self) -> tuple[tuple[int, ...], ...]:
        """Tokens before, between and behind the gaps."""
        return self.prompt_ids, self.suffix_ids or (), *(piece for _, piece in self.more_gaps)


@dataclass(eq=False)
class Caller:
    """Whose requests wait or run."""

    served: int = 0
    """Positions that it has been given, and those that it was put ahead by when it came; see above."""

    requests: deque[deque["Job"]] = dataclasses.field(default_factory=deque)
    """Rows of each request that wait; the request whose turn it is first."""

    def in_turn(self) -> Iterator["Job"]:
        """Its rows that wait, in the order in which they would be taken."""
        turns = itertools.zip_longest(*self.requests)
        return (job for turn in turns for job in turn if job is not None)


@dataclass(eq=False)
class Job:
    """A request in the queue or being denoised. `cancelled` may be set by any thread."""

    request: CanvasRequest
    listener: Callable[[object], None]
    arrived_s: float = dataclasses.field(default_factory=time.monotonic)
    """On the monotonic clock."""
    cancelled: bool = False
    shown: str = ""
    judged: list = dataclasses.field(default_factory=list)
    """Tokens that have become final, as `engine.Judged`, where the request asks for them."""
    num_judged: int = 0
    """Those that the listener has been told of."""
    view: Any = None
    """`CanvasView` of a request that shows its canvas, once it has been let in."""
    done: bool = False
    caller: Caller = dataclasses.field(default_factory=Caller)
    begun: bool = False
    """Whether it has left the queue to be denoised."""
    passed: int = 0
    """Rows of the same caller that were let in before it, for want of room for it."""


class QueueFull(Exception):
    """The queue has no room for a request's rows."""


def may_wait(new: int, own: int, waiting: int, num_callers: int, limit: int) -> bool:
    """Whether there is room for more, or their caller has no more than its share with them; see above.

    Args:
        new: those that come.
        own: those of their caller that wait.
        waiting: all that wait.
        num_callers: whose they are, with the one who comes.
        limit: how many may wait.
    """
    return waiting + new <= limit or (own + new) * num_callers <= limit


class Scheduler:
    """Thread-safe queue that says who may join the rows being denoised.

    Args:
        max_queue: jobs that may wait, besides those of callers who have no more than their share; see above.
        max_batch_size: jobs at a time; also how many others of its caller may pass a job that does not fit, before all
            others wait for it. Those of other callers never do.
        max_batch_tokens: jobs at a time, times the longest canvas; a job alone is always let through.
    """

    def __init__(self, *, max_queue: int, max_batch_size: int, max_batch_tokens: int) -> None:
        self.max_queue = max_queue
        self._max_batch_size = max_batch_size
        self._max_batch_tokens = max_batch_tokens
        self._callers: dict[str, Caller] = {}
        """Those who wait or run, and those who are above the start; who began to wait first is first."""
        self._level = 0
        """Counter of whoever got the last place, when it got it."""
        self._start = 0
        """Least counter of one that comes."""
        self._num_waiting = 0
        self._changed = threading.Condition()
        self._closed = False

    @property
    def is_closed(self) -> bool:
        """Whether nothing more will come."""
        return self._closed

    def __len__(self) -> int:
        return self._num_waiting

    def submit(self, jobs: list[Job], caller: str = "") -> None:
        """Queue all of `jobs`, which are one request, or none of them.

        Raises:
            QueueFull: there is no room for all, or the scheduler is closed.
        """
        with self._changed:
            if not jobs:  # only an echo, which nobody has to wait for
                return
            owner = self._callers.get(caller)
            own = sum(map(len, owner.requests)) if owner else 0
            num_callers = sum(bool(other.requests) for other in self._callers.values()) + (not own)
            if self._closed or not may_wait(len(jobs), own, self._num_waiting, num_callers, self.max_queue):
                raise QueueFull
            if owner is None or not owner.requests:
                self._callers.pop(caller, None)
                owner = self._callers[caller] = owner or Caller()
                owner.served = max(owner.served, self._start)
            for job in jobs:
                job.caller = owner
            owner.requests.append(deque(jobs))
            self._num_waiting += len(jobs)
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """Take `job` out of the queue, or mark it so that it is dropped before the next step."""
        with self._changed:
            job.cancelled = True
            self._remove(job)

    def take(self, running: Sequence[Job]) -> list[Job]:
        """The jobs that may join now. Where nothing runs it waits for one, or until it is closed.

        Called before each step: what takes part in it is counted.

        Args:
            running: what is being denoised.
        """
        with self._changed:
            if not running and not self._num_waiting:
                self._callers, self._level, self._start = {}, 0, 0
                self._changed.wait_for(lambda: self._num_waiting or self._closed)
            for job in running:
                self._count(job)
            rows, longest = len(running), max((job.request.num_positions for job in running), default=0)
            taken: list[Job] = []
            while rows < self._max_batch_size and (job := self._next(rows, longest)) is not None:
                self._level = job.caller.served
                self._remove(job, ends_turn=True)
                self._count(job)
                job.begun = True
                taken.append(job)
                rows, longest = rows + 1, max(longest, job.request.num_positions)
            self._move_start([*running, *taken])
            return taken

    def _move_start(self, rows: Sequence[Job]) -> None:
        """Say where the next ones begin, once places have been given to `rows`; forget who would begin there anyway."""
        runs = {job.caller for job in rows}
        active = {caller for caller in self._callers.values() if caller.requests or caller in runs}
        rise = math.ceil(sum(job.request.num_positions for job in rows) / (2 * max(1, len(active))))
        highest = max((caller.served for caller in active), default=0)
        self._start = max(self._level, self._start, min(self._start + rise, highest))
        self._callers = {
            name: caller for name, caller in self._callers.items() if caller in active or caller.served > self._start
        }

    def _count(self, job: Job) -> None:
        """Count a step of a row."""
        caller = job.caller
        if not caller.requests:
            caller.served = max(caller.served, self._level)
        caller.served += job.request.num_positions

    def _next(self, rows: int, longest: int) -> Job | None:
        """Whose turn it is, if there is room for it beside `rows` others."""
        waiting = [caller for caller in self._callers.values() if caller.requests]
        left: list[Job] = []
        for job in min(waiting, key=lambda caller: caller.served).in_turn() if waiting else ():
            if left and left[0].passed >= self._max_batch_size:
                break
            if not rows or max(longest, job.request.num_positions) * (rows + 1) <= self._max_batch_tokens:
                for older in left:
                    older.passed += 1
                return job
            left.append(job)
        return None

    def _remove(self, job: Job, *, ends_turn: bool = False) -> None:
        """Take a job out of the queue, if it is there; its request's next row may wait for the others' turns."""
        requests = job.caller.requests
        rows = next((rows for rows in requests if job in rows), None)
        if rows is None:
            return
        rows.remove(job)
        self._num_waiting -= 1
        if not rows or ends_turn:
            requests.remove(rows)
            if rows:
                requests.append(rows)

    def close(self) -> list[Job]:
        """Accept nothing more; return the jobs that were still waiting, which will not run."""
        with self._changed:
            self._closed = True
            dropped = [job for caller in self._callers.values() for job in caller.in_turn()]
            for job in dropped:
                self._remove(job)
            self._changed.notify_all()
            return dropped
