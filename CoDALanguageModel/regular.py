"""Regular languages of texts: expressions, and the finite automata over UTF-8 bytes that accept them.

Whatever is given is answered soon: counts of states and of work are bounded, and what exceeds them is refused.
Not here: tokens (`constraints`), schemas (`json_schema`).
"""

import re
import re._constants as code
import re._parser as parser
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from .errors import UserError

MAX_LENGTH = 20_000
"""Characters of an expression."""

MAX_PARTS = 40_000
"""States of the automaton that an expression spells out, each repetition on its own."""

MAX_STATES = 4096
"""States of the deterministic automaton."""

MAX_WORK = 3_000_000
"""Transitions that are looked at while it is made: a second or two."""

LAST = 0x10FFFF
Ranges = tuple[tuple[int, int], ...]
"""Code points, first and last of each range, in order and apart."""


class TooLarge(UserError):
    """An automaton that would take too long or too much memory."""


class Network:
    """A nondeterministic automaton: bytes and empty steps between numbered states."""

    def __init__(self) -> None:
        self.edges: list[list[tuple[int, int, int]]] = []
        """Of each state: first byte, last byte, target."""
        self.empty: list[list[int]] = []

    def state(self) -> int:
        """A new one."""
        if len(self.edges) >= MAX_PARTS:
            raise TooLarge(f"it spells out more than {MAX_PARTS} states: repeat less, or nest less")
        self.edges.append([])
        self.empty.append([])
        return len(self.edges) - 1


class Node(ABC):
    """A part of an expression."""

    @abstractmethod
    def build(self, net: Network, start: int, end: int) -> None:
        """Lead from `start` to `end` by exactly the texts of this part."""


@dataclass(frozen=True)
class Chars(Node):
    """One character."""

    ranges: Ranges

    def build(self, net: Network, start: int, end: int) -> None:
        """See `Node`."""
        rests: dict[tuple[tuple[int, int], ...], int] = {(): end}  # states from which these bytes lead to the end

        def state_of(rest: tuple[tuple[int, int], ...]) -> int:
            if rest not in rests:
                rests[rest] = net.state()
                net.edges[rests[rest]].append((*rest[0], state_of(rest[1:])))
            return rests[rest]

        for sequence in utf8_sequences(self.ranges):
            net.edges[start].append((*sequence[0], state_of(sequence[1:])))


@dataclass(frozen=True)
class Seq(Node):
    """Parts one after the other; none is the empty text."""

    parts: tuple[Node, ...]

    def build(self, net: Network, start: int, end: int) -> None:
        """See `Node`."""
        for part in self.parts:
            following = net.state()
            part.build(net, start, following)
            start = following
        net.empty[start].append(end)


@dataclass(frozen=True)
class Alt(Node):
    """One of some parts."""

    parts: tuple[Node, ...]

    def build(self, net: Network, start: int, end: int) -> None:
        """See `Node`."""
        for part in self.parts:
            part.build(net, start, end) if isinstance(part, Chars) else _apart(part, net, start, end)


@dataclass(frozen=True)
class Repeat(Node):
    """A part some times, with `between` between two of them."""

    part: Node
    least: int
    most: int | None
    between: Node | None = None

    def build(self, net: Network, start: int, end: int) -> None:
        """See `Node`."""
        if self.most == 0:
            net.empty[start].append(end)
            return
        copies = max(self.least, 1) if self.most is None else self.most
        state = start
        for copy in range(copies):
            before = net.state()
            if copy >= self.least:  # all that may be left out leads to the end directly: few states stay possible
                net.empty[state].append(end)
            if copy and self.between is not None:
                self.between.build(net, state, before)
            else:
                net.empty[state].append(before)
            state = net.state()
            self.part.build(net, before, state)
        net.empty[state].append(end)
        if self.most is None:
            if self.between is None:
                net.empty[state].append(before)
            else:
                _apart(self.between, net, state, before)


@dataclass(frozen=True)
class Fields(Node):
    """Parts in their order with `between` between two of them, some of which may be left out."""

    parts: tuple[tuple[Node, bool], ...]
    """Each with whether it must stand there."""
    between: Node

    def build(self, net: Network, start: int, end: int) -> None:
        """See `Node`."""
        first: int | None = net.state()  # nothing stands to the left
        net.empty[start].append(first)
        later: int | None = None
        for part, is_required in self.parts:
            before, after = net.state(), net.state()
            if first is not None:
                net.empty[first].append(before)
            if later is not None:
                self.between.build(net, later, before)
                if not is_required:
                    net.empty[later].append(after)
            part.build(net, before, after)
            first, later = None if is_required else first, after
        for state in (first, later):
            if state is not None:
                net.empty[state].append(end)


def _apart(part: Node, net: Network, start: int, end: int) -> None:
    """Build a part between states of its own, into which no other part can loop back."""
    own = net.state()
    net.empty[start].append(own)
    part.build(net, own, end)


EMPTY = Seq(())


def literal(text: str) -> Node:
    """Exactly this text."""
    return Seq(tuple(Chars(((ord(c), ord(c)),)) for c in text))


def merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Ranges in order and apart."""
    out: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if out and first <= out[-1][1] + 1:
            out[-1] = out[-1][0], max(last, out[-1][1])
        elif first <= last:
            out.append((first, last))
    return tuple(out)


def complement(ranges: Ranges) -> Ranges:
    """All other characters; halves of surrogate pairs are none."""
    out, start = [], 0
    for first, last in merged([*ranges, (0xD800, 0xDFFF)]):
        out.append((start, first - 1))
        start = last + 1
    return merged([*out, (start, LAST)])


def intersection(a: Ranges, b: Ranges) -> Ranges:
    """Characters of both."""
    return merged((max(p, r), min(q, s)) for p, q in a for r, s in b if max(p, r) <= min(q, s))


@lru_cache(maxsize=1024)
def utf8_sequences(ranges: Ranges) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Sequences of byte ranges that are the UTF-8 of exactly these characters.

    A range is cut where the length of the code changes, and where a byte in front changes while those behind do not run
    through all their values (https://github.com/rust-lang/regex, utf8-ranges).
    """
    out = []
    todo = list(reversed(intersection(ranges, complement(()))))
    while todo:
        first, last = todo.pop()
        border = next((b for b in (0x7F, 0x7FF, 0xFFFF) if first <= b < last), None)
        for i in (1, 2, 3):
            low = (1 << 6 * i) - 1
            if border is None and last > 0x7F and first & ~low != last & ~low:
                if first & low:
                    border = first | low
                elif last & low != low:
                    border = (last & ~low) - 1
        if border is not None:
            todo += [(border + 1, last), (first, border)]
        else:
            out.append(tuple(zip(chr(first).encode(), chr(last).encode(), strict=True)))
    return tuple(out)


# Classes are ASCII; what is not in them leaves out what is in them by any reading of Unicode.
_SPACES = merged((ord(c), ord(c)) for c in map(chr, range(0x10000)) if c.isspace() or c == "\ufeff")
_DIGITS: Ranges = ((48, 57),)
_WORD = merged([(48, 57), (65, 90), (95, 95), (97, 122)])
_ASCII: Ranges = ((0, 127),)
CLASSES: dict[Any, Ranges] = {
    code.CATEGORY_DIGIT: _DIGITS,
    code.CATEGORY_NOT_DIGIT: intersection(complement(_DIGITS), _ASCII),
    code.CATEGORY_SPACE: intersection(_SPACES, ((9, 13), (32, 32))),
    code.CATEGORY_NOT_SPACE: complement(_SPACES),
    code.CATEGORY_WORD: _WORD,
    code.CATEGORY_NOT_WORD: intersection(complement(_WORD), _ASCII),
}
NEGATED = {
    code.CATEGORY_DIGIT: code.CATEGORY_NOT_DIGIT,
    code.CATEGORY_SPACE: code.CATEGORY_NOT_SPACE,
    code.CATEGORY_WORD: code.CATEGORY_NOT_WORD,
}
NEGATED |= {value: key for key, value in NEGATED.items()}
REFUSED = {
    code.ASSERT: "a look at what stands ahead or behind",
    code.ASSERT_NOT: "a look at what stands ahead or behind",
    code.GROUPREF: "a reference to a group",
    code.GROUPREF_EXISTS: "a condition on a group",
    code.ATOMIC_GROUP: "an atomic group",
    code.POSSESSIVE_REPEAT: "a possessive repetition",
    code.AT: "^ or $ elsewhere than at the two ends, or \\b",
}


BEGINNINGS = ((code.AT, code.AT_BEGINNING), (code.AT, code.AT_BEGINNING_STRING))
ENDS = ((code.AT, code.AT_END), (code.AT, code.AT_END_STRING))


def parse(pattern: str, *, chars: Callable[[Ranges], Node] = Chars, anywhere: Node | None = None) -> Node:
    r"""Read a regular expression in Python's syntax.

    `\d`, `\w` and `\s` are ASCII. A repetition means the same whether it is lazy or not.

    Args:
        pattern: the expression.
        chars: what stands for one of some characters.
        anywhere: what may stand on both sides of the expression where `^` and `$` do not forbid it; by default nothing.

    Raises:
        UserError: it is none, or not one of a regular language.
    """
    if len(pattern) > MAX_LENGTH:
        raise TooLarge(f"it has {len(pattern)} characters, at most {MAX_LENGTH} are taken")
    try:
        tree = parser.parse(pattern)
        if tree.state.flags & ~re.UNICODE:
            raise UserError("flags such as (?i) are not taken")
        sides = anywhere or EMPTY
        return _whole(list(tree), chars, sides, sides)
    except re.error as error:
        raise UserError(f"it is no regular expression: {error}") from error
    except (RecursionError, OverflowError) as error:
        raise TooLarge("it is nested too deeply or counts too far") from error


def _whole(items: list[Any], chars: Callable[[Ranges], Node], left: Node | None, right: Node) -> Node:
    """The end of the whole expression, and its beginning too where something may stand to the `left` of it."""
    if left is not None and items and items[0] in BEGINNINGS:
        left, items = EMPTY, items[1:]
    if items and items[-1] in ENDS:
        right, items = EMPTY, items[:-1]
    if items and items[-1][0] is code.BRANCH:  # of `^ab$|^a$` the reader makes `^a(b$|$)`
        head, branches = items[:-1], items[-1][1][1]
        ends = Alt(tuple(_whole(list(branch), chars, None if head else left, right) for branch in branches))
        return Seq((left if head and left else EMPTY, _sequence(head, chars), ends))
    return Seq((left or EMPTY, _sequence(items, chars), right))


def _sequence(items: Iterable[Any], chars: Callable[[Ranges], Node]) -> Node:
    return Seq(tuple(_node(op, value, chars) for op, value in items))


def _node(op: Any, value: Any, chars: Callable[[Ranges], Node]) -> Node:
    if op in REFUSED:
        raise UserError(f"{REFUSED[op]} is not taken: the text must be of a regular language")
    if op is code.LITERAL:
        return chars(((value, value),))
    if op is code.NOT_LITERAL:
        return chars(complement(((value, value),)))
    if op is code.ANY:
        return chars(complement(((10, 10),)))
    if op is code.IN:
        if value[0][0] is not code.NEGATE:
            return chars(merged(r for kind, what in value for r in _ranges(kind, what)))
        ranges = complement(
            merged(r for kind, what in value[1:] if kind is not code.CATEGORY for r in _ranges(kind, what))
        )
        for kind, what in value[1:]:
            if kind is code.CATEGORY:
                ranges = intersection(ranges, CLASSES[NEGATED[what]])
        return chars(ranges)
    if op is code.BRANCH:
        return Alt(tuple(_sequence(branch, chars) for branch in value[1]))
    if op is code.SUBPATTERN:
        _, added, removed, body = value
        if added or removed:
            raise UserError("flags such as (?i:...) are not taken")
        return _sequence(body, chars)
    if op in (code.MAX_REPEAT, code.MIN_REPEAT):
        least, most, body = value
        return Repeat(_sequence(body, chars), least, None if most is code.MAXREPEAT else most)
    raise UserError(f"{str(op).lower()} is not taken")


def _ranges(kind: Any, value: Any) -> Sequence[tuple[int, int]]:
    if kind is code.LITERAL:
        return ((value, value),)
    return (value,) if kind is code.RANGE else CLASSES[value]


@dataclass(frozen=True, eq=False)
class Automaton:
    """A deterministic automaton over bytes; it starts in state 0, and from every state acceptance can be reached."""

    byte_class: np.ndarray
    """(256,) uint8: bytes that do the same everywhere."""

    table: np.ndarray
    """(S + 1, classes) int16: the next state; S, the last one, is where nothing can be mended, and leads to itself."""

    accepts: np.ndarray
    """(S + 1,) bool."""


def automaton(node: Node) -> Automaton:
    """The deterministic automaton of an expression, by the construction of subsets.

    Raises:
        UserError: it is too large, or no text is of the language.
    """
    net = Network()
    start, end = net.state(), net.state()
    try:
        node.build(net, start, end)
    except RecursionError as error:
        raise TooLarge("it is nested too deeply") from error
    borders = np.zeros(257, dtype=bool)
    for edges in net.edges:
        for first, last, _ in edges:
            borders[first] = borders[last + 1] = True
    byte_class = (np.cumsum(borders[:256]) - borders[0]).astype(np.uint8)
    num_classes = int(byte_class[-1]) + 1
    classes = byte_class.tolist()
    steps = [
        [(range(classes[first], classes[last] + 1), target) for first, last, target in edges] for edges in net.edges
    ]
    work = 0

    def count(amount: int) -> None:
        nonlocal work
        work += amount
        if work > MAX_WORK or len(subsets) > MAX_STATES:
            raise TooLarge(
                f"its automaton has more than {min(len(subsets), MAX_STATES)} states, or they are too entangled: bound "
                "lengths and repetitions more tightly, or not at all"
            )

    closures: dict[int, tuple[int, ...]] = {}

    def closure(state: int) -> tuple[int, ...]:
        """States that matter (they read a byte, or are the end) to which empty steps lead."""
        if state not in closures:
            seen, todo = {state}, [state]
            while todo:
                targets = net.empty[todo.pop()]
                count(1 + len(targets))
                for target in targets:
                    if target not in seen:
                        seen.add(target)
                        todo.append(target)
            closures[state] = tuple(s for s in seen if steps[s] or s == end)
        return closures[state]

    subsets: list[frozenset[int]] = []
    subsets.append(frozenset(closure(start)))
    numbers = {subsets[0]: 0}
    rows: list[list[int]] = []
    merges: dict[frozenset[int], frozenset[int]] = {}
    while len(rows) < len(subsets):
        targets: list[set[int]] = [set() for _ in range(num_classes)]
        for state in subsets[len(rows)]:
            for where, target in steps[state]:
                count(len(where))
                for k in where:
                    targets[k].add(target)
        row = []
        for group in targets:
            if not group:
                row.append(-1)
                continue
            key = frozenset(group)
            if key not in merges:
                merges[key] = frozenset(s for target in key for s in closure(target))
                count(len(merges[key]))
            subset = merges[key]
            if subset not in numbers:
                numbers[subset] = len(subsets)
                subsets.append(subset)
            row.append(numbers[subset])
        rows.append(row)
        count(num_classes)
    return _trimmed(byte_class, np.array(rows, dtype=np.int32), np.array([end in subset for subset in subsets]))


def _trimmed(byte_class: np.ndarray, table: np.ndarray, accepts: np.ndarray) -> Automaton:
    """Without states from which nothing is accepted."""
    num_states = len(table)
    sources, _ = np.nonzero(table >= 0)
    targets = table[table >= 0]
    alive, before = accepts.copy(), -1
    while before != (before := int(alive.sum())):
        alive[sources[alive[targets]]] = True
    if not alive[0]:
        raise UserError("no text matches it")
    number = np.full(num_states + 1, int(alive.sum()), dtype=np.int16)  # the last entry is that of -1
    number[:-1][alive] = np.arange(int(alive.sum()))
    new = number[table[alive]]
    dead = np.full((1, table.shape[1]), int(alive.sum()), dtype=np.int16)
    return Automaton(byte_class, np.concatenate([new, dead]), np.append(accepts[alive], False))
