"""Many clients at once, hostile ones, and the beginning and the end of a server; on real sockets, in this process."""

import asyncio
import contextlib
import gc
import json
import random
import resource
import signal
import socket
import threading
import time
from functools import partial

import httpx
import hypothesis
import pytest
import schemathesis
import uvicorn
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from coda_serving import __main__ as program
from coda_serving.__main__ import Server, answering, bind, check_defaults
from coda_serving.app import Service, build_app
from coda_serving.connections import Connection
from coda_serving.engine import Engine
from coda_serving.metrics import Metrics
from coda_serving.sampler import ModelSampler
from coda_serving.scheduler import Scheduler
from CoDALanguageModel.prompts import Codec


@contextlib.contextmanager
def web_server(app, drain_timeout_s=0):
    """Serve an app with the server's own web server, in a thread; gives its URL and the web server."""
    listener = bind("127.0.0.1", 0)
    http = partial(Connection, limit_s=60)
    server = Server(uvicorn.Config(app, http=http, log_config=None), app.state.engine, drain_timeout_s)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", server
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def wait_for(condition, timeout_s=20):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def model_app(model_folder, serving_fakes):
    """Make servers of the tiny model."""
    sampler, codec = ModelSampler.load(str(model_folder), device="cpu", dtype="float32"), Codec.load(str(model_folder))

    def make():
        settings = check_defaults(serving_fakes.make_settings(model_name=str(model_folder)), sampler)
        scheduler = Scheduler(max_queue=64, max_batch_size=16, max_batch_tokens=32768)
        metrics = Metrics()
        engine = Engine(sampler, codec.decode, scheduler, step_timeout_s=60, metrics=metrics)
        return build_app(Service(settings=settings, engine=engine, encoder=codec, limits=sampler, metrics=metrics))

    return make


REGIMES = [
    {},
    {"temperature": 0.9, "top_p": 0.8},
    {"alg": "p2"},
    {"alg": "origin", "stop": "e"},
    {"suffix": "return"},
    {"kv_cache": "dual", "threshold": 0.9},
    {"speculate": 2},
    {"remask": "conf", "temperature": 0.5},
    {"entropy_bound": 0.5, "suffix_window": 8, "logit_bias": {"5": 1.5}},
    {"infill": {"pieces": ["a", "bc", "d"], "lengths": [5, 9]}, "prompt": None},
]


def test_of_requests_that_come_at_any_time_each_gets_the_answer_it_gets_alone(model_app):
    """Mixed lengths, settings, seeds, gaps and regimes; as many together as there may be."""
    rng = random.Random(0)
    bodies = []
    for seed in range(24):
        body = {"prompt": "x" * rng.randint(1, 60), "max_tokens": rng.randint(20, 40), "seed": seed, "steps": 40}
        body |= REGIMES[seed % len(REGIMES)]
        if body["prompt"] is None:
            del body["prompt"], body["max_tokens"]
        bodies.append(body)
    app, sizes = model_app(), []
    app.state.engine._metrics.batch_size.observe = sizes.append

    async def ask(client, body, after_s):
        await asyncio.sleep(after_s)
        answer = await client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        usage = answer.json()["usage"]
        return answer.json()["choices"], usage["completion_tokens"], usage["forwards"], usage["regime"]

    async def test(url):
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            alone = [await ask(client, body, 0) for body in bodies]
            assert max(sizes) == 1
            return alone, await asyncio.gather(*(ask(client, body, rng.random() / 5) for body in bodies))

    with web_server(app) as (url, _):
        alone, together = asyncio.run(test(url))
    assert together == alone
    assert max(sizes) == 16


async def send(url, head, *pieces, pause_s=0.0):
    """A connection that has sent the head of a request and some of its body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    writer.write(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{head}\r\n".encode())
    for piece in pieces:
        await asyncio.sleep(pause_s)
        writer.write(piece)
    return reader, writer


async def chaotic(kind, url):
    """A client of one of many kinds; gives the status that it saw, if it read any."""
    body = json.dumps({"prompt": "a", "max_tokens": 40, "stream": kind in ("leaves", "slow reader")}).encode()
    length = f"Content-Length: {len(body)}\r\n"
    halves = body[:20], body[20:]
    if kind == "half body":
        _, writer = await send(url, length, halves[0])
    elif kind == "never ends":
        _, writer = await send(url, length, halves[0])
        await asyncio.sleep(1)
    elif kind == "huge body":
        reader, writer = await send(url, "Content-Length: 100000000\r\n", b"x" * 100_000)
        return int((await reader.read(12))[9:])
    elif kind == "huge chunks":
        chunk = b"%x\r\n%b\r\n" % (1 << 20, b"x" * (1 << 20))
        reader, writer = await send(url, "Transfer-Encoding: chunked\r\n", *[chunk] * 4)
        return int((await reader.read(12))[9:])
    elif kind == "no request":
        reader, writer = await send(url, "", b"\x16\x03\x01" * 50)
    else:
        slow = {"slow sender": 0.2}.get(kind, 0.0)
        reader, writer = await send(url, length, *halves, pause_s=slow)
        status = int((await reader.read(12))[9:])
        if kind == "leaves":
            await reader.read(50)
        else:
            while (data := await reader.read(64)) and b"[DONE]" not in data and b'"usage"' not in data:
                await asyncio.sleep(0.01 if kind == "slow reader" else 0)
        writer.close()
        return status
    writer.transport.abort()
    return None


KINDS = {
    "whole": 200,
    "slow reader": 200,
    "slow sender": 200,
    "leaves": 200,
    "huge body": 413,
    "huge chunks": 413,
    "half body": None,
    "never ends": None,
    "no request": None,
}


def test_two_hundred_chaotic_clients_leave_nothing_behind(serving_fakes):
    sampler = serving_fakes.FakeSampler(script=lambda r: b"x" * 40, step_s=0.001)
    app = serving_fakes.make_app(sampler, max_queue=200, heartbeat_s=0.2)
    kinds = [list(KINDS)[i % len(KINDS)] for i in range(200)]

    async def test(url):
        return await asyncio.wait_for(asyncio.gather(*(chaotic(kind, url) for kind in kinds)), 60)

    with web_server(app) as (url, server):
        statuses = asyncio.run(test(url))
        assert statuses == [KINDS[kind] for kind in kinds]
        wait_for(lambda: not server.server_state.connections and not server.server_state.tasks)
        engine = app.state.engine
        assert (engine.num_waiting, engine.num_running) == (0, 0)
        assert not engine._scheduler._callers or engine._scheduler._callers.keys() == {"127.0.0.1"}
        assert httpx.post(url + "/v1/completions", json={"prompt": "a"}).status_code == 200


@pytest.mark.parametrize("num", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_requests_leave_no_memory_behind(model_app, num):
    app = model_app()

    async def ask(url):
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            for start in range(0, num, 20):
                bodies = [
                    {"prompt": "x" * (1 + seed % 50), "max_tokens": 8, "seed": seed, "stream": bool(seed % 2)}
                    for seed in range(start, start + 20)
                ]
                answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))
                assert {answer.status_code for answer in answers} == {200}

    def held():
        state, engine = server.server_state, app.state.engine
        wait_for(lambda: not (state.connections or state.tasks or engine.num_waiting or engine.num_running))
        gc.collect()
        return len(gc.get_objects()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    with web_server(app) as (url, server):
        asyncio.run(ask(url))
        before = held()
        asyncio.run(ask(url))
        after = held()
    assert after[0] - before[0] < 5 * num + 300  # a request takes hundreds while it runs
    assert after[1] - before[1] < 20 << 10  # KiB


def test_the_documented_api_is_what_the_server_does(serving_fakes, pytestconfig):
    """Every operation, with bodies by the schema: no fault of the server, and no status or kind without a word."""
    app = serving_fakes.make_app(serving_fakes.FakeSampler(context_length=300), max_queue=16)
    num = 400 if pytestconfig.getoption("-m") == "slow" else 10
    with web_server(app) as (url, _):
        schema = schemathesis.openapi.from_url(url + "/openapi.json")
        for result in schema.get_all_operations():
            operation = result.ok()

            @hypothesis.settings(
                max_examples=num,
                deadline=None,
                database=None,
                derandomize=True,
                suppress_health_check=list(hypothesis.HealthCheck),
                phases=[hypothesis.Phase.generate],
            )
            @hypothesis.given(case=operation.as_strategy())
            def check(case):
                case.validate_response(
                    case.call(),
                    checks=[
                        not_a_server_error,
                        checks.status_code_conformance,
                        checks.content_type_conformance,
                        checks.response_schema_conformance,
                    ],
                )

            check()


@pytest.mark.parametrize(("max_tokens", "drain_timeout_s"), [(40, 20), (1000, 1)])
def test_a_server_that_ends_finishes_what_runs_streams_or_waits_and_refuses_what_comes(
    serving_fakes, max_tokens, drain_timeout_s
):
    """What is not finished in time is told so."""
    sampler = serving_fakes.FakeSampler(script=lambda r: b"x" * max_tokens, step_s=0.02)
    answers = {}
    app = serving_fakes.make_app(sampler, max_batch_size=2)
    with web_server(app, drain_timeout_s) as (url, server):
        probe = httpx.Client(base_url=url, timeout=20)

        def ask(name, **fields):
            body = {"prompt": "a", "max_tokens": max_tokens} | fields
            answers[name] = httpx.post(url + "/v1/completions", json=body, timeout=20)

        def state():
            return probe.get("/health").json()

        wait_for(lambda: server.started)
        threads = [
            threading.Thread(target=ask, args=(name,), kwargs={"stream": name == "streams"})
            for name in ("runs", "streams", "waits")
        ]
        for thread in threads[:2]:
            thread.start()
        wait_for(lambda: state()["running"] == 2)
        threads[2].start()
        wait_for(lambda: state()["waiting"] == 1)
        server.should_exit = True
        wait_for(lambda: probe.get("/ready").status_code == 503)
        refused = httpx.post(url + "/v1/completions", json={"prompt": "a"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_shutting_down")
        for thread in threads:
            thread.join(20)
    if drain_timeout_s == 20:
        assert [answers[name].status_code for name in ("runs", "streams", "waits")] == [200, 200, 200]
        assert answers["waits"].json()["choices"][0]["text"] == "x" * max_tokens
        assert answers["streams"].text.endswith("data: [DONE]\n\n")
    else:
        assert [answers[name].status_code for name in ("runs", "streams", "waits")] == [503, 200, 503]
        assert "server_shutting_down" in answers["streams"].text


def test_while_the_model_is_loaded_the_port_answers_503():
    listener = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with answering(listener):
        ready = httpx.get(url + "/ready", timeout=20)
        asked = [httpx.post(url + path, content=b"x" * 3_000_000) for path in ("/v1/completions", "/v1/messages")]
    assert (ready.status_code, ready.json()) == (503, {"status": "loading"})
    assert [answer.status_code for answer in asked] == [503, 503]
    assert asked[0].json()["error"]["code"] == "model_loading"
    assert asked[1].json()["error"]["type"] == "overloaded_error"
    # The port still listens: who comes between the two servers is answered by the second.
    socket.create_connection(listener.getsockname(), 5).close()
    listener.close()


def test_the_first_process_of_a_container_ends_also_while_the_model_is_loaded(serving_fakes, monkeypatch):
    """The system passes a signal to such a process only if it handles it."""

    def load_app(settings):
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("the signal was ignored")

    monkeypatch.setattr(program, "load_app", load_app)
    monkeypatch.setattr(program.os, "getpid", lambda: 1)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit) as end:
            program.serve(serving_fakes.make_settings(port=serving_fakes.free_port()))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert end.value.code == 0


def test_the_model_is_loaded_by_a_thread_that_has_ended(serving_fakes, model_folder, monkeypatch):
    """With its threads of OpenMP: with two sets of them on the same cores, all sleep between any two operations."""
    load, loaders = ModelSampler.load, []

    def noted(*arguments, **options):
        loaders.append(threading.current_thread())
        return load(*arguments, **options)

    monkeypatch.setattr(ModelSampler, "load", noted)
    program.load_app(serving_fakes.make_settings(model_name=str(model_folder), steps=8, max_tokens=8))
    assert [thread.is_alive() for thread in loaders] == [False]


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, program.SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, None)],
)
def test_threads_without_work_sleep_soon_unless_the_operator_decides(given, spins, serving_fakes, monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(program.sys, "argv", ["coda_serving"])
    monkeypatch.setattr(program, "load_settings", lambda file: serving_fakes.make_settings())
    served = []
    monkeypatch.setattr(program, "serve", lambda settings: served.append(program.os.environ.get("GOMP_SPINCOUNT")))
    assert program.main() == 0
    assert served == [spins]
