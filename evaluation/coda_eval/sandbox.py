"""Run untrusted Python programs: namespaces, resource limits, a private verdict pipe, many at once.

Two levels isolate, best first: ``bubblewrap`` (the ``bwrap`` program) and ``unshare`` (namespaces that the child makes
itself). They show a program the standard library, numpy where installed, a small scratch folder, and nothing else: no
network, no other process, no file of the machine. ``rlimits`` limits what a program uses but neither hides the machine
nor cuts the network: it is never chosen unasked. The level that ran is part of every verdict.

Not here: what a program consists of (``programs.py``).
"""

import functools
import itertools
import json
import logging
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

logger = logging.getLogger(__name__)

LEVELS = ("bubblewrap", "unshare", "rlimits")
"""Isolation levels, best first."""

ISOLATED = ("bubblewrap", "unshare")
"""Levels that ``auto`` may choose: a program there reaches nothing of the machine."""

PACKAGES = ("numpy",)
"""Packages outside the standard library that programs may import (the MBPP+ tests need them)."""

FIRST_UID = 61184
"""First user id that programs take when the caller is root: the range that systemd gives to transient users, so that
no account owns it. Each program has its own, which makes the limit on processes a limit per program, also while the
kernel still takes a fork bomb down."""

_CHILD = Path(__file__).with_name("sandbox_child.py")
_SCRATCH_BYTES = 64 << 20
_REPORT_BYTES = 1 << 16
_numbers = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Program:
    """A candidate and the tests it must survive, both Python source, run one after the other in one namespace."""

    candidate: str
    tests: str
    timeout_s: float = 20.0
    """Wall-clock limit in seconds, the start of the interpreter included."""

    def __post_init__(self) -> None:
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s must be positive, got {self.timeout_s}")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program may use."""

    memory_bytes: int = 4 << 30
    """Address space of each process; the tests of Mbpp/255 in MBPP+ need more than half of it."""

    file_bytes: int = 32 << 20
    """Size of any file that is written."""

    open_files: int = 128
    processes: int = 32
    """Processes and threads at once."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of one program."""

    status: str
    """passed, failed (an exception), exited (left early), memory, timeout, or killed (died without a word)."""

    error: str
    seconds: float
    isolation: str

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
    """The level to use: the best of ``ISOLATED`` that works here, or the requested one.

    Args:
        requested: ``auto`` or one of ``LEVELS``.

    Raises:
        ValueError: the name is unknown, or that level (for ``auto``: every level that isolates) does not work here.
    """
    if requested not in ("auto", *LEVELS):
        raise ValueError(f"the sandbox level must be auto, {', '.join(LEVELS)}; got {requested!r}")
    tried = ISOLATED if requested == "auto" else (requested,)
    for level in tried:
        if _probe(level):
            return level
    reasons = "; ".join(f"{level}: {_probe.reasons[level]}" for level in tried)
    if requested == "auto":
        raise ValueError(
            f"no sandbox level that isolates works on this machine ({reasons}). Install bubblewrap or allow user "
            "namespaces; or ask for the level rlimits by name, which does not isolate and is recorded as such"
        )
    raise ValueError(f"sandbox level {requested!r} does not work on this machine: {reasons}")


def run_programs(
    programs: Sequence[Program], *, level: str = "auto", workers: int | None = None, limits: Limits | None = None
) -> list[Verdict]:
    """Run every program in its own sandbox and interpreter, several at once, and judge each.

    Nothing that a program does raises here. A sandbox that cannot be built although the level works (the machine is
    out of processes, say) is tried again; what then still cannot be judged has the status ``unjudged``.

    Args:
        programs: what to run; order is kept.
        level: ``auto`` or one of ``LEVELS``.
        workers: programs at once; by default one per core.
        limits: resource limits of each program.

    Raises:
        ValueError: the level is unknown or does not work here.
    """
    level = isolation_level(level)
    workers = workers or default_workers()
    limits = limits or Limits()
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda program: _run_surely(program, level, limits), programs))


def _run_surely(program: Program, level: str, limits: Limits) -> Verdict:
    """``_run``, three times if the sandbox could not be built."""
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
    """Whether ``level`` works here, found by running a program once per process."""
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
    paths = ["/usr/lib", "/usr/lib64", "/usr/lib32", "/lib", "/lib64", "/etc/ld.so.cache", python, stdlib]
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
    child = [os.path.realpath(sys.executable), "-I", "-S", "-B", "-c", _child_source()]
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
    command += ["--dev", "/dev", "--remount-ro", "/dev", "--perms", "1777", "--size", str(_SCRATCH_BYTES)]
    return [*command, "--tmpfs", "/tmp", "--remount-ro", "/", *child]


@functools.cache
def _child_source() -> str:
    return _CHILD.read_text(encoding="utf-8")


def _run(program: Program, level: str, limits: Limits) -> Verdict:
    """Start the child, wait for its report or the deadline, and leave no process behind."""
    nonce, started = secrets.token_hex(16), time.monotonic()
    binds, packages = _binds()
    with (
        tempfile.TemporaryDirectory(prefix="coda-eval-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as stdin,
        tempfile.TemporaryFile() as stderr,
    ):
        uid = FIRST_UID + (os.getpid() + next(_numbers)) % 4096 if _capable() else None
        if level == "rlimits":
            packages = sorted({str(Path(source).parent) for source, target in binds if target.startswith("/packages")})
            if uid is not None:
                os.chown(folder, uid, uid)
        reader, writer = os.pipe()
        setup_reader, setup_writer = os.pipe()
        job = {
            "candidate": program.candidate,
            "tests": program.tests,
            "nonce": nonce,
            "report_fd": writer,
            "setup_fd": setup_writer,
            "user_namespace": uid is None,
            "shared": level == "rlimits",
            "keep_imports": level == "rlimits" and uid is not None,
            "root": folder if level == "unshare" else None,
            "binds": binds,
            "scratch_bytes": _SCRATCH_BYTES,
            "workdir": folder if level == "rlimits" else "/tmp",
            "packages": packages,
            "uid": uid,
            "limits": {
                "RLIMIT_AS": limits.memory_bytes,
                "RLIMIT_FSIZE": limits.file_bytes,
                "RLIMIT_NOFILE": limits.open_files,
                "RLIMIT_NPROC": limits.processes + (0 if level != "rlimits" or uid else _processes_of_user()),
                "RLIMIT_CORE": 0,
                "RLIMIT_CPU": int(program.timeout_s) + 2,
            },
        }
        stdin.write(json.dumps(job).encode("ascii"))
        stdin.seek(0)
        environment = {
            "PATH": "/usr/bin:/bin",
            "HOME": "/tmp",
            "LANG": "C.UTF-8",
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "CODA_EVAL_PID": str(os.getpid()),
        }
        with os.fdopen(reader, "rb", buffering=0) as pipe, os.fdopen(setup_reader, "rb", buffering=0) as setup:
            try:
                process = subprocess.Popen(
                    _command(level),
                    stdin=stdin,
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    pass_fds=(writer, setup_writer),
                    env=environment,
                    start_new_session=True,
                )
            finally:
                os.close(writer)
                os.close(setup_writer)
            try:
                ready, late = _read_report(setup.fileno(), started + program.timeout_s)
                line, timed_out = b"", True
                if ready == b"ready\n":
                    line, timed_out = _read_report(pipe.fileno(), started + program.timeout_s)
            finally:
                _kill(process)
        if ready != b"ready\n":
            stderr.seek(0)
            reasons = [ready.decode("ascii", "replace").strip(), stderr.read(500).decode("utf-8", "replace").strip()]
            reason = "; ".join(filter(None, reasons)) or f"exit status {process.returncode}"
            raise OSError(f"the {level} sandbox could not be built{' in time' if late else ''}: {reason}")
        return _judge(line, timed_out, nonce, process, program, level, time.monotonic() - started)


def _read_report(fd: int, deadline: float) -> tuple[bytes, bool]:
    """Read up to the first newline, the end of the pipe, the size limit or the deadline: (bytes, timed out)."""
    data = b""
    while b"\n" not in data and len(data) < _REPORT_BYTES:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([fd], [], [], left)[0]:
            return data, True
        chunk = os.read(fd, 4096)
        if not chunk:
            break
        data += chunk
    return data, False


def _judge(
    line: bytes, timed_out: bool, nonce: str, process: subprocess.Popen, program: Program, level: str, seconds: float
) -> Verdict:
    """Turn a report into a verdict; only the right nonce is a pass."""

    def verdict(status: str, error: str) -> Verdict:
        return Verdict(status=status, error=error, seconds=round(seconds, 4), isolation=isolation_label(level))

    if timed_out:
        return verdict("timeout", f"no verdict after {program.timeout_s:g} s")
    if not line.endswith(b"\n"):
        return verdict("killed", f"ended without a verdict (exit status {process.returncode})")
    # Whatever the program wrote: three words of bytes, of which nothing but the nonce is believed.
    status, given, error = (*line.split(b"\n")[0].split(b" ", 2), b"", b"")[:3]
    if status == b"passed" and secrets.compare_digest(given, nonce.encode()):
        return verdict("passed", "")
    text = error.decode("ascii", "replace")[:500]
    if status in (b"failed", b"exited", b"memory"):
        return verdict(status.decode("ascii"), text)
    return verdict("failed", "the verdict was forged")


def _kill(process: subprocess.Popen) -> None:
    """End whatever the program started, then the process that waits for it all, and collect it.

    The descendants go first: orphans stay below the waiting process (the first of a PID namespace, or a subreaper) as
    long as that lives.
    """
    while left := _descendants(process.pid):
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
    process.kill()
    process.wait()


def _descendants(pid: int) -> list[int]:
    """Living processes below ``pid``."""
    found, to_see = [], [pid]
    while to_see:
        parent = to_see.pop()
        try:
            for thread in os.listdir(f"/proc/{parent}/task"):
                children = Path(f"/proc/{parent}/task/{thread}/children").read_text(encoding="ascii").split()
                to_see += [int(child) for child in children]
            state = Path(f"/proc/{parent}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
        except (FileNotFoundError, ProcessLookupError):
            continue  # gone meanwhile
        if parent != pid and state.split()[0] not in "ZX":
            found.append(parent)
    return found


def _processes_of_user() -> int:
    """How many processes and threads this user has: the kernel's limit counts them all where it is not namespaced."""
    count = 0
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and entry.stat().st_uid == os.getuid():
                count += len(os.listdir(entry / "task"))
        except OSError:
            continue
    return count
