"""What the tasks of one command share: the journal that answers go to, and the agreement of the ranks.

lm-eval is called once for each task, so that a task that fails stops no other; a session is what outlives these calls.
Without one (lm-eval used as a library) answers are not written and every rank is on its own.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lm_eval.api.instance import Instance

from coda_eval.journal import Journal, digest

Result = TypeVar("Result")

CACHE_LIES = (
    "lm-eval's cache of answers knows a prompt by its text alone: another checkpoint, seed or number of steps would "
    "get the old answers, and the samples of one problem would become one"
)
"""Why `use_cache` is refused."""


class TaskFailed(RuntimeError):
    """A task failed on some rank; raised on every rank, so that all of them go on with the next task together."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What an answer is the answer to, with all that it depends on besides the model."""

    request: Instance
    repeat: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What holds after all precedence."""

    seed: int | None = None


def slot(request: Instance, repeat: int) -> str:
    """Names a request and repeat by the content of the document, whatever the model and the settings are."""
    return digest([request.task_name, request.request_type, request.idx, document_hash(request.doc), repeat])


def document_hash(document: Any) -> str:
    """Hash of a document's content."""
    return digest(document)


def label(request: Instance) -> Any:
    """What names a request's document: its own id, or its place in the task."""
    document = request.doc if isinstance(request.doc, dict) else {}
    return document.get("task_id", request.doc_id)


@dataclass(kw_only=True)
class Session:
    """The state of one command."""

    journal: Journal
    name: str = ""
    """Of the command, each time that it is given: what else answers depend on may have changed between two times."""

    model: Mapping[str, Any] = field(default_factory=dict)
    """What answers depend on of the model: hashes of weights and tokenizer, dtype and so on."""

    versions: Mapping[str, Any] = field(default_factory=dict)
    """Of the tasks by name."""

    code: str = ""
    """Version of the code."""

    judge: Callable[[Any, str], None] | None = None
    """Called with the document and the answer as soon as there is one."""

    settings: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """What held, by the name of the task."""

    def key(self, asked: Asked) -> str:
        """Hash of all that an answer depends on."""
        request = asked.request
        prompt = request.args[0]
        return digest(
            {
                "model": self.model,
                "settings": asked.settings,
                "task": request.task_name,
                "version": self.versions.get(request.task_name),
                "type": request.request_type,
                "prompt": str(prompt),
                "messages": getattr(prompt, "messages", None),
                "scored": request.args[1:] if request.request_type != "generate_until" else None,
                "slot": slot(request, asked.repeat),
                "seed": asked.seed,
            }
        )


_current: list[Session] = []


@contextlib.contextmanager
def opened(session: Session) -> Iterator[Session]:
    """Make `session` the one of this process while the block runs."""
    _current.append(session)
    try:
        yield session
    finally:
        _current.remove(session)
        session.journal.sync()


def current() -> Session | None:
    """The session of this process, if there is one."""
    return _current[-1] if _current else None


def find(asked: Asked) -> dict[str, Any] | None:
    """The line of the answer that the journal has, if it has one under this very key.

    A model whose weights are not known by their hash has none.
    """
    session = current()
    if session is None or session.model.get("weights") is None:
        return None
    return session.journal.answers.get(session.key(asked))


def keep(answers: Sequence[tuple[Asked, dict[str, Any]]]) -> None:
    """Write answers that were made, or that `find` gave, to the journal.

    Args:
        answers: each with what is known of it: `answer` and its cost, or the likelihood.

    Raises:
        OSError: the journal cannot be written.
    """
    session = current()
    if session is None or not answers:
        return
    journal = session.journal
    rows, settings = [], {}
    for asked, known in answers:
        request, key = asked.request, session.key(asked)
        session.settings[request.task_name] = asked.settings
        if "key" in known:
            journal.used += 1
            if key not in journal.taken.get(session.name, ()):
                rows.append({"run": session.name, "key": key})
        else:
            name = digest(asked.settings)
            settings[name] = dict(asked.settings)
            where = {"task": request.task_name, "task_id": label(request), "doc_id": request.doc_id}
            where |= {"repeat": asked.repeat, "slot": slot(request, asked.repeat), "seed": asked.seed}
            rows.append(
                {"key": key, "run": session.name, **where, "settings": name, "code": session.code}
                | {"prompt": str(request.args[0]), **known}
            )
        if session.judge is not None and "answer" in known:
            session.judge(request.doc, known["answer"])
    if rows:
        journal.write(rows, settings)


def agree(work: Callable[[], Result]) -> Result:
    """What `work` gives; where ranks run together, its error on any of them is raised on all.

    Ranks that part ways would wait for each other in lm-eval's next exchange forever.

    Raises:
        TaskFailed: `work` failed on some rank.
    """
    dist = _others()
    if not _current or dist is None:
        return work()
    failure, result = None, None
    try:
        result = work()
    except Exception as error:  # of any kind: it is raised again below, here and on every other rank
        failure = error
    told: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, failure and f"{type(failure).__name__}: {failure}")
    for rank, message in enumerate(told):
        if message is not None:
            raise TaskFailed(f"rank {rank}: {message}") from failure
    return result


def everywhere(holds: bool) -> bool:
    """Whether something holds on every rank."""
    dist = _others()
    if dist is None:
        return holds
    told: list[bool | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, holds)
    return all(told)


def agreed(value: Result) -> Result:
    """The first rank's value, on every rank."""
    dist, told = _others(), [value]
    if dist is not None:
        dist.broadcast_object_list(told)
    return told[0]


def wait() -> None:
    """Wait for the other ranks: a process that ends in an error takes those down that still write results."""
    if dist := _others():
        dist.barrier()


def _others() -> Any:
    """torch.distributed, where there are other ranks to talk to: what has made them meet has imported it."""
    dist = sys.modules.get("torch.distributed")
    is_met = dist is not None and dist.is_available() and dist.is_initialized()
    return dist if is_met and dist.get_world_size() > 1 else None
