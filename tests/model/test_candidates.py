"""Facts of the tokens that are proposed."""

import math

import pytest
import torch

from CoDALanguageModel.candidates import filter_scores, kept_tokens, propose, row_uniforms
from CoDALanguageModel.diffusion import named_rng
from CoDALanguageModel.orders import ORDERS
from CoDALanguageModel.speculation import doubts


def random_logits(num_rows, vocab_size, seed=0, scale=3.0):
    return scale * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed))


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
    assert torch.equal(propose(logits, ORDERS["entropy"]).tokens, logits.argmax(dim=1))


@pytest.mark.parametrize("alg", ORDERS)
def test_a_row_is_proposed_alike_whatever_the_other_rows_need(alg):
    flat, peaked = torch.zeros(1, 3000), random_logits(1, 3000, scale=8.0)
    options = {"temperature": 0.7, "top_p": 0.9, "with_certainty": True, "extra": doubts}
    uniforms = torch.tensor([0.3, 0.8], dtype=torch.float64)
    *both, both_doubts = propose(torch.cat([flat, peaked]), ORDERS[alg], uniforms=uniforms, **options)
    *alone, alone_doubts = propose(peaked, ORDERS[alg], uniforms=uniforms[1:], **options)
    for values, value in zip([*both, *both_doubts], [*alone, *alone_doubts], strict=True):
        assert torch.equal(values[1:], value)


@pytest.mark.parametrize("vocab_size", [5, 151_936])
def test_tokens_are_drawn_from_the_tempered_and_filtered_distribution(vocab_size):
    num_draws = 4000 if vocab_size < 100 else 64
    row = random_logits(1, vocab_size, scale=1.0)
    logits = row.expand(num_draws, -1)
    uniforms = torch.from_numpy(named_rng("u").random(num_draws))
    tokens = propose(logits, ORDERS["entropy"], temperature=0.7, top_p=0.8, uniforms=uniforms).tokens
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
        logits, ORDERS["origin"], temperature=1.0, uniforms=torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64)
    ).tokens
    assert tokens.tolist() == [1, 4]


def test_confidence_of_each_algorithm():
    logits = random_logits(5, 30)
    logits[:, 3] = -torch.inf
    scaled = logits / 0.5
    uniforms = torch.full((5,), 0.35, dtype=torch.float64)
    probabilities = scaled.double().softmax(dim=1)

    def confidence(alg, **arguments):
        return propose(logits, ORDERS[alg], temperature=0.5, uniforms=uniforms, **arguments)

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
    found = propose(logits, ORDERS["maskgit_plus"], uniforms=uniforms, with_certainty=True, **filters)
    own = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(found.probability, own.log_prob(found.tokens).exp())
    torch.testing.assert_close(found.entropy, own.entropy())


def test_a_temperature_needs_uniforms():
    with pytest.raises(ValueError, match="uniforms are needed with temperature 0.5"):
        propose(torch.zeros(1, 4), ORDERS["entropy"], temperature=0.5)


@pytest.mark.parametrize("alg", ORDERS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_scores_that_are_not_finite_are_an_error(alg, value):
    logits = torch.zeros(2, 4)
    logits[1, 2] = value
    with pytest.raises(ValueError, match="scores that are not finite"):
        propose(logits, ORDERS[alg])


def test_draws_of_a_row_depend_on_its_seed_and_step_alone():
    together = row_uniforms("token", [3, 5, 3], [0, 0, 2], 6)
    assert torch.equal(row_uniforms("token", [5], [0], 9)[0, :6], together[1])
    assert not torch.equal(together[0], together[2])
    assert not torch.equal(row_uniforms("order", [3], [0], 6)[0], together[0])
    assert together.dtype == torch.float64
