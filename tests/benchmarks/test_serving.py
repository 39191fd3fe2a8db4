"""`benchmarks/serving.py`: every case runs on tiny models, and its measures are what they say."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture(autouse=True)
def _benchmarks(repo, monkeypatch):
    monkeypatch.syspath_prepend(str(repo / "benchmarks"))


def test_every_case_of_the_serving_benchmark_runs_and_batches_change_no_answer(tmp_path):
    import serving

    numbers = serving.main(["--tiny"])
    assert list(numbers) == list(serving.CASES)
    for name, case in numbers.items():
        assert case["rows"], name
        assert all(len(row) == len(case["header"]) for row in case["rows"]), name
    for name in ("closed", "open", "large_closed", "large_open"):
        assert "answers of batch of 1 equal to those of this: 3 of 3" in numbers[name]["notes"]
    assert "answers of offline equal to those of this: 3 of 3" in numbers["offline"]["notes"]
    assert "answers of this, without sockets equal to those of this: 3 of 3" in numbers["offline"]["notes"]
    serving.draw(numbers, tmp_path / "serving.png")
    assert (tmp_path / "serving.png").stat().st_size


def test_what_a_case_measured_is_kept_when_the_next_one_fails(tmp_path, monkeypatch):
    import serving

    def works(bench):
        """Works."""
        return {"header": ["a"], "rows": [["1"]], "notes": []}

    def fails(bench):
        raise serving.Refused("404")

    written = []
    monkeypatch.setattr(serving, "CASES", {"closed": (works, "small"), "late": (fails, "small")})
    monkeypatch.setattr(serving, "Bench", lambda *arguments: None)
    monkeypatch.setattr(serving, "STORED", tmp_path / "serving.json")
    monkeypatch.setattr(serving, "write_results", lambda name, text: written.append(text))
    with pytest.raises(serving.Refused):
        serving.main(["--case", "closed", "late"])
    assert list(json.loads((tmp_path / "serving.json").read_text())) == ["closed"]
    assert ["### closed" in text for text in written] == [True]


def test_another_server_that_refuses_a_request_is_left_out_and_named(monkeypatch):
    import serving

    def drive(url, *arguments):
        if url == "against":
            raise serving.Refused("it answers 400")
        return [serving.Seen(0.0, 1.0, 2.0)] * 2

    monkeypatch.setattr(serving, "drive", drive)
    options = SimpleNamespace(tiny=True, against=Path())
    case = serving.case_late(SimpleNamespace(options=options, prompts=["a"], server=lambda name: name))
    assert [row[0] for row in case["rows"]] == ["this"]
    assert "against is left out: it answers 400" in case["notes"]


def test_a_queue_for_one_server_is_in_the_order_of_arrival():
    from serving import one_at_a_time, quantile, summary

    # The second client's first request waits for the first one's; both then wait for each other in turn.
    seen = one_at_a_time([[2.0, 1.0], [3.0]], [0.0, 1.0])
    assert [(one.sent_s, one.end_s) for one in seen] == [(0.0, 2.0), (2.0, 6.0), (1.0, 5.0)]
    assert summary(seen)["requests_s"] == 0.5
    assert [quantile([3, 1, 2, 4], share) for share in (1, 25, 50, 99, 100)] == [1, 1, 2, 4, 4]
