import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.polynomial import Polynomial

from CoDALanguageModel.attention_coda import doubled, places
from CoDALanguageModel.diffusion import (
    IGNORE_INDEX,
    corrupt,
    named_rng,
    scored_by,
    stratified_noise_levels,
)

MASK = 99
FROZEN = {  # a change here changes the noise of every run
    "noise": [0.0012986941553880804, 0.6740963431148544, 0.5855003908534957],
    "token": [0.24301283990061318, 0.19914339134881176],
    "x": [2386642726, 657050664],
}


def draw(num_rows, width, name="test", *indices):
    return torch.from_numpy(named_rng(name, *indices).random((num_rows, width), dtype=np.float32))


# ---- the forward process


@pytest.mark.parametrize("span", [1, 2, 4, 8, "mixed"])
def test_each_maskable_position_is_masked_with_probability_t(span):
    num_rows, seq_len, prompt, padding = 24_000, 14, 3, 2
    spans = torch.tensor([1, 2, 4, 8]).repeat(num_rows // 4) if span == "mixed" else span
    t = torch.tensor([0.02, 0.3, 0.5, 0.9]).repeat_interleave(num_rows // 4)[named_rng("order").permutation(num_rows)]
    maskable = torch.ones(num_rows, seq_len, dtype=torch.bool)
    maskable[: num_rows // 2, :prompt] = False  # half of the rows with a prompt, half without
    maskable[: num_rows // 2, -padding:] = False
    ids = torch.zeros(num_rows, seq_len, dtype=torch.long)
    masked = corrupt(ids, maskable, t, draw(num_rows, seq_len + 7, "marginals"), mask_token_id=MASK, span=spans).masked
    groups = [(t == level) & (maskable[:, 0] == first) for level in t.unique() for first in (True, False)]
    if span == "mixed":
        groups = [group & (spans == k) for group in groups for k in (1, 2, 4, 8)]
    for group in groups:
        level, count = t[group][0].item(), int(group.sum())
        frequency = masked[group].double().mean(dim=0)[maskable[group][0]]
        assert (frequency - level).abs().max() < 4 * (level * (1 - level) / count) ** 0.5


@pytest.mark.parametrize("span", [1, 2, 4, 8])
def test_only_maskable_positions_change_and_they_become_the_mask(span):
    ids = torch.arange(12).repeat(500, 1)
    maskable = draw(500, 12, "maskable") < 0.7
    result = corrupt(ids, maskable, torch.full((500,), 0.6), draw(500, 11 + span), mask_token_id=MASK, span=span)
    assert not (result.masked & ~maskable).any()
    assert torch.equal(result.noised_ids, ids.masked_fill(result.masked, MASK))
    assert 0 < result.masked.sum() < maskable.sum()


@pytest.mark.parametrize("span", [1, 2, 4])
def test_each_position_may_have_a_level_of_its_own(span):
    """At a border of levels too, where a run goes on with another probability."""
    num_rows, levels = 20_000, torch.tensor([0.1] * 3 + [0.9] * 4 + [0.4] * 5)
    ids, uniforms = torch.zeros(num_rows, 12).long(), draw(num_rows, 11 + span, "levels")
    masked = corrupt(ids, ids == 0, levels.expand(num_rows, -1), uniforms, mask_token_id=MASK, span=span).masked
    error = (masked.double().mean(dim=0) - levels).abs()
    assert (error < 4 * (levels * (1 - levels) / num_rows).sqrt()).all()
    row, place = (torch.full((num_rows,), 0.4), torch.full((num_rows, 12), 0.4))
    one, other = (corrupt(ids, ids == 0, t, uniforms, mask_token_id=MASK, span=span).masked for t in (row, place))
    assert torch.equal(one, other)


@pytest.mark.parametrize("span", [2, 4, 8])
def test_masked_runs_are_at_least_a_span_long_except_at_the_edges(span):
    masked = corrupt(
        torch.zeros(400, 40, dtype=torch.long),
        torch.ones(400, 40, dtype=torch.bool),
        torch.full((400,), 0.3),
        draw(400, 39 + span),
        mask_token_id=MASK,
        span=span,
    ).masked
    lengths = []
    for row in masked.tolist():
        start = 0
        for value, run in itertools.groupby(row):
            length = len(list(run))
            if value and start > 0 and start + length < len(row):
                lengths.append(length)
            start += length
    assert min(lengths) == span  # never shorter, and single runs occur
    assert max(lengths) > span  # runs overlap


def test_at_t_one_everything_is_masked_and_lower_levels_mask_a_subset():
    ids, maskable, uniforms = torch.zeros(3, 20).long(), torch.ones(3, 20).bool(), draw(3, 23)

    def masked(level):
        return corrupt(ids, maskable, torch.full((3,), level), uniforms, mask_token_id=MASK, span=4).masked

    assert masked(1.0).all()
    assert not (masked(0.2) & ~masked(0.6)).any()


@pytest.mark.parametrize("span", [1, 2, 8])
def test_low_noise_levels_are_exact_too(span):
    level = 1e-3
    start = -np.expm1(np.log1p(-float(np.float32(level))) / span)  # 1 - (1-t)^(1/k) without cancellation
    below, above = np.float32(start * (1 - 1e-5)), np.float32(start * (1 + 1e-5))
    for uniform, expected in ((below, True), (above, False)):
        uniforms = torch.ones(1, 9 + span)
        uniforms[0, -1] = float(uniform)
        ids = torch.zeros(1, 10).long()
        t = torch.tensor([level])
        assert bool(corrupt(ids, ids == 0, t, uniforms, mask_token_id=MASK, span=span).masked[0, -1]) is expected


def test_same_uniforms_same_draw_in_any_batch_and_with_wider_uniforms():
    ids, maskable = torch.arange(16).repeat(4, 1), draw(4, 16, "m") < 0.8
    t, spans, uniforms = torch.tensor([0.2, 0.5, 0.7, 0.9]), torch.tensor([1, 2, 4, 8]), draw(4, 23)
    together = corrupt(ids, maskable, t, uniforms, mask_token_id=MASK, span=spans)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = corrupt(ids, maskable[order], t[order], uniforms[order], mask_token_id=MASK, span=spans[order])
    assert torch.equal(shuffled.masked, together.masked[order])
    for b, span in enumerate(spans.tolist()):
        row = slice(b, b + 1)
        for width in (23, 16 + span - 1):  # a run may start up to span - 1 positions before the row
            alone = corrupt(ids[row], maskable[row], t[row], uniforms[row, 23 - width :], mask_token_id=MASK, span=span)
            assert torch.equal(alone.masked[0], together.masked[b])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"maskable": torch.ones(2, 5).bool()}, r"maskable must have the shape of input_ids \(2, 6\), got \(2, 5\)"),
        ({"t": torch.ones(3)}, r"t must have shape \(2,\) or \(2, 6\), got \(3,\)"),
        ({"span": 0}, r"span must be in \[1, 6\], got 0"),
        ({"span": 7}, r"span must be in \[1, 6\], got 7"),
        ({"span": torch.tensor([2, 9])}, r"span must be in \[1, 6\], got \[2, 9\]"),
        ({"span": 4}, r"uniforms must be at least \(2, 9\) for span 4, got \(2, 6\)"),
        ({"uniforms": torch.rand(6)}, r"uniforms must be at least \(2, 6\) for span 1, got \(6,\)"),
        ({"uniforms": torch.rand(1, 6)}, r"uniforms must be at least \(2, 6\) for span 1, got \(1, 6\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes, message):
    arguments = {
        "input_ids": torch.zeros(2, 6).long(),
        "maskable": torch.ones(2, 6).bool(),
        "t": torch.ones(2),
        "uniforms": torch.rand(2, 6),
    }
    with pytest.raises(ValueError, match=message):
        corrupt(**{**arguments, **changes}, mask_token_id=MASK)


# ---- which row scores which token


def test_padding_on_any_side_is_stepped_over_and_what_has_no_row_says_so():
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 1], [1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 0, 0]])
    want = [[-1, 0, 1, 2], [-1, -1, -1, 2], [-1, 0, -1, 1], [-1, -1, -1, 0], [-1, -1, -1, 1], [-1] * 4]
    assert scored_by(mask).tolist() == want
    assert scored_by(mask, shift=False).tolist() == [
        [i if m else -1 for i, m in enumerate(row)] for row in mask.tolist()
    ]


def test_no_segment_is_scored_from_another_with_or_without_a_mask():
    segments = torch.tensor([[1, 1, 1, 2, 3, 3, 0, 0]])
    assert scored_by(None, segments).tolist() == [[-1, 0, 1, -1, -1, 4, -1, -1]]
    assert torch.equal(scored_by(torch.ones_like(segments), segments), scored_by(None, segments))
    mask = torch.tensor([[0, 1, 1, 1, 1, 0, 1, 1]])
    assert scored_by(mask, segments).tolist() == [[-1, -1, 1, -1, -1, -1, -1, -1]]
    assert scored_by(None, segments, shift=False).tolist() == [[0, 1, 2, 3, 4, 5, -1, -1]]


def test_the_first_position_of_a_noisy_block_is_scored_by_the_clean_row_before_it():
    half = torch.tensor([[1, 1, 1, 1, 1, 2, 2, 0], [1] * 8])
    start = torch.tensor([[0, 0, 2, 2, 4, 0, 0, 0], [-1, 1, 1, 3, 3, 5, 5, 7]])
    rule = doubled(half, places(half), start)
    assert scored_by(None, rule.segment, doubled_group=rule.group).tolist() == [
        [-1, 0, 8 + 1, 2, 8 + 3, -1, 5, -1] + [-1, 8, 9, 10, 11, -1, 13, -1],
        [-1, 8, 1, 8 + 2, 3, 8 + 4, 5, 8 + 6] + [-1, *range(8, 15)],
    ]
    own = scored_by(None, rule.segment, shift=False, doubled_group=rule.group)
    assert own.tolist() == [[*range(7), -1, *range(8, 15), -1], [*range(16)]]


# ---- the objective


T_MIN, SEQ_LEN = 0.05, 4
SUBSETS = torch.tensor(list(itertools.product([False, True], repeat=SEQ_LEN)))  # (16, T)


@pytest.fixture(scope="module")
def tiny_vocabulary(make_model):
    """A model of 4 tokens and the mask, one text, and the summed cross-entropy of each set of masked positions."""
    model = make_model(
        vocab_size=5, num_token_ids=5, mask_token_id=4, pad_token_id=None, bos_token_id=None, eos_token_id=None
    )
    text = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        logits = model(text.masked_fill(SUBSETS, 4)).logits.roll(1, dims=1)  # position 0 is not scored
    nll = F.cross_entropy(logits.transpose(1, 2), text.expand(16, -1), reduction="none")
    scored = SUBSETS.clone()
    scored[:, 0] = False
    return model, text, (nll * scored).sum(dim=1).double().numpy()


def bound_densities(subset_nll):
    """For each non-empty set S of masked positions `P(S | t) / (t T)`, a polynomial in t, and its cross-entropy."""
    for subset, nll in zip(SUBSETS, subset_nll, strict=True):
        size = int(subset.sum())
        if size:
            yield Polynomial([0, 1]) ** (size - 1) * Polynomial([1, -1]) ** (SEQ_LEN - size) / SEQ_LEN, nll


def exact_bound(subset_nll):
    """The mean over t in [t_min, 1] of the expected loss, in closed form."""
    integrals = ((density.integ(), nll) for density, nll in bound_densities(subset_nll))
    return sum(nll * (integral(1.0) - integral(T_MIN)) for integral, nll in integrals) / (1 - T_MIN)


def batch_losses(subset_nll, levels, name):
    """Loss of each batch of noise levels (batches, rows), looked up in the table of subsets."""
    num_batches, num_rows = levels.shape
    ids = torch.zeros(levels.size, SEQ_LEN, dtype=torch.long)
    t = torch.from_numpy(levels.astype(np.float32).ravel())
    masked = corrupt(ids, ids == 0, t, draw(levels.size, SEQ_LEN, name), mask_token_id=4).masked
    index = (masked.long() * torch.tensor([8, 4, 2, 1])).sum(dim=1).numpy()
    return (subset_nll[index] / levels.ravel() / SEQ_LEN).reshape(num_batches, num_rows).mean(axis=1)


def stratified_levels(num_batches, num_rows):
    rows = [
        stratified_noise_levels(num_rows, named_rng("t", 0, step).random(), t_min=T_MIN) for step in range(num_batches)
    ]
    return np.stack(rows).astype(np.float64)


def test_the_monte_carlo_loss_equals_the_exactly_enumerated_bound(tiny_vocabulary):
    model, text, subset_nll = tiny_vocabulary
    bound = exact_bound(subset_nll)
    num_batches, num_rows = 200, 64
    losses = []
    for step, levels in enumerate(stratified_levels(num_batches, num_rows)):
        ids, t = text.expand(num_rows, -1), torch.from_numpy(levels).float()
        x = corrupt(ids, torch.ones_like(ids).bool(), t, draw(num_rows, SEQ_LEN, "noise", step), mask_token_id=4)
        labels = ids.masked_fill(~x.masked, IGNORE_INDEX)
        with torch.no_grad():
            losses.append(model(x.noised_ids, labels=labels, loss_weights=1 / t / ids.numel()).loss.item())
    standard_error = np.std(losses, ddof=1) / num_batches**0.5
    assert standard_error < 0.02 * bound
    assert abs(np.mean(losses) - bound) < 4 * standard_error


def test_stratified_levels_leave_the_loss_unbiased_and_lower_its_variance(tiny_vocabulary):
    _, _, subset_nll = tiny_vocabulary
    num_batches, num_rows = 4000, 16
    independent = named_rng("independent").uniform(T_MIN, 1, (num_batches, num_rows))
    stratified = stratified_levels(num_batches, num_rows)
    for name, levels in (("independent", independent), ("stratified", stratified)):
        losses = batch_losses(subset_nll, levels, name)
        assert abs(losses.mean() - exact_bound(subset_nll)) < 4 * losses.std() / num_batches**0.5
    # The variance of a batch is that of E[loss | t] plus that of the masks, which is the same for both.
    expected = sum(density * nll for density, nll in bound_densities(subset_nll))
    assert expected(stratified).mean(axis=1).var() < 0.2 * expected(independent).mean(axis=1).var()


def test_each_row_of_a_stratified_batch_is_uniform_and_the_batch_is_evenly_spread():
    num_rows, t_min = 8, 0.1
    offsets = (np.arange(1000) + 0.5) / 1000
    levels = np.stack([stratified_noise_levels(num_rows, offset, t_min=t_min) for offset in offsets])
    assert levels.dtype == np.float32
    want = t_min + (1 - t_min) * offsets  # the same grid for every row, in another order
    assert np.abs(np.sort(levels, axis=0) - want[:, None]).max() < 1e-6
    gaps = np.diff(np.sort(levels, axis=1), axis=1)
    assert np.abs(gaps - (1 - t_min) / num_rows).max() < 1e-6
    assert t_min <= levels.min() <= levels.max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0.5), "num_rows must be at least 1, got 0"),
        ((4, 1.0), r"offset must be in \[0, 1\), got 1.0"),
        ((4, -0.1), r"offset must be in \[0, 1\), got -0.1"),
        ((4, 0.5, 0.0), r"t_min must be in \(0, 1\), got 0.0"),
        ((4, 0.5, 1.0), r"t_min must be in \(0, 1\), got 1.0"),
    ],
)
def test_noise_levels_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        stratified_noise_levels(*arguments[:2], **({"t_min": arguments[2]} if len(arguments) == 3 else {}))


# ---- random streams


def test_named_streams_are_frozen():
    assert named_rng("noise", 0, 0, 0).random(3).tolist() == FROZEN["noise"]
    assert named_rng("token", 42, 7).random(2).tolist() == FROZEN["token"]
    assert named_rng("x").integers(0, 2**32, 2).tolist() == FROZEN["x"]


def test_streams_of_different_names_and_indices_are_independent():
    keys = [("a",), ("b",), ("a", 0), ("a", 1), ("a", 1, 0), ("a", 10), ("a", 0, 1), ("token", 3, 4), ("order", 3, 4)]
    draws = np.stack([named_rng(*key).random(20_000) for key in keys])
    correlation = np.corrcoef(draws) - np.eye(len(keys))
    assert np.abs(correlation).max() < 5 / 20_000**0.5
    assert len(np.unique(draws[:, 0])) == len(keys)


def test_a_stream_depends_on_its_name_alone_and_longer_draws_extend_shorter_ones():
    first = named_rng("a", 1, 2)
    first.random(5)
    assert np.array_equal(named_rng("a", 1, 2).random(9)[:4], named_rng("a", 1, 2).random(4))
    assert np.array_equal(named_rng("a", np.int64(1), 2).random(4), named_rng("a", 1, 2).random(4))


def test_negative_indices_are_refused():
    with pytest.raises(ValueError, match=r"must be >= 0, got \(3, -1\) for 'noise'"):
        named_rng("noise", 3, -1)
