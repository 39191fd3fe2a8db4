"""The process inside the sandbox: closes the doors behind it, runs one program, reports once.

It runs as ``python -I -S -B -c SOURCE`` with a JSON job on standard input and must import nothing but the standard
library. What is deliberately not here: starting, timing and judging the process (``sandbox.py``).

A pass is the job's nonce, written to a private pipe after the tests. While the program runs, nonce and tests lie with
the kernel instead of in variables, and the functions that run and report are bound beforehand, so that patched builtins
or a walk through the frames do not forge it. (Code in the same process can still read open file descriptors: good
enough to count benchmark answers, not to reward a policy that learns to cheat.)
"""

import ctypes
import json
import os
import resource
import signal
import sys
import types


def call(name, *args):
    """Call a libc function that returns 0 on success; raise OSError otherwise."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*args) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def mount(source, target, kind=None, flags=0, data=None):
    """Mount or remount, as the system call of that name does."""
    encoded = [None if text is None else text.encode() for text in (source, target, kind, data)]
    try:
        call("mount", encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3])
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} ({source} on {target})") from None


def build_root(root, binds, scratch_bytes):
    """Make ``root`` the file system: read-only binds, /dev with four harmless nodes, and a small scratch /tmp.

    Needs its own mount namespace. Flags: MS_RDONLY 1, MS_NOSUID 2, MS_NODEV 4, MS_REMOUNT 32, MS_BIND 4096,
    MS_REC 16384, MS_PRIVATE 1 << 18.
    """
    mount(None, "/", None, 16384 | (1 << 18))
    mount("tmpfs", root, "tmpfs", 2, "size=1m,mode=755")
    # Device nodes cannot be made in a user namespace and are refused by MS_NODEV, so the host's are bound.
    devices = [(f"/dev/{name}", f"/dev/{name}") for name in ("null", "zero", "random", "urandom")]
    for source, target in [*binds, *devices]:
        place = root + target
        os.makedirs(os.path.dirname(place), exist_ok=True)
        if os.path.isdir(source):
            os.makedirs(place, exist_ok=True)
        else:
            os.close(os.open(place, os.O_CREAT | os.O_WRONLY, 0o644))
        mount(source, place, None, 4096)
        # A user namespace may not drop flags that the host set (nosuid, nodev, noexec), so they are kept.
        flags = os.statvfs(place).f_flag & (2 | 4 | 8)
        mount(None, place, None, 4096 | 32 | 1 | flags | (0 if target.startswith("/dev/") else 4))
    os.makedirs(root + "/tmp", exist_ok=True)
    mount("tmpfs", root + "/tmp", "tmpfs", 2 | 4, f"size={scratch_bytes},mode=1777")
    os.makedirs(root + "/old", exist_ok=True)
    os.chdir(root)
    libc = ctypes.CDLL(None, use_errno=True)
    number = {"x86_64": 155, "aarch64": 41, "riscv64": 41}[os.uname().machine]
    if libc.syscall(ctypes.c_long(number), b".", b"old") != 0:
        raise OSError(ctypes.get_errno(), "pivot_root: " + os.strerror(ctypes.get_errno()))
    os.chdir("/")
    call("umount2", b"/old", 2)  # MNT_DETACH
    os.rmdir("/old")
    mount(None, "/", None, 32 | 1 | 2)


def enter_namespaces(user):
    """Leave the machine's namespaces: CLONE_NEWNS, NEWUTS, NEWIPC, NEWPID, NEWNET and, for ``user``, NEWUSER.

    The caller's id becomes an ordinary one inside: to map the root id takes CAP_SETFCAP, which a container may lack.
    The next fork is the first process of the PID namespace.
    """
    uid, gid = os.geteuid(), os.getegid()
    call("unshare", 0x00020000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000 | (0x10000000 if user else 0))
    if user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"1000 {uid} 1"), ("gid_map", f"1000 {gid} 1")):
            try:
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
            except OSError as error:
                raise OSError(error.errno, f"{name} of the user namespace: {error.strerror}") from None


def keep_imports(folders):
    """Read ``folders`` through open descriptors from now on, so that modules load after the root id is gone.

    Where an interpreter lies below a folder that only root may enter, its own files are open to all: a descriptor
    passes by the closed folder and opens nothing else in it.
    """
    moved = {}
    for folder in folders:
        moved[folder] = f"/proc/self/fd/{os.open(folder, os.O_PATH | os.O_DIRECTORY)}"

    def move(path):
        fit = [folder for folder in moved if path == folder or path.startswith(folder + "/")]
        return moved[max(fit, key=len)] + path[len(max(fit, key=len)) :] if fit else path

    sys.path[:] = [move(path) for path in sys.path]
    for module in list(sys.modules.values()):
        if isinstance(getattr(module, "__path__", None), list):
            module.__path__[:] = [move(path) for path in module.__path__]
    sys.path_importer_cache.clear()


def drop_privileges(uid):
    """Become ``uid`` where one is given, give up every capability, and forbid to gain any."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    call("capset", header, (ctypes.c_uint32 * 6)(0, 0, 0, 0, 0, 0))
    libc.prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: other processes of this user cannot trace it


def set_limits(limits):
    """Set soft and hard resource limits by name, never above the hard limits of the caller."""
    for name, value in limits.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def describe(error):
    """One bounded line that says what went wrong."""
    try:
        text = str(error)
    except BaseException:  # the program's own exception class may do anything
        text = ""
    return f"{type(error).__name__}: {text}"[:500]


def run(job, report_fd):
    """Run the candidate, then its tests, then write the verdict. Never returns."""
    write, read, leave, execute, translate = os.write, os.read, os._exit, exec, compile

    def report(status, error, nonce=""):
        line = f"{status} {nonce or '-'} {error}".encode("ascii", "backslashreplace")
        write(report_fd, line.replace(b"\n", b"\\n") + b"\n")
        leave(0)

    nonce_fd, nonce_in = os.pipe()
    write(nonce_in, job.pop("nonce").encode())
    os.close(nonce_in)
    tests = job.pop("tests").encode("utf-8", "surrogatepass")
    tests_fd, size = os.memfd_create("tests"), len(tests)
    while tests:
        tests = tests[write(tests_fd, tests) :]
    os.lseek(tests_fd, 0, os.SEEK_SET)
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module  # dataclasses and pickle look a class up by its module
    del sys.modules["__main__"]
    phase = "program"
    try:
        execute(translate(job.pop("candidate"), "<candidate>", "exec"), module.__dict__)
        phase = "tests"
        execute(translate(read(tests_fd, size), "<tests>", "exec"), module.__dict__)
    except SystemExit as error:
        report("exited", f"the program left with code {error.code!r} before its tests were done"[:500])
    except MemoryError:
        report("memory", f"MemoryError in the {phase}")
    except BaseException as error:
        report("failed", f"{phase}: {describe(error)}")
    report("passed", "", read(nonce_fd, 64).decode())


def main():
    """Read the job, build the walls it asks for, say on the set-up pipe that they stand, and run it."""
    with os.fdopen(os.dup(0), "rb") as stdin:
        job = json.loads(stdin.read())
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    report_fd, setup_fd = job.pop("report_fd"), job.pop("setup_fd")
    os.umask(0o022)
    try:
        if job["root"]:
            enter_namespaces(job["user_namespace"])
            if os.fork():  # dies with the evaluator, and its child with it
                os.close(setup_fd)
                os.close(report_fd)
                os.wait()
                os._exit(0)
            call("prctl", 1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
            build_root(job["root"], job["binds"], job["scratch_bytes"])
            if os.fork():  # the first process of a PID namespace shrugs signals off: the program must not be it
                os.close(setup_fd)
                os.close(report_fd)
                os.wait()
                os._exit(0)
        os.chdir(job["workdir"])
        sys.path[:] = [path for path in sys.path if "site-packages" not in path] + job["packages"]
        if job["keep_imports"]:
            keep_imports([path for path in sys.path if os.path.isdir(path)])
        set_limits(job["limits"])
        drop_privileges(job["uid"])
    except OSError as error:
        os.write(setup_fd, describe(error).encode("ascii", "backslashreplace") + b"\n")
        os._exit(1)
    os.write(setup_fd, b"ready\n")
    os.close(setup_fd)  # before the candidate's code exists here: nothing it does looks like a fault of the sandbox
    run(job, report_fd)


main()
