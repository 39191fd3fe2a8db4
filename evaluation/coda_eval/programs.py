"""From an answer to a scored program: what lm-eval's filters and metrics of our tasks call.

Programs run in the filter stage, which sees all answers of a task at once, so they run in parallel, and each answer's
log entry holds its status, error and seconds. Not here: the sandbox (`sandbox.py`), the problems (`data.py`).
"""

import ast
import json
import logging
import math
import os
import re
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from typing import Any

from coda_eval.data import SAFIM_GAP, livecodebench_cases, problem, safim_cases
from coda_eval.data import documents as load_documents
from coda_eval.sandbox import Bench, Program, Verdict, further_packages, isolation_level, run_programs
from coda_eval.sandbox_script import prelude
from coda_eval.session import agree
from CoDALanguageModel.errors import UserError

logger = logging.getLogger(__name__)

LEVEL_VARIABLE = "CODA_EVAL_SANDBOX"
"""Environment variable with the isolation level: auto, bubblewrap, unshare, landlock or rlimits."""

WORKERS_VARIABLE = "CODA_EVAL_WORKERS"
"""Environment variable with the number of programs to run at once; by default one per core."""

_OPENING, _CLOSING = re.compile(r"(^[ \t]+)?```[^\n`]*\n", re.MULTILINE), re.compile("```")
_MOST_CLOSINGS = 32


class Answer(str):
    """A model's text that remembers what it cost. It is a plain string to lm-eval and its caches."""

    new_tokens: int | None = None
    """Tokens before the end of the answer."""

    forwards: int | None = None
    """Forward passes that the answer took part in."""

    generation_s: float | None = None
    """Seconds of each step it took part in, divided by the answers in the step."""

    cost: dict[str, float] | None = None
    """`DecodingCost` of its row."""

    seed: int | None = None
    """Base of its draws."""

    nats: float | None = None
    """Mean log-probability of the tokens of a gap when they were filled in, where several lengths are tried."""

    finish_reason: str | None = None
    """`length` where nothing ended the answer before the longest that was allowed, so that it may have been cut; else
    `stop`. None where that is not known, and of a gap that is filled in place, which has a length and no end."""

    surplus: bool = False
    """True for the repeats that lm-eval adds to give every rank the same number of requests; never scored."""

    @staticmethod
    def cost_of(text: str) -> dict[str, Any]:
        """What is known of the cost of any text; None for the rest."""
        return {name: getattr(text, name, None) for name in ("new_tokens", "forwards", "generation_s", "cost")}

    @classmethod
    def read(cls, line: Mapping[str, Any]) -> "Answer":
        """The answer of a line of the journal."""
        answer = cls(line["answer"])
        for name in ("new_tokens", "forwards", "generation_s", "cost", "seed"):
            setattr(answer, name, line[name])
        answer.finish_reason = line.get("finish_reason")  # journals of before do not say it
        return answer


class Judged(str):
    """A log entry: JSON, since lm-eval logs anything else as Python source, that remembers what it was made of."""

    fields: dict[str, Any]
    program: str | None
    """The text that was judged."""

    @classmethod
    def of(cls, answer: str, program: str | None = None, **fields: Any) -> "Judged":
        """The entry of an answer: its verdict and its cost."""
        entry = cls(json.dumps({**fields, **Answer.cost_of(answer)}))
        entry.fields, entry.program = fields, program
        return entry


def extract_code(answer: str, *names: str) -> str:
    """The code of a chat answer: the first fenced block that defines one of `names`, else the first, else all.

    What is a program as it stands is taken whole. A block in a list is indented with its fence, which is undone where
    it makes a program of what is none.
    """
    answer = answer.removeprefix("\ufeff")
    blocks = [_unindented(block, width, names) for width, block in _fenced(answer)]
    if blocks and (tree := _parse(answer)) and tree.body:  # a program that has fences in its texts
        return answer
    which = "|".join(map(re.escape, names))
    defines = re.compile(rf"^\s*(?:async\s+)?(?:def|class)\s+(?:{which})\b", re.M) if names else None
    return next((block for block in blocks if defines and defines.search(block)), blocks[0] if blocks else answer)


def _fenced(answer: str) -> list[tuple[int, str]]:
    """The width of the indentation and the text of each fenced block.

    A program may hold fences in its texts: a block goes up to the first one that leaves a program, if any does.
    """
    found, at = [], 0
    while opening := _OPENING.search(answer, at):
        width, start = len(opening[1] or ""), opening.end()
        closings = [closing.start() for closing in _CLOSING.finditer(answer, start)][:_MOST_CLOSINGS]
        ends = [*closings, len(answer)]
        end = next((end for end in ends if _parse(_dedented(answer[start:end], width))), ends[0])
        found.append((width, answer[start:end]))
        at = end + len("```")
    return found


def _dedented(block: str, width: int) -> str:
    return re.sub(rf"^[ \t]{{0,{width}}}", "", block, flags=re.MULTILINE)


def _unindented(block: str, width: int, names: Sequence[str]) -> str:
    """A block without the indentation of its fence, unless it is right as it stands, as the rest of a function is."""
    plain = _dedented(block, width)
    is_program = not _parse(block) and (set(names) & set(_defined(plain)) if names else _parse(plain))
    return plain if width and is_program else block


def _unparse(tree: ast.expr | None) -> str:
    """The source of an expression; none for what is nested deeper than Python can write it."""
    try:
        return ast.unparse(tree) if tree else ""
    except RecursionError:
        return ""


def _parse(code: str) -> ast.Module | None:
    """The syntax tree of `code`, if it is a program of its own."""
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _defined(code: str) -> tuple[str, ...]:
    """Names of the functions and classes that `code` defines at top level."""
    tree = _parse(code)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return tuple(node.name for node in tree.body if isinstance(node, kinds)) if tree else ()


def _join(prompt: str, code: str, entry_point: str) -> str:
    """The program of a prompt and an answer that continues it, or that is a program of its own.

    The prompt's imports and auxiliary functions stand above either way, but below what must come first in a program:
    its `from __future__` lines.
    """
    if entry_point not in _defined(code):
        return prompt + code
    future = [n for n in _parse(code).body if isinstance(n, ast.ImportFrom) and n.module == "__future__"]
    lines = [line.decode() for line in code.encode().splitlines(keepends=True)]  # Python's: no U+2028
    first = future[-1].end_lineno if future else 0
    above = next((text for text in (prompt, f"{prompt}    pass\n") if _parse(text)), "")  # a stub may have no body
    return "".join([*lines[:first], "\n" * bool(first), above, "\n\n", *lines[first:]])


def _reference(*parts: str) -> str:
    """The reference program of a problem, for the helpers that its tests take from it."""
    code = "".join(parts)
    return code if _parse(code) else ""


def humaneval_program(row: dict[str, Any], answer: str) -> Program:
    """HumanEval and HumanEval+: the answer continues the prompt, or repeats the whole function.

    Some tests use an auxiliary function of the prompt: they get the reference's, whatever the answer made of it.
    """
    name = row["entry_point"]
    return Program(
        candidate=_join(row["prompt"], extract_code(answer, name), name),
        setup=_reference(row["prompt"], row.get("canonical_solution") or ""),
        tests=f"{row['test']}\ncheck({name})\n",
        called=(name,),
        timeout_s=row["timeout_s"],
    )


def infilling_program(row: dict[str, Any], answer: str) -> Program:
    """HumanEval infilling: prefix, answer and suffix joined as they are; tests get the reference's helpers."""
    name = row["entry_point"]
    return Program(
        candidate=row["prompt"] + answer + row["suffix"],
        setup=_reference(row["prompt"], row["canonical_solution"], row["suffix"]),
        tests=f"{row['test']}\ncheck({name})\n",
        called=(name,),
        timeout_s=row["timeout_s"],
    )


def mbpp_program(row: dict[str, Any], answer: str) -> Program:
    """MBPP: the three asserts, after the set-up code that some problems need."""
    names = _defined(row.get("code") or "")
    return Program(
        candidate=extract_code(answer, *names),
        tests="\n".join([row.get("test_setup_code") or "", *row["test_list"]]),
        called=names,
        timeout_s=row["timeout_s"],
    )


def mbpp_plus_program(row: dict[str, Any], answer: str) -> Program:
    """MBPP+: the full tests of EvalPlus, not only the asserts that the prompt shows."""
    names = _defined(row.get("code") or "")
    return Program(
        candidate=extract_code(answer, *names),
        tests="\n".join([*(row.get("test_imports") or []), row["test"]]),
        called=names,
        timeout_s=row["timeout_s"],
    )


def quickstart_program(row: dict[str, Any], answer: str) -> Program:
    """Quickstart problems: the answer's code, then the problem's asserts, also in a `check` as HumanEval's."""
    name = row["entry_point"]
    call = f"check({name})\n" if "check" in _defined(row["test"]) else ""  # defined alone, it would fail nothing
    return Program(
        candidate=extract_code(answer, name),
        tests=f"{row['test']}\n{call}",
        called=(name,),
        timeout_s=row["timeout_s"],
    )


def mbpp_published_program(row: dict[str, Any], answer: str) -> Program:
    """MBPP and MBPP+ as lm-eval's own tasks have them: three asserts and nothing else."""
    return Program(
        candidate=extract_code(answer),
        tests="\n".join(row["test_list"][:3]),
        called=_defined(row["code"]),
        timeout_s=row["timeout_s"],
    )


@cache
def _source(name: str) -> str:
    """The source of a module of the sandbox."""
    return Path(__file__).with_name(f"sandbox_{name}.py").read_text(encoding="utf-8")


def script_program(program: str, cases: Sequence[tuple[str, list[str]]], timeout_s: float) -> Program:
    """A program that reads a text and prints one: each case is a text and the outputs that are right.

    It runs once for each case; the outputs never come into its reach.
    """
    return Program(
        candidate=program,
        host=_source("script"),
        setup=_source("outputs"),
        tests=f"check_script(run_script, {list(cases)!r})",
        called=("run_script",),
        timeout_s=timeout_s,
    )


def livecodebench_program(row: dict[str, Any], answer: str) -> Program:
    """LiveCodeBench: a script that reads standard input, or a method of `Solution` that is called with JSON values."""
    name, code = json.loads(row["metadata"]).get("func_name"), extract_code(answer)
    cases = livecodebench_cases(row)
    if not name:
        return script_program(code, [(text, [output]) for text, output in cases], row["timeout_s"])
    owner = "Solution()" if "class Solution" in code else ""
    return Program(
        candidate=prelude() + code,
        setup=_source("outputs"),
        tests=f"check_calls({owner}{owner and '.'}{name}, {cases!r})",
        called=("Solution", name),
        timeout_s=row["timeout_s"],
    )


def unittest_program(row: dict[str, Any], answer: str) -> Program:
    """BigCodeBench: the function, and a class of unit tests that runs in its process and may patch what it uses."""
    name = row["entry_point"]
    return Program(
        candidate=_join(row["complete_prompt"], extract_code(answer, name), name),
        host=f"ENTRY_POINT = {name!r}\n{_source('unittest')}",
        setup=_source("suite"),
        tests=f"check_suite(run_tests, {row['test']!r})",
        called=("run_tests",),
        timeout_s=row["timeout_s"],
    )


def _predicted(answer: str, is_call: bool) -> ast.expr | None:
    """The expression that an answer to CRUXEval gives: alone, or as a side of an assertion."""
    tree = _parse(extract_code(answer).strip())
    if tree is None or not tree.body:
        return None
    first = tree.body[0]
    sides = [first.value] if isinstance(first, ast.Expr) else []
    if isinstance(first, ast.Assert) and isinstance(first.test, ast.Compare):
        sides = [first.test.left, *first.test.comparators]
    calls = [isinstance(side, ast.Call) and isinstance(side.func, ast.Name) and side.func.id == "f" for side in sides]
    return next((side for side, calls_f in zip(sides, calls, strict=True) if calls_f is is_call), None)


def cruxeval_output_program(row: dict[str, Any], answer: str) -> Program:
    """CRUXEval-O: the value of the answer must be the output. The function is not there to be called."""
    made = _unparse(_predicted(answer, is_call=False))
    return Program(
        candidate=f"def predicted():\n    return {made}\n" if made else answer,
        tests=f"assert predicted() == ({row['output']})",
        called=("predicted",),
        timeout_s=row["timeout_s"],
    )


def cruxeval_input_program(row: dict[str, Any], answer: str) -> Program:
    """CRUXEval-I: the function of the problem, called with the answer's arguments, must give the output."""
    text = extract_code(answer).strip()
    made = _predicted(text if text.startswith(("f(", "assert")) else f"f({text}", is_call=True)
    collect = _unparse(made and ast.Call(ast.Name("collect"), made.args, made.keywords))
    return Program(
        candidate="def collect(*positional, **named): return positional, named\n"
        f"def arguments():\n    return {collect}\n"
        if collect
        else answer,
        setup=row["code"],
        tests=f"positional, named = arguments()\nassert f(*positional, **named) == ({row['output']})",
        called=("arguments",),
        timeout_s=row["timeout_s"],
    )


def safim_program(row: dict[str, Any], answer: str) -> Program:
    """SAFIM in Python: the program with its gap filled, as a script with the problem's inputs and outputs."""
    cases = [(case["input"], case["output"]) for case in safim_cases(row["unit_tests"])]
    return script_program(row["eval_prompt"].replace(SAFIM_GAP, answer), cases, row["timeout_s"])


PROGRAMS = {
    "humaneval": humaneval_program,
    "humaneval_plus": humaneval_program,
    "mbpp": mbpp_program,
    "mbpp_plus": mbpp_plus_program,
    "single_line_infilling": infilling_program,
    "multi_line_infilling": infilling_program,
    "random_span_infilling": infilling_program,
    "random_span_light_infilling": infilling_program,
    "quickstart_problems": quickstart_program,
    "mbpp_published": mbpp_published_program,
    "mbpp_plus_published": mbpp_published_program,
    "livecodebench": livecodebench_program,
    "bigcodebench": unittest_program,
    "bigcodebench_hard": unittest_program,
    "cruxeval_input": cruxeval_input_program,
    "cruxeval_output": cruxeval_output_program,
    "safim_block": safim_program,
    "safim_control": safim_program,
}
"""How an answer becomes a program, by benchmark."""


def program_of(document: dict[str, Any], answer: str) -> Program:
    """The program that judges an answer to a document of a task that runs programs."""
    return PROGRAMS[document["benchmark"]](problem(document), answer)


def _scored(resps: Sequence[Sequence[str]]) -> list[list[str]]:
    """The answers that count: lm-eval's padding of uneven ranks is left out."""
    return [[answer for answer in answers if not getattr(answer, "surplus", False)] for answers in resps]


def sandbox_settings() -> tuple[str, int | None]:
    """The isolation level that works here and the number of workers, as the environment asks for them.

    Raises:
        UserError: a variable has a wrong value, or the level does not work on this machine.
    """
    workers = os.environ.get(WORKERS_VARIABLE)
    if workers is not None and not (workers.isdigit() and int(workers) > 0):
        raise UserError(f"{WORKERS_VARIABLE} must be a positive number, got {workers!r}")
    further_packages()  # whose error is not one of the level
    try:
        level = isolation_level(os.environ.get(LEVEL_VARIABLE, "auto"))
    except UserError as error:
        raise UserError(f"{error} ({LEVEL_VARIABLE} sets the level)") from error
    return level, int(workers) if workers else None


def documents(data: str, **kwargs: Any) -> dict[str, Any]:
    """The documents of a benchmark whose answers will be run; see `coda_eval.data.documents`.

    The sandbox is tried first: lm-eval loads a task's documents before it generates anything, so that answers that
    nothing could judge are never made.

    Raises:
        UserError: as there, or no sandbox works.
    """
    sandbox_settings()
    return load_documents(data, **kwargs)


class Overlap:
    """Judges answers while others are made; `run` then finds the verdicts by the whole program, tests included.

    What it does not find there, it runs itself: nothing depends on what was judged early.
    """

    current: "Overlap | None" = None
    """The one of this process while its block runs."""

    def __init__(self) -> None:
        self._bench: Bench | None = None
        self._begun: list[Future[tuple[Program, Verdict]]] = []
        self._early: dict[Program, deque[Verdict]] = defaultdict(deque)

    def judge(self, document: Any, answer: str) -> None:
        """Begin to judge an answer, if its task runs programs."""
        if not isinstance(document, dict) or document.get("benchmark") not in PROGRAMS:
            return
        if self._bench is None:
            self._bench = Bench(*sandbox_settings())
        self._begun.append(self._bench.submit(lambda: program_of(document, answer)))

    def verdict(self, program: Program) -> Verdict | None:
        """The verdict on a program, each but once; None where there is none."""
        while self._begun:
            begun = self._begun.pop()
            if begun.exception() is None:  # else the program is built again, and the error met there
                judged, verdict = begun.result()
                if verdict.status != "near":
                    self._early[judged].append(verdict)
        return self._early[program].popleft() if self._early.get(program) else None

    def __enter__(self) -> "Overlap":
        Overlap.current = self
        return self

    def __exit__(self, *_: object) -> None:
        Overlap.current = None
        if self._bench is not None:
            self._bench.__exit__()


def run(resps: Sequence[Sequence[str]], docs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Filter of every task that runs programs: one record (JSON) per answer, in order."""
    kept = _scored(resps)

    def judge() -> list[tuple[Program, Verdict]]:
        programs = []
        for doc, answers in zip(docs, kept, strict=True):
            programs += [program_of(doc, answer) for answer in answers]
        level, workers = sandbox_settings()
        early = [judge.verdict(program) if (judge := Overlap.current) else None for program in programs]
        late = [program for program, verdict in zip(programs, early, strict=True) if verdict is None]
        verdicts = iter(run_programs(late, level=level, workers=workers))
        return [(program, verdict or next(verdicts)) for program, verdict in zip(programs, early, strict=True)]

    judged = iter(agree(judge))

    def record(answer: str) -> str:
        program, verdict = next(judged)
        fields = {name: getattr(verdict, name) for name in ("status", "error", "seconds", "cpu_seconds", "isolation")}
        return Judged.of(answer, program.candidate, **fields)

    return [[record(answer) for answer in answers] for answers in kept]


def compare_middle(resps: Sequence[Sequence[str]], docs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Filter of the exact-match gaps: nothing runs, answer and true middle are compared."""

    def record(answer: str, middle: str) -> str:
        exact = answer == middle
        status = "passed" if exact or answer.strip() == middle.strip() else "failed"
        first_line = _first_line(answer) == _first_line(middle)
        return Judged.of(answer, status=status, exact=exact, first_line=first_line)

    pairs = zip(_scored(resps), docs, strict=True)
    return [[record(answer, doc["infill_middle"]) for answer in answers] for answers, doc in pairs]


def _first_line(text: str) -> str:
    """The first line that holds something, without the white space around it."""
    return text.strip().partition("\n")[0].rstrip()


def _call_of(text: str) -> tuple[list[str], dict[str | None, str]] | None:
    """The arguments of a text that is one call, in a form that compares."""
    try:
        call = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if not isinstance(call, ast.Call):
        return None
    return [ast.dump(value) for value in call.args], {one.arg: ast.dump(one.value) for one in call.keywords}


def same_syntax(answer: str, truth: str, language: str) -> bool:
    """SAFIM's comparison without tests: equal without white space, or Python calls with the same arguments.

    Source: https://github.com/gonglinyuan/safim, evaluate.py; as there, white space goes before the call is read.
    """
    answer, truth = ("".join(text.split()) for text in (answer, truth))
    call = _call_of(answer) if language == "python" else None
    return answer == truth or (call is not None and call == _call_of(truth))


def compare_syntax(resps: Sequence[Sequence[str]], docs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Filter of SAFIM's gaps that have no tests."""

    def record(answer: str, doc: dict[str, Any]) -> str:
        same = same_syntax(answer, doc["infill_middle"], doc["lang"])
        return Judged.of(answer, status="passed" if same else "failed")

    return [[record(answer, doc) for answer in answers] for answers, doc in zip(_scored(resps), docs, strict=True)]


def pass_at_k(num_answers: int, num_passed: int, k: int) -> float:
    """Unbiased estimate of the chance that one of `k` answers passes: 1 - C(n - c, k) / C(n, k).

    Source: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1, in its product form.

    Raises:
        UserError: `k` is not in [1, num_answers].
    """
    if not 1 <= k <= num_answers:
        raise UserError(f"k must be in [1, {num_answers}] (the number of answers), got {k}")
    if num_answers - num_passed < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(num_answers - num_passed + 1, num_answers + 1))


def ks_of(num_answers: int) -> list[int]:
    """The k of pass@k that are scored: 1, 10 and 100 up to the number of answers, and that number."""
    return sorted({k for k in (1, 10, 100) if k <= num_answers} | {num_answers})


def score_programs(doc: dict[str, Any], results: list[list[str]]) -> dict[str, Any]:
    """Metrics of one problem: pass@k for the k of `ks_of`, timeouts, outcomes, isolation."""
    records = [json.loads(record) for record in results[0]]
    outcomes = Counter(record["status"] for record in records)
    return {
        **{f"pass@{k}": pass_at_k(len(records), outcomes["passed"], k) for k in ks_of(len(records))},
        "timeouts": outcomes["timeout"] / len(records),
        "outcomes": dict(outcomes),
        "isolation": records[0]["isolation"],
    }


def score_middle(doc: dict[str, Any], results: list[list[str]]) -> dict[str, Any]:
    """Metrics of one gap: equal after stripping white space, and equal to the byte."""
    records = [json.loads(record) for record in results[0]]
    return {
        "exact_match": sum(record["status"] == "passed" for record in records) / len(records),
        "exact_match_raw": sum(record["exact"] for record in records) / len(records),
    }


def score_lines(doc: dict[str, Any], results: list[list[str]]) -> dict[str, Any]:
    """Metrics of one gap of whole lines: those of `score_middle`, and whether its first line is right."""
    records = [json.loads(record) for record in results[0]]
    first = sum(record["first_line"] for record in records) / len(records)
    return {**score_middle(doc, results), "exact_match_first_line": first}


def score_syntax(doc: dict[str, Any], results: list[list[str]]) -> dict[str, Any]:
    """Metric of one gap of `compare_syntax`."""
    statuses = [json.loads(record)["status"] for record in results[0]]
    return {"syntax_match": statuses.count("passed") / len(statuses)}


SCORES_ALL = (score_programs, score_middle, score_lines, score_syntax)
"""Metrics of problems with any number of answers."""


def count_outcomes(outcomes: Sequence[dict[str, int]]) -> str:
    """Aggregation of the outcomes: how many programs there were, and how many ended in which way."""
    total = sum(map(Counter, outcomes), Counter())
    named = {name: total[name] for name in sorted({"passed", "failed", "timeout", *total})}
    return f"{total.total()} programs: " + ", ".join(f"{count} {name}" for name, count in named.items())


def weakest(levels: Sequence[str]) -> str:
    """Aggregation of the isolation level: all levels that ran, which is one."""
    return "+".join(sorted(set(levels)))
