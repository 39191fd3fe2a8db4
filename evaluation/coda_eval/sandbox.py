"""Run untrusted Python programs and judge them from outside: walls, limits, a checker apart, many at once.

Three levels isolate, best first. `bubblewrap` (the `bwrap` program) and `unshare` (namespaces that the child
makes itself) show a program the standard library, numpy where installed, a small scratch folder, and nothing else: no
network, no other process, no file of the machine. `landlock`, for containers without namespaces, refuses the same to
a program that lives among the machine's processes and on its file system: it can learn that a path or a process exists
and a file's size and times, no more. `rlimits` limits what a program uses and refuses it sockets and signals to
others, but it reads, and as an ordinary user writes, the machine's files: it is never chosen unasked. At all levels a
filter refuses the system calls that no program needs (`sandbox_walls.py`). The level that ran is part of every
verdict.

Programs are forked from a process that waits inside the walls of its level, the zygote, so that none waits for an
interpreter. Below these walls each has namespaces, scratch folder, limits and, under root, users of its own (where
namespaces cannot be nested, a zygote serves one program). A zygote never holds a word of a program or a test, and all
processes of a program have ended before it forks for the next; what the programs of one zygote share is what its
interpreter began with, such as the seed of its hashes.

A candidate and its tests run in two processes (`sandbox_child.py`). The candidate's has no word of the tests, no file
or pipe but its line to the checker, and what crosses is plain data. What remains possible: to recognise the tests'
inputs and answer from a table; to answer differently from call to call; to be an object, where a test only asks for
the truth, the length, the items or the order of the candidate's own objects; to pass tests that compare a candidate
with itself; where the tests run in its process (`sandbox_unittest.py`), what stands there; and whatever a fault of the
kernel allows. Memory is looked at some twenty times a second, so a program may exceed its limit for that long; files
in the scratch folder come on top.

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
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, TypeVar

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
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

PACKAGES_VARIABLE = "CODA_EVAL_PACKAGES"
"""Environment variable with further packages that programs may import, by comma; what they require comes with them."""

FIRST_UID = 61184
"""First user id that programs take when the caller is root: the range that systemd gives to transient users, so that
no account owns it. Each program has its own, which makes the limit on processes a limit per program, also while the
kernel still takes a fork bomb down."""

PRELOADED = ("collections", "heapq", "itertools", "math", "re", "typing")
"""Modules of the standard library that programs often import: a zygote has them before it forks."""

_CHILD = [f"sandbox_{name}" for name in ("values", "line", "walls", "candidate", "checker", "child")]
"""Modules of the process inside the sandbox, each after those that it imports; the last one has `main`."""

START_S = 180.0
"""What a zygote may take to answer, in seconds."""

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

    host: str = ""
    """Source that runs in the candidate's place and has it as the text `PROGRAM`: for programs that are not called."""

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
        # Those that may take longest begin first, so that none of them runs on alone at the end.
        first = sorted(range(len(programs)), key=lambda place: -programs[place].timeout_s)
        futures = {place: bench.submit(lambda place=place: programs[place]) for place in first}
        verdicts = []
        for place in range(len(programs)):
            verdicts.append(futures[place].result()[1])
            progress.update()
    for place, verdict in enumerate(verdicts):
        if verdict.status == "near":  # the machine was too busy to tell
            with _Zygotes(level) as zygotes:
                again = _run_surely(programs[place], zygotes, limits)
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
        self._zygotes, self._limits = _Zygotes(level), limits or Limits()
        self._pool, self._gate = ThreadPoolExecutor(workers), _Gate(workers)

    def submit(self, build: Callable[[], Program]) -> Future[tuple[Program, Verdict]]:
        """The program that `build` gives and the verdict on it: `near` where the machine was too busy to tell."""
        return self._pool.submit(self._gate.run, self._judge, build)

    def _judge(self, build: Callable[[], Program]) -> tuple[Program, Verdict]:
        program = build()
        return program, _run_surely(program, self._zygotes, self._limits)

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for the programs that run; those that do not yet are left out."""
        self._gate.closed = True
        self._pool.shutdown(cancel_futures=True)
        self._zygotes.__exit__()


class _Gate:
    """Lets fewer programs run at once while others use the machine, but always one."""

    def __init__(self, workers: int) -> None:
        self.workers, self.running, self.lock = workers, 0, threading.Lock()
        self.closed = False
        """Whether those that wait are turned away."""

    def run(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Call `function` once there is room.

        Raises:
            CancelledError: it was closed before.
        """
        while not self._enter():
            if self.closed:
                raise CancelledError
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


def _run_surely(program: Program, zygotes: "_Zygotes", limits: Limits) -> Verdict:
    """`_run`, three times if the sandbox could not be built."""
    for wait in (0.5, 2.0, None):
        try:
            return _run(program, zygotes, limits)
        except OSError as error:
            if wait is None:
                logger.error("a program could not be judged: %s", error)
                label = isolation_label(zygotes.level)
                return Verdict(status="unjudged", error=str(error), seconds=0.0, isolation=label)
            time.sleep(wait)
    raise AssertionError("unreachable")


def _probe(level: str) -> bool:
    """Whether `level` works here, found by running a program once per process."""
    if level not in _probe.reasons:
        for lasting in (True, False):  # a container may allow the walls of a zygote, and none below them
            _Zygotes.lasting[level] = lasting
            try:
                with _Zygotes(level) as zygotes:
                    verdict = _run(Program(candidate="", tests=""), zygotes, Limits())
                _probe.reasons[level] = "" if verdict.passed else f"{verdict.status}: {verdict.error}"
            except OSError as error:
                _probe.reasons[level] = str(error)
            if not _probe.reasons[level]:
                break
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
    for name in [*PACKAGES, *further_packages()]:
        spec = find_spec(name)
        if spec is not None and not spec.submodule_search_locations and spec.has_location:
            binds[spec.origin] = f"/packages/{Path(spec.origin).name}"  # a module of one file
        elif spec is not None and spec.submodule_search_locations:
            folder = Path(next(iter(spec.submodule_search_locations)))
            for source in (folder, folder.with_name(f"{name}.libs")):  # wheels keep their shared libraries beside
                if source.is_dir():
                    binds[str(source)] = f"/packages/{source.name}"
    return list(binds.items()), ["/packages"]


def further_packages() -> list[str]:
    """The packages that the environment asks for and all that they require, by the names they are imported by.

    Raises:
        UserError: one is not installed.
    """
    asked = [name.strip() for name in os.environ.get(PACKAGES_VARIABLE, "").split(",") if name.strip()]
    if missing := [name for name in asked if not name.isidentifier() or find_spec(name) is None]:
        raise UserError(f"{PACKAGES_VARIABLE} names {', '.join(missing)}: not installed here")
    providers = metadata.packages_distributions() if asked else {}
    modules: dict[str, list[str]] = {}
    for module, distributions in providers.items():
        for distribution in distributions:
            modules.setdefault(canonicalize_name(distribution), []).append(module)
    found, to_see = dict.fromkeys(asked), list(asked)
    while to_see:
        for distribution in providers.get(to_see.pop(), ()):
            for line in metadata.requires(distribution) or ():
                required = Requirement(line)
                if required.marker is None or required.marker.evaluate({"extra": ""}):
                    fresh = [name for name in modules.get(canonicalize_name(required.name), ()) if name not in found]
                    found |= dict.fromkeys(fresh)
                    to_see += fresh
    return [name for name in found if name.isidentifier()]


def _site_folders() -> list[str]:
    """Folders inside the bound standard library that hold third-party packages: they are covered by empty ones."""
    stdlib = Path(os.path.realpath(sysconfig.get_path("stdlib")))
    places = [stdlib / "site-packages", stdlib / "dist-packages", Path("/usr/lib/python3/dist-packages")]
    return [str(path) for path in places if path.is_dir()]


def _command(level: str, lasting: bool) -> list[str]:
    """The command line that starts a zygote inside the walls of its level."""
    child = [os.path.realpath(sys.executable), "-I", "-S", "-B", "-c", _START]
    root = _capable()
    if level != "bubblewrap":
        return child
    tool = shutil.which("bwrap")
    if tool is None:
        raise FileNotFoundError("bwrap is not on PATH")
    command = [tool, "--unshare-net", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--die-with-parent"]
    # Root builds the walls as root and lets the child become a user of its own; others need a user namespace.
    kept = (["CAP_SETUID", "CAP_SETGID"] if root else []) + (["CAP_SYS_ADMIN"] if lasting else [])
    command += ["--cap-drop", "ALL", *itertools.chain.from_iterable(("--cap-add", name) for name in kept)]
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
module.serve(marshal.load(file))"""


@functools.cache
def _child_code() -> bytes:
    """The modules of the child, compiled once: the same interpreter reads them."""
    paths = [Path(__file__).with_name(f"{name}.py") for name in _CHILD]
    return marshal.dumps([(path.stem, compile(path.read_text(encoding="utf-8"), path.name, "exec")) for path in paths])


class _Zygote:
    """A process that holds an interpreter inside the walls of its level and forks for one program after the other.

    Args:
        level: one of `LEVELS`.
        lasting: whether each program gets namespaces of its own below those of the zygote; else it serves one only.
        preload: modules that it imports first.

    Raises:
        OSError: it could not be started.
    """

    def __init__(self, level: str, lasting: bool, preload: tuple[str, ...]) -> None:
        if not os.path.exists(f"/proc/self/task/{os.getpid()}/children"):
            raise OSError("the kernel does not say which children a process has (CONFIG_PROC_CHILDREN)")
        self.level, self.lasting, self.preload = level, lasting, preload
        self.free = True
        """Whether it can take another program."""
        with contextlib.ExitStack() as stack:
            stdin, self._stderr = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(2))
            self._control, theirs = socket.socketpair()
            stack.enter_context(theirs)
            self._control.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)  # names the forks, see `start`
            self._control.settimeout(START_S)
            root = stack.enter_context(_folder()) if level == "unshare" else None  # mounted on out of our sight
            stdin.write(_child_code() + marshal.dumps(self._walls(theirs.fileno(), root)))
            stdin.seek(0)
            environment = {
                "PATH": "/usr/bin:/bin",
                "HOME": "/tmp",
                "TMPDIR": "/tmp",
                "LANG": "C.UTF-8",
                "USER": "candidate",  # no file of users knows the one that it runs as
                "OPENBLAS_NUM_THREADS": "1",
                "OMP_NUM_THREADS": "1",
                "CODA_EVAL_PID": str(os.getpid()),
            }
            try:
                self._process = subprocess.Popen(
                    _command(level, self.lasting),
                    stdin=stdin,
                    stdout=subprocess.DEVNULL,
                    stderr=self._stderr,
                    pass_fds=(theirs.fileno(),),
                    env=environment,
                    start_new_session=True,
                )
            except OSError:
                self._control.close()
                raise
            theirs.close()
            self._building = stack.pop_all()

    def wait_for_walls(self) -> None:
        """Return once they stand.

        Raises:
            OSError: they could not be built.
        """
        with self._building:
            try:
                said = self._control.recv(1000)
            except TimeoutError:
                said = b"not in time"
            if said != b"ready":
                self.close()
                self._stderr.seek(0)
                reasons = [text.decode("utf-8", "replace").strip() for text in (said, self._stderr.read(500))]
                reason = "; ".join(filter(None, reasons)) or f"exit status {self._process.returncode}"
                raise OSError(f"the {self.level} sandbox could not be built: {reason}")

    def _walls(self, control_fd: int, root: str | None) -> dict[str, Any]:
        """What all programs share."""
        binds, packages = _binds()
        if self.level in SHARED:
            packages = sorted({str(Path(source).parent) for source, target in binds if target.startswith("/packages")})
        return {
            "control_fd": control_fd,
            "lasting": self.lasting,
            "nested": self.lasting and self.level not in SHARED,
            "user_namespace": not _capable(),
            "shared": self.level in SHARED,
            "landlock": self.level == "landlock",
            "keep_imports": self.level in SHARED and _capable(),
            "root": root,
            "binds": binds,
            "scratch_bytes": SCRATCH_BYTES,
            "packages": packages,
            "preload": self.preload,
        }

    def start(self, *descriptors: int) -> int:
        """Have it fork for a program: the id of the fork, which stays taken until `end`.

        Raises:
            OSError: it does not.
        """
        self.free = False
        socket.send_fds(self._control, [b"."], descriptors)
        said, ancillary, _, _ = self._control.recvmsg(1, socket.CMSG_SPACE(_CREDENTIALS.size))
        if said != b"!":
            raise OSError("the process that makes processes for programs has ended")
        return _CREDENTIALS.unpack(ancillary[0][2])[0]

    def end(self) -> str:
        """Give back the id of a fork that was killed: its exit status, unless the zygote has ended."""
        if not self.lasting:  # a program of the same user may have stopped it
            self._control.settimeout(1.0)
        try:
            self._control.sendall(b".")
            status = self._control.recv(16).decode("ascii")
        except OSError:
            status = ""
        self.free = self.lasting and bool(status)
        return status

    def close(self) -> None:
        """End it, and all that comes from it."""
        self._control.close()
        try:
            self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            kill(self._process.pid)
            self._process.wait()


_CREDENTIALS = struct.Struct("3i")
"""Process, user and group id, as the kernel says them with a message."""


class _Zygotes:
    """The zygotes of a level: one for each program that runs at once and each choice of modules, made when needed."""

    lasting: ClassVar[dict[str, bool]] = {}
    """Whether zygotes of a level serve one program after the other, as found by trying."""

    def __init__(self, level: str) -> None:
        self.level = level
        self._idle: dict[tuple[str, ...], list[_Zygote]] = defaultdict(list)
        self._maker = ThreadPoolExecutor(1)
        """Lives as long as they do: the kernel ends a process with the thread that made it."""

    @contextlib.contextmanager
    def one(self, preload: tuple[str, ...]) -> Iterator[_Zygote]:
        """A zygote that nobody else uses meanwhile.

        Raises:
            OSError: none could be made.
        """
        try:
            zygote = self._idle[preload].pop()
        except IndexError:
            lasting = self.lasting.get(self.level, True)
            zygote = self._maker.submit(_Zygote, self.level, lasting, preload).result()
            zygote.wait_for_walls()  # while the maker makes the next one
        try:
            yield zygote
        finally:
            if zygote.free:
                self._idle[preload].append(zygote)
            else:
                zygote.close()

    def __enter__(self) -> "_Zygotes":
        return self

    def __exit__(self, *_: object) -> None:
        for zygote in itertools.chain.from_iterable(self._idle.values()):
            zygote.close()
        self._maker.shutdown()


def _run(program: Program, zygotes: _Zygotes, limits: Limits) -> Verdict:
    """Start the program, watch it until its report or a limit, and leave no process behind.

    Raises:
        OSError: the sandbox could not be built; nothing of the program ran.
    """
    started = time.monotonic()
    level, there = zygotes.level, any(target == "/packages/numpy" for _, target in _binds()[0])
    uses_numpy = there and any("numpy" in text for text in (program.candidate, program.setup, program.tests))
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(_folder()) if level in SHARED else None
        job, tests = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(2))
        (reader, writer), (setup_reader, setup_writer) = _pipe(stack), _pipe(stack)
        job.write(marshal.dumps(_job(program, level, limits, folder)))
        tests.write(marshal.dumps((str(program.setup), str(program.tests), tuple(map(str, program.called)))))
        for file in (job, tests):
            file.seek(0)
        zygote = stack.enter_context(zygotes.one((*PRELOADED, "numpy") if uses_numpy else PRELOADED))
        pid = zygote.start(*(file.fileno() for file in (job, tests, writer, setup_writer)))
        watch = Watch(pid, program.timeout_s, limits, folder)
        try:
            writer.close()
            setup_writer.close()
            ready, trouble = _read_line(setup_reader.fileno(), watch)
            line = b""
            if ready == b"ready\n":
                line, trouble = _read_line(reader.fileno(), watch)
        finally:
            kill(pid)
            ended = zygote.end()
        if ready != b"ready\n" and not (trouble and trouble[0] == "near"):
            reason = ready.decode("ascii", "replace").strip() or f"exit status {ended or 'unknown'}"
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
            if not os.path.islink(folder):  # chmod would follow what a program of `rlimits` put there
                subprocess.run(["chmod", "-R", "u+rwx", folder], check=False, stderr=subprocess.DEVNULL)
            subprocess.run(["rm", "-rf", folder], check=False, stderr=subprocess.DEVNULL)


def _job(program: Program, level: str, limits: Limits, folder: str | None) -> dict[str, Any]:
    """What the child is told. The candidate's process comes to know it: it holds no word of the tests."""
    if level == "rlimits" and os.geteuid() == 0 and not _capable():
        raise OSError("root that may not become another user would let programs own root's files")
    uid = FIRST_UID + (os.getpid() + next(_numbers)) % 2048 * 2 if _capable() else None
    if folder is not None and uid is not None:
        os.chown(folder, uid, uid)
    # What else counts where the user is the same: bwrap's first process, zygote, its fork and the checker.
    own = 2 if uid is not None else {"bubblewrap": 4, "unshare": 3}.get(level)
    return {
        "candidate": str(program.candidate),
        "host": str(program.host),
        "workdir": folder or "/tmp",
        "uid": uid,
        "checker_uid": uid and uid + 1,
        "limits": {
            "RLIMIT_AS": limits.memory_bytes,
            "RLIMIT_FSIZE": limits.file_bytes,
            "RLIMIT_NOFILE": limits.open_files,
            "RLIMIT_NPROC": limits.processes + (own or 2 + processes_of_user()),
            "RLIMIT_CPU": int(program.timeout_s) + 5,
            "RLIMIT_CORE": 0,
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
