"""What is shown of a canvas: texts in whole characters, and changes that add up to it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from CoDALanguageModel import Decoding, DiffusionGenerationConfig, Request
from CoDALanguageModel.answers import AnswerReader
from CoDALanguageModel.canvas_view import CanvasView, rebuilt
from CoDALanguageModel.row import Change

MASK, EOS = 256, 257
REGIMES = [
    {},
    {"alg": "p2"},
    {"remask": "conf", "temperature": 0.9},
    {"speculate": 3},
    {"threshold": 0.2},
    {"kv_cache": "dual", "block_length": 4},
]


def decode(ids, after=()):
    return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


def byte_view(length):
    return CanvasView([[120], []], [length], decode=decode, end_ids=frozenset({EOS}))


def committed(column, token, probability=1.0):
    return Change(column, token, probability, True)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), raw=st.one_of(st.binary(max_size=12), st.text("a\u00e9\u4e2d\U0001f600", max_size=5)))
def test_texts_of_a_full_canvas_add_up_to_the_answer_in_any_order_of_commits(data, raw):
    raw = raw if isinstance(raw, bytes) else raw.encode()
    ids = [*raw, *[EOS] * data.draw(st.integers(1, 2))]
    view = byte_view(len(ids))
    steps, known = [view.whole()], {}
    while len(known) < len(ids):
        left = [i for i in range(len(ids)) if i not in known]
        now = data.draw(st.lists(st.sampled_from(left), min_size=1, max_size=3, unique=True))
        known |= {i: ids[i] for i in now}
        changes = [committed(i, ids[i]) for i in now]
        guesses = [Change(i, ids[i] if i % 2 else 0x41, 0.5, False) for i in left if i not in now]
        steps.append(view.step(changes + guesses))
        assert rebuilt(steps) == view.cells
    reader = AnswerReader(decode=decode, mask_token_id=MASK, eos_token_ids=frozenset({EOS}))
    cells = view.cells[: len(raw)]
    assert "".join(cell.text for cell in cells) == reader.feed(ids, is_full=True).text
    assert view.cells[len(raw)].text is None


def test_a_character_shows_when_the_last_of_its_tokens_is_there():
    view = byte_view(4)
    first, second, third = "\u4e2d".encode()
    assert [cell.text for cell in view.step([committed(1, second)]).cells] == [""]
    assert [cell.text for cell in view.step([committed(2, third), committed(3, 33)]).cells] == ["", "!"]
    step = view.step([committed(0, first)])
    assert [(cell.position, cell.text) for cell in step.cells] == [(0, ""), (2, "\u4e2d")]


def test_bytes_that_can_become_no_character_any_more_show_as_such():
    view = byte_view(2)
    assert [cell.text for cell in view.step([committed(0, 0xE4)]).cells] == [""]
    assert [cell.text for cell in view.step([Change(1, 33, 0.5, False)]).cells] == ["!"]
    assert [cell.text for cell in view.step([committed(1, 33)]).cells] == ["\ufffd", "!"]


def test_text_between_gaps_is_given_and_joins_no_bytes_with_them():
    first, second, third = "\u4e2d".encode()
    view = CanvasView([[120], [second, 46], []], [1, 1], decode=decode)
    (step,) = steps = [view.whole()]
    assert [(cell.text, cell.state) for cell in step.cells] == [("\ufffd", "given"), (".", "given")]
    assert [cell.state for cell in rebuilt(steps)] == ["masked", "given", "given", "masked"]
    steps.append(view.step([committed(11, first), committed(14, third)], start=11))
    assert [cell.text for cell in rebuilt(steps)] == ["\ufffd", "\ufffd", ".", "\ufffd"]


def test_a_token_that_is_masked_again_is_shown_as_masked():
    view = byte_view(1)
    view.step([committed(0, 65)])
    (cell,) = view.step([Change(0, None, None, False)]).cells
    assert cell == (0, "", "masked", None)
    assert view.step([Change(0, None, None, False)]).cells == ()


@pytest.mark.parametrize("regime", REGIMES, ids=str)
def test_the_view_of_a_row_is_its_canvas_after_every_step_and_changes_no_token(double_model, tokens, regime):
    ids = tokens(1, 5)[0].tolist()
    config = DiffusionGenerationConfig().merged({"max_new_tokens": 12, "steps": 8, "eos_early_stop": False} | regime)
    mask = double_model.config.mask_token_id
    decoding = Decoding(double_model)
    plain = decoding.admit(Request(ids=ids, settings=config, seed=3))
    row = decoding.admit(Request(ids=ids, settings=config, seed=3, keeps_guesses=True))
    other = decoding.admit(Request(ids=ids[:3], settings=config, seed=4))
    view = CanvasView([ids, []], [12], decode=lambda ids, after=(): "".join(f"<{i}>" for i in ids))
    steps, states = [view.whole()], set()
    while decoding.rows:
        is_here = row.is_present
        decoding.step()
        if not is_here:
            continue
        steps.append(view.step(row.shown(), len(ids)))
        cells = rebuilt(steps)
        states |= {cell.state for cell in cells}
        for cell, token in zip(cells, row.ids[len(ids) :], strict=True):
            assert (cell.state == "committed") == (token != mask)
            assert cell.text == f"<{token}>" or cell.state != "committed"
            assert (cell.confidence is None) == (cell.state == "masked")
    assert row.ids == plain.ids
    assert other.request.ids == ids[:3]
    assert "provisional" in states
    assert ("masked" in states) == ("remask" in regime or "block_length" in regime)
    assert plain.guesses == other.guesses == {}
