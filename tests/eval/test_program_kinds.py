"""Scripts, unit tests and predicted values are judged rightly, and what they are judged by stays out of reach."""

import itertools
import json

import pytest
from lm_eval import simple_evaluate

from coda_eval import programs
from coda_eval.data import SAFIM_WORDS
from coda_eval.programs import same_syntax, script_program, unittest_program
from coda_eval.sandbox import LEVELS, run_programs
from coda_eval.sandbox_outputs import same_output
from CoDALanguageModel.errors import UserError

ADDS = "a, b = map(int, input().split())\nprint(a + b)\n"
CASES = [("3 4\n", ["7"]), ("1 1\n", ["3", "2 "])]


def works(level):
    from coda_eval.sandbox import isolation_level

    try:
        return isolation_level(level) == level
    except UserError:
        return False


AVAILABLE = [level for level in LEVELS if works(level)]

SCRIPTS = {
    "reads and prints": (ADDS, "passed"),
    "main block": (
        "import sys\ndef main():\n    print(sum(map(int, sys.stdin.buffer.read().split())))\n"
        "if __name__ == '__main__': main()",
        "passed",
    ),
    "leaves by sys.exit": (f"{ADDS}exit(3)", "passed"),
    "counts on the imports": ("a, b = map(int, input().split())\nprint(floor(a + b + 0.5))", "passed"),
    "thread at its end": (
        f"import threading\ndef f():\n    {ADDS.strip().replace(chr(10), '; ')}\nthreading.Thread(target=f).start()",
        "passed",
    ),
    "descriptors": ("import os\nos.write(1, str(sum(map(int, open(0).read().split()))).encode())", "passed"),
    "prints at exit": (
        f"import atexit\natexit.register(lambda: print(x))\n{ADDS.replace('print(a + b)', 'x = a + b')}",
        "passed",
    ),
    "spells a number otherwise": ("print(f'{sum(map(int, input().split()))}.0\\n')", "passed"),
    "right once": ("print(7)", "failed"),
    "prints more": (f"{ADDS}print()\nprint(1)", "failed"),
    "raises at its end": (f"{ADDS}1 / 0", "failed"),
    "dies at its end": (f"{ADDS}import os, sys\nsys.stdout.flush()\nos._exit(2)", "failed"),
    "no program": ("print(", "failed"),
    "remembers in its process": (
        f"import builtins\nassert not hasattr(builtins, 'seen')\nbuiltins.seen = 1\n{ADDS}",
        "passed",
    ),
    "never ends": ("while True: pass", "timeout"),
    "too much memory": ("x = bytearray(1 << 40)", "memory"),
    "looks for the outputs": (
        "import gc, sys\nframe = sys._getframe()\nwhile frame:\n"
        "    for space in (frame.f_locals, frame.f_globals):\n        assert 'cases' not in space\n"
        f"    frame = frame.f_back\n{ADDS}",
        "passed",
    ),
    "changes its host": (
        "import sys\nfor module in list(sys.modules.values()):\n"
        "    if hasattr(module, 'run_script'): module.run_script = lambda text: ('7', '')\nprint(0)",
        "failed",
    ),
}


@pytest.mark.parametrize("level", AVAILABLE)
def test_scripts_are_judged_by_what_they_print(level):
    asked = [script_program(code, CASES, 2.0 if name == "never ends" else 10.0) for name, (code, _) in SCRIPTS.items()]
    verdicts = dict(zip(SCRIPTS, run_programs(asked, level=level), strict=True))
    expected = {name: status for name, (_, status) in SCRIPTS.items()}
    assert {name: verdict.status for name, verdict in verdicts.items()} == expected, verdicts
    assert "ZeroDivisionError" in verdicts["raises at its end"].error
    assert "test 2 of 2: wrong output" in verdicts["right once"].error


@pytest.mark.parametrize(
    ("made", "wanted", "same"),
    [
        ("1 2\n", "1 2", True),
        ("  1 2  \n3\n\n", "1 2\n3", True),
        ("1.0 2e0", "1 2", True),
        ("1  2", "1 2", True),
        ("a  b", "a b", False),
        ("50000000000000000", "50000000000000001", False),
        ("YES", "yes", False),
        ("1\n2", "1 2", False),
        ("", "", True),
        ("nan", "nan ", True),
        ("1 a", "1.0 a", False),
    ],
)
def test_outputs_compare_as_livecodebench_does(made, wanted, same):
    assert same_output(made, wanted) is same


TESTS = """import unittest
from unittest.mock import patch
class TestCases(unittest.TestCase):
    def setUp(self):
        self.two = 2
    def test_value(self):
        self.assertEqual(task_func(self.two), 4)
    @patch("builtins.print")
    def test_error(self, printed):
        self.assertRaises(TypeError, task_func)
    def test_helper(self):
        with patch("__test__.helper", return_value=9):
            self.assertEqual(task_func(2), 9)
"""
SUITE = {"complete_prompt": "import os\ndef helper(x):\n    return x * 2\ndef task_func(x):\n    '''Double.'''\n"}
SUITE |= {"entry_point": "task_func", "test": TESTS, "timeout_s": 20.0}
BELOW = "    return 0\nimport unittest, unittest.suite\n"
SUITES = {
    "continuation": ("    return helper(x)\n", True),
    "whole functions": (
        "```python\ndef helper(x):\n    return x + x\ndef task_func(x):\n    return helper(x)\n```",
        True,
    ),
    "wrong": ("    return 4\n", False),
    "nothing": ("    pass", False),
    "no program": ("    return (", False),
    "patches the assertions": (f"{BELOW}unittest.TestCase.assertEqual = lambda *a: None", False),
    "patches them late": (
        "    import unittest\n    unittest.TestCase.assertEqual = lambda *a: None\n    return 0",
        False,
    ),
    "patches the builtins": (f"{BELOW}import builtins\nbuiltins.isinstance = lambda *a: True", False),
    "patches the runner": (f"{BELOW}unittest.suite.TestSuite.run = lambda suite, result: result", False),
    "patches the loader": (
        f"{BELOW}unittest.TestLoader.loadTestsFromTestCase = lambda *a: unittest.TestSuite()",
        False,
    ),
    "skips": ("    import unittest\n    raise unittest.SkipTest('no')", False),
    "stops its tests": ("    import unittest.case\n    raise unittest.case._ShouldStop", False),
    "puts its own class of tests": (
        f"{BELOW}class Fake(unittest.TestCase):\n    def assertEqual(self, a, b):\n        assert a == 0\n"
        "    def assertRaises(self, *a): pass\nunittest.TestCase = Fake",
        False,
    ),
    "puts its own unittest": (
        f"{BELOW}import sys, types, unittest.mock\nfake = types.ModuleType('unittest')\n"
        "fake.__dict__.update(vars(unittest))\nclass Fake(unittest.TestCase):\n"
        "    def assertEqual(self, a, b):\n        assert a == 0\n    def assertRaises(self, *a): pass\n"
        "fake.TestCase = Fake\nsys.modules['unittest'] = fake\ndef helper(x): return 0\n"
        "def task_func(x): return 0",
        False,
    ),
    "dies": ("    import os\n    os._exit(0)", False),
    "leaves": ("    import sys\n    sys.exit(0)", False),
    "leaves a process behind": (
        "    import os\n    if os.fork() == 0:\n        import time\n        time.sleep(60)\n    return helper(x)\n",
        True,
    ),
    "dies before its tests": ("    return 4\nimport os\nos._exit(0)", False),
}


@pytest.mark.parametrize("level", AVAILABLE[:1])
def test_unit_tests_bind_what_runs_beside_them(level):
    asked = [unittest_program(SUITE, answer) for answer, _ in SUITES.values()]
    verdicts = dict(zip(SUITES, run_programs(asked, level=level), strict=True))
    assert {name: v for name, v in verdicts.items() if v.passed != SUITES[name][1]} == {}


def test_unit_tests_that_any_function_passes_show_nothing():
    row = {**SUITE, "test": "import unittest\nclass TestCases(unittest.TestCase):\n    def test(self): task_func(1)\n"}
    (verdict,) = run_programs([unittest_program(row, "    return helper(x)\n")])
    assert "the tests pass with any function" in verdict.error


CRUX = {"code": "def f(x):\n    return [x, x == 1]", "input": "'=='", "output": "['==', False]", "timeout_s": 10.0}
OUTPUTS = {" ['==', False]": True, "['=' * 2, 0]": True, " ['==', True]": False, "f('==')": False, "f ('==')": False}
OUTPUTS |= {"```python\nassert f('==') == ['==', False]\n```": True, "(": False, "x = 1": False, "": False}
INPUTS = {"'==')": True, "f('==')": True, "x='==')": True, "assert ['==', False] == f('==')": True, "1)": False}
INPUTS |= {"1) or ['==', False]": False, "__import__('os')._exit(0))": False, "*['=='])": True, "": False}
OUTPUTS |= {"1+" * 2000 + "1": False, "f" + "()" * 900: False}
INPUTS |= {"1+" * 2000 + "1)": False}
INPUTS |= {"[f := lambda x: ['==', False]][0]('a')": False}


def test_predicted_values_are_compared_where_the_answer_does_not_reach():
    asked = [programs.cruxeval_output_program(CRUX, answer) for answer in OUTPUTS]
    asked += [programs.cruxeval_input_program(CRUX, answer) for answer in INPUTS]
    passed = [verdict.passed for verdict in run_programs(asked)]
    assert passed == [*OUTPUTS.values(), *INPUTS.values()]


def test_methods_of_livecodebench_are_called_with_json_values():
    case = {"input": '[1, 2]\n"a"', "output": '[[1, 2], "a"]', "testtype": "functional"}
    row = {"metadata": '{"func_name": "pair"}', "public_test_cases": json.dumps([case]), "timeout_s": 10.0}
    row["private_test_cases"] = "[]"
    answers = {
        "class Solution:\n    def pair(self, x: List[int], y: str): return x, y": True,
        "```\nclass Solution:\n    def pair(self, x, y): return [x, 'b']\n```": False,
        "def pair(x, y): return [x, y]": True,
        "class Solution: pass": False,
    }
    verdicts = run_programs([programs.livecodebench_program(row, answer) for answer in answers])
    assert [verdict.passed for verdict in verdicts] == list(answers.values()), verdicts


def test_syntax_compares_as_safim_does():
    for answer, truth, language, same in (
        ("np.ones((n,  n))\n", "np.ones((n,n))", "python", True),
        ("f(b=1, a=2)", "f(a=2, b=1)", "python", True),
        ("f(1, 2)", "f(2, 1)", "python", False),
        ("f(b=1, a=2)", "f(a=2, b=1)", "java", False),
        ("x", "y", "python", False),
    ):
        assert same_syntax(answer, truth, language) is same


TASK_ROWS = {
    "coda_safim_block": (
        "block_completion.jsonl",
        {
            "task_id": "s/1",
            "lang": "python",
            "prompt": f"Add.\n\na, b = map(int, input().split())\n# {SAFIM_WORDS}\n",
            "eval_prompt": "a, b = map(int, input().split())\n{{completion}}\n",
            "ground_truth": "print(a + b)",
            "unit_tests": json.dumps([{"input": "1 2", "output": ["3"]}]),
        },
    ),
    "coda_cruxeval_output": ("cruxeval.jsonl", {**CRUX, "id": "sample_0"}),
    "coda_cruxeval_input": ("cruxeval.jsonl", {**CRUX, "id": "sample_0"}),
    "coda_bigcodebench": (
        "BigCodeBench.jsonl",
        {
            **SUITE,
            "task_id": "BigCodeBench/0",
            "instruct_prompt": "Double.",
            "code_prompt": "def task_func(x):\n",
            "canonical_solution": "    return helper(x)\n",
        },
    ),
}


@pytest.mark.parametrize("task", TASK_ROWS)
def test_tasks_of_local_files_score_right_and_wrong_answers(task, oracle, evaluate, data_dir):
    name, row = TASK_ROWS[task]
    (data_dir / name).write_text(json.dumps(row))
    right = {"coda_cruxeval_output": row.get("output"), "coda_cruxeval_input": f"{row.get('input')})"}.get(task)
    for change, score in ((lambda answer: right or answer, 1.0), (lambda answer: "pass", 0.0)):
        results, samples = evaluate(oracle(change), task)
        assert results["pass@1,run"] == score
    assert "unit_tests" not in json.dumps(samples[0]["doc"])


def test_livecodebench_asks_for_scripts_and_for_methods_and_judges_both(oracle, evaluate, data_dir):
    case = {"input": "1 2", "output": "3", "testtype": "stdin"}
    script = {"question_id": "a", "question_content": "Add.", "starter_code": "", "metadata": "{}"}
    script |= {"public_test_cases": json.dumps([case]), "private_test_cases": json.dumps([{**case, "input": "0 3"}])}
    call = {**case, "input": "1\n2", "testtype": "functional"}
    method = {**script, "question_id": "b", "starter_code": "class Solution:\n    def add(self, a, b):\n"}
    method |= {"public_test_cases": json.dumps([call]), "private_test_cases": "[]", "metadata": '{"func_name": "add"}'}
    (data_dir / "livecodebench.jsonl").write_text(f"{json.dumps(script)}\n{json.dumps(method)}")

    class Says(oracle):
        def generate_until(self, requests, disable_tqdm=False):
            """One answer for both problems."""
            return [self.change("")] * len(requests)

    both = "class Solution:\n    def add(self, a, b): return a + b\n"
    both += f"if __name__ == '__main__':\n    {ADDS.strip().replace(chr(10), '; ')}\n"
    results, samples = evaluate(Says(lambda _: both), "coda_livecodebench_instruct")
    assert results["pass@1,run"] == 1.0
    prompts = [sample["arguments"][0][0] for sample in samples]
    assert "reads from standard input" in prompts[0]
    assert "Complete this class" in prompts[1]
    assert not any("testtype" in json.dumps(sample["doc"]) for sample in samples)
    assert evaluate(Says(lambda _: ADDS), "coda_livecodebench_instruct")[0]["pass@1,run"] == 0.5


def test_safim_without_tests_and_santacoder_count_matches(oracle, evaluate, tasks, data_dir):
    row = {
        "task_id": "a",
        "lang": "python",
        "prompt": f"x = # {SAFIM_WORDS}",
        "eval_prompt": "x = {{completion}}",
    }
    (data_dir / "api_completion.jsonl").write_text(json.dumps({**row, "ground_truth": "f(a=1, b=2)"}))
    for answer, score in (("f(b=2, a=1)", 1.0), ("f(1, 2)", 0.0)):
        assert evaluate(oracle(lambda _, a=answer: a), "coda_safim_api")[0]["syntax_match,compare"] == score
    row = {"name": "a", "language": "py", "prompt": "def f():", "suffix": "", "canonical_solution": "    return 1"}
    rows = [{**row, "language": language} for language in ("py", "java", "js")]
    (data_dir / "santacoder_fim.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for answer, scores in (("    return 1", (1, 1, 1)), ("\nreturn 1 \nmore", (0, 0, 1)), ("return 2", (0, 0, 0))):
        results, _ = evaluate(oracle(lambda _, a=answer: a), "coda_santacoder_fim_py")
        found = [results[f"exact_match{name},compare"] for name in ("", "_raw", "_first_line")]
        assert found == list(map(float, scores))
    number = itertools.count()
    one_of_three = oracle(lambda answer: answer if next(number) == 1 else f"{answer.lstrip()}\nmore")
    output = simple_evaluate(one_of_three, tasks=["coda_santacoder_fim"], task_manager=tasks, bootstrap_iters=0)
    group = output["results"]["coda_santacoder_fim"]
    assert (group["exact_match,compare"], group["exact_match_first_line,compare"]) == (pytest.approx(1 / 3), 1.0)
