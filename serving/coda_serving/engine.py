"""The one thread that owns the model: lets jobs in from the scheduler, denoises them step by step, tells each listener.

Not here: HTTP and event loops (`app`), tensors (`sampler`).
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from CoDALanguageModel.answers import AnswerReader, Decode, FinishReason
from CoDALanguageModel.canvas_view import CanvasStep, CanvasView

from . import errors
from .gaps import GapReader
from .metrics import Metrics
from .scheduler import CanvasRequest, Job, QueueFull, Scheduler

if TYPE_CHECKING:
    from CoDALanguageModel.row import Change, Evidence

logger = logging.getLogger(__name__)


class Judged(NamedTuple):
    """A token that was committed, and what the model thought of it."""

    token: int
    evidence: "Evidence"


@dataclass(frozen=True)
class Delta:
    """Text that has become final."""

    text: str
    tokens: tuple[Judged, ...] = ()
    """Tokens that have become final with it, where the request asks for them."""
    canvas: CanvasStep | None = None
    """What the step changed in the canvas, where the request asks for it."""

    def then(self, other: "Delta") -> "Delta":
        """This and the next one as one; both show a canvas, or neither."""
        if self.canvas is None:
            return Delta(self.text + other.text, self.tokens + other.tokens)
        cells = {cell.position: cell for cell in (*self.canvas.cells, *other.canvas.cells)}
        canvas = other.canvas._replace(cells=tuple(cells[i] for i in sorted(cells)), length=self.canvas.length)
        return Delta(self.text + other.text, self.tokens + other.tokens, canvas)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A finished answer."""

    text: str
    num_tokens: int
    """Tokens that the text stands for, without the end token."""
    forwards: int
    """Forward passes that its row took part in."""
    rows: int = 0
    """Rows that it had in these passes: more than one where drafts are verified."""
    cached_tokens: int = 0
    """Tokens of its prompt whose keys and values another row had computed."""
    finish_reason: FinishReason
    stop: str | None = None
    """The stop string that ended it, if one did."""
    gaps: tuple[str, ...] = ()
    """Text of each gap, where there are several."""
    gap_lengths: tuple[int, ...] = ()
    """Masks that each gap had."""
    score: float | None = None
    """Mean log-probability of all filled tokens when they were committed, of an answer that competes by it."""
    tokens: tuple[Judged, ...] = ()
    """Its tokens, where the request asks for them."""
    canvas: CanvasStep | None = None
    """Its whole canvas, where the request asks for it and the answer competes: its steps have not been shown."""


@dataclass(frozen=True)
class Failure:
    """No answer will come; the reason is in the server's log."""

    message: str
    status: int = 500
    code: str = "model_failure"


FAILED = Failure("the model failed; see the server's log")
SHUTTING_DOWN = Failure(errors.SHUTTING_DOWN.message, errors.SHUTTING_DOWN.status, errors.SHUTTING_DOWN.code)

Event = Delta | Answer | Failure
Listener = Callable[[Event], None]
"""Called in the engine's thread with any number of `Delta` and then one `Answer` or `Failure`."""


class RowStep(NamedTuple):
    """What a step made of a row."""

    row: Hashable
    """The handle that `admit` gave."""
    ids: Sequence[int]
    """The tokens of the answer that have become final, next to those of the steps before."""
    is_full: bool
    """Whether these are the last ones."""
    forwards: int
    """Forward passes that the row took part in so far."""
    error: Exception | None
    """What was wrong with this row alone."""
    score: float | None = None
    """Mean log-probability of the filled tokens when they were committed, of a candidate that is full."""
    evidence: Sequence["Evidence"] = ()
    """What the model thought of `ids`, where that is kept."""
    changes: Sequence["Change"] = ()
    """What the step shows in the whole canvas, where that is kept."""
    rows: int = 0
    """Rows that it had in these passes."""
    cached_tokens: int = 0
    """Tokens of its prompt that another row had computed."""


class Rows(Protocol):
    """Rows that are denoised together; each gets the tokens that it would get alone."""

    @property
    def forwards(self) -> int:
        """Forward passes of the model so far; a step takes one for each kind of rows that is present."""

    def admit(self, request: CanvasRequest) -> Hashable:
        """Take a canvas in from the next step on; returns its handle."""

    def step(self) -> list[RowStep]:
        """Take one step of every row. Rows that are full or at fault have left afterwards."""

    def drop(self, row: Hashable) -> None:
        """Take a row out, if it has not left."""


class Sampler(Protocol):
    """What the engine needs of a model."""

    mask_token_id: int
    eos_token_ids: frozenset[int]

    def start(self) -> Rows:
        """No rows yet."""


class _Run:
    """What one thread works on."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.jobs: dict[Hashable, tuple[Job, AnswerReader | GapReader]] = {}
        """By the handles of their rows."""
        self.progress_s = 0.0
        """When a step was begun or finished last, on the monotonic clock."""
        self.busy_s = 0.0
        """Since a job was finished last."""


class Engine:
    """A queue in front of a sampler and the thread that runs it.

    Args:
        sampler: the model. Only the engine's thread touches the rows that it starts.
        decode: token ids to text, as `answers.Decode`.
        scheduler: the queue.
        step_timeout_s: how long a step may take. A thread cannot be ended from outside: the jobs of a step that takes
            longer are failed, and its thread left behind, once; the thread ends itself after the step. If the next
            thread gets stuck too while the first still is, the engine is no longer alive.
        metrics: where to count.
    """

    def __init__(
        self,
        sampler: Sampler,
        decode: Decode,
        scheduler: Scheduler,
        *,
        step_timeout_s: float,
        metrics: Metrics,
    ) -> None:
        self._sampler = sampler
        self._decode = decode
        self._scheduler = scheduler
        self._step_timeout_s = step_timeout_s
        self._metrics = metrics
        self._seconds_per_job = 1.0
        self._run = _Run(sampler.start())
        self.is_draining = False
        """Whether what was accepted is finished and nothing more is to come; for those who ask the engine."""
        self._stopping = False
        self._stopped = threading.Event()
        self._stuck: threading.Thread | None = None
        self._finishing = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="coda-engine", daemon=True)
        self._watchdog = threading.Thread(target=self._watch, name="coda-engine-watchdog", daemon=True)
        metrics.watch(num_waiting=lambda: self.num_waiting, num_running=lambda: self.num_running)

    @property
    def decode(self) -> Decode:
        """Token ids to text."""
        return self._decode

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
        return len(self._run.jobs)

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
        """End what runs after its step, fail what waits, and join the thread."""
        self._stopping = True
        self._stopped.set()
        for job in self._scheduler.close():
            job.listener(SHUTTING_DOWN)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning("the model is still busy after %s s", timeout_s)

    def submit(self, requests: Sequence[CanvasRequest], listeners: Sequence[Listener], caller: str = "") -> list[Job]:
        """Queue all `requests` of a caller or none.

        Raises:
            QueueFull: there is no room for all of them.
        """
        jobs = [Job(request, listener) for request, listener in zip(requests, listeners, strict=True)]
        try:
            self._scheduler.submit(jobs, caller)
        except QueueFull:
            self._metrics.rejected.inc()
            raise
        return jobs

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Stop work on `jobs`: those in the queue never run, others are dropped before the next step."""
        for job in jobs:
            if not job.done:
                self._metrics.cancelled.inc()
                self._scheduler.cancel(job)

    def _work(self) -> None:
        run = self._run
        while not self._stopping:
            self._refill(run)
            if not run.jobs:
                if self._scheduler.is_closed:
                    break
                continue
            self._step(run)
            if self._run is not run:
                break  # the watchdog has given this thread up, and another one works
        self._fail(run, SHUTTING_DOWN)

    def _refill(self, run: _Run) -> None:
        """Drop what is no longer wanted and let in what has come; waits where nothing runs."""
        for row, (job, _) in list(run.jobs.items()):
            if job.cancelled:
                run.rows.drop(row)
                del run.jobs[row]
        for job in self._scheduler.take([job for job, _ in run.jobs.values()]):
            run.progress_s = time.monotonic()
            self._metrics.queue_s.observe(run.progress_s - job.arrived_s)
            try:
                row = run.rows.admit(job.request)
            except Exception:  # one request's fault must not end the service; its listener and the log hear of it
                logger.exception("a request could not be begun")
                self._finish(job, FAILED)
            else:
                run.jobs[row] = job, self._reader(job.request)
                self._begin_view(job)

    def _step(self, run: _Run) -> None:
        """One step of all rows, and what it means to their listeners."""
        started_s = run.progress_s = time.monotonic()
        self._metrics.batch_size.observe(len(run.jobs))
        forwards = run.rows.forwards
        try:
            steps = run.rows.step()
        except Exception:  # one step's fault must not end the service; every listener and the log hear of it
            logger.exception("a step of %d rows failed", len(run.jobs))
            self._fail(run, FAILED)
            run.rows = self._sampler.start()
            return
        if self._run is not run:
            return
        run.progress_s = time.monotonic()
        run.busy_s += run.progress_s - started_s
        self._metrics.step_s.observe(run.progress_s - started_s)
        self._metrics.forwards.inc(run.rows.forwards - forwards)
        num_before = len(run.jobs)
        for step in steps:
            self._advance(run, step)
        if num_finished := num_before - len(run.jobs):
            self._seconds_per_job += 0.2 * (run.busy_s / num_finished - self._seconds_per_job)
            run.busy_s = 0.0

    def _fail(self, run: _Run, failure: Failure) -> None:
        jobs = [job for job, _ in run.jobs.values()]
        run.jobs = {}
        for job in jobs:
            self._finish(job, failure)

    def _watch(self) -> None:
        """Give up rows that finish no step within `step_timeout_s`, and go on with a new thread."""
        while not self._stopped.wait(min(1.0, self._step_timeout_s / 4)):
            run = self._run
            waited_s = time.monotonic() - run.progress_s
            if not run.jobs or waited_s <= self._step_timeout_s:
                continue
            logger.error("%d rows are given up: no step was finished in %.0f s", len(run.jobs), waited_s)
            another_is_stuck = self._stuck is not None and self._stuck.is_alive()
            self._stuck, self._run = self._thread, _Run(self._sampler.start())
            if not another_is_stuck:
                self._thread = threading.Thread(target=self._work, name="coda-engine", daemon=True)
                self._thread.start()
            self._fail(run, Failure(f"the model finished no step in {self._step_timeout_s:g} s"))
            if another_is_stuck:
                logger.critical("two threads are stuck: no more requests are taken")
                for job in self._scheduler.close():
                    job.listener(Failure("the model is stuck"))
                return

    def _reader(self, request: CanvasRequest) -> AnswerReader | GapReader:
        def reader(prompt_ids: Sequence[int]) -> AnswerReader:
            return AnswerReader(
                decode=self._decode,
                mask_token_id=self._sampler.mask_token_id,
                eos_token_ids=self._sampler.eos_token_ids,
                prompt_ids=prompt_ids,
                stop=request.stop,
            )

        return GapReader(request, reader, self._decode) if request.more_gaps else reader(request.prompt_ids)

    def _begin_view(self, job: Job) -> None:
        """Show the canvas of a job that has been let in, where its request asks for it."""
        request = job.request
        if not request.shows_canvas:
            return
        job.view = CanvasView(
            request.pieces, request.gap_lengths, decode=self._decode, end_ids=self._sampler.eos_token_ids
        )
        job.listener(Delta("", canvas=job.view.whole()))

    def _advance(self, run: _Run, step: RowStep) -> None:
        """Show a listener what has become final; an answer that has ended leaves, whatever its canvas still holds."""
        job, reader = run.jobs[step.row]
        if step.error is not None:
            logger.error("a row failed alone", exc_info=step.error)
            del run.jobs[step.row]
            self._finish(job, FAILED)
            return
        if job.cancelled:
            return  # dropped before the next step
        reading = reader.feed(step.ids, is_full=step.is_full)
        request = job.request
        if request.logprobs is not None:
            job.judged += map(Judged, step.ids, step.evidence)
        goes_on = request.is_candidate or request.forced is not None
        is_over = reading.finish_reason is not None and (step.is_full or not goes_on)
        judged = job.judged if request.forced is not None else job.judged[: reading.num_tokens]
        canvas = None if job.view is None else job.view.step(step.changes, len(request.prompt_ids))
        if reading.text and not job.shown:
            self._metrics.first_text_s.observe(time.monotonic() - job.arrived_s)
        if len(reading.text) > len(job.shown) or (is_over and len(judged) > job.num_judged) or canvas is not None:
            job.listener(Delta(reading.text[len(job.shown) :], tuple(judged[job.num_judged :]), canvas))
            job.shown, job.num_judged = reading.text, len(judged)
        if is_over:
            run.rows.drop(step.row)
            del run.jobs[step.row]
            num_tokens = 0 if request.forced is not None else reading.num_tokens
            self._metrics.tokens.inc(num_tokens)
            answer = Answer(
                text=reading.text,
                num_tokens=num_tokens,
                forwards=step.forwards,
                rows=step.rows,
                cached_tokens=step.cached_tokens,
                finish_reason=reading.finish_reason,
                stop=reading.stop,
                gaps=reader.texts if isinstance(reader, GapReader) else (reading.text,),
                gap_lengths=request.gap_lengths,
                score=step.score,
                tokens=tuple(judged),
                canvas=job.view.whole() if job.view is not None and request.is_candidate else None,
            )
            self._finish(job, answer)

    def _finish(self, job: Job, event: Event) -> None:
        with self._finishing:  # the watchdog or the thread that it gave up, not both
            if job.done:
                return
            job.done = True
        if isinstance(event, Failure):
            self._metrics.failed.labels(code=event.code).inc()
        if not job.cancelled:
            job.listener(event)
