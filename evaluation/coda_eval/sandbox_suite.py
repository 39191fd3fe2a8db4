"""Judges in the checker's process what `sandbox_unittest.py` says of a program's unit tests.

Runs inside the sandbox: standard library only.
"""

import ast


def names_of(tests):
    """Names of the tests that the class `TestCases` defines."""
    (suite,) = [node for node in ast.parse(tests).body if isinstance(node, ast.ClassDef) and node.name == "TestCases"]
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return sorted({node.name for node in suite.body if isinstance(node, kinds) and node.name.startswith("test")})


def check_suite(run, tests):
    """All tests must have run and passed; with another function in the place of the program's, some must fail."""
    names, wrong = run(tests, False)
    if type(names) is not list or type(wrong) is not list:
        raise AssertionError("the tests gave no result")
    if wrong:
        raise AssertionError("; ".join(f"{name}: {why}" for name, why in wrong)[:1000])
    if missing := set(names_of(tests)) - set(names):
        raise AssertionError(f"did not run: {', '.join(sorted(missing))}")
    if not run(tests, True)[1]:
        raise AssertionError("the tests pass with any function in the place of the program's: nothing is shown")
