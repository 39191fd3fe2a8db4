"""Values that cross between a candidate and its tests: a bounded, closed encoding of plain data.

Nothing here runs code of the other side: `decode` builds exact builtin and standard types (and numpy arrays) from
bytes and refuses everything else. A named tuple arrives as one with the same names, an instance of another subclass as
what it is underneath; what is no data at all (functions, classes, instances, iterators) goes by number, see `Codec`.
Copies lose shared references. Runs inside the sandbox: standard library only.

What tests pass to a candidate goes as a pickle where it is of builtin types alone, which takes a fraction of the time.
Whoever reads a pickle runs what it says, so none comes back: the candidate's process reads them, the checker's none but
those that it wrote itself (`_rows_of`).
"""

import builtins
import itertools
import struct
import sys
from array import array
from io import BytesIO
from pickle import Pickler, loads

MAX_DEPTH = 400
"""Nesting of containers that is carried; one of the standard library's, such as a deque, counts as three."""

_GET_DEPTH = 3 * MAX_DEPTH + 8
"""The same as `decode` counts: the parts of a container that are values of their own, as keys of a dict, count too."""

_FRAMES = 4 * _GET_DEPTH
"""Calls within each other that so much nesting takes on either side, at most."""

MAX_BYTES = 1 << 31
"""Size of one message."""

_HEAD = struct.Struct("<cQ")
_NATURAL = struct.Struct("<Q")
_DTYPE = r"[<>|=](?:[biufc](?:1|2|4|8|16|32)|[SU]\d{1,6}|[mM]8(?:\[\d*[A-Za-z]{1,2}\])?)"
_ATOMS = {int, bool, str, type(None)}
_SHORT = 4  # lists below this length are not worth a look for a packed form
_LONG = 16  # rows from this width on are quicker one by one than joined
_AT_ONCE = 1 << 16  # items of a pickle that reads or makes rows
_KNOWN = 1 << 12  # texts, equal ones counted apart, that a pickle is to know

CLASSES = ("int", "float", "complex", "bool", "str", "bytes", "bytearray", "list", "tuple", "dict", "set", "frozenset")
CLASSES += ("object", "range", "slice")
"""Builtin classes that go by name; exceptions do too."""


PROTOCOLS = ("__call__", "__iter__", "__next__", "__len__", "__getitem__", "__setitem__", "__delitem__")
PROTOCOLS += ("__float__", "__index__")
"""What tests can do with some objects of a candidate only. The numbers of objects say it, a bit for each.

None of these is asked whether a value of the tests is the right one, as `__contains__` would be."""

PROTOCOLS_AT = 48
"""The first of these bits."""


class Uncarried(TypeError):
    """A value that cannot be passed by value, or bytes that are no value."""


EXCEPTIONS = {
    "JSONDecodeError": "json.decoder",
    "FrozenInstanceError": "dataclasses",
    "StatisticsError": "statistics",
    "Empty": "queue",
    "Full": "queue",
    **dict.fromkeys(("DecimalException", "DivisionByZero", "InvalidOperation", "Overflow", "Inexact"), "decimal"),
}
"""Exceptions of the standard library that functions raise for their callers, and their modules."""


def exception_class(name):
    """The builtin exception `name`, or one of `EXCEPTIONS` if its module is loaded, as by tests that name it; or None.

    No others of modules: some, such as `unittest.SkipTest`, say more to who runs tests than that something failed.
    """
    found = getattr(builtins, name, None) or getattr(sys.modules.get(EXCEPTIONS.get(name)), name, None)
    return found if isinstance(found, type) and issubclass(found, BaseException) else None


def exception_name(kind):
    """The name by which a class of exceptions is sent: a candidate's own class has no name of `EXCEPTIONS`."""
    name = kind.__name__
    return "" if name in EXCEPTIONS and kind is not exception_class(name) else name


NOT_BUILTIN = (Uncarried, RecursionError, ValueError)
"""What `pickle_builtin` raises for other values, for what is nested too deep, and for what holds itself."""


class _BuiltinPickler(Pickler):
    """Is asked about whatever is not exactly of a builtin type."""

    def reducer_override(self, value):
        raise Uncarried(f"a {type(value).__name__} is not of a builtin type")


def pickle_builtin(value):
    """The pickle of a value of exact builtin types; equal for equal values in equal order.

    Raises:
        NOT_BUILTIN: it is none, or none that can be pickled.
    """
    file = BytesIO()
    pickler = _BuiltinPickler(file, 5)
    pickler.fast = True  # remembers nothing: what is shared goes twice, as in all copies
    pickler.dump(value)
    return file.getvalue()


class _room:
    """Room for `_FRAMES` more calls within each other than the process may have."""

    def __enter__(self):
        self.limit = sys.getrecursionlimit()
        sys.setrecursionlimit(self.limit + _FRAMES)

    def __exit__(self, *exception):
        sys.setrecursionlimit(self.limit)


FIXED = {int, float, complex, bool, str, bytes, type(None), frozenset, range}
"""Types whose values no call can change."""


def renew(old, new):
    """Give `old` the content of `new` in place, as far down as both are of the same mutable kind."""
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


class Codec:
    """Encodes and decodes values.

    Args:
        number_of: gives the pair (tag byte, number) of an object that is no data, or raises `Uncarried`; of a function
            of the tests also its names, a dict.
        object_of: gives the object for what came from the other side.
    """

    def __init__(self, number_of, object_of):
        self.number_of = number_of
        self.object_of = object_of
        self.named_tuples = {}
        """Classes of named tuples by name and fields, those that were sent and those that were made of what came."""

    def encode(self, value):
        """The bytes of `value`. Raises `Uncarried`."""
        parts = []
        with _room():
            self._put(value, parts.append, 0)
        return b"".join(parts)

    def decode(self, data):
        """The value of `data`. Raises `Uncarried` for whatever is wrong with it."""
        try:
            with _room():
                value, end = self._get(memoryview(data), 0, 0)
        except MemoryError:
            raise
        except Exception as error:  # constructors of many types, given anything, raise anything
            raise Uncarried(f"unreadable value: {error}"[:300]) from None
        if end != len(data):
            raise Uncarried("unreadable value: bytes left over")
        return value

    def changed(self, values, before):
        """The place and the new value, encoded, of each argument that is no longer what its bytes `before` say."""
        found = []
        for place, (value, old) in enumerate(zip(values, before, strict=True)):
            if type(value) not in FIXED and (new := self.encode(value)) != old:
                found += [self.encode(place), new]
        return found

    def _put(self, value, put, depth):
        if depth > MAX_DEPTH:
            raise Uncarried(f"a value nested deeper than {MAX_DEPTH} levels cannot be passed")
        kind = type(value)
        if value is None or value is True or value is False:
            put(_HEAD.pack(b"N" if value is None else b"T" if value else b"F", 0))
        elif kind is int:
            self._put_bytes(b"i", b"%x" % value, put)
        elif kind is float:
            put(_HEAD.pack(b"f", 8) + struct.pack("<d", value))
        elif kind is str:
            self._put_bytes(b"s", value.encode("utf-8", "surrogatepass"), put)
        elif kind is list or kind is tuple:
            self._put_sequence(b"[" if kind is list else b"(", value, put, depth)
        elif kind is dict:
            self._put_dict(b"d", value, put, depth)
        elif kind in (set, frozenset):
            put(_HEAD.pack(b"{" if kind is set else b"<", 0))
            self._put_sequence(b"[", list(value), put, depth)
        elif kind is complex:
            put(_HEAD.pack(b"c", 16) + struct.pack("<dd", value.real, value.imag))
        elif kind is bytes or kind is bytearray:
            self._put_bytes(b"b" if kind is bytes else b"y", bytes(value), put)
        elif value is Ellipsis or value is NotImplemented:
            put(_HEAD.pack(b"E" if value is Ellipsis else b"M", 0))
        elif kind is range or kind is slice:
            put(_HEAD.pack(b"r" if kind is range else b"l", 0))
            self._put_sequence(b"(", (value.start, value.stop, value.step), put, depth)
        elif kind in (type({}.keys()), type({}.values()), type({}.items())):
            put(_HEAD.pack({"dict_keys": b"1", "dict_values": b"2", "dict_items": b"3"}[kind.__name__], 0))
            self._put_sequence(b"[", list(value), put, depth)
        elif kind is type and value.__module__ == "builtins" and getattr(builtins, value.__name__, None) is value:
            if value.__name__ in CLASSES or issubclass(value, BaseException):
                self._put_bytes(b"B", value.__name__.encode(), put)
            else:
                self._put_number(value, put)
        elif isinstance(value, type) or not self._put_library(value, kind, put, depth):
            self._put_number(value, put)

    def _put_bytes(self, tag, data, put):
        put(_HEAD.pack(tag, len(data)))
        put(data)

    def _put_number(self, value, put):
        tag, number, *names = self.number_of(value)
        put(_HEAD.pack(tag, number))
        if tag == b"k":
            self._put(*names, put, 0)

    def _put_sequence(self, tag, items, put, depth):
        put(_HEAD.pack(tag, len(items)))
        if type(items) is _Joined and items.width >= _LONG and (found := _places_of(items.rows)):
            self._put_bytes(b"v", found[1], put)
            return self._put_sequence(b"[", found[0], put, depth)
        kinds = set(map(type, items)) if len(items) >= _SHORT else set()
        if kinds and kinds <= _ATOMS and kinds != {int}:
            one = len(kinds) == 1
            keys = (lambda: items) if one else (lambda: zip(map(type, items), items, strict=True))  # True is not 1
            distinct = list(dict.fromkeys(keys()))
            if len(distinct) <= len(items) // 4:  # few values, many times: also shared on the other side
                places = {key: place for place, key in enumerate(distinct)}
                width = next(code for code in "BHIQ" if len(distinct) <= 256 ** array(code).itemsize)
                found = map(places.__getitem__, keys())
                self._put_bytes(b"v", bytes(found) if width == "B" else array(width, found).tobytes(), put)
                return self._put_sequence(b"[", [key if one else key[1] for key in distinct], put, depth)
        if len(kinds) == 1:
            kind = next(iter(kinds))
            if kind is int:
                try:
                    return self._put_bytes(b"q", array("q", items).tobytes(), put)
                except OverflowError:
                    pass  # integers of more than 64 bits go one by one
            elif kind is float:
                return self._put_bytes(b"e", array("d", items).tobytes(), put)
            elif kind is str:
                text = "\0".join(items)
                if text.count("\0") == len(items) - 1:
                    return self._put_bytes(b"S", text.encode("utf-8", "surrogatepass"), put)
            elif kind in (list, tuple):
                widths = set(map(len, items))
                if len(widths) == 1 and (width := widths.pop()):
                    put(_HEAD.pack(b"L" if kind is list else b"t", width))
                    return self._put_sequence(b"[", _Joined(items, width), put, depth + 1)
        elif len(items) >= _LONG and kinds <= _ATOMS | {float}:  # which kind each is, and those of a kind together
            kinds = sorted(kinds, key=lambda kind: kind.__name__)
            number = {kind: place for place, kind in enumerate(kinds)}
            self._put_bytes(b"x", bytes(map(number.__getitem__, map(type, items))), put)
            put(_HEAD.pack(b"[", len(kinds)) + _HEAD.pack(b".", 0))
            for kind in kinds:
                self._put([item for item in items if type(item) is kind], put, depth + 1)
            return None
        put(_HEAD.pack(b".", 0))
        for item in items:
            self._put(item, put, depth + 1)
        return None

    def _put_dict(self, tag, value, put, depth):
        put(_HEAD.pack(tag, 0))
        self._put_sequence(b"[", list(dict.keys(value)), put, depth)
        self._put_sequence(b"[", list(dict.values(value)), put, depth)

    def _put_library(self, value, kind, put, depth):
        """Types of the standard library and numpy by their exact class; else, of any subclass, the builtin below."""
        name = f"{kind.__module__}.{kind.__qualname__}"
        if kind is getattr(sys.modules.get(kind.__module__), kind.__qualname__, None):
            if name == "collections.OrderedDict" or name == "collections.Counter":
                self._put_dict(b"O" if kind.__name__ == "OrderedDict" else b"C", value, put, depth)
                return True
            if name == "collections.defaultdict":
                put(_HEAD.pack(b"D", 0))
                factory = value.default_factory
                self._put(factory.__name__ if factory in (int, float, str, list, dict, set) else "", put, depth)
                self._put_dict(b"d", value, put, depth)
                return True
            if name in _PLAIN:
                put(_HEAD.pack(b"P", _NAMES.index(name)))
                self._put(_PLAIN[name][0](value), put, depth + 1)
                return True
            if kind.__module__ == "numpy":
                numpy = sys.modules["numpy"]
                if kind is numpy.ndarray or issubclass(kind, numpy.generic):
                    return self._put_numpy(value, numpy, put, depth)
        for base, raw in ((int, int.__int__), (float, float.__float__), (str, str.__str__)):
            if issubclass(kind, base):
                self._put(raw(value), put, depth)
                return True
        if issubclass(kind, tuple) and _are_fields(fields := getattr(kind, "_fields", None)):
            key = kind.__name__, fields
            self.named_tuples.setdefault(key, kind)
            put(_HEAD.pack(b"m", 0))
            self._put((*key, tuple(tuple.__iter__(value))), put, depth)
            return True
        for base in (list, tuple, set, frozenset, bytes, bytearray):
            if issubclass(kind, base):
                plain = base(base.__iter__(value))
                self._put(plain, put, depth)
                return True
        if issubclass(kind, dict):
            self._put_dict(b"d", value, put, depth)
            return True
        return False

    def _put_numpy(self, value, numpy, put, depth):
        scalar = not isinstance(value, numpy.ndarray)
        block = numpy.asarray(value)
        if block.dtype == object:
            put(_HEAD.pack(b"o", 0))
            self._put((block.shape, list(block.flat)), put, depth + 1)
            return True
        if not _is_plain(block.dtype.str):
            return False
        put(_HEAD.pack(b"g" if scalar else b"n", 0))
        self._put((block.dtype.str, block.shape, block.tobytes()), put, depth + 1)
        return True

    def _get(self, data, at, depth):
        """(value, end) of the value that starts at `at`."""
        if depth > _GET_DEPTH:
            raise ValueError("nested too deep")
        tag, size = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        if (scalar := _SCALARS.get(tag)) is not None:
            end = at + size
            if end > len(data):
                raise ValueError("cut short")
            return scalar(bytes(data[at:end])), end
        if tag in _CONSTANTS:
            return _CONSTANTS[tag], at
        if tag in b"[(":
            return self._get_sequence(tag, size, data, at, depth)
        if tag in b"dOC":
            return self._get_dict(tag, data, at, depth)
        if tag == b"h":
            return self.object_of(tag, size), at
        value, end = self._get(data, at, depth + 1)
        if tag == b"k":
            return self.object_of(tag, size, _of(dict, value)), end
        if tag == b"{":
            return set(_of(list, value)), end
        if tag == b"<":
            return frozenset(_of(list, value)), end
        if tag in b"rl":
            return (range if tag == b"r" else slice)(*_of(tuple, value)), end
        if tag == b"1":
            return dict.fromkeys(_of(list, value)).keys(), end
        if tag == b"2":
            return dict(enumerate(_of(list, value))).values(), end
        if tag == b"3":
            return dict(_of(list, value)).items(), end
        if tag == b"D":
            from collections import defaultdict

            factories = {"int": int, "float": float, "str": str, "list": list, "dict": dict, "set": set}
            items, end = self._get(data, end, depth + 1)
            return defaultdict(factories.get(_of(str, value)), _of(dict, items)), end
        if tag == b"P":
            return _PLAIN[_NAMES[size]][1](value), end
        if tag in b"ngo":
            return _get_numpy(tag, _of(tuple, value)), end
        if tag == b"m":
            return self._named_tuple(*_of(tuple, value)), end
        raise ValueError(f"tag {tag!r}")

    def _named_tuple(self, name, fields, items):
        key = _of(str, name), _of(tuple, fields)
        if key not in self.named_tuples:
            from collections import namedtuple

            self.named_tuples[key] = namedtuple(name, fields)  # refuses what is no name
        if len(_of(tuple, items)) != len(fields):
            raise ValueError("fields do not fit")
        return tuple.__new__(self.named_tuples[key], items)

    def _get_dict(self, tag, data, at, depth):
        keys, at = self._get(data, at, depth + 1)
        values, at = self._get(data, at, depth + 1)
        value = dict(zip(_of(list, keys), _of(list, values), strict=True))
        if tag == b"d":
            return value, at
        from collections import Counter, OrderedDict

        if tag == b"O":
            return OrderedDict(value), at
        counter = Counter()
        dict.update(counter, value)
        return counter, at

    def _get_sequence(self, tag, count, data, at, depth):
        items, found, end = self._get_items(count, data, at, depth)
        if found != count:
            raise ValueError("wrong count")
        return (items if type(items) is list and tag == b"[" else (list if tag == b"[" else tuple)(items)), end

    def _get_items(self, count, data, at, depth):
        """(items, how many, end) of a sequence that says to have `count`."""
        form, size = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        if form in b"qeS":
            end = at + size
            if end > len(data):
                raise ValueError("cut short")
            if form == b"S":
                items = bytes(data[at:end]).decode("utf-8", "surrogatepass").split("\0")
            else:
                block = array("q" if form == b"q" else "d")
                block.frombytes(data[at:end])
                items = block.tolist()
        elif form == b"v":
            end = at + size
            if not count or size % count or size > len(data) - at:
                raise ValueError("cut short")
            places = array({1: "B", 2: "H", 4: "I", 8: "Q"}[size // count])
            places.frombytes(data[at:end])
            distinct, end = self._get(data, end, depth + 1)
            return _Packed(_of(list, distinct), places), len(places), end
        elif form == b"x":
            end = at + size
            kinds, (groups, end) = bytes(data[at:end]), self._get(data, end, depth + 1)
            if [kinds.count(place) for place in range(len(_of(list, groups)))] != list(map(len, groups)):
                raise ValueError("kinds do not fit")
            items = list(map(next, map(list(map(iter, groups)).__getitem__, kinds)))
        elif form in b"Lt":
            tag, number = _HEAD.unpack_from(data, at)
            if tag != b"[" or depth + 1 > _GET_DEPTH:
                raise ValueError("rows do not fit")
            flat, found, end = self._get_items(number, data, at + _HEAD.size, depth + 1)
            if found != number or not 0 < size <= number or number % size:
                raise ValueError("rows do not fit")
            if type(flat) is _Packed and flat.is_text:
                return _rows_of(flat, form == b"L", size), number // size, end
            if size < 1024:
                items = zip(*[iter(flat)] * size, strict=True)
            else:
                flat = list(flat)
                items = [tuple(flat[i : i + size]) for i in range(0, number, size)]
            return (map(list, items) if form == b"L" else items), number // size, end
        elif form == b".":
            items, end = [], at
            for _ in range(count):
                item, end = self._get(data, end, depth + 1)
                items.append(item)
        else:
            raise ValueError(f"form {form!r}")
        return items, len(items), end


class _Joined:
    """The items of rows of one width, one after the other, without a list of them all."""

    def __init__(self, rows, width):
        self.rows = rows
        self.width = width

    def __len__(self):
        return len(self.rows) * self.width

    def __iter__(self):
        return itertools.chain.from_iterable(self.rows)


def _places_of(rows):
    """(the distinct texts of rows, for each item the byte that says which it is), or None unless a few texts are all.

    A pickle finds them by their identity, in half the time that looking up their values takes: of the texts that it
    knows it says the numbers (GET), two bytes for each item, and of all else something else.
    """
    known, places, found = {}, {}, bytearray()
    for start in range(0, len(rows), at_once := max(1, _AT_ONCE // len(rows[0]))):
        items = tuple(itertools.chain.from_iterable(rows[start : start + at_once]))
        block = _numbers(items, known)
        if block is None:
            if not all(type(item) is str for item in items):
                return None
            known |= {id(item): (places.setdefault(item, len(places)), item) for item in items}
            if len(places) > 256 or len(known) > _KNOWN:
                return None
            block = _numbers(items, known)
        found += block
    return (list(places), found) if len(places) <= len(found) // 4 else None


def _numbers(items, known):
    """The bytes that a pickler's memo `known` has for the items of a tuple, or None if it lacks one."""
    file = BytesIO()
    pickler = _BuiltinPickler(file, 2)
    pickler.fast, pickler.memo = True, known
    try:
        pickler.dump(items)
    except NOT_BUILTIN:
        return None
    body = file.getbuffer()[3:-2]  # between PROTO, MARK and TUPLE, STOP
    return body[1::2].tobytes() if len(body) == 2 * len(items) and body[::2] == b"h" * len(items) else None


class _Packed:
    """Items as places in a list of the distinct ones."""

    def __init__(self, distinct, places):
        self.distinct = distinct
        self.places = places
        self.is_text = places.itemsize == 1 and len(distinct) <= 256 and set(map(type, distinct)) == {str}

    def __iter__(self):
        return map(self.distinct.__getitem__, self.places)


def _rows_of(packed, are_lists, width):
    """The rows of packed text, as lists or tuples of `width` items.

    A pickle makes them in half the time. Of the candidate's are, in between what stands here, the numbers of the texts
    (GET), and one that there is no text for is an error; the texts come beside it and are shared.
    """
    head = b"".join(b"\x97q%c0" % number for number in range(len(packed.distinct)))  # NEXT_BUFFER, BINPUT, POP
    before, behind = (b"](", b"e") if are_lists else (b"(", b"t")  # EMPTY_LIST, MARK, APPENDS; MARK, TUPLE
    at_once = max(1, _AT_ONCE // width)
    rows, stride = [], len(before) + 2 * width + len(behind)
    for start in range(0, len(packed.places), at_once * width):
        places = packed.places[start : start + at_once * width].tobytes()
        body = bytearray((before + b"h\0" * width + behind) * (len(places) // width))
        for column in range(width):
            body[len(before) + 1 + 2 * column :: stride] = places[column::width]
        rows += loads(b"%b(%bl." % (head, body), buffers=packed.distinct)
    return rows


def _are_fields(fields):
    return type(fields) is tuple and {*map(type, fields)} <= {str}


def _of(kind, value):
    """`value` if it is exactly of `kind`."""
    if type(value) is not kind:
        raise ValueError(f"{kind.__name__} expected")
    return value


def _get_class(name):
    name = name.decode("ascii")
    found = getattr(builtins, name) if name in CLASSES else exception_class(name)
    if found is None:
        raise ValueError(f"no class {name}")
    return found


def _is_plain(dtype):
    """Whether numpy reads this description of a type as data alone."""
    import re  # numpy has it; without numpy a program starts sooner without it

    return re.fullmatch(_DTYPE, dtype) is not None


def _get_numpy(tag, parts):
    import numpy

    if tag == b"o":
        shape, items = parts
        block = numpy.empty(len(_of(list, items)), dtype=object)
        block[:] = items
        return block.reshape(_of(tuple, shape))
    dtype, shape, data = parts
    if not _is_plain(_of(str, dtype)):
        raise ValueError("dtype")
    block = numpy.frombuffer(_of(bytes, data), dtype=dtype).reshape(_of(tuple, shape)).copy()
    return block[()] if tag == b"g" else block


_CONSTANTS = {b"N": None, b"T": True, b"F": False, b"E": Ellipsis, b"M": NotImplemented}
_SCALARS = {
    b"i": lambda data: int(data, 16),
    b"s": lambda data: data.decode("utf-8", "surrogatepass"),
    b"S": lambda data: data.decode("utf-8", "surrogatepass"),
    b"b": bytes,
    b"y": bytearray,
    b"B": _get_class,
    b"f": lambda data: struct.unpack("<d", data)[0],
    b"c": lambda data: complex(*struct.unpack("<dd", data)),
}


def _zone(zone):
    """A time zone as data: None, an offset, or a key of the zone database."""
    if zone is None or type(zone).__name__ == "timezone":
        return None if zone is None else zone.utcoffset(None)
    if type(zone).__name__ == "ZoneInfo":
        return zone.key
    raise Uncarried(f"a time zone of type {type(zone).__name__} cannot be passed")


def _of_zone(data):
    import datetime
    import zoneinfo

    if data is None:
        return None
    return zoneinfo.ZoneInfo(data) if type(data) is str else datetime.timezone(data)


def _library(module, name):
    def build(data):
        return getattr(__import__(module), name)(*_of(tuple, data))

    return build


def _timed(name):
    def build(data):
        import datetime

        *fields, fold, zone = _of(tuple, data)
        return getattr(datetime, name)(*fields, tzinfo=_of_zone(zone), fold=fold)

    return build


_CLOCK = ("hour", "minute", "second", "microsecond", "fold")
_PLAIN = {
    "decimal.Decimal": (lambda v: (str(v),), _library("decimal", "Decimal")),
    "fractions.Fraction": (lambda v: (v.numerator, v.denominator), _library("fractions", "Fraction")),
    "collections.deque": (lambda v: (list(v), v.maxlen), _library("collections", "deque")),
    "datetime.date": (lambda v: (v.year, v.month, v.day), _library("datetime", "date")),
    "datetime.timedelta": (lambda v: (v.days, v.seconds, v.microseconds), _library("datetime", "timedelta")),
    "datetime.datetime": (
        lambda v: (v.year, v.month, v.day, *(getattr(v, n) for n in _CLOCK), _zone(v.tzinfo)),
        _timed("datetime"),
    ),
    "datetime.time": (lambda v: (*(getattr(v, n) for n in _CLOCK), _zone(v.tzinfo)), _timed("time")),
    "datetime.timezone": (lambda v: (v.utcoffset(None),), _library("datetime", "timezone")),
    "zoneinfo.ZoneInfo": (lambda v: (v.key,), _library("zoneinfo", "ZoneInfo")),
    "uuid.UUID": (lambda v: (str(v),), _library("uuid", "UUID")),
    "array.array": (lambda v: (v.typecode, v.tolist()), _library("array", "array")),
}
_NAMES = list(_PLAIN)
