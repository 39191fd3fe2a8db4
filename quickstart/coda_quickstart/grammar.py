"""The grammar of the small programming language that the quickstart's instruction set speaks.

A program is a source, a filter, a map and an aggregate: "the sum of the squares of the even numbers in values". Each
primitive says its Python and several ways to say it in English; whatever fits by type can be combined with whatever
else fits. Not here: which combinations are drawn, held out, rendered or tested (problems.py).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """Where the elements come from."""

    name: str
    element: str
    """Type of the elements: "number" or "word"."""
    code: str
    """Python expression of the iterable; `{p}` is the parameter."""
    noun: str
    """Plural noun phrase of the elements; `{p}` is the parameter."""
    parameter: str
    """Name of the function's parameter."""


@dataclass(frozen=True)
class Filter:
    """Which elements are kept."""

    name: str
    element: str
    code: str
    """Boolean Python expression; `{x}` is the element."""
    before: tuple[str, ...] = ()
    """Adjectives that stand before the noun."""
    after: tuple[str, ...] = ()
    """Clauses that follow the noun."""


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


@dataclass(frozen=True)
class Aggregate:
    """What the function returns."""

    name: str
    accepts: str
    """Type of the mapped elements: "number", "text" or "any"."""
    code: str
    """Python expression; `{g}` is the generator expression without brackets."""
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
    Filter("not_one", "number", "{x} != 1", after=("other than one", "different from one")),
    Filter("above", "number", "{x} > 5", after=("above five", "greater than five")),
    Filter("below", "number", "{x} < 7", after=("below seven", "less than seven")),
    Filter("divisible", "number", "{x} % 3 == 0", after=("divisible by three", "that are multiples of three")),
    Filter("indivisible", "number", "{x} % 4 != 0", after=("not divisible by four", "that are no multiples of four")),
    Filter("at_most", "number", "{x} <= 9", after=("that are at most nine", "of nine or less")),
    Filter("longer", "word", "len({x}) > 4", before=("long",), after=("of more than four letters",)),
    Filter("shorter", "word", "len({x}) < 4", before=("short",), after=("of less than four letters",)),
    Filter("vowel", "word", '{x}[0] in "aeiou"', after=("that start with a vowel", "with a vowel in front")),
    Filter("ends", "word", '{x}.endswith("e")', after=("that end with 'e'", "with 'e' at the end")),
    Filter("contains", "word", '"a" in {x}', after=("that contain 'a'", "with the letter 'a'")),
    Filter("lacks", "word", '"o" not in {x}', after=("that lack 'o'", "without the letter 'o'")),
    Filter("numeric", "word", "{x}.isdigit()", before=("numeric",), after=("made of digits",)),
    Filter("alphabetic", "word", "{x}.isalpha()", before=("alphabetic",), after=("made of letters",)),
    Filter("palindrome", "word", "{x} == {x}[::-1]", before=("palindromic",), after=("that are palindromes",)),
)

MAPS = (
    Map("square", "number", "number", "{x} * {x}", ("the squares of",)),
    Map("cube", "number", "number", "{x} ** 3", ("the cubes of", "the third powers of")),
    Map("double", "number", "number", "2 * {x}", ("the doubles of", "twice")),
    Map("triple", "number", "number", "3 * {x}", ("the triples of", "three times")),
    Map("negate", "number", "number", "-{x}", ("the negatives of",)),
    Map("absolute", "number", "number", "abs({x})", ("the absolute values of", "the magnitudes of")),
    Map("halve", "number", "number", "{x} // 2", ("the halves, rounded down, of",)),
    Map("last_digit", "number", "number", "abs({x}) % 10", ("the last digits of",)),
    Map("next", "number", "number", "{x} + 1", ("the successors of", "one more than")),
    Map("previous", "number", "number", "{x} - 1", ("the predecessors of", "one less than")),
    Map("size", "word", "number", "len({x})", ("the lengths of", "the sizes of")),
    Map("upper", "word", "text", "{x}.upper()", ("the uppercase forms of",)),
    Map("lower", "word", "text", "{x}.lower()", ("the lowercase forms of",)),
    Map("capitalize", "word", "text", "{x}.capitalize()", ("the capitalized forms of",)),
    Map("reverse", "word", "text", "{x}[::-1]", ("the reversals of", "the mirror images of")),
    Map("first", "word", "text", "{x}[0]", ("the first letters of", "the initials of")),
    Map("last", "word", "text", "{x}[-1]", ("the last letters of",)),
    Map("head", "word", "text", "{x}[:3]", ("the first three letters of",)),
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
