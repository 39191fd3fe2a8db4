"""The likelihood bound is log p where it can be, unbiased otherwise, and the same in every batch."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from coda_eval.likelihood import bound_log_likelihoods, combine, plan_masks

VOCAB, LENGTH, CONTEXT, MASK = 3, 4, [5], 4


class TableModel:
    """A masked model whose conditionals all come from one table of probabilities over VOCAB ** LENGTH texts."""

    device = torch.device("cpu")
    config = SimpleNamespace(mask_token_id=MASK, logits_shift=True)

    def __init__(self):
        table = np.random.default_rng(0).random((VOCAB,) * LENGTH)
        self.table = table / table.sum()

    def __call__(self, input_ids, attention_mask, positions):
        logits = torch.full((*input_ids.shape, 6), -1e9, dtype=torch.float64)
        for row, ids in enumerate(input_ids.tolist()):
            text = ids[len(CONTEXT) : len(CONTEXT) + LENGTH]
            for i, token in enumerate(text):
                if token == MASK:
                    index = tuple(slice(None) if t == MASK else t for t in text)
                    kept = [j for j, t in enumerate(text) if t == MASK]
                    marginal = self.table[index].sum(axis=tuple(a for a, j in enumerate(kept) if j != i))
                    logits[row, len(CONTEXT) + i - 1, :VOCAB] = torch.tensor(marginal / marginal.sum()).log()
        return SimpleNamespace(logits=SimpleNamespace(float=lambda: logits.flatten(0, 1)[positions]))


def test_enumeration_equals_log_p_of_a_table_model():
    model = TableModel()
    texts = [list(text) for text in itertools.product(range(VOCAB), repeat=LENGTH)]
    pairs = [(CONTEXT, text) for text in texts]
    bounds = bound_log_likelihoods(model, pairs, mc_num=15, seed=0, batch_size=64, max_length=8)
    for text, bound in zip(texts, bounds, strict=True):
        assert bound.nats == pytest.approx(math.log(model.table[tuple(text)]), abs=1e-10)
        assert bound.stderr == 0.0


def test_scores_that_are_not_finite_are_an_error_and_no_bound():
    model = TableModel()
    model.table[1] = float("nan")
    with pytest.raises(ValueError, match="scores that are not finite"):
        bound_log_likelihoods(model, [(CONTEXT, [1] * LENGTH)], mc_num=15, seed=0, batch_size=64, max_length=8)


def test_sampling_is_unbiased_and_its_error_is_honest():
    scores = {}

    def score(masked):  # any function of the mask set will do
        key = tuple(masked)
        return scores.setdefault(
            key, -float(np.random.default_rng(sum(b << i for i, b in enumerate(key))).random()) * 9
        )

    exact_plan = plan_masks(6, 63, np.random.default_rng(0))
    exact = combine(exact_plan, np.array([score(masked) for masked in exact_plan.masked])).nats
    rng = np.random.default_rng(1)
    runs = []
    for _ in range(400):
        plan = plan_masks(6, 16, rng)
        runs.append(combine(plan, np.array([score(masked) for masked in plan.masked])))
    values = np.array([run.nats for run in runs])
    assert abs(values.mean() - exact) < 4 * values.std() / math.sqrt(len(values))
    assert np.mean([run.stderr for run in runs]) >= 0.8 * values.std()


def test_every_number_of_masks_is_equally_likely():
    rng = np.random.default_rng(2)
    sizes = np.concatenate([plan_masks(10, 32, rng).masked.sum(axis=1) for _ in range(2000)])
    counts = np.bincount(sizes, minlength=11)[1:]
    assert np.abs(counts / counts.sum() * 10 - 1).max() < 0.03


def test_all_masks_are_enumerated_exactly_when_they_fit():
    rng = np.random.default_rng(0)
    assert plan_masks(7, 127, rng).is_exact
    assert not plan_masks(7, 126, rng).is_exact
    assert len(plan_masks(1, 128, rng).weights) == 1
    with pytest.raises(ValueError, match="must be positive, got 0 and 128"):
        plan_masks(0, 128, rng)


def test_bounds_do_not_depend_on_the_batch(model_dir):
    from CoDALanguageModel import CoDALanguageModel

    model = CoDALanguageModel.from_pretrained(model_dir).eval()
    rng = np.random.default_rng(3)
    pairs = [(rng.integers(4, 300, n).tolist(), rng.integers(4, 300, m).tolist()) for n, m in ((3, 2), (20, 5), (7, 9))]
    together = bound_log_likelihoods(model, pairs, mc_num=32, seed=1, batch_size=50, max_length=512)
    alone = [bound_log_likelihoods(model, [p], mc_num=32, seed=1, batch_size=1, max_length=512)[0] for p in pairs]
    for one, other in zip(together, alone, strict=True):
        assert one.nats == pytest.approx(other.nats, abs=1e-4)
    assert [bound.stderr > 0 for bound in together] == [False, False, True]


def test_texts_are_never_cut():
    with pytest.raises(ValueError, match="a context of 5 and a continuation of 4 tokens exceed the context of 8"):
        bound_log_likelihoods(TableModel(), [([1] * 5, [1] * 4)], mc_num=4, seed=0, batch_size=1, max_length=8)
    with pytest.raises(ValueError, match="at least one context token"):
        bound_log_likelihoods(TableModel(), [([], [1])], mc_num=4, seed=0, batch_size=1, max_length=8)
