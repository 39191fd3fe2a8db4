"""The processes inside the sandbox: walls first, then a candidate and, apart from it, the checker that runs the tests.

It runs as `python -I -S -B -c` with its code and a job on standard input and must import nothing but the standard
library and the other files of the sandbox, which come with it. What is deliberately not here: starting, timing and
judging (`sandbox.py`).

One process builds the walls (`sandbox_walls`) and forks. The child becomes the candidate (`sandbox_candidate`), the
parent the checker (`sandbox_checker`), which has tests and report pipe; both hold an end of the line between them
(`sandbox_line`).
"""

import os
import signal
import sys

from sandbox_candidate import become_candidate
from sandbox_checker import Client, check, collect
from sandbox_line import Line
from sandbox_walls import (
    build_root,
    call,
    close_files,
    complain,
    die_with_parent,
    drop_privileges,
    enter_namespaces,
    keep_imports,
    refuse_system_calls,
    set_limits,
)


def end_descendants(*_):
    """End every process below this one, then this one: what a killed evaluator can no longer do."""
    empty = 0
    while empty < 3:  # one look can miss a process whose parent ends meanwhile
        collect()
        found, to_see = 0, [os.getpid()]
        while to_see:
            parent = to_see.pop()
            try:
                for thread in os.listdir(f"/proc/{parent}/task"):
                    with open(f"/proc/{parent}/task/{thread}/children", "rb") as file:
                        to_see += map(int, file.read().split())
                if parent != os.getpid():
                    os.kill(parent, signal.SIGKILL)
                    found += 1
            except OSError:
                continue  # gone meanwhile
        empty = 0 if found else empty + 1
    os._exit(0)


def wait_for_the_end():
    """Collect what ends until this process is killed."""
    signal.signal(signal.SIGCHLD, collect)
    collect()
    while True:
        signal.pause()


def main(job):
    """Build the walls that the job asks for, say on the set-up pipe that they stand, run and report."""
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    report_fd, setup_fd, tests_fd = job.pop("report_fd"), job.pop("setup_fd"), job.pop("tests_fd")
    os.umask(0o022)
    try:
        if job["root"]:
            enter_namespaces(job["user_namespace"])
            if os.fork():  # stays outside to wait; dies with the evaluator, and its child with it
                die_with_parent()
                for fd in (setup_fd, report_fd, tests_fd):
                    os.close(fd)
                wait_for_the_end()
            die_with_parent()
            build_root(job["root"], job["binds"], job["scratch_bytes"])
        if job["shared"]:
            call("prctl", 36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: what the program leaves behind stays findable
            if os.fork():  # below this process, which lives until the evaluator has ended all the others
                signal.signal(signal.SIGTERM, end_descendants)
                die_with_parent(signal.SIGTERM)
                for fd in (setup_fd, report_fd, tests_fd):
                    os.close(fd)
                wait_for_the_end()
        sys.path[:] = [path for path in sys.path if "site-packages" not in path] + job["packages"]
        job["kept"] = keep_imports([path for path in sys.path if os.path.isdir(path)]) if job["keep_imports"] else []
        if job["landlock"]:
            devices = [f"/dev/{name}" for name in ("null", "zero", "random", "urandom")]
            close_files([source for source, _ in job["binds"]] + devices, job["packages"], job["workdir"])
        if job["preload"]:
            __import__(job["preload"])
        signal.signal(signal.SIGCHLD, collect)
        call("prctl", 4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: processes of the same user neither trace nor read this one
        (requests, asked), (answers, answered), (gate_reader, gate) = os.pipe(), os.pipe(), os.pipe()
        if not os.fork():
            become_candidate(job, Line(requests, answered), setup_fd, gate)
        for fd in (requests, answered, gate):
            os.close(fd)
        del job["candidate"]
        os.chdir("/")
        set_limits({name: value for name, value in job["limits"].items() if name != "RLIMIT_NPROC"})
        drop_privileges(job["checker_uid"])
        die_with_parent()
        refuse_system_calls(None)
        stands = os.read(gate_reader, 1) == b"!"
    except (OSError, ImportError) as error:
        complain(setup_fd, error)
    if not stands:  # the candidate's process has said why
        os._exit(1)
    os.write(setup_fd, b"ready\n")
    os.close(setup_fd)  # nothing the candidate does looks like a fault of the sandbox: it never had this pipe
    status, error = check(Client(Line(answers, asked)), tests_fd)
    line = f"{status} {error}".encode("ascii", "backslashreplace")[:2000]
    os.write(report_fd, line.replace(b"\n", b"\\n") + b"\n")
    wait_for_the_end()
