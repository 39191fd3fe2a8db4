"""Answers that match a regular expression or a JSON schema, whatever the order in which their tokens are committed.

The language is an automaton over tokens. Of a canvas, some of whose cells are masked, two lists of sets of states say
all: `before[i]`, the states in which the cells left of i can leave it, and `behind[i]`, those from which the cells from
i on can lead to the end of a text. A token may stand at i if it leads from a state of `before[i]` to one of
`behind[i + 1]`; then, and only then, the other masks can still be filled. An end token may follow where a text may end,
and then nothing else may. So no commit can lead to a dead end. Not here: languages (`regular`, `json_schema`), and what
a step does with what is allowed (`stepwise`).
"""

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .configuration_coda import token_ids
from .errors import UserError
from .json_schema import of_schema
from .regular import Automaton, TooLarge, automaton, parse
from .vocabulary import Vocabulary

MAX_CELLS = 2**23
"""Entries of the table of a token automaton, 2 bytes each: states times kinds of tokens."""

MAX_CACHED = 2**24
"""Entries of all tables that are kept."""

MOST_CACHED = 64
"""Automata that are kept."""

MAX_REMEMBERED = 2**22
"""Bytes of sets, and of what they allow, that a constraint remembers: of all that are kept half a gigabyte."""

MOST_BOUND = 2
"""Constraints of one automaton that are kept."""

NEVER = 0
"""The class of tokens that lead nowhere."""


class Lexicon:
    """The bytes that the tokens of a tokenizer stand for.

    Args:
        tokenizer: a fast one, whose tokens are bytes in the way of GPT-2's.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def of(cls, tokenizer: Any) -> "Lexicon":
        """The one of a tokenizer, which is read once."""
        if tokenizer not in _LEXICONS:
            _LEXICONS[tokenizer] = cls(tokenizer)
        return _LEXICONS[tokenizer]

    @cached_property
    def tokens(self) -> list[bytes]:
        """By id; empty where a token is no text.

        Raises:
            UserError: the tokens of this kind of tokenizer are not known as bytes.
        """
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        description = {} if backend is None else json.loads(backend.to_str())
        if '"ByteLevel"' not in json.dumps(description.get("decoder")):
            raise UserError(
                "regex and json_schema need a fast tokenizer whose tokens are bytes (decoder ByteLevel, as of GPT-2, "
                f"Qwen and Llama 3); that of {type(self._tokenizer).__name__} is another"
            )
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        tokens = [b""] * (max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1)
        for text, number in backend.get_vocab(with_added_tokens=False).items():
            if all(character in byte_of for character in text):
                tokens[number] = bytes(byte_of[character] for character in text)
        for token in description["added_tokens"]:
            tokens[token["id"]] = b"" if token["special"] else token["content"].encode()
        return tokens

    @cached_property
    def digest(self) -> bytes:
        """Equal for equal tokens."""
        return hashlib.sha256(b"".join(b"%d:%s," % (len(token), token) for token in self.tokens)).digest()

    @cached_property
    def levels(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each place in a token the tokens that are so long, and their bytes at this place."""
        lengths = np.array([len(token) for token in self.tokens])
        starts = np.cumsum(lengths) - lengths
        flat = np.frombuffer(b"".join(self.tokens), dtype=np.uint8)
        ids = np.arange(len(lengths))
        levels = []
        for place in range(int(lengths.max(initial=0))):
            ids = ids[lengths[ids] > place]
            levels.append((ids, flat[starts[ids] + place]))
        return levels


_LEXICONS: WeakKeyDictionary[Any, Lexicon] = WeakKeyDictionary()


class TokenAutomaton:
    """The steps that tokens take in an automaton over bytes; tokens that take the same ones are of one class.

    Raises:
        UserError: it is too large.
    """

    def __init__(self, machine: Automaton, lexicon: Lexicon) -> None:
        dead = len(machine.table) - 1
        nowhere, all_of_them = np.full(dead + 1, dead, dtype=np.int16), np.arange(dead + 1, dtype=np.int16)
        functions = [nowhere, all_of_them]  # of a beginning of a token: the state that it leads to from each
        number = {function.tobytes(): i for i, function in enumerate(functions)}
        num_classes = machine.table.shape[1]
        columns = np.ascontiguousarray(machine.table.T)
        reached = np.ones(len(lexicon.tokens), dtype=np.int64)
        known: dict[int, int] = {}
        for ids, byte in lexicon.levels:
            alive = reached[ids] != NEVER
            ids, byte = ids[alive], byte[alive]
            steps, place = np.unique(reached[ids] * num_classes + machine.byte_class[byte], return_inverse=True)
            for step in steps.tolist():
                if step not in known:
                    function, kind = divmod(step, num_classes)
                    new = columns[kind][functions[function]]
                    known[step] = number.setdefault(new.tobytes(), len(functions))
                    if known[step] == len(functions):
                        functions.append(new)
                        if len(functions) * (dead + 1) > MAX_CELLS:
                            raise TooLarge(
                                f"its automaton has {dead} states and the tokens are of more than "
                                f"{len(functions) - 1} kinds in it: make it smaller"
                            )
            reached[ids] = np.array([known[step] for step in steps.tolist()], dtype=np.int64)[place]
        reached[[not token for token in lexicon.tokens]] = NEVER
        kinds = np.union1d([NEVER], reached)
        self.class_of = np.searchsorted(kinds, reached).astype(np.int32)  # (V,)
        self.table = np.stack([functions[kind] for kind in kinds.tolist()], axis=1)[:dead]  # (S, C); S leads nowhere
        self.accepts = machine.accepts[:dead]
        self._bound: dict[Hashable, Constraint] = {}

    def bound(self, config: Any, vocab_size: int) -> "Constraint":
        """What holds for rows with these settings: their end tokens end a text, and what they exclude is excluded.

        Raises:
            UserError: no text is left.
        """
        excluded = Vocabulary(config, vocab_size, ()).excluded
        key = (vocab_size, excluded, frozenset(token_ids(config.eos_token_id)))
        found = self._bound.get(key)
        if found is None:
            found = Constraint(self, *key)
            # A client may exclude what it likes.
            self._bound = {**(self._bound if len(self._bound) < MOST_BOUND else {}), key: found}
        return found


class Constraint:
    """An automaton over the tokens of a model; states are numbers, and sets of them the bits of an integer.

    Args:
        tokens: the language.
        vocab_size: of the model.
        excluded: ids that never come out.
        ends: ids that end an answer.

    Raises:
        UserError: no sequence of tokens is of the language.
    """

    def __init__(self, tokens: TokenAutomaton, vocab_size: int, excluded: frozenset[int], ends: frozenset[int]) -> None:
        num_states, num_classes = tokens.table.shape
        self.ended, self._nowhere, end_class = num_states, num_states + 1, num_classes
        self._num_bytes = (self._nowhere + 8) // 8
        class_of = np.full(vocab_size, NEVER, dtype=np.int32)
        num_known = min(vocab_size, len(tokens.class_of))
        class_of[:num_known] = tokens.class_of[:num_known]
        class_of[[i for i in ends if i < vocab_size]] = end_class
        class_of[list(excluded)] = NEVER
        self.class_of = class_of  # (V,)
        table = np.full((num_states + 2, num_classes + 1), self._nowhere, dtype=np.int16)
        table[:num_states, :num_classes] = np.where(tokens.table == num_states, self._nowhere, tokens.table)
        table[:num_states, end_class] = np.where(tokens.accepts, self.ended, self._nowhere)
        table[self.ended, end_class] = self.ended
        table[:, NEVER] = self._nowhere
        table[:, np.bincount(class_of, minlength=num_classes + 1) == 0] = self._nowhere
        self._table = table
        self._sources, self._kinds = (x.astype(np.int32) for x in np.nonzero(table != self._nowhere))
        self._targets = table[self._sources, self._kinds]
        reach = np.zeros((self._nowhere + 1,) * 2, dtype=bool)
        reach[self._sources, self._targets] = True
        self._forth, self._back = (np.packbits(x, axis=1, bitorder="little") for x in (reach, reach.T))
        self._remembered: dict[Hashable, Any] = {}
        self._weight = 0
        self._on: dict[torch.device, Tensor] = {}
        self.start = 1
        self.final = self._bits(np.append(tokens.accepts, [True, False]))
        self.least = self._least()

    def _bits(self, members: np.ndarray) -> int:
        return int.from_bytes(np.packbits(members, bitorder="little").tobytes(), "little")

    def _members(self, states: int) -> np.ndarray:
        """(S + 2,) bool."""
        packed = np.frombuffer(states.to_bytes(self._num_bytes, "little"), dtype=np.uint8)
        return np.unpackbits(packed, count=self._nowhere + 1, bitorder="little").view(bool)

    def _remember(self, key: Hashable, make: Callable[[], Any]) -> Any:
        found = self._remembered.get(key)
        if found is None:
            found = make()
            self._weight += 3 * self._num_bytes + (found.nbytes if isinstance(found, np.ndarray) else 200)
            if self._weight > MAX_REMEMBERED:
                self._remembered, self._weight = {}, 0
            self._remembered[key] = found
        return found

    def after(self, states: int, kind: int | None) -> int:
        """Where a token of class `kind`, or any token, can lead from `states`."""

        def make() -> int:
            members = self._members(states)
            if kind is None:
                return self._union(self._forth, members)
            targets = np.zeros(self._nowhere + 1, dtype=bool)
            targets[self._table[members, kind]] = True
            targets[self._nowhere] = False
            return self._bits(targets)

        return self._remember((True, states, kind), make)

    def before(self, states: int, kind: int | None) -> int:
        """From where a token of class `kind`, or any token, can lead into `states`."""

        def make() -> int:
            members = self._members(states)
            return self._union(self._back, members) if kind is None else self._bits(members[self._table[:, kind]])

        return self._remember((False, states, kind), make)

    @staticmethod
    def _union(steps: np.ndarray, members: np.ndarray) -> int:
        return int.from_bytes(np.bitwise_or.reduce(steps[members], axis=0).tobytes(), "little")

    def allowed(self, before: int, behind: int) -> np.ndarray:
        """(C,) bool: classes of tokens that lead from a state of `before` to one of `behind`."""

        def make() -> np.ndarray:
            kinds = np.zeros(self._table.shape[1], dtype=bool)
            leads = self._members(before)[self._sources] & self._members(behind)[self._targets]
            kinds[self._kinds[leads]] = True
            return kinds

        return self._remember((before, behind), make)

    def _least(self) -> int:
        """Tokens of the shortest text."""
        states, seen, length = self.final, set(), 0
        while not states & self.start:
            states = self.before(states, None)
            length += 1
            if states in seen:
                raise UserError("no sequence of the model's tokens matches it")
            seen.add(states)
        return length

    def classes_on(self, device: torch.device) -> Tensor:
        """(V,) int64 on a device: the class of each token."""
        if device not in self._on:
            self._on[device] = torch.from_numpy(self.class_of).long().to(device)
        return self._on[device]


class Cells:
    """A part of a canvas that a constraint covers: each cell is masked, or has a token.

    Args:
        constraint: the language.
        tokens: ids, None where a cell is masked.
    """

    def __init__(self, constraint: Constraint, tokens: Sequence[int | None]) -> None:
        self.constraint = constraint
        length = len(tokens)
        self._kinds: list[int | None] = [None] * length
        self._before, self._behind = [constraint.start] * (length + 1), [constraint.final] * (length + 1)
        for i in range(length):
            self._before[i + 1] = constraint.after(self._before[i], None)
        for i in reversed(range(length)):
            self._behind[i] = constraint.before(self._behind[i + 1], None)
        self.update(tokens)

    @property
    def is_completable(self) -> bool:
        """Whether the masked cells can be filled."""
        return bool(self._before[0] & self._behind[0])

    def update(self, tokens: Sequence[int | None]) -> None:
        """Set all cells."""
        class_of = self.constraint.class_of
        kinds = [None if token is None else int(class_of[token]) for token in tokens]
        if kinds != self._kinds:
            for i, kind in enumerate(kinds):
                if kind != self._kinds[i]:
                    self.put(i, kind)

    def put(self, i: int, kind: int | None) -> None:
        """Give a cell a token of class `kind`, or mask it."""
        self._kinds[i] = kind
        for j in range(i, len(self._kinds)):
            states = self.constraint.after(self._before[j], self._kinds[j])
            if states == self._before[j + 1]:
                break
            self._before[j + 1] = states
        for j in range(i, -1, -1):
            states = self.constraint.before(self._behind[j + 1], self._kinds[j])
            if states == self._behind[j]:
                break
            self._behind[j] = states

    def allows(self, i: int, kind: int) -> bool:
        """Whether a token of class `kind` at a masked cell leaves the others completable."""
        return bool(self.constraint.after(self._before[i], kind) & self._behind[i + 1])

    def sets(self, i: int) -> tuple[int, int]:
        """What `Constraint.allowed` needs for a masked cell."""
        return self._before[i], self._behind[i + 1]


_CACHE: OrderedDict[Hashable, TokenAutomaton] = OrderedDict()
_CACHE_LOCK = threading.Lock()


def constraint_of(config: Any, vocab_size: int, lexicon: Lexicon) -> Constraint | None:
    """What `regex` or `json_schema` demand of rows with these settings; None where neither is set.

    It may take seconds the first time; the result is kept, and may be used by several threads.

    Args:
        config: complete settings (see `row.complete`).
        vocab_size: of the model.
        lexicon: of its tokenizer.

    Raises:
        UserError: the expression or schema is wrong, not supported or too large, or the tokenizer is of another kind.
    """
    if config.regex is None and config.json_schema is None:
        return None
    name = "regex" if config.regex is not None else "json_schema"
    try:
        value = config.regex if name == "regex" else json.dumps(config.json_schema)
    except RecursionError as error:
        raise TooLarge("json_schema cannot be used: it is nested too deeply") from error
    key = (name, hashlib.sha256(value.encode("utf-8", "surrogatepass")).digest(), lexicon.digest)
    with _CACHE_LOCK:
        found = _CACHE.get(key)
        if found is not None:
            _CACHE.move_to_end(key)
    try:
        if found is None:
            node = parse(config.regex) if name == "regex" else of_schema(config.json_schema)
            found = TokenAutomaton(automaton(node), lexicon)
        constraint = found.bound(config, vocab_size)
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(name) else f"{name} cannot be used: {text}") from error
    with _CACHE_LOCK:
        _CACHE[key] = found
        while len(_CACHE) > MOST_CACHED or len(_CACHE) > 1 and sum(x.table.size for x in _CACHE.values()) > MAX_CACHED:
            _CACHE.popitem(last=False)
    return constraint
