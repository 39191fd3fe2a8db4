"""The checker's process: it runs the tests, and asks the candidate for what they call.

It holds nothing of the candidate's code. Names that tests use and do not define are looked up in the candidate;
arguments and results cross as plain data (`sandbox_values.py`), and comparisons happen here. Runs inside the sandbox:
standard library only.
"""

import builtins
import functools
import marshal
import os
from _thread import RLock

from sandbox_line import Gone, describe, failure_of, is_short, rebuild
from sandbox_values import NOT_BUILTIN, PROTOCOLS, PROTOCOLS_AT, Codec, Uncarried, pickle_builtin, renew

NAMES = ("__name__", "__doc__", "__qualname__", "__module__")
"""Attributes that functions show to the other side, as decorators copy them."""


class Client:
    """The checker's side of the line."""

    def __init__(self, line):
        self.line = line
        self.callbacks = []
        self.handles = {}
        self.broken = ""
        """Why the candidate can no longer be asked; a program with such a line never passes."""
        self.codec = Codec(self._number_of, self._object_of)
        self.one_at_a_time = RLock()
        """Held from a request to its answer: threads of the tests share the line."""

    def _number_of(self, value):
        if isinstance(value, Handle):
            return b"h", number_of(value)
        if callable(value):
            self.callbacks.append(value)
            names = {name: getattr(value, name, None) for name in NAMES}
            return b"k", len(self.callbacks) - 1, {name: text for name, text in names.items() if type(text) is str}
        raise Uncarried(f"a test passes a {type(value).__name__}, which is no plain data")

    def _object_of(self, tag, number, names=None):
        if tag == b"k":
            return self.callbacks[number]
        number, protocols = number & (1 << PROTOCOLS_AT) - 1, number >> PROTOCOLS_AT
        if number not in self.handles:
            self.handles[number] = handle_class(protocols)(self, number)
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
                    names, text, code, made_of = self.codec.decode(parts[0])
                    if type(names) is not list or {*map(type, names), type(text)} != {str}:
                        raise Gone("sent what is no answer")
                    if type(made_of) is not tuple or not all(map(is_short, made_of)):
                        made_of = None
                    raised = rebuild((names, text, code if type(code) in (int, str) else None, made_of))
                    break
                else:
                    raise Gone("sent what is no answer")
        except (Uncarried, IndexError, RecursionError) as error:
            self.broken = f"sent what is no answer ({error})"
            raise Gone(self.broken) from None
        except Gone as error:
            self.broken = str(error)
            raise
        raise raised  # behind the try, which would take the candidate's own IndexError for a broken line

    def _called_back(self, parts):
        number, count, names, *values = map(self.codec.decode, parts)
        if [type(number), type(count), type(names)] != [int, int, list] or not 0 <= count <= len(values):
            raise Gone("sent what is no answer")
        if {*map(type, names)} - {str} or len(names) != len(values) - count:
            raise Gone("sent what is no answer")
        function = self.callbacks[number]
        try:
            result = function(*values[:count], **dict(zip(names, values[count:], strict=True)))
            result = (b"A", self.codec.encode(result), *self.codec.changed(values, parts[3:]))
        except Exception as error:
            result = (b"X", self.codec.encode(failure_of(error)))
        self.line.send(*result)

    def ask(self, kind, *parts):
        """Send one request and return the parts of its answer."""
        with self.one_at_a_time:
            if self.broken:
                raise Gone(self.broken)
            try:
                self.line.send(kind, *parts)
            except BrokenPipeError:
                self.broken = "ended without an answer"
                raise Gone(self.broken) from None
            return self.answer()

    def do(self, operation, *operands):
        """The result of one of `OPERATIONS`."""
        return self.ask(b"O", *(self.codec.encode(value) for value in (operation, *operands)))[0]

    def call(self, function, positional, named):
        """Call the candidate's function; arguments that it changed are changed here too."""
        values = [*positional, *named.values()]
        try:
            request = b"C", pickle_builtin((number_of(function), positional, named))
        except NOT_BUILTIN:
            parts = ("call", function, len(positional), list(named), *values)
            request = b"O", *(self.codec.encode(part) for part in parts)
        result, *changed = self.ask(*request)
        for place, after in zip(changed[::2], changed[1::2], strict=True):
            if type(place) is int and 0 <= place < len(values):
                renew(values[place], after)
        return result

    def name(self, name):
        """What the candidate's module has under `name`. Raises KeyError."""
        try:
            return self.ask(b"N", self.codec.encode(name))[0]
        except AttributeError:
            raise KeyError(name) from None


class Handle:
    """An object of the candidate that is no plain data: a function, a class, an instance, an iterator.

    What is done with it happens in the candidate, and what comes back is data or another handle. It is never equal to
    data, and orders with handles only: an object does not decide by itself that it is the right answer.
    """

    __slots__ = ("_client", "_number")

    def __init__(self, client, number):
        object.__setattr__(self, "_client", client)
        object.__setattr__(self, "_number", number)

    def __getattr__(self, name):
        if name.startswith("__") and name not in NAMES:
            raise AttributeError(name)
        return _client(self).do("getattr", self, name)

    def __setattr__(self, name, value):
        _client(self).do("setattr", self, name, value)

    def __delattr__(self, name):
        _client(self).do("delattr", self, name)

    def __bool__(self):
        return _client(self).do("bool", self)

    def __str__(self):
        return _client(self).do("str", self)

    def __repr__(self):
        return _client(self).do("repr", self)

    def __instancecheck__(self, value):
        return isinstance(value, Handle) and _client(self).do("isinstance", value, self) is True

    def __eq__(self, other):
        return self is other or (isinstance(other, Handle) and _client(self).do("eq", self, other) is True)

    def __ne__(self, other):
        return not self == other

    def __hash__(self):
        return _client(self).do("hash", self)

    def __lt__(self, other):
        return _client(self).do("lt", self, other) if isinstance(other, Handle) else NotImplemented

    def __le__(self, other):
        return _client(self).do("le", self, other) if isinstance(other, Handle) else NotImplemented

    def __gt__(self, other):
        return _client(self).do("gt", self, other) if isinstance(other, Handle) else NotImplemented

    def __ge__(self, other):
        return _client(self).do("ge", self, other) if isinstance(other, Handle) else NotImplemented


def _client(handle):
    return object.__getattribute__(handle, "_client")


def number_of(handle):
    """The number that a handle goes by."""
    return object.__getattribute__(handle, "_number")


def _iterate(handle):
    found = _client(handle).do("iter", handle)
    return found if isinstance(found, Handle) else iter(found)


_METHODS = {
    "__call__": lambda self, /, *positional, **named: _client(self).call(self, positional, named),
    "__iter__": _iterate,
    "__next__": lambda self: _client(self).do("next", self),
    "__len__": lambda self: _client(self).do("len", self),
    "__getitem__": lambda self, key: _client(self).do("getitem", self, key),
    "__setitem__": lambda self, key, value: _client(self).do("setitem", self, key, value),
    "__delitem__": lambda self, key: _client(self).do("delitem", self, key),
    "__float__": lambda self: _client(self).do("float", self),
    "__index__": lambda self: _client(self).do("index", self),
}


@functools.cache
def handle_class(protocols):
    """The class of handles of objects that have these protocols and no other, so that tests may ask for them."""
    named = {name: _METHODS[name] for place, name in enumerate(PROTOCOLS) if protocols >> place & 1}
    for name in ("__doc__", "__module__"):  # every class has these, so that nobody would ask for an instance's
        named[name] = property(functools.partial(Handle.__getattr__, name=name))
    return type("Handle", (Handle,), {"__slots__": (), **named})


class Names(dict):
    """Globals of the tests. What tests call is the candidate's; other names are theirs, a builtin, or the candidate's.

    So a candidate that defines `check` or `zip` for itself changes no test.
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
        elif hasattr(builtins, name):
            value = getattr(builtins, name)
        else:
            value = self.client.name(name)
            if not isinstance(value, Handle):  # the program may have another value there by the next look
                return value
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


def ending():
    """How the candidate's process ended, as far as is known."""
    collect()
    return f" (exit status {next(iter(_ended.values()))})" if len(_ended) == 1 else ""
