"""Facts of the rules of the choice."""

import pytest
import torch

from CoDALanguageModel import DiffusionGenerationConfig
from CoDALanguageModel.decoding_settings import SETTINGS
from CoDALanguageModel.diffusion import named_rng
from CoDALanguageModel.orders import ORDERS, REMASKS, RULES, choose


def test_every_rule_can_be_asked_for_and_nothing_else():
    assert set(SETTINGS["alg"].choices) == set(ORDERS)
    assert set(SETTINGS["remask"].choices) == set(REMASKS)
    assert {name for name, row in SETTINGS.items() if row.regime == "parallel"} == set(RULES)


@pytest.mark.parametrize("alg", ORDERS)
def test_the_settings_know_which_orders_take_commits_back(alg):
    assert DiffusionGenerationConfig(alg=alg).commits_are_final is not ORDERS[alg].keeps_deciding


def test_factor_accepts_the_longest_prefix_that_passes():
    probability = torch.tensor([[0.9, 0.2, 0.8, -torch.inf], [0.4, 0.3, 0.2, 0.1]])
    accepted = RULES["factor"].accept(1.0, probability, probability)  # thresholds 1/2, 2/3, 3/4 for n = 1, 2, 3
    assert accepted.tolist() == [[True, False, True, False], [False, False, False, False]]


def test_the_entropy_bound_accepts_the_most_certain_as_long_as_the_others_sum_to_it():
    entropy = torch.tensor([[0.3, torch.inf, 0.1, 0.2, 5.0]])
    probability = torch.tensor([[0.5, -torch.inf, 0.5, 0.5, 0.5]])
    accepted = RULES["entropy_bound"].accept(0.3, probability, entropy)
    assert accepted.tolist() == [[True, False, True, True, False]]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bound", [0.2, 0.5, 0.9])
def test_an_error_below_its_doubt_does_not_change_what_a_rule_accepts(rule, bound):
    logits = 2 * torch.randn(6, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = 2 * torch.rand(6, 5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 1

    def certainty(scores):
        own = torch.distributions.Categorical(logits=scores)
        return own.probs.amax(dim=2).float(), own.entropy().float()

    doubt = RULES[rule].doubt(bound, *certainty(logits))
    before = RULES[rule].accept(bound, *certainty(logits))
    after = RULES[rule].accept(bound, *certainty(logits + 0.5 * doubt.clamp(max=0.02)[:, None, None] * noise))
    assert torch.equal(before, after)
    assert doubt.isfinite().any()


def test_the_best_positions_are_chosen_and_ties_go_to_the_left():
    scores = torch.tensor([[1.0, 3.0, 3.0, -torch.inf, 2.0], [0.0, 0.0, 0.0, 0.0, -torch.inf]])
    assert choose(scores, torch.tensor([2, 3])).int().tolist() == [[0, 1, 1, 0, 0], [1, 1, 1, 0, 0]]
    assert choose(scores, torch.tensor([1, 0])).int().tolist() == [[0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert choose(scores, torch.tensor([5, 5])).int().tolist() == [[1, 1, 1, 0, 1], [1, 1, 1, 1, 0]]


def test_origin_ranks_at_random_and_no_temperature_by_confidence():
    confidence, uniforms = torch.tensor([0.1, 0.9, 0.5]), torch.tensor([0.3, 0.2, 0.1], dtype=torch.float64)
    assert ORDERS["origin"].rank(confidence, None, uniforms).argsort(descending=True).tolist() == [0, 1, 2]
    for alg_temp in (None, 0.0):
        assert torch.equal(ORDERS["entropy"].rank(confidence, alg_temp, None), confidence)


def test_alg_temp_draws_positions_from_the_softmax_of_confidence():
    confidence, alg_temp, num_draws = torch.tensor([0.2, 0.9, 0.5, 0.4]), 0.4, 6000
    uniforms = torch.from_numpy(named_rng("gumbel").random((num_draws, 4)))
    scores = ORDERS["entropy"].rank(confidence.repeat(num_draws), alg_temp, uniforms.flatten()).view(num_draws, 4)
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
    assert ORDERS["entropy"].rank(torch.zeros(2), 1.0, uniforms).isfinite().all()
