"""The HTTP surface, in process and with a fake model."""

import asyncio
import json
import threading
import time

import httpx
import pytest

CODE = "\n\ndef f(x):\n\treturn  x   # two  spaces\n\n\n"
CHAT = {"messages": [{"role": "user", "content": "hi"}]}
URL = "/v1/chat/completions"


def post(url, **body):
    async def test(client):
        return await client.post(url, json=body)

    return test


def test_code_keeps_its_whitespace(serve, serving_fakes):
    sampler = serving_fakes.FakeSampler(script=lambda r: CODE.encode())
    response = serve(post(URL, **CHAT, max_tokens=80), sampler)
    assert response.status_code == 200
    choice = response.json()["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": CODE, "refusal": None}
    assert choice["finish_reason"] == "stop"


def test_usage_counts_tokens_and_forwards(serve):
    usage = serve(post(URL, **CHAT, max_tokens=16)).json()["usage"]
    assert usage["prompt_tokens"] == len("[user]hi")
    assert usage["completion_tokens"] == len("hello")
    assert usage["total_tokens"] == usage["prompt_tokens"] + 5
    assert usage["tokens_per_forward"] == round(5 / usage["forwards"], 3)
    assert usage["regime"] == "exact"


@pytest.mark.parametrize(
    ("fields", "regime"),
    [
        ({"speculate": 2, "kv_cache": "none"}, "exact"),
        ({"kv_cache": "dual"}, "cached"),
        ({"threshold": 0.9}, "parallel"),
        ({"suffix_window": 8, "entropy_bound": 0.1}, "cached+parallel"),
    ],
)
def test_usage_names_the_regime(serve, fields, regime):
    async def test(client):
        streamed = {"stream": True, "stream_options": {"include_usage": True}}
        return [
            (await client.post("/v1/completions", json={"prompt": "a"} | fields)).json()["usage"]["regime"],
            (await client.post("/v1/messages", json=CHAT | {"max_tokens": 9} | fields)).json()["usage"]["regime"],
            (await client.post(URL, json=CHAT | fields | streamed)).text.count(f'"regime": "{regime}"'),
        ]

    assert serve(test) == [regime, regime, 1]


def test_request_fields_reach_the_canvas(serve, serving_fakes):
    sampler = serving_fakes.FakeSampler()
    body = dict(
        max_completion_tokens=9,
        temperature=0.5,
        top_p=0.8,
        top_k=3,
        seed=11,
        steps=7,
        alg="origin",
        alg_temp=0.2,
        block_length=4,
        stop=["x"],
        n=2,
    )
    serve(post(URL, **CHAT, **body), sampler)
    rows = [request for batch in sampler.batches for request in batch]
    assert [row.seed for row in rows] == [11, 12]
    assert rows[0].max_tokens == 9
    assert rows[0].stop == ("x",)
    assert rows[0].options == serving_fakes.sampling_options(
        temperature=0.5, top_p=0.8, top_k=3, steps=7, alg="origin", alg_temp=0.2, block_length=4
    )


def test_settings_are_the_defaults_of_the_canvas(serve, serving_fakes):
    sampler = serving_fakes.FakeSampler()
    values = dict(
        steps=5, alg="topk_margin", alg_temp=0.3, temperature=0.7, top_p=0.6, top_k=9, block_length=8, seed=42
    )
    serve(post(URL, **CHAT), sampler, max_tokens=21, **values)
    (request,) = sampler.batches[0]
    assert (request.max_tokens, request.seed) == (21, values.pop("seed"))
    assert request.options == serving_fakes.sampling_options(**values)


def test_without_a_seed_greedy_answers_repeat_and_sampled_ones_do_not(serve, serving_fakes):
    sampler = serving_fakes.FakeSampler()

    async def test(client):
        for temperature in (0, 0, 0.5, 0.5):
            await client.post(URL, json=CHAT | {"temperature": temperature})

    serve(test, sampler)
    seeds = [batch[0].seed for batch in sampler.batches]
    assert seeds[:2] == [0, 0]
    assert len(set(seeds[2:])) == 2


def test_top_k_zero_or_less_takes_all(serve, serving_fakes):
    sampler = serving_fakes.FakeSampler()
    serve(post(URL, **CHAT, top_k=-1), sampler, top_k=5)
    assert sampler.batches[0][0].options.top_k is None


def test_suffix_makes_a_gap_and_an_empty_one_does_not(serve, serving_fakes):
    sampler = serving_fakes.FakeSampler(script=lambda r: b"mid")

    async def test(client):
        gap = await client.post("/v1/completions", json={"prompt": "ab", "suffix": "yz", "max_tokens": 3})
        await client.post("/v1/completions", json={"prompt": "ab", "suffix": "", "max_tokens": 3})
        return gap.json()

    answer = serve(test, sampler)
    gap, plain = (batch[0] for batch in sampler.batches)
    assert (gap.prompt_ids, gap.suffix_ids, gap.max_tokens) == (tuple(b"ab"), tuple(b"yz"), 3)
    assert plain.suffix_ids is None
    assert (answer["choices"][0]["text"], answer["usage"]["prompt_tokens"]) == ("mid", 4)


def test_several_prompts_and_choices_come_in_order(serve, serving_fakes):
    sampler = serving_fakes.FakeSampler(script=lambda r: bytes([*r.prompt_ids, 48 + r.seed]))
    body = serve(post("/v1/completions", prompt=["a", "b"], n=2, seed=1, max_tokens=4), sampler).json()
    assert [(c["index"], c["text"]) for c in body["choices"]] == [(0, "a1"), (1, "a2"), (2, "b1"), (3, "b2")]
    assert body["usage"]["prompt_tokens"] == 2


def test_an_empty_prompt_is_the_beginning_of_a_document(serve, serving_fakes):
    sampler = serving_fakes.FakeSampler()
    serve(post("/v1/completions", prompt=""), sampler)
    assert sampler.batches[0][0].prompt_ids == (serving_fakes.DOCUMENT_START,)
    sampler = serving_fakes.FakeSampler(document_start_id=None)
    assert serve(post("/v1/completions", prompt=""), sampler).status_code == 400


def test_a_stop_string_cuts_the_answer(serve, serving_fakes):
    sampler = serving_fakes.FakeSampler(script=lambda r: b"one\n\ntwo")
    choice = serve(post("/v1/completions", prompt="a", stop="\n\n"), sampler).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("one", "stop")


def test_the_models_own_stop_strings_hold_unless_the_request_names_others(serve, serving_fakes):
    def asked(**body):
        sampler = serving_fakes.FakeSampler(stop=("\n\n",))
        serve(post("/v1/completions", prompt="a", **body), sampler)
        return sampler.batches[0][0].stop

    assert asked() == asked(stop=None) == ("\n\n",)
    assert asked(stop=["x"]) == ("x",)
    assert asked(stop=[]) == ()


@pytest.mark.parametrize(
    ("body", "status", "param", "words"),
    [
        ({"messages": []}, 400, "messages", "at least 1"),
        ({**CHAT, "max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
        ({**CHAT, "temprature": 1}, 400, "temprature", "did you mean 'temperature'"),
        ({**CHAT, "audio": {}}, 400, "audio", "not supported"),
        ({**CHAT, "max_tokens": 5000}, 400, "messages", "maximum context length is 2000"),
        ({**CHAT, "model": "gpt"}, 404, "model", "the model is 'tiny'"),
        ({**CHAT, "n": 100}, 400, "n", "queue of 64"),
        ({}, 400, "messages", "required"),
        ([1], 400, None, "must be an object"),
    ],
)
def test_the_clients_mistakes_have_openais_shape(serve, body, status, param, words):
    async def test(client):
        return await client.post(URL, json=body)

    response = serve(test)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param)
    assert words in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_a_body_that_is_not_json_is_the_clients_mistake(serve):
    async def test(client):
        return [
            await client.post(URL, content=content, headers={"Content-Type": "application/json"})
            for content in (b"{", b"\xff", b"", b"[" * 3000)
        ]

    for response in serve(test):
        assert response.status_code == 400, response.text
        assert response.json()["error"]["message"]


def test_unknown_paths_and_methods_have_openais_shape(serve):
    async def test(client):
        return await client.get("/v1/nothing"), await client.get(URL)

    missing, method = serve(test)
    assert (missing.status_code, method.status_code) == (404, 405)
    assert "error" in missing.json()
    assert "error" in method.json()


def test_a_failing_model_is_a_server_error_and_the_next_request_works(serve, serving_fakes):
    sampler = serving_fakes.FakeSampler(error=RuntimeError("secret reason"))

    async def test(client):
        first = await client.post(URL, json=CHAT)
        streamed = await client.post(URL, json=CHAT | {"stream": True})
        sampler.error = None
        return first, streamed, await client.post(URL, json=CHAT)

    first, streamed, second = serve(test, sampler)
    assert first.status_code == 500
    assert "secret" not in first.text + streamed.text
    assert '"error"' in streamed.text
    assert "[DONE]" not in streamed.text
    assert second.status_code == 200


def test_health_and_models(serve):
    async def test(client):
        return [(await client.get(url)).json() for url in ("/health", "/v1/models", "/v1/models/coda")]

    health, models, model = serve(test, served_model_name="coda")
    assert health == {"status": "ok", "model": "coda", "waiting": 0, "running": 0}
    assert models["data"] == [model]
    assert (model["id"], model["max_model_len"]) == ("coda", 2000)


def test_a_key_protects_everything_but_health(serve):
    async def test(client):
        wrong = {"Authorization": "Bearer secret2"}
        return [
            (await client.post(URL, json=CHAT)).status_code,
            (await client.post(URL, json=CHAT, headers=wrong)).status_code,
            (await client.get("/v1/models")).status_code,
            (await client.get("/metrics")).status_code,
            (await client.get("/health")).status_code,
            (await client.post(URL, json=CHAT, headers={"Authorization": "Bearer secret"})).status_code,
        ]

    assert serve(test, api_key="secret") == [401, 401, 401, 401, 200, 200]


def test_browsers_may_call_only_from_named_origins(serve):
    async def test(client):
        return [(await client.get("/health", headers={"Origin": o})).headers for o in ("http://a", "http://b")]

    name = "access-control-allow-origin"
    assert [name in headers for headers in serve(test)] == [False, False]
    assert [headers.get(name) for headers in serve(test, cors_origins="http://a")] == ["http://a", None]


def test_metrics_count_responses_by_route(serve):
    async def test(client):
        await client.post(URL, json=CHAT)
        await client.post(URL, json=CHAT | {"max_tokens": 0})
        await client.get("/no/such/path")
        return (await client.get("/metrics")).text

    text = serve(test)
    assert 'coda_responses_total{path="/v1/chat/completions",status="200"} 1.0' in text
    assert 'coda_responses_total{path="/v1/chat/completions",status="400"} 1.0' in text
    assert 'path="unknown",status="404"' in text
    assert "coda_answer_tokens_total 5.0" in text
    assert "coda_queue_size 0.0" in text


def test_metrics_count_what_is_refused_at_the_gate_by_route(serve):
    key = {"Authorization": "Bearer k"}

    async def test(client):
        await client.post(URL, json=CHAT)
        await client.post(URL, json=CHAT | {"user": "x" * 3000}, headers=key)
        await client.get("/v1/models/any")
        await client.get("/v1/no/such/path")
        return (await client.get("/metrics", headers=key)).text

    text = serve(test, api_key="k", max_body_bytes=2000)
    counted = {line.partition("{")[2] for line in text.splitlines() if line.startswith("coda_responses_total")}
    assert counted == {
        'path="/v1/chat/completions",status="401"} 1.0',
        'path="/v1/chat/completions",status="413"} 1.0',
        'path="/v1/models/{name:path}",status="401"} 1.0',
        'path="unknown",status="401"} 1.0',
    }


def test_health_answers_at_once_while_the_model_works(serve, serving_fakes):
    gate = threading.Event()
    sampler = serving_fakes.FakeSampler(gate=gate)

    async def test(client):
        long = asyncio.create_task(client.post(URL, json=CHAT))
        while not sampler.batches:
            await asyncio.sleep(0.01)
        started = time.monotonic()
        health = await client.get("/health")
        elapsed_s = time.monotonic() - started
        gate.set()
        await long
        return health.json()["running"], elapsed_s

    running, elapsed_s = serve(test, sampler)
    assert running == 1
    assert elapsed_s < 0.2


def test_a_full_queue_answers_429_with_a_time_and_lets_another_caller_have_its_share(serve, serving_fakes):
    gate = threading.Event()
    sampler = serving_fakes.FakeSampler(gate=gate)

    async def test(client):
        first = asyncio.create_task(client.post(URL, json=CHAT))
        while not sampler.batches:
            await asyncio.sleep(0.01)
        waiting = [asyncio.create_task(client.post(URL, json=CHAT)) for _ in range(2)]
        while (await client.get("/health")).json()["waiting"] < 2:
            await asyncio.sleep(0.01)
        refused = [await client.post(URL, json=CHAT), await client.post(URL, json=CHAT | {"stream": True})]
        transport = httpx.ASGITransport(client._transport.app, client=("10.0.0.2", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as other:
            # The share of each of the two is one place.
            waiting.append(asyncio.create_task(other.post(URL, json=CHAT)))
            while (await client.get("/health")).json()["waiting"] < 3:
                await asyncio.sleep(0.01)
            refused.append(await other.post(URL, json=CHAT))
            gate.set()
            return refused, await asyncio.gather(first, *waiting)

    refused, answered = serve(test, sampler, max_queue=2)
    for response in refused:
        assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")
        assert int(response.headers["Retry-After"]) >= 1
    assert [response.status_code for response in answered] == [200] * 4


def test_a_request_that_takes_too_long_is_cancelled(serve, serving_fakes):
    sampler = serving_fakes.FakeSampler(script=lambda r: b"x" * 500, step_s=0.01)

    async def test(client):
        plain = await client.post(URL, json=CHAT | {"max_tokens": 500})
        streamed = await client.post(URL, json=CHAT | {"max_tokens": 500, "stream": True})
        while (await client.get("/health")).json()["running"]:
            await asyncio.sleep(0.01)
        return plain, streamed

    plain, streamed = serve(test, sampler, request_timeout_s=0.2)
    assert (plain.status_code, plain.json()["error"]["type"]) == (504, "timeout_error")
    assert "no answer within 0.2 s" in streamed.text
    assert sampler.forwards < 500


def test_a_request_that_is_not_begun_in_time_is_told_so_and_one_that_is_has_the_rest_of_its_own_time(
    serve, serving_fakes
):
    """Limit of the queue, time in the queue and time of a request have each a status and a code of their own."""
    sampler = serving_fakes.FakeSampler(script=lambda r: b"x" * 200, step_s=0.005)
    long = CHAT | {"max_tokens": 200}

    async def test(client):
        running = asyncio.create_task(client.post(URL, json=long))
        while not sampler.batches:
            await asyncio.sleep(0.01)
        waiting = [asyncio.create_task(client.post(URL, json=long | more)) for more in ({}, {"stream": True})]
        while (await client.get("/health")).json()["waiting"] < 2:
            await asyncio.sleep(0.01)
        full = await client.post(URL, json=long)
        plain, streamed = await asyncio.gather(*waiting)
        left = (await client.get("/health")).json()
        return await running, full, plain, streamed, left

    options = {"max_batch_size": 1, "max_queue": 2, "queue_timeout_s": 0.3, "request_timeout_s": 20}
    running, full, plain, streamed, left = serve(test, sampler, **options)
    assert (left["running"], left["waiting"]) == (1, 0)
    assert running.status_code == 200
    assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
    error = plain.json()["error"]
    assert (plain.status_code, error["code"]) == (503, "queue_timeout")
    assert "no answer was begun within 0.3 s (QUEUE_TIMEOUT_S)" in error["message"]
    assert int(plain.headers["Retry-After"]) >= 1
    assert '"code": "queue_timeout"' in streamed.text
    assert sampler.forwards == 200


@pytest.mark.parametrize("hosts", [("10.0.0.1", "10.0.0.2"), ("10.0.0.1", "10.0.0.1")])
def test_callers_are_told_apart_by_the_names_of_their_keys_or_else_by_their_addresses(serving_fakes, tmp_path, hosts):
    """One that sends twenty requests at once does not hold another one up."""
    sampler = serving_fakes.FakeSampler(script=lambda r: b"x" * 30, step_s=0.002)
    (tmp_path / "keys").write_text("one:first\ntwo:second\n")
    has_keys = hosts[0] == hosts[1]
    app = serving_fakes.make_app(sampler, max_batch_size=2, **{"api_keys_file": tmp_path / "keys"} if has_keys else {})

    async def test():
        async with app.router.lifespan_context(app):
            clients = [
                httpx.AsyncClient(
                    transport=httpx.ASGITransport(app=app, client=(host, 1)),
                    base_url="http://test",
                    headers={"Authorization": f"Bearer {key}"},
                )
                for host, key in zip(hosts, ("first", "second"), strict=True)
            ]
            ask = CHAT | {"max_tokens": 30}
            flood = [asyncio.create_task(clients[0].post(URL, json=ask | {"seed": 1})) for _ in range(20)]
            while app.state.engine.num_waiting < 18:
                await asyncio.sleep(0.001)
            assert (await clients[1].post(URL, json=ask | {"seed": 2})).status_code == 200
            num_done = sum(task.done() for task in flood)
            await asyncio.gather(*flood)
            return num_done

    assert asyncio.run(test()) <= 6


def test_a_server_is_not_ready_while_it_finishes_what_it_has_accepted(serve, serving_fakes):
    gate = threading.Event()
    sampler = serving_fakes.FakeSampler(gate=gate)
    app = serving_fakes.make_app(sampler)

    async def test():
        async with serving_fakes.open_client(app) as client:
            before = await client.get("/ready")
            running = asyncio.create_task(client.post(URL, json=CHAT))
            while not sampler.batches:
                await asyncio.sleep(0.01)
            app.state.engine.is_draining = True
            answers = [await client.get(url) for url in ("/ready", "/health")]
            answers += [await client.post(url, json=CHAT | {"max_tokens": 9}) for url in (URL, "/v1/messages")]
            gate.set()
            answers.append(await running)
        return before, answers

    before, (ready, health, refused, other, running) = asyncio.run(test())
    assert (before.status_code, before.json()) == (200, {"status": "ready"})
    assert (ready.status_code, ready.json()) == (503, {"status": "draining"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_shutting_down")
    assert refused.headers["Retry-After"] == "5"
    assert (other.status_code, other.json()["error"]["type"]) == (503, "overloaded_error")
    assert health.status_code == running.status_code == 200


def test_a_client_that_leaves_frees_the_model(serving_fakes):
    """Also one that leaves before its stream has begun, and one that several candidates are denoised for."""
    chat = CHAT | {"max_tokens": 500}
    gap = {"input_prefix": "a", "input_suffix": "b", "n_predict": 400}

    async def run(stream, url=URL, body=chat):
        gate = threading.Event()
        sampler = serving_fakes.FakeSampler(script=lambda r: b"x" * 500, step_s=0.005, gate=gate)
        app = serving_fakes.make_app(sampler)
        body = json.dumps(body | {"stream": stream}).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        sent = []

        async def receive():
            if messages:
                return messages.pop()
            while not sampler.batches:
                await asyncio.sleep(0.01)
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": url, "query_string": b"", "root_path": ""}
        scope |= {"headers": [(b"content-type", b"application/json")], "asgi": {"spec_version": "2.3"}}
        async with app.router.lifespan_context(app):
            await asyncio.wait_for(app(scope, receive, send), 20)
            gate.set()
        return sampler.forwards

    assert asyncio.run(run(False)) <= 1
    assert asyncio.run(run(True)) <= 1
    assert asyncio.run(run(False, "/infill", gap)) <= 1
    assert asyncio.run(run(True, "/v1/messages", chat)) <= 1


def test_two_servers_in_one_process_share_nothing(serve, serving_fakes):
    texts = [serve(post(URL, **CHAT), serving_fakes.FakeSampler(script=lambda r, t=t: t.encode())).json() for t in "ab"]
    assert [t["choices"][0]["message"]["content"] for t in texts] == ["a", "b"]
