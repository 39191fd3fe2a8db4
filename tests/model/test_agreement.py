"""Facts of the agreement report."""

import json
from types import SimpleNamespace

import pytest

from CoDALanguageModel import DiffusionGenerationConfig
from CoDALanguageModel.errors import UserError
from CoDALanguageModel.prompts import Codec
from CoDALanguageModel.tools.agreement import (
    compare,
    edit_distance,
    parse_settings,
    read_prompts,
    summarise,
    token_agreement,
)


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


def test_what_the_models_own_settings_approximate_is_no_part_of_the_exact_run(make_model, tokens):
    model = make_model()
    model.generation_config = DiffusionGenerationConfig(threshold=0.05, stop_strings=["x"], eos_early_stop=False)
    tokenizer = SimpleNamespace(decode=lambda ids: "y" * len(ids))
    settings = {"max_new_tokens": 8, "steps": 8}
    assert summarise(compare(model, [tokens(4).tolist()], settings, tokenizer))["speedup_forwards"] > 1


def test_prompts_are_lines_that_end_where_json_says_they_do(chatml_tokenizer, tmp_path):
    def read(name, content):
        (tmp_path / name).write_bytes(content)
        return read_prompts(tmp_path / name, chatml_tokenizer, chat=False)

    text = "a\u2028b"
    expected = [Codec(chatml_tokenizer).encode_text(text)]
    assert read("p.jsonl", b"\n" + json.dumps({"prompt": text}, ensure_ascii=False).encode() + b"\r\n") == expected
    assert read("p.txt", b"\xef\xbb\xbf" + text.encode() + b"\r\n") == expected
    for name, content, message in (
        ("p.txt", b"ok\n\xff", "is not UTF-8: invalid start byte at byte 3"),
        ("p.jsonl", b'{"prompt": 5}', "must have a text as 'prompt', got 5"),
    ):
        with pytest.raises(UserError, match=message):
            read(name, content)


def test_distances_count_edits_and_equal_places():
    assert edit_distance([1, 2, 3], [1, 3]) == 1
    assert edit_distance([], [4, 5]) == 2
    assert token_agreement([1, 2, 3, 4], [1, 2, 9, 4]) == 0.75
    assert token_agreement([], []) == 1.0


def test_settings_are_read_as_json_or_text():
    assert parse_settings(["steps=4", "kv_cache=dual", "top_p=null"]) == {"steps": 4, "kv_cache": "dual", "top_p": None}
    assert parse_settings(["regex=5", "steps=" + "9" * 5000]) == {"regex": "5", "steps": "9" * 5000}
    with pytest.raises(ValueError, match="key=value"):
        parse_settings(["steps"])
