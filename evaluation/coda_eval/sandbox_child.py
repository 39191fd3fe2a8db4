"""The processes inside the sandbox: walls first, then a candidate and, apart from it, the checker that runs the tests.

It runs as ``python -I -S -B -c`` with its code and a job on standard input and must import nothing but the standard
library and ``sandbox_values``. What is deliberately not here: starting, timing and judging (``sandbox.py``).

One process builds the walls and forks. The child becomes the candidate: it never held the tests, keeps one descriptor
(a socket to the checker), and serves calls of its functions. The parent becomes the checker: it holds tests, report
pipe and nothing of the candidate's code. Names that tests use and do not define are looked up in the candidate;
arguments and results cross as plain data (``sandbox_values``), and comparisons happen here.
"""

import builtins
import ctypes
import errno
import marshal
import operator
import os
import resource
import signal
import struct
import sys
import types

from sandbox_values import MAX_BYTES, Codec, Uncarried, exception_class

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
privileged parts, other processes, or memory that outlives a process. ``socket`` is among them: the socket families are
not all covered by a network namespace (vsock). Connected pairs come from ``socketpair``; a pair of datagram sockets
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
ARGUMENTS |= {"fcntl": (72, 25), "ioctl": (16, 29), "socketpair": (53, 199)}
"""System calls that are refused by their arguments."""


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
    libc = ctypes.CDLL(None, use_errno=True)

    def landlock(number, *arguments):  # 444 to 446 on every architecture
        result = libc.syscall(ctypes.c_long(number), *arguments)
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
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    landlock(446, ruleset, 0)
    os.close(ruleset)


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


def describe(error):
    """One bounded line that says what went wrong."""
    return f"{type(error).__name__}: {error}"[:500]


class Gone(BaseException):
    """The candidate's process ended, or answers what is no answer. Tests do not catch it by ``except Exception``."""


class Line:
    """Messages over two pipes: length and kind, then parts with their lengths."""

    def __init__(self, reader, writer):
        self.reader = reader
        self.writer = writer

    def send(self, kind, *parts):
        """Send one message."""
        pieces = [struct.pack("<Qc", sum(len(part) + 8 for part in parts), kind)]
        for part in parts:
            pieces += [struct.pack("<Q", len(part)), part]
        if sum(map(len, pieces)) < 1 << 16:
            pieces = [b"".join(pieces)]
        for piece in map(memoryview, pieces):
            while piece:
                piece = piece[os.write(self.writer, piece) :]

    def receive(self):
        """(kind, parts) of the next message. Raises ``Gone`` at the end of the stream and for what is no message."""
        size, kind = struct.unpack("<Qc", self._exactly(9))
        if size > MAX_BYTES:
            raise Gone("sent what is no answer")
        body, parts, at = memoryview(self._exactly(size)), [], 0
        while at < size:
            length = struct.unpack_from("<Q", body, at)[0] if at + 8 <= size else size
            at += 8 + length
            if at > size:
                raise Gone("sent what is no answer")
            parts.append(body[at - length : at])
        return kind, parts

    def _exactly(self, size):
        data = bytearray()
        while len(data) < size:
            chunk = os.read(self.reader, min(size - len(data), 1 << 20))
            if not chunk:
                raise Gone("ended without an answer")
            data += chunk
        return data


OPERATIONS = {
    "call": lambda function, positional, named: function(*positional, **named),
    "getattr": getattr,
    "setattr": setattr,
    "delattr": delattr,
    "iter": iter,
    "next": next,
    "len": len,
    "bool": bool,
    "str": str,
    "repr": repr,
    "float": float,
    "index": operator.index,
    "getitem": operator.getitem,
    "setitem": operator.setitem,
    "isinstance": isinstance,
    "eq": operator.eq,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
"""What tests may do with an object of the candidate."""


class Server:
    """The candidate's side: runs its source, then does what the checker asks. Nothing here is trusted."""

    def __init__(self, line):
        self.line = line
        self.objects = []
        self.numbers = {}
        self.codec = Codec(self._number_of, self._object_of)

    def _number_of(self, value):
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.objects)
            self.objects.append(value)
        return b"h", self.numbers[id(value)]

    def _object_of(self, tag, number):
        return self.objects[number] if tag == b"h" else self._callback(number)

    def _callback(self, number):
        """A function of the tests that came as an argument."""

        def call(*positional, **named):
            self.line.send(b"Q", self.codec.encode((number, positional, named)))
            kind, parts = self.line.receive()
            if kind == b"X":
                raise rebuild(self.codec.decode(parts[0]))
            return self.codec.decode(parts[0])

        return call

    def run(self, source, module):
        """Execute the candidate's source and report how that went."""
        try:
            exec(compile(source, module.__file__, "exec", dont_inherit=True), module.__dict__)
            answer = (b"A", self.codec.encode(None))
        except BaseException as error:
            answer = (b"X", self.failure(error))
        return answer

    def failure(self, error):
        """An exception as data: names of its class and bases, text, exit code."""
        names = [kind.__name__ for kind in type(error).__mro__[:-1]]
        try:
            text = str(error)[:2000]
        except BaseException:  # the program's own exception class may do anything
            text = ""
        code = error.code if isinstance(error, SystemExit) else None
        return self.codec.encode((names, text, code if isinstance(code, (int, str)) else None))

    def serve(self, module):
        """Answer requests until the checker has gone."""
        while True:
            try:
                kind, parts = self.line.receive()
            except Gone:
                os._exit(0)
            try:
                if kind == b"N":
                    self.line.send(b"A", self.codec.encode(getattr(module, self.codec.decode(parts[0]))))
                    continue
                operation, *operands = [self.codec.decode(part) for part in parts]
                if operation == "call":
                    function, count, names, *values = operands
                    named = dict(zip(names, values[count:], strict=True))
                    result = self.codec.encode(function(*values[:count], **named))
                    changed = []
                    for place, (value, before) in enumerate(zip(values, parts[4:], strict=True)):
                        if type(value) not in FIXED and (after := self.codec.encode(value)) != before:
                            changed += [self.codec.encode(place), after]
                    self.line.send(b"A", result, *changed)
                else:
                    self.line.send(b"A", self.codec.encode(OPERATIONS[operation](*operands)))
            except Gone:
                os._exit(0)
            except BaseException as error:
                self.line.send(b"X", self.failure(error))


FIXED = {int, float, complex, bool, str, bytes, type(None), frozenset, range}
"""Types whose values no call can change."""


def rebuild(failure):
    """The builtin exception that a failure names first; of a class of the candidate's own, the builtin one below."""
    names, text, code = failure
    if "SystemExit" in names:
        return SystemExit(code)
    kind = next((found for name in names if (found := exception_class(name))), Exception)
    try:
        return kind(text)
    except TypeError:  # UnicodeDecodeError and the like want more than a text
        return ValueError(text) if issubclass(kind, ValueError) else Exception(text)


class Client:
    """The checker's side of the line."""

    def __init__(self, line):
        self.line = line
        self.callbacks = []
        self.handles = {}
        self.broken = ""
        """Why the candidate can no longer be asked; a program with such a line never passes."""
        self.codec = Codec(self._number_of, self._object_of)

    def _number_of(self, value):
        if type(value) is Handle:
            return b"h", number_of(value)
        if callable(value):
            self.callbacks.append(value)
            return b"k", len(self.callbacks) - 1
        raise Uncarried(f"a test passes a {type(value).__name__}, which is no plain data")

    def _object_of(self, tag, number):
        if tag == b"k":
            return self.callbacks[number]
        if number not in self.handles:
            self.handles[number] = Handle(self, number)
        return self.handles[number]

    def answer(self):
        """Parts of the answer to the last request; the candidate's exception is raised here."""
        if self.broken:
            raise Gone(self.broken)
        try:
            while True:
                kind, parts = self.line.receive()
                if kind == b"Q":
                    self._called_back(parts)
                elif kind == b"A" and len(parts) % 2:
                    return [self.codec.decode(part) for part in parts]
                elif kind == b"X":
                    names, text, code = self.codec.decode(parts[0])
                    if type(names) is not list or {*map(type, names), type(text)} != {str}:
                        raise Gone("sent what is no answer")
                    raise rebuild((names, text, code if type(code) in (int, str) else None))
                else:
                    raise Gone("sent what is no answer")
        except (Uncarried, IndexError) as error:
            self.broken = f"sent what is no answer ({error})"
            raise Gone(self.broken) from None
        except Gone as error:
            self.broken = str(error)
            raise

    def _called_back(self, parts):
        number, positional, named = self.codec.decode(parts[0])
        if type(number) is not int or type(positional) is not tuple or type(named) is not dict:
            raise Gone("sent what is no answer")
        function = self.callbacks[number]
        try:
            result = (b"A", self.codec.encode(function(*positional, **named)))
        except Exception as error:
            result = (b"X", self.codec.encode(([kind.__name__ for kind in type(error).__mro__], str(error), None)))
        self.line.send(*result)

    def ask(self, kind, *parts):
        """Send one request and return the parts of its answer."""
        if self.broken:
            raise Gone(self.broken)
        try:
            self.line.send(kind, *parts)
        except BrokenPipeError:
            self.broken = "ended without an answer"
            raise Gone(self.broken) from None
        return self.answer()

    def do(self, operation, *operands):
        """The result of one of ``OPERATIONS``."""
        return self.ask(b"O", *(self.codec.encode(value) for value in (operation, *operands)))[0]

    def call(self, function, positional, named):
        """Call the candidate's function; arguments that it changed are changed here too."""
        values = [*positional, *named.values()]
        encoded = [self.codec.encode(value) for value in ("call", function, len(positional), list(named), *values)]
        result, *changed = self.ask(b"O", *encoded)
        for place, after in zip(changed[::2], changed[1::2], strict=True):
            if type(place) is int and 0 <= place < len(values):
                renew(values[place], after)
        return result

    def name(self, name):
        """What the candidate's module has under ``name``. Raises KeyError."""
        try:
            return self.ask(b"N", self.codec.encode(name))[0]
        except AttributeError:
            raise KeyError(name) from None


def renew(old, new):
    """Give ``old`` the content of ``new`` in place, as far down as both are of the same mutable kind."""
    if type(old) is not type(new):
        return
    if type(old) is list or type(old) is tuple:
        if len(old) == len(new):
            for place, (before, after) in enumerate(zip(old, new, strict=True)):
                if type(before) is type(after) and type(before) in RENEWED:
                    renew(before, after)
                elif type(old) is list:
                    old[place] = after
        elif type(old) is list:
            old[:] = new
    elif isinstance(old, dict):
        for key in [key for key in old if key not in new]:
            del old[key]
        same = list(old) == [key for key in new if key in old]
        if not same:
            kept = dict(old)
            old.clear()
            old.update((key, kept.get(key, new[key])) for key in new)
        for key, after in new.items():
            if key in old and type(old[key]) is type(after) and type(after) in RENEWED:
                renew(old[key], after)
            else:
                old[key] = after
    elif isinstance(old, (set, bytearray)) or type(old).__name__ == "deque":
        old.clear()
        (old.update if isinstance(old, set) else old.extend)(new)
    elif type(old).__name__ == "ndarray" and old.shape == new.shape:
        old[...] = new


RENEWED = (list, tuple, dict, set, bytearray)


class Handle:
    """An object of the candidate that is no plain data: a function, a class, an instance, an iterator.

    What is done with it happens in the candidate, and what comes back is data or another handle. It is never equal to
    data, and orders with handles only: an object does not decide by itself that it is the right answer.
    """

    __slots__ = ("_client", "_number")

    def __init__(self, client, number):
        object.__setattr__(self, "_client", client)
        object.__setattr__(self, "_number", number)

    def __call__(self, *positional, **named):  # noqa: D102
        return _client(self).call(self, positional, named)

    def __getattr__(self, name):
        if name.startswith("__") and name not in ("__name__", "__doc__", "__qualname__", "__module__"):
            raise AttributeError(name)
        return _client(self).do("getattr", self, name)

    def __setattr__(self, name, value):
        _client(self).do("setattr", self, name, value)

    def __delattr__(self, name):
        _client(self).do("delattr", self, name)

    def __iter__(self):
        return iter(found) if type(found := _client(self).do("iter", self)) is not Handle else found

    def __next__(self):
        return _client(self).do("next", self)

    def __len__(self):
        return _client(self).do("len", self)

    def __bool__(self):
        return _client(self).do("bool", self)

    def __str__(self):
        return _client(self).do("str", self)

    def __repr__(self):
        return _client(self).do("repr", self)

    def __float__(self):
        return _client(self).do("float", self)

    def __index__(self):
        return _client(self).do("index", self)

    def __getitem__(self, key):
        return _client(self).do("getitem", self, key)

    def __setitem__(self, key, value):
        _client(self).do("setitem", self, key, value)

    def __instancecheck__(self, value):
        return type(value) is Handle and _client(self).do("isinstance", value, self) is True

    def __eq__(self, other):
        return self is other or (type(other) is Handle and _client(self).do("eq", self, other) is True)

    def __ne__(self, other):
        return not self == other

    def __hash__(self):
        return id(self)

    def __lt__(self, other):
        return _client(self).do("lt", self, other) if type(other) is Handle else NotImplemented

    def __le__(self, other):
        return _client(self).do("le", self, other) if type(other) is Handle else NotImplemented

    def __gt__(self, other):
        return _client(self).do("gt", self, other) if type(other) is Handle else NotImplemented

    def __ge__(self, other):
        return _client(self).do("ge", self, other) if type(other) is Handle else NotImplemented


def _client(handle):
    return object.__getattribute__(handle, "_client")


def number_of(handle):
    """The number that a handle goes by."""
    return object.__getattribute__(handle, "_number")


class Names(dict):
    """Globals of the tests. What tests call is the candidate's; other names are theirs, a builtin, or the candidate's.

    So a candidate that defines ``check`` or ``zip`` for itself changes no test.
    """

    def __init__(self, client, called):
        super().__init__(__name__="tests", __builtins__=builtins)
        self.client = client
        self.called = called

    def __missing__(self, name):
        if name in self.called:
            try:
                value = self.client.name(name)
            except KeyError:
                raise NameError(f"the program defines no {name}") from None  # also where a builtin has the name
        else:
            value = getattr(builtins, name) if hasattr(builtins, name) else self.client.name(name)
        self[name] = value
        return value


def check(client, tests_fd):
    """Run the tests: (status, error)."""
    phase = "program"
    try:
        client.answer()
        phase = "tests"
        with os.fdopen(tests_fd, "rb") as file:
            setup, tests, called = marshal.loads(file.read())
        names = Names(client, called)
        exec(compile(setup, "<setup>", "exec"), names)
        for name in called:
            names.pop(name, None)
        exec(compile(tests, "<tests>", "exec"), names)
    except SystemExit as error:
        return "exited", f"the program left with code {error.code!r} before its tests were done"[:500]
    except MemoryError:
        return "memory", f"MemoryError in the {phase}"
    except Gone as error:
        status = "failed" if "no answer" in str(error) else "killed"
        return status, f"{phase}: the program {error}{ending()}"
    except BaseException as error:
        if not client.broken:
            return "failed", f"{phase}: {describe(error)}"
    if client.broken:
        return "failed" if "no answer" in client.broken else "killed", f"the program {client.broken}{ending()}"
    return "passed", ""


_ended = {}


def collect(*_):
    """Collect ended children: also those that a program left behind, which come to this process."""
    try:
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            _ended[pid] = os.waitstatus_to_exitcode(status)
    except ChildProcessError:
        return


def die_with_parent(number=signal.SIGKILL):
    """Have this process signalled when the one that started it ends (lost with every change of user)."""
    call("prctl", 1, number, 0, 0, 0)  # PR_SET_PDEATHSIG


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


def ending():
    """How the candidate's process ended, as far as is known."""
    collect()
    return f" (exit status {next(iter(_ended.values()))})" if len(_ended) == 1 else ""


def stage(source, folder):
    """A module for the candidate in which a script finds what it expects: ``__main__``, ``__file__``, ``exit``."""
    import _sitebuiltins

    for name in ("exit", "quit"):
        setattr(builtins, name, _sitebuiltins.Quitter(name, "Ctrl-D (i.e. EOF)"))
    builtins.help = _sitebuiltins._Helper()
    module = types.ModuleType("candidate")
    module.__file__ = f"{folder}/candidate.py"
    module.__loader__ = types.SimpleNamespace(get_source=lambda name=None: source)  # for tracebacks and inspect
    # Not named __main__, so that a main block, which may read from the keyboard, does not run; found under that name.
    sys.modules["candidate"] = sys.modules["__main__"] = module
    return module


def keep_only(*descriptors):
    """Close every descriptor from 3 on but these."""
    before = 2
    for descriptor in sorted(descriptors):
        os.closerange(before + 1, descriptor)
        before = descriptor
    os.closerange(before + 1, 1 << 16)


def become_candidate(job, line, setup_fd, gate):
    """Drop what the candidate must not have, tell the checker, run the source and serve. Never returns."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        keep_only(line.reader, line.writer, setup_fd, gate, *job["kept"])
        os.setsid()
        os.chdir(job["workdir"])
        set_limits(job["limits"])
        drop_privileges(job["uid"])
        call("prctl", 4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: the evaluator reads how much memory it uses
        die_with_parent()
        refuse_system_calls(os.getpid() if job["shared"] else None)
    except OSError as error:
        complain(setup_fd, error)
    os.close(setup_fd)
    os.write(gate, b"!")
    os.close(gate)
    try:
        server, source, pid = Server(line), job.pop("candidate").removeprefix("\ufeff"), os.getpid()
        module = stage(source, job["workdir"])
        answer = server.run(source, module)
        if os.getpid() == pid:  # not a child that the program forked and that came to the end of the source
            server.line.send(*answer)
            server.serve(module)
    finally:
        os._exit(1)


def complain(setup_fd, error):
    """Say why the walls cannot be built, and leave."""
    os.write(setup_fd, describe(error).encode("ascii", "backslashreplace") + b"\n")
    os._exit(1)


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
