"""What a run starts from: an autoregressive folder as it is, with the loss of its weights on record."""

import json

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from coda_pretrain.checkpoints.export import main as export_main
from coda_pretrain.config import RunConfig
from coda_pretrain.plain_data import from_dict, merge
from coda_pretrain.train.start import coda_config, initial_model, load_tokenizer_folder
from coda_pretrain.train.trainer import Trainer
from coda_pretrain.watch.metrics import read_rows
from CoDALanguageModel import CoDALanguageModel

from .conftest import FAMILIES, SHAPE, autoregressive_folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_starts_from_an_autoregressive_folder_and_reports_its_loss(tmp_path, run_config, family):
    source = autoregressive_folder(tmp_path / "source", family)
    (tmp_path / "source/generation_config.json").write_text('{"eos_token_id": [256, 5]}')
    model = {"init_from": str(tmp_path / "source"), "tokenizer": str(tmp_path / "source"), "config": None}
    config = merge(run_config, {"model": model, "max_steps": 2, "metrics": {"every": 2}})
    trainer = Trainer(from_dict(RunConfig, config))
    ids = torch.arange(32).view(2, 16)
    causal = torch.ones(1, 1, 16, 16, dtype=torch.bool).tril().expand(2, -1, -1, -1)
    network = trainer.functions.model
    with torch.no_grad():
        torch.testing.assert_close(network(ids, attention_mask=causal).logits, source(ids).logits, rtol=1e-4, atol=1e-5)
        changed_end = torch.cat([ids[:, :-1], ids[:, :1]], dim=1)
        assert not torch.allclose(network(ids).logits[:, 0], network(changed_end).logits[:, 0])  # both directions
    trainer.train()
    trainer.close()
    assert (network.config.mask_token_id, network.config.vocab_size) == (257, 272)
    assert {256, 5} <= set(network.config.eos_token_id)  # answers end where the checkpoint's do
    first = read_rows(trainer.output_dir / "metrics.jsonl")[0]
    assert first.keys() == {"step", "initial_loss"}
    assert (first["step"], 0 < first["initial_loss"] < 20) == (0, True)
    assert export_main(["--checkpoint_dir", str(tmp_path / "run"), "--output_dir", str(tmp_path / "export")]) == 0
    exported = CoDALanguageModel.from_pretrained(tmp_path / "export")
    assert AutoTokenizer.from_pretrained(tmp_path / "export").mask_token_id == exported.config.mask_token_id == 257


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_that_grows_from_one_begins_at_the_autoregressive_loss_exactly(tmp_path, run_config, family):
    """The loss of the first step is the model's own: over its tokens, as `labels` gives it, not over all positions."""
    source = autoregressive_folder(tmp_path / "source", family)
    model = {"init_from": str(tmp_path / "source"), "tokenizer": str(tmp_path / "source"), "config": None}
    model |= {"attention": "block_causal", "block_size": 8, "block_origin": "answer"}
    run = {"objective": "block", "blocks": {"growth_steps": 3}, "model": model, "max_steps": 1, "masking": None}
    config = merge(run_config, {**run, "schedule": {"warmup_steps": 0}})
    config["masking"] = {}
    trainer = Trainer(from_dict(RunConfig, config))
    batch = trainer.batches.make(0)
    trainer.train()
    trainer.close()
    ids, segments = (torch.from_numpy(batch[name][:, 32:]) for name in ("noised_ids", "segment_ids"))
    total = 0.0
    with torch.no_grad():
        for row, segment in zip(ids, segments, strict=True):
            for number in range(1, int(segment.max()) + 1):
                text = row[segment == number][None]
                if text.shape[1] > 1:
                    total += float(source(text, labels=text).loss) * (text.shape[1] - 1)
    rows = read_rows(trainer.output_dir / "metrics.jsonl")
    assert rows[0]["initial_loss"] == pytest.approx(total / (8 * 32), abs=1e-5)
    assert rows[1]["block_size"] == 1
    assert export_main(["--checkpoint_dir", str(tmp_path / "run"), "--output_dir", str(tmp_path / "export")]) == 0
    exported = CoDALanguageModel.from_pretrained(tmp_path / "export").config
    assert (exported.attention, exported.block_size, exported.block_origin) == ("block_causal", 8, "answer")


def test_the_row_of_step_0_is_written_once(tmp_path, run_config):
    autoregressive_folder(tmp_path / "source", "qwen3")
    model = {"init_from": str(tmp_path / "source"), "tokenizer": str(tmp_path / "source"), "config": None}
    config = merge(run_config, {"model": model, "checkpoint": {"every": 1}, "schedule": {"warmup_steps": 0}})
    for steps in (2, 3):
        trainer = Trainer(from_dict(RunConfig, {**config, "max_steps": steps}))
        trainer.train()
        trainer.close()
    assert [row["step"] for row in read_rows(trainer.output_dir / "metrics.jsonl")] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model_type": "gpt2"}, "must be a folder of type CoDA, qwen3, qwen2, llama, got model_type 'gpt2'"),
        ({"model_type": "sdar"}, "is of the SDAR family: convert it with save_hf_model.py"),
        (
            {"model_type": "qwen3", "dlm_type": "llada"},
            "is of the Efficient-DLM family: convert it with save_hf_model.py",
        ),
        (None, "no model folder"),
    ],
)
def test_a_run_cannot_start_from_another_kind_of_folder(run_config, tmp_path, content, message):
    folder = tmp_path / "other"
    folder.mkdir()
    if content:
        (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        Trainer(from_dict(RunConfig, merge(run_config, {"model": {"init_from": str(folder), "config": None}})))


def test_a_folder_may_be_given_other_attention_than_it_has(tmp_path, run_config, tokenizer_dir):
    fields, tokenizer = run_config["model"]["config"], load_tokenizer_folder(str(tokenizer_dir))
    blocks = {"attention": "block_causal", "block_size": 4, "block_origin": "answer", "causal_context": True}
    for name, facts in (("full", {}), ("blocks", blocks)):
        CoDALanguageModel(coda_config({**fields, **facts}, tokenizer)).save_pretrained(tmp_path / name)

    def start(folder, **facts):
        start = {"init_from": str(tmp_path / folder), "config": None, **facts}
        config = initial_model(from_dict(RunConfig, merge(run_config, {"model": start})).model, seed=0).config
        return config.attention, config.block_size, config.block_origin, config.causal_context

    assert start("blocks") == ("block_causal", 4, "answer", True)
    assert start("blocks", block_size=8) == ("block_causal", 8, "answer", True)
    assert start("blocks", attention="full") == ("full", None, "text", False)
    assert start("full", attention="block_causal", block_size=2) == ("block_causal", 2, "text", False)
    with pytest.raises(ValueError, match="block_size must be in .* got None"):
        start("full", attention="block_causal")
    with pytest.raises(ValueError, match="say nothing with attention 'full'.* got block_size 2"):
        start("full", block_size=2)


def test_a_folder_with_broken_weights_starts_no_run(run_config, tmp_path, tokenizer_dir):
    config = merge(run_config, {"model": {"init_from": str(tmp_path / "start"), "config": None}})
    model = from_dict(RunConfig, config).model
    shape = coda_config(run_config["model"]["config"], load_tokenizer_folder(str(tokenizer_dir)))
    start = CoDALanguageModel(shape)
    with torch.no_grad():
        start.model.layers[0].mlp.up_proj.weight[1, 1] = float("nan")
    start.save_pretrained(tmp_path / "start")
    with pytest.raises(
        ValueError, match=r"model\.init_from .*start.*not finite: model\.layers\.0\.mlp\.up_proj\.weight$"
    ):
        initial_model(model, seed=0)
    (tmp_path / "start/model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"model\.init_from .*model.safetensors' is a Git LFS pointer"):
        initial_model(model, seed=0)


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(tmp_path, run_config, tokenizer_dir):
    autoregressive_folder(tmp_path / "source", "llama")
    LlamaForCausalLM(LlamaConfig(**{**SHAPE, "vocab_size": 250})).save_pretrained(tmp_path / "source")
    model = {"init_from": str(tmp_path / "source"), "config": None}
    with pytest.raises(ValueError, match=r"model\.init_from .*: it has 250 rows, fewer than the 260 ids of model"):
        Trainer(from_dict(RunConfig, merge(run_config, {"model": model})))
