"""The processes inside the sandbox: walls first, then a candidate and, apart from it, the checker that runs the tests.

It runs as `python -I -S -B -c` with its code on standard input and must import nothing but the standard library, what
it preloads, and the other files of the sandbox, which come with it. What is deliberately not here: starting, timing
and judging (`sandbox.py`).

The first process (`serve`) builds the walls that all programs share and stays: it forks for each program, so that none
waits for an interpreter. It never holds a word of a program or its tests: what comes for one are descriptors, which
only the fork reads. The fork (`main`) builds the walls of one program (`sandbox_walls`) and forks again, itself staying
outside to wait. That child forks the candidate (`sandbox_candidate`) and becomes the checker (`sandbox_checker`), which
has tests and report pipe; both hold an end of the line between them (`sandbox_line`).
"""

import gc
import marshal
import os
import signal
import socket
import sys

from sandbox_candidate import become_candidate
from sandbox_checker import Client, check, collect
from sandbox_line import Line, describe
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
    renew_scratch,
    renew_streams,
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


def serve(shared):
    """Build the walls that programs share, then fork for each one that is asked for, one at a time.

    What comes from the evaluator: a byte with four descriptors for a program; then one when all of its processes but
    the fork have ended. What goes back: `ready`, or why there are no walls; from each fork a byte, whose sender the
    kernel names; and how the fork ended.
    """
    control = socket.socket(fileno=shared["control_fd"])
    try:
        die_with_parent()
        os.umask(0o022)
        if shared["root"]:
            enter_namespaces(shared["user_namespace"], processes=not shared["lasting"])
            build_root(shared["root"], shared["binds"], shared["scratch_bytes"])
        sys.path[:] = [path for path in sys.path if "site-packages" not in path] + shared["packages"]
        for name in shared["preload"]:
            __import__(name)
        call("prctl", 4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: processes of the same user neither trace nor read this one
        call("prctl", 36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: what a fork leaves counts as a process until collected
    except (OSError, ImportError) as error:
        control.sendall(describe(error).encode("ascii", "backslashreplace"))
        os._exit(1)
    renew_streams()
    gc.freeze()  # forks then share these objects for longer
    control.sendall(b"ready")
    while True:
        descriptors = socket.recv_fds(control, 1, 4)[1]
        if len(descriptors) < 4:
            os._exit(0)
        pid = os.fork()
        if not pid:
            try:
                os.setsid()
                die_with_parent()
                control.sendall(b"!")
                control.close()
                renew_streams()
                main(shared, *descriptors)
            finally:
                os._exit(1)
        for fd in descriptors:
            os.close(fd)
        if not control.recv(1):
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass
        control.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))


def main(shared, job_fd, tests_fd, report_fd, setup_fd):
    """Build the walls of one program, run it and report. Never returns.

    The candidate's process says on the set-up pipe that they stand, once it knows that the checker has its own.
    """
    try:
        if shared["nested"]:
            enter_namespaces(user=False)
        if shared["shared"]:
            call("prctl", 36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: what the program leaves behind stays findable
        if os.fork():  # stays outside to wait; what is below it dies with the evaluator
            if shared["shared"]:
                signal.signal(signal.SIGTERM, end_descendants)
                die_with_parent(signal.SIGTERM)
            for fd in (job_fd, tests_fd, report_fd, setup_fd):
                os.close(fd)
            wait_for_the_end()
        die_with_parent()
        if shared["nested"]:
            renew_scratch(shared["scratch_bytes"])
        with os.fdopen(job_fd, "rb") as file:
            job = shared | marshal.load(file)
        os.environ |= {name: job["workdir"] for name in ("HOME", "TMPDIR")}
        job["kept"] = keep_imports([path for path in sys.path if os.path.isdir(path)]) if job["keep_imports"] else []
        if job["landlock"]:
            devices = [f"/dev/{name}" for name in ("null", "zero", "random", "urandom")]
            close_files([source for source, _ in job["binds"]] + devices, job["packages"], job["workdir"])
        signal.signal(signal.SIGCHLD, collect)
        (requests, asked), (answers, answered), (gate_reader, gate) = os.pipe(), os.pipe(), os.pipe()
        if not os.fork():
            become_candidate(job, Line(requests, answered), setup_fd, gate_reader)
        for fd in (requests, answered, gate_reader):
            os.close(fd)
        del job["candidate"]
        os.chdir("/")
        set_limits({name: value for name, value in job["limits"].items() if name != "RLIMIT_NPROC"})
        drop_privileges(job["checker_uid"])
        die_with_parent()
        refuse_system_calls(None)
        os.write(gate, b"!")
    except BrokenPipeError:  # the candidate's process has said why
        os._exit(1)
    except (OSError, ImportError) as error:
        complain(setup_fd, error)
    for fd in (gate, setup_fd):
        os.close(fd)
    status, error = check(Client(Line(answers, asked)), tests_fd)
    line = f"{status} {error}".encode("ascii", "backslashreplace")[:2000]
    os.write(report_fd, line.replace(b"\n", b"\\n") + b"\n")
    wait_for_the_end()
