"""Text is shown only when nothing can change it any more."""

import random
from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st

from CoDALanguageModel.answers import AnswerReader, end_ids

MASK, EOS = 256, 257
ALPHABET = "ab\n \u00e9\u4e2d\U0001f600"


def decode(ids, after=()):
    return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


def reader(stop=(), decode=decode):
    return AnswerReader(decode=decode, mask_token_id=MASK, eos_token_ids=frozenset({EOS}), stop=stop)


def read(ids, stop=()):
    return reader(stop).read(ids)


def test_what_is_read_ends_at_the_first_mask():
    assert read([97, 98, MASK, 99]).num_tokens == 2
    assert read([97, 98]).num_tokens == 2


def test_whitespace_is_untouched():
    text = "\n\n  def f(x):\r\n\treturn x  \n"
    assert read(list(text.encode())).text == text


def test_the_answer_ends_before_the_first_end_token():
    reading = read([*b"ab", EOS, *b"cd", MASK])
    assert (reading.text, reading.num_tokens, reading.finish_reason) == ("ab", 2, "stop")


def test_an_end_token_behind_a_mask_is_not_seen():
    assert read([*b"ab", MASK, EOS]).finish_reason is None


def test_a_full_canvas_without_end_is_a_matter_of_length():
    reading = read(list(b"abc"))
    assert (reading.text, reading.num_tokens, reading.finish_reason) == ("abc", 3, "length")


def test_half_a_character_is_held_back_and_shown_when_it_is_the_end():
    half = list("a\u4e2d".encode())[:-1]
    assert read([*half, MASK]).text == "a"
    assert read(half).text == "a\ufffd"


def test_the_answer_is_cut_before_a_stop_string():
    reading = read(list(b"one\n\ntwo"), stop=("\n\n",))
    assert (reading.text, reading.finish_reason) == ("one", "stop")
    assert reading.num_tokens == 5  # what had to be committed to see it


def test_what_may_become_a_stop_string_is_held_back():
    assert read([*b"one\n", MASK], stop=("\n\nX",)).text == "one"
    assert read([*b"one\n", *b"two", MASK], stop=("\n\nX",)).text == "one\ntwo"


def test_the_stop_string_that_is_complete_first_decides():
    for ids in ([*b"abcX"], [*b"ab", MASK, MASK]):
        assert read(ids, stop=("abcX", "b")).text == "a"


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(ALPHABET, max_size=12),
    broken=st.one_of(st.lists(st.integers(0, 255), max_size=4), st.lists(st.integers(128, 255), max_size=80)),
    end=st.booleans(),
    stop=st.lists(st.text(ALPHABET, min_size=1, max_size=3), max_size=3),
    seed=st.integers(0, 1000),
)
def test_texts_only_grow_and_end_as_the_whole_canvas_reads(text, broken, end, stop, seed):
    answer = [*text.encode(), *broken, *([EOS] if end else []), *b"tail"]
    final = read(answer, stop)
    canvas = [MASK] * len(answer)
    shown = ""
    steps = reader(stop)
    for position in random.Random(seed).sample(range(len(answer)), len(answer)):
        canvas[position] = answer[position]
        reading = steps.read(canvas)
        assert reading == read(canvas, stop)
        assert reading.text.startswith(shown)
        shown = reading.text
        assert final.text.startswith(shown)
        if reading.finish_reason is not None:
            break
    assert (reading.text, reading.num_tokens, reading.finish_reason) == (
        final.text,
        final.num_tokens,
        final.finish_reason,
    )


@settings(max_examples=100, deadline=None)
@given(
    text=st.text(ALPHABET, max_size=12),
    end=st.booleans(),
    stop=st.lists(st.text(ALPHABET, min_size=1, max_size=3), max_size=3),
    cuts=st.lists(st.integers(1, 4), min_size=40, max_size=40),
)
def test_an_answer_fed_in_pieces_ends_where_the_whole_one_does(text, end, stop, cuts):
    answer = [*text.encode(), *([EOS] if end else []), *b"tail"]
    whole, steps, fed = read(answer, stop), reader(stop), 0
    for size in cuts:
        reading = steps.feed(answer[fed : fed + size], is_full=fed + size >= len(answer))
        fed += size
        assert whole.text.startswith(reading.text)
        if reading.end is not None:
            break
    assert reading == whole
    assert steps.feed(b"more") == whole  # nothing is read behind the end
    assert reading.end <= min(fed, len(answer))
    if whole.finish_reason == "stop" and decode(answer[: whole.num_tokens]) == whole.text:
        assert answer[reading.end - 1] == EOS


def test_the_end_counts_the_end_token_and_the_stop_string():
    assert (read([*b"ab", EOS, MASK]).end, read(list(b"one\n\ntwo"), ("\n\n",)).end, read(list(b"ab")).end) == (3, 5, 2)
    assert read([*b"ab", MASK]).end is None


def test_end_and_pad_tokens_end_an_answer_whoever_names_them():
    named = [SimpleNamespace(eos_token_id=eos, pad_token_id=pad) for eos, pad in ((1, None), ([2, 3], 4), (None, None))]
    assert end_ids(*named) == {1, 2, 3, 4}


def test_reading_a_growing_answer_decodes_each_token_a_few_times_and_not_at_every_step():
    for answer in ([*b"def f(x):\n"] * 200, [0xFF] * 2000, [*("\u4e2d".encode() * 700)]):
        decoded = []
        steps = reader(decode=lambda ids, after, decoded=decoded: decoded.append(len(ids)) or decode(ids))
        for num in range(len(answer) + 1):
            reading = steps.read([*answer[:num], *[MASK] * (len(answer) - num)])
        assert reading.text == decode(answer)
        assert sum(decoded) < 60 * len(answer)
