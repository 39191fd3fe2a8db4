"""Facts of the agreement report."""

import pytest

from CoDALanguageModel.tools.agreement import compare, edit_distance, parse_settings, summarise, token_agreement


def test_the_exact_regime_agrees_with_itself(model, tokens):
    prompts = [tokens(4).tolist(), tokens(7, seed=1).tolist()]
    summary = summarise(compare(model, prompts, {"max_new_tokens": 6, "steps": 6}))
    assert summary["token_agreement"] == summary["identical_answers"] == 1.0
    assert summary["edit_distance"] == 0
    assert summary["speedup_forwards"] == 1.0


def test_speculation_agrees_and_a_parallel_rule_saves_passes(model, tokens):
    prompts = [tokens(4).tolist()]
    shared = {"max_new_tokens": 8, "steps": 8, "eos_early_stop": False}
    assert summarise(compare(model, prompts, {**shared, "speculate": 3}))["token_agreement"] == 1.0
    assert summarise(compare(model, prompts, {**shared, "threshold": 0.05}))["speedup_forwards"] > 1


def test_recomputed_blocks_agree_with_cached_ones_and_cost_more(make_model, tokens):
    model = make_model(attention="block_causal", block_size=4)
    settings = {"max_new_tokens": 12, "steps": 12, "kv_cache": "none"}
    summary = summarise(compare(model, [tokens(9).tolist(), tokens(20, seed=1).tolist()], settings))
    assert summary["token_agreement"] == 1.0
    assert summary["speedup_tokens_evaluated"] < 0.5


def test_distances_count_edits_and_equal_places():
    assert edit_distance([1, 2, 3], [1, 3]) == 1
    assert edit_distance([], [4, 5]) == 2
    assert token_agreement([1, 2, 3, 4], [1, 2, 9, 4]) == 0.75
    assert token_agreement([], []) == 1.0


def test_settings_are_read_as_json_or_text():
    assert parse_settings(["steps=4", "kv_cache=dual", "top_p=null"]) == {"steps": 4, "kv_cache": "dual", "top_p": None}
    with pytest.raises(ValueError, match="key=value"):
        parse_settings(["steps"])
