"""Programs are judged rightly and contained at every isolation level that this machine offers."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from coda_eval import sandbox, sandbox_watch
from coda_eval.hostile import CHEATS, HOSTILE, MARK, TESTS, reaching
from coda_eval.sandbox import LEVELS, Bench, Limits, Program, isolation_level, run_programs


def works(level: str) -> bool:
    try:
        return isolation_level(level) == level
    except ValueError:
        return False


AVAILABLE = [level for level in LEVELS if works(level)]
ISOLATED = [level for level in AVAILABLE if level in sandbox.ISOLATED]


def leftovers(evaluator: int | None = None) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            ours = f"CODA_EVAL_PID={evaluator or os.getpid()}\0".encode() in (entry / "environ").read_bytes()
            if (ours or MARK.encode() in (entry / "cmdline").read_bytes()) and state not in "ZX":
                found.append(entry.name)
        except OSError:
            continue
    return found


GOOD = Program(candidate="def f(x): return x * 2", tests=TESTS)


@pytest.fixture(scope="module", params=AVAILABLE)
def mixed(request, tmp_path_factory):
    """Every hostile program and every cheat, each with a good one behind it, in one run."""
    folder, level = tmp_path_factory.mktemp("scratch"), request.param
    programs = [
        Program(candidate=code, tests=TESTS, timeout_s=0.5 if status in ("timeout", None) else 1.5)
        for code, status in HOSTILE.values()
    ] + [
        Program(candidate=code, tests=tests, setup="def helper(x): return 4", called=("f",), timeout_s=3)
        for code, tests in CHEATS.values()
    ]
    before = segments()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox.tempfile, "tempdir", str(folder))
        patch.setattr(sandbox.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
        verdicts = run_programs([p for program in programs for p in (program, GOOD)], level=level, workers=3)
    left = {"files": list(folder.iterdir()), "segments": segments() - before}
    deadline = time.monotonic() + 2
    while (processes := leftovers()) and time.monotonic() < deadline:
        time.sleep(0.05)  # the kernel ends the processes of a PID namespace after its first one
    return level, dict(zip([*HOSTILE, *CHEATS], verdicts[::2], strict=True)), verdicts[1::2], left, processes


def segments() -> set[str]:
    lines = Path("/proc/sysvipc/shm").read_text().splitlines()[1:] if Path("/proc/sysvipc/shm").exists() else []
    return {line.split()[1] for line in lines} | {path.name for path in Path("/dev/shm").iterdir()}


def test_hostile_programs_and_cheats_fail(mixed):
    level, verdicts, _, _, _ = mixed
    assert {name for name, verdict in verdicts.items() if verdict.passed} == set()
    assert {verdict.isolation for verdict in verdicts.values()} == {sandbox.isolation_label(level)}
    expected = {name: status for name, (_, status) in HOSTILE.items() if status}
    assert {name: verdicts[name].status for name in expected} == expected
    assert "unjudged" not in {verdict.status for verdict in verdicts.values()}


def test_programs_beside_hostile_ones_pass(mixed):
    assert [verdict.error for verdict in mixed[2] if not verdict.passed] == []


def test_hostile_programs_leave_nothing_behind(mixed):
    _, _, _, left, processes = mixed
    assert left == {"files": [], "segments": set()}
    assert processes == []


RIGHT = {
    "helper named like one of the tests": (
        "def check(x): return x\ndef is_floats(x): return 1\ndef f(x): return check(x) * 2",
        "def is_floats(x): return False\ndef check(c):\n    assert not is_floats(1)\n    assert c(2) == 4\ncheck(f)",
    ),
    "function named like a builtin": ("def sum(x): return x * 2", "assert sum(2) == 4"),
    "sorts in place": (
        "def f(x): x.sort()",
        "v = [3, [1], 2]\nv = [3, 1, 2]\nassert f(v) is None\nassert v == [1, 2, 3]",
    ),
    "fills a dictionary and a set": (
        "def f(d, s):\n    d['k'].append(1)\n    s.add(2)",
        "d, s = {'k': []}, set()\ninner = d['k']\nf(d, s)\nassert d == {'k': [1]} and inner == [1] and s == {2}",
    ),
    "changes what it was given by name, and in a tuple": (
        "def f(a, *, b):\n    a[0].append(1)\n    b['k'] = a[1]",
        "a, b = ([], 2), {}\nf(a, b=b)\nassert a == ([1], 2) and b == {'k': 2}",
    ),
    "leaves an object of its own in a list": (
        "class N: v = 4\ndef f(x): x.append(N())",
        "x = [1]\nf(x)\nassert len(x) == 2 and x[0] == 1 and x[1].v == 4",
    ),
    "generator": (
        "def f(n):\n    i = 0\n    while True:\n        yield i\n        i += 1",
        "g = f(3)\nassert next(g) == 0\nimport itertools\nassert list(itertools.islice(g, 3)) == [1, 2, 3]",
    ),
    "finite iterators": (
        "def f(x): return map(str, x)",
        "assert list(f([1, 2])) == ['1', '2']\nassert sorted(f([2, 1])) == ['1', '2']",
    ),
    "closure": ("def f(x):\n    return lambda y: x + y", "assert f(2)(3) == 5"),
    "class": (
        "class Node:\n    def __init__(self, v): self.v, self.left = v, None\n"
        "    def depth(self): return 1 + (self.left.depth() if self.left else 0)\n"
        "def f(node): return node.depth()",
        "root = Node(1)\nroot.left = Node(2)\nroot.left.left = Node(3)\n"
        "assert f(root) == 3 and root.left.v == 2 and root.depth() == 3\n"
        "assert isinstance(root, Node) and not isinstance(3, Node) and root != Node(1)",
    ),
    "class with equality and order": (
        "import functools\n@functools.total_ordering\nclass P:\n    def __init__(self, x): self.x = x\n"
        "    def __eq__(self, o): return self.x == o.x\n    def __lt__(self, o): return self.x < o.x\n"
        "    def __repr__(self): return f'P({self.x})'\n"
        "    def __len__(self): return 7\n    def __getitem__(self, i): return i * self.x",
        "assert P(1) == P(1) and P(1) < P(2) and max([P(1), P(3), P(2)]) == P(3)\n"
        "assert repr(P(1)) == 'P(1)' and len(P(1)) == 7 and P(2)[3] == 6",
    ),
    "raises": (
        "def f(x):\n    if x < 0: raise ValueError('negative')\n    class Own(KeyError): pass\n    raise Own('k')",
        "try:\n    f(-1)\n    raise AssertionError\nexcept ValueError as e:\n    assert str(e) == 'negative'\n"
        "try:\n    f(1)\n    raise AssertionError\nexcept KeyError: pass",
    ),
    "raises what any of the machinery could": (
        "import builtins\ndef f(name): raise getattr(builtins, name)('text')",
        "for kind in (IndexError, KeyError, AttributeError, TypeError, ValueError, OSError, BrokenPipeError,\n"
        "             EOFError, StopIteration, RecursionError, NotImplementedError, UnicodeError, MemoryError):\n"
        "    try:\n        f(kind.__name__)\n        raise SystemExit('nothing was raised')\n"
        "    except kind as e:\n        assert type(e).__name__ == kind.__name__ and 'text' in str(e)",
    ),
    "function as an argument": (
        "def f(g, xs): return [g(x) for x in xs]",
        "assert f(lambda x: x + 1, [1, 2]) == [2, 3]\nassert f(str, [1]) == ['1']\n"
        "import math\nassert f(math.sqrt, [4]) == [2.0]",
    ),
    "function as an argument that asks the program": (
        "class P:\n    def __init__(self, x): self.x = x\n"
        "def f(g):\n    kept = {}\n    def h(n):\n        if n not in kept: kept[n] = g(n)\n        return kept[n]\n"
        "    return h\ndef order(ps, key): return sorted(ps, key=key)",
        "@f\ndef fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)\nassert fib(40) == 102334155\n"
        "assert [p.x for p in order([P(3), P(1), P(2)], key=lambda p: p.x)] == [1, 2, 3]",
    ),
    "function as an argument that changes what it is given": (
        "def f(g, x, *, k):\n    g(x, k=k)\n    return x, k",
        "def g(x, k):\n    x.append(3)\n    k.add(4)\nx = [1]\n"
        "assert f(g, x, k={2}) == ([1, 3], {2, 4}) and x == [1, 3]",
    ),
    "function as an argument that fails": (
        "def f(g):\n    try: g()\n    except ValueError as e: return e.args",
        "def g(): raise ValueError('a', 2)\nassert f(g) == ('a', 2)",
    ),
    "function as an argument in threads": (
        "from concurrent.futures import ThreadPoolExecutor\ndef f(g, xs):\n"
        "    with ThreadPoolExecutor(8) as p: return list(p.map(g, xs))",
        "xs = list(range(200))\nassert f(lambda x: [x] * x, xs) == [[x] * x for x in xs]",
    ),
    "named arguments": ("def f(a, *, b=1): return a - b", "assert f(5, b=3) == 2 and f(a=5) == 4"),
    "what exceptions are made of": (
        "def f(x):\n    if x == 1: return {}['k']\n    if x == 2: raise ValueError('bad', 3)\n"
        "    if x == 3: raise ValueError\n    if x == 4: open('/nowhere')\n    if x == 5: b'\\xff'.decode()\n"
        "    class E(LookupError):\n        def __str__(self): return 'said'\n    raise E(object())",
        "def of(x):\n    try:\n        f(x)\n    except Exception as e:\n        return e\n"
        "assert [(type(e), str(e), e.args) for e in map(of, (1, 2, 3))] == [\n"
        "    (KeyError, \"'k'\", ('k',)), (ValueError, \"('bad', 3)\", ('bad', 3)), (ValueError, '', ())]\n"
        "assert isinstance(of(4), FileNotFoundError) and (of(4).errno, of(4).filename) == (2, '/nowhere')\n"
        "assert isinstance(of(5), UnicodeDecodeError) and of(5).object == b'\\xff'\n"
        "assert isinstance(of(6), LookupError) and str(of(6)) == 'said'",
    ),
    "values that change between two looks": (
        "n, log = 0, []\ndef f(x):\n    global n\n    n += x\n    log.append(x)",
        "assert n == 0 and log == []\nf(2)\nassert n == 2 and log == [2]\nf(3)\nassert n == 5 and log == [2, 3]",
    ),
    "objects in sets": (
        "import dataclasses\n@dataclasses.dataclass(frozen=True)\nclass P:\n    x: int\n"
        "def f(n): return {P(i) for i in range(n)}",
        "assert f(2) == {P(1), P(0)} and {P(1): 3}[P(1)] == 3 and P(2) not in f(2) and hash(P(1)) == hash(P(1))",
    ),
    "objects without a hash": (
        "class P: __hash__ = None\ndef f(): return P()",
        "try: {f()}\nexcept TypeError: pass\nelse: raise SystemExit",
    ),
    "what objects can do": (
        "class Bag:\n    def __len__(self): return 3\n    def __delitem__(self, x): self.gone = x\n"
        "def f(n): return [object(), Bag(), iter([n]), range, lambda: 0][n]\n"
        "from typing import Generic, TypeVar\nT = TypeVar('T')\nclass G(Generic[T]): x = 4",
        "from collections.abc import Callable, Iterable, Iterator, Sized\n"
        "kinds = (Callable, Iterable, Iterator, Sized)\n"
        "found = [[kind.__name__ for kind in kinds if isinstance(f(n), kind)] for n in range(5)]\n"
        "assert found == [[], ['Sized'], ['Iterable', 'Iterator'], ['Callable'], ['Callable']], found\n"
        "bag = f(1)\ndel bag[7]\nassert len(bag) == 3 and bag.gone == 7 and not callable(bag)\n"
        "assert G[int]().x == 4",
    ),
    "named tuple that goes and comes": (
        "import collections, typing\nP = collections.namedtuple('P', 'x y')\n"
        "class Q(typing.NamedTuple):\n    x: int\n    def twice(self): return self.x * 2\n"
        "def f(p): return p.x if isinstance(p, P) else p.twice()",
        "assert f(P(2, 1)) == 2 and f(Q(3)) == 6 and P(x=1, y=2).y == 2 and P(1, 2)._asdict() == {'x': 1, 'y': 2}\n"
        "assert repr(P(1, 2)) == 'P(x=1, y=2)' and P(1, 2) == (1, 2)",
    ),
    "named tuple and subclass": (
        "from collections import namedtuple\nimport enum\nT = namedtuple('T', 'a b')\nclass C(enum.IntEnum):\n"
        "    R = 1\n"
        "def f(): return T(1, 2), C.R",
        "assert f() == ((1, 2), 1)",
    ),
    "recursion": ("def f(n): return 0 if n == 0 else 1 + f(n - 1)", "assert f(900) == 900"),
    "main module": (
        "import __main__, sys\ndef f(x): return __main__.g(x) + len(sys.modules['__main__'].__name__) * 0\n"
        "def g(x): return x * 2",
        TESTS,
    ),
    "file name": ("import os\nos.path.dirname(os.path.abspath(__file__))\ndef f(x): return 4", TESTS),
    "exit exists": ("def f(x):\n    if x == 3: exit()\n    return 4", TESTS),
    "time zones": ("import zoneinfo\ndef f(x): return 4 if zoneinfo.ZoneInfo('Europe/Paris').key else 0", TESTS),
    "doctest": (
        "def f(x):\n    '''\n    >>> f(2)\n    4\n    '''\n    return 4\nimport doctest\n"
        "assert doctest.testmod().attempted == 1",
        TESTS,
    ),
    "unittest": (
        "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(f(2), 4)\n"
        "def f(x): return 4\n"
        "assert unittest.main(argv=['x'], exit=False).result.testsRun == 1",
        TESTS,
    ),
    "byte order mark": ("\ufeffdef f(x): return 4", TESTS),
    "main block": ("def f(x): return 4\nif __name__ == '__main__': input()", TESTS),
    "source of itself": ("import inspect\ndef f(x): return 4 if 'return 4' in inspect.getsource(f) else 5", TESTS),
    "future": ("from __future__ import annotations\ndef f(x: Unknown) -> Unknown: return 4", TESTS),
    "child that runs on": ("import os\nif os.fork() == 0: pass\nelse: os.wait()\ndef f(x): return 4", TESTS),
    "async": (
        "import asyncio\nasync def g(x):\n    await asyncio.sleep(0)\n    return x * 2\n"
        "def f(x): return asyncio.run(g(x))",
        TESTS,
    ),
    "docstring": (
        "def f(x):\n    'Twice.'\n    return x * 2",
        "assert (f.__doc__, f.__module__) == ('Twice.', 'candidate')",
    ),
    "names of a test's function": (
        "import functools\ndef f(g):\n    @functools.wraps(g)\n    def h(x): return g(x) * 2\n    return h",
        "@f\ndef g(x):\n    'Same.'\n    return x\nassert (g(2), g.__name__, g.__doc__) == (4, 'g', 'Same.')",
    ),
    "exceptions of the library": (
        "import dataclasses, decimal, json\n@dataclasses.dataclass(frozen=True)\nclass P: x: int\n"
        "def f(kind): return json.loads('{') if kind == 'json' else decimal.Decimal('x')",
        "import json\nfrom dataclasses import FrozenInstanceError\nfrom decimal import InvalidOperation\n"
        "try:\n    f('json'); assert False\nexcept json.JSONDecodeError as e: assert (e.doc, e.pos) == ('{', 1)\n"
        "try:\n    f('decimal'); assert False\nexcept InvalidOperation: pass\n"
        "try:\n    P(1).x = 2; assert False\nexcept FrozenInstanceError: pass",
    ),
    "its own exception of a known name": (
        "class Empty(Exception): pass\ndef f(x): raise Empty('none')",
        "import queue\ntry:\n    f(1); found = None\nexcept queue.Empty: found = 'queue'\n"
        "except Exception as e: found = str(e)\nassert found == 'none'",
    ),
    "threads of the tests": (
        "class C:\n    n = 0\n    def more(self):\n        self.n += 1\n        return self.n\n",
        "import threading\nc = C()\nthreads = [threading.Thread(target=c.more) for _ in range(8)]\n"
        "for t in threads: t.start()\nfor t in threads: t.join()\nassert c.n == 8",
    ),
    "pool": (
        "from concurrent.futures import ThreadPoolExecutor\ndef f(x):\n"
        "    with ThreadPoolExecutor(2) as p: return sum(p.map(int, [x, x]))",
        TESTS,
    ),
}


@pytest.mark.parametrize("level", AVAILABLE)
def test_right_programs_pass(level):
    called = {"function named like a builtin": ("sum",)}
    programs = [
        Program(candidate=code, tests=tests, called=called.get(name, ("f",)), timeout_s=20)
        for name, (code, tests) in RIGHT.items()
    ]
    verdicts = dict(zip(RIGHT, run_programs(programs, level=level), strict=True))
    assert {name: verdict for name, verdict in verdicts.items() if not verdict.passed} == {}


@pytest.mark.parametrize("level", AVAILABLE)
def test_fork_bomb_is_contained_beside_an_honest_program(level):
    bomb = Program(candidate="import os\nwhile True:\n    os.fork()", tests=TESTS, timeout_s=2)
    honest = Program(candidate="def f(x): return x * 2", tests=TESTS)
    verdicts = run_programs([bomb, honest, bomb, honest], level=level, workers=2)
    assert [verdict.passed for verdict in verdicts] == [False, True, False, True]


@pytest.mark.parametrize("level", AVAILABLE)
def test_honest_programs_pass(level):
    programs = [
        Program(candidate="def f(x): return x * 2", tests=TESTS),
        Program(candidate="import numpy as np\ndef f(x): return int(np.full(x, 2).sum())", tests=TESTS),
        Program(candidate="if __name__ == '__main__': raise SystemExit\ndef f(x): return 4", tests=TESTS),
        Program(
            candidate="import dataclasses, pickle, tempfile, threading\n@dataclasses.dataclass\nclass A:\n"
            "    x: int\n"
            "t = threading.Thread(target=print)\nt.start(); t.join()\nopen(tempfile.mkstemp()[1], 'w').write('a')\n"
            "def f(x): return pickle.loads(pickle.dumps(A(x * 2))).x",
            tests=TESTS,
        ),
        Program(candidate="import sys\nsys.setrecursionlimit(9000)\ndef f(x): return 4", tests=TESTS),
    ]
    assert [verdict.error for verdict in run_programs(programs, level=level)] == [""] * len(programs)


@pytest.mark.parametrize("level", AVAILABLE)
def test_limits_of_files_and_open_files_hold(level):
    big = "open('big', 'wb').write(bytes(1 << 21))\ndef f(x): return 4"
    many = "files = [open('/dev/null') for _ in range(100)]\ndef f(x): return 4"
    limits = Limits(file_bytes=1 << 20, open_files=32)
    verdicts = run_programs([Program(candidate=code, tests=TESTS) for code in (big, many)], level=level, limits=limits)
    assert not any(verdict.passed for verdict in verdicts)
    assert all(v.passed for v in run_programs([Program(candidate=c, tests=TESTS) for c in (big, many)], level=level))


@pytest.mark.parametrize("level", AVAILABLE)
def test_the_number_of_files_is_bounded(level):
    code = "import time\nfor i in range(8000): open(str(i), 'w').close()\ntime.sleep(1)\ndef f(x): return 4"
    some = "for i in range(1000): open(str(i), 'w').close()\ndef f(x): return 4"
    many, few = run_programs([Program(candidate=c, tests=TESTS) for c in (code, some)], level=level)
    assert (many.status, few.status) == ("memory", "passed")


@pytest.mark.parametrize("level", ISOLATED)
def test_the_machine_is_out_of_sight_and_reach(level, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    code = reaching(tmp_path)
    verdicts = run_programs([Program(candidate=c, tests=TESTS, timeout_s=10) for c in code.values()], level=level)
    assert {verdict.status for verdict in verdicts} <= {"failed", "memory"}, dict(zip(code, verdicts, strict=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret.txt"]


@pytest.mark.parametrize("level", ISOLATED)
def test_programs_do_not_see_each_other(level):
    code = "import os\nassert os.listdir('.') == []\nopen('mark', 'w').close()\ndef f(x): return 4"
    assert all(v.passed for v in run_programs([Program(candidate=code, tests=TESTS)] * 4, level=level, workers=2))


TRACES = """
import os
places = [place for top in ("/", "/dev", "/packages") if os.path.isdir(top) for place in [top, *(
    os.path.join(top, name) for name in os.listdir(top))] if os.path.exists(place)]
assert not [place for place in places if os.path.exists(place + "/mark")]
assert os.listdir("/tmp") == [] and oct(os.stat("/tmp").st_mode) == "0o41777"
before = [place for place in places if os.stat(place).st_mode & 1]
for place in before:
    for reach in (lambda: open(place + "/mark", "w").close(), lambda: os.mkdir(place + "/mark"),
                  lambda: os.chmod(place, 0), lambda: os.utime(place, (1, 1)), lambda: os.rename(place, place + "2")):
        try: reach()
        except OSError: pass
assert all(os.stat(place).st_mtime > 9 for place in places if not place.startswith("/tmp"))
held = []
for fd in range(3, 256):
    try: held.append(os.fstat(fd))
    except OSError: pass
assert len(held) == 2, held
terminal = os.openpty() if os.path.isdir("/dev/pts") else None
assert terminal is None or os.ttyname(terminal[1]) == "/dev/pts/0"
def f(x): return 4
"""


@pytest.mark.parametrize("level", [level for level in ISOLATED if level not in sandbox.SHARED])
def test_a_program_leaves_the_next_one_of_its_zygote_nothing(level):
    verdicts = run_programs([Program(candidate=TRACES, tests=TESTS)] * 3, level=level, workers=1)
    assert [verdict.error for verdict in verdicts] == [""] * 3


SEARCH = """
import re
found = set()
with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", 0) as memory:
    for line in maps:
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if " rw" in line and "[v" not in line:
            try: memory.seek(start)
            except OverflowError: continue
            found.update(re.findall(rb"needle-(\\w+)", memory.read(end - start)))
found = sorted(word.decode() for word in found)
def f(x): return found
"""


def test_the_memory_of_a_program_holds_its_own_source_and_no_other_word():
    if "rlimits" not in AVAILABLE:
        pytest.skip("reads its own memory, which the levels that isolate do not show")
    first = Program(candidate="a = 'needle-first'\ndef f(x): return 4", tests=f"b = 'needle-first_tests'\n{TESTS}")
    tests = "found = f(2)\nassert found == ['own'], found\nc = 'needle-tests'"
    second = Program(candidate=f"a = 'needle-own'\n{SEARCH}", tests=tests, setup="d = 'needle-setup'", called=("f",))
    verdicts = run_programs([first, second], level="rlimits", workers=1)
    assert [verdict.error for verdict in verdicts] == ["", ""]


def zygotes_of(monkeypatch):
    """The zygotes that are made from now on."""
    made, make = [], sandbox._Zygote.__init__

    def init(self, *arguments):
        made.append(self)
        make(self, *arguments)

    monkeypatch.setattr(sandbox._Zygote, "__init__", init)
    return made


@pytest.mark.parametrize("level", AVAILABLE)
def test_one_zygote_serves_all_programs_that_want_the_same_modules(level, monkeypatch):
    made = zygotes_of(monkeypatch)
    code = "import sys, numpy\nassert 'numpy.random' not in sys.modules  # else all would draw the same numbers\n"
    numeric = Program(candidate=f"{code}def f(x): return int(numpy.int64(4))", tests=TESTS)
    verdicts = run_programs([GOOD, numeric] * 5, level=level, workers=1)
    assert [verdict.error for verdict in verdicts] == [""] * 10
    assert ["numpy" in zygote.preload for zygote in made] == [False, True]
    assert all(zygote._process.returncode == 0 for zygote in made)


@pytest.mark.parametrize("level", AVAILABLE)
def test_a_program_leaves_no_word_on_its_streams_for_the_next_one(level):
    code = "import fcntl\ndef f(x): return [fcntl.fcntl(i, how) for i in (0, 1, 2) for how in (fcntl.F_GETFL, 11)]\n"
    leave = f"{code}fcntl.fcntl(1, fcntl.F_SETFL, fcntl.fcntl(1, fcntl.F_GETFL) | 0xC00)\n"  # O_APPEND, O_NONBLOCK
    leave += "try: fcntl.fcntl(1, 10, 17)  # F_SETSIG\nexcept PermissionError: pass\n"
    programs = [Program(candidate=each, tests="assert not f(2), f(2)") for each in (code, leave, code)]
    first, changed, second = (verdict.error for verdict in run_programs(programs, level=level, workers=1))
    assert first != changed
    assert first == second


@pytest.mark.parametrize("level", [level for level in AVAILABLE if level not in sandbox.SHARED])
def test_where_no_namespace_may_stand_in_another_each_program_has_a_zygote(level, monkeypatch):
    made, walls = zygotes_of(monkeypatch), sandbox._Zygote._walls

    def refused(self, *arguments):
        found = walls(self, *arguments)
        return {**found, "binds": [("/nowhere", "/nowhere")]} if self.lasting else found

    monkeypatch.setattr(sandbox._probe, "reasons", {})
    monkeypatch.setattr(sandbox._Zygotes, "lasting", {})
    monkeypatch.setattr(sandbox._Zygote, "_walls", refused)
    monkeypatch.setattr(sandbox, "_command", lambda level, lasting, make=sandbox._command: make(level, False))
    hostile = ["new session that lives on", "kills everybody", "memory flood", "reads from the keyboard"]
    programs = [Program(candidate=HOSTILE[name][0], tests=TESTS, timeout_s=3) for name in hostile]
    verdicts = run_programs([*programs, GOOD, GOOD], level=level, workers=1)
    assert [verdict.passed for verdict in verdicts] == [False] * 4 + [True] * 2
    assert [zygote.lasting for zygote in made] == [True] + [False] * 7
    assert leftovers() == []


def test_a_stopped_zygote_of_one_program_holds_nobody_up(monkeypatch):
    """As an ordinary user, where no namespace may stand in another, the program reaches it."""
    if "unshare" not in AVAILABLE:
        pytest.skip("needs a level whose zygote is the process that was started")
    start = sandbox._Zygote.start

    def stopped(self, *descriptors):
        pid = start(self, *descriptors)
        os.kill(self._process.pid, signal.SIGSTOP)
        return pid

    monkeypatch.setattr(sandbox._Zygote, "start", stopped)
    monkeypatch.setattr(sandbox._Zygotes, "lasting", {"unshare": False})
    monkeypatch.setattr(sandbox, "START_S", 20.0)
    started = time.monotonic()
    assert run_programs([GOOD], level="unshare")[0].passed
    assert time.monotonic() - started < 20
    assert leftovers() == []


@pytest.mark.parametrize("level", [level for level in AVAILABLE if level not in sandbox.SHARED])
def test_a_program_may_have_as_many_processes_as_the_one_before_it(level):
    """Where all are the same user's, what is left of one program counts for the next."""
    code = "import os, time\nn = 0\ntry:\n    while os.fork(): n += 1\n    time.sleep(9)\nexcept OSError: pass\n"
    count = Program(candidate=f"{code}def f(x): return n", tests="assert f(2) == 0, f(2)")
    verdicts = run_programs([count, *[GOOD] * 8, count, count], level=level, workers=1)
    assert {verdict.passed for verdict in verdicts[1:9]} == {True}
    assert len({verdict.error for verdict in verdicts if not verdict.passed}) == 1
    assert int(verdicts[0].error.rpartition(" ")[2]) in (Limits().processes - 1, Limits().processes + 1)


@pytest.mark.parametrize("level", AVAILABLE)
def test_a_zygote_that_dies_takes_one_program_along_at_most(level, monkeypatch):
    made = zygotes_of(monkeypatch)
    start = sandbox._Zygote.start

    def dying(self, *descriptors):
        pid = start(self, *descriptors)
        if len(made) == 1:
            threading.Timer(1.5, self._control.shutdown, (socket.SHUT_WR,)).start()  # reads as an evaluator that went
        return pid

    monkeypatch.setattr(sandbox._Zygote, "start", dying)
    sleeper = Program(candidate="import time\ntime.sleep(5)\ndef f(x): return 4", tests=TESTS)
    verdicts = run_programs([sleeper, GOOD], level=level, workers=1)
    assert [verdict.status for verdict in verdicts] == ["killed", "passed"]
    assert len(made) == 2
    with sandbox._Zygotes(level) as zygotes:
        with zygotes.one(()) as zygote:
            pass
        sandbox.kill(zygote._process.pid)
        monkeypatch.setattr(sandbox.time, "sleep", lambda seconds: None)
        assert sandbox._run_surely(GOOD, zygotes, Limits()).passed


def test_a_link_in_the_place_of_the_scratch_folder_is_not_followed(tmp_path):
    if "rlimits" not in AVAILABLE:
        pytest.skip("needs the level that lets a program remove its folder")
    (tmp_path / "file").touch(mode=0o400)
    code = f"import os\nd = os.getcwd()\nos.rmdir(d)\nos.symlink({str(tmp_path)!r}, d)\ndef f(x): return 4"
    (verdict,) = run_programs([Program(candidate=code, tests=TESTS)], level="rlimits")
    assert verdict.error == ""
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o400


def test_server_on_this_machine_is_not_reachable():
    if not ISOLATED:
        pytest.skip("needs an isolated level")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)\ndef f(x): return 4"
        verdicts = [run_programs([Program(candidate=code, tests=TESTS)], level=level)[0] for level in ISOLATED]
    assert not any(verdict.passed for verdict in verdicts)


def test_auto_takes_the_best_level():
    assert isolation_level("auto") == AVAILABLE[0]


def test_auto_never_takes_a_level_that_does_not_isolate(monkeypatch):
    monkeypatch.setattr(
        sandbox._probe, "reasons", {"bubblewrap": "no bwrap", "unshare": "EPERM", "landlock": "old", "rlimits": ""}
    )
    with pytest.raises(
        ValueError, match=r"\(bubblewrap: no bwrap; unshare: EPERM; landlock: old\).* ask for the level rlimits by name"
    ):
        isolation_level("auto")
    assert isolation_level("rlimits") == "rlimits"
    assert sandbox.isolation_label("rlimits") == "rlimits (not isolated)"


def test_unusable_level_is_an_error_that_says_why(monkeypatch):
    monkeypatch.setattr(sandbox._probe, "reasons", {})
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="'bubblewrap' does not work on this machine: bubblewrap: bwrap is not on"):
        isolation_level("bubblewrap")
    with pytest.raises(ValueError, match="must be auto, bubblewrap, unshare, landlock, rlimits; got 'docker'"):
        isolation_level("docker")


def test_the_reason_holds_the_words_of_the_child(monkeypatch):
    monkeypatch.setattr(sandbox._probe, "reasons", {})
    monkeypatch.setattr(sandbox, "_binds", lambda: ([("/nowhere", "/nowhere")], []))
    with pytest.raises(ValueError, match=r"unshare sandbox could not be built: \w+Error: .*mount: .*/nowhere"):
        isolation_level("unshare")


CALLS = {
    "namespace": "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    "if libc.unshare(0x10000000): raise OSError(ctypes.get_errno(), 'unshare')",
    "signal to the parent": "import os\nos.kill(os.getppid(), 0)",
    "memory file": "import os\nos.memfd_create('x')",
    "datagrams": "import socket\nsocket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "socket": "import socket\nsocket.socket()",
    "buffer of a socket": "import socket\na, b = socket.socketpair()\n"
    "a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)",
    "shared segment": "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    "if libc.shmget(0, 4096, 0o1600) < 0: raise OSError(ctypes.get_errno(), 'shmget')",
    "trace": "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    "if libc.ptrace(16, os.getppid(), 0, 0): raise OSError(ctypes.get_errno(), 'ptrace')",
    "limits of the parent": "import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
    "keys": "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    "if libc.syscall(250, 0, -3, 1) < 0: raise OSError(ctypes.get_errno(), 'keyctl')",
    "io_uring": "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    "if libc.syscall(425, 1, 0) < 0: raise OSError(ctypes.get_errno(), 'io_uring')",
}


@pytest.mark.parametrize("level", AVAILABLE)
def test_calls_that_reach_beyond_the_program_are_refused(level):
    if os.uname().machine != "x86_64":
        pytest.skip("two of the calls are written as x86_64 numbers")
    codes = {name: code for name, code in CALLS.items() if level in sandbox.SHARED or "parent" not in name}
    verdicts = run_programs([Program(candidate=code, tests="") for code in codes.values()], level=level)
    errors = {name: verdict.error for name, verdict in zip(codes, verdicts, strict=True)}
    assert all("PermissionError" in error for error in errors.values()), errors


MEMORY = {
    "forks": "import os, time\nfor i in range(12):\n    if os.fork() == 0:\n"
    "        x = bytearray(b'x') * (120 << 20)\n"
    "        time.sleep(60)\ntime.sleep(60)",
    "held in sockets": "import os, socket, time\nfor i in range(24):\n    if os.fork() == 0: break\n"
    "pairs = [socket.socketpair() for i in range(50)]\nfor s in (s for pair in pairs for s in pair):\n"
    "    s.setblocking(False)\n    try:\n        while True: s.send(bytes(65536))\n    except OSError: pass\n"
    "time.sleep(60)",
    "shared by forks": "import mmap, os, time\nfor i in range(6):\n    if os.fork() == 0:\n"
    "        m = mmap.mmap(-1, 100 << 20)\n"
    "        m.write(bytes(100 << 20))\n        time.sleep(60)\ntime.sleep(60)",
}


@pytest.mark.parametrize("level", AVAILABLE)
def test_memory_of_all_processes_counts(level):
    programs = [Program(candidate=code, tests="") for code in MEMORY.values()]
    verdicts = run_programs(programs, level=level, limits=Limits(memory_bytes=256 << 20))
    assert [(v.status, v.error) for v in verdicts] == [("memory", "more than 256 MB in all processes")] * len(MEMORY)


def test_shares_of_memory_are_read_only_where_all_of_it_together_is_more_than_the_limit(monkeypatch):
    def reading(pids):
        raise AssertionError("to read them stops a program for long")

    monkeypatch.setattr(sandbox_watch, "_memory_of", reading)
    large = Program(candidate="import time\nx = b'x' * (300 << 20)\ntime.sleep(0.3)", tests="")
    assert run_programs([large], level=AVAILABLE[0], limits=Limits(memory_bytes=512 << 20))[0].passed


def test_time_is_processor_time_of_all_processes():
    level = AVAILABLE[0]
    burn = "import os, time\ndef burn(s):\n    while time.process_time() < s: sum(range(9999))\n"
    alone = Program(candidate=burn + "def f(x): burn(1.2); return 4", tests=TESTS, timeout_s=2.5)
    crowd = Program(candidate=burn + "burn(2)\ndef f(x): return 4", tests=TESTS, timeout_s=20)
    children = burn + "for i in range(4):\n    if os.fork() == 0:\n        burn(2)\n        os._exit(0)\n"
    programs = [alone, alone, crowd, crowd, crowd, crowd]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
        patch.setattr(sandbox.os, "sched_getaffinity", lambda pid: range(6))
        verdicts = run_programs(programs, level=level, workers=6)
    assert [verdict.status for verdict in verdicts] == ["passed"] * 6
    forks = Program(candidate=children + "for i in range(4): os.wait()", tests="", timeout_s=3)
    sleeper = Program(candidate="import time\ntime.sleep(60)", tests="", timeout_s=1)
    verdicts = run_programs([forks, sleeper], level=level)
    assert [verdict.status for verdict in verdicts] == ["timeout", "timeout"]
    assert verdicts[1].seconds < 20


def test_a_program_that_found_no_processor_runs_again_alone(monkeypatch):
    run, seen = sandbox._run, []

    def busy(program, *rest):
        seen.append(program.candidate)
        verdict = run(program, *rest)
        return sandbox.replace(verdict, status="near") if len(seen) == 1 else verdict

    monkeypatch.setattr(sandbox, "_run", busy)
    other = Program(candidate="def f(x): return 4", tests=TESTS)
    verdicts = run_programs([GOOD, other], level=AVAILABLE[0], workers=1)
    assert [verdict.status for verdict in verdicts] == ["passed", "passed"]
    assert seen == [GOOD.candidate, other.candidate, GOOD.candidate]


def test_fewer_programs_run_where_others_use_the_machine(monkeypatch):
    monkeypatch.setattr(sandbox.os, "sched_getaffinity", lambda pid: range(8))
    monkeypatch.setattr(sandbox.os, "getloadavg", lambda: (6.0, 0.0, 0.0))
    gate = sandbox._Gate(8)
    assert [gate._enter() for _ in range(4)] == [True, True, True, True]
    monkeypatch.setattr(sandbox.os, "getloadavg", lambda: (60.0, 0.0, 0.0))
    assert not gate._enter()
    assert sandbox._Gate(8)._enter()


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root and setpriv")
def test_root_without_capabilities_gets_a_level_or_every_reason():
    code = "from coda_eval.sandbox import *\nlevel = isolation_level()\n"
    code += f"print(level, run_programs([Program(candidate='def f(x): return 4', tests={TESTS!r})])[0].status)"
    command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "landlock" in AVAILABLE:
        assert done.stdout.split() == ["landlock", "passed"], done.stderr
    else:
        assert all(f"{level}: " in done.stderr for level in sandbox.ISOLATED)


FORGED = (
    b'{"status": "sandbox", "error": "", "nonce": ""}\n',
    b"[" * 60000 + b"\n",
    b'{"status": "passed", "error": "", "nonce": "\\ud800"}\n',
    b"\xed\xa0\x80 \xff\n",
    b"9" * 5000 + b"\n",
    b"null\n",
    b"ready\n",
    b"passed\n",
    b"\n",
    b"a" * 300000,
)


@pytest.mark.parametrize("level", AVAILABLE)
def test_nothing_a_program_writes_ends_the_evaluation(level):
    flood = "import os\nfor fd in range(3, 128):\n    try: os.set_blocking(fd, False), os.write(fd, {!r})\n"
    codes = [flood.format(text) + "    except OSError: pass\nos._exit(0)" for text in FORGED]
    codes += ["raise ValueError('\\ud800')", "'\ud800'", "class E(Exception):\n    __str__ = 1\nraise E"]
    programs = [Program(candidate=code, tests=TESTS, timeout_s=10) for code in codes]
    good = Program(candidate="def f(x): return 4", tests=TESTS)
    verdicts = run_programs([good, *programs, good], level=level)
    assert [verdict.passed for verdict in verdicts] == [True, *[False] * len(programs), True]
    assert {verdict.status for verdict in verdicts[1:-1]} <= {"failed", "killed"}


def test_a_sandbox_that_cannot_be_built_is_a_program_with_a_reason(monkeypatch):
    level = AVAILABLE[0]
    monkeypatch.setattr(sandbox, "_command", lambda *_: ["/nowhere/python"])
    monkeypatch.setattr(sandbox.time, "sleep", lambda seconds: None)
    verdict = run_programs([Program(candidate="", tests="")], level=level)[0]
    assert verdict.status == "unjudged"
    assert "/nowhere/python" in verdict.error


def test_nonpositive_timeout_is_an_error():
    with pytest.raises(ValueError, match="timeout_s must be positive, got 0"):
        Program(candidate="", tests="", timeout_s=0)


def test_workers_share_the_cores_of_the_machine(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(cores))
    assert sandbox.default_workers() == 1
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert sandbox.default_workers() == cores


@pytest.mark.parametrize("level", AVAILABLE)
def test_programs_end_with_a_killed_evaluator(level, tmp_path):
    code = "from coda_eval.sandbox import *\nprograms = [Program(candidate='while True: pass', tests='')]\n"
    code += f"run_programs(programs, level={level!r})"
    evaluator = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)})
    try:
        deadline, looks = time.monotonic() + 30, 0
        while looks < 2 and time.monotonic() < deadline:  # the level's own trial comes before, and ends
            looks = looks + 1 if leftovers(evaluator.pid) else 0
            time.sleep(0.3)
        assert looks == 2
    finally:
        evaluator.kill()
        evaluator.wait()
    deadline = time.monotonic() + 5
    while (left := leftovers(evaluator.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []


@pytest.mark.parametrize("level", ISOLATED)
def test_packages_that_are_asked_for_are_there_with_what_they_require(level, monkeypatch):
    """jinja2 needs markupsafe, a package beside it; click was not asked for."""
    code = "import jinja2\ndef f(x): return int(jinja2.Template('{{ x * 2 }}').render(x=x))"
    programs = [Program(candidate=c, tests=TESTS) for c in (code, "import click\ndef f(x): return 4")]
    sandbox._binds.cache_clear()
    monkeypatch.setenv("CODA_EVAL_PACKAGES", "jinja2, six")
    with_them = run_programs([*programs, Program(candidate="import six\ndef f(x): return 4", tests=TESTS)], level=level)
    monkeypatch.setenv("CODA_EVAL_PACKAGES", "")
    sandbox._binds.cache_clear()
    without = run_programs(programs[:1], level=level)
    assert [verdict.passed for verdict in (*with_them, *without)] == [True, False, True, False]


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setenv("CODA_EVAL_PACKAGES", "numpy,pandsa")
    with pytest.raises(ValueError, match="CODA_EVAL_PACKAGES names pandsa: not installed here"):
        sandbox.further_packages()


def test_a_bench_that_is_left_starts_no_program_more(monkeypatch):
    monkeypatch.setattr(sandbox.os, "getloadavg", lambda: (100.0, 0.0, 0.0))  # room for one program
    slow = Program(candidate="import time\ntime.sleep(1.5)", tests="")
    with Bench(isolation_level(), workers=2) as bench:
        futures = [bench.submit(lambda: slow) for _ in range(2)]
        time.sleep(0.5)
    left_out = [future for future in futures if isinstance(future.exception(), CancelledError)]
    ran = [future for future in futures if future not in left_out]
    assert [future.result()[1].status for future in ran] == ["passed"]
    assert len(left_out) == 1
