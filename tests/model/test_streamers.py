"""What streamers of transformers are told: final tokens in order, drafts, and canvas steps."""

import pytest
import torch
from transformers import TextStreamer

from CoDALanguageModel import CanvasStreamer, UserError
from CoDALanguageModel.canvas_view import rebuilt

MASK, EOS = 67, 65
REGIMES = [{}, {"alg": "p2"}, {"remask": "conf", "temperature": 0.8}, {"speculate": 2}, {"block_length": 4}]


class Plain:
    """`BaseStreamer`'s interface."""

    def __init__(self):
        self.values, self.is_over = [], False

    def put(self, value):
        assert value.dtype == torch.long
        assert value.shape[0] == 1
        assert not self.is_over
        self.values.append(value[0].tolist())

    def end(self):
        self.is_over = True


class Drafts(Plain):
    """`TextDiffusionStreamer`'s interface."""

    def __init__(self):
        super().__init__()
        self.wholes = []

    def put_draft(self, value):
        told = [token for put in self.values for token in put]
        self.wholes.append(told + value[0].tolist())


def text_up_to_the_end(out, prompt_length):
    ids = out[0].tolist()
    ends = [i for i in range(prompt_length, len(ids)) if ids[i] == EOS]
    return ids[: ends[0] + 1] if ends else ids


@pytest.mark.parametrize("regime", REGIMES, ids=str)
def test_a_streamer_gets_the_prompt_then_final_tokens_and_changes_none(double_model, tokens, regime):
    prompt, options = tokens(1, 5), {"max_new_tokens": 12, "steps": 8, "seed": 2, **regime}
    plain, drafts = Plain(), Drafts()
    expected = double_model.generate(prompt, **options)
    for streamer in (plain, drafts):
        out = double_model.generate(prompt, streamer=streamer, **options)
        assert torch.equal(out, expected)
        assert streamer.values[0] == prompt[0].tolist()
        assert [token for put in streamer.values for token in put] == text_up_to_the_end(expected, 5)
        assert streamer.is_over
    assert drafts.wholes
    assert {len(whole) for whole in drafts.wholes} == {17}
    # With guesses: no pass of a single block leaves an unknown mask, unless it masked the place again itself.
    if not regime or "speculate" in regime:
        assert all(MASK not in whole for whole in drafts.wholes)


def test_gaps_and_padding(double_model, tokens):
    ids = tokens(1, 8)[0].tolist()
    gaps = torch.tensor([[66, *ids[:2], MASK, MASK, ids[2], MASK, *ids[3:]]])
    real = torch.ones_like(gaps).index_fill(1, torch.tensor([0]), 0)
    streamer, steps = Plain(), []
    out = double_model.generate(gaps, attention_mask=real, max_new_tokens=0, streamer=streamer)
    assert streamer.values[0] == ids[:2]
    assert [token for put in streamer.values for token in put] == out[0, 1:].tolist()
    shown = CanvasStreamer(lambda ids, after=(): "".join(f"<{i}>" for i in ids), steps.append)
    double_model.generate(gaps, attention_mask=real, max_new_tokens=0, streamer=shown)
    assert steps[0].length == 4
    assert [cell.state for cell in rebuilt(steps[:1])] == ["masked", "masked", "given", "masked"]
    cells = rebuilt(steps)
    assert [cell.text for cell in cells] == [f"<{token}>" for token in out[0, 3:7].tolist()]
    assert {cell.state for cell in cells} == {"committed", "given"}


def test_transformers_own_streamer_prints_the_answer(double_model, tokens, capsys):
    class Words:
        def decode(self, ids, **_):
            return "".join(f"{token} " for token in (ids if isinstance(ids, list) else [ids]))

    out = double_model.generate(tokens(1, 3), max_new_tokens=6, streamer=TextStreamer(Words(), skip_prompt=True))
    expected = text_up_to_the_end(out, 3)[3:]
    assert capsys.readouterr().out == "".join(f"{token} " for token in expected) + "\n"


def test_a_streamer_needs_one_row(double_model, tokens):
    with pytest.raises(UserError, match="streamer must be None for more than one row, got 2 rows"):
        double_model.generate(tokens(2, 3), max_new_tokens=2, streamer=Plain())
    with pytest.raises(UserError, match="streamer must be None for an empty batch, got 0 rows"):
        double_model.generate(tokens(2, 3)[:0], max_new_tokens=2, streamer=Plain())
    with pytest.raises(UserError, match="got 3 rows"):
        double_model.generate(tokens(1, 3), max_new_tokens=2, num_return_sequences=3, streamer=Plain())


def test_stopping_criteria_end_what_is_streamed(double_model, tokens):
    prompt, options = tokens(1, 5), {"max_new_tokens": 12, "steps": 12, "block_length": 4, "eos_early_stop": False}
    whole = double_model.diffusion_generate(prompt, **options)[0].tolist()
    streamer = Drafts()

    def at_ten(ids, scores, **kwargs):
        return torch.tensor([ids.shape[1] >= 10])

    out = double_model.diffusion_generate(prompt, streamer=streamer, stopping_criteria=[at_ten], **options)
    assert [token for put in streamer.values for token in put] == whole[:10]
    assert out[0].tolist()[:10] == whole[:10]
    assert streamer.is_over
