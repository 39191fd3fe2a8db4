"""Rows noised for a step: the draws depend on seed and sample alone, and each position is masked with probability t."""

import hashlib

import numpy as np
import pytest
import torch

from CoDALanguageModel.diffusion import IGNORE_INDEX
from CoDALanguageModel.noise import CleanRows, deal_levels, draw_rows, noise_rows

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
