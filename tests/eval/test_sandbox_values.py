"""What crosses between a candidate and its tests arrives as it was, and nothing else arrives."""

import collections
import datetime
import decimal
import fractions
import pickle
import random
import sys
import uuid
import zoneinfo
from array import array

import numpy as np
import pytest

from coda_eval import sandbox_values
from coda_eval.sandbox_values import NOT_BUILTIN, Codec, Uncarried, pickle_builtin

CODEC = Codec(lambda value: (b"h", 7), lambda tag, number: ("object", number))
NAMED = collections.namedtuple("Named", "a b")
VALUES = [
    None, True, Ellipsis, 0, -5, 1 << 200, -(1 << 63), -0.0, 1e300, float("inf"), 1j, "", "a\0b", "\ud800", b"x",
    bytearray(b"y"), [], (), {}, set(), frozenset({1}), [1] * 10, [1 << 70] * 5, [1.5] * 9,
    ["a"] * 100, ["a", "b\0"] * 4,
    [True] * 5, [None] * 5, [[1, 2], [3, 4]] * 5, [(1, "a")] * 5, [(1, 2)] * 70, [["x"] * 70] * 4, [[], [], [], []],
    [[["a", "b"]] * 4] * 4, {"a": [1, 2, {3}], (1, 2): None}, range(3, 9, 2), slice(1, None), int, ValueError,
    collections.OrderedDict(a=1), collections.Counter("aab"), collections.defaultdict(list, {1: [2]}),
    collections.deque([1, 2], 5), decimal.Decimal("1.50"), fractions.Fraction(3, 4), datetime.date(2020, 2, 29),
    datetime.timedelta(3, 4, 5), datetime.time(3, 4, fold=1), datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC),
    datetime.datetime(2020, 1, 1, tzinfo=zoneinfo.ZoneInfo("Europe/Paris")), uuid.UUID(int=5), array("i", [1, 2]),
    np.arange(6).reshape(2, 3), np.float64(2.5), np.bool_(True), np.array(["ab", "c"]),
    np.array([1, None], dtype=object), [True, 1, 1, 0] * 9, [None, "a", 1, True, "1"] * 20, [(True, 1)] * 70,
    [[0, False] * 600] * 5, [str(n) for n in range(300)] * 4, [["a"] * 20, ["b"] * 20] * 4,
    [[str(n) for n in range(300)]] * 9, [((1, True), (0, None))] * 9, [("a",) * 1030] * 3, NAMED(1, [2]),
    [*range(20), *(n / 2 for n in range(20)), True], tuple([1, 3, *(n / 3 for n in range(50)), None, "a", 1 << 70]),
    [(n, n / 7) for n in range(30)], [[str(n), n, n / 7] for n in range(30)],
]  # fmt: skip


def same(a, b) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and repr(a) == repr(b)
    return repr(a) == repr(b)


def test_values_arrive_as_they_were():
    assert [value for value in VALUES if not same(value, CODEC.decode(CODEC.encode(value)))] == []
    assert list(CODEC.decode(CODEC.encode({1: 2}.items()))) == [(1, 2)]


def test_subclasses_arrive_as_what_they_are_underneath():
    class Equal(int):
        def __eq__(self, other):
            return True

        __hash__ = int.__hash__

    received = CODEC.decode(CODEC.encode([Equal(5), type("S", (str,), {"__str__": lambda s: "z"})("s")]))
    assert [type(value) for value in received] == [int, str]
    assert received == [5, "s"]


def test_named_tuples_arrive_with_their_names_and_return_as_what_they_were():
    class Pair(collections.namedtuple("Pair", "a b")):
        def __eq__(self, other):
            return True

        __hash__ = tuple.__hash__

    here, there = (Codec(CODEC.number_of, CODEC.object_of) for _ in range(2))
    received = there.decode(here.encode([Pair(1, [2])]))[0]
    assert (received.a, received.b, repr(received), type(received).__mro__[1]) == (1, [2], "Pair(a=1, b=[2])", tuple)
    assert received == (1, [2])
    assert received != (1, [3])
    assert type(here.decode(there.encode(received))) is Pair
    with pytest.raises(Uncarried, match="fields do not fit"):
        there.decode(here.encode(tuple.__new__(Pair, (1, 2, 3))))


@pytest.mark.parametrize("name", ["a b", "1a", "if", "a;b", "_a", "a)"])
def test_what_cannot_be_the_name_of_a_named_tuple_or_its_field_is_refused(name):
    def encoded(name, fields):
        class Pair(tuple):
            _fields = fields

        Pair.__name__ = name
        return CODEC.encode(Pair((1, 2)))

    reader = Codec(CODEC.number_of, CODEC.object_of)
    assert reader.decode(encoded("P", ("a", "b"))).b == 2
    for blob in (encoded("P", ("a", name)), *([encoded(name, ("a", "b"))] if name != "_a" else [])):
        with pytest.raises(Uncarried):
            reader.decode(blob)


def test_what_is_no_data_goes_by_number():
    assert CODEC.decode(CODEC.encode([len, type("C", (), {}), iter([])])) == [("object", 7)] * 3
    assert CODEC.decode(CODEC.encode(eval)) == ("object", 7)


def test_loops_and_depth_are_refused():
    loop = []
    loop.append(loop)
    with pytest.raises(Uncarried, match=f"nested deeper than {sandbox_values.MAX_DEPTH} levels"):
        CODEC.encode(loop)


@pytest.mark.parametrize(
    ("wrap", "counts"),
    [
        (lambda x: [x], 1),
        (lambda x: (x, 2), 1),
        (lambda x: {"a": x, "b": 1}, 1),
        (lambda x: [{"k": x}], 2),
        (lambda x: frozenset([x]), 1),
        (lambda x: collections.defaultdict(int, a=x), 1),
        (lambda x: collections.deque([x]), 3),
    ],
    ids=["list", "tuple", "dict", "list of dict", "set", "defaultdict", "deque"],
)
def test_what_is_nested_as_deep_as_may_be_comes_back_and_nothing_deeper_goes(wrap, counts):
    before, value = sys.getrecursionlimit(), 1
    for _ in range(sandbox_values.MAX_DEPTH // counts):
        value = wrap(value)
    received = CODEC.decode(CODEC.encode(value))
    assert CODEC.encode(received) == CODEC.encode(value)
    with pytest.raises(Uncarried, match=f"nested deeper than {sandbox_values.MAX_DEPTH} levels"):
        CODEC.encode(wrap(value))
    assert sys.getrecursionlimit() == before


def test_any_bytes_are_a_value_or_refused():
    draw = random.Random(0)
    blobs = [CODEC.encode(value) for value in VALUES]
    letters = b"NTFEMisbyfc[({<drl123BhkqeSLtvx.DOCPngom"
    refused = 0
    for _ in range(4000):
        blob = bytearray(draw.choice(blobs))
        for _ in range(draw.randint(1, 4)):
            blob[draw.randrange(len(blob))] = draw.choice([draw.randrange(256), *letters])
        try:
            CODEC.decode(bytes(blob))
        except Uncarried:
            refused += 1
    assert 1000 < refused < 4000
    for blob in (b"", b"[" * 9 * 5000, b"s" + b"\xff" * 8, b"[" + (5).to_bytes(8, "little")):
        with pytest.raises(Uncarried):
            CODEC.decode(blob)


def test_long_lists_of_few_values_are_short_and_shared_on_arrival():
    rows = CODEC.decode(CODEC.encode([("red", "green")] * 1000))
    assert rows == [("red", "green")] * 1000
    assert len({id(text) for row in rows for text in row}) == 2
    assert len(CODEC.encode(rows)) < 3000
    rows = CODEC.decode(CODEC.encode([["red", "green"] * 30] * 5000))
    assert len({id(text) for row in rows for text in row}) == 2
    assert len(CODEC.encode([(True, 1, None)] * 1000)) < 4000


def test_lists_of_numbers_of_two_kinds_are_short_and_hold_what_they_say():
    value = [n if n % 3 else n / 2 for n in range(1000)]
    blob = CODEC.encode(value)
    assert len(blob) < 9100
    assert same(CODEC.decode(blob), value)
    kinds = bytes(n % 3 > 0 for n in range(1000))
    assert blob.count(kinds) == 1
    for other in (b"\0" * 1000, b"\1" * 1000, kinds[:-1] + b"\2", kinds[:-1] + b"\xff"):
        with pytest.raises(Uncarried):
            CODEC.decode(blob.replace(kinds, other))


def test_rows_of_few_texts_arrive_as_they_were():
    class Upper(str):
        def __eq__(self, other):
            return str(self).upper() == str(other).upper()

        def __hash__(self):
            return hash(str(self).upper())

    draw = random.Random(0)
    few, many = ["", "\0", "\ud800", "\xe4", "\u65e5"], [f"text {n}" for n in range(257)]
    mixed = [["a", None], ["a", 1, b"a"], ["A", Upper("a")], [True, 1, "a"]]
    for texts in [["a", "b"], few, many[1:], many, *mixed]:
        for width, count in ((16, 9), (77, 2000), (1200, 70)):
            rows = [draw.choices(texts, k=width) for _ in range(count)]
            rows += [[text[:1] + text[1:] if type(text) is str else text for text in row] for row in rows[:9]]
            for kind in (list, tuple):
                value = list(map(kind, rows))
                assert CODEC.decode(CODEC.encode(value)) == [kind(map(plain, row)) for row in rows]
                assert set(map(type, CODEC.decode(CODEC.encode(value))[0])) <= {str, bytes, int, bool, type(None)}


def plain(value):
    return str(value) if isinstance(value, str) else value


def test_a_row_that_names_a_text_that_is_not_there_is_refused():
    blob = CODEC.encode([("red", "green") * 10] * 100)
    assert blob.count(b"\0\1" * 1000) == 1
    for number in (2, 40, 255):
        with pytest.raises(Uncarried):
            CODEC.decode(blob.replace(b"\0\1" * 1000, b"\0\1" * 999 + bytes([0, number])))


def test_pickles_hold_exact_builtin_values_alone_and_each_as_often_as_it_stands_there():
    values = [None, True, 1, 1 << 200, -0.0, "\ud800", b"x", bytearray(b"y"), [1, (2, {3})], {"a": frozenset({1.5})}]
    assert same(pickle.loads(pickle_builtin(values)), values)
    row = ["a"]
    one, other = pickle.loads(pickle_builtin((row, row)))
    assert one is not other
    loop, deep = [], []
    loop.append(loop)
    for _ in range(100_000):
        deep = [deep]
    others = [int, len, range(3), 1j, collections.Counter("a"), type("I", (int,), {})(1), np.float64(1.0), np.arange(2)]
    for value in (loop, deep, array("i", [1]), collections.namedtuple("pair", "a")(1), *others):
        with pytest.raises(NOT_BUILTIN):
            pickle_builtin([value])
