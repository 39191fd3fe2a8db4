"""What may be masked, when, and that it depends on nothing but the named seeds."""

import numpy as np
import pytest
import torch

from coda_posttrain import curriculum
from coda_pretrain.data.mixture import Sample
from coda_pretrain.noise.masking import TokenFacts, noise_samples, noise_samples_by_blocks
from coda_pretrain.noise.strategies import MaskingProbabilities
from CoDALanguageModel.noise import Blocks

MASK, PAD, END = 99, 0, 7


def rows(width: int = 24, tail_tokens: int = 0) -> curriculum.Rows:
    """Two rows: one turn with padding; two turns (prompt, answer, prompt, answer) without."""
    input_ids = torch.arange(2 * width).reshape(2, width) % 50 + 10
    present = torch.ones(2, width, dtype=torch.bool)
    present[0, 16:] = False
    prompt = torch.zeros(2, width, dtype=torch.bool)
    prompt[0, :6] = True
    prompt[1, :6] = prompt[1, 12:18] = True
    grown_ids, grown, tail = curriculum.add_tail(
        input_ids, present, complete=torch.tensor([True, True]), num_tokens=tail_tokens, tail_token_id=END,
        max_length=width + tail_tokens,
    )  # fmt: skip
    prompt = torch.nn.functional.pad(prompt, (0, grown_ids.shape[1] - width))
    return curriculum.Rows(grown_ids, grown, prompt, tail, torch.tensor([3, 5]))


def noise(batch: curriculum.Rows, share: float, t: float = 1.0, span: int = 1):
    return curriculum.noise(
        batch, torch.full((2,), t), share=share, seed=0, sample_ids=batch.sample_ids.tolist(), span_probability=1.0,
        span_lengths=[span], t_min=0.001, mask_token_id=MASK, pad_token_id=PAD,
    )  # fmt: skip


def test_both_trainers_mask_the_same_sample_in_the_same_way():
    strategies, t, sample_ids = MaskingProbabilities(0, 0, 0.5), torch.tensor([0.3, 0.8, 0.5, 0.6]), [0, 3, 17, 9]
    ids, ones = torch.arange(96).reshape(4, 24) % 50 + 10, np.ones(24, dtype=np.int32)
    samples = [Sample(row.numpy(), ones) for row in ids]
    packed = noise_samples(
        samples, sample_ids, t, seed=5, strategies=strategies, span_lengths=(2, 4), tokens=TokenFacts(MASK, PAD)
    )
    everything, nothing = torch.ones(4, 24, dtype=torch.bool), torch.zeros(4, 24, dtype=torch.bool)
    batch = curriculum.Rows(ids, everything, nothing, nothing, torch.tensor(sample_ids))
    spans = {"span_probability": 0.5, "span_lengths": (2, 4), "t_min": 0.001}
    tuned = curriculum.noise(
        batch, t, share=1.0, seed=5, sample_ids=sample_ids, **spans, mask_token_id=MASK, pad_token_id=PAD
    )
    assert (packed.labels != -100).any()
    for one, other in zip(packed, tuned, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("blocks", [Blocks(4), Blocks(4, True), Blocks(5, True, 0.5)])
def test_both_trainers_noise_the_same_sample_by_blocks_in_the_same_way(blocks):
    strategies, t, sample_ids = MaskingProbabilities(0, 0, 0.5), torch.tensor([0.3, 0.8, 0.5, 0.6]), [0, 3, 17, 9]
    ids, ones = torch.arange(96).reshape(4, 24) % 50 + 10, np.ones(24, dtype=np.int32)
    common = {"seed": 5, "span_lengths": (2, 4), "blocks": blocks, "t_min": 0.01}
    packed = noise_samples_by_blocks(
        [Sample(row.numpy(), ones) for row in ids], sample_ids, t, strategies=strategies, tokens=TokenFacts(MASK, PAD),
        **common,
    )  # fmt: skip
    everything, nothing = torch.ones(4, 24, dtype=torch.bool), torch.zeros(4, 24, dtype=torch.bool)
    batch = curriculum.Rows(ids, everything, nothing, nothing, torch.tensor(sample_ids))
    tuned = curriculum.noise(
        batch, t, share=1.0, sample_ids=sample_ids, span_probability=0.5, mask_token_id=MASK, pad_token_id=PAD, **common
    )
    assert (packed.labels != -100).any()
    for one, other in zip((*packed.visibility, *packed), (*tuned.visibility, *tuned), strict=True):
        assert isinstance(one, tuple) or torch.equal(one, other)


def test_blocks_can_begin_at_the_last_answer():
    assert curriculum.last_answer(rows()).tolist() == [[6], [18]]


def test_conditioned_share_grows_linearly_over_the_annealing_epochs():
    shares = [curriculum.conditioned_share(done, 1.0) for done in (0.0, 0.25, 0.5, 1.0, 7.0)]
    assert shares == [0.0, 0.25, 0.5, 1.0, 1.0]
    assert curriculum.conditioned_share(0.0, 0.0) == 1.0


@pytest.mark.parametrize(("share", "kept"), [(0.0, (0, 0)), (0.5, (3, 6)), (1.0, (6, 12))])
def test_conditioned_positions_are_the_first_of_all_turns(share, kept):
    prompt = rows().prompt_mask
    conditioned = curriculum.conditioned_positions(prompt, share)
    assert conditioned.sum(dim=1).tolist() == list(kept)
    assert not (conditioned & ~prompt).any()
    for row in range(2):
        places, ranked = conditioned[row].nonzero().flatten(), prompt[row].nonzero().flatten()
        assert torch.equal(places, ranked[: kept[row]])


def test_floor_is_not_fooled_by_rounding():
    prompt = torch.ones(1, 100, dtype=torch.bool)
    assert curriculum.conditioned_positions(prompt, 0.29).sum() == 29


def test_everything_but_the_first_token_is_masked_before_annealing():
    result = noise(rows(), share=0.0)
    assert (result.labels[0] != -100).tolist() == [False] + [True] * 15 + [False] * 8


def test_prompt_is_never_noised_after_annealing():
    batch = rows()
    for span in (1, 4):
        result = noise(batch, share=1.0, span=span)
        assert torch.equal(result.noised_ids[batch.prompt_mask], batch.input_ids[batch.prompt_mask])
        assert (result.labels[batch.prompt_mask] == -100).all()
        assert (result.labels[~batch.prompt_mask & batch.present] != -100).all()


def test_padding_is_never_a_target():
    batch = rows(tail_tokens=0)
    result = noise(batch, share=0.0)
    assert (result.labels[~batch.present] == -100).all()
    assert (result.noised_ids[~batch.present] == PAD).all()


def test_labels_are_the_clean_tokens_where_masked():
    batch = rows()
    result = noise(batch, share=1.0, t=0.5)
    masked = result.noised_ids == MASK
    assert masked.any()
    assert torch.equal(masked, result.labels != -100)
    assert torch.equal(result.labels[masked], batch.input_ids[masked])


def test_tail_is_learned_but_not_counted():
    batch = rows(tail_tokens=8)
    assert batch.tail.sum(dim=1).tolist() == [8, 8]
    assert (batch.input_ids[batch.tail] == END).all()
    result = noise(batch, share=1.0)
    assert (result.labels[batch.tail] == END).all()
    assert (result.maskable & ~batch.tail).sum(dim=1).tolist() == [10, 12]


def test_tail_stops_at_the_longest_length_and_skips_cut_rows():
    ids, present = torch.ones(3, 8, dtype=torch.int64), torch.ones(3, 8, dtype=torch.bool)
    present[1, 4:] = False
    _, grown, tail = curriculum.add_tail(
        ids, present, complete=torch.tensor([True, True, False]), num_tokens=9, tail_token_id=END, max_length=10
    )
    assert grown.sum(dim=1).tolist() == [10, 10, 8]
    assert tail.sum(dim=1).tolist() == [2, 6, 0]


def test_tail_length_is_uniform_and_named_by_seed_and_step():
    lengths = [curriculum.tail_length(0, step, 10) for step in range(3000)]
    assert lengths == [curriculum.tail_length(0, step, 10) for step in range(3000)]
    counts = np.bincount(lengths, minlength=11)
    assert len(counts) == 11
    assert abs(counts - 3000 / 11).max() < 5 * np.sqrt(3000 / 11)


def test_lists_are_indexed_by_epoch_and_repeated():
    assert [curriculum.epoch_value((1, 2, 3), epoch) for epoch in range(5)] == [1, 2, 3, 1, 2]
