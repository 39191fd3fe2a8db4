"""Self-check: `python -m coda_eval selfcheck [--tasks ...] [--level ...]` tries the judge before it is believed.

At the level in use, reference solutions must pass, stubs must fail, mutants (reference solutions with one small seeded
change) must mostly fail, and hostile programs must be contained (`hostile.py`). The result is remembered for this
machine and this version of the sandbox, so that score cards can hold it.
"""

import argparse
import ast
import hashlib
import json
import logging
import os
import platform
import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from coda_eval import data
from coda_eval.data import SOURCES, UNSOLVABLE
from coda_eval.hostile import CHEATS, HOSTILE, TESTS, reaching
from coda_eval.programs import PROGRAMS, sandbox_settings
from coda_eval.sandbox import ISOLATED, Program, isolation_label, isolation_level, run_programs
from CoDALanguageModel.errors import UserError
from CoDALanguageModel.run_files import write_whole

logger = logging.getLogger(__name__)

PROBLEMS = 32
"""Problems of each benchmark that are drawn unless the command line says otherwise."""

SURVIVORS = 1 / 3
"""Share of mutants that may pass, two in any case. Some changes change nothing that is asked, and published tests miss
some: of 70 mutants of HumanEval and MBPP, 7 pass. A judge that does not run the tests passes nearly all."""

MUTANT_S = 5.0
"""Limit of a mutant, in seconds: many never end."""

FORK_BOMB = "import os\nwhile True:\n    os.fork()"

_SWAPS = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult},
    **{ast.Mod: ast.FloorDiv, ast.USub: ast.UAdd},
}


def mutant(program: str, name: str, seed: str) -> str | None:
    """`program` with one operator, number or truth value of the function `name` changed; None if it has none."""
    tree = _tree(program)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    changes = [change for function in functions for node in function.body for change in _changes(node)]
    if not changes:
        return None
    owner, field, value = random.Random(seed).choice(changes)
    setattr(owner, field, value)
    return ast.unparse(ast.fix_missing_locations(tree))


def _tree(program: str) -> ast.Module:
    """The syntax tree of a program: an empty one of a reference that is none, which fails as such."""
    try:
        return ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ast.Module([], [])


def _changes(root: ast.AST) -> list[tuple[ast.AST, str, Any]]:
    """Every small change below a node: where, which field, and its new value."""
    found: list[tuple[ast.AST, str, Any]] = []
    for node in ast.walk(root):
        if isinstance(node, ast.Compare):
            swapped = [_SWAPS[type(node.ops[0])](), *node.ops[1:]]
            found.append((node, "ops", swapped))
        elif isinstance(node, (ast.BinOp, ast.AugAssign, ast.BoolOp, ast.UnaryOp)) and type(node.op) in _SWAPS:
            found.append((node, "op", _SWAPS[type(node.op)]()))
        elif isinstance(node, ast.Constant) and type(node.value) in (int, bool):
            found.append((node, "value", (not node.value) if type(node.value) is bool else node.value + 1))
    return found


def reference(benchmark: str, row: dict[str, Any]) -> str:
    """The answer to a problem that is right by its benchmark."""
    if benchmark.startswith("cruxeval"):
        return f" {row['output']}" if benchmark == "cruxeval_output" else f"{row['input']})"
    return row[next(name for name in ("canonical_solution", "ground_truth", "code") if name in row)]


def stub(benchmark: str) -> str:
    """An answer that does nothing; in a gap, where that or a bracket can be right, what no program may hold."""
    return "\0" if SOURCES[benchmark].gap else "pass" if benchmark.startswith("mbpp") else "    pass\n"


def whole_reference(benchmark: str, row: dict[str, Any]) -> tuple[str, str] | None:
    """The reference as a program of its own and the function in it that is tested, where an answer may be that."""
    if "entry_point" in row and not benchmark.endswith("_infilling"):
        prompt = row.get("complete_prompt", row["prompt"] if benchmark.startswith("humaneval") else "")
        return prompt + row["canonical_solution"], row["entry_point"]
    if benchmark.startswith("mbpp"):
        functions = [node.name for node in _tree(row["code"]).body if isinstance(node, ast.FunctionDef)]
        called = [name for name in functions if any(name in test for test in row["test_list"])]
        return (row["code"], called[-1]) if called else None
    return None


def benchmarks_here(folder: str) -> list[str]:
    """Benchmarks whose references can be run without a network, apart from those for comparison only."""
    return [
        name
        for name in PROGRAMS
        if not name.endswith("_published") and name != "livecodebench" and data.is_here(name, folder)
    ]


def check_problems(benchmarks: Sequence[str], folder: str, level: str, workers: int | None, count: int) -> dict:
    """Run references, stubs and mutants of `count` drawn problems of each benchmark (0: of all)."""
    asked: list[tuple[str, str, Program]] = []
    for benchmark in benchmarks:
        build, rows = PROGRAMS[benchmark], list(data.rows(benchmark, folder).values())
        if SOURCES[benchmark].language:
            rows = [row for row in rows if row[SOURCES[benchmark].language] == "python"]
        if 0 < count < len(rows):
            rows = random.Random(benchmark).sample(rows, count)
        for row in rows:
            name = f"{benchmark} {row['task_id']}"
            if row["task_id"] not in UNSOLVABLE.get(benchmark, ()):
                asked.append(("references", name, build(row, reference(benchmark, row))))
            asked.append(("stubs", name, _brief(build(row, stub(benchmark)))))
            whole = whole_reference(benchmark, row)
            changed = mutant(*whole, seed=name) if whole else None
            if changed is not None:
                asked.append(("mutants", name, _brief(build(row, changed))))
    verdicts = run_programs([program for _, _, program in asked], level=level, workers=workers)
    totals, passed = Counter(kind for kind, _, _ in asked), Counter()
    failed, stubs, survivors = [], [], []
    for (kind, name, _), verdict in zip(asked, verdicts, strict=True):
        passed[kind] += verdict.passed
        if verdict.passed != (kind == "references"):
            {"references": failed, "stubs": stubs, "mutants": survivors}[kind].append(name)
    return {
        "references": {"total": totals["references"], "passed": passed["references"], "failed": failed},
        "stubs": {"total": totals["stubs"], "passed": passed["stubs"], "survivors": stubs},
        "mutants": {"total": totals["mutants"], "passed": passed["mutants"], "survivors": survivors},
    }


def _brief(program: Program) -> Program:
    return replace(program, timeout_s=min(program.timeout_s, MUTANT_S))


def check_hostile(level: str, workers: int | None) -> dict[str, Any]:
    """Run every hostile program with an honest one behind it: none may pass, and all honest ones must."""
    honest = Program(candidate="def f(x): return x * 2", tests=TESTS)
    helper = {"setup": "def helper(x): return 4", "called": ("f",)}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "secret.txt").write_text("secret")
        reach = reaching(Path(folder)) if level in ISOLATED else {}
        asked = {name: Program(candidate=code, tests=TESTS, timeout_s=1.5) for name, (code, _) in HOSTILE.items()}
        asked |= {n: Program(candidate=code, tests=t, timeout_s=3, **helper) for n, (code, t) in CHEATS.items()}
        asked |= {n: Program(candidate=code, tests=TESTS, timeout_s=10) for n, code in reach.items()}
        asked["fork bomb"] = Program(candidate=FORK_BOMB, tests=TESTS, timeout_s=2)
        programs = [program for hostile in asked.values() for program in (hostile, honest)]
        verdicts = run_programs(programs, level=level, workers=workers)
        touched = sorted(path.name for path in Path(folder).iterdir()) != ["secret.txt"]
    wrong = [name for name, v in zip(asked, verdicts[::2], strict=True) if v.passed or v.status == "unjudged"]
    harmed = [name for name, verdict in zip(asked, verdicts[1::2], strict=True) if not verdict.passed]
    return {"total": len(asked), "uncontained": wrong, "neighbours_failed": harmed, "files_touched": touched}


def self_check(
    benchmarks: Sequence[str] = (), level: str | None = None, count: int = PROBLEMS, folder: str | None = None
) -> dict[str, Any]:
    """Try the judge at a level and remember how it did.

    Args:
        benchmarks: keys of `PROGRAMS`; by default all whose problems are on this machine.
        level: as `isolation_level`; by default what the environment asks for.
        count: problems of each benchmark, drawn by seed; 0 for all.
        folder: with the files of the benchmarks; by default `CODA_EVAL_DATA`.

    Raises:
        UserError: a benchmark or the level cannot be used.
    """
    held, workers = sandbox_settings()
    level = held if level is None else isolation_level(level)
    folder = folder or os.environ.get(data.DATA_VARIABLE) or ""
    if unknown := [name for name in benchmarks if name not in PROGRAMS or name == "livecodebench"]:
        known = ", ".join(name for name in PROGRAMS if name != "livecodebench")
        raise UserError(f"no reference solutions for {', '.join(unknown)} (known: {known})")
    benchmarks = list(dict.fromkeys(benchmarks)) or benchmarks_here(folder)
    if not benchmarks:
        raise UserError(f"no benchmark is on this machine whose references could be run: set {data.DATA_VARIABLE}")
    problems, hostile = check_problems(benchmarks, folder, level, workers, count), check_hostile(level, workers)
    mutants = problems["mutants"]
    ok = (
        problems["references"]["total"] > 0
        and not (problems["references"]["failed"] or problems["stubs"]["survivors"])
        and mutants["passed"] <= max(2, SURVIVORS * mutants["total"])
        and not (hostile["uncontained"] or hostile["neighbours_failed"] or hostile["files_touched"])
    )
    result = {
        "level": isolation_label(level),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "ok": ok,
        "benchmarks": benchmarks,
        **problems,
        "hostile": hostile,
        **_identity(),
    }
    results = {**_remembered(), result["level"]: result}
    try:
        _memory().parent.mkdir(parents=True, exist_ok=True)
        write_whole(_memory(), json.dumps(results, indent=2) + "\n")
    except (OSError, RuntimeError) as error:  # of a user without a home; what was found is still to be told
        logger.warning("the result is not remembered, and score cards will not hold it: %s", error)
    return result


def last_result(level: str) -> dict[str, Any] | None:
    """How the judge last did at a level, on this machine and with this version of the sandbox; None: not tried.

    Args:
        level: one of `LEVELS`, or as verdicts name it.
    """
    result = _remembered().get(isolation_label(level.partition(" ")[0]))
    return result if result is not None and _identity().items() <= result.items() else None


def _memory() -> Path:
    """The file that results are remembered in.

    Raises:
        RuntimeError: this user has no home.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coda_eval" / "selfcheck.json"


def _remembered() -> dict[str, Any]:
    """All results by level; a file that was written otherwise counts as none."""
    try:
        found = json.loads(_memory().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):
        return {}
    return found if isinstance(found, dict) and all(isinstance(one, dict) for one in found.values()) else {}


def _identity() -> dict[str, str]:
    """What a result holds for: the machine, its kernel, and the code that judges."""
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("sandbox*.py")):
        code.update(path.read_bytes())
    return {"machine": platform.node(), "kernel": platform.release(), "sandbox": code.hexdigest()[:16]}


def account(result: dict[str, Any]) -> str:
    """The result in lines."""
    lines = [f"level {result['level']}: {'ok' if result['ok'] else 'NOT ok'}; {', '.join(result['benchmarks'])}"]
    for kind in ("references", "stubs", "mutants"):
        names = result[kind].get("failed", result[kind].get("survivors"))
        lines.append(f"{kind}: {result[kind]['passed']} of {result[kind]['total']} passed")
        if names:
            lines.append(f"  {'failed' if kind == 'references' else 'survived'}: {', '.join(names)}")
    hostile = result["hostile"]
    lines.append(f"hostile: {hostile['total'] - len(hostile['uncontained'])} of {hostile['total']} contained")
    for name in ("uncontained", "neighbours_failed"):
        if hostile[name]:
            lines.append(f"  {name.replace('_', ' ')}: {', '.join(hostile[name])}")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Check, print how it went, and end with status 1 where it did not go well.

    Raises:
        SystemExit: the judge is not to be believed.
    """
    parser = argparse.ArgumentParser(prog="python -m coda_eval selfcheck", description="Try the judge of programs.")
    parser.add_argument(
        "--tasks", nargs="+", default=[], help="tasks (coda_humaneval ...); default: all on this machine"
    )
    parser.add_argument("--level", help="isolation level; default: CODA_EVAL_SANDBOX, else the best that works")
    parser.add_argument("--problems", type=int, default=PROBLEMS, help="problems of each; 0 for all (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the whole result as JSON")
    args = parser.parse_args(argv)
    if args.problems < 0:
        raise UserError(f"--problems must be 0 (all) or positive, got {args.problems}")
    benchmarks = [data.benchmark_of(name) for task in args.tasks for name in task.split(",")]
    result = self_check(benchmarks, args.level, args.problems)
    print(json.dumps(result, indent=2) if args.json else account(result))
    if not result["ok"]:
        raise SystemExit(1)
