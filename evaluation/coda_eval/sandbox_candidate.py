"""The candidate's process: it runs the source and then does what the checker asks. Nothing here is trusted.

It never held the tests and keeps one line to the checker. Runs inside the sandbox: standard library only.
"""

import builtins
import operator
import os
import signal
import sys
import types
from pickle import loads

from sandbox_line import Gone, rebuild
from sandbox_values import NOT_BUILTIN, Codec, pickle_builtin
from sandbox_walls import call, complain, die_with_parent, drop_privileges, keep_only, refuse_system_calls, set_limits

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

    def changed(self, values, before):
        """The place and the new value, encoded, of each argument that is no longer what its bytes `before` say."""
        found = []
        for place, (value, old) in enumerate(zip(values, before, strict=True)):
            if type(value) not in FIXED and (new := self.codec.encode(value)) != old:
                found += [self.codec.encode(place), new]
        return found

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
        return self.changed(values, map(self.codec.encode, (*positional, *named.values())))

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
                if kind == b"C":
                    number, positional, named = loads(parts[0])
                    result = self.codec.encode(self.objects[number](*positional, **named))
                    self.line.send(b"A", result, *self.changed_since(parts[0], number, positional, named))
                    continue
                operation, *operands = [self.codec.decode(part) for part in parts]
                if operation == "call":
                    function, count, names, *values = operands
                    named = dict(zip(names, values[count:], strict=True))
                    result = self.codec.encode(function(*values[:count], **named))
                    self.line.send(b"A", result, *self.changed(values, parts[4:]))
                else:
                    self.line.send(b"A", self.codec.encode(OPERATIONS[operation](*operands)))
            except Gone:
                os._exit(0)
            except BaseException as error:
                self.line.send(b"X", self.failure(error))


FIXED = {int, float, complex, bool, str, bytes, type(None), frozenset, range}
"""Types whose values no call can change."""


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
