"""`benchmarks/serving.py`: every case runs on tiny models, and its measures are what they say."""

import pytest


@pytest.fixture(autouse=True)
def _benchmarks(repo, monkeypatch):
    monkeypatch.syspath_prepend(str(repo / "benchmarks"))


def test_every_case_of_the_serving_benchmark_runs_and_batches_change_no_answer():
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


def test_a_queue_for_one_server_is_in_the_order_of_arrival():
    from serving import one_at_a_time, quantile, summary

    # The second client's first request waits for the first one's; both then wait for each other in turn.
    seen = one_at_a_time([[2.0, 1.0], [3.0]], [0.0, 1.0])
    assert [(one.sent_s, one.end_s) for one in seen] == [(0.0, 2.0), (2.0, 6.0), (1.0, 5.0)]
    assert summary(seen)["requests_s"] == 0.5
    assert [quantile([3, 1, 2, 4], share) for share in (1, 25, 50, 99, 100)] == [1, 1, 2, 4, 4]
