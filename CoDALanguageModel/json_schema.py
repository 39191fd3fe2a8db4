"""JSON schemas as regular languages: one line of JSON, with an optional space behind each comma and colon.

What comes out is valid by the schema; not all that is valid can come out. Properties stand in the order of the schema,
and no others beside them. An object without `properties` and a value without type may hold anything, nested at most
`ANY_DEPTH` deep; a `$ref` that leads back to itself is followed `MAX_RECURSION` times. A keyword that is not kept is
refused by its name. Not here: automata (`regular`).
"""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from urllib.parse import unquote

from .errors import UserError, half_surrogate
from .regular import (
    Alt,
    Chars,
    Fields,
    Node,
    Ranges,
    Repeat,
    Seq,
    TooLarge,
    complement,
    intersection,
    literal,
    parse,
)

ANY_DEPTH = 3
"""Objects and lists in each other where the schema says nothing: each level more than doubles the automaton."""

MAX_RECURSION = 3
"""How often a reference may stand within itself."""

MAX_DEPTH = 32
"""Levels of a schema, references followed."""

MAX_NODES = 20_000
"""Parts of a schema, references followed."""

SHORT = {'"': '"', "\\": "\\", "/": "/", "\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t"}
"""Characters with an escape of two letters."""

ANNOTATIONS = frozenset(
    "$schema $id $comment $defs definitions $anchor title description default examples deprecated readOnly writeOnly "
    "contentMediaType contentEncoding discriminator".split()
)
KEYWORDS = {
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "array": frozenset({"items", "minItems", "maxItems", "uniqueItems"}),
    "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
    "integer": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "boolean": frozenset(),
    "null": frozenset(),
}
KEYWORDS["number"] = KEYWORDS["integer"]
OF_A_TYPE = frozenset().union(*KEYWORDS.values())
CHOICES = ("enum", "const", "anyOf", "oneOf", "allOf", "$ref")

_DAY = "(0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8])"
_DATE = f"[1-9][0-9]{{3}}-({_DAY})"
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_BYTE = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    "ipv4": rf"{_BYTE}(\.{_BYTE}){{3}}",
    "email": r"[a-zA-Z0-9_%+-]+(\.[a-zA-Z0-9_%+-]+)*@[a-zA-Z0-9]+(-[a-zA-Z0-9]+)*(\.[a-zA-Z0-9]+(-[a-zA-Z0-9]+)*)+",
}
"""Values of `format`, as expressions: of what is valid a part."""

PLAIN = complement(((0, 31), (34, 34), (92, 92)))
"""Characters that stand for themselves in a string."""

SPACE = Repeat(literal(" "), 0, 1)
COMMA, COLON = Seq((literal(","), SPACE)), Seq((literal(":"), SPACE))


def in_string(ranges: Ranges) -> Node:
    """One of some characters as a string of JSON holds it; controls without a short escape are left out."""
    parts: list[Node] = [Chars(intersection(ranges, PLAIN))]
    escaped = tuple(
        (ord(letter), ord(letter)) for c, letter in SHORT.items() if any(a <= ord(c) <= b for a, b in ranges)
    )
    if escaped:
        parts.append(Seq((literal("\\"), Chars(tuple(sorted(escaped))))))
    return Alt(tuple(parts))


ANY_CHARACTER = in_string(complement(()))
_ESCAPED = parse(r"\\u([0-9a-cefA-CEF][0-9a-fA-F]{3}|[dD][0-7][0-9a-fA-F]{2})")
STRING = Seq((literal('"'), Repeat(Alt((ANY_CHARACTER, _ESCAPED)), 0, None), literal('"')))
INTEGER = parse("-?(0|[1-9][0-9]*)")
NUMBER = parse(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]{1,2})?")
BOOLEAN = Alt((literal("true"), literal("false")))
NULL = literal("null")


def of_schema(schema: Any) -> Node:
    """The language of a schema.

    Args:
        schema: an object, or true for any value.

    Raises:
        UserError: names the keyword and the place of what is wrong, is not kept, or is too large.
    """
    try:
        node = _Reader(schema).value(schema, "#", 0, ())
    except RecursionError as error:
        raise TooLarge("json_schema: it is nested too deeply") from error
    if node is None:
        raise UserError("json_schema at #: a reference leads back to itself in every value")
    return node


def _quoted(text: str) -> Node:
    """A string of JSON, spelled in the one way that `json.dumps` has for it."""
    return literal(json.dumps(text, ensure_ascii=False))


def _list(item: Node, least: int, most: int | None, brackets: str) -> Node:
    return Seq((literal(brackets[0]), Repeat(item, least, most, COMMA), literal(brackets[1])))


def _any(depth: int) -> Node:
    scalars = (STRING, NUMBER, BOOLEAN, NULL)
    if depth == 0:
        return Alt(scalars)
    return Alt((*scalars, _map(_any(depth - 1)), _list(_any(depth - 1), 0, None, "[]")))


def _map(value: Node) -> Node:
    return _list(Seq((STRING, COLON, value)), 0, None, "{}")


def _literal(value: Any) -> Node:
    """One value of JSON."""
    if isinstance(value, dict):
        fields = tuple((Seq((_quoted(k), COLON, _literal(v))), True) for k, v in value.items())
        return Seq((literal("{"), Fields(fields, COMMA), literal("}")))
    if isinstance(value, list):
        return Seq((literal("["), Fields(tuple((_literal(v), True) for v in value), COMMA), literal("]")))
    return literal(json.dumps(value, ensure_ascii=False))


class _Reader:
    """Reads one schema. Methods give None for a value that only an endless recursion could fill."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._num_nodes = 0

    def _count(self, parts: int) -> None:
        self._num_nodes += parts
        if self._num_nodes > MAX_NODES:
            raise TooLarge(
                f"json_schema: it has more than {MAX_NODES} parts and letters of names and values, references followed"
            )

    def value(self, schema: Any, at: str, depth: int, within: tuple[str, ...]) -> Node | None:
        """The language of the schema that stands at the JSON pointer `at`, `within` the references."""
        self._count(1)
        if depth > MAX_DEPTH:
            raise TooLarge(f"json_schema at {at}: it is nested deeper than {MAX_DEPTH} levels, references followed")
        if schema is True:
            schema = {}
        if not isinstance(schema, dict):
            raise UserError(f"json_schema at {at}: a schema must be an object or true, got {_short(schema)}")
        given = {key: value for key, value in schema.items() if key not in ANNOTATIONS}
        if not given:
            return _any(ANY_DEPTH)
        choice = next((key for key in CHOICES if key in given), None)
        if choice is None:
            return self._typed(given, at, depth, within)
        # `type` beside a list of values says what they are already; whether they are is looked at.
        beside = given.keys() - {choice, "type" if choice in ("enum", "const") else choice}
        if beside:
            raise UserError(f"json_schema at {at}: {min(beside)} beside {choice} is not supported")
        if choice in ("enum", "const"):
            return self._one_of_values(given, choice, at)
        if choice == "$ref":
            target = given["$ref"]
            if within.count(target) >= MAX_RECURSION:
                return None
            return self.value(self._resolved(target, at), target, depth + 1, (*within, target))
        return self._one_of_schemas(given[choice], choice, f"{at}/{choice}", depth, within)

    def _one_of_values(self, given: Mapping[str, Any], choice: str, at: str) -> Node:
        values = given["enum"] if choice == "enum" else [given["const"]]
        if not isinstance(values, list) or not values:
            raise UserError(f"json_schema at {at}/enum: it must be a list of at least one value, got {_short(values)}")
        if "type" in given:
            types = self._types(given["type"], at)
            values = [value for value in values if types & _types_of(value)]
            if not values:
                raise UserError(f"json_schema at {at}: no value of {choice} is of the type {_short(given['type'])}")
        for value in values:
            text = json.dumps(value, ensure_ascii=False)
            if half_surrogate(text) is not None or "NaN" in text or "Infinity" in text:
                raise UserError(f"json_schema at {at}/{choice}: {_short(value)} is no value of JSON")
            self._count(len(text))
        return Alt(tuple(map(_literal, values)))

    def _one_of_schemas(self, schemas: Any, choice: str, at: str, depth: int, within: tuple[str, ...]) -> Node | None:
        if not isinstance(schemas, list) or not schemas:
            raise UserError(f"json_schema at {at}: it must be a list of at least one schema, got {_short(schemas)}")
        if choice == "allOf" and len(schemas) > 1:
            raise UserError(f"json_schema at {at}: allOf of more than one schema is not supported")
        parts = [self.value(schema, f"{at}/{i}", depth + 1, within) for i, schema in enumerate(schemas)]
        if choice == "oneOf":
            for j, schema in enumerate(schemas):
                i = next((i for i in range(j) if not self._are_apart(schemas[i], schema, at, depth)), None)
                if i is not None:
                    raise UserError(
                        f"json_schema at {at}: a value may be of both {i} and {j}, which oneOf forbids and nothing "
                        "here rules out: say anyOf, or give them different types or a property with a const of its own"
                    )
        return _alternatives(parts)

    def _typed(self, given: Mapping[str, Any], at: str, depth: int, within: tuple[str, ...]) -> Node | None:
        unknown = next((key for key in given if key != "type" and key not in OF_A_TYPE), None)
        if unknown is not None:
            raise UserError(f"json_schema at {at}: keyword {unknown!r} is not supported")
        if "type" in given:
            types = self._types(given["type"], at)
        else:  # a keyword of some type without that type: values of the other types are valid and do not come out
            types = {kind for kind, words in KEYWORDS.items() if words & given.keys()} - {"integer"}
        foreign = next((k for k in given if k != "type" and not any(k in KEYWORDS[kind] for kind in types)), None)
        if foreign is not None:
            raise UserError(f"json_schema at {at}: {foreign} says nothing about the type {_short(given['type'])}")
        make: dict[str, Callable[[], Node | None]] = {
            "object": lambda: self._object(given, at, depth, within),
            "array": lambda: self._array(given, at, depth, within),
            "string": lambda: self._string(given, at),
            "integer": lambda: self._number(given, at, is_integer=True),
            "number": lambda: self._number(given, at, is_integer=False),
            "boolean": lambda: BOOLEAN,
            "null": lambda: NULL,
        }
        return _alternatives([make[kind]() for kind in make if kind in types])

    @staticmethod
    def _types(value: Any, at: str) -> set[str]:
        types = value if isinstance(value, list) else [value]
        if not types or not all(isinstance(kind, str) and kind in KEYWORDS for kind in types):
            raise UserError(
                f"json_schema at {at}/type: it must be one or some of {', '.join(KEYWORDS)}, got {_short(value)}"
            )
        return set(types)

    def _object(self, given: Mapping[str, Any], at: str, depth: int, within: tuple[str, ...]) -> Node | None:
        (fields, required), others = self._fields(given, at), given.get("additionalProperties")
        if not fields:
            if others is False or "properties" in given and others is None:
                return literal("{}")
            if others in (None, True):
                return _map(_any(ANY_DEPTH - 1))
            value = self.value(others, f"{at}/additionalProperties", depth + 1, within)
            return literal("{}") if value is None else _map(value)
        parts = []
        for name, schema in fields.items():
            if half_surrogate(name) is not None:
                raise UserError(f"json_schema at {at}/properties: a name is no Unicode text")
            self._count(len(name))
            if schema is False and name not in required:
                continue
            value = self.value(schema, f"{at}/properties/{name}", depth + 1, within)
            if value is not None:
                parts.append((Seq((_quoted(name), COLON, value)), name in required))
            elif name in required:
                return None
        return Seq((literal("{"), Fields(tuple(parts), COMMA), literal("}")))

    @staticmethod
    def _fields(given: Mapping[str, Any], at: str) -> tuple[dict[str, Any], list[str]]:
        """`properties` and `required` of an object."""
        fields, required = (given.get(k) for k in ("properties", "required"))
        fields, required = {} if fields is None else fields, [] if required is None else required
        is_right = isinstance(fields, dict) and isinstance(required, list)
        if not is_right or not all(isinstance(name, str) for name in required):
            raise UserError(f"json_schema at {at}: properties must be an object and required a list of names")
        missing = next((name for name in required if name not in fields), None)
        if missing is not None:
            raise UserError(f"json_schema at {at}: required {_short(missing)} is none of the properties")
        return fields, required

    def _array(self, given: Mapping[str, Any], at: str, depth: int, within: tuple[str, ...]) -> Node | None:
        least, most = self._counts(given, "minItems", "maxItems", at)
        if given.get("uniqueItems", False) is not False:
            raise UserError(f"json_schema at {at}: uniqueItems is not supported")
        items = given.get("items", True)
        item = _any(ANY_DEPTH - 1) if items is True else self.value(items, f"{at}/items", depth + 1, within)
        if item is None:
            return literal("[]") if least == 0 else None
        return _list(item, least, most, "[]")

    def _string(self, given: Mapping[str, Any], at: str) -> Node:
        least, most = self._counts(given, "minLength", "maxLength", at)
        has_length = "minLength" in given or "maxLength" in given
        ways = [name for name in ("pattern", "format") if name in given]
        if len(ways) + has_length > 1:
            raise UserError(
                f"json_schema at {at}: {ways[0]} beside {(ways[1:] or ['minLength and maxLength'])[0]} is not supported"
            )
        if "pattern" in given:
            if not isinstance(given["pattern"], str):
                raise UserError(f"json_schema at {at}/pattern: it must be a text, got {_short(given['pattern'])}")
            try:
                body = parse(given["pattern"], chars=in_string, anywhere=Repeat(ANY_CHARACTER, 0, None))
            except UserError as error:
                raise type(error)(f"json_schema at {at}/pattern: {error}") from error
        elif "format" in given:
            if not isinstance(given["format"], str) or given["format"] not in FORMATS:
                raise UserError(
                    f"json_schema at {at}/format: it must be one of {', '.join(FORMATS)}, got {_short(given['format'])}"
                )
            body = parse(FORMATS[given["format"]])
        elif has_length:
            body = Repeat(ANY_CHARACTER, least, most)
        else:
            return STRING
        return Seq((literal('"'), body, literal('"')))

    @staticmethod
    def _counts(given: Mapping[str, Any], low: str, high: str, at: str) -> tuple[int, int | None]:
        for name in (low, high):
            value = given.get(name, 0)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise UserError(f"json_schema at {at}/{name}: it must be an integer >= 0, got {_short(value)}")
        least, most = given.get(low, 0), given.get(high)
        if most is not None and most < least:
            raise UserError(f"json_schema at {at}: {high} {most} is less than {low} {least}")
        return least, most

    def _number(self, given: Mapping[str, Any], at: str, *, is_integer: bool) -> Node:
        bounds = {name: given[name] for name in KEYWORDS["number"] if name in given}
        if not bounds:
            return INTEGER if is_integer else NUMBER
        for name, value in bounds.items():
            is_whole = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value // 1
            if not is_whole or abs(value) > 1e15:
                raise UserError(
                    f"json_schema at {at}/{name}: it must be a whole number up to 1e15, got {_short(value)}"
                )
        # Of whole numbers an exclusive bound is the next inclusive one; of others it is left out at the end.
        low, high = (
            _tightest(bounds, name, f"exclusive{name.capitalize()}", sign)
            for name, sign in (("minimum", 1), ("maximum", -1))
        )
        above = below = Alt(())  # numbers >= 0, and how far those below it are from it
        if is_integer:
            low, high = (None if b is None else b[0] + s * b[1] for b, s in ((low, 1), (high, -1)))
            if high is None or high >= 0:
                above = _integers(max(low or 0, 0), high)
            if low is None or low < 0:
                below = _integers(1 if high is None else max(1, -high), None if low is None else -low)
        else:
            if high is None or high[0] >= 0:
                above = _decimals(low if low is not None and low[0] >= 0 else (0, False), high)
            if low is None or low[0] < 0:
                least = (0, True) if high is None or high[0] >= 0 else (-high[0], high[1])
                below = _decimals(least, None if low is None else (-low[0], low[1]))
        nothing = Alt(())
        parts = [node for node, part in ((above, above), (Seq((literal("-"), below)), below)) if part != nothing]
        if not parts:
            raise UserError(f"json_schema at {at}: no number is within {bounds}")
        return Alt(tuple(parts))

    def _resolved(self, target: Any, at: str) -> Any:
        """What a reference within the schema names."""
        if not isinstance(target, str) or not target.startswith("#"):
            raise UserError(
                f"json_schema at {at}/$ref: references within the schema (#/...) are followed, got {_short(target)}"
            )
        found = self._root
        for step in filter(None, target[1:].split("/")):
            step = unquote(step).replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and step.isdecimal() and len(step) < 10 and int(step) < len(found):
                found = found[int(step)]
            elif isinstance(found, dict) and step in found:
                found = found[step]
            else:
                raise UserError(f"json_schema at {at}/$ref: there is no {_short(target)}")
        return found

    def _are_apart(self, a: Any, b: Any, at: str, depth: int) -> bool:
        """Whether it is plain that no value is of both schemas."""
        self._count(1)
        if depth > MAX_DEPTH:
            raise TooLarge(f"json_schema at {at}: the alternatives are nested too deeply to be told apart")
        for _ in range(MAX_RECURSION):
            a, b = (self._resolved(x["$ref"], at) if isinstance(x, dict) and "$ref" in x else x for x in (a, b))
        if not isinstance(a, dict) or not isinstance(b, dict):
            return False
        if not self._kinds(a) & self._kinds(b):
            return True
        values = [x.get("enum", [x["const"]] if "const" in x else None) for x in (a, b)]
        if all(isinstance(x, list) for x in values):
            return not any(x == y for x in values[0] for y in values[1])
        if any(self._kinds(x) != {"object"} for x in (a, b)):
            return False
        # Behind a reference that leads back there may be what has not been read yet.
        (fields, required), (others, also) = (self._fields(x, at) for x in (a, b))
        return any(self._are_apart(fields[name], others[name], at, depth + 1) for name in set(required) & set(also))

    def _kinds(self, schema: Mapping[str, Any]) -> set[str]:
        """Types that values may have; whole numbers are numbers."""
        values = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if isinstance(values, list):
            kinds = set().union(*map(_types_of, values))
        elif "type" in schema:
            kinds = self._types(schema["type"], "#")
        else:
            kinds = set(KEYWORDS)
        return kinds - {"integer"} | ({"number"} if "integer" in kinds else set())


def _alternatives(parts: Iterable[Node | None]) -> Node | None:
    kept = tuple(part for part in parts if part is not None)
    return Alt(kept) if kept else None


def _types_of(value: Any) -> set[str]:
    """All types that a value is of."""
    if isinstance(value, bool):
        return {"boolean"}
    if isinstance(value, (int, float)):
        return {"number", "integer"} if value == value // 1 else {"number"}
    kinds = {str: "string", list: "array", dict: "object", type(None): "null"}
    return {kinds[type(value)]}


def _tightest(bounds: Mapping[str, Any], inclusive: str, exclusive: str, sign: int) -> tuple[int, bool] | None:
    """The bound that holds, and whether it is excluded."""
    given = [(int(bounds[name]), is_out) for name, is_out in ((inclusive, False), (exclusive, True)) if name in bounds]
    return max(given, key=lambda bound: (sign * bound[0], bound[1]), default=None)


def _digits(low: str, high: str) -> Node:
    """Numbers of as many digits as both bounds have, from one to the other."""
    if low == high:
        return literal(low)
    if set(low) == {"0"} and set(high) == {"9"}:
        return Repeat(_digit(0, 9), len(low), len(low))
    first, last, rest = int(low[0]), int(high[0]), len(low) - 1
    if not rest:
        return _digit(first, last)
    if first == last:
        return Seq((literal(low[0]), _digits(low[1:], high[1:])))
    parts: list[Node] = [Seq((literal(low[0]), _digits(low[1:], "9" * rest)))]
    if first + 1 < last:
        parts.append(Seq((_digit(first + 1, last - 1), Repeat(_digit(0, 9), rest, rest))))
    parts.append(Seq((literal(high[0]), _digits("0" * rest, high[1:]))))
    return Alt(tuple(parts))


def _digit(first: int, last: int) -> Node:
    return Chars(((48 + first, 48 + last),))


def _integers(low: int, high: int | None) -> Node:
    """Whole numbers >= 0 from `low` to `high`, without zeros in front; `Alt(())` where there are none."""
    lengths = range(len(str(low)), len(str(low)) + 1 if high is None else len(str(high)) + 1)
    parts = []
    for length in lengths:
        first = max(low, 10 ** (length - 1) if length > 1 else 0)
        last = 10**length - 1 if high is None else min(high, 10**length - 1)
        if first <= last:
            parts.append(_digits(str(first), str(last)))
    if high is None:
        parts.append(Seq((_digit(1, 9), Repeat(_digit(0, 9), lengths[-1], None))))
    return Alt(tuple(parts))


def _decimals(low: tuple[int, bool], high: tuple[int, bool] | None) -> Node:
    """Numbers >= 0 between bounds, each with whether it is excluded; `Alt(())` where there are none."""
    fraction, zero = parse(r"\.[0-9]+"), parse(r"(\.0+)?")
    above = parse(r"\.[0-9]*[1-9][0-9]*")
    if high is not None and (high[0] < low[0] or high[0] == low[0] and (low[1] or high[1])):
        return Alt(())
    if high is not None and high[0] == low[0]:
        return Seq((literal(str(low[0])), zero))
    parts: list[Node] = [Seq((literal(str(low[0])), above if low[1] else Repeat(fraction, 0, 1)))]
    if high is None or low[0] + 1 < high[0]:
        between = _integers(low[0] + 1, None if high is None else high[0] - 1)
        parts.append(Seq((between, Repeat(fraction, 0, 1))))
    if high is not None and not high[1]:
        parts.append(Seq((literal(str(high[0])), zero)))
    return Alt(tuple(parts))


def _short(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
