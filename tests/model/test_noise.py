"""Rows noised for a step: the draws depend on seed and sample alone, and each position is masked with probability t."""

import hashlib

import numpy as np
import pytest
import torch

from CoDALanguageModel.diffusion import IGNORE_INDEX
from CoDALanguageModel.errors import UserError
from CoDALanguageModel.noise import (
    Blocks,
    CleanRows,
    blocks_to_train,
    deal_levels,
    draw_rows,
    noise_blocks,
    noise_rows,
    spread_levels,
)

MASK, PAD, T = 299, 0, 24
STRATEGIES = {"plain": (0, 0, 0), "S1": (1, 0, 0), "S2": (0, 1, 0), "S3": (0, 0, 1), "all": (0.3, 0.3, 0.5)}


def clean(num_rows, lengths=(T,), width=T):
    """Equal rows of documents with the given lengths, padding after them."""
    segment_ids = torch.zeros(num_rows, width, dtype=torch.int64)
    segment_ids[:, : sum(lengths)] = torch.arange(1, len(lengths) + 1).repeat_interleave(torch.tensor(lengths))
    return CleanRows(1 + torch.arange(num_rows * width).reshape(num_rows, width) % 250, segment_ids)


def noise(rows, sample_ids, t, seed=0, **draws):
    num_real = (rows.segment_ids > 0).sum(dim=1).tolist()
    drawn = draw_rows(seed, sample_ids, num_real, rows.input_ids.shape[1], **draws)
    return noise_rows(rows, t, drawn, mask_token_id=MASK, pad_token_id=PAD)


def test_the_draws_of_a_run_are_frozen():
    """A checkpoint of any age continues with the masks of its run."""
    t = deal_levels(3, 7, 8, 1e-3)
    noised = noise(clean(8), range(8), t, seed=3, strategies=(0.3, 0.3, 0.5), span_lengths=(2, 4, 8))
    masked = (noised.labels != IGNORE_INDEX).numpy()
    assert (noised.noised_ids.numpy()[masked] == MASK).all()
    digest = hashlib.blake2b(masked.tobytes() + t.numpy().tobytes(), digest_size=8).hexdigest()
    assert digest == "15fef208ab9adb9f"


@pytest.mark.parametrize("span", [1, 2, 8])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_masked_fraction_is_t_at_every_edge(strategy, span):
    """At the ends of the row, beside segment starts, a prefix, padding and a fixed prompt."""
    rows, num_rows = clean(3000, (9, 8, 5)), 3000
    fixed = torch.zeros_like(rows.input_ids, dtype=torch.bool)
    fixed[:, 11:13] = True
    t = deal_levels(1, 0, num_rows, 0.05)
    draws = {"strategies": STRATEGIES[strategy], "span_lengths": (span,)}
    noised = noise(rows._replace(fixed=fixed), range(num_rows), t, **draws)
    masked, maskable = noised.labels != IGNORE_INDEX, noised.maskable
    assert not (masked & ~maskable).any()
    assert set((~maskable.any(dim=0)).nonzero().flatten().tolist()) >= {0, 9, 11, 12, 17, 22, 23}
    places = maskable.float().cumsum(dim=1)
    edges = {
        "first": maskable & (places == 1),
        "last": maskable & (places == places[:, -1:]),
        **{f"column {i}": maskable & (torch.arange(T) == i) for i in (1, 8, 10, 13, 16, 18, 21)},
    }
    for name, edge in edges.items():
        level = t[:, None].expand_as(edge)[edge].double()
        difference = (masked[edge].double() - level).sum()
        assert abs(difference) <= 4.5 * (level * (1 - level)).sum().sqrt(), name


def test_a_row_has_its_noise_in_any_company_and_width():
    """So two trainers, one of packed rows and one of padded ones, mask the same sample in the same way."""
    draws = {"strategies": (0, 0, 0.5), "span_lengths": (2, 4, 8)}
    t = torch.tensor([0.3, 0.6, 0.9])
    narrow, wide = clean(3, (17,), 24), clean(3, (17,), 64)
    wide.input_ids[:, :24] = narrow.input_ids
    together = noise(narrow, [4, 5, 6], t, **draws)
    alone = noise(CleanRows(*(x[1:2] if x is not None else None for x in wide)), [5], t[1:2], **draws)
    assert torch.equal(together.noised_ids[1, :17], alone.noised_ids[0, :17])
    assert (together.labels[1] != IGNORE_INDEX).any()
    other = noise(narrow, [4, 7, 6], t, **draws)
    assert not torch.equal(other.labels[1], together.labels[1])


def test_what_no_row_scores_is_never_masked():
    rows, t = clean(4, (5, 1, 9)), torch.ones(4)
    shifted = noise(rows, range(4), t)
    assert (~shifted.maskable[0]).nonzero().flatten().tolist() == [0, 5, 6, *range(15, T)]
    drawn = draw_rows(0, range(4), [15] * 4, T)
    own_row = noise_rows(rows, t, drawn, mask_token_id=MASK, pad_token_id=PAD, logits_shift=False)
    assert (~own_row.maskable[0]).nonzero().flatten().tolist() == list(range(15, T))
    assert torch.equal(own_row.noised_ids == MASK, own_row.maskable)


def test_levels_are_one_in_each_stratum_in_a_random_order():
    levels = deal_levels(0, 5, 50, 0.01)
    ordered = levels.sort().values
    assert levels.dtype == torch.float32
    assert np.allclose(ordered.diff(), 0.99 / 50, atol=1e-5)
    assert not torch.equal(levels, ordered)
    assert 0.01 <= float(ordered[0])
    assert float(ordered[-1]) <= 1.0
    assert not torch.equal(levels, deal_levels(0, 6, 50, 0.01))


# ---- rows by blocks

DRAWN = {"strategies": (0.3, 0.3, 0.5), "span_lengths": (2, 4)}


def by_blocks(rows, sample_ids, t, blocks, seed=0, logits_shift=True, **draws):
    num_real = (rows.segment_ids > 0).sum(dim=1).tolist()
    drawn = draw_rows(seed, sample_ids, num_real, rows.input_ids.shape[1], **draws)
    return noise_blocks(rows, t, drawn, blocks, mask_token_id=MASK, pad_token_id=PAD, logits_shift=logits_shift)


def test_a_row_by_blocks_is_the_noised_row_beside_the_clean_one():
    rows, blocks = clean(6, (9, 8, 5)), Blocks(4)
    t = spread_levels(deal_levels(0, 0, 6, 0.05), rows.segment_ids, blocks, t_min=0.05)
    got = by_blocks(rows, range(6), t, blocks, **DRAWN)
    drawn = draw_rows(0, range(6), [22] * 6, T, **DRAWN)
    want = noise_rows(rows, t, drawn, mask_token_id=MASK, pad_token_id=PAD)
    assert torch.equal(got.input_ids[:, :T], want.noised_ids)
    assert torch.equal(got.labels, want.labels)
    assert torch.equal(got.maskable, want.maskable)
    padding = want.segment_ids == 0
    assert torch.equal(got.input_ids[:, T:], rows.input_ids.masked_fill(padding, PAD))
    assert torch.equal(got.visibility.segment, want.segment_ids.repeat(1, 2))
    place = torch.tensor([*range(9), *range(8), *range(5), 0, 0]).expand(6, -1).masked_fill(padding, 0)
    assert torch.equal(got.position_ids, place.repeat(1, 2))
    assert torch.allclose(got.weights * t, torch.ones_like(t))


@pytest.mark.parametrize("shift", [True, False])
def test_complementary_masks_make_each_token_a_target_exactly_once(shift):
    rows, blocks = clean(40, (9, 8, 5)), Blocks(4, complementary=True)
    fixed = torch.zeros_like(rows.input_ids, dtype=torch.bool)
    fixed[:, 11:13] = True
    t = spread_levels(deal_levels(0, 0, 40, 0.05), rows.segment_ids, blocks, t_min=0.05)
    got = by_blocks(rows._replace(fixed=fixed), range(40), t, blocks, logits_shift=shift, **DRAWN)
    first, second = got.input_ids[::2], got.input_ids[1::2]
    targets = (got.labels[::2] != IGNORE_INDEX).int() + (got.labels[1::2] != IGNORE_INDEX)
    assert torch.equal(targets, got.maskable[::2].int())
    assert got.maskable.any()
    assert torch.equal(first[:, T:], second[:, T:])
    for rows_of in (slice(0, None, 2), slice(1, None, 2)):
        is_target = got.labels[rows_of] != IGNORE_INDEX
        assert torch.equal(got.input_ids[rows_of, :T] == MASK, is_target)
        assert torch.equal(got.labels[rows_of][is_target], got.input_ids[rows_of, T:][is_target])
    level = torch.where(got.labels[::2] != IGNORE_INDEX, t, 1 - t)
    weight = torch.where(got.labels[::2] != IGNORE_INDEX, got.weights[::2], got.weights[1::2])
    assert torch.allclose((weight * level)[got.maskable[::2]], torch.tensor(0.5), rtol=1e-4)


def test_each_block_has_a_level_of_its_own_uniform_and_spread_over_the_row_and_the_step():
    rows, blocks = clean(50, (64, 30, 2), width=100), Blocks(4)
    row_levels = deal_levels(0, 5, 50, 0.1)
    t = spread_levels(row_levels, rows.segment_ids, blocks, t_min=0.1)
    starts = [*range(0, 64, 4), *range(64, 94, 4), 94, 96]  # the last is that of padding
    ends = [*starts[1:], 100]
    for start, end in zip(starts, ends, strict=True):
        assert (t[:, start:end] == t[:, start : start + 1]).all()
    per_block = t[:, starts]
    assert torch.allclose(per_block[:, 0], row_levels, atol=1e-6)
    for column in per_block.T:  # over the step: a grid of 50, shifted
        gaps = column.sort().values.diff()
        assert gaps.min() > 0.9 / 50 - 1e-5
        assert gaps.max() < 2 * 0.9 / 50 + 1e-5
    gaps = per_block.sort(dim=1).values.diff(dim=1)  # over a row: 27 levels with nowhere a large gap
    assert gaps.max() < 2.7 * 0.9 / 27
    pairs = spread_levels(row_levels, rows.segment_ids, Blocks(4, complementary=True), t_min=0.1)
    assert pairs.min() >= 0.1
    assert pairs.max() <= 0.9


@pytest.mark.parametrize(("complementary", "level"), [(False, 1.0), (True, 0.5)])
def test_blocks_of_one_token_have_one_level_which_weighs_each_token_once(complementary, level):
    got = by_blocks(clean(4), range(4), torch.full((4,), 0.3), Blocks(1, complementary))
    scored = got.labels != IGNORE_INDEX
    copies = 2 if complementary else 1
    total = (got.weights * scored).unflatten(0, (4, copies)).sum(dim=1)
    assert torch.equal(total, torch.tensor([0.0] + [1.0] * (T - 1)).expand(4, -1))
    assert (got.weights[scored] * level * copies == 1).all()


def test_the_clean_half_is_scored_where_something_may_be_masked():
    rows = clean(4, (9, 8, 5))
    for complementary, weight in ((False, 0.5), (True, 0.25)):
        got = by_blocks(rows, range(4), torch.full((4,), 0.3), Blocks(4, complementary, 0.5), strategies=(1, 0, 0))
        assert got.labels.shape == got.weights.shape == got.input_ids.shape
        assert torch.equal(got.labels[:, T:], got.input_ids[:, T:].masked_fill(~got.maskable, IGNORE_INDEX))
        assert (got.weights[:, T:] == weight).all()
    silent = by_blocks(rows, range(4), torch.full((4,), 0.3), Blocks(4, autoregressive_weight=0.0))
    assert silent.labels.shape == (4, T)
    real = silent.visibility.segment[:, T:] > 0
    assert torch.equal(silent.visibility.limit[:, T:][real], silent.position_ids[:, T:][real])  # causal all the same


def test_an_autoregressive_loss_makes_a_causal_context_a_fact_of_the_model(tiny_config):
    model = tiny_config(attention="block_causal", block_size=4)
    assert blocks_to_train(model) == Blocks(4)
    assert not model.causal_context
    assert blocks_to_train(model, complementary=True, autoregressive_weight=0.5) == Blocks(4, True, 0.5)
    assert model.causal_context
    assert blocks_to_train(model) == Blocks(4, autoregressive_weight=0.0)  # and it stays one without that loss
    unshifted = tiny_config(attention="block_causal", block_size=4, logits_shift=False)
    with pytest.raises(UserError, match="objective 'joint' needs a model with logits_shift true"):
        blocks_to_train(unshifted, autoregressive_weight=0.5)
