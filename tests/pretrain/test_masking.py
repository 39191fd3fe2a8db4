import numpy as np
import pytest

from coda_pretrain.data.mixture import Sample
from coda_pretrain.noise.masking import TokenFacts, noise_samples
from coda_pretrain.noise.strategies import MaskingConfig, MaskingProbabilities
from coda_pretrain.train.batches import batch_of
from CoDALanguageModel.diffusion import named_rng
from CoDALanguageModel.noise import deal_levels, plan_row

MASK, PAD, T = 299, 0, 32
TABLE_3 = ((0.01, 0.01, 0.05), (0.05, 0.05, 0.10), (0.10, 0.10, 0.15), (0.15, 0.15, 0.20), (0.20, 0.20, 0.25))


def sample_of(number, seq_len=T, lengths=None):
    """A row of documents with the given lengths, padding after them; one document by default."""
    lengths = lengths or [seq_len]
    segment_ids = np.zeros(seq_len, dtype=np.int32)
    segment_ids[: sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    input_ids = 1 + (np.arange(seq_len, dtype=np.int32) * 7 + number) % 250
    return Sample(input_ids, segment_ids)


def noise(num_rows, config, *, rows=None, seed=0, step=0, progress=0.0, epoch=0, sample=sample_of, first_id=0):
    rows = range(num_rows) if rows is None else rows
    ids = [first_id + row for row in rows]
    t = deal_levels(seed, step, num_rows, config.t_min)[list(rows)]
    noised = noise_samples(
        [sample(i) for i in ids],
        ids,
        t,
        seed=seed,
        strategies=config.at(progress, epoch),
        span_lengths=config.span_lengths,
        tokens=TokenFacts(MASK, PAD),
    )
    return batch_of(noised, t, global_batch_size=num_rows)


def test_shapes_dtypes_labels_and_weights():
    batch = noise(6, MaskingConfig())
    for name in ("noised_ids", "labels", "position_ids", "segment_ids"):
        assert batch[name].shape == (6, T)
        assert batch[name].dtype == np.int64
    clean = np.stack([sample_of(i).input_ids for i in range(6)])
    masked = batch["labels"] != -100
    assert (batch["noised_ids"][masked] == MASK).all()
    assert (batch["noised_ids"][~masked] == clean[~masked]).all()
    assert (batch["labels"][masked] == clean[masked]).all()
    assert batch["t"].dtype == batch["loss_weights"].dtype == np.float32
    np.testing.assert_allclose(batch["loss_weights"], 1 / (batch["t"] * 6 * T), rtol=1e-6)


def test_segment_starts_and_padding_are_never_masked_and_positions_restart():
    def sample(number):
        return sample_of(number, lengths=[5, 1, 12, 9])

    masked_ever = np.zeros(T, dtype=bool)
    for step in range(40):
        batch = noise(16, MaskingConfig(span_probability=0.5), step=step, first_id=16 * step, sample=sample)
        masked_ever |= (batch["labels"] != -100).any(axis=0)
        assert (batch["noised_ids"][:, 27:] == PAD).all()
    assert set(np.flatnonzero(~masked_ever)) == {0, 5, 6, 18, *range(27, T)}
    assert batch["position_ids"][0].tolist() == [*range(5), 0, *range(12), *range(9), *[0] * 5]


@pytest.mark.parametrize("span", [1, 2, 4, 8])
def test_each_maskable_position_is_masked_with_probability_t(span):
    """Also at the ends of the row, beside a segment start and beside padding, when all rows have spans."""
    config = MaskingConfig(span_probability=1.0, span_lengths=(span,))
    hits, expected, variance = np.zeros(T), 0.0, 0.0
    for step in range(10):
        batch = noise(800, config, step=step, first_id=800 * step, sample=lambda i: sample_of(i, lengths=[11, 10, 9]))
        hits += (batch["labels"] != -100).sum(axis=0)
        t = batch["t"].astype(np.float64)
        expected += t.sum()
        variance += (t * (1 - t)).sum()
    maskable = [i for i in range(30) if i not in (0, 11, 21)]
    assert (np.abs(hits[maskable] - expected) < 4.5 * np.sqrt(variance)).all()


def test_the_loss_weight_is_unbiased_with_every_strategy_on():
    """Equation 6: the expectation of masked / t is 1 at a maskable position, so the weights sum to the real tokens."""
    config = MaskingConfig(prefix_probability=0.3, truncate_probability=0.3, span_probability=0.5)
    ratios = []
    for step in range(30):
        batch = noise(256, config, step=step, first_id=256 * step)
        masked = batch["labels"] != -100
        plans = [
            plan_row(named_rng("noise", 0, 256 * step + row), T, T, config.at(0, 0), config.span_lengths)
            for row in range(256)
        ]
        maskable = sum(min(p.kept_length, T) - max(p.prefix_length, 1) for p in plans)
        ratios.append((masked * batch["loss_weights"][:, None] * 256 * T).sum() / maskable)
    assert abs(np.mean(ratios) - 1) < 4.5 * np.std(ratios) / np.sqrt(len(ratios))
    assert np.std(ratios) < 0.15


def test_strategies_are_applied_to_their_share_of_the_rows_and_s1_s2_exclude_each_other():
    probabilities = MaskingProbabilities(prefix=0.15, truncate=0.2, span=0.25)
    plans = [plan_row(named_rng("noise", 3, i), T, T, probabilities, (2, 4, 8)) for i in range(20_000)]
    prefix = np.array([plan.prefix_length > 0 for plan in plans])
    truncated = np.array([plan.kept_length < T for plan in plans])
    spans = np.array([plan.span for plan in plans])
    for share, expected in ((prefix, 0.15), (truncated, 0.2), (spans > 1, 0.25), (spans == 8, 0.25 / 3)):
        assert abs(share.mean() - expected) < 4.5 * np.sqrt(expected * (1 - expected) / len(plans))
    assert not (prefix & truncated).any()
    assert {plan.prefix_length for plan in plans} == set(range(T))
    assert {plan.kept_length for plan in plans} == set(range(2, T + 1))
    assert abs((spans[prefix] > 1).mean() - 0.25) < 0.05  # S3 is independent of S1


def test_s1_leaves_a_prefix_clean_and_s2_pads_a_suffix():
    prefixed = noise(64, MaskingConfig(prefix_probability=1.0))
    truncated = noise(64, MaskingConfig(truncate_probability=1.0))
    for row in range(64):
        plan = plan_row(named_rng("noise", 0, row), T, T, MaskingProbabilities(1, 0, 0), (2, 4, 8))
        assert (prefixed["labels"][row, : plan.prefix_length] == -100).all()
        assert (prefixed["segment_ids"][row] == 1).all()
        plan = plan_row(named_rng("noise", 0, row), T, T, MaskingProbabilities(0, 1, 0), (2, 4, 8))
        assert (truncated["segment_ids"][row, plan.kept_length :] == 0).all()
        assert (truncated["segment_ids"][row, : plan.kept_length] == 1).all()
        assert (truncated["noised_ids"][row, plan.kept_length :] == PAD).all()
        assert (truncated["labels"][row, plan.kept_length :] == -100).all()


def test_rows_too_short_for_a_prefix_or_a_cut_stay_whole():
    plan = plan_row(named_rng("noise", 0, 0), 2, T, MaskingProbabilities(0.5, 0.5, 0.0), (2,))
    assert plan == (0, T, 1)


def test_levels_are_stratified_over_the_global_batch_and_dealt_to_hosts_at_random():
    levels = deal_levels(5, 9, 64, 1e-3).numpy()
    assert np.array_equal(np.sort(np.floor((levels - 1e-3) / (1 - 1e-3) * 64 * 0.999999)), np.arange(64))
    halves = [levels[:32].mean(), levels[32:].mean()]
    assert abs(halves[0] - halves[1]) < 0.3
    assert not np.array_equal(levels, deal_levels(5, 10, 64, 1e-3).numpy())


@pytest.mark.parametrize("num_processes", [2, 4])
def test_processes_draw_the_rows_of_the_global_batch(num_processes):
    config = MaskingConfig(prefix_probability=0.2, truncate_probability=0.2, span_probability=0.5)
    whole = noise(16, config, step=3)
    size = 16 // num_processes
    parts = [noise(16, config, step=3, rows=range(p * size, (p + 1) * size)) for p in range(num_processes)]
    for name, array in whole.items():
        assert np.array_equal(array, np.concatenate([part[name] for part in parts])), name


def test_the_same_seed_repeats_and_another_seed_or_sample_does_not():
    first, again = noise(8, MaskingConfig()), noise(8, MaskingConfig())
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["labels"], noise(8, MaskingConfig(), seed=1)["labels"])
    assert not np.array_equal(first["labels"] == -100, noise(8, MaskingConfig(), first_id=8)["labels"] == -100)


def test_a_strategy_does_not_change_what_the_tokens_of_other_rows_draw():
    plain = noise(64, MaskingConfig())
    some = noise(64, MaskingConfig(truncate_probability=0.3))
    untouched = (some["segment_ids"] > 0).all(axis=1)
    assert 0.4 < untouched.mean() < 1
    assert np.array_equal(plain["labels"][untouched], some["labels"][untouched])


@pytest.mark.parametrize("epoch", range(5))
def test_the_probabilities_of_table_3_are_reached_in_each_epoch(epoch):
    config = MaskingConfig(schedule="per_epoch", per_epoch=TABLE_3)
    probabilities = config.at(0.0, epoch)
    plans = [plan_row(named_rng("noise", 1, epoch, i), T, T, probabilities, (2, 4, 8)) for i in range(8000)]
    shares = (
        np.mean([plan.prefix_length > 0 for plan in plans]),
        np.mean([plan.kept_length < T for plan in plans]),
        np.mean([plan.span > 1 for plan in plans]),
    )
    for share, expected in zip(shares, TABLE_3[epoch], strict=True):
        assert abs(share - expected) < 4.5 * np.sqrt(expected * (1 - expected) / len(plans))


def test_samples_ids_and_levels_that_are_not_equally_many_are_refused():
    with pytest.raises(ValueError, match="samples, sample_ids and t must be equally many, got 1, 2, 2"):
        noise_samples(
            [sample_of(0)],
            [0, 1],
            deal_levels(0, 0, 2, 1e-3),
            seed=0,
            strategies=MaskingProbabilities(0, 0, 0),
            span_lengths=(1,),
            tokens=TokenFacts(MASK, PAD),
        )
