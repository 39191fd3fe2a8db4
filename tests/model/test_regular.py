"""Expressions and their automata, against Python's own."""

import random
import re
import time

import pytest

from CoDALanguageModel.errors import UserError
from CoDALanguageModel.regular import automaton, complement, parse, utf8_sequences

PATTERNS = [
    "a*b",
    "(a|b)*a(a|b){3}",
    "[^a]",
    "\\d{2,4}",
    "x?y+z{0,2}",
    "\u00e9|\u00fc[\u00e0-\u00f6]",
    "a(bc|d)*?e?",
    "(ab|a)(c|bcd)",
    "",
    "[\\w-]+@\\w+",
    "(a?b?){2,3}",
    "^ab$|^a$",
    "xa$|xb$",
    "a|^b$",
    "(?:a(?P<n>b*))+",
    "\\.\\*[]x]",
    ".{2}",
]


def accepts(machine, data):
    state = 0
    for byte in data:
        state = int(machine.table[state, machine.byte_class[byte]])
    return bool(machine.accepts[state])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_an_automaton_accepts_what_python_matches(pattern):
    rng, machine = random.Random(pattern), automaton(parse(pattern))
    letters, found = "abcdexyz01@-_. *]\n\u00e9\u00fc\u00e0\u20ac\U0001f600", 0
    for _ in range(1500):
        text = "".join(rng.choice(letters) for _ in range(rng.randint(0, 5)))
        expected = re.fullmatch(pattern, text, re.ASCII) is not None
        found += expected
        assert accepts(machine, text.encode()) == expected, text
    assert not accepts(machine, b"\xff\xfe")


def test_a_class_takes_exactly_the_utf8_of_its_characters():
    machine = automaton(parse("[^b\u00ff-\u0801\ud7ff-\ue000]"))
    for number in [*range(0x900), *range(0xD7F0, 0xD800), *range(0xE000, 0x10100), 0x10FFFE, 0x10FFFF]:
        text = chr(number)
        assert accepts(machine, text.encode()) == (not re.fullmatch("[b\u00ff-\u0801\ud7ff-\ue000]", text))
    assert not accepts(machine, b"\xed\xa0\x80")  # half of a surrogate pair
    assert not accepts(machine, b"\xc0\x80")  # a longer code than needed
    assert utf8_sequences(complement(((0, 0x10FFFF),))) == ()


def test_what_is_outside_of_a_class_is_outside_by_every_reading_of_unicode():
    for pattern, characters in (("\\S|[^\\s]", "\u00a0\u2003"), ("\\D|[^\\d]", "\u0663"), ("\\W|[^\\w]", "\u00e9")):
        assert not any(accepts(automaton(parse(pattern)), character.encode()) for character in characters)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(a", "no regular expression"),
        ("a(?=b)", "ahead or behind"),
        ("(?<!a)b", "ahead or behind"),
        ("(a)\\1", "a reference to a group"),
        ("(?i)a", "flags"),
        ("(?i:a)", "flags"),
        ("a\\b", "\\^ or \\$ elsewhere"),
        ("a^b", "\\^ or \\$ elsewhere"),
        ("x(^a|b)", "\\^ or \\$ elsewhere"),
        ("a*+", "a possessive repetition"),
        ("(?>a)", "an atomic group"),
        ("[^\\x00-\\U0010ffff]", "no text matches it"),
        ("a" * 20_001, "20001 characters"),
    ],
)
def test_what_is_not_regular_is_refused(pattern, message):
    with pytest.raises(UserError, match=message):
        automaton(parse(pattern))


@pytest.mark.parametrize(
    "pattern",
    [
        "a{1,100000}",
        "a{5000}",
        ".{0,2000}",
        "(a|b)*a(a|b){14}",
        "((a{1,100}){1,100}){1,100}",
        "(" * 3000 + ")" * 3000,
        "|".join(f"(.*{i}.*){{9}}" for i in range(40)),
        "(.*a.*|.*b.*|.*c.*|.*d.*){1,30}",
        "(a?){3000}b",
        "(a*b*c*d*){400}",
    ],
)
def test_what_is_too_large_is_refused_soon(pattern):
    start_s = time.perf_counter()
    with pytest.raises(UserError, match=r"states|nested"):
        automaton(parse(pattern))
    assert time.perf_counter() - start_s < 10  # about 1 s on a quiet machine


def test_what_makes_others_explode_is_small():
    for pattern in ("(a*)*b", "(a|a)*b", "(a|aa)+$", "(([a-z])+.)+[A-Z]([a-z])+$"):
        assert len(automaton(parse(pattern)).table) < 20
