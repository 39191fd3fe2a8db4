"""The likelihood bound is log p where it can be, unbiased otherwise, and the same in every batch."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from coda_eval.likelihood import bound_log_likelihoods, combine, plan_masks
from CoDALanguageModel import CoDAConfig, CoDALanguageModel

VOCAB, LENGTH, CONTEXT, MASK = 3, 4, [5], 4


class TableModel:
    """A masked model whose conditionals all come from one table of probabilities over VOCAB ** LENGTH texts."""

    device = torch.device("cpu")
    config = SimpleNamespace(mask_token_id=MASK, logits_shift=True, has_blocks=False)

    def __init__(self):
        table = np.random.default_rng(0).random((VOCAB,) * LENGTH)
        self.table = table / table.sum()

    def __call__(self, input_ids, attention_mask, positions, return_dict):
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


SHAPE = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3}


@pytest.fixture
def make_model():
    """Give a function that makes a tiny random model and counts the inputs that it scores, in `num_inputs`."""

    def make(**changes):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            ids = {"mask_token_id": 59, "pad_token_id": 58, "bos_token_id": None, "eos_token_id": 57}
            model = CoDALanguageModel(CoDAConfig(**SHAPE, **ids, **changes)).eval()
        model.num_inputs = 0

        def count(module, args, kwargs):
            module.num_inputs += len(kwargs["input_ids"])

        model.register_forward_pre_hook(count, with_kwargs=True)
        return model

    return make


def draw(*lengths):
    rng = np.random.default_rng(3)
    return [rng.integers(4, 50, length).tolist() for length in lengths]


@pytest.mark.parametrize("blocks", [{"return_dict": False}, {"attention": "block_causal", "block_size": 5}])
def test_bounds_do_not_depend_on_the_batch(make_model, blocks):
    model = make_model(**blocks)
    texts = draw(3, 2, 20, 5, 7, 9)
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    together = bound_log_likelihoods(model, pairs, mc_num=16, seed=1, batch_size=50, max_length=64)
    alone = [bound_log_likelihoods(model, [p], mc_num=16, seed=1, batch_size=1, max_length=64)[0] for p in pairs]
    for one, other in zip(together, alone, strict=True):
        assert one.nats == pytest.approx(other.nats, abs=1e-4)
    assert [bound.stderr > 0 for bound in together] == [False, True, True]


@torch.no_grad()
def mean_over_orders(model, text, block, numbers):
    """Mean log-probability of the tokens of one block over all orders, by a mask of (query, key) pairs written out."""

    def attends(query, key):
        if model.config.causal_context and numbers[query] != numbers[block[0]]:
            return key <= query
        return numbers[key] <= numbers[query]

    allowed = torch.tensor([[attends(query, key) for key in range(len(text))] for query in range(len(text))])
    sums = []
    for order in itertools.permutations(block):
        ids, total = torch.tensor([text]), 0.0
        ids[0, list(block)] = model.config.mask_token_id
        for place in order:
            logits = model(input_ids=ids, attention_mask=allowed[None, None]).logits
            total += float(logits[0, place - model.config.logits_shift].log_softmax(dim=-1)[text[place]])
            ids[0, place] = text[place]
        sums.append(total)
    return sum(sums) / len(sums)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize(
    ("size", "origin", "causal_context", "blocks"),
    [
        (3, "text", False, [[5], [6, 7, 8], [9, 10]]),
        (3, "text", True, [[5], [6, 7, 8], [9, 10]]),
        (3, "answer", False, [[5, 6, 7], [8, 9]]),
        (16, "text", False, [[5, 6, 7, 8]]),
    ],
)
def test_likelihood_with_blocks_is_the_mean_over_orders_of_each_block_behind_clean_ones(
    make_model, size, origin, causal_context, blocks, shift
):
    blocks_of = {"attention": "block_causal", "block_size": size, "block_origin": origin}
    model = make_model(**blocks_of, causal_context=causal_context, logits_shift=shift).double()
    text = draw(blocks[-1][-1] + 1)[0]
    start = 5 % size if origin == "answer" else 0
    numbers = [(place - start) // size for place in range(len(text))]
    expected = sum(mean_over_orders(model, text, block, numbers) for block in blocks)
    model.num_inputs = 0
    (bound,) = bound_log_likelihoods(model, [(text[:5], text[5:])], mc_num=15, seed=0, batch_size=4, max_length=64)
    assert bound.nats == pytest.approx(expected, abs=1e-5)
    assert bound.stderr == 0.0
    assert model.num_inputs == 2 ** max(map(len, blocks)) - 1


def test_likelihood_with_blocks_of_one_token_is_that_of_the_autoregressive_model(make_model):
    model = make_model(attention="block_causal", block_size=1, logits_shift=True)
    twin = Qwen3ForCausalLM(Qwen3Config(**SHAPE, rope_parameters=dict(model.config.rope_parameters))).eval()
    twin.load_state_dict(model.state_dict())
    texts = draw(1, 7, 20, 5)
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    bounds = bound_log_likelihoods(model, pairs, mc_num=1, seed=0, batch_size=2, max_length=64)
    assert model.num_inputs == 2
    for (context, continuation), bound in zip(pairs, bounds, strict=True):
        with torch.no_grad():
            logits = twin(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
        expected = logits.log_softmax(dim=-1)[torch.arange(len(continuation)), continuation].sum()
        assert bound.nats == pytest.approx(float(expected), abs=1e-5)
        assert bound.stderr == 0.0


def test_choices_of_any_length_share_their_draws():
    short, long_ = (plan_masks(length, 64, np.random.default_rng(5)).masked for length in (12, 15))
    shares = np.abs(short.mean(axis=1) - long_.mean(axis=1))
    assert shares.max() < 1 / 12  # one fraction for both, rounded up to tokens
    alone = plan_masks(15, 64, np.random.default_rng(6)).masked
    same, other = ((short == masked[:, :12]).mean() for masked in (long_, alone))
    assert same > 0.9
    assert other < 0.7


def test_shared_draws_make_a_comparison_of_choices_surer(make_model):
    model = make_model()
    context, first = draw(6, 10)
    pairs = [(context, first), (context, [*first, 7, 9])]  # one begins as the other
    values = []
    for seed in range(30):
        one, other = bound_log_likelihoods(model, pairs, mc_num=8, seed=seed, batch_size=32, max_length=64)
        values.append((one.nats, other.nats))
    gaps = np.array([other - one for one, other in values])
    apart = np.array([values[(i + 1) % 30][1] - values[i][0] for i in range(30)])
    assert gaps.std() < 0.9 * apart.std()


def test_the_error_of_one_set_of_masks_is_not_known(make_model):
    model = make_model()
    texts = draw(5, 4, 1)
    pairs = [(texts[0], texts[1]), (texts[0], texts[2])]
    sampled, exact = bound_log_likelihoods(model, pairs, mc_num=1, seed=0, batch_size=4, max_length=64)
    assert sampled.stderr is None
    assert exact.stderr == 0.0
    blocks = make_model(attention="block_causal", block_size=3)
    (mixed,) = bound_log_likelihoods(blocks, [(texts[0], texts[1])], mc_num=1, seed=0, batch_size=4, max_length=64)
    assert mixed.stderr is None


def test_texts_are_never_cut():
    with pytest.raises(ValueError, match="a context of 5 and a continuation of 4 tokens exceed the context of 8"):
        bound_log_likelihoods(TableModel(), [([1] * 5, [1] * 4)], mc_num=4, seed=0, batch_size=1, max_length=8)
    with pytest.raises(ValueError, match="at least one context token"):
        bound_log_likelihoods(TableModel(), [([], [1])], mc_num=4, seed=0, batch_size=1, max_length=8)
