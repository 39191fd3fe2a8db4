"""The walls around a program: namespaces, files, system calls, limits, privileges; built by the process that goes in.

Runs inside the sandbox: standard library only. Which walls a level has is decided outside (`sandbox.py`).
"""

import ctypes
import errno
import os
import resource
import signal
import struct
import sys

from sandbox_line import describe

LAST_SYSCALL = 449
"""Highest system call number that the table below was written for; later ones do not exist for a program."""

REFUSED = """
acct 163 89, add_key 248 217, adjtimex 159 171, bind 49 200, bpf 321 280, chroot 161 51, connect 42 203,
listen 50 201, clock_adjtime 305 266, clock_settime 227 112, delete_module 176 106, fanotify_init 300 262,
finit_module 313 273, fsconfig 431 431, fsmount 432 432, fsopen 430 430, fspick 433 433, init_module 175 105,
io_uring_enter 426 426, io_uring_register 427 427, io_uring_setup 425 425, ioperm 173 -, iopl 172 -, kcmp 312 272,
kexec_file_load 320 294, kexec_load 246 104, keyctl 250 219, lookup_dcookie 212 18, mbind 237 235,
memfd_create 319 279, memfd_secret 447 447, migrate_pages 256 238, modify_ldt 154 -, mount 165 40,
mount_setattr 442 442, move_mount 429 429, move_pages 279 239, mq_open 240 180, mq_unlink 241 181, msgctl 71 187,
msgget 68 186, msgrcv 70 188, msgsnd 69 189, name_to_handle_at 303 264, nfsservctl 180 42, open_by_handle_at 304 265,
open_tree 428 428, perf_event_open 298 241, pidfd_getfd 438 438, pidfd_open 434 434, pidfd_send_signal 424 424,
pivot_root 155 41, process_madvise 440 440, process_mrelease 448 448, process_vm_readv 310 270,
process_vm_writev 311 271, ptrace 101 117, quotactl 179 60, quotactl_fd 443 443, reboot 169 142, request_key 249 218,
semctl 66 191, semget 64 190, semop 65 193, semtimedop 220 192, set_mempolicy 238 237, setdomainname 171 162,
sethostname 170 161, setns 308 268, settimeofday 164 170, shmat 30 196, shmctl 31 195, shmdt 67 197, shmget 29 194,
socket 41 198, swapoff 168 225, swapon 167 224, sysfs 139 -, syslog 103 116, umount2 166 39, unshare 272 97,
uselib 134 -, userfaultfd 323 282, ustat 136 -, vhangup 153 58
"""
"""System calls that no program needs, with their numbers on x86_64 and aarch64: they reach the kernel's young or
privileged parts, other processes, or memory that outlives a process. `socket` is among them: the socket families are
not all covered by a network namespace (vsock). Connected pairs come from `socketpair`; a pair of datagram sockets
could send to any socket of the machine that has a path."""

SHARED = """
chmod 90 -, chown 92 -, fchmod 91 52, fchmodat 268 53, fchown 93 55, fchownat 260 54, fremovexattr 199 16,
fsetxattr 190 7, futimesat 261 -, inotify_add_watch 254 27, ioprio_set 251 30, lchown 94 -, lremovexattr 198 15,
lsetxattr 189 6, removexattr 197 14, rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240, sched_setaffinity 203 122,
sched_setattr 314 274, sched_setparam 142 118, sched_setscheduler 144 119, setpriority 141 140, setxattr 188 5,
tkill 200 130, utime 132 -, utimensat 280 88, utimes 235 -
"""
"""Refused as well where processes and file system are the machine's: what reaches other processes of the same user, or
changes files by name."""

ARGUMENTS = {"clone": (56, 220), "clone3": (435, 435), "prlimit64": (302, 261), "kill": (62, 129), "tgkill": (234, 131)}
ARGUMENTS |= {"fcntl": (72, 25), "ioctl": (16, 29), "setsockopt": (54, 208), "socketpair": (53, 199)}
"""System calls that are refused by their arguments."""


LIBC = ctypes.CDLL(None, use_errno=True)


def call(name, *args):
    """Call a libc function that returns 0 on success; raise OSError otherwise."""
    if getattr(LIBC, name)(*args) != 0:
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
    """Make `root` the file system: read-only binds, /dev with four harmless nodes, and a small scratch /tmp.

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
    number = {"x86_64": 155, "aarch64": 41, "riscv64": 41}[os.uname().machine]
    if LIBC.syscall(ctypes.c_long(number), b".", b"old") != 0:
        raise OSError(ctypes.get_errno(), "pivot_root: " + os.strerror(ctypes.get_errno()))
    os.chdir("/")
    call("umount2", b"/old", 2)  # MNT_DETACH
    os.rmdir("/old")
    mount(None, "/", None, 32 | 1 | 2)


def renew_scratch(scratch_bytes):
    """Cover what a program may write to below the root that programs share: /tmp and, where there are, terminals.

    Needs a mount namespace of the program's own. Flags: MS_NOSUID 2, MS_NODEV 4, MS_NOEXEC 8, MS_REC 16384,
    MS_PRIVATE 1 << 18.
    """
    mount(None, "/", None, 16384 | (1 << 18))
    mount("tmpfs", "/tmp", "tmpfs", 2 | 4, f"size={scratch_bytes},mode=1777")
    if os.path.isdir("/dev/pts"):
        mount("devpts", "/dev/pts", "devpts", 2 | 8, "newinstance,ptmxmode=0666,mode=620")


def enter_namespaces(user, processes=True):
    """Leave the namespaces: CLONE_NEWNS, NEWUTS, NEWIPC, NEWNET, for `user` NEWUSER and for `processes` NEWPID.

    The caller's id becomes an ordinary one inside: to map the root id takes CAP_SETFCAP, which a container may lack.
    The next fork is the first process of the PID namespace.
    """
    uid, gid = os.geteuid(), os.getegid()
    flags = (0x10000000 if user else 0) | (0x20000000 if processes else 0)
    call("unshare", 0x00020000 | 0x04000000 | 0x08000000 | 0x40000000 | flags)
    if user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"1000 {uid} 1"), ("gid_map", f"1000 {gid} 1")):
            try:
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
            except OSError as error:
                raise OSError(error.errno, f"{name} of the user namespace: {error.strerror}") from None


def keep_imports(folders):
    """Read `folders` through open descriptors from now on, so that modules load after the root id is gone.

    Where an interpreter lies below a folder that only root may enter, its own files are open to all: a descriptor
    passes by the closed folder and opens nothing else in it. Returns the descriptors.
    """
    descriptors = [os.open(folder, os.O_PATH | os.O_DIRECTORY) for folder in folders]
    moved = {folder: f"/proc/self/fd/{fd}" for folder, fd in zip(folders, descriptors, strict=True)}

    def move(path):
        fit = [folder for folder in moved if path == folder or path.startswith(folder + "/")]
        return moved[max(fit, key=len)] + path[len(max(fit, key=len)) :] if fit else path

    sys.path[:] = [move(path) for path in sys.path]
    for module in list(sys.modules.values()):
        if isinstance(getattr(module, "__path__", None), list):
            module.__path__[:] = [move(path) for path in module.__path__]
    sys.path_importer_cache.clear()
    return descriptors


def close_files(readable, listed, writable):
    """Leave this process and its children no files but these, no TCP port, and no signal to others (Landlock).

    Args:
        readable: files and folders that may be read.
        listed: folders whose names alone may be read: packages are found by them.
        writable: a folder where everything but running programs is allowed.

    Raises:
        OSError: the kernel has no Landlock, or one that does not hold signals back yet (before Linux 6.12).
    """

    def landlock(number, *arguments):  # 444 to 446 on every architecture
        result = LIBC.syscall(ctypes.c_long(number), *arguments)
        if result < 0:
            raise OSError(ctypes.get_errno(), f"landlock: {os.strerror(ctypes.get_errno())}")
        return result

    version = landlock(444, None, ctypes.c_size_t(0), 1)
    if version < 6:
        raise OSError(errno.ENOSYS, f"Landlock has version {version} here; 6 (Linux 6.12) holds signals back")
    read_file, read_folder, all_files = 1 << 2, 1 << 3, (1 << 16) - 1
    attributes = ctypes.create_string_buffer(struct.pack("QQQ", all_files, 3, 3), 24)  # files, TCP, sockets and signals
    ruleset = landlock(444, attributes, ctypes.c_size_t(24), 0)
    rules = [(path, read_file | read_folder) for path in readable] + [(path, read_folder) for path in listed]
    rules.append((writable, all_files & ~1))  # not: execute
    for path, rights in rules:
        fd = os.open(path, os.O_PATH)
        if not os.path.isdir(path):
            rights = read_file | (1 << 1 if path == "/dev/null" else 0)
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, fd), 12)
        landlock(445, ruleset, 1, rule, 0)
        os.close(fd)
    LIBC.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    landlock(446, ruleset, 0)
    os.close(ruleset)


def drop_privileges(uid):
    """Become `uid` where one is given, give up every capability, and forbid to gain any."""
    LIBC.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    call("capset", header, (ctypes.c_uint32 * 6)(0, 0, 0, 0, 0, 0))


def refuse_system_calls(pid):
    """Install the seccomp filter of a program, in this process and all that come from it, for good.

    Args:
        pid: this process where it shares the machine's processes: then it may signal itself and its group alone.
            None where it has a PID namespace of its own.
    """
    machine = os.uname().machine
    if machine not in ("x86_64", "aarch64"):
        raise OSError(errno.ENOSYS, f"the system call filter knows x86_64 and aarch64, not {machine}")
    column, audit = (0, 0xC000003E) if machine == "x86_64" else (1, 0xC00000B7)
    kill, allow, refuse, absent = 0x80000000, 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
    load, equal, greater, some_bit, leave = 0x20, 0x15, 0x25, 0x45, 0x06  # BPF_LD|W|ABS, JEQ, JGT, JSET, RET
    code = [(load, 0, 0, 4), (equal, 1, 0, audit), (leave, 0, 0, kill)]  # no other architecture's calls
    code += [(load, 0, 0, 0), (greater, 0, 1, LAST_SYSCALL), (leave, 0, 0, absent)]  # the calls of x32 too
    for row in (REFUSED + ("," + SHARED if pid else "")).split(","):
        number = row.split()[1 + column]
        if number != "-":
            code += [(equal, 0, 1, int(number)), (leave, 0, 0, refuse)]

    def look(name, argument, tests, otherwise):
        body = [(load, 0, 0, 16 + 8 * argument)]  # the lower half of the argument
        for kind, value, verdict in tests:
            body += [(kind, 0, 1, value), (leave, 0, 0, verdict)]
        body.append((leave, 0, 0, otherwise))
        code.extend([(equal, 0, len(body), ARGUMENTS[name][column]), *body])

    look("clone3", 0, [], absent)  # its flags lie in memory; the C library then takes clone
    look("clone", 0, [(some_bit, 0x7E020000, refuse)], allow)  # CLONE_NEW*
    streams = [1 | flags for flags in (0, 0x800, 0x80000, 0x80800)]  # SOCK_STREAM; with SOCK_NONBLOCK, SOCK_CLOEXEC
    look("socketpair", 1, [(equal, value, allow) for value in streams], refuse)
    look("setsockopt", 2, [(equal, 7, refuse), (equal, 32, refuse)], allow)  # SO_SNDBUF, SO_SNDBUFFORCE
    look("prlimit64", 0, [(equal, 0, allow)], refuse)
    if pid:
        for name in ("kill", "tgkill"):
            look(name, 0, [(equal, 0, allow), (equal, pid, allow)], refuse)
        look("fcntl", 1, [(equal, value, refuse) for value in (8, 10, 15)], allow)  # F_SETOWN, F_SETSIG, F_SETOWN_EX
        look("ioctl", 1, [(equal, value, refuse) for value in (0x5412, 0x8901, 0x8902)], allow)  # TIOCSTI, FIOSETOWN
    code.append((leave, 0, 0, allow))
    packed = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in code))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code), ctypes.addressof(packed)))
    call("prctl", 22, 2, program, 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def set_limits(limits):
    """Set soft and hard resource limits by name, never above the hard limits of the caller."""
    for name, value in limits.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def keep_only(*descriptors):
    """Close every descriptor from 3 on but these."""
    before = 2
    for descriptor in sorted(descriptors):
        os.closerange(before + 1, descriptor)
        before = descriptor
    os.closerange(before + 1, 1 << 16)


def renew_streams():
    """Open the standard streams anew, on nothing: flags and signals set on a descriptor stay for all that share it."""
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)


def die_with_parent(number=signal.SIGKILL):
    """Have this process signalled when the one that started it ends (lost with every change of user)."""
    call("prctl", 1, number, 0, 0, 0)  # PR_SET_PDEATHSIG


def complain(setup_fd, error):
    """Say why the walls cannot be built, and leave."""
    os.write(setup_fd, describe(error).encode("ascii", "backslashreplace") + b"\n")
    os._exit(1)
