"""Hosts a script in the candidate's process: each call runs it anew, in a process of its own, with a text to read.

`PROGRAM` is the script. What it prints goes to the checker, which alone knows what is right. Nothing here is trusted.
Runs inside the sandbox: standard library only.
"""

import atexit
import os
import sys
import threading
import traceback
import types

STAR_IMPORTS = "string re datetime collections heapq bisect copy math random statistics itertools functools operator io"
STAR_IMPORTS += " sys json builtins typing"
MODULES = "string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys"
MODULES += " json"
"""What LiveCodeBench imports above every program (lcb_runner/evaluation/testing_util.py); answers count on it."""

RECURSION = 50000
"""The limit that it sets."""


def prelude():
    """The import lines above a program."""
    lines = [f"from {name} import *" for name in STAR_IMPORTS.split()] + [f"import {name}" for name in MODULES.split()]
    return "\n".join([*lines, f"sys.setrecursionlimit({RECURSION})\n"])


def run_script(text):
    """Run the script with `text` on its standard input: (what it printed, why it failed or "").

    To leave by `sys.exit` is no failure, whatever the code: so LiveCodeBench has it.
    """
    names = [f"{name}.{os.getpid()}" for name in ("stdin", "stdout", "stderr")]
    with open(names[0], "w+", encoding="utf-8", newline="") as stdin:
        stdin.write(text)
        stdin.flush()
        with open(names[1], "w+b") as stdout, open(names[2], "w+b") as stderr:
            for name in names:
                os.unlink(name)
            pid = os.fork()
            if not pid:
                _become_script(stdin, stdout, stderr)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            stdout.seek(0)
            stderr.seek(0)
            printed, said = (file.read().decode("utf-8", "replace") for file in (stdout, stderr))
    failure = said.strip().rpartition("\n")[2][-300:] or f"exit status {status}"
    return printed, failure if status else ""


def _become_script(stdin, stdout, stderr):
    status = 1
    try:
        for file, fd in ((stdin, 0), (stdout, 1), (stderr, 2)):
            os.dup2(file.fileno(), fd)
        os.lseek(0, 0, os.SEEK_SET)
        sys.stdin = open(0, encoding="utf-8", closefd=False)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
        module = sys.modules["__main__"] = types.ModuleType("__main__")
        module.__file__ = os.path.abspath("program.py")
        exec(prelude(), module.__dict__)
        exec(compile(PROGRAM, module.__file__, "exec", dont_inherit=True), module.__dict__)  # noqa: F821  the host's
        status = 0
    except SystemExit:
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            threading._shutdown()
            atexit._run_exitfuncs()
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stderr.flush()
        os._exit(status)
