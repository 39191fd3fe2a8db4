"""The record of one answer: canvases grow only by commits, and the last one is the answer."""

import json

import torch

from coda_quickstart.denoise import record_denoising
from CoDALanguageModel import CoDAConfig, CoDALanguageModel


def test_every_step_keeps_what_was_decided_and_the_last_has_no_mask(tmp_path, tokenizer):
    torch.manual_seed(0)
    config = CoDAConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        mask_token_id=tokenizer.mask_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    CoDALanguageModel(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "benchmarks").mkdir()
    row = {"prompt": "def solve(n):\n"}
    (tmp_path / "benchmarks" / "quickstart_problems.jsonl").write_text(json.dumps(row) + "\n")
    record = record_denoising(tmp_path, {"max_new_tokens": 8, "steps": 8, "temperature": 0.0, "alg_temp": 0.0})
    assert record["prompt"] == row["prompt"]
    assert 1 <= len(record["steps"]) <= 8
    for before, after in zip(record["steps"], record["steps"][1:], strict=False):
        assert len(after) == 8
        assert all(old is None or old == new for old, new in zip(before, after, strict=True))
        assert before.count(None) > after.count(None)
