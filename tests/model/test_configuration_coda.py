import json

import pytest

from CoDALanguageModel import CoDAConfig, DiffusionGenerationConfig
from CoDALanguageModel.configuration_coda import token_ids

PUBLISHED = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "vocab_size": 151936,
    "num_token_ids": 151670,
    "attention_bias": False,
    "qk_norm": True,
    "logits_shift": True,
    "pad_token_id": 151643,
    "eos_token_id": 151645,
    "mask_token_id": 151669,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "model_type": "CoDA",
}


def test_the_defaults_are_the_published_model():
    config = CoDAConfig().to_dict()
    assert {key: config[key] for key in PUBLISHED} == PUBLISHED


def test_config_json_of_the_package_is_the_published_model(repo):
    data = json.loads((repo / "CoDALanguageModel/config.json").read_text())
    assert {key: data[key] for key in PUBLISHED} == PUBLISHED
    config = CoDAConfig.from_pretrained(repo / "CoDALanguageModel").to_dict()
    assert {key: config[key] for key in data} == data
    assert data["architectures"] == ["CoDALanguageModel"]


def test_generation_config_json_of_the_package_has_the_published_decoding_settings(repo):
    config = DiffusionGenerationConfig.from_pretrained(repo / "CoDALanguageModel")
    got = [config.max_new_tokens, config.steps, config.alg, config.temperature, config.top_p]
    assert got == [768, 768, "entropy", 0.1, 0.9]
    data = json.loads((repo / "CoDALanguageModel/generation_config.json").read_text())
    assert {key: getattr(config, key) for key in data} == data


def test_round_trip_through_a_folder(tiny_config, tmp_path):
    config = tiny_config(eos_token_id=[64, 65], attention_bias=True, qk_norm=False, mlp_bias=True)
    config.save_pretrained(tmp_path)
    loaded = CoDAConfig.from_pretrained(tmp_path)
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert (loaded.eos_token_id, loaded.qk_norm, loaded.mlp_bias) == ([64, 65], False, True)


def test_training_keys_of_the_published_checkpoint_are_accepted_and_dropped():
    legacy = {
        "sampling_eps": 0.001,
        "block_masking_probability": 0.01,
        "mask_block_sizes": [2, 4, 8],
        "prefix_probability": 0.01,
        "truncate_probability": 0.01,
        "attention_kernel": "splash_attention",
    }
    config = CoDAConfig.from_dict({**PUBLISHED, **legacy})
    assert not legacy.keys() & config.to_dict().keys()


def test_older_rope_keys_are_read(tiny_config):
    assert tiny_config(rope_theta=5000.0).rope_parameters["rope_theta"] == 5000.0
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    parameters = tiny_config(rope_theta=5000.0, rope_scaling=scaling).rope_parameters
    assert parameters["rope_theta"] == 5000.0
    assert {key: parameters[key] for key in scaling} == scaling


def test_shapes_that_are_left_out_follow_from_the_others(tiny_config):
    config = tiny_config(head_dim=None, num_key_value_heads=None, num_token_ids=None)
    assert (config.head_dim, config.num_key_value_heads, config.num_token_ids) == (8, 4, 72)


def test_auto_map_names_the_classes_that_a_saved_folder_carries(tiny_config):
    assert tiny_config().auto_map == {
        "AutoConfig": "configuration_coda.CoDAConfig",
        "AutoModel": "modeling_coda.CoDALanguageModel",
        "AutoModelForCausalLM": "modeling_coda.CoDALanguageModel",
        "AutoModelForMaskedLM": "modeling_coda.CoDAForMaskedLM",
    }


def test_ids_that_are_left_out_follow_the_vocabulary(tmp_path):
    names = ("mask_token_id", "pad_token_id", "bos_token_id", "eos_token_id")

    def ids(**arguments):
        config = CoDAConfig(**arguments)
        assert all(type(i) is int for i in (getattr(config, name) for name in names) if i is not None)
        return [getattr(config, name) for name in names]

    assert ids(vocab_size=99) == [98, None, None, None]
    assert ids(vocab_size=152064) == ids() == [151669, 151643, 151643, 151645]
    assert ids(vocab_size=99, pad_token_id=3)[:2] == [98, 3]
    assert ids(pad_token_id=None)[1] is None
    with pytest.raises(ValueError, match=r"eos_token_id must be in \[0, vocab_size=99\), got 151645"):
        ids(vocab_size=99, eos_token_id=151645)
    CoDAConfig(vocab_size=99).save_pretrained(tmp_path)
    assert CoDAConfig.from_pretrained(tmp_path).to_dict() == CoDAConfig(vocab_size=99).to_dict() | {
        "transformers_version": CoDAConfig.from_pretrained(tmp_path).transformers_version
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
        ({"hidden_size": -4}, "hidden_size must be at least 1, got -4"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) must be a multiple of num_key_value_heads, got 3"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be at least 1, got 0"),
        ({"mask_token_id": 72}, r"mask_token_id must be in \[0, vocab_size=72\), got 72"),
        ({"mask_token_id": None}, "mask_token_id must be .* got None"),
        ({"pad_token_id": -1}, r"pad_token_id must be in \[0, vocab_size=72\), got -1"),
        ({"eos_token_id": [65, 99]}, r"eos_token_id must be in \[0, vocab_size=72\), got 99"),
        ({"eos_token_id": [65, 67]}, "eos_token_id must be another than mask_token_id, which never stays, got 67"),
        ({"pad_token_id": 67}, "pad_token_id must be another than mask_token_id, which never stays, got 67"),
        ({"logits_shift": None}, "logits_shift must be true or false, got None"),
        (
            {"attention": "block_causal", "block_size": 4, "causal_context": "yes"},
            "causal_context must be true or false",
        ),
        ({"attention": "causal"}, "attention must be one of full, block_causal, got 'causal'"),
        ({"attention": "block_causal"}, r"block_size must be in \[1, max_position_embeddings=128\] .* got None"),
        ({"attention": "block_causal", "block_size": 129}, "block_size must be in .* got 129"),
        ({"attention": "block_causal", "block_size": 0}, "block_size must be in .* got 0"),
        ({"attention": "block_causal", "block_size": True}, "block_size must be in .* got True"),
        ({"attention": "block_causal", "block_size": 4, "block_origin": "prompt"}, "block_origin must be one of text,"),
        ({"block_size": 4}, "say nothing with attention 'full'.* got block_size 4"),
        (
            {"block_origin": "answer"},
            "say nothing with attention 'full'.* got block_size None and block_origin 'answer'",
        ),
        ({"causal_context": True}, "causal_context true says nothing with attention 'full'"),
        ({"num_token_ids": 73}, r"num_token_ids must be in \[1, vocab_size=72\], got 73"),
    ],
)
def test_impossible_architectures_are_refused(tiny_config, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_a_setting_of_tokens_is_a_list_of_them():
    assert [token_ids(setting) for setting in (None, 0, [1, 2], (3,))] == [[], [0], [1, 2], [3]]


def test_a_text_starts_with_the_start_token_or_the_pad():
    for bos, pad, start in ((5, 6, 5), (0, 6, 0), (None, 6, 6), (None, None, None)):
        assert CoDAConfig(bos_token_id=bos, pad_token_id=pad).document_start_id == start
