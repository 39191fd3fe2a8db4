"""The grammar of the small programming language that the quickstart's instruction set speaks.

A program is a source, a filter, a map and an aggregate: "the sum of the squares of the even numbers in values". Each
primitive says its Python and several ways to say it in English; whatever fits by type can be combined with whatever
else fits. Not here: which combinations are drawn, held out, rendered or tested (problems.py).
"""

from dataclasses import dataclass

DIGITS = tuple("23456789")
LETTERS = tuple("aeinorst")


@dataclass(frozen=True)
class Source:
    """Where the elements come from."""

    name: str
    element: str
    """Type of the elements: "number" or "word"."""
    code: str
    """Python expression of the iterable; ``{p}`` is the parameter."""
    noun: str
    """Plural noun phrase of the elements; ``{p}`` is the parameter."""
    parameter: str
    """Name of the function's parameter."""


@dataclass(frozen=True)
class Filter:
    """Which elements are kept."""

    name: str
    element: str
    code: str
    """Boolean Python expression; ``{x}`` is the element, ``{k}`` the constant."""
    before: tuple[str, ...] = ()
    """Adjectives that stand before the noun."""
    after: tuple[str, ...] = ()
    """Clauses that follow the noun."""
    constants: tuple[str, ...] = ()
    """What ``{k}`` may be; empty where the code has none."""


@dataclass(frozen=True)
class Map:
    """What becomes of each element that is kept."""

    name: str
    element: str
    result: str
    """Type of the result: "number" or "text"."""
    code: str
    nouns: tuple[str, ...]
    """Plural noun phrases that end before the elements: "the squares of"."""
    constants: tuple[str, ...] = ()


@dataclass(frozen=True)
class Aggregate:
    """What the function returns."""

    name: str
    accepts: str
    """Type of the mapped elements: "number", "text" or "any"."""
    code: str
    """Python expression; ``{g}`` is the generator expression without brackets."""
    nouns: tuple[str, ...]
    """Noun phrases that end before the mapped elements: "the sum of"."""


SOURCES = (
    Source("list", "number", "{p}", "numbers in {p}", "numbers"),
    Source("range", "number", "range(1, {p} + 1)", "numbers from 1 to {p}", "n"),
    Source("digits", "number", "map(int, str({p}))", "digits of {p}", "number"),
    Source("words", "word", "{p}.split()", "words in {p}", "text"),
    Source("strings", "word", "{p}", "strings in {p}", "words"),
)

FILTERS = (
    Filter("even", "number", "{x} % 2 == 0", before=("even",), after=("that are even",)),
    Filter("odd", "number", "{x} % 2 == 1", before=("odd",), after=("that are odd",)),
    Filter("positive", "number", "{x} > 0", before=("positive",), after=("above zero",)),
    Filter("above", "number", "{x} > {k}", after=("greater than {k}", "above {k}"), constants=DIGITS),
    Filter("below", "number", "{x} < {k}", after=("less than {k}", "below {k}"), constants=DIGITS),
    Filter("divisible", "number", "{x} % {k} == 0", after=("divisible by {k}",), constants=DIGITS[1:]),
    Filter("indivisible", "number", "{x} % {k} != 0", after=("not divisible by {k}",), constants=DIGITS[1:]),
    Filter("other_than", "number", "{x} != {k}", after=("other than {k}", "different from {k}"), constants=DIGITS),
    Filter("longer", "word", "len({x}) > {k}", after=("longer than {k} letters",), constants=DIGITS[:5]),
    Filter("shorter", "word", "len({x}) < {k}", after=("shorter than {k} letters",), constants=DIGITS[1:6]),
    Filter("starts", "word", '{x}.startswith("{k}")', after=("that start with '{k}'",), constants=LETTERS),
    Filter("ends", "word", '{x}.endswith("{k}")', after=("that end with '{k}'",), constants=LETTERS),
    Filter("contains", "word", '"{k}" in {x}', after=("that contain '{k}'", "with letter '{k}'"), constants=LETTERS),
    Filter("lacks", "word", '"{k}" not in {x}', after=("without the letter '{k}'",), constants=LETTERS),
    Filter("numeric", "word", "{x}.isdigit()", before=("numeric",), after=("made of digits",)),
    Filter("palindrome", "word", "{x} == {x}[::-1]", before=("palindromic",), after=("that are palindromes",)),
)

MAPS = (
    Map("square", "number", "number", "{x} * {x}", ("the squares of",)),
    Map("cube", "number", "number", "{x} ** 3", ("the cubes of",)),
    Map("negate", "number", "number", "-{x}", ("the negatives of",)),
    Map("absolute", "number", "number", "abs({x})", ("the absolute values of",)),
    Map("halve", "number", "number", "{x} // 2", ("the halves, rounded down, of",)),
    Map("last_digit", "number", "number", "abs({x}) % 10", ("the last digits of",)),
    Map("add", "number", "number", "{x} + {k}", ("{k} more than",), DIGITS),
    Map("subtract", "number", "number", "{x} - {k}", ("{k} less than",), DIGITS),
    Map("times", "number", "number", "{x} * {k}", ("{k} times",), DIGITS),
    Map("size", "word", "number", "len({x})", ("the lengths of",)),
    Map("upper", "word", "text", "{x}.upper()", ("the uppercase forms of",)),
    Map("lower", "word", "text", "{x}.lower()", ("the lowercase forms of",)),
    Map("capitalize", "word", "text", "{x}.capitalize()", ("the capitalized forms of",)),
    Map("reverse", "word", "text", "{x}[::-1]", ("the reversals of",)),
    Map("first", "word", "text", "{x}[0]", ("the first letters of",)),
    Map("last", "word", "text", "{x}[-1]", ("the last letters of",)),
    Map("head", "word", "text", "{x}[:{k}]", ("the first {k} letters of",), DIGITS[:4]),
    Map("twice", "word", "text", "{x} * 2", ("the repetitions of",)),
)

AGGREGATES = (
    Aggregate("sum", "number", "sum({g})", ("the sum of", "the total of")),
    Aggregate("maximum", "number", "max(({g}), default=0)", ("the largest of", "the maximum of")),
    Aggregate("minimum", "number", "min(({g}), default=0)", ("the smallest of", "the minimum of")),
    Aggregate("list", "any", "[{g}]", ("a list of", "the list of")),
    Aggregate("set", "any", "{{{g}}}", ("a set of", "the set of")),
    Aggregate("tuple", "any", "tuple({g})", ("a tuple of",)),
    Aggregate("sorted", "any", "sorted({g})", ("a sorted list of", "the sorted list of")),
    Aggregate("distinct", "any", "len({{{g}}})", ("the number of distinct values among",)),
    Aggregate("joined", "text", '"".join({g})', ("the concatenation of",)),
    Aggregate("spaced", "text", '" ".join({g})', ("the text joined by spaces of",)),
    Aggregate("dashed", "text", '"-".join({g})', ("the text joined by dashes of",)),
)
