"""What the tasks of one command share: the file that answers go to, and the agreement of the ranks.

lm-eval is called once for each task, so that a task that fails stops no other; a session is what outlives these calls.
Without one (lm-eval used as a library) answers are not written and every rank is on its own.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")

CACHE_LIES = (
    "lm-eval's cache of answers knows a prompt by its text alone: another checkpoint, seed or number of steps would "
    "get the old answers, and the samples of one problem would become one"
)
"""Why `use_cache` is refused."""


class TaskFailed(RuntimeError):
    """A task failed on some rank; raised on every rank, so that all of them go on with the next task together."""


@dataclass(kw_only=True)
class Session:
    """The state of one command."""

    folder: Path
    """Where answers are written as they are made."""

    answers: int = 0
    """Answers that this process has written."""

    def file(self) -> Path:
        """The file of this rank's answers."""
        return self.folder / f"answers_rank{os.environ.get('RANK', '0')}.jsonl"


_current: list[Session] = []


@contextlib.contextmanager
def opened(session: Session) -> Iterator[Session]:
    """Make `session` the one of this process while the block runs."""
    _current.append(session)
    try:
        yield session
    finally:
        _current.remove(session)


def save_answers(records: Sequence[dict[str, Any]]) -> None:
    """Append answers to this rank's file, one JSON object a line.

    Raises:
        OSError: the file cannot be written.
    """
    if not _current or not records:
        return
    session = _current[-1]
    session.folder.mkdir(parents=True, exist_ok=True)
    # The first write makes the file: a second command in the same folder ends here instead of mixing its answers in.
    with session.file().open("a" if session.answers else "x", encoding="ascii") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    session.answers += len(records)


def agree(work: Callable[[], Result]) -> Result:
    """What `work` gives; where ranks run together, its error on any of them is raised on all.

    Ranks that part ways would wait for each other in lm-eval's next exchange forever.

    Raises:
        TaskFailed: `work` failed on some rank.
    """
    dist = _ranks()
    if not _current or dist is None or dist.get_world_size() == 1:
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


def wait() -> None:
    """Wait for the other ranks: a process that ends in an error takes those down that still write results."""
    if dist := _ranks():
        dist.barrier()


def _ranks() -> Any:
    """torch.distributed, where the ranks have met: whoever made them meet has imported it."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None
