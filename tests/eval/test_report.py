"""Score cards hold score, interval and provenance; intervals are Wilson's."""

import dataclasses
import json
import subprocess
import sys

import pytest

from coda_eval.records import Record
from coda_eval.report import as_markdown, score_cards
from CoDALanguageModel.errors import UserError

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
    nothing = {field.name: None for field in dataclasses.fields(Record)} | {"doc_id": 0, "repeat": 0}
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


def test_a_loss_is_no_share_whatever_its_value(tmp_path):
    metrics = {"bits_per_byte,none": 0.8, "acc,none": 0.8}
    run = RUN | {"results": {"t": metrics}, "n-samples": {"t": {"effective": 10}}}
    run |= {"higher_is_better": {"t": {"bits_per_byte": False, "acc": True}}}
    (tmp_path / "results_1.json").write_text(json.dumps(run))
    loss, share = score_cards(tmp_path)
    assert (loss["wilson95"], loss["higher_is_better"]) == (None, False)
    assert share["wilson95"][0] < 0.8 < share["wilson95"][1]
    assert "| bits_per_byte | 0.8000 |" in as_markdown([loss, share])
    assert "| acc | 80.0 % |" in as_markdown([loss, share])


def test_what_a_cell_holds_does_not_end_the_table(tmp_path):
    run = RUN | {"config": RUN["config"] | {"generation_settings": {"alg": "a|b\nc<i>"}}}
    (tmp_path / "results_1.json").write_text(json.dumps(run))
    assert as_markdown(score_cards(tmp_path)).splitlines()[-1].endswith(r"| alg=a\|b c&lt;i> |")


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (None, "it must be an object, got null"),
        ({"results": None}, "results must be an object, got null"),
        ({"results": {"t": [1]}}, r'results must be an object of objects, got {"t": \[1\]}'),
        ({"n-samples": {"t": 3}}, "n-samples must be an object of objects"),
        ({"n-samples": {"t": {"effective": 10**400}}}, "n-samples.t.effective must be a whole number, got 1000"),
        ({"coda_eval": {"tasks": None}}, "coda_eval.tasks must be an object of objects, got null"),
        ({"coda_eval": {"tasks": {"t": {"bootstrap95": [1]}}}}, "coda_eval.tasks.t.bootstrap95 must be an object or"),
        ({"config": {"generation_settings": "x"}}, 'config.generation_settings must be an object or null, got "x"'),
        ({"total_evaluation_time_seconds": "x"}, 'total_evaluation_time_seconds must be a number, got "x"'),
        ({"versions": 3}, "versions must be an object, got 3"),
    ],
)
def test_a_results_file_that_is_none_is_named_with_its_field(tmp_path, facts, said):
    (tmp_path / "results_1.json").write_text(json.dumps(facts and RUN | facts))
    with pytest.raises(UserError, match=f"results_1.json is not a results file of lm-eval: {said}"):
        score_cards(tmp_path)
