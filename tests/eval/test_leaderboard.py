"""The leaderboard holds every run and task once, keeps published numbers apart, and its page needs nothing else."""

import json
import re

import pytest

from coda_eval.leaderboard import as_html, as_markdown, main, published, read_rows
from CoDALanguageModel.errors import UserError

CARD = {
    "task": "coda_humaneval",
    "metric": "pass@1",
    "filter": "run",
    "score": 0.5,
    "n": 164,
    "wilson95": [0.42, 0.58],
    "isolation": "bubblewrap",
    "settings": {"model": "coda", "model_args": {"pretrained": "/models/small", "steps": 32}},
    "cost": {"new_tokens": 100, "forwards": 40},
}


def write_run(folder, *cards):
    folder.mkdir(parents=True)
    (folder / "scores.json").write_text(json.dumps([CARD | card for card in cards]))
    return folder


@pytest.fixture
def rows(tmp_path):
    """Two runs: one with a second metric of its task, one with another task, an unsafe sandbox and no cost."""
    write_run(tmp_path / "runs" / "a", {}, {"metric": "pass@10", "score": 0.75, "wilson95": None})
    other = {"model": "coda_hf", "model_args": {"pretrained": "owner/<b>name</b>"}}
    card = {"task": "loss", "metric": "nats", "score": -1.5, "n": None, "wilson95": None, "cost": None}
    write_run(tmp_path / "runs" / "b", card | {"settings": other, "isolation": "rlimits (not isolated)"})
    return read_rows([tmp_path / "runs", tmp_path / "runs" / "a"])


def test_every_run_is_a_row_and_every_metric_a_column(rows):
    assert [(row.model, row.settings) for row in rows] == [("small", "steps=32"), ("owner/<b>name</b>", "")]
    first = as_markdown(rows).splitlines()[4:8]
    assert first[0].startswith(
        "| model | coda_humaneval pass@1 | coda_humaneval pass@10 | loss nats | tokens per forward"
    )
    assert first[2].startswith("| small | 50.0 % (42.0 to 58.0 %, n = 164) | 75.0 % (n = 164) |  | 2.50 | steps=32 |")
    assert "| -1.5000 |  |  | rlimits (not isolated) |" in first[3]


def test_settings_are_shown_however_they_were_given(tmp_path):
    settings = CARD["settings"] | {"gen_kwargs": {"steps": 8, "top_p": 0.9}}
    (row,) = read_rows([write_run(tmp_path / "run", {"settings": settings})])
    assert row.settings == "steps=32, top_p=0.9"


def test_the_tokens_of_a_task_count_once_whatever_its_metrics(rows):
    assert [row.tokens_per_forward for row in rows] == [2.5, None]


def test_published_numbers_stand_apart_with_their_source(rows):
    measured, *others = as_markdown(rows).split("\n## Published, not measured here: ")
    assert "CoDA-Instruct" not in measured
    assert [other.splitlines()[0] for other in others] == [table["title"] for table in published()]
    assert all("small" not in other for other in others)
    assert all(table["source"] in other for table, other in zip(published(), others, strict=True))
    for table in published():
        assert all(len(row) == len(table["columns"]) for row in table["rows"].values())
        assert "github.com/" in table["source"]


def test_the_page_loads_nothing_and_shows_text_as_text(rows):
    page = as_html(rows)
    assert not re.search(r"(src|href)\s*=|@import|url\(", page)
    assert "owner/&lt;b&gt;name&lt;/b&gt;" in page
    assert "<b>" not in page
    assert page.count('<span class="tag">published</span>') == sum(len(table["rows"]) for table in published())
    assert 'data-value="0.5"><div>50.0 %<small>42.0 to 58.0 %, n = 164</small>' in page
    assert '<small class="warn">rlimits (not isolated)</small>' in page


def test_the_command_writes_both_and_names_what_is_wrong(rows, tmp_path, capsys):
    main([str(tmp_path / "runs"), "--output", str(tmp_path / "o" / "x.md"), str(tmp_path / "o" / "x.html")])
    assert capsys.readouterr().out == (tmp_path / "o" / "x.md").read_text()
    assert (tmp_path / "o" / "x.html").read_text().startswith("<!doctype html>")
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--output", "x.pdf"])
    assert "--output must end in .md or .html" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"no scores.json in or below"):
        read_rows([tmp_path / "o"])


def test_every_filter_of_a_metric_is_a_column(tmp_path):
    strict, flexible = {"filter": "strict", "score": 0.25}, {"filter": "flexible", "score": 0.75}
    found = read_rows([write_run(tmp_path / "run", strict, flexible, {"metric": "other"})])
    header, _, row = as_markdown(found).splitlines()[4:7]
    names = ["coda_humaneval pass@1 (strict)", "coda_humaneval pass@1 (flexible)", "coda_humaneval other"]
    assert header.split(" | ")[1:4] == names
    assert [cell.split(" (")[0] for cell in row.split(" | ")[1:4]] == ["25.0 %", "75.0 %", "50.0 %"]
    assert as_html(found).count('data-label="coda_humaneval pass@1 (flexible)"') == 1


@pytest.mark.parametrize("other", [{"score": 0.75}, {"task": "t", "settings": {"model": "hf"}}])
def test_cards_of_several_runs_are_no_row(tmp_path, other):
    with pytest.raises(UserError, match="scores.json holds the cards of several runs, as report writes them"):
        read_rows([write_run(tmp_path / "run", {}, other)])


def test_a_loss_is_shown_as_it_is(tmp_path):
    card = {"metric": "bits_per_byte", "score": 0.8, "wilson95": None, "higher_is_better": False}
    assert [cell.text for cell in read_rows([write_run(tmp_path / "run", card)])[0].cells.values()] == ["0.8000"]


def test_names_that_are_no_utf_8_or_hold_tags_are_shown(tmp_path):
    folder = write_run(tmp_path / "caf\udce9 |<b>", {})
    main([str(folder), "--output", str(tmp_path / "x.md"), str(tmp_path / "x.html")])
    assert r"/caf\udce9 \|&lt;b> |" in (tmp_path / "x.md").read_text()
    assert r"/caf\udce9 |&lt;b&gt;</small>" in (tmp_path / "x.html").read_text()
