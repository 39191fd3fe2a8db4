"""Run untrusted Python programs and judge them from outside: walls, limits, a checker apart, many at once.

Three levels isolate, best first. `bubblewrap` (the `bwrap` program) and `unshare` (namespaces that the child
makes itself) show a program the standard library, numpy where installed, a small scratch folder, and nothing else: no
network, no other process, no file of the machine. `landlock`, for containers without namespaces, refuses the same to
a program that lives among the machine's processes and on its file system: it can learn that a path or a process exists
and a file's size and times, no more. `rlimits` limits what a program uses and refuses it sockets and signals to
others, but it reads, and as an ordinary user writes, the machine's files: it is never chosen unasked. At all levels a
filter refuses the system calls that no program needs (`sandbox_walls.py`). The level that ran is part of every
verdict.

A candidate and its tests run in two processes (`sandbox_child.py`). The candidate's has no word of the tests, no file
or pipe but its line to the checker, and what crosses is plain data. What remains possible: to recognise the tests'
inputs and answer from a table; to answer differently from call to call; to be an object, where a test only asks for
the truth, the length, the items or the order of the candidate's own objects; to pass tests that compare a candidate
with itself; and whatever a fault of the kernel allows. Memory is looked at some twenty times a second, so a program
may exceed its limit for that long; files in the scratch folder come on top.

Not here: what a program consists of (`programs.py`).
"""

import contextlib
import functools
import itertools
import logging
import marshal
import os
import select
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from tqdm import tqdm

from coda_eval.sandbox_watch import SCRATCH_BYTES, Limits, Watch, kill, processes_of_user
from CoDALanguageModel.errors import UserError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

LEVELS = ("bubblewrap", "unshare", "landlock", "rlimits")
"""Isolation levels, best first."""

SHARED = ("landlock", "rlimits")
"""Levels where a program lives among the machine's processes and on its file system."""

ISOLATED = ("bubblewrap", "unshare", "landlock")
"""Levels that `auto` may choose: a program there reaches nothing of the machine."""

PACKAGES = ("numpy", "tzdata")
"""Packages outside the standard library that programs may import: the MBPP+ tests need numpy, zoneinfo the zones."""

FIRST_UID = 61184
"""First user id that programs take when the caller is root: the range that systemd gives to transient users, so that
no account owns it. Each program has its own, which makes the limit on processes a limit per program, also while the
kernel still takes a fork bomb down."""

_CHILD = [f"sandbox_{name}" for name in ("values", "line", "walls", "candidate", "checker", "child")]
"""Modules of the process inside the sandbox, each after those that it imports; the last one has `main`."""

_REPORT_BYTES = 1 << 16
_numbers = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Program:
    """A candidate and the tests it must survive, both Python source, run in two processes."""

    candidate: str
    tests: str
    setup: str = ""
    """Code that stands before the tests on their side: helpers that they need and no candidate may replace."""

    called: tuple[str, ...] = ()
    """Names that are the candidate's although `setup` or the builtins have them."""

    timeout_s: float = 20.0
    """Limit in seconds of processor time of all its processes, plus the time in which it does nothing but wait."""

    def __post_init__(self) -> None:
        if not self.timeout_s > 0:
            raise UserError(f"timeout_s must be positive, got {self.timeout_s}")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of one program."""

    status: str
    """passed, failed (an exception), exited (left early), memory, timeout, killed (died without a word), or unjudged
    (no sandbox could be built)."""

    error: str
    seconds: float
    """By the clock."""

    isolation: str
    """What `isolation_label` says of the level that ran."""

    cpu_seconds: float = 0.0
    """Processor time of all processes, as last seen: zero for what ends at once."""

    @property
    def passed(self) -> bool:
        """Whether candidate and tests ran to their end."""
        return self.status == "passed"


def default_workers() -> int:
    """Programs to run at once: the cores this process may use, shared with the other ranks on the machine."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def isolation_label(level: str) -> str:
    """What results say of a level: its name, and that it is no isolation where that is so."""
    return level if level in ISOLATED else f"{level} (not isolated)"


def isolation_level(requested: str = "auto") -> str:
    """The level to use: the best of `ISOLATED` that works here, or the requested one.

    Args:
        requested: `auto` or one of `LEVELS`.

    Raises:
        UserError: the name is unknown, or that level (for `auto`: every level that isolates) does not work here.
    """
    if requested not in ("auto", *LEVELS):
        raise UserError(f"the sandbox level must be auto, {', '.join(LEVELS)}; got {requested!r}")
    tried = ISOLATED if requested == "auto" else (requested,)
    for level in tried:
        if _probe(level):
            return level
    reasons = "; ".join(f"{level}: {_probe.reasons[level]}" for level in tried)
    if requested == "auto":
        raise UserError(
            f"no sandbox level that isolates works on this machine ({reasons}). Install bubblewrap or allow user "
            "namespaces; or ask for the level rlimits by name, which does not isolate and is recorded as such"
        )
    raise UserError(f"sandbox level {requested!r} does not work on this machine: {reasons}")


def run_programs(
    programs: Sequence[Program], *, level: str = "auto", workers: int | None = None, limits: Limits | None = None
) -> list[Verdict]:
    """Run every program in its own sandbox and interpreter, several at once, and judge each.

    Nothing that a program does raises here. A sandbox that cannot be built although the level works (the machine is
    out of processes, say) is tried again; what then still cannot be judged has the status `unjudged`.

    Args:
        programs: what to run; order is kept.
        level: `auto` or one of `LEVELS`.
        workers: programs at once; by default one per core.
        limits: resource limits of each program.

    Raises:
        UserError: the level is unknown or does not work here.
    """
    level = isolation_level(level)
    limits = limits or Limits()
    with (
        Bench(level, workers, limits) as bench,
        tqdm(total=len(programs), desc="programs", unit="", delay=10, mininterval=10, maxinterval=60) as progress,
    ):
        verdicts = []
        for future in [bench.submit(lambda program=program: program) for program in programs]:
            verdicts.append(future.result()[1])
            progress.update()
    for place, verdict in enumerate(verdicts):
        if verdict.status == "near":  # the machine was too busy to tell
            again = _run_surely(programs[place], level, limits)
            verdicts[place] = replace(again, status="timeout") if again.status == "near" else again
    return verdicts


class Bench:
    """Runs programs as they come, several at once, each in its own sandbox and interpreter.

    Args:
        level: one of `LEVELS` that works here.
        workers: programs at once; by default one per core.
        limits: resource limits of each program.
    """

    def __init__(self, level: str, workers: int | None = None, limits: Limits | None = None) -> None:
        workers = workers or default_workers()
        self._level, self._limits = level, limits or Limits()
        self._pool, self._gate = ThreadPoolExecutor(workers), _Gate(workers)

    def submit(self, build: Callable[[], Program]) -> Future[tuple[Program, Verdict]]:
        """The program that `build` gives and the verdict on it: `near` where the machine was too busy to tell."""
        return self._pool.submit(self._gate.run, self._judge, build)

    def _judge(self, build: Callable[[], Program]) -> tuple[Program, Verdict]:
        program = build()
        return program, _run_surely(program, self._level, self._limits)

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for the programs that run; those that do not yet are left out."""
        self._pool.shutdown(cancel_futures=True)


class _Gate:
    """Lets fewer programs run at once while others use the machine, but always one."""

    def __init__(self, workers: int) -> None:
        self.workers, self.running, self.lock = workers, 0, threading.Lock()

    def run(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Call `function` once there is room."""
        while not self._enter():
            time.sleep(0.2)
        try:
            return function(*arguments)
        finally:
            with self.lock:
                self.running -= 1

    def _enter(self) -> bool:
        with self.lock:
            busy = os.getloadavg()[0] - self.running
            room = min(self.workers, max(1, round(len(os.sched_getaffinity(0)) - busy)))
            if self.running >= room:
                return False
            self.running += 1
            return True


def _run_surely(program: Program, level: str, limits: Limits) -> Verdict:
    """`_run`, three times if the sandbox could not be built."""
    for wait in (0.5, 2.0, None):
        try:
            return _run(program, level, limits)
        except OSError as error:
            if wait is None:
                logger.error("a program could not be judged: %s", error)
                return Verdict(status="unjudged", error=str(error), seconds=0.0, isolation=isolation_label(level))
            time.sleep(wait)
    raise AssertionError("unreachable")


def _probe(level: str) -> bool:
    """Whether `level` works here, found by running a program once per process."""
    if level not in _probe.reasons:
        try:
            verdict = _run(Program(candidate="", tests=""), level, Limits())
            _probe.reasons[level] = "" if verdict.passed else f"{verdict.status}: {verdict.error}"
        except OSError as error:
            _probe.reasons[level] = str(error)
    return not _probe.reasons[level]


_probe.reasons = {}


@functools.cache
def _capable() -> bool:
    """Whether this process may build the walls as root: CHOWN 0, SETGID 6, SETUID 7 and SYS_ADMIN 21.

    Root in a container often may not; it is then treated as any user.
    """
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("CapEff:"):
            held = int(line.split()[1], 16)
            return os.geteuid() == 0 and all(held >> bit & 1 for bit in (0, 6, 7, 21))
    return False


@functools.cache
def _binds() -> tuple[list[tuple[str, str]], list[str]]:
    """Host paths a program may read as (source, target), and the folders that hold its packages inside."""
    python = os.path.realpath(sys.executable)
    stdlib = os.path.realpath(sysconfig.get_path("stdlib"))
    base = os.path.realpath(sys.base_prefix)
    paths = ["/usr/lib", "/usr/lib64", "/usr/lib32", "/lib", "/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo"]
    paths += [python, stdlib]
    paths += [str(path) for path in Path(base, "lib").glob("lib*.so*")]
    binds = {path: path for path in paths if os.path.exists(path)}
    for name in PACKAGES:
        spec = find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            folder = Path(next(iter(spec.submodule_search_locations)))
            for source in (folder, folder.with_name(f"{name}.libs")):  # wheels keep their shared libraries beside
                if source.is_dir():
                    binds[str(source)] = f"/packages/{source.name}"
    return list(binds.items()), ["/packages"]


def _site_folders() -> list[str]:
    """Folders inside the bound standard library that hold third-party packages: they are covered by empty ones."""
    stdlib = Path(os.path.realpath(sysconfig.get_path("stdlib")))
    places = [stdlib / "site-packages", stdlib / "dist-packages", Path("/usr/lib/python3/dist-packages")]
    return [str(path) for path in places if path.is_dir()]


def _command(level: str) -> list[str]:
    """The command line that starts the child inside its walls."""
    child = [os.path.realpath(sys.executable), "-I", "-S", "-B", "-c", _START]
    root = _capable()
    if level != "bubblewrap":
        return child
    tool = shutil.which("bwrap")
    if tool is None:
        raise FileNotFoundError("bwrap is not on PATH")
    command = [tool, "--unshare-net", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--die-with-parent"]
    # Root builds the walls as root and lets the child become a user of its own; others need a user namespace.
    command += ["--cap-drop", "ALL", *(["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"] if root else [])]
    command += [] if root else ["--unshare-user"]
    for folder in sorted({str(parent) for _, target in _binds()[0] for parent in Path(target).parents} - {"/"}):
        command += ["--perms", "0755", "--dir", folder]  # made without being asked, they are closed to other users
    for source, target in _binds()[0]:
        command += ["--ro-bind", source, target]
    for folder in _site_folders():
        command += ["--tmpfs", folder, "--remount-ro", folder]
    command += ["--dev", "/dev", "--remount-ro", "/dev", "--perms", "1777", "--size", str(SCRATCH_BYTES)]
    return [*command, "--tmpfs", "/tmp", "--remount-ro", "/", *child]


_START = """import marshal, sys
file = open(0, "rb", closefd=False)
for name, code in marshal.load(file):
    module = sys.modules[name] = type(sys)(name)
    exec(code, module.__dict__)
module.main(marshal.load(file))"""


@functools.cache
def _child_code() -> bytes:
    """The modules of the child, compiled once: the same interpreter reads them."""
    paths = [Path(__file__).with_name(f"{name}.py") for name in _CHILD]
    return marshal.dumps([(path.stem, compile(path.read_text(encoding="utf-8"), path.name, "exec")) for path in paths])


def _run(program: Program, level: str, limits: Limits) -> Verdict:
    """Start the child, watch it until its report or a limit, and leave no process behind.

    Raises:
        OSError: the sandbox could not be built; nothing of the program ran.
    """
    started = time.monotonic()
    if not os.path.exists(f"/proc/self/task/{os.getpid()}/children"):
        raise OSError("the kernel does not say which children a process has (CONFIG_PROC_CHILDREN)")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(_folder())
        stdin, tests, stderr = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(3))
        (reader, writer), (setup_reader, setup_writer) = _pipe(stack), _pipe(stack)
        job = _job(program, level, limits, folder, writer.fileno(), setup_writer.fileno(), tests.fileno())
        stdin.write(_child_code() + marshal.dumps(job))
        tests.write(marshal.dumps((str(program.setup), str(program.tests), tuple(map(str, program.called)))))
        for file in (stdin, tests):
            file.seek(0)
        environment = {
            "PATH": "/usr/bin:/bin",
            "HOME": folder if level in SHARED else "/tmp",
            "TMPDIR": folder if level in SHARED else "/tmp",
            "LANG": "C.UTF-8",
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "CODA_EVAL_PID": str(os.getpid()),
        }
        process = subprocess.Popen(
            _command(level),
            stdin=stdin,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            pass_fds=(writer.fileno(), setup_writer.fileno(), tests.fileno()),
            env=environment,
            start_new_session=True,
        )
        watch = Watch(process.pid, program.timeout_s, limits, folder if level in SHARED else None)
        try:
            writer.close()
            setup_writer.close()
            ready, trouble = _read_line(setup_reader.fileno(), watch)
            line = b""
            if ready == b"ready\n":
                line, trouble = _read_line(reader.fileno(), watch)
        finally:
            kill(process)
        if ready != b"ready\n" and not (trouble and trouble[0] == "near"):
            stderr.seek(0)
            reasons = [ready.decode("ascii", "replace").strip(), stderr.read(500).decode("utf-8", "replace").strip()]
            reason = "; ".join(filter(None, reasons)) or f"exit status {process.returncode}"
            raise OSError(f"the {level} sandbox could not be built{' in time' if trouble else ''}: {reason}")
        trouble = trouble or watch.look_at_files()
    if trouble:
        status, error = trouble
    else:  # the report pipe is the checker's alone; it stays empty where the checker itself was ended
        word, _, text = line.decode("ascii", "replace").rstrip("\n").partition(" ")
        status, error = (word, text[:500]) if line.endswith(b"\n") else ("killed", "ended without a verdict")
    seconds = time.monotonic() - started
    return Verdict(
        status=status,
        error=error,
        seconds=round(seconds, 4),
        cpu_seconds=round(watch.cpu_s, 2),
        isolation=isolation_label(level),
    )


def _pipe(stack: contextlib.ExitStack) -> tuple[BinaryIO, BinaryIO]:
    """Both ends of a pipe, closed with `stack`."""
    reader, writer = os.pipe()
    return stack.enter_context(os.fdopen(reader, "rb", 0)), stack.enter_context(os.fdopen(writer, "wb", 0))


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    """A temporary folder; what a program made of it (deep trees, closed folders) does not stop its removal."""
    folder = tempfile.mkdtemp(prefix="coda-eval-")
    try:
        yield folder
    finally:
        try:
            os.rmdir(folder)
        except OSError:
            subprocess.run(["chmod", "-R", "u+rwx", folder], check=False, stderr=subprocess.DEVNULL)
            subprocess.run(["rm", "-rf", folder], check=False, stderr=subprocess.DEVNULL)


def _job(
    program: Program, level: str, limits: Limits, folder: str, report_fd: int, setup_fd: int, tests_fd: int
) -> dict[str, Any]:
    """What the child is told. The candidate's process comes to know it: it holds no word of the tests."""
    binds, packages = _binds()
    if level == "rlimits" and os.geteuid() == 0 and not _capable():
        raise OSError("root that may not become another user would let programs own root's files")
    uid = FIRST_UID + (os.getpid() + next(_numbers)) % 2048 * 2 if _capable() else None
    if level in SHARED:
        packages = sorted({str(Path(source).parent) for source, target in binds if target.startswith("/packages")})
        if uid is not None:
            os.chown(folder, uid, uid)
    own = level not in SHARED or uid is not None
    there = any(target == "/packages/numpy" for _, target in binds)
    return {
        "candidate": str(program.candidate),
        "report_fd": report_fd,
        "setup_fd": setup_fd,
        "tests_fd": tests_fd,
        "user_namespace": uid is None,
        "shared": level in SHARED,
        "landlock": level == "landlock",
        "keep_imports": level in SHARED and uid is not None,
        "root": folder if level == "unshare" else None,
        "binds": binds,
        "scratch_bytes": SCRATCH_BYTES,
        "workdir": folder if level in SHARED else "/tmp",
        "packages": packages,
        "preload": "numpy" if there and "numpy" in program.candidate and "numpy" in program.tests else None,
        "uid": uid,
        "checker_uid": uid and uid + 1,
        "limits": {
            "RLIMIT_AS": limits.memory_bytes,
            "RLIMIT_FSIZE": limits.file_bytes,
            "RLIMIT_NOFILE": limits.open_files,
            "RLIMIT_NPROC": limits.processes + (2 if own else processes_of_user()),
            "RLIMIT_CORE": 0,
            "RLIMIT_CPU": int(program.timeout_s) + 5,
        },
    }


def _read_line(fd: int, watch: Watch) -> tuple[bytes, tuple[str, str] | None]:
    """Read up to the first newline or the end of the pipe, watching meanwhile: (bytes, what the watch ended it for)."""
    data = b""
    while b"\n" not in data and len(data) < _REPORT_BYTES:
        if select.select([fd], [], [], watch.pause_s)[0]:
            chunk = os.read(fd, 4096)
            if not chunk:
                break
            data += chunk
        elif trouble := watch.look():
            return data, trouble
    return data, None
