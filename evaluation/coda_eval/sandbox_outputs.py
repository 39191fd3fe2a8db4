"""Compares in the checker's process what a program printed or gave with what is right, as LiveCodeBench does.

Source of the rules: https://github.com/LiveCodeBench/LiveCodeBench, lcb_runner/evaluation/testing_util.py. Runs inside
the sandbox: standard library only.
"""

from decimal import Decimal, InvalidOperation


def _lines(text):
    return [line.strip() for line in text.strip().split("\n")]


def _numbers(line):
    try:
        return [Decimal(word) for word in line.split()]
    except InvalidOperation:
        return None


def same_output(made, wanted):
    """Whether two texts have the same lines, white space at their ends and the spelling of numbers aside."""
    made, wanted = _lines(made), _lines(wanted)
    return len(made) == len(wanted) and all(
        one == other or ((found := _numbers(one)) is not None and found == _numbers(other))
        for one, other in zip(made, wanted, strict=True)
    )


def check_script(run, cases):
    """Run a script on the text of each case; what it prints must be one of the case's outputs."""
    for number, (text, outputs) in enumerate(cases, 1):
        printed, failure = run(text)
        if failure:
            if failure.startswith("MemoryError"):
                raise MemoryError
            raise AssertionError(f"test {number} of {len(cases)}: {failure}")
        if type(printed) is not str or not any(same_output(printed, output) for output in outputs):
            raise AssertionError(f"test {number} of {len(cases)}: wrong output")


def check_calls(function, cases):
    """Call a function with the arguments of each case; a tuple is as good as the list that is wanted."""
    for number, (arguments, wanted) in enumerate(cases, 1):
        made = function(*arguments)
        if (list(made) if type(made) is tuple else made) != wanted:
            raise AssertionError(f"test {number} of {len(cases)}: wrong result")
