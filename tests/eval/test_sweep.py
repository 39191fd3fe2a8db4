"""A sweep is one evaluation per point on one model: as if each were run alone, resumable, and reported together."""

import json
import shutil
import sys

import pytest

from coda_eval import run as evaluation_run
from coda_eval import sweep
from coda_eval.__main__ import main
from coda_eval.records import read_records
from CoDALanguageModel.errors import UserError

ROWS = [
    {
        "task_id": f"q/{n}",
        "prompt": f"Add {n}.",
        "entry_point": "add",
        "test": "assert add(1, 2) == 3",
        "canonical_solution": "def add(a, b):\n    return a + b\n",
    }
    for n in range(3)
]


def test_a_regime_is_a_name_or_settings_or_both():
    assert sweep.read_regime("exact") == {}
    assert sweep.read_regime("dual+threshold=0.9") == {"kv_cache": "dual", "threshold": 0.9}
    assert sweep.read_regime("alg=p2") == {"alg": "p2"}
    for text, message in (
        ("dul", "exact, prefix, dual, conf or setting=value"),
        ("thresold=0.9", "unknown generation setting 'thresold'"),
        ("stop_strings=x", "stop_strings cannot be set here"),
        ("dual+kv_cache=none", "sets kv_cache twice"),
        ("steps=4", "sets steps as --steps does"),
    ):
        with pytest.raises(UserError, match=message):
            sweep.read_regime(text)


def test_every_regime_meets_every_number_of_steps():
    points = sweep.read_points("8,4", "exact,threshold=0.9")
    assert [point.name for point in points] == [
        "steps8-exact",
        "steps4-exact",
        "steps8-threshold=0.9",
        "steps4-threshold=0.9",
    ]
    assert points[3].settings == {"threshold": 0.9, "steps": 4}
    for steps, regimes, message in (
        ("4,x", "exact", "--steps must be integers"),
        ("0", "exact", "--steps must be integers >= 1 with commas between them, got .0."),
        ("4,4", "exact", "asked for twice: steps4-exact"),
    ):
        with pytest.raises(UserError, match=message):
            sweep.read_points(steps, regimes)


def test_points_that_cannot_be_are_named_before_anything_runs():
    points = sweep.read_points("4", "exact,threshold=2")
    with pytest.raises(UserError, match=r"threshold must be in \(0, 1\]"):
        sweep.check_points(points, {})
    with pytest.raises(UserError, match="steps is set in --model_args"):
        sweep.check_points(points[:1], {"steps": 8})
    for given in ({"kv_cache": "dual"}, {"remask": "conf"}, {"alg": "p2"}):
        with pytest.raises(UserError, match="is set in --model_args or --gen_kwargs: in a sweep --regime does"):
            sweep.check_points(points[:1], {**given, "pretrained": "m"})
    sweep.check_points(points[:1], {"temperature": 0.5, "kv_cache": "none", "pretrained": "m", "batch_size": 2})


def test_regimes_are_exact_cached_parallel_or_more():
    kinds = {text: sweep.kind_of(sweep.read_regime(text)) for text in ("exact", "dual", "threshold=0.9", "conf")}
    assert kinds == {"exact": "exact", "dual": "cached", "threshold=0.9": "parallel", "conf": "remasking"}
    assert sweep.kind_of(sweep.read_regime("dual+factor=1")) == "cached and parallel"


@pytest.fixture
def call(monkeypatch, data_dir, model_dir):
    """Function that runs a command of the evaluation in this process and gives what it said at its end."""
    monkeypatch.setenv("CODA_EVAL_WORKERS", "1")
    (data_dir / "quickstart_problems.jsonl").write_text("\n".join(map(json.dumps, ROWS)))

    def evaluate(command, output, settings="", *arguments):
        given = f"pretrained={model_dir},max_new_tokens=8,temperature=1.0,block_length=4{settings}"
        words = ["--model", "coda", "--model_args", given, "--tasks", "quickstart_problems", "--device", "cpu"]
        words += ["--batch_size", "2", "--output_path", str(output), *arguments]
        monkeypatch.setattr(sys, "argv", ["coda_eval", command, *words])
        try:
            main()
        except SystemExit as end:
            return str(end)
        return ""

    return evaluate


def answers(folder):
    return [(record.task_id, record.answer, record.forwards) for record in read_records(folder)]


def test_a_point_is_the_run_with_its_settings_and_a_failed_one_is_run_again(call, tmp_path, monkeypatch, capsys):
    loaded, load = [], evaluation_run.load_model
    monkeypatch.setattr(evaluation_run, "load_model", lambda config: loaded.append(1) or load(config))
    run_task = evaluation_run.run_task

    def fail(config, *arguments):
        if config.model_args["steps"] == 2 and "threshold" in config.model_args:
            raise OSError("disk full")
        run_task(config, *arguments)

    monkeypatch.setattr(evaluation_run, "run_task", fail)
    arguments = ("--steps", "2,8", "--regime", "exact,threshold=0.3")
    said = call("sweep", tmp_path / "sweep", "", *arguments)
    assert "1 of 4 points failed: steps2-threshold=0.3 (" in said
    assert "disk full" in said
    assert len(loaded) == 1
    assert "failed: 1 of 1 tasks failed" in capsys.readouterr().out
    rows = {row["name"]: row for row in json.loads((tmp_path / "sweep" / "sweep.json").read_text())}
    assert rows["steps2-threshold=0.3"]["tasks"] == {}
    assert "disk full" in rows["steps2-threshold=0.3"]["error"]
    one = rows["steps8-exact"]["tasks"]["quickstart_problems"]
    assert (one["metric"], one["documents"], one["score"]) == ("pass@1", 3, 0.0)
    assert one["seconds_per_answer"] > 0
    assert rows["steps8-threshold=0.3"]["kind"] == "parallel"

    monkeypatch.setattr(evaluation_run, "run_task", run_task)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").rglob("results_*.json")}
    assert call("sweep", tmp_path / "sweep", "", *arguments) == ""
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").rglob("results_*.json")}
    assert len(before) == 3
    assert len(after) == 4
    assert before.items() <= after.items()
    assert len(loaded) == 2
    assert call("sweep", tmp_path / "sweep", "", *arguments) == ""
    assert len(loaded) == 2
    assert {path.name for path in (tmp_path / "sweep").glob("sweep.*")} == {
        "sweep.json",
        "sweep.md",
        "sweep.png",
        "sweep.svg",
    }
    assert call("run", tmp_path / "alone", ",steps=8,threshold=0.3") == ""
    assert answers(tmp_path / "alone") == answers(tmp_path / "sweep" / "steps8-threshold=0.3")
    assert answers(tmp_path / "alone") != answers(tmp_path / "sweep" / "steps8-exact")
    assert "was run with other limit" in call("sweep", tmp_path / "sweep", "", *arguments, "--limit", "1")


def test_a_sweep_is_over_one_model_and_one_set_of_problems(call, tmp_path, monkeypatch, model_dir):
    own = tmp_path / "model"
    shutil.copytree(model_dir, own)
    given, words = f",pretrained={own}", ("--steps", "2", "--limit", "1")
    assert call("sweep", tmp_path / "sweep", given, *words) == ""
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "quickstart_problems.jsonl", tmp_path / "elsewhere")
    monkeypatch.setenv("CODA_EVAL_DATA", str(tmp_path / "elsewhere"))
    assert "steps2-exact was run with other data" in call("sweep", tmp_path / "sweep", given, *words)
    monkeypatch.setenv("CODA_EVAL_DATA", str(tmp_path))
    weights = own / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"@")
    said = call("sweep", tmp_path / "sweep", given, "--steps", "2,4", "--limit", "1")
    assert f"steps2-exact was run with other weights in {own}: give another --output_path" in said
    (tmp_path / "sweep" / "steps2-exact" / "point.json").write_text("[")
    said = call("sweep", tmp_path / "sweep", given, *words)
    assert "point.json' is not valid JSON: " in said
    assert said.endswith("; remove it, and the point is gone on with")


def test_a_regime_is_what_it_says_whatever_the_folder_of_the_model_asks_for(call, tmp_path, model_dir):
    own = tmp_path / "model"
    shutil.copytree(model_dir, own)
    config = json.loads((own / "generation_config.json").read_text())
    (own / "generation_config.json").write_text(json.dumps(config | {"threshold": 0.3}))
    words = ("--steps", "8", "--limit", "2")
    assert call("sweep", tmp_path / "sweep", f",pretrained={own}", *words, "--regime", "exact,factor=1") == ""
    assert call("run", tmp_path / "exact", ",steps=8", "--limit", "2") == ""
    assert answers(tmp_path / "sweep" / "steps8-exact") == answers(tmp_path / "exact")
    resolved = json.loads((tmp_path / "sweep" / "steps8-factor=1" / "scores.json").read_text())[0]["resolved"]
    assert (resolved["factor"], resolved["threshold"]) == (1, None)
    said = call("sweep", tmp_path / "other", "", *words, "--regime", "exact,refresh_window=4")
    assert "steps8-refresh_window=4: refresh_window needs kv_cache" in said
    assert not (tmp_path / "other" / "steps8-exact").exists()


def test_a_sweep_needs_a_folder_and_the_diffusion_model(call, tmp_path, monkeypatch):
    assert "a sweep needs --output_path, a folder" in call("sweep", tmp_path / "x.json", "", "--steps", "2")
    (tmp_path / "file").write_text("")
    said = call("sweep", tmp_path / "file", ",pretrained=nothing", "--steps", "2")
    assert "nothing can be written to --output_path" in said
    said = call("sweep", tmp_path, "", "--steps", "2", "--model", "hf")
    assert "a sweep is over decoding settings of --model coda, got --model coda_hf" in said
