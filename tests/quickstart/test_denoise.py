"""The record of one answer: canvases grow only by commits, and the last one is the answer."""

import json

import pytest
import torch

from coda_quickstart.__main__ import _show_first
from coda_quickstart.denoise import record_denoising, record_infilling
from CoDALanguageModel import CoDAConfig, CoDALanguageModel

GAP = {"prefix": "def solve(n):\n    return [", "middle": "2 * x for x in range(1, n + 1)", "suffix": "]\n"}
GENERATION = {"max_new_tokens": 8, "steps": 8, "temperature": 0.0, "alg_temp": 0.0}


@pytest.fixture
def run_dir(tmp_path, tokenizer):
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
    for name in ("model", "midtrain_export"):
        CoDALanguageModel(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "benchmarks").mkdir()
    for name, row in (("problems", {"prompt": "def solve(n):\n"}), ("infill", GAP)):
        (tmp_path / "benchmarks" / f"quickstart_{name}.jsonl").write_text(json.dumps(row) + "\n")
    return tmp_path


def test_every_step_keeps_what_was_decided_and_the_last_has_no_mask(run_dir):
    record = record_denoising(run_dir, GENERATION)
    assert record["prompt"] == "def solve(n):\n"
    assert 1 <= len(record["steps"]) <= 8
    for before, after in zip(record["steps"], record["steps"][1:], strict=False):
        assert len(after) == 8
        assert all(old is None or old == new for old, new in zip(before, after, strict=True))
        assert before.count(None) > after.count(None)


def test_a_gap_is_filled_token_by_token(run_dir, tokenizer):
    record = record_infilling(run_dir, GENERATION)
    assert {name: record[name] for name in GAP} == GAP
    num_tokens = len(tokenizer(GAP["middle"])["input_ids"])
    open_tokens = [canvas.count(None) for canvas in record["steps"]]
    assert open_tokens == list(reversed(range(num_tokens)))
    assert record["answer"] == "".join(record["steps"][-1])


@pytest.mark.parametrize(("answer", "verdict"), [("w[-1]", "right"), ("w(w)", "another text")])
def test_the_first_answer_says_whose_it_is_and_whether_it_is_right(tmp_path, capsys, answer, verdict):
    record = {"prefix": "return [", "middle": "w[-1]", "suffix": "]\n", "answer": answer, "canvas": "  1  ____"}
    (tmp_path / "first_answer.json").write_text(json.dumps(record))
    _show_first(tmp_path, 0.0)
    shown = capsys.readouterr().out
    assert "the mid-trained model's, which is often wrong" in shown
    assert shown.rstrip().endswith(f"filled: {answer}   was: w[-1]   ({verdict})")
