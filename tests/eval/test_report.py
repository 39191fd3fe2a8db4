"""Score cards hold score, interval and provenance; intervals are Wilson's."""

import dataclasses
import json
import subprocess
import sys

from coda_eval.records import Record
from coda_eval.report import as_markdown, score_cards

RUN = {
    "results": {
        "coda_humaneval": {
            "alias": "coda_humaneval",
            "pass@1,run": 0.5,
            "pass@1_stderr,run": 0.04,
            "timeouts,run": 0.0,
            "isolation,run": "rlimits (not isolated)",
            "outcomes,run": "164 programs: 80 failed, 82 passed, 2 timeout",
            "isolation_stderr,run": "N/A",
        }
    },
    "config": {"model": "coda", "generation_settings": {"steps": 768}, "batch_size": 8, "torch_seed": 1},
    "configs": {"coda_humaneval": {"generation_kwargs": {"until": []}}},
    "n-samples": {"coda_humaneval": {"original": 164, "effective": 164}},
    "versions": {"coda_humaneval": 1.0},
    "lm_eval_version": "0.4.13",
}


def test_card_holds_score_interval_settings_and_isolation(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "results_2026.json").write_text(json.dumps(RUN))
    (card,) = score_cards(tmp_path)
    assert (card["task"], card["metric"], card["score"], card["n"]) == ("coda_humaneval", "pass@1", 0.5, 164)
    assert card["wilson95"] == [0.424357, 0.575643]
    assert card["isolation"] == "rlimits (not isolated)"
    assert card["outcomes"] == "164 programs: 80 failed, 82 passed, 2 timeout"
    assert "| 164 | 164 programs: 80 failed, 82 passed, 2 timeout | rlimits (not isolated) |" in as_markdown([card])
    assert card["settings"]["generation_settings"] == {"steps": 768}
    assert card["versions"]["lm_eval_version"] == "0.4.13"


def test_card_holds_what_the_answers_cost(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "results_2026.json").write_text(json.dumps(RUN))
    cost = {"forwards": 4, "tokens_evaluated": 50, "tokens_per_forward": 1.5, "generation_s": 0.5}
    nothing = {field.name: None for field in dataclasses.fields(Record)} | {"repeat": 0}
    answer = nothing | {"task": "coda_humaneval", "new_tokens": 5, "forwards": 4}
    rows = [answer | {"cost": cost}] * 2 + [answer, answer | {"task": "other"}]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (card,) = score_cards(tmp_path)
    plain = {"answers": 3, "new_tokens": 15, "forwards": 12, "generation_s": 1.0}
    assert card["cost"] == plain | {"tokens_evaluated": 100}
    assert card["tokens_per_forward"] == 15 / 12  # as the two counts beside it say


def test_command_writes_json_and_markdown_and_names_what_is_wrong(tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "coda_eval", "report", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    missing = run(tmp_path)
    assert missing.returncode == 2
    assert "no results_*.json" in missing.stderr
    (tmp_path / "results_1.json").write_text(json.dumps(RUN))
    assert run(tmp_path, "--output", tmp_path / "scores.json").returncode == 0
    assert json.loads((tmp_path / "scores.json").read_text())[0]["score"] == 0.5
    assert "50.0 % | 42.4 - 57.6 %" in run(tmp_path, "--output", tmp_path / "scores.md").stdout
    assert "must end in .json or .md" in run(tmp_path, "--output", tmp_path / "scores.txt").stderr
    (tmp_path / "results_2.json").write_text("{}")
    assert "not a results file of lm-eval" in run(tmp_path).stderr
