"""Which answers are denoised together: a bounded queue, oldest first.

A job is one row of a canvas. Jobs whose canvases follow the same rules (``batch_key``) may share a batch; each keeps
its own length, seed and stop strings. Not here: running a batch (``engine``), or what a token is.
"""

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

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

    def with_seed(self, seed: int) -> "CanvasRequest":
        """The same request with another seed."""
        return dataclasses.replace(self, seed=seed)

    @property
    def num_positions(self) -> int:
        """Length of the canvas in tokens."""
        return len(self.prompt_ids) + self.max_tokens + len(self.suffix_ids or ())

    @property
    def batch_key(self) -> Hashable:
        """Equal for requests that one call of the sampler can serve.

        Gaps may differ in length, while all answers at the end of a canvas get the same number of masks.
        """
        return (self.options, None if self.suffix_ids is not None else self.max_tokens)


@dataclass(eq=False)
class Job:
    """A request in the queue or in a batch. ``cancelled`` may be set by any thread."""

    request: CanvasRequest
    listener: Callable[[object], None]
    cancelled: bool = False
    shown: str = ""
    forwards: int = 0
    done: bool = False
    submitted_s: float = field(default_factory=time.monotonic)


class QueueFull(Exception):
    """The queue has no room for a request's rows."""


class Scheduler:
    """Thread-safe queue that hands out batches.

    Args:
        max_queue: jobs that may wait.
        max_batch_size: jobs per batch.
        max_batch_tokens: jobs times longest canvas per batch; a single job is always let through.
    """

    def __init__(self, *, max_queue: int, max_batch_size: int, max_batch_tokens: int) -> None:
        self.max_queue = max_queue
        self._max_batch_size = max_batch_size
        self._max_batch_tokens = max_batch_tokens
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        return len(self._waiting)

    def submit(self, jobs: list[Job]) -> None:
        """Queue all of ``jobs`` or none of them.

        Raises:
            QueueFull: there is no room for all, or the scheduler is closed.
        """
        with self._changed:
            if self._closed or len(self._waiting) + len(jobs) > self.max_queue:
                raise QueueFull
            self._waiting.extend(jobs)
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """Take ``job`` out of the queue, or mark it so that its batch drops it at the next step."""
        with self._changed:
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)

    def next_batch(self, wait_for_company_s: float = 0.0) -> list[Job]:
        """Wait for work; return the oldest job and those that may join it, or [] once closed and empty.

        Args:
            wait_for_company_s: how long the oldest job may wait for others before its batch starts.
        """
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return []
                deadline = self._waiting[0].submitted_s + wait_for_company_s
                while self._waiting and not self._closed and len(self._batch()) < self._max_batch_size:
                    remaining = deadline - time.monotonic()
                    if remaining <= 0 or not self._changed.wait(remaining):
                        break
                if self._waiting:  # all of them may have been cancelled meanwhile
                    batch = self._batch()
                    taken = set(map(id, batch))
                    self._waiting = deque(job for job in self._waiting if id(job) not in taken)
                    return batch

    def close(self) -> list[Job]:
        """Accept nothing more; return the jobs that were still waiting, which will not run."""
        with self._changed:
            self._closed = True
            dropped = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
            return dropped

    def _batch(self) -> list[Job]:
        oldest = self._waiting[0]
        batch: list[Job] = []
        longest = 0
        for job in self._waiting:
            if job.request.batch_key != oldest.request.batch_key:
                continue
            longest_with_job = max(longest, job.request.num_positions)
            if batch and longest_with_job * (len(batch) + 1) > self._max_batch_tokens:
                continue
            batch.append(job)
            longest = longest_with_job
            if len(batch) == self._max_batch_size:
                break
        return batch
