"""The engine's thread answers, cancels, survives faults, and stops."""

import queue
import threading
import time

import pytest

from coda_serving.engine import Answer, Delta, Failure
from coda_serving.scheduler import CanvasRequest, QueueFull


@pytest.fixture
def start(serving_fakes):
    """Make engines that are stopped at the end."""
    engines = []

    def make(sampler, **changes):
        engine = serving_fakes.make_engine(sampler, serving_fakes.make_settings(**changes))
        engine.start()
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.stop(10)


@pytest.fixture
def ask(serving_fakes):
    """Make requests of the fake sampler."""

    def make(max_tokens=8, seed=0, stop=(), suffix=None, **options):
        return CanvasRequest(
            prompt_ids=(1, 2),
            suffix_ids=suffix,
            max_tokens=max_tokens,
            options=serving_fakes.sampling_options(**options),
            seed=seed,
            stop=stop,
        )

    return make


def collect(events):
    """All events up to the last one."""
    got = []
    while not got or isinstance(got[-1], Delta):
        got.append(events.get(timeout=20))
    return got


def submit(engine, *requests):
    queues = [queue.Queue() for _ in requests]
    return engine.submit(requests, [q.put for q in queues]), queues


def test_deltas_add_up_to_the_answer(start, ask, serving_fakes):
    engine = start(serving_fakes.FakeSampler(script=lambda r: "h\u00e9llo\n  w".encode()))
    _, (events,) = submit(engine, ask(max_tokens=16, seed=3))
    *deltas, answer = collect(events)
    assert "".join(d.text for d in deltas) == answer.text == "h\u00e9llo\n  w"
    assert (answer.finish_reason, answer.num_tokens) == ("stop", 10)


def test_a_late_request_joins_at_the_next_step_whatever_its_settings(start, ask, serving_fakes):
    gate = threading.Event()
    sampler = serving_fakes.FakeSampler(gate=gate, script=lambda r: bytes([65 + r.seed]) * r.max_tokens)
    engine = start(sampler)
    _, first = submit(engine, ask())
    while not sampler.batches:
        pass
    late = [ask(seed=1, steps=4), ask(seed=2, max_tokens=3, temperature=0.5), ask(seed=3, suffix=(1,), alg="p2")]
    _, rest = submit(engine, *late)
    gate.set()
    assert [collect(q)[-1].text[0] for q in first + rest] == list("ABCD")
    assert [len(batch) for batch in sampler.batches] == [1, 3]
    assert sampler.sizes[:2] == [1, 4]  # one step alone, and in the next all of them


def test_an_answer_is_told_before_the_rest_of_its_batch_is_done(start, ask, serving_fakes):
    sampler = serving_fakes.FakeSampler(script=lambda r: b"x" * (1 if r.seed == 0 else 200), step_s=0.01)
    engine = start(sampler)
    _, (short, long) = submit(engine, ask(max_tokens=2, suffix=(1,)), ask(max_tokens=100, seed=1, suffix=(1,)))
    assert collect(short)[-1].forwards <= 2
    assert long.empty() or isinstance(long.queue[-1], Delta)
    assert collect(long)[-1].forwards == 100


def test_a_stop_string_ends_the_computation(start, ask, serving_fakes, monkeypatch):
    sampler = serving_fakes.FakeSampler(script=lambda r: b"ab\n\n" + b"c" * 60)
    monkeypatch.setattr("random.Random.sample", lambda self, population, k: list(population))  # left to right
    engine = start(sampler)
    _, (events,) = submit(engine, ask(max_tokens=64, stop=("\n\n",)))
    answer = collect(events)[-1]
    assert (answer.text, answer.finish_reason, answer.forwards, sampler.forwards) == ("ab", "stop", 4, 4)


def test_the_end_of_the_text_ends_the_computation(start, ask, serving_fakes, monkeypatch):
    sampler = serving_fakes.FakeSampler(script=lambda r: b"ab")
    monkeypatch.setattr("random.Random.sample", lambda self, population, k: list(population))  # left to right
    engine = start(sampler)
    _, (events,) = submit(engine, ask(max_tokens=64))
    answer = collect(events)[-1]
    assert (answer.text, answer.finish_reason, answer.forwards, sampler.forwards) == ("ab", "stop", 3, 3)


def test_a_short_request_that_comes_late_takes_as_many_steps_as_in_a_fresh_pair(start, ask, serving_fakes):
    """It comes at 15 % of a long one, between two steps and in the middle of one."""

    def steps_of_short(at):
        sampler, told, took = serving_fakes.FakeSampler(script=lambda r: b"x" * 200), queue.Queue(), []

        class Rows(serving_fakes.FakeRows):
            def step(self):
                if sampler.forwards == at:
                    come()
                return super().step()

        def come():
            begun = sampler.forwards

            def listen(event):
                if isinstance(event, Answer):
                    took.append(sampler.forwards - begun)

            engine.submit([ask(max_tokens=20, seed=1)], [listen])

        sampler.start = lambda: Rows(sampler)
        engine = start(sampler)
        if at is None:
            come()
        engine.submit([ask(max_tokens=200)], [told.put])
        collect(told)
        return took[0]

    fresh, late = steps_of_short(None), steps_of_short(30)
    assert 20 <= fresh <= 21
    assert late <= 1.3 * fresh


def test_an_answer_that_has_ended_frees_its_place_at_once(start, ask, serving_fakes):
    sampler = serving_fakes.FakeSampler(script=lambda r: b"x" * 30, step_s=0.002)
    engine = start(sampler, max_batch_size=2)
    _, queues = submit(engine, ask(max_tokens=30), ask(max_tokens=5), ask(max_tokens=5), ask(max_tokens=5))
    assert [collect(q)[-1].num_tokens for q in queues] == [30, 5, 5, 5]
    assert sampler.sizes == [2] * 15 + [1] * 15


def test_a_row_that_fails_alone_leaves_the_others(start, ask, serving_fakes, caplog):
    class Faulty(serving_fakes.FakeRows):
        def advance(self, row):
            step = super().advance(row)
            if row.request.seed != 1:
                return step
            self.drop(row)
            return step._replace(error=RuntimeError("no numbers"))

    sampler = serving_fakes.FakeSampler()
    sampler.start = lambda: Faulty(sampler)
    engine = start(sampler)
    _, (good, bad) = submit(engine, ask(), ask(seed=1))
    assert isinstance(collect(bad)[-1], Failure)
    assert collect(good)[-1].text == "hello"
    assert "no numbers" in caplog.text


def test_a_request_that_cannot_be_begun_fails_alone(start, ask, serving_fakes, caplog):
    def script(request):
        if request.seed == 1:
            raise RuntimeError("cannot be begun")
        return b"hello"

    engine = start(serving_fakes.FakeSampler(script=script))
    for _ in range(2):
        _, (bad,) = submit(engine, ask(seed=1))
        assert isinstance(collect(bad)[-1], Failure)
    _, (good,) = submit(engine, ask())
    assert collect(good)[-1].text == "hello"
    assert "cannot be begun" in caplog.text


def test_cancelling_the_only_row_stops_the_batch(start, ask, serving_fakes):
    sampler = serving_fakes.FakeSampler(script=lambda r: b"x" * 500, step_s=0.005)
    engine = start(sampler)
    jobs, (events,) = submit(engine, ask(max_tokens=500))
    events.get(timeout=20)
    engine.cancel(jobs)
    _, (after,) = submit(engine, ask(max_tokens=3))
    assert isinstance(collect(after)[-1], Answer)
    assert sampler.forwards < 400


def test_a_batch_that_finishes_no_step_is_given_up_and_others_go_on(start, ask, serving_fakes, caplog):
    sampler = serving_fakes.FakeSampler(gate=threading.Event())
    engine, gate = start(sampler, step_timeout_s=0.2), sampler.gate
    _, (stuck,) = submit(engine, ask())
    assert collect(stuck) == [Failure("the model finished no step in 0.2 s")]
    assert "1 rows are given up" in caplog.text
    sampler.gate = None
    _, (events,) = submit(engine, ask())
    assert collect(events)[-1].text == "hello"
    assert engine.is_alive
    gate.set()  # the thread that was left behind ends, and answers nobody
    assert stuck.empty()


def test_an_engine_whose_next_thread_is_stuck_too_is_no_longer_alive(start, ask, serving_fakes):
    sampler = serving_fakes.FakeSampler(gate=threading.Event())
    engine = start(sampler, step_timeout_s=0.1)
    for seed in range(2):
        _, (events,) = submit(engine, ask(seed=seed))
        assert isinstance(collect(events)[-1], Failure)
    deadline = time.monotonic() + 5
    while engine.is_alive and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not engine.is_alive
    sampler.gate.set()


def test_cancelling_one_row_leaves_the_others(start, ask, serving_fakes):
    sampler = serving_fakes.FakeSampler(script=lambda r: b"x" * 40, step_s=0.005)
    engine = start(sampler)
    jobs, (gone, stays) = submit(engine, ask(max_tokens=40), ask(max_tokens=40, seed=1))
    engine.cancel(jobs[:1])
    assert collect(stays)[-1].text == "x" * 40
    assert not any(isinstance(e, Answer) for e in gone.queue)


def test_a_fault_fails_its_batch_and_the_next_one_runs(start, ask, serving_fakes, caplog):
    sampler = serving_fakes.FakeSampler(error=RuntimeError("out of luck"))
    engine = start(sampler)
    _, (events,) = submit(engine, ask())
    assert isinstance(collect(events)[-1], Failure)
    assert "out of luck" in caplog.text
    sampler.error = None
    _, (events,) = submit(engine, ask())
    assert collect(events)[-1].text == "hello"
    assert engine.is_alive


def test_stopping_fails_what_waits_and_ends_what_runs(ask, serving_fakes):
    sampler = serving_fakes.FakeSampler(script=lambda r: b"x" * 500, step_s=0.01)
    engine = serving_fakes.make_engine(sampler, serving_fakes.make_settings(max_batch_size=1))
    engine.start()
    _, (running, waiting) = submit(engine, ask(max_tokens=500), ask(max_tokens=500))
    running.get(timeout=20)
    engine.stop(10)
    assert not engine.is_alive
    assert "shutting down" in collect(running)[-1].message
    assert "shutting down" in collect(waiting)[-1].message


def test_a_full_queue_is_told_with_a_time(start, ask, serving_fakes):
    gate = threading.Event()
    sampler = serving_fakes.FakeSampler(gate=gate)
    engine = start(sampler, max_queue=2)
    submit(engine, ask())
    while not sampler.batches:
        pass
    submit(engine, ask(), ask())
    with pytest.raises(QueueFull):
        submit(engine, ask())
    assert (engine.num_waiting, engine.num_running) == (2, 1)
    assert engine.retry_after_s >= 1
    gate.set()
