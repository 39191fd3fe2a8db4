"""The candidate's process: it runs the source and then does what the checker asks. Nothing here is trusted.

It never held the tests and keeps one line to the checker. Runs inside the sandbox: standard library only.
"""

import builtins
import operator
import os
import signal
import sys
import types
from _thread import RLock
from pickle import loads

from sandbox_line import Gone, failure_of, rebuild
from sandbox_values import FIXED, NOT_BUILTIN, PROTOCOLS, PROTOCOLS_AT, Codec, pickle_builtin, renew
from sandbox_walls import call, complain, die_with_parent, drop_privileges, keep_only, refuse_system_calls, set_limits

OPERATIONS = {
    "call": lambda function, positional, named: function(*positional, **named),
    "getattr": getattr,
    "setattr": setattr,
    "delattr": delattr,
    "iter": iter,
    "next": next,
    "len": len,
    "hash": hash,
    "bool": bool,
    "str": str,
    "repr": repr,
    "float": float,
    "index": operator.index,
    "getitem": operator.getitem,
    "setitem": operator.setitem,
    "delitem": operator.delitem,
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
        self.module = None
        self.one_at_a_time = RLock()
        """Held while the tests are asked: threads of the program share the line."""

    def _number_of(self, value):
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.objects) | protocols_of(value) << PROTOCOLS_AT
            self.objects.append(value)
        return b"h", self.numbers[id(value)]

    def _object_of(self, tag, number, names=None):
        return self.objects[number] if tag == b"h" else self._callback(number, names)

    def _callback(self, number, names):
        """A function of the tests that came as an argument. While it runs, it may ask for whatever tests ask for."""

        def call(*positional, **named):
            values = [*positional, *named.values()]
            with self.one_at_a_time:
                parts = (number, len(positional), list(named), *values)
                self.line.send(b"Q", *map(self.codec.encode, parts))
                while (received := self.line.receive())[0] not in (b"A", b"X"):
                    self.reply(*received)
            kind, parts = received
            result, *changed = map(self.codec.decode, parts)
            if kind == b"X":
                raise rebuild(result)
            for place, after in zip(changed[::2], changed[1::2], strict=True):
                renew(values[place], after)
            return result

        for name, text in {"__doc__": None, **names}.items():
            setattr(call, name, text)
        return call

    def run(self, source, module):
        """Execute the candidate's source and report how that went."""
        try:
            exec(compile(source, module.__file__, "exec", dont_inherit=True), module.__dict__)
            answer = (b"A", self.codec.encode(None))
        except BaseException as error:
            answer = (b"X", self.codec.encode(failure_of(error)))
        return answer

    def changed_since(self, request, number, positional, named):
        """The same for arguments that came as a pickle, of which the whole is compared first."""
        values = [*positional, *named.values()]
        if FIXED.issuperset(map(type, values)):
            return []
        try:
            if pickle_builtin((number, positional, named)) == bytes(request):
                return []
        except NOT_BUILTIN:
            pass  # it has objects of the program now
        _, positional, named = loads(request)
        return self.codec.changed(values, map(self.codec.encode, (*positional, *named.values())))

    def serve(self, module):
        """Answer requests until the checker has gone."""
        self.module = module
        while True:
            try:
                self.reply(*self.line.receive())
            except Gone:
                os._exit(0)

    def reply(self, kind, parts):
        """Answer one request. Raises `Gone`."""
        try:
            if kind == b"N":
                self.line.send(b"A", self.codec.encode(getattr(self.module, self.codec.decode(parts[0]))))
                return
            if kind == b"C":
                number, positional, named = loads(parts[0])
                result = self.codec.encode(self.objects[number](*positional, **named))
                self.line.send(b"A", result, *self.changed_since(parts[0], number, positional, named))
                return
            operation, *operands = [self.codec.decode(part) for part in parts]
            if operation == "call":
                function, count, names, *values = operands
                named = dict(zip(names, values[count:], strict=True))
                result = self.codec.encode(function(*values[:count], **named))
                self.line.send(b"A", result, *self.codec.changed(values, parts[4:]))
            else:
                self.line.send(b"A", self.codec.encode(OPERATIONS[operation](*operands)))
        except Gone:
            raise
        except BaseException as error:
            self.line.send(b"X", self.codec.encode(failure_of(error)))


def protocols_of(value):
    """Which of `PROTOCOLS` an object has, as bits."""
    named = set().union(*map(vars, type(value).__mro__))
    if isinstance(value, type) and hasattr(value, "__class_getitem__"):
        named.add("__getitem__")
    return sum(1 << place for place, name in enumerate(PROTOCOLS) if name in named)


def stage(source, folder):
    """A module for the candidate in which a script finds what it expects: `__main__`, `__file__`, `exit`."""
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


def become_candidate(job, line, setup_fd, gate):
    """Drop what the candidate must not have, wait for the checker, run the source and serve. Never returns."""
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
        if not os.read(gate, 1):  # the checker's process has said why
            os._exit(1)
        os.write(setup_fd, b"ready\n")  # before the program runs: nothing that it does looks like a missing wall
    except OSError as error:
        complain(setup_fd, error)
    for fd in (gate, setup_fd):
        os.close(fd)
    try:
        server, source, pid = Server(line), job.pop("candidate").removeprefix("\ufeff"), os.getpid()
        module = stage(source, job["workdir"])
        if job["host"]:
            module.PROGRAM, source = source, job["host"]
        answer = server.run(source, module)
        if os.getpid() == pid:  # not a child that the program forked and that came to the end of the source
            server.line.send(*answer)
            server.serve(module)
    finally:
        os._exit(1)
