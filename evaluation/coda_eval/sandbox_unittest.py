"""Hosts a program and its unit tests together in the candidate's process, since the tests patch the program's names.

`PROGRAM` is the program, `ENTRY_POINT` the function that is tested. Here the tests are in the program's reach, so a
pass is bound as tightly as that allows:

* the program has run before its process gets to know the tests;
* unittest and the builtins must be those from before it ran;
* the same tests must fail with another function in the place of the program's, in the same process;
* the checker, which counts the tests itself, wants each of them to have run and passed.

What remains possible: a result that decides itself what it is equal to; and a program that knows this host and rewrites
the tests or their outcome, in its frames or in memory, as they come. Nothing here is trusted. Runs inside the sandbox:
standard library only.
"""

import builtins
import marshal
import os
import sys
import traceback
import types
import unittest

PIPE_BYTES = 1 << 16
"""What a pipe holds without a reader."""

SHOWN = 50
"""Failures that are told, of at most 300 characters each."""

unittest.case._ShouldStop = ()
"""An exception that ends a test as if it had passed; only failing subtests raise it, here a program could."""

_OWNERS = (builtins, unittest.TestCase, unittest.TestLoader, unittest.TestResult, unittest.TestSuite)
_OWNERS += (unittest.BaseTestSuite, unittest.case, unittest.suite, unittest.loader, unittest.result, marshal)


def _state(owners=_OWNERS):
    return [dict(vars(owner)) for owner in owners]


def _same(before, after):
    """Whether no name was added, removed or bound anew; what warnings leave behind aside."""
    return all(
        old.keys() == new.keys() - {"__warningregistry__"} | old.keys() & {"__warningregistry__"}
        and all(old[name] is new[name] for name in old)
        for old, new in zip(before, after, strict=True)
    )


def _load():
    """Run the program's source as the module that its tests will join."""
    before = _state()
    module = sys.modules["__test__"] = types.ModuleType("__test__")
    module.__dict__.update(__file__="__test__.py", sys=sys, os=os, environ=os.environ)
    exec(compile(PROGRAM, "__test__.py", "exec", dont_inherit=True), module.__dict__)  # noqa: F821  the host's
    names = vars(unittest) if sys.modules.get("unittest") is unittest else {}
    if not _same(before, _state()) or names.get("TestCase") is not _OWNERS[1]:
        raise AssertionError("the program changed unittest or the builtins")
    return module


def _replaced(*positional, **named):
    """Stands in the place of the program's function, where its tests have to fail."""
    return object()


def run_tests(tests, stands_in):
    """Run the tests in a process of their own: ([names that ran], [[name, what was wrong], ...]).

    Args:
        tests: source of the class `TestCases`.
        stands_in: put another function in the place of the program's.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(reader)
            names, wrong = _run(tests, stands_in)
            os.write(writer, marshal.dumps((names, wrong[:SHOWN]))[:PIPE_BYTES])
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    os.set_blocking(reader, False)  # what the tests left running may hold the other end
    try:
        answer = os.read(reader, PIPE_BYTES)
    except BlockingIOError:
        answer = b""
    os.close(reader)
    return marshal.loads(answer) if answer else ([], [["all tests", "their process ended early"]])


def _run(tests, stands_in):
    if stands_in:
        _MODULE.__dict__[ENTRY_POINT] = _replaced  # noqa: F821  the host's
    before = _state(_OWNERS[1:])
    exec(compile(tests, "__test__.py", "exec", dont_inherit=True), _MODULE.__dict__)
    names, result = [], unittest.TestResult()
    suite = unittest.TestLoader().loadTestsFromTestCase(_MODULE.TestCases)
    for test in suite:
        names.append(test.id().rpartition(".")[2])
    suite.run(result)
    wrong = [[test.id().rpartition(".")[2], text.strip().rpartition("\n")[2][:300]] for test, text in result.failures]
    wrong += [[test.id().rpartition(".")[2], text.strip().rpartition("\n")[2][:300]] for test, text in result.errors]
    wrong += [[test.id().rpartition(".")[2], f"skipped: {why}"[:300]] for test, why in result.skipped]
    if result.testsRun != len(names):
        wrong.append(["all tests", f"{result.testsRun} of {len(names)} ran"])
    if not _same(before, _state(_OWNERS[1:])):
        wrong.append(["all tests", "unittest was changed"])
    return names, wrong


_MODULE = _load()
