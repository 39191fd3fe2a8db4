"""Programs that attack the sandbox: none may pass, stay, or reach anything, at any level that isolates.

The self-check runs them where a score is made, and the tests of the sandbox on every change.
"""

import os
from pathlib import Path

from coda_eval import sandbox

TESTS = "assert f(2) == 4"
"""What all of them are asked."""

MARK = f"333{os.getpid()}"
"""What stands in the command line of a program that would live on."""

HOSTILE: dict[str, tuple[str, str | None]] = {
    "another program that lives on": (
        "import os\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        f"        os.execve('/bin/sleep', ['sleep', '{MARK}'], {{}})\n    os._exit(0)\nraise ValueError",
        "failed",
    ),
    "wrong answer": ("def f(x): return 5", "failed"),
    "syntax error": ("def f(x): return (", "failed"),
    "sys.exit(0)": ("import sys; sys.exit(0)", "exited"),
    "os._exit(0)": ("import os; os._exit(0)", "killed"),
    "exit in the tests": ("import os\ndef f(x): os._exit(0)", "killed"),
    "kills itself": ("import os; os.kill(os.getpid(), 9)", "killed"),
    "endless loop": ("while True: pass", "timeout"),
    "ignored signals": (
        "import signal\nfor s in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:\n"
        "    signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
        "timeout",
    ),
    "memory flood": ("x = bytearray(1 << 40)", "memory"),
    "output flood": ("while True: print('x' * 100000)", "timeout"),
    "new session that lives on": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    while True: time.sleep(1)\nraise ValueError",
        "failed",
    ),
    "one child after the other": (
        "import os\nif os.fork() == 0:\n    os.setsid()\n    while os.fork() == 0: pass\n    os._exit(0)\n"
        "raise ValueError",
        "failed",
    ),
    "kills its parent": ("import os\nos.kill(os.getppid(), 9)", None),
    "kills everybody": ("import os\nos.kill(-1, 9)", None),
    "forged report": (
        'import os\nfor fd in range(3, 4096):\n    try: os.write(fd, b\'{"status": "passed", "error": "", '
        '"nonce": "0"}\\n\')\n    except OSError: pass\nos._exit(0)',
        "failed",
    ),
    "patched builtins": (
        "import builtins, os, json\nbuiltins.exec = builtins.compile = lambda *a, **k: None\n"
        "builtins.AssertionError = type('A', (BaseException,), {})\njson.dumps = lambda *a, **k: 'passed'\n"
        "os.write = lambda *a: 1\nos._exit = lambda *a: None\ndef f(x): return 5",
        None,
    ),
    "frame walk": (
        "import sys\nframe = sys._getframe()\nwhile frame:\n    for name, value in list(frame.f_locals.items()):\n"
        "        if name == 'tests': frame.f_locals[name] = ''\n    frame = frame.f_back\ndef f(x): return 5",
        "failed",
    ),
    "reads from the keyboard": ("x = input()", "failed"),
}
"""What would end, outlive or deceive its judge, and the status it must get; None: any but a pass."""

EQUAL = "class E(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\n"
FLOATS = "import numpy as np\nassert np.allclose(f(2), [4.0, 8.0])"
FRAMES = (
    "import sys, gc\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n"
    "        for space in (frame.f_locals, frame.f_globals):\n"
    "            for name in ('tests', 'names', 'job', 'status', 'broken'):\n"
    "                if name in space: space[name] = ''\n"
    "        frame = frame.f_back\n    return 5"
)
EVERY = "import os\nfor fd in range(3, 128):\n    try:\n        {}\n    except OSError: pass\n"
CHEATS: dict[str, tuple[str, str]] = {
    "redefines a builtin of the tests": (
        "def zip(*a): return []\ndef f(x): return 5",
        "for a, b in zip([2], [4]):\n    assert f(a) == b",
    ),
    "patches the builtins": (
        "import builtins\nbuiltins.zip = lambda *a: []\ndef f(x): return 5",
        "for a, b in zip([2], [4]):\n    assert f(a) == b",
    ),
    "patches numpy": ("import numpy\nnumpy.allclose = lambda *a, **k: True\ndef f(x): return [5.0]", FLOATS),
    "equals everything": (EQUAL + "def f(x): return E(5)", TESTS),
    "instance that equals everything": (
        "class E:\n    def __eq__(self, o): return True\n    __hash__ = None\ndef f(x): return E()",
        TESTS,
    ),
    "in a list": (EQUAL + "def f(x): return [E(5)]", "assert f(2) == [4]"),
    "reflected": (EQUAL + "def f(x): return E(5)", "assert 4 == f(2) and not 4 != f(2)"),
    "named tuple that equals everything": (
        "from collections import namedtuple\nclass E(namedtuple('E', 'a')):\n    def __eq__(self, other): return True\n"
        "    __hash__ = tuple.__hash__\ndef f(x): return E(5)",
        "assert f(2) == (4,)",
    ),
    "holds everything": (
        "class E:\n    def __contains__(self, o): return True\n    def __iter__(self): yield 5\ndef f(x): return E()",
        "assert 4 in f(2)",
    ),
    "has the hash of what is right": (
        "class E:\n    def __eq__(self, o): return True\n    def __hash__(self): return 4\ndef f(x): return E()",
        "assert f(2) in {4}",
    ),
    "class that is a float": (
        "class E(float):\n    def __sub__(s, o): return 0.0\n    __rsub__ = __sub__\n    __abs__ = lambda s: 0.0\n"
        "def f(x): return E(5)",
        "assert abs(f(2) - 4.0) < 1e-6",
    ),
    "hooks the tests' comparison": (
        "class E:\n    def __lt__(s, o): return True\n    __le__ = __gt__ = __ge__ = __lt__\ndef f(x): return E()",
        "assert f(2) < 5",
    ),
    "array that equals everything": (
        "import numpy as np\nclass E(np.ndarray):\n    def __eq__(s, o): return np.True_\n"
        "def f(x): return np.zeros(2).view(E)",
        "import numpy as np\nassert (f(2) == np.ones(2)).all()",
    ),
    "traces the calls": (
        "import sys\ndef g(x): return 4\ndef t(frame, event, arg):\n    frame.f_locals['f'] = g\n    return t\n"
        "sys.settrace(t)\ndef f(x): return 5",
        TESTS,
    ),
    "walks the frames": (FRAMES, TESTS),
    "empties every file": (EVERY.format("os.ftruncate(fd, 0)") + "def f(x): return 5", TESTS),
    "overwrites every file": (EVERY.format("os.pwrite(fd, b'#' * 100, 0)") + "def f(x): return 5", TESTS),
    "reads every pipe": (
        EVERY.format("os.set_blocking(fd, False); print(os.read(fd, 99))") + "def f(x): return 5",
        TESTS,
    ),
    "says passed": (EVERY.format("os.write(fd, b'passed \\n')") + "os._exit(0)", TESTS),
    "answers before it is asked": (EVERY.format("os.write(fd, b'A' * 9)") + "def f(x): return 5", TESTS),
    "answers with a pickle": (
        "import os, pickle, struct\nP = pickle.dumps(4)\ndef f(x):\n    for fd in range(3, 128):\n"
        "        try: os.write(fd, struct.pack('<QcQ', len(P) + 8, b'A', len(P)) + P)\n"
        "        except OSError: pass\n    os._exit(0)",
        TESTS,
    ),
    "leaves when asked": ("import sys\ndef f(x): sys.exit(0)", TESTS),
    "dies when asked": ("import os\ndef f(x): os._exit(0)", "try:\n    f(2)\nexcept: pass"),
    "replaces a helper of the tests": ("def helper(x): return 5\ndef f(x): return 5", "assert f(2) == helper(2)"),
    "raises what the tests swallow": ("def f(x): raise StopIteration", "assert next(iter([f(2)])) == 4"),
    "patches every module": (
        "import sys\nfor m in list(sys.modules.values()):\n"
        "    for n in ('check', 'exec', 'compile', 'len', 'all', 'decode'):\n"
        "        if hasattr(m, n): setattr(m, n, lambda *a, **k: True)\ndef f(x): return 5",
        TESTS,
    ),
}
"""Wrong programs that would pass if they reached their tests, which stand behind each."""


def reaching(folder: Path) -> dict[str, str]:
    """Programs that reach for the machine, among it for `secret.txt` in a folder: all must fail."""
    secret = folder / "secret.txt"
    return {
        "file of the user": f"open({str(secret)!r}).read()\ndef f(x): return 4",
        "accounts": "open('/etc/passwd').read()\ndef f(x): return 4",
        "processes": "import os\nos.listdir('/proc')\ndef f(x): return 4",
        "this package": f"open({sandbox.__file__!r}).read()\ndef f(x): return 4",
        "write outside": f"open({str(folder / 'new.txt')!r}, 'w').write('x')\ndef f(x): return 4",
        "write to the system": "open('/usr/lib/x', 'w')\ndef f(x): return 4",
        "write to the root": "open('/x', 'w')\ndef f(x): return 4",
        "network": "import socket\nsocket.create_connection(('127.0.0.1', 9), timeout=1)\ndef f(x): return 4",
        "name lookup": "import socket\nsocket.getaddrinfo('example.org', 80)\ndef f(x): return 4",
        "shell": "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'true'], check=True)\ndef f(x): return 4",
        "mount": "import ctypes\nassert not ctypes.CDLL(None).mount(b'a', b'/tmp', b'tmpfs', 0, 0)\ndef f(x): return 4",
        "become root": "import os\nos.setuid(0) if os.getuid() else 1 / 0\ndef f(x): return 4",
        "third-party packages": "import torch\ndef f(x): return 4",
        "fill the scratch folder": (
            "for i in range(9):\n    open(f'{i}', 'wb').write(bytes(30 << 20))\ndef f(x): return 4"
        ),
    }
