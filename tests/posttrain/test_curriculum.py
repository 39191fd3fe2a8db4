"""What may be masked, when, and that it depends on nothing but the named seeds."""

import numpy as np
import pytest
import torch

from coda_posttrain import curriculum

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


def noise(batch: curriculum.Rows, share: float, t: float = 1.0, span: int = 1, **options) -> curriculum.NoisedRows:
    uniforms = curriculum.row_uniforms("noise", 0, batch.sample_ids.tolist(), 0, batch.input_ids.shape[1] + span - 1)
    return curriculum.noise_rows(
        batch, t=torch.full((2,), t), spans=torch.full((2,), span), uniforms=uniforms, share=share, mask_token_id=MASK,
        **options,
    )  # fmt: skip


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
    assert torch.equal(result.noised_ids[~batch.present], batch.input_ids[~batch.present])


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
    assert result.counted.tolist() == [10, 12]
    assert (noise(batch, share=1.0, score_tail=False).labels[batch.tail] == -100).all()


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


def test_noise_of_a_row_does_not_depend_on_its_neighbours_or_padding():
    together = curriculum.row_uniforms("noise", 1, [4, 9], 2, 40)
    alone = curriculum.row_uniforms("noise", 1, [9], 2, 60)
    assert torch.equal(together[1], alone[0, :40])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together[1], curriculum.row_uniforms("noise", 1, [9], 3, 40)[0])


def test_noise_levels_are_stratified_in_a_random_order():
    levels = curriculum.noise_levels("t", 0, 5, 50, 0.01)
    ordered = levels.sort().values
    assert torch.allclose(ordered.diff(), torch.tensor(0.99 / 50), atol=1e-5)
    assert not torch.equal(levels, ordered)
    assert 0.01 <= float(ordered[0])
    assert float(ordered[-1]) <= 1.0


def test_spans_are_drawn_with_their_probability_from_all_lengths():
    spans = curriculum.row_spans(0, range(4000), 1, 0.25, (4, 8, 16, 32))
    assert abs(float((spans > 1).float().mean()) - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 4000)
    assert set(spans.tolist()) == {1, 4, 8, 16, 32}
    assert set(curriculum.row_spans(0, range(100), 1, 0.0, (4,)).tolist()) == {1}
    assert set(curriculum.row_spans(0, range(100), 1, 1.0, (4,)).tolist()) == {4}


def test_span_longer_than_a_row_is_shortened():
    result = noise(rows(), share=1.0, t=0.5, span=23)
    assert result.noised_ids.shape == (2, 24)


def test_lists_are_indexed_by_epoch_and_repeated():
    assert [curriculum.epoch_value((1, 2, 3), epoch) for epoch in range(5)] == [1, 2, 3, 1, 2]
