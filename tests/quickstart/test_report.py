"""The report: its numbers are those of the stages' files, and it needs nothing but itself."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from coda_quickstart import report


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run_dir(tmp_path, tokenizer):
    for folder, key in (("pretrain", "eval_loss"), ("midtrain", "eval_loss"), ("model", "eval_held_out_loss")):
        rows = [
            {"step": step, "loss": 5.0 / step, "tokens": 1000 * step, "tokens_per_s": 2000.0} for step in range(1, 6)
        ]
        write_lines(tmp_path / folder / "metrics.jsonl", [*rows, {"step": 5, key: 1.25}])
    samples = tmp_path / "evaluation" / "model"
    problems = [{"doc": {"task_id": f"quickstart/{i}"}, "pass@1": float(i < 9)} for i in range(10)]
    problems += [{"doc": {"task_id": f"reserved/{i}"}, "pass@1": float(i < 4)} for i in range(5)]
    write_lines(samples / "samples_quickstart_problems_2026.jsonl", problems)
    gaps = [{"doc": {"task_id": f"composition/{i}"}, "exact_match": 1.0} for i in range(3)]
    gaps += [{"doc": {"task_id": f"stdlib/a.py:{i}"}, "exact_match": 0.0} for i in range(4)]
    write_lines(samples / "samples_quickstart_infill_2026.jsonl", gaps)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    shape |= {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": 600}
    (tmp_path / "model" / "config.json").write_text(json.dumps(shape))
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5)}, tmp_path / "model" / "model.safetensors")
    (tmp_path / "times.json").write_text(json.dumps({"data": 10.0, "pretrain": 50.0}))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "summary.json").write_text(json.dumps({"training_programs": 4000}))
    steps = [[None, None, " y"], [" <x", None, " y"], [" <x", "\n", " y"]]
    (tmp_path / "denoise.json").write_text(json.dumps({"prompt": "def f(a):\n", "steps": steps}))
    answer = {"kind": "chat", "question": "def f(a):", "answer": "a < b", "expected": "", "seconds": 0.5}
    (tmp_path / "answers.json").write_text(json.dumps([answer]))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path


def test_scores_are_counted_per_kind_of_gap(run_dir):
    rows = {row["name"].split(",")[1].strip(): row for row in report.read_scores(run_dir)[1:]}
    problems = report.read_scores(run_dir)[0]
    assert (problems["passed"], problems["count"], problems["share"]) == (9, 10, 0.9)
    assert (rows["pass@1"]["name"], rows["pass@1"]["passed"]) == ("reserved problems, pass@1", 4)
    assert (rows["held-out generated functions"]["passed"], rows["held-out generated functions"]["count"]) == (3, 3)
    assert rows["held-out standard library lines"]["share"] == 0.0


def test_the_report_shows_scores_times_and_answers_and_loads_nothing(run_dir):
    tables = report.write_report(run_dir)
    assert "| held-out problems, pass@1 | 90.0 % | 59.6 - 98.2 % | 10 |" in tables
    assert "| pre-training and export | 50 |" in tables
    assert "| **all** | **60** |" in tables
    page = (run_dir / "report.html").read_text()
    assert "9 of 10 held-out problems" in page
    assert "a &lt; b" in page
    assert "$" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.S)
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?https?:", page)
    assert tables in (run_dir / "report.md").read_text()
    assert all("held-out standard library files" in text for text in (page, tables))  # what validation is of
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["parameters"] == 17
    assert summary["training"][2] == {
        "stage": "Fine-tuning",
        "steps": 5,
        "tokens": 5000,
        "tokens_per_s": 2000.0,
        "loss": 1.0,
        "validation_loss": 1.25,
    }


def test_a_missing_stage_is_named(run_dir):
    (run_dir / "answers.json").unlink()
    with pytest.raises(ValueError, match=r"the report needs all stages; missing: .*answers.json"):
        report.write_report(run_dir)


def test_a_stage_that_logged_no_loss_is_named(run_dir):
    write_lines(run_dir / "model" / "metrics.jsonl", [{"step": 5, "eval_held_out_loss": 1.25}])
    with pytest.raises(ValueError, match="model/metrics.jsonl holds no training loss: the stage's logging interval"):
        report.write_report(run_dir)


def test_without_samples_there_is_no_report(tmp_path):
    with pytest.raises(ValueError, match="no samples_.*run the evaluation first"):
        report.read_scores(tmp_path)


def test_seeds_stand_in_one_table_with_their_mean(run_dir):
    (run_dir / "model" / "run_config.yaml").write_text("seed: 0\n")
    for seed, passed in ((2, 7), (10, 5)):
        folder = run_dir / f"seed_{seed}"
        rows = [{"doc": {"task_id": f"quickstart/{i}"}, "pass@1": float(i < passed)} for i in range(10)]
        rows += [{"doc": {"task_id": f"reserved/{i}"}, "pass@1": 1.0} for i in range(5)]
        rows += [{"doc": {"task_id": f"{kind}/0"}, "exact_match": 0.0} for kind in ("composition", "stdlib")]
        write_lines(folder / "evaluation" / "model" / "samples_quickstart_problems_2026.jsonl", rows)
        (folder / "scores.json").write_text("[]")
    (run_dir / "times.json").write_text(json.dumps({"sft": 50.0, "sft_seed_2": 90.0}))
    tables = report.write_report(run_dir)
    lines = [line for line in tables.splitlines() if line.startswith(("| 0 |", "| 2 |", "| 10 |", "| mean |"))]
    assert [line.split("|")[2].split()[0] for line in lines] == ["90.0", "70.0", "50.0", "70.0"]
    assert "models trained from other seeds" in (run_dir / "report.html").read_text()
    assert "no setting was chosen on them" in tables
    assert "| fine-tuning, seed 2 | 90 |" in tables


def test_two_models_are_compared_on_the_same_problems(run_dir):
    assert report.read_comparison(run_dir, {}) == []
    (run_dir / "blocks" / "model").mkdir(parents=True)
    (run_dir / "blocks" / "model" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="the report needs all stages; missing: .*scores.json"):
        report.write_report(run_dir)
    cost = {"answers": 10, "generation_s": 5.0}
    card = {"task": "quickstart_problems", "metric": "pass@1", "score": 0.9, "n": 10, "wilson95": [0.6, 0.98]}
    card["tokens_per_forward"] = 1.5
    for folder in (run_dir, run_dir / "blocks"):
        for file in ("scores.json", "parallel.json"):
            (folder / file).write_text(json.dumps([{**card, "cost": cost}]))
    (run_dir / "times.json").write_text(json.dumps({"pretrain": 50.0, "pretrain_blocks": 90.0, "sft_blocks": 20.0}))
    tables = report.write_report(run_dir)
    assert "| full attention | one token a step | 90.0 % | 60.0 - 98.0 % | 1.50 | 0.500 | 50 |" in tables
    assert "| by blocks | several | 90.0 % | 60.0 - 98.0 % | 1.50 | 0.500 | 110 |" in tables
    assert "| pre-training and export, by blocks | 90 |" in tables
    assert "attention by blocks" in (run_dir / "report.html").read_text()
