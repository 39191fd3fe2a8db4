"""The records of a run, `records.jsonl` in its folder: one line for each task, document and repeat that was judged."""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from CoDALanguageModel.config_fields import is_finite
from CoDALanguageModel.errors import UserError, did_you_mean, half_surrogate
from CoDALanguageModel.run_files import write_whole

FILE = "records.jsonl"
"""Name of the file in a run's folder."""


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a number that a float can hold; the infinite ones and NaN are such numbers, too."""
    return type(value) is float or (type(value) is int and abs(value) <= sys.float_info.max)


_Kind = tuple[Callable[[Any], bool], str]
_TEXT: _Kind = (lambda value: value is None or isinstance(value, str), "a text or null")
_NUMBER: _Kind = (lambda value: value is None or is_finite(value), "a finite number or null")
_WHOLE: _Kind = (lambda value: type(value) is int, "a whole number")
_KINDS: dict[str, _Kind] = {
    "task": (lambda value: isinstance(value, str), "a text"),
    "task_id": (lambda value: not isinstance(value, (list, dict)), "a text or a number"),
    "doc_id": _WHOLE,
    "repeat": _WHOLE,
    **dict.fromkeys(("prompt", "answer", "program", "status", "error"), _TEXT),
    "score": (lambda value: value is None or is_number(value), "a number or null"),
    **dict.fromkeys(("seconds", "cpu_seconds", "new_tokens", "forwards"), _NUMBER),
    "cost": (
        lambda value: (
            value is None or isinstance(value, dict) and all(one is None or is_finite(one) for one in value.values())
        ),
        "an object of finite numbers or null",
    ),
    "finish_reason": _TEXT,
}
"""What the fields hold that are shown or computed with."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One answer and what became of it; None where something does not apply or is not known."""

    task: str
    task_id: str | int
    """The document's own id, or its place in the task."""

    doc_id: int
    """The document's place in the task."""

    repeat: int
    seed: int | None
    """Base of the answer's draws; None for models that draw by the seed of the process."""

    prompt: str
    answer: str | None
    """The model's text, before anything is cut from it; None for likelihoods."""

    program: str | None
    """The text that was judged."""

    score: float | None
    """Of a judged answer 1 or 0; else the first metric of the task, for the document."""

    status: str | None
    error: str | None
    seconds: float | None
    """Of the program, by the clock."""

    cpu_seconds: float | None
    """Of the program, all its processes together."""

    new_tokens: int | None
    forwards: int | None
    cost: dict[str, float] | None
    """`DecodingCost` of the answer's row, and `generation_s`: its part of the time of each step."""

    finish_reason: str | None = None
    """`stop`; or `length`: nothing ended the answer before its longest, and it may have been cut."""

    likelihoods: list[list[float | None]] | None = None
    """[nats, standard error] of each choice; the error is None where it is not known."""


def read_records(folder: str | os.PathLike[str]) -> list[Record]:
    """The records of the run in `folder`, in the order of the tasks, then of documents and repeats.

    Raises:
        UserError: there are none, or a line does not hold a record; the message names file and line.
    """
    path = Path(folder) / FILE
    if not os.path.isfile(path):
        raise UserError(f"no {FILE} in {str(folder)!r}: give the --output_path of a run, or judge it first")
    names = [field.name for field in dataclasses.fields(Record)]
    needed = {field.name for field in dataclasses.fields(Record) if field.default is dataclasses.MISSING}
    records = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}: line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}: line {number} must be a JSON object, got {json.dumps(row)[:80]}")
            for name in row:
                if name not in names:
                    raise UserError(f"{path}: line {number} has an unknown field {name!r}{did_you_mean(name, names)}")
            if missing := sorted(needed - row.keys()):
                raise UserError(f"{path}: line {number} lacks {', '.join(missing)}")
            for name, (holds, what) in _KINDS.items():
                if not holds(value := row.get(name)):
                    raise UserError(f"{path}: line {number}: {name} must be {what}, got {value!r:.80}")
            for name in ("task", "task_id"):
                if isinstance(row[name], str) and (at := half_surrogate(row[name])) is not None:
                    raise UserError(f"{path}: line {number}: {name} holds half of a surrogate pair at character {at}")
            records.append(Record(**row))
    return records


def write_records(folder: Path, fresh: Sequence[Record]) -> None:
    """Write the records of tasks that were judged; those of other tasks stay, those of the same are replaced."""
    judged = {record.task for record in fresh}
    kept = [r for r in read_records(folder) if r.task not in judged] if (folder / FILE).is_file() else []
    write_whole(folder / FILE, "".join(json.dumps(dataclasses.asdict(r)) + "\n" for r in [*kept, *fresh]))
