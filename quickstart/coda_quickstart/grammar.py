"""The grammar of the small programming language that the quickstart's instruction set speaks.

A program is a source, a filter, a map and an aggregate: "the sum of the squares of the even numbers in values". Each
primitive says its Python and several ways to say it in English; whatever fits by type can be combined with whatever
else fits. Not here: which combinations are drawn, held out, rendered or tested (problems.py).
"""

from dataclasses import dataclass

DIGITS = tuple("23456789")
LETTERS = tuple("aeilnorst")


@dataclass(frozen=True)
class Source:
    """Where the elements come from."""

    name: str
    element: str
    """Type of the elements: "number", "word" or "char"."""
    code: str
    """Python expression of the iterable; ``{p}`` is the parameter."""
    noun: str
    """Plural noun phrase of the elements; ``{p}`` is the parameter."""
    parameters: tuple[str, ...]
    """Names that the parameter may have."""


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
    verbs: tuple[str, ...]
    """Imperatives for each element: "square each of them"."""
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


def _number_sources() -> list[Source]:
    lists = ("numbers", "values", "items", "data")
    return [
        Source("list", "number", "{p}", "numbers in {p}", lists),
        Source("range", "number", "range(1, {p} + 1)", "numbers from 1 to {p}", ("n", "limit", "size")),
        Source("digits", "number", "map(int, str({p}))", "digits of {p}", ("n", "number", "code")),
    ]


def _text_sources() -> list[Source]:
    texts = ("text", "line", "sentence", "s")
    return [
        Source("words", "word", "{p}.split()", "words in {p}", texts),
        Source("strings", "word", "{p}", "strings in {p}", ("words", "names", "strings")),
        Source("chars", "char", "{p}", "characters in {p}", texts),
    ]


SOURCES = (*_number_sources(), *_text_sources())

FILTERS = (
    Filter("even", "number", "{x} % 2 == 0", before=("even",), after=("that are even",)),
    Filter("odd", "number", "{x} % 2 == 1", before=("odd",), after=("that are odd",)),
    Filter("positive", "number", "{x} > 0", before=("positive",), after=("above zero",)),
    Filter("nonzero", "number", "{x} != 0", before=("nonzero",), after=("that are not zero",)),
    Filter("above", "number", "{x} > {k}", after=("greater than {k}", "above {k}"), constants=DIGITS),
    Filter("below", "number", "{x} < {k}", after=("less than {k}", "below {k}"), constants=DIGITS),
    Filter("at_least", "number", "{x} >= {k}", after=("that are at least {k}",), constants=DIGITS),
    Filter("at_most", "number", "{x} <= {k}", after=("that are at most {k}",), constants=DIGITS),
    Filter("divisible", "number", "{x} % {k} == 0", after=("divisible by {k}",), constants=DIGITS[1:]),
    Filter("indivisible", "number", "{x} % {k} != 0", after=("not divisible by {k}",), constants=DIGITS[1:]),
    Filter("other_than", "number", "{x} != {k}", after=("other than {k}", "different from {k}"), constants=DIGITS),
    Filter("longer", "word", "len({x}) > {k}", after=("longer than {k} letters",), constants=DIGITS[:5]),
    Filter("shorter", "word", "len({x}) < {k}", after=("shorter than {k} letters",), constants=DIGITS[1:6]),
    Filter("exact", "word", "len({x}) == {k}", after=("of exactly {k} letters",), constants=DIGITS[:5]),
    Filter("starts", "word", '{x}.startswith("{k}")', after=("that start with '{k}'",), constants=LETTERS),
    Filter("ends", "word", '{x}.endswith("{k}")', after=("that end with '{k}'",), constants=LETTERS),
    Filter("contains", "word", '"{k}" in {x}', after=("that contain '{k}'", "with letter '{k}'"), constants=LETTERS),
    Filter("lacks", "word", '"{k}" not in {x}', after=("without the letter '{k}'",), constants=LETTERS),
    Filter("numeric", "word", "{x}.isdigit()", before=("numeric",), after=("made of digits",)),
    Filter("alphabetic", "word", "{x}.isalpha()", before=("alphabetic",), after=("made of letters",)),
    Filter("palindrome", "word", "{x} == {x}[::-1]", before=("palindromic",), after=("that are palindromes",)),
    Filter("vowel", "char", '{x} in "aeiou"', after=("that are vowels",)),
    Filter("non_vowel", "char", '{x} not in "aeiou"', after=("that are not vowels",)),
    Filter("digit", "char", "{x}.isdigit()", after=("that are digits",)),
    Filter("letter", "char", "{x}.isalpha()", after=("that are letters",)),
    Filter("upper_case", "char", "{x}.isupper()", before=("uppercase",), after=("in upper case",)),
    Filter("lower_case", "char", "{x}.islower()", before=("lowercase",), after=("in lower case",)),
    Filter("not_space", "char", '{x} != " "', after=("that are not spaces",)),
    Filter("differs", "char", '{x} != "{k}"', after=("other than '{k}'", "different from '{k}'"), constants=LETTERS),
    Filter("before", "char", '{x} < "{k}"', after=("that sort before '{k}'",), constants=LETTERS),
)

MAPS = (
    Map("square", "number", "number", "{x} * {x}", ("the squares of",), ("square each of them",)),
    Map("cube", "number", "number", "{x} ** 3", ("the cubes of",), ("cube each of them",)),
    Map("double", "number", "number", "2 * {x}", ("the doubles of",), ("double each of them",)),
    Map("negate", "number", "number", "-{x}", ("the negatives of",), ("negate each of them",)),
    Map("absolute", "number", "number", "abs({x})", ("the absolute values of",), ("take absolute values",)),
    Map(
        "halve",
        "number",
        "number",
        "{x} // 2",
        ("the halves, rounded down, of",),
        ("halve each of them, rounding down",),
    ),
    Map("last_digit", "number", "number", "abs({x}) % 10", ("the last digits of",), ("take their last digits",)),
    Map("add", "number", "number", "{x} + {k}", ("{k} more than",), ("add {k} to each",), DIGITS),
    Map("subtract", "number", "number", "{x} - {k}", ("{k} less than",), ("subtract {k} from each",), DIGITS),
    Map("times", "number", "number", "{x} * {k}", ("{k} times",), ("multiply each by {k}",), DIGITS),
    Map(
        "modulo",
        "number",
        "number",
        "{x} % {k}",
        ("the remainders by {k} of",),
        ("take remainders by {k}",),
        DIGITS[1:],
    ),
    Map("size", "word", "number", "len({x})", ("the lengths of",), ("measure each of them",)),
    Map("count", "word", "number", '{x}.count("{k}")', ("counts of '{k}' in",), ("count '{k}' in each",), LETTERS),
    Map("upper", "word", "text", "{x}.upper()", ("the uppercase forms of",), ("put them in upper case",)),
    Map("lower", "word", "text", "{x}.lower()", ("the lowercase forms of",), ("put them in lower case",)),
    Map("capitalize", "word", "text", "{x}.capitalize()", ("the capitalized forms of",), ("capitalize each of them",)),
    Map("reverse", "word", "text", "{x}[::-1]", ("the reversals of",), ("reverse each of them",)),
    Map("first", "word", "text", "{x}[0]", ("the first letters of",), ("take their first letters",)),
    Map("last", "word", "text", "{x}[-1]", ("the last letters of",), ("take their last letters",)),
    Map("head", "word", "text", "{x}[:{k}]", ("the first {k} letters of",), ("cut each to {k} letters",), DIGITS[:4]),
    Map("twice", "word", "text", "{x} * 2", ("the repetitions of",), ("repeat each twice",)),
    Map("code", "char", "number", "ord({x})", ("the code points of",), ("take their code points",)),
    Map("char_upper", "char", "text", "{x}.upper()", ("the uppercase forms of",), ("put them in upper case",)),
    Map("char_lower", "char", "text", "{x}.lower()", ("the lowercase forms of",), ("put them in lower case",)),
    Map("swap", "char", "text", "{x}.swapcase()", ("the swapped cases of",), ("swap their case",)),
    Map("char_twice", "char", "text", "{x} * 2", ("the repetitions of",), ("repeat each twice",)),
    Map("char_times", "char", "text", "{x} * {k}", ("{k} copies of",), ("copy each {k} times",), DIGITS[1:]),
    Map("mark", "char", "text", '{x} + "{k}"', ("the '{k}' extensions of",), ("add '{k}' to each",), LETTERS),
)

AGGREGATES = (
    Aggregate("sum", "number", "sum({g})", ("the sum of", "the total of")),
    Aggregate("maximum", "number", "max(({g}), default=0)", ("the largest of", "the maximum of")),
    Aggregate("minimum", "number", "min(({g}), default=0)", ("the smallest of", "the minimum of")),
    Aggregate("list", "any", "[{g}]", ("a list of", "the list of")),
    Aggregate("set", "any", "{{{g}}}", ("a set of", "the set of")),
    Aggregate("tuple", "any", "tuple({g})", ("a tuple of",)),
    Aggregate("sorted", "any", "sorted({g})", ("a sorted list of", "the sorted list of")),
    Aggregate("descending", "any", "sorted(({g}), reverse=True)", ("a descending list of",)),
    Aggregate("backwards", "any", "[{g}][::-1]", ("a backwards list of",)),
    Aggregate("distinct", "any", "len({{{g}}})", ("the number of distinct values among",)),
    Aggregate("joined", "text", '"".join({g})', ("the concatenation of",)),
    Aggregate("spaced", "text", '" ".join({g})', ("the text joined by spaces of",)),
    Aggregate("dashed", "text", '"-".join({g})', ("the text joined by dashes of",)),
)
