"""Facts of the regimes: cached, parallel, speculative and remasking decoding, alone and in ragged batches."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

NEW = 12
ORDERS = ["origin", "maskgit_plus", "topk_margin", "entropy"]
FINAL_ONLY = {"threshold", "factor", "entropy_bound", "speculate", "remask"}  # not with p2, which takes commits back
REGIMES = [
    {},
    {"kv_cache": "prefix"},
    {"kv_cache": "dual"},
    {"kv_cache": "dual", "refresh_interval": 2},
    {"kv_cache": "dual", "cache_drift": 1e-3, "drift_interval": 2},
    {"block_length": 4, "kv_cache": "dual", "refresh_window": 2},
    {"block_length": 3, "kv_cache": "prefix", "refresh_window": 1, "suffix_window": 2, "threshold": 0.3},
    {"block_length": 4, "kv_cache": "dual", "refresh_window": 2, "cache_drift": 1e-3, "drift_interval": 2},
    {"threshold": 0.3},
    {"factor": 1.0},
    {"entropy_bound": 1.5},
    {"kv_cache": "prefix", "threshold": 0.3},
    {"block_length": 4, "suffix_window": 3},
    {"block_length": 4, "kv_cache": "dual", "suffix_window": 3, "factor": 0.8},
    {"speculate": 2},
    {"speculate": 2, "threshold": 0.3},
    {"remask": "conf"},
]


def decode(model, rows, seeds, sides=(), **options):
    """Decode ragged rows as one padded batch and give the new tokens of each."""
    width = max(map(len, rows)) + 2
    inputs = torch.full((len(rows), width), model.config.pad_token_id)
    mask = torch.zeros_like(inputs)
    for i, row in enumerate(rows):
        left = (width - len(row), 0, 1)[sides[i] if sides else 0]
        inputs[i, left : left + len(row)], mask[i, left : left + len(row)] = torch.tensor(row), 1
    options = {"max_new_tokens": NEW, "steps": 8, **options}
    return model.diffusion_generate(inputs, mask, seed=seeds, return_dict_in_generate=True, **options)


row_lists = st.lists(st.lists(st.integers(0, 63), min_size=1, max_size=9), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=row_lists, data=st.data())
def test_a_row_gets_the_same_tokens_alone_and_in_any_ragged_batch_in_every_regime(model, double_model, rows, data):
    model = data.draw(st.sampled_from([model, double_model]))
    regime = data.draw(st.sampled_from(REGIMES))
    options = {
        "alg": data.draw(st.sampled_from(ORDERS if FINAL_ONLY & set(regime) else [*ORDERS, "p2"])),
        "block_length": data.draw(st.sampled_from([None, 5])),
        **regime,
    }
    options["temperature"] = data.draw(st.sampled_from([0.0, 0.8]))
    sides = data.draw(st.lists(st.integers(0, 2), min_size=len(rows), max_size=len(rows)))
    seeds = list(range(len(rows)))
    together = decode(model, rows, seeds, sides, **options).sequences[:, -NEW:]
    for i, row in enumerate(rows):
        alone = decode(model, [row], [seeds[i]], **options).sequences[0, -NEW:]
        assert alone.tolist() == together[i].tolist()


@pytest.mark.parametrize("kv_cache", ["prefix", "dual"])
@pytest.mark.parametrize("alg", [*ORDERS, "p2"])
def test_a_cache_that_is_refreshed_every_step_changes_nothing(model, tokens, kv_cache, alg):
    rows = [tokens(5).tolist(), [*tokens(3, seed=1).tolist(), 67, 67, *tokens(2, seed=2).tolist()]]
    for block_length in (None, 4):
        options = {"alg": alg, "block_length": block_length, "temperature": 0.7}
        exact = decode(model, rows, [1, 2], **options)
        fresh = decode(model, rows, [1, 2], kv_cache=kv_cache, refresh_interval=1, **options)
        zero_drift = decode(model, rows, [1, 2], kv_cache=kv_cache, cache_drift=0.0, drift_interval=1, **options)
        assert fresh.sequences.tolist() == exact.sequences.tolist() == zero_drift.sequences.tolist()


def test_the_dual_cache_computes_fewer_tokens_than_the_prefix_cache_and_both_fewer_than_none(model, tokens):
    rows = [tokens(20).tolist()]
    cost = {
        kv_cache: decode(model, rows, [0], kv_cache=kv_cache, block_length=4, steps=NEW).cost.tokens_evaluated
        for kv_cache in ("none", "prefix", "dual")
    }
    assert cost["dual"] < cost["prefix"] < cost["none"]


def test_a_refresh_window_as_wide_as_the_text_is_the_whole_refresh(model, tokens):
    rows = [tokens(5).tolist(), [*tokens(3, seed=1).tolist(), 67, 67, *tokens(2, seed=2).tolist()]]
    for options in ({"kv_cache": "dual"}, {"kv_cache": "prefix", "refresh_interval": 2}):
        options = {"block_length": 4, "steps": NEW, **options}
        whole = decode(model, rows, [0, 1], **options)
        wide = decode(model, rows, [0, 1], refresh_window=40, **options)
        assert wide.sequences.tolist() == whole.sequences.tolist()
        assert wide.cost.tokens_evaluated <= whole.cost.tokens_evaluated


def test_with_windows_the_cost_of_a_block_does_not_grow_with_the_text(model, tokens):
    options = {"kv_cache": "dual", "block_length": 4, "refresh_window": 4, "suffix_window": 4, "eos_early_stop": False}
    evaluated = [
        decode(model, [tokens(6).tolist()], [0], max_new_tokens=n, steps=n, **options).cost.tokens_evaluated
        for n in (16, 24, 32, 40)
    ]
    growth = [b - a for a, b in itertools.pairwise(evaluated)]
    # Two more blocks of one refresh (block, scoring row, 4 on both sides) and two cached passes (block, scoring row).
    assert max(growth) <= 2 * ((4 + 1 + 4 + 4) + 2 * (4 + 1))


def test_the_first_step_of_a_block_is_exact_with_a_cache(model, tokens):
    rows = [tokens(7).tolist()]
    for kv_cache in ("prefix", "dual"):
        exact = decode(model, rows, [0], steps=1)
        cached = decode(model, rows, [0], steps=1, kv_cache=kv_cache)
        assert exact.sequences.tolist() == cached.sequences.tolist()


def test_the_drift_budget_bounds_the_error_of_the_cached_distributions(model, tokens, monkeypatch):
    """With a check at every step, what is used is never further from the fresh distribution than the budget."""
    from CoDALanguageModel.scoring import Scorer

    budget, seen = 0.02, []
    correct = Scorer._correct_drift

    def spy(self, step, ids, window, cached, due):
        used = correct(self, step, ids, window, cached, due)
        exact = self.model(ids, attention_mask=self.canvas.attention_mask).logits
        exact = exact[used.row, used.column - 1].float()
        exact[:, [66, 67]], exact[:, 68:] = -torch.inf, -torch.inf
        p, q = exact.log_softmax(1), used.logits.float().log_softmax(1)
        seen.append(float((p.exp() * (p - q).nan_to_num()).sum(1).mean()))
        return used

    monkeypatch.setattr(Scorer, "_correct_drift", spy)
    output = decode(model, [tokens(6).tolist()], [0], kv_cache="dual", cache_drift=budget, drift_interval=1, steps=NEW)
    assert output.cost.drift_checks == len(seen) > 0
    assert max(seen) <= budget + 1e-6
    assert output.cost.cache_refreshes > 1, "the budget was never exceeded: the test says nothing"


def test_speculation_equals_the_stepwise_sampler(make_model, tokens):
    """200 random cases over models, orders, temperatures, blocks, gaps and depths; never more passes per row."""
    models = [make_model(seed=seed) for seed in range(2)]
    saved, cases = 0, 0
    grid = itertools.product(models, ORDERS, (0.0, 0.9), (None, 4), (1, 2, 3, 4))
    for i, (model, alg, temperature, block_length, depth) in enumerate(grid):
        steps = (NEW, 6)[i // 4 % 2]
        rows = [tokens(1 + i % 7, seed=i).tolist(), [*tokens(2, seed=i + 1).tolist(), 67, *tokens(3, seed=i).tolist()]]
        options = {"alg": alg, "temperature": temperature, "block_length": block_length, "steps": steps}
        stepwise = decode(model, rows, [i, i + 1], **options)
        speculative = decode(model, rows, [i, i + 1], speculate=depth, **options)
        assert speculative.sequences.tolist() == stepwise.sequences.tolist()
        assert speculative.cost.forwards - speculative.cost.guard_hits <= stepwise.cost.forwards
        saved += stepwise.cost.forwards - speculative.cost.forwards
        cases += len(rows)
    assert cases >= 200
    assert saved > 0


def test_near_ties_are_computed_again_alone_and_counted(model, tokens):
    rows = [tokens(4).tolist(), tokens(6, seed=1).tolist()]
    guarded = decode(model, rows, [0, 0], speculate=2, near_tie=1.0)
    assert guarded.cost.guard_hits > 0
    assert guarded.sequences.tolist() == decode(model, rows, [0, 0]).sequences.tolist()


@pytest.mark.parametrize("alg", ["maskgit_plus", "topk_margin", "entropy"])
def test_certainty_is_no_near_tie_and_speculation_saves_passes(make_model, tokens, alg):
    """Confidences of a sure model differ by next to nothing; that must not send every step to the guard."""
    model = make_model(seed=1)
    model.lm_head.weight.data *= 6
    rows = [tokens(6).tolist()]
    options = {"alg": alg, "max_new_tokens": 24, "steps": 24, "eos_early_stop": False}
    stepwise = decode(model, rows, [0], **options)
    speculative = decode(model, rows, [0], speculate=4, **options)
    assert speculative.sequences.tolist() == stepwise.sequences.tolist()
    assert speculative.cost.guard_hits <= 2
    assert speculative.cost.forwards < stepwise.cost.forwards


@pytest.mark.parametrize(("rule", "never", "always"), [("threshold", 1.0, 1e-9), ("entropy_bound", 0.0, 1e9)])
def test_parallel_rules_only_add_commits_to_the_schedule(model, tokens, rule, never, always):
    rows = [tokens(5).tolist()]
    exact = decode(model, rows, [0], steps=NEW)
    assert decode(model, rows, [0], steps=NEW, **{rule: never}).sequences.tolist() == exact.sequences.tolist()
    eager = decode(model, rows, [0], steps=NEW, eos_early_stop=False, **{rule: always})
    assert eager.cost.forwards == 1
    for bound in (0.2, 0.5):
        assert decode(model, rows, [0], steps=NEW, **{rule: bound}).cost.forwards <= exact.cost.forwards


@pytest.mark.parametrize("filters", [{"temperature": 0.01}, {"top_k": 1}, {"top_p": 0.01}])
@pytest.mark.parametrize("rule", [{"threshold": 0.999}, {"factor": 1e-3}])
def test_temperature_and_filters_make_no_token_certain(model, tokens, filters, rule):
    rows = [tokens(5).tolist()]
    plain = decode(model, rows, [0], steps=NEW, eos_early_stop=False, **filters)
    parallel = decode(model, rows, [0], steps=NEW, eos_early_stop=False, **filters, **rule)
    assert parallel.sequences.tolist() == plain.sequences.tolist()
    assert parallel.cost.forwards == plain.cost.forwards


def test_masks_outside_of_the_suffix_window_are_not_computed(model, tokens):
    rows = [tokens(5).tolist()]
    full = decode(model, rows, [0], block_length=4, steps=NEW)
    short = decode(model, rows, [0], block_length=4, steps=NEW, suffix_window=0)
    wide = decode(model, rows, [0], block_length=4, steps=NEW, suffix_window=NEW)
    assert short.cost.tokens_evaluated < full.cost.tokens_evaluated
    assert wide.sequences.tolist() == full.sequences.tolist()


def test_remasking_changes_answers_leaves_no_mask_and_never_touches_the_prompt(model, tokens):
    rows = [tokens(4).tolist(), [*tokens(3).tolist(), 67, 67, *tokens(2).tolist()]]
    changed = 0
    for seed in range(8):
        plain = decode(model, rows, [seed, seed], steps=NEW, temperature=1.0)
        output = decode(model, rows, [seed, seed], steps=NEW, temperature=1.0, remask="conf", output_history=True)
        assert not (output.sequences == 67).any()
        for i, row in enumerate(rows):
            start = output.sequences.shape[1] - NEW - len(row)
            kept = [(j, token) for j, token in enumerate(row) if token != 67]
            assert all(int(output.sequences[i, start + j]) == token for j, token in kept)
        changed += plain.sequences.tolist() != output.sequences.tolist()
        came_back = [(b == 67) & (a != 67) for a, b in itertools.pairwise(output.history)]
        changed += any(bool(back.any()) for back in came_back)
    assert changed > 0


def test_scores_are_the_log_probabilities_at_the_commit(model, tokens):
    prompt = tokens(1, 6)
    output = model.diffusion_generate(
        prompt, max_new_tokens=4, steps=4, output_scores=True, output_history=True, return_dict_in_generate=True
    )
    canvases = [torch.nn.functional.pad(prompt, (0, 4), value=67), *output.history]
    for column in range(6, 10):
        if output.commit_steps[0, column] < 0:  # behind the end of the answer
            continue
        before = next(canvas for canvas in reversed(canvases) if canvas[0, column] == 67)
        logits = model(before).logits[0, column - 1].float()
        logits[[66, 67]], logits[68:] = -torch.inf, -torch.inf
        expected = logits.log_softmax(0)[output.sequences[0, column]]
        assert output.scores[0, column].item() == pytest.approx(float(expected.detach()), abs=1e-5)
    assert output.scores[:, :6].eq(0).all()
    assert output.commit_steps[:, :6].eq(-1).all()


def test_sequences_per_prompt_are_those_of_consecutive_seeds(model, tokens):
    prompt = tokens(2, 5)
    options = {"max_new_tokens": 6, "steps": 6, "temperature": 1.0}
    many = model.diffusion_generate(prompt, num_return_sequences=3, seed=4, **options)
    for row, i in itertools.product(range(2), range(3)):
        alone = model.diffusion_generate(prompt[row : row + 1], seed=4 + i, **options)
        assert many[3 * row + i].tolist() == alone[0].tolist()


def test_biases_penalties_bans_and_processors_have_their_effect(model, tokens):
    prompt = tokens(1, 5)
    options = {"max_new_tokens": 6, "steps": 6, "eos_early_stop": False}
    plain = model.diffusion_generate(prompt, **options)[0, 5:].tolist()
    assert model.diffusion_generate(prompt, logit_bias={"3": 1e4}, **options)[0, 5:].tolist() == [3] * 6
    assert plain[0] not in model.diffusion_generate(prompt, suppress_tokens=[plain[0]], **options)[0, 5:].tolist()
    strict = model.diffusion_generate(prompt, repetition_penalty=1e6, steps=6, max_new_tokens=6, eos_early_stop=False)
    assert strict.tolist() != [[*prompt[0].tolist(), *plain]] or len(set(plain)) == len(plain)

    def only_seven(ids, scores):
        assert ids.shape == (len(scores), 11)
        return torch.full_like(scores, -1e9).index_fill(1, torch.tensor([7]), 0.0)

    assert model.diffusion_generate(prompt, logits_processor=[only_seven], **options)[0, 5:].tolist() == [7] * 6


class Letters:
    """A tokenizer whose text has one character per token."""

    def decode(self, ids):
        return "".join(chr(48 + i) for i in ids)


def test_stop_strings_end_a_row_without_changing_the_text_before_them(model, tokens):
    prompt, options = tokens(1, 5), {"max_new_tokens": NEW, "steps": NEW, "block_length": 3}
    full = model.diffusion_generate(prompt, eos_early_stop=False, **options)[0, 5:].tolist()
    stop = Letters().decode(full[4:6])
    first = Letters().decode(full).index(stop) + 2
    output = model.diffusion_generate(
        prompt, stop_strings=[stop], tokenizer=Letters(), return_dict_in_generate=True, **options
    )
    answer = output.sequences[0, 5:].tolist()
    assert answer[:first] == full[:first]
    assert set(answer[first:]) == {model.config.pad_token_id}
    assert int(output.num_forwards[0]) < NEW
    with pytest.raises(ValueError, match="stop_strings need the tokenizer"):
        model.diffusion_generate(prompt, stop_strings=["x"])


def test_the_cost_counts_passes_rows_and_tokens(model, tokens):
    prompt = tokens(2, 5)
    cost = model.diffusion_generate(
        prompt, max_new_tokens=4, steps=2, eos_early_stop=False, return_dict_in_generate=True
    ).cost
    assert (cost.forwards, cost.rows_evaluated, cost.tokens_evaluated) == (2, 4, 36)
    assert cost.row_forwards == 4
    assert cost.as_dict()["tokens_per_forward"] == pytest.approx(cost.answer_tokens / 4)


@pytest.mark.parametrize("regime", [{}, {"kv_cache": "dual"}, {"threshold": 0.3}, {"speculate": 2}])
def test_prompts_full_of_special_tokens_stay_as_they_are_and_end_nothing(model, tokens, regime):
    """End, start and padding ids inside a prompt are text: only the mask id is a gap."""
    hostile = [65, 64, 66, *tokens(2).tolist(), 66, 65, 64, 65]
    options = {"block_length": 4, "steps": NEW, "eos_early_stop": True, **regime}
    alone = decode(model, [hostile], [3], **options)
    batch = decode(model, [tokens(4).tolist(), hostile, [65]], [1, 3, 2], (1, 0, 2), **options)
    assert alone.sequences[0, -NEW:].tolist() == batch.sequences[1, -NEW:].tolist()
    assert alone.sequences[0, 2:-NEW].tolist() == hostile
    as_text = model.diffusion_generate(
        torch.tensor([hostile]), max_new_tokens=NEW, seed=3, **{**options, "eos_early_stop": False}
    )[0, -NEW:].tolist()
    answer = alone.sequences[0, -NEW:].tolist()
    end = answer.index(65) + 1 if 65 in answer else NEW
    assert answer[:end] == as_text[:end]
    assert 67 not in answer


def test_forced_and_banned_ids_of_transformers_processors_hold_in_every_regime(model, tokens):
    from transformers import SuppressTokensLogitsProcessor

    banned = list(range(40))
    for regime in ({}, {"kv_cache": "dual"}, {"threshold": 0.2}, {"speculate": 2}, {"remask": "conf"}, {"alg": "p2"}):
        answer = model.diffusion_generate(
            tokens(1, 5),
            max_new_tokens=NEW,
            steps=NEW,
            temperature=1.0,
            logits_processor=[SuppressTokensLogitsProcessor(banned)],
            **regime,
        )[0, 5:]
        assert not set(answer.tolist()) & set(banned)
        forced = model.diffusion_generate(
            tokens(1, 5), max_new_tokens=3, steps=3, suppress_tokens=[i for i in range(66) if i != 9], **regime
        )
        assert forced[0, 5:].tolist() == [9, 9, 9]


def test_a_compiled_network_gives_the_same_tokens(make_model, tokens):
    model = make_model(seed=3)
    rows = [tokens(5).tolist(), tokens(8, seed=1).tolist()]
    regimes = ({}, {"kv_cache": "dual", "block_length": 4}, {"threshold": 0.3})
    plain = [decode(model, rows, [0, 1], **regime).sequences.tolist() for regime in regimes]
    model.model.compile(dynamic=True, backend="aot_eager")
    assert [decode(model, rows, [0, 1], **regime).sequences.tolist() for regime in regimes] == plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.9, "factor": 1.0}, "at most one of threshold, factor, entropy_bound"),
        ({"alg": "p2", "threshold": 0.9}, "threshold cannot be used with alg 'p2'"),
        ({"remask": "conf", "speculate": 2}, "speculate cannot be used with remask"),
        ({"alg": "p2", "remask": "conf"}, "remask cannot be used with alg 'p2'"),
        ({"kv_cache": "dual", "speculate": 1}, "speculate is lossless and kv_cache='dual' is not"),
        ({"refresh_interval": 2}, "refresh_interval needs kv_cache"),
        ({"cache_drift": 0.1}, "cache_drift needs kv_cache"),
        ({"refresh_window": 3}, "refresh_window needs kv_cache"),
        ({"kv_cache": "dual", "refresh_window": -1}, "refresh_window must be an integer >= 0 or None"),
        ({"suffix_window": 4}, "suffix_window needs block_length"),
        ({"eta": 0.5}, "eta needs remask"),
        ({"kv_cache": "both"}, "kv_cache must be one of auto, none, exact, prefix, dual, got 'both'"),
        ({"remask": "all"}, "remask must be 'conf' or None"),
        ({"threshold": 0.0}, r"threshold must be in \(0, 1\]"),
        ({"stop_strings": "x"}, "stop_strings must be a list"),
        ({"num_return_sequences": 0}, "num_return_sequences must be an integer >= 1"),
    ],
)
def test_what_cannot_hold_is_refused_with_the_reason(model, tokens, options, message):
    with pytest.raises(ValueError, match=message):
        model.diffusion_generate(tokens(1, 3), max_new_tokens=2, **options)
