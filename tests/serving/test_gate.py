"""What is refused before it is read, parsed or run: keys, sizes, kinds and hostile values."""

import asyncio
import json
import threading

import pytest

from coda_serving.__main__ import check_defaults
from coda_serving.gate import Gate
from coda_serving.keys import Keys
from coda_serving.streaming import EventStream, with_heartbeat
from CoDALanguageModel.errors import UserError

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
URLS = {"/v1/chat/completions": CHAT, "/v1/completions": {"prompt": "hi"}}
JSON = {"Content-Type": "application/json"}


class Client:
    """Sends a body in chunks as fast as it is received, and counts them."""

    def __init__(self, headers, chunks=1000, size=1000, path="/v1/completions"):
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        self.scope = {"type": "http", "method": "POST", "path": path, "headers": raw, "query_string": b""}
        self.scope |= {"http_version": "1.1", "scheme": "http", "server": ("test", 80), "client": ("test", 1)}
        self.chunks, self.size, self.received, self.sent = chunks, size, 0, []
        self.received_before_answer = None

    async def receive(self):
        self.received += 1
        return {"type": "http.request", "body": b"x" * self.size, "more_body": self.received < self.chunks}

    async def send(self, message):
        if message["type"] == "http.response.body" and message.get("body"):
            self.received_before_answer = self.received
        self.sent.append(message)

    def ask(self, app):
        asyncio.run(app(self.scope, self.receive, self.send))
        error = json.loads(b"".join(message.get("body", b"") for message in self.sent[1:]))["error"]
        return self.sent[0]["status"], error["code"]


@pytest.fixture
def app(serving_fakes):
    return serving_fakes.make_app(serving_fakes.FakeSampler(), api_key="secret", max_body_bytes=10_000)


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/models", "/v1/nothing", "/metrics"])
def test_without_the_key_no_byte_of_a_body_is_received(app, headers, path):
    client = Client({**JSON, **headers, "Content-Length": "1000000"}, path=path)
    assert client.ask(app) == (401, "invalid_api_key")
    assert client.received_before_answer == 0


def test_a_body_beyond_the_limit_is_never_held(app):
    key = {**JSON, "Authorization": "Bearer secret"}
    announced = Client({**key, "Content-Length": "1000000"})
    assert announced.ask(app) == (413, "body_too_large")
    assert announced.received_before_answer == 0
    chunked = Client({**key, "Transfer-Encoding": "chunked"})
    assert chunked.ask(app) == (413, "body_too_large")
    assert chunked.received_before_answer == 11


def test_a_refused_body_is_thrown_away_before_the_connection_ends(app):
    """Else the connection is reset, and a client that is still sending never reads its answer."""
    client = Client({**JSON, "Content-Length": "1000000"})
    assert client.ask(app) == (401, "invalid_api_key")
    assert client.received == client.chunks
    assert [message.get("more_body", False) for message in client.sent[1:]] == [True, False]


def test_a_client_that_never_ends_its_body_is_not_waited_for(app, monkeypatch):
    monkeypatch.setattr("coda_serving.gate.LINGER_S", 0.05)
    client = Client(JSON)

    async def hangs():
        await asyncio.sleep(60)

    client.receive = hangs
    assert client.ask(app) == (401, "invalid_api_key")


def test_what_the_end_of_the_server_cuts_off_gets_503(serving_fakes):
    async def hangs(scope, receive, send):
        await asyncio.sleep(60)

    client = Client(JSON)

    async def test():
        gate = Gate(hangs, serving_fakes.make_settings(), Keys())
        running = asyncio.ensure_future(gate(client.scope, client.receive, client.send))
        await asyncio.sleep(0)
        running.cancel()
        await running

    asyncio.run(test())
    assert client.sent[0]["status"] == 503
    assert json.loads(client.sent[1]["body"])["error"]["code"] == "server_shutting_down"


def test_a_server_that_stops_answers_what_it_was_working_on_with_503(serving_fakes):
    sampler = serving_fakes.FakeSampler(gate=threading.Event())
    app = serving_fakes.make_app(sampler, drain_timeout_s=0)

    async def test():
        async with serving_fakes.open_client(app) as client:
            running = asyncio.ensure_future(client.post("/v1/completions", json={"prompt": "a"}))
            while not sampler.batches:
                await asyncio.sleep(0.01)
            waiting = asyncio.ensure_future(client.post("/v1/completions", json={"prompt": "b"}))
            await asyncio.sleep(0.05)
            app.state.engine.stop(0)
            sampler.gate.set()
            return await asyncio.gather(running, waiting)

    for response in asyncio.run(test()):
        assert (response.status_code, response.json()["error"]["code"]) == (503, "server_shutting_down")


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({}, "must be application/json, got none"),
        ({"Content-Type": "text/plain"}, "must be application/json, got 'text/plain'"),
        ({"Content-Type": "application/x-www-form-urlencoded"}, "must be application/json"),
        ({"Content-Type": "application/json; charset=latin-1"}, "charset must be utf-8, got 'latin-1'"),
        ({**JSON, "Content-Encoding": "gzip"}, "Content-Encoding must be identity, got 'gzip'"),
    ],
)
def test_another_kind_of_body_is_named(serve, headers, words):
    async def test(client):
        return await client.post("/v1/completions", content=b'{"prompt": "a"}', headers=headers)

    response = serve(test)
    assert response.status_code == 415
    assert words in response.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=UTF-8", "Application/JSON"])
def test_json_with_or_without_a_charset_is_read(serve, kind):
    async def test(client):
        return await client.post(
            "/v1/completions", content=b'\xef\xbb\xbf{"prompt": "a"}', headers={"Content-Type": kind}
        )

    assert serve(test).status_code == 200


HOSTILE = [
    (b'{"prompt": "\xff"}', "not UTF-8"),
    (b'{"prompt": NaN}', "NaN is no JSON number"),
    (b'{"prompt": "a", "temperature": Infinity}', "Infinity is no JSON number"),
    (b'{"prompt": [' + b"1" * 5000 + b"]}", "not JSON"),
    (b'{"prompt": ' + b"[" * 100_000, "nested too deeply"),
    (b'{"a": ' * 50_000, "nested too deeply"),
    (b'{"\\ud800": 1, "prompt": "a"}', "unknown field '\\ud800'"),
    (b'{"prompt": "\\ud800"}', "lone surrogate"),
    (b"[]", "the body: must be an object, got []"),
    (json.dumps({"prompt": [None] * 20_000}).encode(), "prompt.0: must be a string, a list of strings"),
    (json.dumps({"prompt": [[1.5] * 20_000] * 3}).encode(), "prompt.0.0: "),
    (json.dumps({"prompt": [{"a": 1}] * 20_000}).encode(), "prompt.0: "),
]


@pytest.mark.parametrize(("body", "words"), HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_body_is_400_with_a_reason(serve, body, words):
    async def test(client):
        return await client.post("/v1/completions", content=body, headers=JSON)

    response = serve(test)
    assert response.status_code == 400, response.text[:300]
    assert words in response.json()["error"]["message"]


def test_a_body_is_parsed_off_the_event_loop_and_stops_at_its_first_faults(serve, monkeypatch):
    threads, faults = [], []

    def noted(errors):
        threads.append(threading.current_thread())
        faults.append(len(errors))
        return original(errors)

    from coda_serving import bodies

    original = bodies.from_validation
    monkeypatch.setattr(bodies, "from_validation", noted)
    loops = []

    async def test(client):
        loops.append(threading.current_thread())
        return await client.post("/v1/completions", json={"prompt": [None] * 20_000})

    serve(test)
    assert threads[0] is not loops[0]
    assert faults[0] <= 8


EXTREMES = [0, -1, 1, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 10**30, 1e-310, 1e-39, 0.5, 1e300, "1", True, [], {}]
FIELDS = [
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "n",
    "steps",
    "alg_temp",
    "block_length",
    "stop",
    "alg",
]


@pytest.mark.parametrize("field", FIELDS)
def test_no_value_of_a_field_is_the_servers_fault(serve, field):
    async def test(client):
        return [
            (value, await client.post(url, json={**body, field: value}))
            for url, body in URLS.items()
            for value in EXTREMES
        ]

    for value, response in serve(test):
        assert response.status_code in (200, 400), (value, response.text)
        if response.status_code == 400:
            assert response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"stop": ["", "\n"]}, "stop.0", "at least 1 character"),
        ({"stop": 5}, "stop", "a string or a list of strings"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "a string or a list of text parts"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]},
            "messages.0.content.0.type",
            "'text'",
        ),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages.0.role", "'system'"),
        ({"messages": "hi"}, "messages", "list"),
        ({"tool_choice": 5}, "tool_choice", "a function's name as {type: function"),
    ],
)
def test_the_field_at_fault_is_named_with_what_is_allowed(serve, fields, param, words):
    async def test(client):
        return await client.post("/v1/chat/completions", json={**CHAT, **fields})

    response = serve(test)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert words in error["message"]


def test_what_surely_does_not_fit_is_refused_in_the_words_that_clients_look_for(serve):
    async def test(client):
        bodies = [(url, {**body}) for url, body in URLS.items()]
        bodies[0][1]["messages"] = [{"role": "user", "content": "x" * 3000}]
        bodies[1][1]["prompt"] = "x" * 3000
        bodies.append(("/v1/completions", {"prompt": "a", "suffix": "x" * 3000}))
        return [await client.post(url, json=body) for url, body in bodies]

    for response in serve(test):
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
        assert "maximum context length is 2000 tokens. However, you requested at least" in error["message"]


@pytest.mark.parametrize(("url", "param"), [("/v1/chat/completions", "messages"), ("/v1/completions", "prompt")])
def test_what_does_not_fit_once_it_is_encoded_names_the_field_it_came_from(serve, url, param):
    async def test(client):
        return await client.post(url, json={**URLS[url], "max_tokens": 1999})

    error = serve(test).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", param)


def test_an_answer_without_a_length_gets_what_fits(serve, serving_fakes):
    sampler = serving_fakes.FakeSampler()

    async def test(client):
        return await client.post("/v1/completions", json={"prompt": "x" * 1990})

    assert serve(test, sampler, max_tokens=32).status_code == 200
    assert sampler.batches[0][0].max_tokens == 10


class Model:
    """What a start looks at."""

    context_length = 100
    document_start_id = None

    def __init__(self, defaults=(), fault=None):
        self.defaults, self.fault, self.asked = dict(defaults), fault, None

    def check(self, request):
        self.asked = request
        if self.fault:
            raise UserError(self.fault)


DECODING = {"max_tokens": 768, "steps": 64, "alg": "topk_margin", "alg_temp": 0.0, "temperature": 0.1}
DECODING |= {"top_p": 0.9, "top_k": None, "block_length": None}


def test_a_start_whose_default_request_could_not_be_answered_is_refused(serving_fakes):
    with pytest.raises(ValueError, match="MAX_TOKENS must be at most 99: .* got 5000"):
        check_defaults(serving_fakes.make_settings(max_tokens=5000), Model())
    model = Model(fault="steps must be at least the number of blocks")
    with pytest.raises(ValueError, match=r"steps must be at least .*STEPS=2, .*BLOCK_LENGTH=4"):
        check_defaults(serving_fakes.make_settings(steps=2, block_length=4), model)


def test_the_models_own_decoding_holds_unless_the_environment_says_otherwise(serving_fakes):
    settings = serving_fakes.make_settings(steps=16)
    held = check_defaults(settings, Model(DECODING)).decoding
    assert held == settings.decoding | {
        "max_tokens": 32,  # of the tests' settings
        "steps": 16,
        "alg": "topk_margin",
        "alg_temp": 0.0,
        "temperature": 0.1,
        "top_p": 0.9,
        "top_k": None,
        "block_length": None,
    }
    assert check_defaults(settings, Model()).decoding == settings.decoding


def test_a_start_with_approximate_defaults_that_are_forbidden_is_refused(serving_fakes):
    with pytest.raises(ValueError, match="threshold makes answers approximate.*ALLOW_APPROXIMATE=false.*got 0.9"):
        check_defaults(serving_fakes.make_settings(allow_approximate=False), Model({"threshold": 0.9}))
    check_defaults(serving_fakes.make_settings(threshold=0.9), Model())


def test_approximate_regimes_are_asked_for_in_the_request_and_can_be_forbidden(serve, serving_fakes):
    ask = {"prompt": "x", "kv_cache": "dual", "threshold": 0.9}

    async def test(client):
        return await client.post("/v1/completions", json=ask)

    sampler = serving_fakes.FakeSampler()
    assert serve(test, sampler).status_code == 200
    options = sampler.batches[0][0].options
    assert (options.kv_cache, options.threshold, options.steps) == ("dual", 0.9, 128)

    async def forbidden(client):
        exact = await client.post("/v1/completions", json={"prompt": "x", "speculate": 2, "kv_cache": "none"})
        return exact, await client.post("/v1/completions", json=ask)

    exact, refused = serve(forbidden, allow_approximate=False)
    assert exact.status_code == 200
    error = refused.json()["error"]
    assert (refused.status_code, error["param"], error["code"]) == (400, "kv_cache", None)
    assert "kv_cache makes answers approximate" in error["message"]
    assert "ALLOW_APPROXIMATE=false" in error["message"]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"refresh_window": 4}, "refresh_window", "needs kv_cache"),
        ({"threshold": 0.9, "factor": 2.0}, None, "at most one of threshold, factor, entropy_bound"),
        ({"speculate": 2, "remask": "conf"}, "speculate", "commits that are final"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "must map token ids"),
        ({"suppress_tokens": [-1]}, "suppress_tokens", "must be a list of token ids"),
    ],
)
def test_settings_that_exclude_each_other_are_the_clients_fault(serve, fields, param, words):
    async def test(client):
        return await client.post("/v1/completions", json={"prompt": "x"} | fields)

    response = serve(test)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert words in error["message"]


def test_the_models_list_says_what_holds(serve):
    async def test(client):
        return (await client.get("/v1/models")).json()["data"][0], (await client.get("/v1/models/tiny")).json()

    listed, one = serve(test, steps=9, top_p=0.5)
    assert listed == one
    assert (listed["defaults"]["steps"], listed["defaults"]["top_p"]) == (9, 0.5)


def test_a_silent_stream_sends_comments_and_loses_no_event():
    async def slow():
        for i in range(3):
            await asyncio.sleep(0.05)
            yield f"data: {i}\n\n"

    async def test():
        return [frame async for frame in with_heartbeat(slow(), 0.02)]

    frames = asyncio.run(test())
    assert [frame for frame in frames if frame.startswith("data")] == [f"data: {i}\n\n" for i in range(3)]
    assert frames.count(": waiting\n\n") >= 3


def test_the_documented_bodies_have_all_their_parts(serve):
    async def test(client):
        return (await client.get("/openapi.json")).json()

    document = serve(test)
    text = json.dumps(document)
    names = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert names <= document["components"]["schemas"].keys()
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "messages" in body["properties"]


def test_a_stream_that_the_end_of_the_server_cuts_off_says_so():
    class Rows:
        error = None

        def cancel(self):
            self.is_cancelled = True

    async def events():
        yield "data: first\n\n"
        await asyncio.sleep(60)

    client, rows = Client(JSON, chunks=1, size=0), Rows()

    async def never():
        await asyncio.sleep(60)

    async def test():
        stream = EventStream(rows, events(), 15.0)
        running = asyncio.ensure_future(stream(client.scope | {"asgi": {"spec_version": "2.3"}}, never, client.send))
        while len(client.sent) < 2:
            await asyncio.sleep(0.01)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(test())
    last = client.sent[-1]
    assert json.loads(last["body"].removeprefix(b"data: "))["error"]["code"] == "server_shutting_down"
    assert not last["more_body"]
    assert rows.is_cancelled


def test_more_answers_than_the_queue_holds_are_refused_before_anything_is_encoded(serve, serving_fakes, monkeypatch):
    def fails(self, text):
        raise AssertionError("was encoded")

    monkeypatch.setattr(serving_fakes.ByteEncoder, "encode_text", fails)

    async def test(client):
        several = await client.post("/v1/completions", json={"prompt": ["a"] * 20_000, "n": 32})
        return several, await client.post("/v1/chat/completions", json={**CHAT, "n": 65})

    for response, param in zip(serve(test), ("prompt", "n"), strict=True):
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, param)
        assert "at most 64 answers" in error["message"]


@pytest.mark.parametrize(
    "body", ['{"prompt": "a", "max_tokens": %s}', "%s", '{"prompt": %s}', '{"prompt": "a", "x": %s}']
)
def test_no_depth_is_the_servers_fault(serve, body):
    """Also the depth at which a body is just parsed, and only the words about its fault are too deep."""

    async def test(client):
        bodies = [body % ("[" * depth + "]" * depth) for depth in (*range(960, 1001), 1500)]
        return [await client.post("/v1/completions", content=content, headers=JSON) for content in bodies]

    assert {response.status_code for response in serve(test)} == {400}


MANY = {f"k{i}": 0 for i in range(1000)}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream": True, "stream_options": MANY}, "stream_options.k0"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", **MANY}]}]},
            "messages.0.content.0.k0",
        ),
        (  # a field of other bodies
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}]}]},
            "messages.0.content.0.cache_control",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schemas": {}}}},
            "response_format.json_schema.schemas",
        ),
        (MANY, "k0"),
    ],
)
def test_the_first_unknown_field_is_named_and_the_others_make_no_errors(serve, monkeypatch, fields, param):
    from coda_serving import bodies

    original, faults = bodies.from_validation, []
    monkeypatch.setattr(bodies, "from_validation", lambda errors: faults.append(len(errors)) or original(errors))

    async def test(client):
        return await client.post("/v1/chat/completions", json={**CHAT, **fields})

    response = serve(test)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, "unknown_field")
    assert repr(param) in error["message"]
    assert max(faults, default=1) <= 2


@pytest.mark.parametrize("fields", [{"x" * 1_000_000: 1}, {"model": "x" * 1_000_000}, {"alg": "x" * 1_000_000}])
def test_a_refusal_does_not_send_a_long_request_back(serve, fields):
    async def test(client):
        return await client.post("/v1/completions", json={"prompt": "a", **fields})

    response = serve(test)
    assert response.status_code == 400
    assert len(response.content) < 4000


@pytest.mark.parametrize("url", ["/v1/chat/completions", "/v1/completions"])
def test_an_answer_is_written_off_the_event_loop(serve, monkeypatch, url):
    from coda_serving.responses import Form

    original, threads, loops = Form.whole, [], []

    def noted(*arguments):
        threads.append(threading.current_thread())
        return original(*arguments)

    monkeypatch.setattr(Form, "whole", noted)

    async def test(client):
        loops.append(threading.current_thread())
        return await client.post(url, json=URLS[url])

    assert serve(test).status_code == 200
    assert threads[0] is not loops[0]
