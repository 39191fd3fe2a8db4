"""The one thread that owns the model: takes batches from the scheduler, denoises them, tells each listener.

Not here: HTTP and event loops (``app``), tensors (``sampler``).
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from CoDALanguageModel.answers import AnswerReader, Decode, FinishReason, num_committed

from .metrics import Metrics
from .scheduler import CanvasRequest, Job, QueueFull, Scheduler

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Delta:
    """Text that has become final."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A finished answer."""

    text: str
    num_tokens: int
    """Tokens that the text stands for, without the end token."""
    forwards: int
    """Forward passes that its row took part in."""
    finish_reason: FinishReason


@dataclass(frozen=True)
class Failure:
    """No answer will come; the reason is in the server's log."""

    message: str
    status: int = 500
    code: str = "model_failure"


SHUTTING_DOWN = Failure("the server is shutting down", status=503, code="server_shutting_down")

Event = Delta | Answer | Failure
Listener = Callable[[Event], None]
"""Called in the engine's thread with any number of ``Delta`` and then one ``Answer`` or ``Failure``."""

OnStep = Callable[[list[list[int]], int], bool]
"""Called after each forward pass with the answer ids of every row, masks included, and the number of passes so far;
False stops the batch."""


class Sampler(Protocol):
    """What the engine needs of a model."""

    mask_token_id: int
    eos_token_ids: frozenset[int]

    def run(self, requests: Sequence[CanvasRequest], on_step: OnStep) -> None:
        """Denoise the canvases of ``requests`` together; each gets the tokens that it would get alone."""


class Engine:
    """A queue in front of a sampler and the thread that runs it.

    Args:
        sampler: the model. Only the engine's thread calls ``run``.
        decode: token ids to text, as ``answers.Decode``.
        scheduler: the queue.
        batch_wait_s: how long an idle engine waits for company before it starts a batch.
        step_timeout_s: how long a batch may go without finishing a step. A thread cannot be ended from outside: a
            batch that takes longer is failed, and its thread left behind, once; the thread ends itself at its next
            step. If the next thread gets stuck too while the first still is, the engine is no longer alive.
        metrics: where to count.
    """

    def __init__(
        self,
        sampler: Sampler,
        decode: Decode,
        scheduler: Scheduler,
        *,
        batch_wait_s: float,
        step_timeout_s: float,
        metrics: Metrics,
    ) -> None:
        self._sampler = sampler
        self._decode = decode
        self._scheduler = scheduler
        self._batch_wait_s = batch_wait_s
        self._step_timeout_s = step_timeout_s
        self._metrics = metrics
        self._seconds_per_job = 1.0
        self._running: list[Job] = []
        self._progress_s = 0.0
        """When the running batch started or finished its last step, on the monotonic clock."""
        self._stopping = False
        self._stopped = threading.Event()
        self._stuck: threading.Thread | None = None
        self._finishing = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="coda-engine", daemon=True)
        self._watchdog = threading.Thread(target=self._watch, name="coda-engine-watchdog", daemon=True)
        metrics.watch(num_waiting=lambda: self.num_waiting, num_running=lambda: self.num_running)

    @property
    def is_alive(self) -> bool:
        """True while requests can be answered."""
        return self._thread.is_alive() and not self._stopping and self._thread is not self._stuck

    @property
    def num_waiting(self) -> int:
        """Answers in the queue."""
        return len(self._scheduler)

    @property
    def num_running(self) -> int:
        """Answers being denoised."""
        return len(self._running)

    @property
    def max_queue(self) -> int:
        """Answers that may wait at once."""
        return self._scheduler.max_queue

    @property
    def retry_after_s(self) -> int:
        """Seconds in which, at the present speed, the queue will have been worked off; at least 1."""
        return max(1, math.ceil(self._seconds_per_job * (self.num_waiting + self.num_running)))

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()
        self._watchdog.start()

    def stop(self, timeout_s: float | None = None) -> None:
        """End the running batch at its next step, fail what waits, and join the thread."""
        self._stopping = True
        self._stopped.set()
        for job in self._scheduler.close():
            job.listener(SHUTTING_DOWN)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning("the model is still busy after %s s", timeout_s)

    def submit(self, requests: Sequence[CanvasRequest], listeners: Sequence[Listener]) -> list[Job]:
        """Queue all ``requests`` or none.

        Raises:
            QueueFull: there is no room for all of them.
        """
        jobs = [Job(request, listener) for request, listener in zip(requests, listeners, strict=True)]
        try:
            self._scheduler.submit(jobs)
        except QueueFull:
            self._metrics.rejected.inc()
            raise
        return jobs

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Stop work on ``jobs``: those in the queue never run, those in a batch are dropped at its next step."""
        for job in jobs:
            if not job.done:
                self._metrics.cancelled.inc()
                self._scheduler.cancel(job)

    def _work(self) -> None:
        while batch := self._scheduler.next_batch(self._batch_wait_s):
            started_s = self._progress_s = time.monotonic()
            self._running = batch
            self._metrics.batch_size.observe(len(batch))
            rows = [(job, self._reader(job.request)) for job in batch]
            try:
                self._sampler.run([job.request for job in batch], partial(self._on_step, rows))
            except Exception:  # one batch's fault must not end the service; every listener and the log hear of it
                logger.exception("a batch of %d failed", len(batch))
            # Whoever has no answer by now gets none: the batch failed or the server is stopping.
            failure = SHUTTING_DOWN if self._stopping else Failure("the model failed; see the server's log")
            for job in batch:
                self._finish(job, failure)
            if threading.current_thread() is not self._thread:
                return  # the watchdog has given this thread up, and another one works
            self._running = []
            self._seconds_per_job += 0.2 * ((time.monotonic() - started_s) / len(batch) - self._seconds_per_job)

    def _watch(self) -> None:
        """Give up a batch that finishes no step within ``step_timeout_s``, and go on with a new thread."""
        while not self._stopped.wait(min(1.0, self._step_timeout_s / 4)):
            batch, waited_s = self._running, time.monotonic() - self._progress_s
            if not batch or waited_s <= self._step_timeout_s:
                continue
            logger.error("a batch of %d is given up: no step was finished in %.0f s", len(batch), waited_s)
            stuck, self._running = self._thread, []
            another_is_stuck = self._stuck is not None and self._stuck.is_alive()
            self._stuck = stuck
            if not another_is_stuck:
                self._thread = threading.Thread(target=self._work, name="coda-engine", daemon=True)
                self._thread.start()
            for job in batch:
                self._finish(job, Failure(f"the model finished no step in {self._step_timeout_s:g} s"))
            if another_is_stuck:
                logger.critical("two batches are stuck: no more requests are taken")
                for job in self._scheduler.close():
                    job.listener(Failure("the model is stuck"))
                return

    def _reader(self, request: CanvasRequest) -> AnswerReader:
        return AnswerReader(
            decode=self._decode,
            mask_token_id=self._sampler.mask_token_id,
            eos_token_ids=self._sampler.eos_token_ids,
            prompt_ids=request.prompt_ids,
            stop=request.stop,
        )

    def _on_step(self, rows: list[tuple[Job, AnswerReader]], answer_ids: list[list[int]], num_passes: int) -> bool:
        """Show each row's listener what has become final; False once no row is wanted any more."""
        if threading.current_thread() is not self._thread:
            return False
        self._progress_s = time.monotonic()
        self._metrics.forwards.inc()
        for (job, reader), ids in zip(rows, answer_ids, strict=True):
            if not job.done and not job.cancelled:
                self._advance(job, reader, ids, num_passes)
        return not self._stopping and any(not job.done and not job.cancelled for job, _ in rows)

    def _advance(self, job: Job, reader: AnswerReader, ids: list[int], num_passes: int) -> None:
        reading = reader.read(self._settled(job.request, ids))
        if len(reading.text) > len(job.shown):
            job.listener(Delta(reading.text[len(job.shown) :]))
            job.shown = reading.text
        if reading.finish_reason is not None:
            self._metrics.tokens.inc(reading.num_tokens)
            answer = Answer(
                text=reading.text,
                num_tokens=reading.num_tokens,
                forwards=num_passes,
                finish_reason=reading.finish_reason,
            )
            self._finish(job, answer)

    def _settled(self, request: CanvasRequest, ids: list[int]) -> list[int]:
        """The answer's ids with a mask wherever a token may still be taken back."""
        if request.options.commits_are_final:  # else a token may be masked again as long as its block is not full
            return ids
        mask = self._sampler.mask_token_id
        settled = num_committed(ids, mask)
        if settled == len(ids):
            return ids
        settled -= settled % (request.options.block_length or len(ids))
        return ids[:settled] + [mask] * (len(ids) - settled)

    def _finish(self, job: Job, event: Event) -> None:
        with self._finishing:  # the watchdog or the thread that it gave up, not both
            if job.done:
                return
            job.done = True
        if not job.cancelled:
            job.listener(event)
