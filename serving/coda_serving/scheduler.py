"""Which answers are denoised together: a bounded queue, oldest first.

A job is one row, and may join any others, each with its own settings, length and stop strings, as long as there is
room. Not here: running them (`engine`), or what a token is.
"""

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
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
    passed: int = 0
    """Younger jobs that were let in before it, for want of room for it."""


class QueueFull(Exception):
    """The queue has no room for a request's rows."""


class Scheduler:
    """Thread-safe queue that says who may join the rows being denoised.

    Args:
        max_queue: jobs that may wait.
        max_batch_size: jobs at a time; also how many younger ones may pass a job that does not fit, before all others
            wait for it.
        max_batch_tokens: jobs at a time, times the longest canvas; a job alone is always let through.
    """

    def __init__(self, *, max_queue: int, max_batch_size: int, max_batch_tokens: int) -> None:
        self.max_queue = max_queue
        self._max_batch_size = max_batch_size
        self._max_batch_tokens = max_batch_tokens
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False

    @property
    def is_closed(self) -> bool:
        """Whether nothing more will come."""
        return self._closed

    def __len__(self) -> int:
        return len(self._waiting)

    def submit(self, jobs: list[Job]) -> None:
        """Queue all of `jobs` or none of them.

        Raises:
            QueueFull: there is no room for all, or the scheduler is closed.
        """
        with self._changed:
            if self._closed or len(self._waiting) + len(jobs) > self.max_queue:
                raise QueueFull
            self._waiting.extend(jobs)
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """Take `job` out of the queue, or mark it so that it is dropped before the next step."""
        with self._changed:
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)

    def take(self, running: Sequence[int]) -> list[Job]:
        """The jobs that may join now, oldest first. Where nothing runs it waits for one, or until it is closed.

        Args:
            running: length of each canvas that is being denoised.
        """
        with self._changed:
            if not running:
                self._changed.wait_for(lambda: self._waiting or self._closed)
            rows, longest = len(running), max(running, default=0)
            taken: list[Job] = []
            left: list[Job] = []
            for job in self._waiting:
                if rows == self._max_batch_size or (left and left[0].passed >= self._max_batch_size):
                    break
                longest_with_job = max(longest, job.request.num_positions)
                if rows and longest_with_job * (rows + 1) > self._max_batch_tokens:
                    left.append(job)
                    continue
                taken.append(job)
                rows, longest = rows + 1, longest_with_job
                for older in left:
                    older.passed += 1
            for job in taken:
                self._waiting.remove(job)
            return taken

    def close(self) -> list[Job]:
        """Accept nothing more; return the jobs that were still waiting, which will not run."""
        with self._changed:
            self._closed = True
            dropped = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
            return dropped
