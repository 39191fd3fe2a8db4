"""Two runs are compared answer by answer: known numbers, brute force, and what differs beside the model."""

import dataclasses
import itertools
import json
import math
import random

import pytest

from coda_eval.comparison import compare, main, mcnemar_p, read_cards
from coda_eval.records import Record
from CoDALanguageModel.errors import UserError

CARD = {
    "task": "t",
    "metric": "pass@1",
    "filter": "run",
    "score": 0.5,
    "n": 4,
    "isolation": "bubblewrap",
    "task_hash": "one",
    "settings": {"model": "coda", "model_args": {"pretrained": "a", "steps": 32}},
    "resolved": {"steps": 32, "alg": "entropy"},
    "hashes": {"weights": "x", "data": "d"},
    "cost": {"forwards": 3},
}
COST = {"generation_s": 0.5}


def write_run(folder, scores, cards=(CARD,), task="t", **facts):
    """A run whose documents have, in turn, the given lists of scores of their repeats."""
    nothing = {field.name: None for field in dataclasses.fields(Record)}
    folder.mkdir(exist_ok=True)
    with (folder / "records.jsonl").open("a") as file:
        for n, repeats in enumerate(scores):
            for repeat, score in enumerate(repeats):
                status = {0: "failed", 1: "passed"}.get(score)
                row = {"task": task, "task_id": f"q/{n}", "doc_id": n, "repeat": repeat, "score": score}
                row |= {"status": status, "prompt": "p", "new_tokens": 8, "forwards": 4, "cost": COST}
                file.write(json.dumps(nothing | row | facts) + "\n")
    (folder / "scores.json").write_text(json.dumps(list(cards)))
    return folder


def singles(text):
    return [[int(character)] for character in text]


def test_mcnemar_is_the_share_of_coin_throws_at_least_as_uneven():
    assert mcnemar_p(1, 7) == 2 * (1 + 8) / 256  # by hand
    assert mcnemar_p(0, 5) == 2 / 32
    assert mcnemar_p(3, 3) == mcnemar_p(0, 0) == 1.0
    for first, second in itertools.product(range(6), range(6)):
        throws = list(itertools.product((0, 1), repeat=first + second))
        uneven = [abs(2 * sum(throw) - len(throw)) >= abs(first - second) for throw in throws]
        assert mcnemar_p(first, second) == pytest.approx(sum(uneven) / len(throws))


def test_a_known_pair_of_runs(tmp_path):
    a, b = write_run(tmp_path / "a", singles("11000000")), write_run(tmp_path / "b", singles("10111110"))
    (task,) = compare(a, b).tasks
    assert (task.documents, task.answers, task.left_out) == (8, 8, (0, 0))
    assert (task.scores, task.difference, task.discordant) == ((0.25, 0.75), 0.5, (1, 5))
    assert task.mcnemar_p == 2 * (1 + 6) / 64
    assert [change.task_id for change in task.worse] == ["q/1"]
    assert [change.task_id for change in task.better] == ["q/2", "q/3", "q/4", "q/5", "q/6"]
    assert task.better[0].statuses == ("failed", "passed")
    assert dataclasses.asdict(task.costs[0]) == {
        "new_tokens": 64,
        "forwards": 32,
        "tokens_per_forward": 2.0,
        "seconds": 4.0,
    }
    (turned,) = compare(b, a).tasks
    assert (turned.difference, turned.mcnemar_p) == (-0.5, task.mcnemar_p)


def test_the_interval_is_that_of_all_resamples_of_the_pairs(tmp_path):
    first, second = singles("1100101"), singles("0111111")
    differences = [b - a for (a,), (b,) in zip(first, second, strict=True)]
    means = sorted(sum(drawn) / 7 for drawn in itertools.product(differences, repeat=7))
    expected = [means[round(share * (len(means) - 1))] for share in (0.025, 0.975)]
    (task,) = compare(write_run(tmp_path / "a", first), write_run(tmp_path / "b", second), resamples=20_000).tasks
    assert task.interval95 == pytest.approx(expected, abs=1e-9)


def test_repeats_count_once_for_their_document(tmp_path):
    draw = random.Random(0)
    scores = [[[draw.randint(0, 1)] for _ in range(20)] for _ in range(2)]
    once = compare(*(write_run(tmp_path / f"one{n}", run) for n, run in enumerate(scores))).tasks[0]
    ten = compare(*(write_run(tmp_path / f"ten{n}", [r * 10 for r in run]) for n, run in enumerate(scores))).tasks[0]
    assert ten.interval95 == once.interval95
    assert (ten.documents, ten.answers, ten.mcnemar_p) == (20, 200, None)
    assert ten.better[0].statuses == ("10 failed", "10 passed")


def test_the_order_of_the_records_does_not_matter(tmp_path):
    a, b = write_run(tmp_path / "a", singles("1010")), write_run(tmp_path / "b", singles("0110"))
    expected = compare(a, b)
    lines = (b / "records.jsonl").read_text().splitlines(keepends=True)
    (b / "records.jsonl").write_text("".join(reversed(lines)))
    assert compare(a, b) == expected


def test_runs_of_other_documents_are_refused_or_compared_in_common(tmp_path):
    a, b = write_run(tmp_path / "a", singles("11000")), write_run(tmp_path / "b", singles("110"))
    write_run(b, [[None]], task="other")
    with pytest.raises(UserError, match=r"t: 2 only in .*a \(q/3 repeat 0, q/4 repeat 0\).*--common"):
        compare(a, b)
    (task,) = compare(a, b, common=True).tasks
    assert (task.documents, task.left_out, task.scores) == (3, (2, 0), (2 / 3, 2 / 3))
    with pytest.raises(UserError, match="no answer to the same task"):
        compare(a, write_run(tmp_path / "c", singles("1"), task="other"), common=True)
    write_run(a, singles("1"))
    with pytest.raises(UserError, match="repeat 0 of q/0 in t twice"):
        compare(a, b)


def test_what_differs_beside_the_model_is_named(tmp_path):
    other = CARD | {"score": 0.7, "isolation": "rlimits (not isolated)", "cost": {"forwards": 9}}
    other |= {"resolved": {"steps": 64, "alg": "p2"}, "hashes": {"weights": "y", "data": "e"}}
    other["settings"] = {
        "model": "coda_hf",
        "model_args": {"pretrained": "b", "steps": 64, "alg": "p2", "dtype": "float32"},
    }
    a = write_run(tmp_path / "a", singles("10"))
    b = write_run(tmp_path / "b", singles("10"), cards=[other], prompt="another")
    found = {difference.fact: difference.values for difference in compare(a, b).differences}
    assert found == {
        "prompts (2 of 2)": ("", ""),
        "isolation": ("bubblewrap", "rlimits (not isolated)"),
        "hashes.data": ("d", "e"),
        "resolved.alg": ("entropy", "p2"),
        "resolved.steps": (32, 64),
        "settings.model_args.dtype": (None, "float32"),
    }
    assert compare(a, write_run(tmp_path / "c", singles("11"))).differences == []


def test_the_command_prints_and_writes(tmp_path, capsys):
    a, b = write_run(tmp_path / "a", singles("1100")), write_run(tmp_path / "b", singles("1011"))
    main([str(a), str(b), "--output", str(tmp_path / "x.json")])
    assert "Changed documents" in capsys.readouterr().out
    written = json.loads((tmp_path / "x.json").read_text())
    assert written["tasks"][0]["discordant"] == [1, 2]
    main([str(a), str(b), "--output", str(tmp_path / "x.md")])
    text = (tmp_path / "x.md").read_text()
    assert "| t | 4 | 50.0 % | 75.0 % | +25.0 points |" in text
    assert "| t | worse | q/1 | 100.0 % | 0.0 % | passed | failed |" in text
    for wrong, said in (
        (("--output", "x.txt"), "--output must end in .json or .md"),
        (("--resamples", "0"), "--resamples must be an integer >= 1, got 0"),
        (("--seed", "-1"), "--seed must be an integer >= 0, got -1"),
    ):
        with pytest.raises(SystemExit):
            main([str(a), str(b), *wrong])
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[1]", '[{"task": "t"}]'])
def test_a_file_of_scores_that_holds_none_is_named(tmp_path, content):
    a = write_run(tmp_path / "a", singles("1"))
    (a / "scores.json").write_text(content)
    with pytest.raises(UserError, match=r"scores.json does not hold score cards"):
        compare(a, a)


def test_unbounded_scores_have_no_share_and_no_mcnemar(tmp_path):
    a, b = write_run(tmp_path / "a", [[-1.5], [2.0]]), write_run(tmp_path / "b", [[-1.0], [2.0]])
    (task,) = compare(a, b).tasks
    assert (task.mcnemar_p, task.discordant) == (None, None)
    assert math.isclose(task.difference, 0.25)
    assert task.better[0].statuses == ("scored", "scored")


@pytest.mark.parametrize(
    ("cards", "said"),
    [
        ({}, r"it must be a list, got \{\}"),
        ([3], "card 1 must be an object, got 3"),
        ([CARD, CARD | {"score": "high"}], "card 2: score must be a number, got 'high'"),
        ([CARD | {"task": ["t"]}], r"card 1: task must be a text, got \['t'\]"),
        ([CARD | {"settings": "x"}], "card 1: settings must be an object, got 'x'"),
        ([CARD | {"cost": {"forwards": None}}], "card 1: cost must be an object of numbers or null"),
        ([CARD | {"score": 10**400}], "card 1: score must be a number, got 1000"),
        ([CARD | {"cost": {"forwards": math.inf}}], "card 1: cost must be an object of numbers or null"),
        ([CARD | {"wilson95": [0.1]}], r"card 1: wilson95 must be two numbers or null, got \[0.1\]"),
    ],
)
def test_a_score_card_that_is_none_is_named_with_its_file_and_field(cards, said, tmp_path):
    write_run(tmp_path / "a", singles("1"), cards=cards)
    (tmp_path / "a" / "scores.json").write_text(json.dumps(cards))
    with pytest.raises(UserError, match=f"a/scores.json does not hold score cards: {said}"):
        read_cards(tmp_path / "a")


def test_scores_that_are_no_numbers_and_ids_that_are_no_texts_are_refused(tmp_path):
    a, b = write_run(tmp_path / "a", [[1.0], [float("nan")]]), write_run(tmp_path / "b", singles("11"))
    with pytest.raises(UserError, match="a: the score of q/1 in t, repeat 0, is nan, which compares with nothing"):
        compare(a, b)
    c = write_run(tmp_path / "c", singles("1"), task_id="q/\ud800")
    with pytest.raises(UserError, match="line 1: task_id holds half of a surrogate pair at character 2"):
        compare(b, c)
    d = write_run(tmp_path / "d", singles("1"), task=["t"])
    with pytest.raises(UserError, match=r"records.jsonl: line 1: task must be a text, got \['t'\]"):
        compare(b, d)
    (d / "scores.json").unlink()
    (d / "scores.json").mkdir()
    with pytest.raises(UserError, match="scores.json does not hold score cards: IsADirectoryError"):
        read_cards(d)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"task_id": ["x"]}, r"task_id must be a text or a number, got \['x'\]"),
        ({"doc_id": {}}, "doc_id must be a whole number, got {}"),
        ({"repeat": True}, "repeat must be a whole number, got True"),
        ({"program": 3}, "program must be a text or null, got 3"),
        ({"score": 10**400}, "score must be a number or null, got 1000"),
        ({"seconds": "x"}, "seconds must be a finite number or null, got 'x'"),
        ({"new_tokens": math.nan}, "new_tokens must be a finite number or null, got nan"),
        (
            {"cost": {"generation_s": "x"}},
            "cost must be an object of finite numbers or null, got {'generation_s': 'x'}",
        ),
    ],
)
def test_a_record_that_is_none_is_named_with_its_line_and_field(tmp_path, facts, said):
    a = write_run(tmp_path / "a", singles("1"), **facts)
    with pytest.raises(UserError, match=f"records.jsonl: line 1: {said}"):
        compare(a, a)


def test_records_nested_too_deeply_are_refused(tmp_path):
    a = write_run(tmp_path / "a", singles("1"))
    (a / "records.jsonl").write_text("[" * 100_000)
    with pytest.raises(UserError, match="records.jsonl: line 1 is not JSON: maximum recursion depth"):
        compare(a, a)
