"""Answers become the right programs, canonical solutions pass, stubs fail, and pass@k is the textbook number."""

import gzip
import itertools
import json
import os
from pathlib import Path

import lm_eval
import pytest
import yaml
from lm_eval.utils import apply_template

from coda_eval import programs
from coda_eval.data import UNSOLVABLE
from coda_eval.programs import Answer, extract_code, pass_at_k
from coda_eval.sandbox import ISOLATED, Verdict, run_programs

FULL = os.environ.get("CODA_EVAL_FULL")


def test_all_canonical_humaneval_solutions_pass_and_stubs_fail(oracle, evaluate):
    results, samples = evaluate(oracle(), "coda_humaneval")
    assert results["pass@1,run"] == 1.0
    assert len(samples) == 164
    assert results["isolation,run"] in ISOLATED
    stubs, samples = evaluate(oracle(lambda answer: "    pass\n"), "coda_humaneval", limit=8)
    assert stubs["pass@1,run"] == 0.0
    records = [json.loads(sample["filtered_resps"][0][0]) for sample in samples]
    assert {record["status"] for record in records} == {"failed"}
    assert all(record["error"] and record["seconds"] > 0 for record in records)


@pytest.mark.parametrize("form", ["continuation", "whole function", "chat answer"])
def test_instruct_answers_pass_in_every_usual_form(oracle, evaluate, form):
    prompts = {row["canonical_solution"]: row["prompt"] for row in _humaneval()}
    change = {
        "continuation": lambda answer: answer,
        "whole function": lambda answer: "\n" + prompts[answer] + answer,
        "chat answer": lambda answer: f"Sure:\n```python\n{prompts[answer]}{answer}```\nIt works.",
    }[form]
    wanted = {"coda_humaneval_instruct": [0, 1, 10, 32, 38, 50, 115]}  # 32, 38, 50 need the prompt's other functions
    results, _ = evaluate(oracle(change), "coda_humaneval_instruct", samples=wanted)
    assert results["pass@1,run"] == 1.0


def test_ten_answers_to_a_problem_give_pass_at_1_and_at_10(oracle, evaluate):
    number = itertools.count()
    one_in_ten = oracle(lambda answer: answer if next(number) % 10 == 3 else "    pass\n")
    results, samples = evaluate(one_in_ten, "coda_humaneval_10", limit=2)
    assert [len(sample["filtered_resps"][0]) for sample in samples] == [10, 10]
    assert (results["pass@1,run"], results["pass@10,run"]) == (pytest.approx(0.1), 1.0)


def _humaneval() -> list[dict]:
    from coda_eval.data import _packaged_humaneval

    with gzip.open(_packaged_humaneval(), "rt") as lines:
        return [json.loads(line) for line in lines]


def test_extract_code_prefers_the_block_that_defines_the_entry_point():
    text = "First:\n```python\nx = 1\n```\nthen\n```py\ndef f(x):\n    return x\n```\n"
    assert extract_code(text, "f") == "def f(x):\n    return x\n"
    assert extract_code(text, "g") == "x = 1\n"
    assert extract_code("```python\ndef f():\n    return 1", "f") == "def f():\n    return 1"
    assert extract_code("    return x\n", "f") == "    return x\n"


@pytest.mark.parametrize(("indent", "rest"), [("", "```\nAnd:\n```\nf(2)\n```\n"), ("   ", "   ```\n"), ("", "")])
def test_a_block_may_hold_fences_in_its_texts(indent, rest):
    for text in ('"""\n    ```python\n    f(1)\n    ```\n    """', 'T = "```"', "# as in ```x```"):
        code = f"def f(x):\n    {text}\n    return x\n"
        lines = "".join(f"{indent}{line}\n" for line in code.splitlines())
        assert extract_code(f"So:\n\n{indent}```python\n{lines}{rest}", "f").rstrip(" ") == code
    assert extract_code("```\nfor a in\n```\n```\ndef f(x):\n    return x\n```", "g") == "for a in\n"


@pytest.mark.parametrize("names", [("f",), ("g", "f"), ()])
def test_a_block_in_a_list_loses_the_indentation_of_its_fence_alone(names):
    text = "1. So:\n\n   ```python\n   def f(x):\n\n       return (\n  x)\n   ```\n2. Done."
    assert extract_code(text, *names) == "def f(x):\n\n    return (\nx)\n"
    rest = "Body:\n    ```python\n    return f(x)\n    ```\n"
    assert extract_code(rest, "f") == "    return f(x)\n    "


def test_pass_at_k_equals_brute_force():
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)
    with pytest.raises(ValueError, match=r"k must be in \[1, 3\]"):
        pass_at_k(3, 1, 4)


def test_several_answers_are_scored_together_and_padding_is_not(monkeypatch):
    monkeypatch.setenv("CODA_EVAL_WORKERS", "2")
    row = _humaneval()[0]
    doc = {"benchmark": "humaneval", "data_dir": None, "task_id": row["task_id"]}
    surplus = Answer("    pass\n")
    surplus.surplus = True
    records = programs.run([[row["canonical_solution"], "    pass\n", surplus]], [doc])
    assert len(records[0]) == 2
    assert programs.score_programs(doc, records)["pass@1"] == 0.5
    ten = [records[0][:1] + records[0][1:] * 9]
    assert programs.score_programs(doc, ten)["pass@10"] == 1.0


def test_isolation_and_outcomes_of_all_answers_reach_the_results(oracle, evaluate, data_dir, monkeypatch):
    statuses = iter(("passed", "timeout", "memory"))

    def judge(asked, **settings):
        level = "rlimits (not isolated)"
        return [Verdict(status=next(statuses), error="", seconds=0.1, isolation=level) for _ in asked]

    monkeypatch.setattr(programs, "run_programs", judge)
    results, samples = evaluate(oracle(), "coda_humaneval", limit=3)
    assert results["isolation,run"] == "rlimits (not isolated)"
    assert results["outcomes,run"] == "3 programs: 0 failed, 1 memory, 1 passed, 1 timeout"
    assert results["timeouts,run"] == pytest.approx(1 / 3)
    assert [sample["outcomes"] for sample in samples] == [{"passed": 1}, {"timeout": 1}, {"memory": 1}]


def test_bad_number_of_workers_is_an_error(monkeypatch):
    monkeypatch.setenv("CODA_EVAL_WORKERS", "many")
    with pytest.raises(ValueError, match="CODA_EVAL_WORKERS must be a positive number, got 'many'"):
        programs.run([], [])


def test_gaps_compare_stripped_and_raw(oracle, evaluate, data_dir):
    row = {"task_id": "a", "prefix": "x", "middle": "    y = 1\n", "suffix": "z"}
    (data_dir / "quickstart_infill.jsonl").write_text(json.dumps(row))
    exact, _ = evaluate(oracle(), "quickstart_infill")
    stripped, _ = evaluate(oracle(str.strip), "quickstart_infill")
    wrong, _ = evaluate(oracle(lambda answer: "y = 2"), "quickstart_infill")
    scores = [(r["exact_match,compare"], r["exact_match_raw,compare"]) for r in (exact, stripped, wrong)]
    assert scores == [(1.0, 1.0), (1.0, 0.0), (0.0, 0.0)]


def test_own_problem_with_its_own_timeout_runs(oracle, evaluate, data_dir):
    solution = "def add(a, b):\n    return a + b\n"
    row = {"task_id": "q/0", "prompt": "Add.", "entry_point": "add", "test": "assert add(1, 2) == 3"}
    row |= {"canonical_solution": solution, "timeout_s": 1.0}
    (data_dir / "quickstart_problems.jsonl").write_text(json.dumps(row))
    good, _ = evaluate(oracle(lambda answer: f"```python\n{answer}```"), "quickstart_problems")
    assert good["pass@1,run"] == 1.0
    slow, samples = evaluate(oracle(lambda answer: answer + "while True: pass"), "quickstart_problems")
    assert (slow["pass@1,run"], slow["timeouts,run"]) == (0.0, 1.0)
    assert "no verdict after 1 s" in samples[0]["filtered_resps"][0][0]
    assert "assert" not in json.dumps(samples[0]["doc"])


@pytest.mark.parametrize("test", ["def check(f):\n    assert f(1, 2) == 3\n", "assert add(1, 2) == 3"])
def test_an_own_problem_fails_answers_that_do_nothing(test, oracle, evaluate, data_dir):
    row = {"task_id": "q/0", "prompt": "Add.", "entry_point": "add", "test": test}
    row |= {"canonical_solution": "def add(a, b):\n    return a + b\n"}
    (data_dir / "quickstart_problems.jsonl").write_text(json.dumps(row))
    for answer, share in ((row["canonical_solution"], 1.0), ("", 0.0), ("def add(a, b):\n    return 4\n", 0.0)):
        assert evaluate(oracle(lambda _, answer=answer: answer), "quickstart_problems")[0]["pass@1,run"] == share


@pytest.mark.parametrize(
    ("task", "limit"),
    [
        ("coda_humaneval_plus_instruct", 8),
        ("coda_mbpp", 6),
        ("coda_mbpp_instruct", 6),
        ("coda_mbpp_plus_instruct", 4),
        ("coda_humaneval_single_line_infilling", 6),
        ("coda_humaneval_multi_line_infilling", 4),
        ("coda_humaneval_random_span_infilling", 4),
        ("coda_humaneval_random_span_light_infilling", 4),
        ("coda_mbpp_published", 3),
        ("coda_mbpp_plus_published", 3),
        ("coda_humaneval_plus_instruct_published", 2),
    ],
)
def test_canonical_solutions_of_the_shared_sets_pass(oracle, evaluate, coda_shared, monkeypatch, task, limit):
    monkeypatch.setenv("CODA_EVAL_DATA", str(coda_shared / "data"))
    results, samples = evaluate(oracle(), task, limit=None if FULL else limit)
    failed = {s["doc"]["task_id"] for s in samples if json.loads(s["filtered_resps"][0][0])["status"] != "passed"}
    there = {sample["doc"]["task_id"] for sample in samples}
    assert failed == there & set(UNSOLVABLE.get(samples[0]["doc"]["benchmark"], ()))


ADD = {"entry_point": "add3", "timeout_s": 20.0, "canonical_solution": "    return [step(x) for x in xs]\n"}
ADD["prompt"] = "import math\n\ndef step(x):\n    return x + 3\n\ndef add3(xs):\n"
ADD["test"] = "def check(c):\n    assert c([1]) == [4] and c([step(0)]) == [6]\n"
WHOLE = "def add3(xs):\n    return [math.floor(step(x)) for x in xs]\n"


def test_answers_of_every_form_are_judged_as_programs():
    right = {
        "continuation": "    return [x + 3 for x in xs]\n",
        "whole function": WHOLE,
        "with future lines": f"from __future__ import annotations\n{WHOLE}",
        "fenced, with future lines": f'```python\n"""Adds."""\nfrom __future__ import annotations\n{WHOLE}```',
        "future lines below odd white space": f'"""a\u2028b\x0cc"""\nfrom __future__ import annotations\n{WHOLE}',
        "byte order mark": f"\ufeff{WHOLE}",
        "fenced after a byte order mark": f"\ufeff```python\n{WHOLE}```",
        "helper named like the test": WHOLE + "def check(x):\n    return x\n",
    }
    wrong = {
        "identity with a helper to match": "    return xs\ndef step(x):\n    return x\n",
        "nothing defined": "```\nx = 1\n```",
        "cut short": "    return [x +",
    }
    programs_ = [programs.humaneval_program(ADD, answer) for answer in (*right.values(), *wrong.values())]
    verdicts = dict(zip((*right, *wrong), run_programs(programs_), strict=True))
    assert {name: v.error for name, v in verdicts.items() if v.passed != (name in right)} == {}


def test_mbpp_answers_answer_for_the_names_of_the_reference():
    row = {"code": "def sum(a, b):\n    return a + b\n", "test_list": ["assert sum(1, 2) == 3"], "timeout_s": 20.0}
    answers = ["def sum(a, b): return a + b", "def sum(a, b): return 4", "def zip(*a): return []"]
    answers += ["Try:\n```python\nprint(sum(1, 2))\n```\nof\n```python\ndef sum(a, b): return a + b\n```"]
    verdicts = run_programs([programs.mbpp_program(row, answer) for answer in answers])
    assert [verdict.passed for verdict in verdicts] == [True, False, False, True]
    assert "defines no sum" in verdicts[2].error


@pytest.mark.parametrize(("language", "count"), [("py", 1043), ("java", 1780), ("js", 1969)])
def test_santacoder_fim_has_the_published_gaps(oracle, evaluate, coda_shared, monkeypatch, language, count):
    monkeypatch.setenv("CODA_EVAL_DATA", str(coda_shared / "data"))
    results, samples = evaluate(oracle(lambda answer: f"{answer}\n"), f"coda_santacoder_fim_{language}")
    assert len(samples) == count
    found = [results[f"exact_match{name},compare"] for name in ("", "_raw", "_first_line")]
    assert found == [1.0, 0.0, 1.0]


def test_published_prompts_are_those_of_lm_eval(tasks, coda_shared, monkeypatch):
    """Word for word, of the first problems; instructions of MBPP+ have three asserts in the place of one."""
    monkeypatch.setenv("CODA_EVAL_DATA", str(coda_shared / "data"))
    theirs = Path(lm_eval.__file__).parent / "tasks"
    checked = 0
    for ours in ("humaneval", "humaneval_instruct", "humaneval_plus", "mbpp", "mbpp_plus", "mbpp_instruct"):
        path = theirs / ours.partition("_")[0] / f"{ours}.yaml"
        config = yaml.load(path.read_text(), Loader=_Plain)
        while "include" in config:
            base = yaml.load((path.parent / config.pop("include")).read_text(), Loader=_Plain)
            config = {**base, **config}
        (task,) = tasks.load([f"coda_{ours}_published"])["tasks"].values()
        for row in list(task.test_docs())[:3]:
            assert task.doc_to_text(row) == apply_template(config["doc_to_text"], row)
            prefix = config.get("gen_prefix")
            assert (task.doc_to_prefix(row) or "") == (apply_template(prefix, row) if prefix else "")
            checked += 1
    assert checked == 18


class _Plain(yaml.SafeLoader):
    """Reads lm-eval's task files without the functions that they name."""


_Plain.add_multi_constructor("!function", lambda loader, suffix, node: None)
