"""The queue is bounded, oldest first, and puts together what may be together."""

import dataclasses
import threading

import pytest

from coda_serving.scheduler import CanvasRequest, Job, QueueFull, Scheduler
from CoDALanguageModel.decoding_settings import DecodingSettings


def job(prompt_length=4, max_tokens=8, suffix=None, **options):
    request = CanvasRequest(
        prompt_ids=(1,) * prompt_length,
        suffix_ids=suffix,
        max_tokens=max_tokens,
        options=DecodingSettings(**({"steps": 8} | options)),
        seed=0,
    )
    return Job(request, lambda event: None)


def scheduler(**limits):
    return Scheduler(**({"max_queue": 8, "max_batch_size": 4, "max_batch_tokens": 1000} | limits))


def test_jobs_of_all_settings_and_lengths_are_taken_together_oldest_first():
    queue = scheduler()
    jobs = [job(3), job(steps=4), job(max_tokens=20), job(max_tokens=5, suffix=(1, 2)), job(temperature=0.5)]
    queue.submit(jobs)
    assert queue.take([]) == jobs[:4]
    assert queue.take([12]) == jobs[4:]


def test_no_more_than_max_batch_size_jobs_run():
    queue = scheduler(max_batch_size=2)
    jobs = [job() for _ in range(5)]
    queue.submit(jobs)
    assert queue.take([]) == jobs[:2]
    assert queue.take([12, 12]) == []
    assert queue.take([12]) == jobs[2:3]


def test_max_batch_tokens_bounds_rows_times_longest_row():
    queue = scheduler(max_batch_tokens=40)
    small, large, other = job(4), job(24), job(4)
    queue.submit([small, large, other])
    assert queue.take([]) == [small, other]
    assert queue.take([12]) == []
    assert queue.take([]) == [large]


def test_a_job_that_does_not_fit_is_passed_only_so_often():
    queue = scheduler(max_queue=100, max_batch_size=4, max_batch_tokens=48)
    large, *small = job(24), *(job(4) for _ in range(20))
    queue.submit([large, *small])
    passed = 0
    while not (taken := queue.take([12])) or large not in taken:
        passed += len(taken)
        if not taken:  # the others wait for it now, and the rows that run end
            assert queue.take([]) == [large]
            break
    assert 4 <= passed <= 4 + 2


def test_a_single_job_over_the_token_bound_still_runs():
    queue = scheduler(max_batch_tokens=5)
    queue.submit([job(), job()])
    assert len(queue.take([])) == 1


def test_a_full_queue_takes_none_of_a_request():
    queue = scheduler(max_queue=3)
    queue.submit([job(), job()])
    with pytest.raises(QueueFull):
        queue.submit([job(), job()])
    assert len(queue) == 2
    queue.submit([job()])


def test_a_cancelled_job_leaves_the_queue():
    queue = scheduler()
    a, b = job(), job()
    queue.submit([a, b])
    queue.cancel(a)
    assert queue.take([]) == [b]


def test_where_nothing_runs_the_next_job_is_waited_for_and_else_not():
    queue = scheduler()
    assert queue.take([12]) == []
    late = job()
    threading.Timer(0.05, queue.submit, [[late]]).start()
    assert queue.take([]) == [late]


def test_closing_ends_the_wait_and_returns_what_waited():
    queue = scheduler()
    a, b = job(), job()
    queue.submit([a, b])
    assert queue.close() == [a, b]
    assert queue.take([]) == []
    assert queue.is_closed
    with pytest.raises(QueueFull):
        queue.submit([job()])


def test_with_seed_changes_nothing_else():
    request = job().request
    assert dataclasses.replace(request.with_seed(5), seed=0) == request
    assert request.with_seed(5).seed == 5
