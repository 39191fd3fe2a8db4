"""The queue is bounded, oldest first, and puts together what may be together."""

import threading
import time

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


def test_jobs_with_equal_settings_share_a_batch_and_others_wait():
    queue = scheduler()
    a, b, c, d = job(3), job(steps=4), job(5), job(temperature=0.5)
    queue.submit([a, b, c, d])
    assert [queue.next_batch() for _ in range(3)] == [[a, c], [b], [d]]


def test_answers_of_different_length_wait_for_each_other_but_gaps_do_not():
    queue = scheduler()
    chats, gaps = [job(max_tokens=4), job(max_tokens=5)], [job(max_tokens=n, suffix=(1, 2)) for n in (4, 5)]
    queue.submit([*chats, *gaps])
    assert [queue.next_batch() for _ in range(3)] == [[chats[0]], [chats[1]], gaps]


def test_a_batch_has_at_most_max_batch_size_jobs():
    queue = scheduler(max_batch_size=2)
    jobs = [job() for _ in range(5)]
    queue.submit(jobs)
    assert [len(queue.next_batch()) for _ in range(3)] == [2, 2, 1]


def test_max_batch_tokens_bounds_rows_times_longest_row():
    queue = scheduler(max_batch_tokens=40)
    small, large, other = job(4), job(24), job(4)
    queue.submit([small, large, other])
    assert queue.next_batch() == [small, other]
    assert queue.next_batch() == [large]


def test_a_single_job_over_the_token_bound_still_runs():
    queue = scheduler(max_batch_tokens=5)
    queue.submit([job()])
    assert len(queue.next_batch()) == 1


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
    assert queue.next_batch() == [b]


def test_a_job_waits_for_company_but_no_longer_than_told():
    queue = scheduler()
    first, second = job(), job()
    queue.submit([first])
    threading.Timer(0.05, queue.submit, [[second]]).start()
    assert queue.next_batch(wait_for_company_s=0.5) == [first, second]
    queue.submit([third := job()])
    started = time.monotonic()
    assert queue.next_batch(wait_for_company_s=0.05) == [third]
    assert time.monotonic() - started < 2


def test_a_full_batch_does_not_wait():
    queue = scheduler(max_batch_size=2)
    queue.submit([job(), job()])
    started = time.monotonic()
    assert len(queue.next_batch(wait_for_company_s=30)) == 2
    assert time.monotonic() - started < 5


def test_closing_ends_the_wait_and_returns_what_waited():
    queue = scheduler()
    a, b = job(), job()
    queue.submit([a, b])
    assert queue.close() == [a, b]
    assert queue.next_batch() == []
    with pytest.raises(QueueFull):
        queue.submit([job()])


def test_with_seed_changes_nothing_else():
    request = job().request
    assert request.with_seed(5).batch_key == request.batch_key
    assert (request.with_seed(5).seed, request.with_seed(5).prompt_ids) == (5, request.prompt_ids)
