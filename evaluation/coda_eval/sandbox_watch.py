"""What the processes of a program use, looked at from outside: memory, time, files; and their end.

Not here: what is done about it (`sandbox.py`).
"""

import contextlib
import functools
import os
import signal
import stat
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SCRATCH_BYTES = 64 << 20
SCRATCH_FILES = 4096

WALL_FACTOR, WALL_S = 8, 30
"""A program that waits for a processor gets this many times its limit, and these seconds more, by the clock; then it
is run again alone."""


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


class Watch:
    """Adds up what all processes of a program use, and says when it is too much.

    Time counts as processor time of all processes plus the time in which none of them could run (a program that
    sleeps), so that a busy machine takes nothing from a program. Memory is the sum of proportional set sizes, shared
    memory included, and what the program's sockets can hold; other memory that belongs to no process (memory files,
    segments) is refused to programs.
    """

    def __init__(self, pid: int, timeout_s: float, limits: Limits, folder: str | None) -> None:
        self.pid, self.timeout_s, self.limits, self.folder = pid, timeout_s, limits, folder
        self.cpu_s = self.idle_s = 0.0
        self.pause_s = 0.02
        self.started = self.seen = time.monotonic()

    def look(self) -> tuple[str, str] | None:
        """(status, error) once the program has used too much."""
        before = time.monotonic()
        ticks = pages = threads = 0
        could_run = False
        pids = _tree(self.pid)
        for pid, states in pids.items():
            try:
                text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
            except OSError:
                continue  # gone meanwhile
            fields = text.rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15]))  # utime, stime, and those of children waited for
            pages += int(fields[21])  # resident, also where they are shared
            threads += len(states)
            could_run |= any(state in "RD" for state in states)
        cpu_s = ticks / os.sysconf("SC_CLK_TCK")
        if not could_run and cpu_s <= self.cpu_s:
            self.idle_s += before - self.seen
        self.cpu_s, self.seen = max(self.cpu_s, cpu_s), before
        limit = self.timeout_s
        most = pages * os.sysconf("SC_PAGE_SIZE")
        most += len(pids) * (self.limits.open_files * _socket_bytes() + _uncounted_bytes())
        # What is shared counts once, which takes long to find out and stops the program meanwhile: only where all of it
        # together is more than the limit.
        over = most > self.limits.memory_bytes and _memory_of(pids) > self.limits.memory_bytes
        took = time.monotonic() - before
        self.pause_s = max(took, 0.05)
        if over:
            return "memory", f"more than {self.limits.memory_bytes >> 20} MB in all processes"
        if threads > self.limits.processes + 8:
            return "killed", f"more than {self.limits.processes} processes"
        if self.cpu_s + self.idle_s > limit:
            return (
                "timeout",
                f"no verdict after {limit:g} s (processor {self.cpu_s:.1f}, waiting {self.idle_s:.1f})",
            )
        if before - self.started > WALL_FACTOR * limit + WALL_S:
            return "near", f"no verdict after {before - self.started:.0f} s, of which {self.cpu_s:.1f} s on a processor"
        return self.look_at_files(pids)

    def look_at_files(self, pids: Iterable[int] = ()) -> tuple[str, str] | None:
        """(status, error) once the scratch folder is too large: its files take memory that belongs to no process."""
        if not (_small(self.folder, pids) if self.folder else all(map(_few_files, pids))):
            return "memory", f"more than {SCRATCH_BYTES >> 20} MB or {SCRATCH_FILES} entries in the scratch folder"
        return None


def _small(folder: str, pids: Iterable[int]) -> bool:
    """Whether a folder, and what was removed from it but is still open, keep to the size of a scratch folder."""
    sizes: dict[int, int] = {}
    entries = 0
    for place, folders, files in os.walk(folder):
        entries += len(folders) + len(files)
        if entries > SCRATCH_FILES:
            return False
        for name in files:
            with contextlib.suppress(OSError):  # gone meanwhile
                found = os.lstat(os.path.join(place, name))
                sizes[found.st_ino] = found.st_blocks
    for pid in pids:
        with contextlib.suppress(OSError):  # gone meanwhile, or the checker, which hides itself
            for entry in os.scandir(f"/proc/{pid}/fd"):
                found = entry.stat()
                if stat.S_ISREG(found.st_mode) and found.st_nlink == 0:
                    sizes[found.st_ino] = found.st_blocks
    return sum(sizes.values()) * 512 <= SCRATCH_BYTES


def _sockets_of(pid: int) -> set[str]:
    """Names of the sockets that a process holds."""
    found = set()
    with contextlib.suppress(PermissionError):  # the checker hides itself, and has none
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                name = os.readlink(entry.path)
                found |= {name} if name.startswith("socket:") else set()
    return found


@functools.cache
def _socket_bytes() -> int:
    """What a socket can hold for its other end, in bytes of kernel memory; programs may not change it."""
    return int(Path("/proc/sys/net/core/wmem_default").read_text(encoding="ascii"))


@functools.cache
def _uncounted_bytes() -> int:
    """Memory of a process that the kernel's count of its resident pages can leave out, in bytes.

    Each processor keeps back up to a batch of each of the four counters (``lib/percpu_counter.c``); before Linux 6.2
    it was up to 64 pages of each thread.
    """
    processors = os.cpu_count() or 1
    return 4 * processors * max(64, 2 * processors) * os.sysconf("SC_PAGE_SIZE")


def _few_files(pid: int) -> bool:
    """Whether a process with a root of its own has few entries in its scratch folder; its size is the mount's."""
    root = f"/proc/{pid}/root"
    with contextlib.suppress(OSError):  # gone meanwhile, or the checker, which hides itself
        if not os.path.samestat(os.stat(root), os.stat("/")):
            found = os.statvfs(f"{root}/tmp")
            return found.f_files - found.f_ffree <= SCRATCH_FILES
    return True


def _memory_of(pids: Iterable[int]) -> int:
    """Bytes of memory that processes answer for, shared memory once, and what their sockets can hold."""
    memory, sockets = 0, set()
    for pid in pids:
        with contextlib.suppress(OSError):  # gone meanwhile
            memory += _share_of(pid)
            sockets |= _sockets_of(pid)
    return memory + len(sockets) * _socket_bytes()


def _share_of(pid: int) -> int:
    """Bytes of memory that a process answers for: its proportional share, or all it maps where that is hidden."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    except OSError:  # another user's, or a process that hides itself
        kinds = ("RssAnon:", "RssShmem:")
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines()
        return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(kinds))
    return 0


def kill(root: int) -> None:
    """End whatever a program started, then the process `root` that waits for it all, which its parent collects.

    The descendants go first: orphans stay below the waiting process (the first of a PID namespace, or a subreaper) as
    long as that lives.
    """
    empty = 0
    while empty < 3:  # one look can miss a process whose parent ends meanwhile
        left = [pid for pid, states in _tree(root).items() if pid != root and set(states) - set("ZX")]
        empty = 0 if left else empty + 1
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if left:  # to end takes them a processor, which looking again would take from them
            time.sleep(0.0005)
    with contextlib.suppress(ProcessLookupError):
        os.kill(root, signal.SIGKILL)


def _tree(pid: int) -> dict[int, list[str]]:
    """The process `pid` and all below it, each with the states of its threads."""
    found, to_see = {}, [pid]
    while to_see:
        parent = to_see.pop()
        try:
            states = []
            for thread in os.listdir(f"/proc/{parent}/task"):  # open, not Path: this runs a dozen times per program
                with open(f"/proc/{parent}/task/{thread}/children", "rb") as file:
                    to_see += map(int, file.read().split())
                with open(f"/proc/{parent}/task/{thread}/stat", "rb") as file:
                    states.append(file.read().rpartition(b")")[2].split()[0].decode("ascii"))
            found[parent] = states
        except OSError:
            continue  # gone meanwhile
    return found


def processes_of_user() -> int:
    """How many processes and threads this user has: the kernel's limit counts them all where it is not namespaced."""
    count = 0
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and entry.stat().st_uid == os.getuid():
                count += len(os.listdir(entry / "task"))
        except OSError:
            continue
    return count
