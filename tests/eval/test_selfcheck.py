"""The self-check is content with the judge, and with no judge that is broken in any of its ways."""

import ast
import json

import pytest

from coda_eval import __main__, data, selfcheck
from coda_eval.sandbox import Verdict, isolation_level
from coda_eval.selfcheck import account, last_result, mutant, self_check
from CoDALanguageModel.errors import UserError

PROBLEM = {
    "prompt": "Add.",
    "entry_point": "add",
    "test": "assert add(1, 2) == 3 and add(0, 5) == 5",
    "canonical_solution": "def add(a, b):\n    return a + b\n",
}


@pytest.fixture
def here(data_dir, tmp_path_factory, monkeypatch):
    """Two problems, few hostile programs, and a place of its own for results."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    rows = [{**PROBLEM, "task_id": f"q/{n}"} for n in range(2)]
    (data_dir / "quickstart_problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, kept in (("HOSTILE", "forged report"), ("CHEATS", "equals everything")):
        monkeypatch.setattr(selfcheck, name, {kept: getattr(selfcheck, name)[kept]})
    return data_dir


def test_the_judge_is_believed_and_remembered(here, monkeypatch, capsys):
    level = isolation_level()
    assert last_result(level) is None
    monkeypatch.setattr("sys.argv", ["coda_eval", "selfcheck", "--tasks", "quickstart_problems"])
    __main__.main()
    assert (
        "references: 2 of 2 passed\nstubs: 0 of 2 passed\nmutants: 0 of 2 passed\nhostile: 1" in capsys.readouterr().out
    )
    result = last_result(level)
    assert (result["ok"], result["level"], result["benchmarks"]) == (True, level, ["quickstart_problems"])
    assert result["references"] == {"total": 2, "passed": 2, "failed": []}
    assert result["hostile"]["total"] == 2 + 14 + 1
    assert last_result("rlimits") is None
    monkeypatch.setattr(selfcheck, "_identity", lambda: {"sandbox": "another"})
    assert last_result(level) is None


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        (
            lambda program: "passed",
            "stubs: 2 of 2 passed\n  survived: quickstart_problems q/0, quickstart_problems q/1",
        ),
        (lambda program: "failed", "references: 0 of 2 passed\n  failed: quickstart_problems q/0"),
        (lambda program: "unjudged", "uncontained: forged report"),
    ],
)
def test_a_judge_that_is_broken_is_not_believed(here, monkeypatch, verdict, said):
    def broken(programs, level="auto", workers=None):
        return [Verdict(status=verdict(p), error="", seconds=0.0, isolation="x") for p in programs]

    monkeypatch.setattr(selfcheck, "run_programs", broken)
    result = self_check(["quickstart_problems"])
    assert result["ok"] is False
    assert said in account(result)
    assert last_result(isolation_level())["ok"] is False
    with pytest.raises(SystemExit) as end:
        selfcheck.main(["--tasks", "quickstart_problems"])
    assert end.value.code == 1


def test_too_many_survivors_among_mutants_are_a_fault(here, monkeypatch):
    rows = [{**PROBLEM, "task_id": f"q/{n}", "test": "assert add(0, 0) in (0, 1)"} for n in range(6)]
    (here / "quickstart_problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = self_check(["quickstart_problems"], count=0)
    assert result["mutants"]["passed"] == result["mutants"]["total"] == 6
    assert (result["ok"], result["references"]["passed"]) == (False, 6)


def test_a_mutant_has_one_small_change_below_its_function():
    program = (
        "K = 1\ndef helper(x):\n    return x < 1\ndef f(a, b=2):\n    '''Doc.'''\n    return a + b > 3 and not a\n"
    )
    seen = {mutant(program, "f", str(seed)) for seed in range(40)}
    lines = ast.unparse(ast.parse(program)).splitlines()
    assert len(seen) == 4
    for text in seen:
        different = [(one, other) for one, other in zip(lines, text.splitlines(), strict=True) if one != other]
        assert len(different) == 1
        assert different[0][0].strip().startswith("return a + b")
    assert mutant(program, "f", "7") == mutant(program, "f", "7")
    assert mutant("def f(x):\n    return x\n", "f", "1") is None


def test_what_has_no_references_is_refused(here):
    with pytest.raises(UserError, match="no reference solutions for quickstart_infill .known: (?!.*livecodebench)"):
        selfcheck.main(["--tasks", "quickstart_infill"])
    with pytest.raises(UserError, match="--problems must be 0 .all. or positive, got -1"):
        selfcheck.main(["--problems", "-1"])
    with pytest.raises(UserError, match="the sandbox level must be auto, .* got 'docker'"):
        self_check(["quickstart_problems"], level="docker")


def test_a_result_that_cannot_be_remembered_is_still_told(here, monkeypatch, capsys, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    selfcheck.main(["--tasks", "quickstart_problems", "quickstart_problems"])
    assert "references: 2 of 2 passed" in capsys.readouterr().out
    assert "the result is not remembered, and score cards will not hold it: " in caplog.text


def test_a_user_without_a_home_has_no_results(here, monkeypatch, caplog):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(selfcheck.Path, "home", no_home)
    assert last_result(isolation_level()) is None
    assert self_check(["quickstart_problems"])["ok"]
    assert "the result is not remembered" in caplog.text


def test_without_a_reference_nothing_is_believed(here, monkeypatch):
    java = {"task_id": "j", "lang": "java", "prompt": "/* TO" + "DO: Your code here */", "ground_truth": ""}
    java |= {"eval_prompt": "{{completion}}", "unit_tests": [{"input": "", "output": [""]}]}
    (here / "block_completion.jsonl").write_text(json.dumps(java))
    result = self_check(["safim_block"])
    assert (result["ok"], result["references"]["total"]) == (False, 0)
    monkeypatch.setattr(selfcheck, "benchmarks_here", lambda folder: [])
    with pytest.raises(UserError, match="no benchmark is on this machine whose references could be run"):
        self_check()


def test_a_reference_that_is_no_program_fails_as_one(here):
    rows = [{**PROBLEM, "task_id": "q/0", "canonical_solution": "def add(:"}]
    (here / "quickstart_problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = self_check(["quickstart_problems"])
    assert (result["ok"], result["references"]["failed"]) == (False, ["quickstart_problems q/0"])
    assert result["mutants"]["total"] == 0


def test_by_default_all_benchmarks_on_this_machine_are_tried(here):
    assert selfcheck.benchmarks_here(str(here)) == ["humaneval", "quickstart_problems"]


def test_a_stub_is_never_what_a_gap_can_hold(data_dir):
    gaps = [("(x", ")", ""), ("x", "", "\n"), ("x  # ", "(", ")"), ("x\n    '''", " (", ")'''")]
    rows = [
        {"task_id": f"SingleLineInfilling/HumanEval/0/L{n}", "prompt": f"def f(x):\n    return {before}"}
        | {"canonical_solution": middle, "suffix": after, "entry_point": "f", "test": "def check(f): assert f(1) == 1"}
        for n, (before, middle, after) in enumerate(gaps)
    ]
    (data_dir / "HumanEval-SingleLineInfilling.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = selfcheck.check_problems(["single_line_infilling"], str(data_dir), isolation_level(), None, 0)
    assert (found["references"]["failed"], found["stubs"]["survivors"]) == ([], [])


@pytest.mark.parametrize(("benchmark", "problem"), [("mbpp_published", 367), ("mbpp_plus_published", 98)])
def test_what_published_asserts_cannot_pass_is_no_fault(coda_shared, monkeypatch, benchmark, problem):
    row = data.rows(benchmark, str(coda_shared / "data"))[problem]
    monkeypatch.setattr(data, "rows", lambda *_: {problem: row})
    found = selfcheck.check_problems([benchmark], "", isolation_level(), None, 0)
    assert (found["references"]["total"], found["stubs"]["total"], found["stubs"]["survivors"]) == (0, 1, [])
    program = selfcheck.PROGRAMS[benchmark](row, selfcheck.reference(benchmark, row))
    assert "NameError" in selfcheck.run_programs([program])[0].error


@pytest.mark.slow
def test_references_of_the_shared_sets_pass_and_most_mutants_fail(coda_shared):
    folder = str(coda_shared / "data")
    found = selfcheck.check_problems(selfcheck.benchmarks_here(folder), folder, isolation_level(), None, 0)
    assert (found["references"]["failed"], found["stubs"]["survivors"]) == ([], [])
    assert found["mutants"]["passed"] < found["mutants"]["total"] / 4
