"""Facts of filling gaps of known and unknown length."""

import pytest
import torch

from CoDALanguageModel.infilling import lay_out


def test_the_pieces_come_back_unchanged_around_every_gap(model, tokens):
    pieces = [tokens(4).tolist(), tokens(3, seed=1).tolist(), []]
    output = model.infill(pieces, gap_lengths=[2, 3], steps=5)
    assert output.ids == [*pieces[0], *output.gaps[0], *pieces[1], *output.gaps[1]]
    assert [len(gap) for gap in output.gaps] == [2, 3]
    assert not {66, 67} & set(output.ids)


def test_a_gap_of_known_length_is_what_the_sampler_puts_into_the_masks(model, tokens):
    left, right = tokens(4).tolist(), tokens(3, seed=1).tolist()
    direct = model.diffusion_generate(torch.tensor([[*left, 67, 67, *right]]), max_new_tokens=0, steps=2)
    assert model.infill([left, right], gap_lengths=[2], steps=2).ids == direct[0].tolist()


def test_the_best_scored_of_the_candidate_lengths_wins_and_each_is_scored_as_alone(model, tokens):
    pieces = [tokens(5).tolist(), tokens(4, seed=3).tolist()]
    output = model.infill(pieces, infill_lengths=[1, 2, 4], steps=4)
    each = [model.infill(pieces, gap_lengths=[n], steps=4) for n in (1, 2, 4)]
    alone = {one.gap_lengths: one.score for one in each}
    assert output.candidates == pytest.approx(alone, abs=1e-5)
    assert output.gap_lengths == max(alone, key=alone.get)
    assert output.gaps == model.infill(pieces, gap_lengths=output.gap_lengths, steps=4).gaps
    # The passes of those that lost are counted, and not their tokens.
    assert output.cost.row_forwards == sum(one.cost.forwards for one in each)
    assert output.cost.tokens_per_forward == len(output.gaps[0]) / output.cost.row_forwards


def test_several_gaps_try_every_combination(model, tokens):
    pieces = [tokens(3).tolist(), tokens(2, seed=1).tolist(), tokens(2, seed=2).tolist()]
    output = model.infill(pieces, infill_lengths=[1, 3], steps=6)
    assert set(output.candidates) == {(1, 1), (1, 3), (3, 1), (3, 3)}


def test_an_end_token_ends_a_gap_when_asked(model, tokens):
    pieces = [tokens(3).tolist(), tokens(2, seed=1).tolist()]
    output = model.infill(pieces, gap_lengths=[4], steps=4, end_of_gap=True, logit_bias={65: 1e4})
    assert output.gaps == [[]]
    assert output.cost.tokens_per_forward == 0.0 < output.cost.tokens_committed
    assert output.ids == [*pieces[0], *pieces[1]]


@pytest.mark.parametrize(
    ("pieces", "options", "message"),
    [
        ([[1]], {"gap_lengths": [1]}, "at least 2 lists"),
        ([[1], [2]], {}, "exactly one of gap_lengths"),
        ([[1], [2]], {"gap_lengths": [1], "infill_lengths": [1]}, "exactly one of gap_lengths"),
        ([[1], [2]], {"gap_lengths": [1, 1]}, "one length per gap"),
        ([[1], [2]], {"gap_lengths": [0]}, "integers >= 1"),
        ([[1], [67]], {"gap_lengths": [1]}, "must not hold the mask token"),
        ([[1]] * 5, {"infill_lengths": [1, 2, 3]}, "combinations"),
        ([[], [5, 6, 7]], {"gap_lengths": [1], "steps": 1}, "starts with a mask, which nothing scores"),
        ([[1], [2]], {"gap_lengths": [1], "max_new_tokens": 3}, "max_new_tokens is set by infill"),
    ],
)
def test_bad_gaps_are_refused(model, pieces, options, message):
    with pytest.raises(ValueError, match=message):
        model.infill(pieces, **options)


def test_gaps_lie_between_the_pieces():
    text = lay_out([[1, 2], [], [3]], [2, 3], 9)
    assert text.ids == [1, 2, 9, 9, 9, 9, 9, 3]
    assert text.gaps == [slice(2, 4), slice(4, 7)]
    assert lay_out([[], [3]], [1], 9, start_token_id=7).ids == [7, 9, 3]
    assert lay_out([[1]], [], 9) == ([1], [])
    assert lay_out([[], [3]], [1], 9).ids == [9, 3]
    with pytest.raises(ValueError, match="pieces must not hold the mask token 9"):
        lay_out([[1], [9]], [1], 9)
    with pytest.raises(ValueError, match=r"lengths must hold one length per gap \(1\), got 2"):
        lay_out([[1], [3]], [1, 2], 9)
