import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from CoDALanguageModel.diffusion import named_rng
from CoDALanguageModel.sampling import (
    ALGORITHMS,
    MOST_STEPS,
    choose,
    commit_counts,
    filter_scores,
    kept_tokens,
    order_scores,
    plan_commits,
    propose,
    row_uniforms,
)

EPS = 1e-3


def random_logits(num_rows, vocab_size, seed=0, scale=3.0):
    return scale * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed))


# ---- the schedule


def published_counts(num_masked, steps, eps):
    """The published sampler's counts for one row, as it computes them: float32 times, tensor arithmetic, int()."""
    timesteps = torch.linspace(1, eps, steps + 1)
    mask_index = torch.ones(1, num_masked, dtype=torch.bool)
    counts = []
    for i in range(steps):
        t, s = timesteps[i], timesteps[i + 1]
        num_mask_token = mask_index.sum() / mask_index.shape[0]
        counts.append(int(num_mask_token * (1 - s / t)) if i < steps - 1 else int(num_mask_token))
        mask_index = mask_index[:, counts[-1] :]
    return tuple(counts)


@pytest.mark.parametrize("eps", [1e-3, 1e-2, 1e-5])
def test_counts_are_those_of_the_published_schedule(eps):
    for steps in (1, 2, 3, 5, 8, 16, 33, 64, 128):
        for num_masked in (1, 2, 7, 16, 31, 32, 33, 64, 100, 128):
            assert commit_counts(num_masked, steps, eps) == published_counts(num_masked, steps, eps)


def test_one_token_a_step_of_the_published_table_commits_all_768():
    counts = commit_counts(768, 768, EPS)
    assert sum(counts) == 768
    assert max(counts[:-1]) == 1


@pytest.mark.parametrize("alg", ALGORITHMS)
def test_a_plan_commits_in_every_forward_and_fills_each_block(alg):
    for num_masked in (1, 5, 12, 33):
        for block_length in (None, 1, 4, 12, 50):
            num_blocks = math.ceil(num_masked / (block_length or num_masked))
            for steps in (num_blocks, num_blocks + 3, 64):
                plan = plan_commits(num_masked, steps=steps, block_length=block_length, eps=EPS, alg=alg)
                assert [commit.step for commit in plan] == sorted({commit.step for commit in plan})
                assert plan[-1].step < steps
                assert [commit.block for commit in plan] == sorted(commit.block for commit in plan)
                for block in range(num_blocks):
                    counts = [commit.count for commit in plan if commit.block == block]
                    size = min(block_length or num_masked, num_masked - block * (block_length or 0))
                    gains = np.diff([0, *counts]) if alg == "p2" else np.array(counts)
                    assert gains.min() >= 1
                    assert gains.sum() == size


def test_steps_are_shared_evenly_between_blocks_the_first_getting_more():
    plan = plan_commits(12, steps=14, block_length=4, eps=EPS, alg="origin")
    shares = (5, 5, 4)
    want, first = [], 0
    for block, share in enumerate(shares):
        counts = published_counts(4, share, EPS)
        want += [(first + i, block, count) for i, count in enumerate(counts) if count]
        first += share
    assert [tuple(commit) for commit in plan] == want


def test_p2_keeps_the_share_of_the_steps_done_in_exact_integers():
    for size in (1, 3, 10, 49):
        for steps in (1, 3, 7, 49, 60):
            plan = plan_commits(size, steps=steps, block_length=None, eps=EPS, alg="p2")
            kept = {i: size - math.floor(size * (1 - Fraction(i + 1, steps))) for i in range(steps)}
            want = [(i, kept[i]) for i in range(steps) if kept[i] > kept.get(i - 1, 0)]
            assert [(commit.step, commit.count) for commit in plan] == want


@pytest.mark.parametrize("alg", ALGORITHMS)
def test_a_plan_costs_no_more_for_more_steps_and_commits_one_token_a_step(alg):
    for num_masked, block_length in ((8, None), (600, None), (70, 32)):
        options = {"block_length": block_length, "eps": EPS, "alg": alg}
        enough = plan_commits(num_masked, steps=3 * max(num_masked, MOST_STEPS), **options)
        for steps in (10**6, 2**62, 10**30):
            assert plan_commits(num_masked, steps=steps, **options) == enough
        length = block_length or num_masked  # one step a token
        published = plan_commits(num_masked, steps=length * math.ceil(num_masked / length), **options)
        assert [(c.block, c.count) for c in enough] == [(c.block, c.count) for c in published]


def test_plans_that_are_kept_are_few():
    for function in (commit_counts, plan_commits):
        assert function.cache_info().maxsize <= 64


def test_more_blocks_than_steps_are_refused():
    with pytest.raises(ValueError, match="12 masked tokens in blocks of block_length=4 are 3 blocks, got steps=2"):
        plan_commits(12, steps=2, block_length=4, eps=EPS, alg="entropy")
    assert plan_commits(0, steps=2, block_length=4, eps=EPS, alg="entropy") == ()


# ---- nucleus and top k


def sorted_filter(row, top_p, top_k):
    """Textbook filter of one row of scores: a full sort in float64; ties with the last token kept are kept."""
    order = sorted(range(len(row)), key=lambda i: -row[i])
    weights = [math.exp(row[i] - row[order[0]]) for i in order]
    total, before, kept = sum(weights), 0.0, 0
    for weight in weights:
        if top_p is not None and top_p < 1 and before / total > top_p:
            break
        before, kept = before + weight, kept + 1
    kept = min(kept, top_k or kept)
    return {i for i in range(len(row)) if row[i] >= row[order[kept - 1]]}


@pytest.mark.parametrize("top_p", [None, 1e-9, 0.3, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("top_k", [None, 1, 7, 5000])
def test_filters_keep_what_a_full_sort_keeps(top_p, top_k):
    logits = torch.cat([random_logits(4, 3000), random_logits(4, 3000, scale=0.1)])  # peaked and flat rows
    logits[:, 5] = -torch.inf
    logits[:, 17] = logits[:, 40]
    filtered = filter_scores(logits, top_p=top_p, top_k=top_k)
    for row, out in zip(logits.tolist(), filtered, strict=True):
        kept = set((out > -torch.inf).nonzero().flatten().tolist())
        assert kept == sorted_filter(row, top_p, top_k) - {5}
        assert all(out[i] == row[i] for i in kept)


def test_ties_with_the_last_token_kept_are_kept_whatever_their_ids():
    scores = torch.tensor([[1.0, 3.0, 1.0, 2.0, 1.0]])
    assert (filter_scores(scores, top_p=None, top_k=3) > -torch.inf).tolist() == [[True] * 5]
    assert (filter_scores(scores, top_p=None, top_k=2) > -torch.inf).tolist() == [[False, True, False, True, False]]


def test_a_row_is_filtered_alike_whatever_the_other_rows_need():
    flat, peaked = torch.zeros(1, 3000), random_logits(1, 3000, scale=8.0)
    alone = filter_scores(peaked, top_p=0.9, top_k=None)
    assert torch.equal(filter_scores(torch.cat([flat, peaked]), top_p=0.9, top_k=None)[1:], alone)


@pytest.mark.parametrize(("top_p", "top_k"), [(0.9, None), (None, 7), (0.5, 40), (0.999, 5000)])
def test_the_kept_tokens_alone_are_those_that_the_filter_leaves(top_p, top_k):
    scores = torch.cat([random_logits(4, 3000), torch.zeros(1, 3000)])  # the last row keeps ties by the thousand
    ids, kept = kept_tokens(scores, top_p=top_p, top_k=top_k)
    whole = torch.full((5, 3001), -torch.inf).scatter(1, ids, kept)
    assert torch.equal(whole[:, :3000], filter_scores(scores, top_p=top_p, top_k=top_k))
    assert bool((ids.diff(dim=1) >= 0).all())


# ---- candidates


def test_temperature_zero_takes_the_most_probable_token():
    logits = random_logits(6, 50)
    assert torch.equal(propose(logits, alg="entropy").tokens, logits.argmax(dim=1))


@pytest.mark.parametrize("alg", ALGORITHMS)
def test_a_row_is_proposed_alike_whatever_the_other_rows_need(alg):
    flat, peaked = torch.zeros(1, 3000), random_logits(1, 3000, scale=8.0)
    options = {"alg": alg, "temperature": 0.7, "top_p": 0.9, "with_margin": True}
    uniforms = torch.tensor([0.3, 0.8], dtype=torch.float64)
    both = propose(torch.cat([flat, peaked]), uniforms=uniforms, **options)
    for values, alone in zip(both, propose(peaked, uniforms=uniforms[1:], **options), strict=True):
        assert (values is None and alone is None) or torch.equal(values[1:], alone)


@pytest.mark.parametrize("vocab_size", [5, 151_936])
def test_tokens_are_drawn_from_the_tempered_and_filtered_distribution(vocab_size):
    num_draws = 4000 if vocab_size < 100 else 64
    row = random_logits(1, vocab_size, scale=1.0)
    logits = row.expand(num_draws, -1)
    uniforms = torch.from_numpy(named_rng("u").random(num_draws))
    tokens = propose(logits, alg="entropy", temperature=0.7, top_p=0.8, uniforms=uniforms).tokens
    kept = sorted_filter((row[0] / 0.7).tolist(), 0.8, None)
    weights = {i: math.exp(row[0, i].item() / 0.7) for i in sorted(kept)}
    total, cdf = sum(weights.values()), 0.0
    bounds = {}
    for i, weight in weights.items():  # the inverse of the cumulative distribution, in the order of the ids
        bounds[i] = (cdf, cdf := cdf + weight / total)
    for token, u in zip(tokens.tolist(), uniforms.tolist(), strict=True):
        low, high = bounds[token]
        assert low - 1e-6 <= u <= high + 1e-6
    if vocab_size < 100:
        frequency = tokens.bincount(minlength=vocab_size).double() / num_draws
        for i, (low, high) in bounds.items():
            share = high - low
            assert abs(frequency[i] - share) <= 4 * (share * (1 - share) / num_draws) ** 0.5
        assert set(tokens.tolist()) == kept


def test_forbidden_ids_are_not_drawn_even_at_the_ends_of_the_unit_interval():
    logits = torch.zeros(2, 6)
    logits[:, [0, 5]] = -torch.inf
    tokens = propose(
        logits, alg="origin", temperature=1.0, uniforms=torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64)
    ).tokens
    assert tokens.tolist() == [1, 4]


def test_confidence_of_each_algorithm():
    logits = random_logits(5, 30)
    logits[:, 3] = -torch.inf
    scaled = logits / 0.5
    uniforms = torch.full((5,), 0.35, dtype=torch.float64)
    probabilities = scaled.double().softmax(dim=1)

    def confidence(alg, **arguments):
        return propose(logits, alg=alg, temperature=0.5, uniforms=uniforms, **arguments)

    drawn = confidence("maskgit_plus")
    assert torch.allclose(drawn.confidence.double(), probabilities[range(5), drawn.tokens], atol=1e-6)
    best = probabilities.sort(dim=1, descending=True).values
    assert torch.allclose(confidence("topk_margin").confidence.double(), best[:, 0] - best[:, 1], atol=1e-6)
    plogp = torch.where(probabilities > 0, probabilities * probabilities.clamp(min=1e-300).log(), 0)
    assert torch.allclose(confidence("entropy").confidence.double(), plogp.sum(dim=1), atol=1e-5)
    present = torch.tensor([-1, 7, -1, 9, 3])
    p2 = confidence("p2", present=present)
    assert p2.tokens.tolist() == [drawn.tokens[0], 7, drawn.tokens[2], 9, 3]
    assert torch.allclose(p2.confidence.double(), probabilities[range(5), p2.tokens], atol=1e-6)


@pytest.mark.parametrize("filters", [{"temperature": 0.01}, {"top_k": 1}, {"top_p": 0.01}, {"temperature": 3.0}])
def test_certainty_is_that_of_the_model_without_temperature_and_filters(filters):
    logits = random_logits(5, 9)
    uniforms = torch.rand(5, generator=torch.Generator().manual_seed(1))
    found = propose(logits, alg="maskgit_plus", uniforms=uniforms, with_certainty=True, **filters)
    own = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(found.probability, own.log_prob(found.tokens).exp())
    torch.testing.assert_close(found.entropy, own.entropy())


def test_a_temperature_needs_uniforms():
    with pytest.raises(ValueError, match="uniforms are needed with temperature 0.5"):
        propose(torch.zeros(1, 4), alg="entropy", temperature=0.5)


@pytest.mark.parametrize("alg", ALGORITHMS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_scores_that_are_not_finite_are_an_error(alg, value):
    logits = torch.zeros(2, 4)
    logits[1, 2] = value
    with pytest.raises(ValueError, match="scores that are not finite"):
        propose(logits, alg=alg)


# ---- the choice of positions


def test_the_best_positions_are_chosen_and_ties_go_to_the_left():
    scores = torch.tensor([[1.0, 3.0, 3.0, -torch.inf, 2.0], [0.0, 0.0, 0.0, 0.0, -torch.inf]])
    assert choose(scores, torch.tensor([2, 3])).int().tolist() == [[0, 1, 1, 0, 0], [1, 1, 1, 0, 0]]
    assert choose(scores, torch.tensor([1, 0])).int().tolist() == [[0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert choose(scores, torch.tensor([5, 5])).int().tolist() == [[1, 1, 1, 0, 1], [1, 1, 1, 1, 0]]


def test_origin_ranks_at_random_and_no_temperature_by_confidence():
    confidence, uniforms = torch.tensor([0.1, 0.9, 0.5]), torch.tensor([0.3, 0.2, 0.1], dtype=torch.float64)
    assert order_scores(confidence, "origin", None, uniforms).argsort(descending=True).tolist() == [0, 1, 2]
    for alg_temp in (None, 0.0):
        assert torch.equal(order_scores(confidence, "entropy", alg_temp, None), confidence)


def test_alg_temp_draws_positions_from_the_softmax_of_confidence():
    confidence, alg_temp, num_draws = torch.tensor([0.2, 0.9, 0.5, 0.4]), 0.4, 6000
    uniforms = torch.from_numpy(named_rng("gumbel").random((num_draws, 4)))
    scores = order_scores(confidence.repeat(num_draws), "entropy", alg_temp, uniforms.flatten()).view(num_draws, 4)
    first = scores.argmax(dim=1).bincount(minlength=4).double() / num_draws
    want = (confidence.double() / alg_temp).softmax(dim=0)
    assert ((first - want).abs() < 4 * (want * (1 - want) / num_draws).sqrt()).all()
    # without replacement: the second choice is drawn from the rest
    both = choose(scores, torch.full((num_draws,), 2))
    pair = sum(want[i] * want[j] / (1 - want[i]) for i, j in ((1, 2), (2, 1)))
    frequency = (both[:, 1] & both[:, 2]).double().mean()
    assert abs(frequency - pair) < 4 * (pair * (1 - pair) / num_draws) ** 0.5


def test_extreme_uniforms_give_finite_orders():
    uniforms = torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64)
    assert order_scores(torch.zeros(2), "entropy", 1.0, uniforms).isfinite().all()


def test_draws_of_a_row_depend_on_its_seed_and_step_alone():
    together = row_uniforms("token", [3, 5, 3], [0, 0, 2], 6)
    assert torch.equal(row_uniforms("token", [5], [0], 9)[0, :6], together[1])
    assert not torch.equal(together[0], together[2])
    assert not torch.equal(row_uniforms("order", [3], [0], 6)[0], together[0])
    assert together.dtype == torch.float64


@pytest.mark.parametrize("alg", ["maskgit_plus", "topk_margin", "entropy"])
@pytest.mark.parametrize("width", [0.3, 3.0, 30.0])
def test_an_error_of_the_logits_moves_confidences_by_no_more_than_their_sensitivity(alg, width):
    generator = torch.Generator().manual_seed(0)
    logits = width * torch.randn(400, 50, generator=generator, dtype=torch.float64)
    error = 1e-3
    noise = error * (2 * torch.rand(400, 50, generator=generator, dtype=torch.float64) - 1)
    before = propose(logits, alg=alg, with_margin=True)
    after = propose(logits + noise, alg=alg)
    safe = before.margin > error
    assert safe.any()
    assert torch.equal(before.tokens[safe], after.tokens[safe])
    moved = (after.confidence - before.confidence).abs()[safe]
    assert (moved <= 1.01 * error * before.sensitivity[safe] + 1e-6).all()
    assert (before.sensitivity[safe] * error).max() > 1e-7, "the bound says nothing"
