"""save_hf_model.py: what it makes of exports and of autoregressive folders, and what it refuses."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import save_hf_model
from coda_eval.journal import hash_weights
from CoDALanguageModel import CoDAConfig, CoDALanguageModel, DiffusionGenerationConfig
from CoDALanguageModel.errors import UserError
from save_hf_model import Agreement, check_input, convert, main

CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 0,
}
# Head size other than hidden / heads; biases and tied embeddings as in Qwen2.5-0.5B; all biases and scaled RoPE.
FAMILIES = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16, "attention_bias": False}),
    "qwen3-bias": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16, "attention_bias": True}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    "llama": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
}


def make_tokenizer(special=CHATML, **named):
    """A byte-level tokenizer of 256 letters plus special tokens at the front, as the real families have them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256 + len(special), special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **({"eos_token": special[0]} if special else {}) | named)


def make_autoregressive(folder, family="qwen3", *, tokenizer=None, vocab_size=None, **changes):
    """Save a random model with visible norms and biases; give it."""
    model_class, config_class, settings = FAMILIES[family]
    tokenizer = tokenizer or make_tokenizer()
    config = config_class(vocab_size=vocab_size or len(tokenizer), **SHAPE | settings | changes)
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def make_export(folder, **changes):
    """Save what pre-training exports: weights, config and tokenizer, no code."""
    tokenizer = make_tokenizer([*CHATML, "<|mask|>"], eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    ids = {"mask_token_id": 3, "pad_token_id": 0, "eos_token_id": 2, "num_token_ids": 260}
    config = CoDAConfig(vocab_size=272, head_dim=8, **SHAPE | ids | changes)
    torch.manual_seed(0)
    model = CoDALanguageModel(config)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    tokenizer.save_pretrained(folder)
    return model.eval()


def logits_of(model, ids, **arguments):
    with torch.no_grad():
        return model(input_ids=ids, **arguments).logits


def make_loud(model, scale):
    """Scale the head of a model in memory until its logits reach `scale`."""
    ids = torch.arange(32).view(2, 16)
    with torch.no_grad():
        model.lm_head.weight *= scale / logits_of(model, ids).abs().max()
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_autoregressive_families_keep_their_logits_under_a_causal_mask(family, tmp_path):
    source = make_autoregressive(tmp_path / "source", family)
    convert(str(tmp_path / "source"), str(tmp_path / "coda"), check=False)
    model = CoDALanguageModel.from_pretrained(tmp_path / "coda").eval()
    ids = torch.arange(40).view(2, 20) * 5 + 3
    causal = torch.ones(2, 1, 20, 20, dtype=torch.bool).tril()
    difference = logits_of(model, ids, attention_mask=causal)[..., :259] - logits_of(source, ids)
    assert difference.abs().max() < 1e-5
    assert (logits_of(model, ids)[..., :259] - logits_of(source, ids)).abs().max() > 1e-2  # and it sees the future
    assert model.config.tie_word_embeddings == source.config.tie_word_embeddings


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_one_are_the_autoregressive_model_itself(family, tmp_path):
    source = make_autoregressive(tmp_path / "source", family)
    asked = {"attention": "block_causal", "block_size": 1}
    made = convert(str(tmp_path / "source"), str(tmp_path / "coda"), check=False, **asked)
    assert (made.config.attention, made.config.block_size, made.config.logits_shift) == ("block_causal", 1, True)
    model = CoDALanguageModel.from_pretrained(tmp_path / "coda").eval()
    ids = torch.arange(40).view(2, 20) * 5 + 3
    assert (logits_of(model, ids)[..., :259] - logits_of(source, ids)).abs().max() < 1e-5
    assert model.config.eos_token_id == [2, 0]  # the end of a turn, and of a document as in the source's config
    text = model.diffusion_generate(ids[:1], max_new_tokens=16, steps=16, temperature=0.0, alg_temp=None)
    wanted = source.generate(ids[:1], max_new_tokens=16, do_sample=False, eos_token_id=[0, 2], pad_token_id=0)
    assert text[0, : wanted.shape[1]].tolist() == wanted[0].tolist()


def test_larger_blocks_of_an_autoregressive_model_see_themselves_and_what_is_before_them(tmp_path):
    source = make_autoregressive(tmp_path / "source", "qwen2")
    asked = {"attention": "block_causal", "block_size": 4, "block_origin": "answer"}
    model = convert(str(tmp_path / "source"), str(tmp_path / "coda"), check=False, **asked).eval()
    ids, block = torch.arange(40).view(2, 20) * 5 + 3, torch.arange(20) // 4
    allowed = (block[:, None] >= block).expand(2, 1, -1, -1)
    assert (logits_of(model, ids)[..., :259] - logits_of(source, ids, attention_mask=allowed)).abs().max() < 1e-5
    assert model.config.block_origin == "answer"


def test_a_qwen2_folder_with_a_mask_token_attends_to_everything_and_is_shifted(tmp_path):
    tokenizer = make_tokenizer([*CHATML, "[M]"])  # as Open-dCoder is published
    tokenizer.add_special_tokens({"mask_token": "[M]"})
    source = make_autoregressive(tmp_path / "source", "qwen2", tokenizer=tokenizer)
    model = convert(str(tmp_path / "source"), str(tmp_path / "coda"), check=False).eval()
    assert (model.config.mask_token_id, model.config.attention, model.config.logits_shift) == (3, "full", True)
    ids = torch.arange(40).view(2, 20) * 5 + 3
    everything = torch.ones(2, 1, 20, 20, dtype=torch.bool)
    assert (logits_of(model, ids) - logits_of(source, ids, attention_mask=everything)).abs().max() < 1e-5


BLOCKS = {
    "attention": "block_causal",
    "block_size": 8,
    "block_origin": "answer",
    "causal_context": True,
    "logits_shift": False,
}


def test_a_coda_folder_keeps_its_blocks_contract_and_ends(tmp_path):
    make_export(tmp_path / "export", eos_token_id=[2, 0], **BLOCKS)
    for asked in ({}, {"attention": "block_causal", "block_size": 8, "block_origin": "answer"}):
        model = convert(str(tmp_path / "export"), str(tmp_path / "made"), check=False, overwrite=True, **asked)
        assert {name: getattr(model.config, name) for name in BLOCKS} == BLOCKS
        assert model.config.eos_token_id == model.generation_config.eos_token_id == [2, 0]
    for name, value in {"attention": "full", "block_size": 4, "block_origin": "text"}.items():
        message = f"--{name} must be .*, as config.json says, got {value}: .* model.{name} beside"
        with pytest.raises(ValueError, match=message):
            convert(str(tmp_path / "export"), str(tmp_path / "other"), **{name: value})
    make_export(tmp_path / "full")
    with pytest.raises(ValueError, match="--block_size must be left out, as config.json says, got 4"):
        convert(str(tmp_path / "full"), str(tmp_path / "other"), block_size=4)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"attention": "block_causal"}, "block_size must be given with --block_size"),
        ({"block_size": 4}, "go with --attention block_causal alone, got block_size 4"),
        ({"block_origin": "answer"}, "go with --attention block_causal alone, .* block_origin 'answer'"),
        ({"attention": "block_causal", "block_size": 0}, r"block_size must be in \[1, max_position_embeddings=128\]"),
        ({"attention": "block_causal", "block_size": 129}, "block_size must be in .* got 129"),
        ({"attention": "causal", "block_size": 4}, "attention must be one of full, block_causal, got 'causal'"),
    ],
)
def test_blocks_that_cannot_be_are_refused(asked, message, tmp_path):
    make_autoregressive(tmp_path / "source")
    with pytest.raises(ValueError, match=message):
        convert(str(tmp_path / "source"), str(tmp_path / "made"), check=False, **asked)
    assert os.listdir(tmp_path) == ["source"]


def test_sharded_folder_with_large_logits_converts_from_the_command_line_and_loads_alone(tmp_path):
    source = make_loud(make_autoregressive(tmp_path / "source", "qwen3", tie_word_embeddings=False), 40.0)
    (tmp_path / "source/model.safetensors").unlink()
    source.save_pretrained(tmp_path / "source", max_shard_size="40KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 1
    command = [sys.executable, save_hf_model.__file__, "--checkpoint_dir", tmp_path / "source", "--output_dir", "made"]
    done = subprocess.run([*command, "--dtype", "bfloat16"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "same as the source under a causal mask: max difference" in done.stdout
    assert "rounded to bfloat16: max difference" in done.stdout
    assert "loaded alone, same logits: max difference" in done.stdout
    made = tmp_path / "made"
    assert {"configuration_coda.py", "modeling_coda.py", "diffusion.py", "orders.py", "generation_coda.py"} <= {
        file.name for file in made.iterdir()
    }
    weights = load_file(made / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    assert os.stat(made / "model.safetensors").st_mode == os.stat(made / "config.json").st_mode
    assert sorted(os.listdir(tmp_path)) == ["made", "source"]  # no scratch folder is left


@pytest.mark.parametrize("tied", [True, False])
def test_export_gives_a_folder_with_the_same_weights_and_ids(tied, tmp_path):
    source = make_export(tmp_path / "export", tie_word_embeddings=tied)
    convert(str(tmp_path / "export"), str(tmp_path / "made"), check=False)
    model = CoDALanguageModel.from_pretrained(tmp_path / "made")
    assert model.config.tie_word_embeddings is tied
    for name, weight in source.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
    for name in ("vocab_size", "mask_token_id", "pad_token_id", "eos_token_id", "num_token_ids"):
        assert getattr(model.config, name) == getattr(source.config, name), name


def test_vocabulary_grows_by_the_mean_row_only_when_no_row_is_spare(tmp_path):
    source = make_autoregressive(tmp_path / "full", tie_word_embeddings=False)
    grown = convert(str(tmp_path / "full"), str(tmp_path / "grown"), check=False)
    assert (grown.config.vocab_size, grown.config.mask_token_id, grown.config.num_token_ids) == (260, 259, 260)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows, before = grown.state_dict()[name], source.state_dict()[name]
        assert torch.equal(rows[:259], before)
        torch.testing.assert_close(rows[259], before.mean(dim=0))

    make_autoregressive(tmp_path / "spare", vocab_size=300)
    spare = convert(str(tmp_path / "spare"), str(tmp_path / "kept"), check=False)
    assert (spare.config.vocab_size, spare.config.mask_token_id, spare.config.num_token_ids) == (300, 259, 260)


def test_tokens_and_template_are_completed_from_what_the_tokenizer_has(tmp_path):
    make_autoregressive(tmp_path / "source", tokenizer=make_tokenizer(eos_token="<|im_end|>", pad_token="<|im_end|>"))
    convert(str(tmp_path / "source"), str(tmp_path / "made"), check=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "made")
    assert (tokenizer.mask_token, tokenizer.pad_token, tokenizer.eos_token) == (
        "<|mask|>",
        "<|endoftext|>",
        "<|im_end|>",
    )
    messages = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_tokenizer_without_chat_or_padding_tokens_gets_a_pad_token_and_no_template(tmp_path):
    make_autoregressive(tmp_path / "source", "llama", tokenizer=make_tokenizer(["</s>"]))
    model = convert(str(tmp_path / "source"), str(tmp_path / "made"), check=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "made")
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.mask_token) == ("</s>", "<|pad|>", "<|mask|>")
    assert (model.config.eos_token_id, model.config.pad_token_id, model.config.mask_token_id) == (0, 258, 257)
    assert tokenizer.chat_template is None


def test_a_base_model_that_is_to_be_adapted_ends_where_its_checkpoint_says(tmp_path):
    # As Qwen's base models: documents end with <|endoftext|>, which is the padding too.
    tokenizer = make_tokenizer([*CHATML, "<|other|>"], eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    make_autoregressive(tmp_path / "source", "qwen2", tokenizer=tokenizer)
    (tmp_path / "source/generation_config.json").write_text(json.dumps({"eos_token_id": [0, 3]}))
    model = convert(str(tmp_path / "source"), str(tmp_path / "made"), check=False)
    assert model.config.pad_token_id == 0
    assert model.config.eos_token_id == model.generation_config.eos_token_id == [2, 0, 3]
    wants = {0: 1000.0}
    text = model.eval().diffusion_generate(torch.tensor([[5, 6]]), max_new_tokens=4, steps=4, logit_bias=wants)
    assert text[0, 2:].tolist() == [0] * 4
    plain = make_tokenizer(["</s>"])  # ends as its tokenizer and configuration say, with one token
    make_autoregressive(tmp_path / "llama", "llama", tokenizer=plain)
    assert convert(str(tmp_path / "llama"), str(tmp_path / "made-llama"), check=False).config.eos_token_id == 0


def test_minus_one_is_no_token(tmp_path):
    # As older conversions of Llama say that there is no padding; by blocks, padding ends an answer too.
    source = tmp_path / "llama"
    make_autoregressive(source, "llama", tokenizer=make_tokenizer(["</s>"]))
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(settings | {"pad_token_id": -1}))
    blocks = {"attention": "block_causal", "block_size": 1}
    assert convert(str(source), str(tmp_path / "made"), check=False, **blocks).config.eos_token_id == 0


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("pad", [-1, -300, 258, 32000])
def test_padding_without_a_row_gives_way_to_the_tokenizers_and_ends_nothing(family, pad, tmp_path):
    source = tmp_path / "source"
    make_autoregressive(source, family, tokenizer=make_tokenizer(["<|endoftext|>", "<pad>"], pad_token="<pad>"))
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(settings | {"pad_token_id": pad}))
    blocks = {"attention": "block_causal", "block_size": 1}  # by which padding ends an answer too
    config = convert(str(source), str(tmp_path / "made"), check=False, **blocks).config
    assert (config.pad_token_id, config.mask_token_id, config.eos_token_id) == (1, 258, [0, 1])


@pytest.mark.parametrize(
    ("name", "file", "value", "message"),
    [
        (
            "eos_token_id",
            "config.json",
            259,
            "config.json: eos_token_id must be in [0, 259), the rows of the",
        ),
        (
            "eos_token_id",
            "generation_config.json",
            [0, 259],
            "generation_config.json: eos_token_id must be in [0, 2",
        ),
        ("eos_token_id", "generation_config.json", "x", "generation_config.json: eos_token_id must be a token id, a l"),
        ("pad_token_id", "generation_config.json", 1.5, "generation_config.json: pad_token_id must be a token id, a l"),
    ],
)
def test_end_tokens_that_are_none_of_the_model_are_refused_by_file_and_name(name, file, value, message, tmp_path):
    make_autoregressive(tmp_path / "source")
    path = tmp_path / "source" / file  # 259 is the row that the mask token gets
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    blocks = {"attention": "block_causal", "block_size": 1}
    with pytest.raises(UserError, match=re.escape(message)):
        convert(str(tmp_path / "source"), str(tmp_path / "made"), check=False, **blocks)


def test_the_mask_token_is_no_other_one(tmp_path):
    make_autoregressive(tmp_path / "source")
    for token in ("<|im_end|>", "<|endoftext|>"):  # which end a turn, and a document
        with pytest.raises(UserError, match="eos_token_id must be another than mask_token_id, which never stays, got"):
            convert(str(tmp_path / "source"), str(tmp_path / "made"), check=False, mask_token=token)


def test_own_template_and_mask_token_are_kept(tmp_path):
    tokenizer = make_tokenizer([*CHATML, "[M]"], chat_template="{{ messages[0].content }}")
    tokenizer.add_special_tokens({"mask_token": "[M]"})
    make_autoregressive(tmp_path / "source", tokenizer=tokenizer)
    model = convert(str(tmp_path / "source"), str(tmp_path / "made"), check=False)
    made = AutoTokenizer.from_pretrained(tmp_path / "made")
    assert (made.mask_token, model.config.mask_token_id) == ("[M]", 3)
    assert made.chat_template == "{{ messages[0].content }}"


def test_decoding_defaults_are_the_published_ones_within_the_context(tmp_path):
    make_autoregressive(tmp_path / "source")
    convert(str(tmp_path / "source"), str(tmp_path / "made"), check=False)
    settings = DiffusionGenerationConfig.from_pretrained(tmp_path / "made")
    assert (settings.alg, settings.temperature, settings.top_p) == ("entropy", 0.1, 0.9)
    assert (settings.max_new_tokens, settings.steps) == (64, 64)  # half of the context of 128
    assert (settings.mask_token_id, settings.num_token_ids) == (259, 260)
    make_autoregressive(tmp_path / "long", max_position_embeddings=4096)
    long = convert(str(tmp_path / "long"), str(tmp_path / "made-long"), check=False)
    assert (long.generation_config.max_new_tokens, long.generation_config.steps) == (768, 768)


@pytest.mark.parametrize("eos", [None, [1, 2]])
def test_a_folder_of_ours_says_of_decoding_what_it_said(eos, tmp_path):
    make_export(tmp_path / "source")
    said = {"alg": "topk_margin", "temperature": 0.0, "max_new_tokens": 9, "steps": 5, "block_length": 64}
    said |= {} if eos is None else {"eos_token_id": eos}
    DiffusionGenerationConfig(**said).save_pretrained(tmp_path / "source")
    convert(str(tmp_path / "source"), str(tmp_path / "made"))
    config = CoDAConfig.from_pretrained(tmp_path / "made")
    made = DiffusionGenerationConfig.from_pretrained(tmp_path / "made")
    assert {name: getattr(made, name) for name in said} == said
    assert made.eos_token_id == (eos or config.eos_token_id)
    assert (made.mask_token_id, made.num_token_ids) == (config.mask_token_id, config.num_token_ids)
    convert(str(tmp_path / "made"), str(tmp_path / "again"), check=False)
    file = "generation_config.json"
    assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "made" / file).read_bytes()


def test_inactive_sliding_window_converts_and_an_active_one_is_refused(tmp_path):
    make_autoregressive(tmp_path / "off", sliding_window=8, use_sliding_window=False)
    convert(str(tmp_path / "off"), str(tmp_path / "made"), check=False)
    make_autoregressive(tmp_path / "on", sliding_window=8, use_sliding_window=True, max_window_layers=1)
    with pytest.raises(ValueError, match="sliding windows must be off .* got 1 of 2 layers with sliding_attention"):
        convert(str(tmp_path / "on"), str(tmp_path / "refused"), check=False)
    assert not (tmp_path / "refused").exists()


def test_errors_name_the_setting_and_leave_nothing_behind(tmp_path, capsys):
    assert main(["--checkpoint_dir", str(tmp_path / "absent"), "--output_dir", str(tmp_path / "made")]) == 1
    assert "--checkpoint_dir must be a folder or a .gguf file, got" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="must hold a config.json or one .gguf file"):
        convert(str(tmp_path / "empty"), str(tmp_path / "made"))
    make_autoregressive(tmp_path / "source")
    with pytest.raises(ValueError, match="--tokenizer must be a folder"):
        convert(str(tmp_path / "source"), str(tmp_path / "made"), tokenizer_dir=str(tmp_path / "absent"))
    (tmp_path / "source/tokenizer.json").unlink()
    with pytest.raises(ValueError, match="holds no tokenizer .* name its folder with --tokenizer"):
        convert(str(tmp_path / "source"), str(tmp_path / "made"))
    assert sorted(os.listdir(tmp_path)) == ["empty", "source"]


def test_unsupported_type_lists_the_supported_ones(tmp_path):
    AutoConfig.for_model("gpt2", n_layer=1, n_head=2, n_embd=32).save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="model_type must be one of CoDA, qwen3, qwen2, llama, .*llada, got 'gpt2'"):
        convert(str(tmp_path / "source"), str(tmp_path / "made"))


def test_a_model_with_code_of_its_own_is_refused_by_its_type_without_a_question(tmp_path, monkeypatch):
    source = tmp_path / "source"
    make_autoregressive(source)
    config = json.loads((source / "config.json").read_text())
    config |= {"model_type": "unheard-of", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (source / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda text="": pytest.fail(f"asked: {text}"))
    with pytest.raises(
        ValueError, match="model_type must be one of CoDA, qwen3, qwen2, llama, .*llada, got 'unheard-of'"
    ):
        convert(str(source), str(tmp_path / "made"))
    (source / "model.safetensors").unlink()  # as the folder of a tokenizer it is good
    make_autoregressive(tmp_path / "plain")
    convert(str(tmp_path / "plain"), str(tmp_path / "made"), tokenizer_dir=str(source), check=False)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": [None, "own.OwnTokenizer"]}
    settings["tokenizer_class"] = "OwnTokenizer"
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="holds no tokenizer that loads without code of its own"):
        convert(str(tmp_path / "plain"), str(tmp_path / "other"), tokenizer_dir=str(source), check=False)


@pytest.mark.parametrize("fault", ["missing", "unexpected", "misshapen"])
@pytest.mark.parametrize("kind", ["autoregressive", "export"])
def test_weights_that_do_not_fit_are_refused(kind, fault, tmp_path):
    source = tmp_path / "source"
    make_autoregressive(source) if kind == "autoregressive" else make_export(source)
    weights = load_file(source / "model.safetensors")
    if fault == "missing":
        del weights["model.layers.1.mlp.up_proj.weight"]
    elif fault == "unexpected":
        weights["model.layers.2.mlp.up_proj.weight"] = torch.ones(48, 32)
    else:
        weights["model.layers.1.mlp.up_proj.weight"] = torch.ones(40, 32)
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit its config"):
        convert(str(source), str(tmp_path / "made"), check=False)
    assert os.listdir(tmp_path) == ["source"]


def test_tokenizer_must_fit_the_model(tmp_path):
    make_export(tmp_path / "export")
    make_tokenizer([*CHATML, "<|mask|>"] + [f"<{i}>" for i in range(20)]).save_pretrained(tmp_path / "large")
    with pytest.raises(ValueError, match=r"more ids than the model has rows \(272\), got 280"):
        convert(str(tmp_path / "export"), str(tmp_path / "made"), tokenizer_dir=str(tmp_path / "large"))
    make_tokenizer(CHATML).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="mask_token_id must be 3, which the model was trained with, got 259"):
        convert(str(tmp_path / "export"), str(tmp_path / "made"), tokenizer_dir=str(tmp_path / "other"))


def test_a_folder_in_use_is_replaced_only_when_asked(tmp_path):
    make_autoregressive(tmp_path / "source")
    made = tmp_path / "made"
    made.mkdir()
    (made / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="--output_dir must be new or empty"):
        convert(str(tmp_path / "source"), str(made), check=False)
    assert (made / "notes.txt").read_text() == "mine"
    convert(str(tmp_path / "source"), str(made), overwrite=True, check=False)
    assert not (made / "notes.txt").exists()
    assert (made / "config.json").exists()


def test_a_link_to_the_folder_stays_one(tmp_path):
    make_export(tmp_path / "source")
    for name in ("there", "not yet"):
        (tmp_path / name).symlink_to(tmp_path / f"disk {name}")
    (tmp_path / "disk there").mkdir()
    for name in ("there", "not yet", "there"):
        convert(str(tmp_path / "source"), str(tmp_path / name), check=False, overwrite=True)
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / f"disk {name}" / "config.json").is_file()
    assert sorted(os.listdir(tmp_path)) == ["disk not yet", "disk there", "not yet", "source", "there"]


@pytest.mark.parametrize(
    ("handler", "status", "said"), [(signal.SIG_DFL, 130, "^interrupted$"), (signal.SIG_IGN, 1, "ImportError")]
)
def test_ctrl_c_during_the_imports_is_told_in_a_word_and_ignored_under_nohup(repo, tmp_path, handler, status, said):
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise ImportError")
    done = subprocess.run(
        [sys.executable, str(repo / "save_hf_model.py"), "--help"],
        preexec_fn=lambda: signal.signal(signal.SIGINT, handler),
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (status, "")
    assert re.search(said, done.stderr.strip())


def test_a_folder_never_takes_the_place_of_one_that_holds_its_source(tmp_path, monkeypatch):
    make_autoregressive(tmp_path / "run" / "source")
    (tmp_path / "run" / "model.gguf").write_bytes(b"GGUF")
    for given in ("source", "model.gguf"):
        checkpoint = str(tmp_path / "run" / given)
        with pytest.raises(UserError, match=f"--output_dir .*run' holds --checkpoint_dir .*{given}', and would take"):
            convert(checkpoint, str(tmp_path / "run"), overwrite=True, check=False)
    assert sorted(os.listdir(tmp_path / "run")) == ["model.gguf", "source"]
    (tmp_path / "made").mkdir()
    monkeypatch.chdir(tmp_path / "made")
    convert(str(tmp_path / "run" / "source"), ".", check=False)
    assert (tmp_path / "made" / "config.json").exists()


def test_a_full_disk_leaves_the_old_folder_and_no_half_of_a_new_one(tmp_path, monkeypatch):
    make_autoregressive(tmp_path / "source")
    convert(str(tmp_path / "source"), str(tmp_path / "made"), check=False)
    before = {file.name: file.read_bytes() for file in (tmp_path / "made").iterdir()}

    def full(self, folder, **kwargs):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(CoDALanguageModel, "save_pretrained", full)
    with pytest.raises(ValueError, match="no space left for --output_dir"):
        convert(str(tmp_path / "source"), str(tmp_path / "made"), overwrite=True, check=False)
    assert {file.name: file.read_bytes() for file in (tmp_path / "made").iterdir()} == before
    assert sorted(os.listdir(tmp_path)) == ["made", "source"]


def test_a_folder_that_does_not_load_alone_is_refused(tmp_path, monkeypatch):
    make_export(tmp_path / "export")
    save = CoDALanguageModel.save_pretrained

    def without_a_sibling(self, folder, **kwargs):
        save(self, folder, **kwargs)
        (folder / "orders.py").unlink()

    monkeypatch.setattr(CoDALanguageModel, "save_pretrained", without_a_sibling)
    with pytest.raises(ValueError, match="does not load on its own"):
        convert(str(tmp_path / "export"), str(tmp_path / "made"))
    assert os.listdir(tmp_path) == ["export"]


def test_a_folder_that_computes_something_else_than_the_model_is_refused(tmp_path, monkeypatch):
    make_export(tmp_path / "export")
    save = CoDALanguageModel.save_pretrained

    def changed(self, folder, **kwargs):
        save(self, folder, **kwargs)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))

    monkeypatch.setattr(CoDALanguageModel, "save_pretrained", changed)
    with pytest.raises(ValueError, match="gives other logits when loaded: max difference"):
        convert(str(tmp_path / "export"), str(tmp_path / "made"))


def one_weight_wrong(weights):
    weights["model.layers.1.self_attn.v_proj.weight"][0, 0] += 0.25


def layers_swapped(weights):
    for name in [name for name in weights if name.startswith("model.layers.0.")]:
        other = name.replace("layers.0", "layers.1")
        weights[name], weights[other] = weights[other].clone(), weights[name].clone()


def row_out_of_sight_wrong(weights):
    seen = {*check_input(260).flatten().tolist(), 259}  # 259 is the mask
    weights["model.embed_tokens.weight"][min(set(range(260)) - seen)] += 1


@pytest.mark.parametrize("fault", [one_weight_wrong, layers_swapped, row_out_of_sight_wrong])
def test_wrong_weights_are_refused_whether_built_or_written(fault, tmp_path, monkeypatch):
    source = make_loud(make_autoregressive(tmp_path / "source", tie_word_embeddings=False), 40.0)
    source.save_pretrained(tmp_path / "source")
    save, build = CoDALanguageModel.save_pretrained, save_hf_model.build_model

    def save_wrong(self, folder, **kwargs):
        save(self, folder, **kwargs)
        weights = load_file(folder / "model.safetensors")
        fault(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    def build_wrong(*arguments):
        model = build(*arguments)
        weights = {name: weight.clone() for name, weight in model.state_dict().items()}
        fault(weights)
        model.load_state_dict(weights, assign=True)  # the source shares the old ones
        return model

    with monkeypatch.context() as patch:
        patch.setattr(CoDALanguageModel, "save_pretrained", save_wrong)
        with pytest.raises(ValueError, match="what was written holds another model"):
            convert(str(tmp_path / "source"), str(tmp_path / "made"), dtype="bfloat16")
    if fault is not row_out_of_sight_wrong:
        monkeypatch.setattr(save_hf_model, "build_model", build_wrong)
        with pytest.raises(ValueError, match="logits differ from the source's under a causal mask; nothing written"):
            convert(str(tmp_path / "source"), str(tmp_path / "made"), dtype="bfloat16")
    assert os.listdir(tmp_path) == ["source"]


def test_agreement_lets_no_nan_pass():
    logits = torch.randn(2, 5)
    assert Agreement.of(logits, logits).is_equal
    for broken in (float("nan"), float("inf")):
        wrong = logits.clone()
        wrong[0, 0] = broken
        assert not Agreement.of(wrong, logits).is_equal
        assert not Agreement.of(wrong, wrong).is_equal
    assert not Agreement.of(logits + torch.tensor([1e-2, 0, 0, 0, 0]), logits).is_equal


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["autoregressive", "export"])
def test_weights_that_are_not_finite_are_refused_by_name(kind, value, tmp_path):
    source = tmp_path / "source"
    make_autoregressive(source) if kind == "autoregressive" else make_export(source)
    weights = load_file(source / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 4] = value
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"source.*: weights are not finite: model\.layers\.0\.mlp\.up_proj\.weight$"):
        convert(str(source), str(tmp_path / "made"), check=False)
    assert os.listdir(tmp_path) == ["source"]


def test_a_weight_beyond_float16_is_refused_by_name(tmp_path):
    source = make_autoregressive(tmp_path / "source")
    with torch.no_grad():
        source.model.layers[1].mlp.down_proj.weight[0, 0] = 70000.0
    source.save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=r"--dtype float16 ends at 6.55e\+04: .* model.layers.1.mlp.down_proj.weight"):
        convert(str(tmp_path / "source"), str(tmp_path / "made"), dtype="float16", check=False)
    convert(str(tmp_path / "source"), str(tmp_path / "made"), dtype="bfloat16", check=False)


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 3441185608\n"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pointer", "model.safetensors' is a Git LFS pointer"),
        ("cut", "model.safetensors' is not a whole safetensors file"),
        ("empty", "model.safetensors' is not a whole safetensors file"),
        ("quantised", "quantised weights are not supported: .*config.json' says quant_method 'awq'"),
        ("tokenizer", "tokenizer.json' is a Git LFS pointer"),
        ("tokenizer cut", "tokenizer.json' is not valid JSON"),
        ("tokenizer empty", "source' holds no tokenizer that loads without code of its own: KeyError: 'added_tokens'"),
        ("shard", "model-2.safetensors' is missing, which its index names"),
        ("gguf", "model.gguf' is not a GGUF file"),
        ("gguf cut", "model.gguf' is not a whole GGUF file"),
        ("gguf pointer", "model.gguf' is a Git LFS pointer"),
    ],
)
def test_broken_files_are_named_in_one_line(name, message, tmp_path, capsys):
    source = tmp_path / "source"
    make_autoregressive(source)
    weights, config = source / "model.safetensors", source / "config.json"
    if name == "cut":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size * 2 // 3])
    elif name == "empty":
        weights.write_bytes(b"")
    elif name == "pointer":
        weights.write_text(LFS_POINTER)
    elif name == "tokenizer":
        (source / "tokenizer.json").write_text(LFS_POINTER)
    elif name == "tokenizer cut":
        (source / "tokenizer.json").write_text((source / "tokenizer.json").read_text()[:-99])
    elif name == "tokenizer empty":
        (source / "tokenizer.json").write_text("{}")
    elif name == "quantised":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "awq"}}))
    elif name == "shard":
        weights.rename(source / "model-1.safetensors")
        index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        config.unlink()
        content = {"gguf": b"no", "gguf cut": b"GGUF" + bytes(16), "gguf pointer": LFS_POINTER.encode()}[name]
        (source / "model.gguf").write_bytes(content)
    assert main(["--checkpoint_dir", str(source), "--output_dir", str(tmp_path / "made")]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("save_hf_model.py: error: ")
    assert re.search(message, error), error
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.usefixtures("as_in_a_terminal")
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stop_at_any_point_leaves_the_old_folder_or_the_new_one(stop, tmp_path, monkeypatch):
    make_autoregressive(tmp_path / "source")
    made = tmp_path / "deep/made"
    arguments = ["--checkpoint_dir", str(tmp_path / "source"), "--output_dir", str(made), "--overwrite"]
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}

    def stopping(function):
        def call(*arguments, **kwargs):
            result = function(*arguments, **kwargs)
            os.kill(os.getpid(), stop)
            return result

        return call

    monkeypatch.setattr(save_hf_model, "check_folder", stopping(lambda *_: None))
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 128 + stop
    assert os.listdir(tmp_path) == ["source"]

    made.mkdir(parents=True)
    (made / "notes.txt").write_text("mine")
    for point, owner in [("check_folder", save_hf_model), ("save_pretrained", CoDALanguageModel), ("rename", Path)]:
        with monkeypatch.context() as patch:
            patch.setattr(save_hf_model, "check_folder", lambda *_: None)
            patch.setattr(owner, point, stopping(getattr(owner, point)))
            with pytest.raises(SystemExit):
                main(arguments)
        assert os.listdir(tmp_path / "deep") == ["made"], point
        assert [file.name for file in made.iterdir()] == ["notes.txt"], point
    assert {number: signal.getsignal(number) for number in before} == before


def test_command_line_flags_are_stable(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    usage = capsys.readouterr().out
    flags = ("--checkpoint_dir", "--output_dir", "--tokenizer", "--dtype", "--mask_token", "--overwrite")
    flags += ("--attention", "--block_size", "--block_origin")
    hub = ("--push_to_hub", "--dry_run", "--private", "--license", "--backbone", "--data", "--stage", "--scores")
    for flag in (*flags, *hub):
        assert flag in usage


@pytest.mark.slow
def test_smollm2_keeps_its_logits_and_its_greedy_text(tmp_path):
    folder = os.environ.get("CODA_SMOLLM2")
    if not folder:
        pytest.skip("CODA_SMOLLM2 must name the folder with SmolLM2's GGUF file")
    convert(folder, str(tmp_path / "made"))
    (gguf_file,) = (name for name in os.listdir(folder) if name.endswith(".gguf"))
    source = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=torch.float32).eval()
    model = CoDALanguageModel.from_pretrained(tmp_path / "made").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "made")
    messages = [{"role": "user", "content": "Write a Python function that adds two numbers."}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    prompt_length = ids.shape[1]
    ids = source.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    causal = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    logits = logits_of(model, ids, attention_mask=causal)[..., : source.config.vocab_size]
    difference = (logits - logits_of(source, ids)).abs().max().item()
    print(f"max difference {difference:.2e}; text {tokenizer.decode(ids[0, prompt_length:])!r}")
    assert difference < 1e-3
    # Each greedy token is the best one after the tokens before it, so the greedy texts are equal.
    assert torch.equal(logits[:, prompt_length - 1 : -1].argmax(dim=-1), ids[:, prompt_length:])
    shutil.rmtree(tmp_path / "made")


# ---- uploads

PUSH = ["--push_to_hub", "someone/coda-tiny", "--license", "apache-2.0", "--backbone", "Qwen/Qwen3-1.7B=apache-2.0"]
PUSH += ["--data", "bigcode/the-stack-v2=other", "own notes=cc-by-4.0"]
RUN = """\
max_steps: 300
global_batch_size: 8
seq_len: 256
objective: masked
model: {init_from: null}
data: {sources: [{path: stack, weight: 2.0}, {path: wiki, weight: null}]}
optimizer: {name: adafactor, learning_rate: 0.0003}
schedule: {name: linear}
"""
TUNING = """\
stage: sft
finetuning_type: full
dataset: opencoder
cutoff_len: 1024
num_train_epochs: 10
per_device_train_batch_size: 22
learning_rate: 2.0e-05
lr_scheduler_type: cosine
output_dir: /home/someone/out
"""


class FakeHub:
    """Stands for `HfApi`: remembers what is asked of it."""

    def __init__(self):
        self.calls, self.files = [], {}

    def __call__(self):
        return self

    def whoami(self):
        self.calls.append("whoami")

    def create_repo(self, repo_id, **options):
        self.calls.append(("create_repo", repo_id, options))

    def upload_folder(self, *, repo_id, folder_path, **options):
        self.calls.append(("upload_folder", repo_id))
        self.files = {file.name: file.read_bytes() for file in folder_path.iterdir()}


@pytest.fixture
def hub(monkeypatch):
    hub = FakeHub()
    monkeypatch.setattr(save_hf_model, "HfApi", hub)
    monkeypatch.setattr(save_hf_model, "check_folder", lambda *arguments: None)  # has tests of its own
    return hub


@pytest.fixture
def adapted(tmp_path):
    """A model that may be uploaded, with its runs and the scores of the evaluation."""
    make_export(tmp_path / "export")
    (tmp_path / "config.yaml").write_text(RUN)
    (tmp_path / "run_config.yaml").write_text(TUNING)
    card = {"task": "coda_humaneval", "metric": "pass@1", "filter": "run", "score": 0.25, "n": 164}
    card |= {"wilson95": [0.19, 0.32], "isolation": "bubblewrap"}
    card |= {"settings": {"generation_settings": {"steps": 64}}}
    card |= {"hashes": {"weights": hash_weights({"pretrained": str(tmp_path / "export")})}}
    (tmp_path / "scores.json").write_text(json.dumps([card]))
    return tmp_path


def push(folder, *more):
    files = [str(folder / name) for name in ("config.yaml", "run_config.yaml", "scores.json")]
    known = ["--checkpoint_dir", str(folder / "export"), *PUSH, "--stage", *files[:2], "--scores", files[2]]
    return save_hf_model.main([*known, *more])


def test_a_dry_run_writes_exactly_what_is_uploaded(adapted, hub):
    assert push(adapted, "--output_dir", str(adapted / "dry"), "--dry_run") == 0
    assert hub.calls == []
    assert push(adapted, "--output_dir", str(adapted / "wet"), "--private") == 0
    assert hub.calls == [
        "whoami",
        ("create_repo", "someone/coda-tiny", {"private": True, "exist_ok": True}),
        ("upload_folder", "someone/coda-tiny"),
    ]
    assert hub.files == {file.name: file.read_bytes() for file in (adapted / "dry").iterdir()}
    names = {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert names | {"modeling_coda.py", "tokenizer_config.json"} <= hub.files.keys()


def test_a_model_card_says_what_configuration_runs_and_score_cards_say(adapted, hub):
    assert push(adapted, "--output_dir", str(adapted / "made"), "--dry_run") == 0
    text = (adapted / "made/README.md").read_text()
    facts = ModelCard(text).data
    assert (facts.license, facts.base_model, facts.pipeline_tag) == ("apache-2.0", "Qwen/Qwen3-1.7B", "text-generation")
    assert facts.datasets == ["bigcode/the-stack-v2"]
    for line in (
        "| heads for queries, for keys and values, size of each | 4, 2, 8 |",
        "| attention | full |",
        "| `temperature` | `0.1` |",
        "| 1 | masked from random weights | stack (2), wiki | 300 steps | 8 x 256 | adafactor, linear, 0.0003 |",
        "| 2 | fine-tuning (full) | opencoder | 10 epochs | 22 a device x 1024 | cosine, 2e-05 |",
        "| coda_humaneval | pass@1 | 25.0 % | 19.0 to 32.0 | 164 | steps=64 | bubblewrap |",
        "| backbone | Qwen/Qwen3-1.7B | apache-2.0 |",
        "| data | own notes | cc-by-4.0 |",
    ):
        assert line in text.splitlines(), line
    assert "/home/someone" not in text
    assert str(adapted) not in text


def test_a_hub_that_cannot_be_reached_is_told_and_the_folder_stays(adapted, hub, monkeypatch, capsys):
    def unreachable(*_, **__):
        raise httpx.ConnectError("[Errno 111] Connection refused")

    monkeypatch.setattr(hub, "upload_folder", unreachable)
    assert push(adapted, "--output_dir", str(adapted / "made")) == 1
    assert (adapted / "made" / "README.md").is_file()
    monkeypatch.setattr(hub, "whoami", unreachable)
    assert push(adapted, "--output_dir", str(adapted / "other")) == 1
    assert not (adapted / "other").exists()
    said = "save_hf_model.py: error: the Hub cannot be reached: [Errno 111] Connection refused\n"
    assert capsys.readouterr().err.count(said) == 2


def test_a_name_stays_in_its_cell_of_the_card(adapted, hub):
    (adapted / "run_config.yaml").write_text(
        TUNING.replace("opencoder", '"open\\n\\n## Scores\\n| a"').replace("2.0e-05", "2e-5")
    )
    names = ["--data", "x\n---\nlicense: mit=other", "a\\|b=mit"]
    assert push(adapted, "--output_dir", str(adapted / "made"), "--dry_run", *names) == 0
    text = (adapted / "made/README.md").read_text()
    assert "| 2 | fine-tuning (full) | open ## Scores \\| a | 10 epochs | 22 a device x 1024 | cosine, 2e-05 |" in text
    assert "| data | x --- license: mit | other |\n| data | a\\\\\\|b | mit |" in text
    assert ModelCard(text).data.license == "apache-2.0"


WRONG_CARDS = (
    *({"score": score} for score in (None, "0.5", True, float("nan"), float("inf"), 10**400, 50, -0.1)),
    *({"n": n} for n in (0, -3, 2.5, "many", True)),
    *({"wilson95": bounds} for bounds in ([0.1], [0.1, 0.2, 0.3], "ab", ["a", "b"], [0.9, 0.1], [0.1, float("nan")])),
    {"wilson95": [19, 32]},
    {"task": None},
    {"metric": {"name": "pass@1"}},
    {"settings": None},
)


def test_scores_of_other_weights_and_files_of_another_kind_are_refused(adapted, hub, capsys):
    cards = json.loads((adapted / "scores.json").read_text())
    cards[0]["hashes"]["weights"] = "0" * 24
    (adapted / "scores.json").write_text(json.dumps(cards))
    assert push(adapted, "--output_dir", str(adapted / "made"), "--dry_run") == 1
    assert "coda_humaneval was scored with other weights or another configuration" in capsys.readouterr().err
    for other in ({"results": {}}, [], *([cards[0] | wrong] for wrong in WRONG_CARDS)):
        (adapted / "scores.json").write_text(json.dumps(other))
        assert push(adapted, "--output_dir", str(adapted / "made"), "--dry_run") == 1
        assert "--scores must be a scores.json of evaluation, got" in capsys.readouterr().err
    wrong = ("dataset: opencoder\n", "opencoder", "[1]", TUNING.replace("2.0e-05", "much"))
    for text in (*wrong, RUN.replace("weight: 2.0", "weight: [2]"), "[" * 5000):
        (adapted / "run_config.yaml").write_text(text)
        assert push(adapted, "--output_dir", str(adapted / "made"), "--dry_run") == 1
        assert "--stage must be the config.yaml of a pre-training run or" in capsys.readouterr().err
    assert not (adapted / "made").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (PUSH[:2], "--push_to_hub needs --license (of the weights)"),
        (PUSH[:4], "--push_to_hub needs --backbone (with its licence, or none)"),
        (PUSH[:6], "--push_to_hub needs --data (with their licences)"),
        (
            [*PUSH[:3], "Apache 2.0", *PUSH[4:]],
            "--license must be an identifier of the Hub, such as apache-2.0, mit or",
        ),
        ([*PUSH[:5], "Qwen3", *PUSH[6:]], "--backbone must be NAME=LICENCE, got 'Qwen3'"),
        (["--push_to_hub", "coda-tiny", *PUSH[2:]], "--push_to_hub must be OWNER/NAME, got 'coda-tiny'"),
        (["--push_to_hub", "a/b/c", *PUSH[2:]], "--push_to_hub must be OWNER/NAME, got 'a/b/c'"),
        (["--dry_run"], "--dry_run goes with --push_to_hub OWNER/NAME"),
        (PUSH[2:4], "--license goes with --push_to_hub OWNER/NAME"),
    ],
)
def test_an_upload_that_says_too_little_is_refused_before_anything_is_loaded(tmp_path, hub, capsys, arguments, message):
    folders = ["--checkpoint_dir", str(tmp_path / "none"), "--output_dir", str(tmp_path / "made")]
    assert save_hf_model.main([*folders, *arguments]) == 1
    assert message in capsys.readouterr().err
    assert hub.calls == []
