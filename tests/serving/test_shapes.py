"""Answers that match a schema or an expression, and calls of tools, from a real tiny model and the official client."""

import asyncio
import json
import re
import time

import anthropic
import httpx
import httpx2
import jsonschema
import openai
import pytest

from coda_serving.__main__ import check_defaults
from coda_serving.app import Service, build_app
from coda_serving.engine import Engine
from coda_serving.metrics import Metrics
from coda_serving.sampler import ModelSampler
from coda_serving.scheduler import Scheduler
from coda_serving.settings import ServerSettings
from coda_serving.tools import _moved, read_calls
from CoDALanguageModel.prompts import CHATML_TEMPLATE, Codec

USER = [{"role": "user", "content": "hi"}]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
TREE = {
    "type": "object",
    "properties": {"left": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}, "unit": {"$ref": "#/$defs/unit"}},
    "required": ["left", "unit"],
    "$defs": {"unit": {"enum": ["C", "F"]}},
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Say.", "parameters": PERSON}},
    {"type": "function", "function": {"name": "tree", "parameters": TREE}},
    {"type": "function", "function": {"name": "now"}},
]
DEEP = json.loads("[" * 700 + "]" * 700)
TOOLS_TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\n<tools>' + tools | tojson + '</tools> call with <tool_call><|im_end|>\n' }}"
    "{% endif %}" + CHATML_TEMPLATE
)


@pytest.fixture(scope="module")
def ask(model_folder):
    """Give a function that runs a coroutine with the official client of a server in this process."""
    sampler = ModelSampler.load(str(model_folder), device="cpu", dtype="float32")
    sampler.context_length = sampler._model.config.max_position_embeddings = 2048  # tools take many tokens here
    codec = Codec.load(str(model_folder))
    codec._tokenizer.chat_template = TOOLS_TEMPLATE
    codec = Codec(codec._tokenizer)

    def run(test, script=None, **changes):
        settings = ServerSettings(model_name=str(model_folder), _env_file=None, max_tokens=80, steps=80, **changes)
        settings, metrics = check_defaults(settings, sampler), Metrics()
        scheduler = Scheduler(max_queue=64, max_batch_size=16, max_batch_tokens=32768)
        engine = Engine(sampler, codec.decode, scheduler, step_timeout_s=60, metrics=metrics)
        app = build_app(Service(settings=settings, engine=engine, encoder=codec, limits=sampler, metrics=metrics))

        async def inner():
            async with app.router.lifespan_context(app):
                transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
                async with httpx.AsyncClient(transport=transport, base_url="http://test/v1", timeout=60) as http:
                    client = openai.AsyncOpenAI(
                        api_key="x", base_url="http://test/v1", http_client=http, max_retries=0, timeout=60
                    )
                    client.app = app
                    return await test(client)

        return asyncio.run(inner())

    return run


def chat(**options):
    async def test(client):
        options.setdefault("temperature", 2.0)
        return await client.chat.completions.create(model="tiny-coda", messages=USER, **options)

    return test


@pytest.mark.parametrize("seed", range(3))
def test_an_answer_is_by_the_schema_whether_streamed_or_whole(ask, seed):
    whole = ask(chat(response_format=FORMAT, seed=seed)).choices[0]
    jsonschema.validate(json.loads(whole.message.content), PERSON)
    assert whole.finish_reason == "stop"

    async def streamed(client):
        stream = await chat(response_format=FORMAT, seed=seed, stream=True)(client)
        return [chunk async for chunk in stream]

    chunks = ask(streamed)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.message.content
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_list_of_no_stop_strings_cuts_nothing(ask):
    answers = [ask(chat(response_format=FORMAT, seed=1, **more)) for more in ({}, {"stop": []})]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content


def test_an_answer_that_fills_its_canvas_is_whole(ask):
    least = 0
    with pytest.raises(openai.BadRequestError, match="max_tokens must be at least") as caught:
        ask(chat(response_format=FORMAT, max_tokens=2))
    assert caught.value.param == "max_tokens"
    least = int(re.search(r"at least (\d+)", str(caught.value))[1])
    choice = ask(chat(response_format=FORMAT, max_tokens=least)).choices[0]
    jsonschema.validate(json.loads(choice.message.content), PERSON)
    assert choice.finish_reason == "stop"


def test_json_objects_expressions_and_gaps(ask):
    async def test(client):
        some = await chat(response_format={"type": "json_object"}, seed=1)(client)
        text = await chat(extra_body={"guided_regex": "[a-c]{3,6}!"}, seed=1)(client)
        plain = await client.completions.create(
            model="tiny-coda", prompt="x", temperature=2, seed=3, extra_body={"response_format": FORMAT}
        )
        gap = await client.completions.create(
            model="tiny-coda", prompt="a = ", suffix="\n", max_tokens=6, extra_body={"guided_regex": "[0-9]{2,4}"}
        )
        tried = await client.completions.create(
            model="tiny-coda",
            prompt="a = ",
            suffix="\n",
            max_tokens=12,
            extra_body={"guided_regex": "[0-9]{9}", "infill": {"lengths": "auto"}},
        )
        return some, text, plain, gap, tried

    some, text, plain, gap, tried = ask(test)
    assert isinstance(json.loads(some.choices[0].message.content), dict)
    assert re.fullmatch("[a-c]{3,6}!", text.choices[0].message.content)
    jsonschema.validate(json.loads(plain.choices[0].text), PERSON)
    assert re.fullmatch("[0-9]{2,4}", gap.choices[0].text)
    assert re.fullmatch("[0-9]{9}", tried.choices[0].text)


def test_rows_in_company_get_what_they_get_alone(ask):
    bodies = [
        {"response_format": FORMAT},
        {},
        {"extra_body": {"guided_regex": "(ab)+"}},
        {"tools": TOOLS, "tool_choice": "required"},
    ]

    def call(client, i):
        return chat(seed=i, **{**bodies[i]})(client)

    async def all_at_once(client):
        return await asyncio.gather(*(call(client, i) for i in range(len(bodies))))

    together = ask(all_at_once)
    for i, answer in enumerate(together):
        alone = ask(lambda client, i=i: call(client, i)).choices[0].message
        assert alone.content == answer.choices[0].message.content
        calls = [[c.function.model_dump() for c in m.tool_calls or ()] for m in (alone, answer.choices[0].message)]
        assert calls[0] == calls[1]


@pytest.mark.parametrize("name", ["weather", "tree", "now", None])
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_asked_for_is_by_the_schema_of_its_function(ask, name, stream):
    choice = "required" if name is None else {"type": "function", "function": {"name": name}}
    schemas = {"weather": PERSON, "tree": TREE, "now": {"type": "object", "maxProperties": 0}}

    async def test(client):
        answer = await chat(tools=TOOLS, tool_choice=choice, seed=2, stream=stream)(client)
        if not stream:
            return answer.choices[0].finish_reason, answer.choices[0].message
        chunks = [chunk.choices[0] async for chunk in answer]
        deltas = [c.delta for c in chunks if c.delta.tool_calls]
        assert len(deltas) == 1
        assert not any(c.delta.content for c in chunks)
        return chunks[-1].finish_reason, deltas[0]

    reason, message = ask(test)
    assert reason == "tool_calls"
    assert not message.content
    (call,) = message.tool_calls
    assert call.type == "function"
    assert call.id.startswith("call_")
    assert name in (None, call.function.name)
    jsonschema.validate(json.loads(call.function.arguments), schemas[call.function.name])


def test_a_conversation_goes_on_behind_a_call(ask):
    async def test(client):
        call = (await chat(tools=TOOLS, tool_choice="required", seed=1)(client)).choices[0].message
        result = {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": "7"}
        return await client.chat.completions.create(
            model="tiny-coda", messages=[*USER, call.model_dump(exclude_none=True), result], tools=TOOLS
        )

    assert ask(test).choices[0].finish_reason in ("stop", "length", "tool_calls")


def in_anthropics_words(client):
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=client.app), base_url="http://test")
    return anthropic.AsyncAnthropic(api_key="x", base_url="http://test", http_client=http, max_retries=0).messages


ANTHROPIC_TOOLS = [
    {
        "name": tool["function"]["name"],
        "input_schema": tool["function"].get("parameters", {"type": "object", "properties": {}}),
        **({"description": "Say."} if "description" in tool["function"] else {}),
    }
    for tool in TOOLS
]


@pytest.mark.parametrize("name", ["weather", None])
def test_anthropics_client_gets_the_call_that_a_chat_gets(ask, name):
    chosen = "required" if name is None else {"type": "function", "function": {"name": name}}
    choice = {"type": "any"} if name is None else {"type": "tool", "name": name}

    async def test(client):
        tools = [t if "parameters" in t["function"] else {**t, "function": {**t["function"]}} for t in TOOLS]
        tools[2]["function"]["parameters"] = {"type": "object", "properties": {}}
        message = (await chat(tools=tools, tool_choice=chosen, seed=2)(client)).choices[0].message
        messages = in_anthropics_words(client)
        asked = dict(model="tiny-coda", messages=USER, tools=ANTHROPIC_TOOLS, tool_choice=choice)
        more = dict(max_tokens=80, extra_body={"seed": 2, "temperature": 2.0})
        whole = await messages.create(**asked, **more)
        async with messages.stream(**asked, **more) as stream:
            parts = [event.partial_json async for event in stream if event.type == "input_json"]
            streamed = await stream.get_final_message()
        count = await messages.count_tokens(**asked)
        # The call and its result go back, and a text behind them.
        turns = [
            *USER,
            {"role": "assistant", "content": whole.content},
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": whole.content[0].id, "content": "7"},
                    {"type": "text", "text": "and?"},
                ],
            },
        ]
        on = await messages.create(
            model="tiny-coda", messages=turns, tools=ANTHROPIC_TOOLS, max_tokens=8, extra_body={"seed": 1}
        )
        behind = [
            *USER,
            message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "7"},
            {"role": "user", "content": "and?"},
        ]
        goes_on = await client.chat.completions.create(
            model="tiny-coda", messages=behind, tools=tools, max_tokens=8, seed=1
        )
        return message.tool_calls[0].function, whole, streamed, parts, count.input_tokens, on, goes_on

    call, whole, streamed, parts, num_tokens, on, goes_on = ask(test)
    (block,) = whole.content
    assert (block.type, block.name, block.input) == ("tool_use", call.name, json.loads(call.arguments))
    assert whole.stop_reason == streamed.stop_reason == "tool_use"
    assert [(b.name, b.input) for b in streamed.content] == [(block.name, block.input)]
    assert "".join(parts) == call.arguments
    assert num_tokens == whole.usage.input_tokens
    assert on.content[0].text == goes_on.choices[0].message.content
    assert on.usage.input_tokens == goes_on.usage.prompt_tokens


def call_text(name, arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def test_calls_in_free_text_are_read_and_what_is_none_is_text(serve, serving_fakes):
    calls = "\n".join([call_text("now", {}), call_text("weather", {"a": "\u00e9"})])
    good = f"Let me see.\n\n{calls}"
    bad = [call_text("other", {}), call_text("now", []), "<tool_call>{not json}</tool_call>", "a < b <tool"]

    class Encoder(serving_fakes.ByteEncoder):
        def encode_chat(self, messages, *, tools=(), max_tokens=None):
            assert [tool["function"]["name"] for tool in tools] == ["weather", "tree", "now"]
            return super().encode_chat(messages, max_tokens=max_tokens)

    for text in (good, *bad):
        sampler = serving_fakes.FakeSampler(script=lambda r, text=text: text.encode())

        async def test(client):
            body = {"messages": USER, "tools": TOOLS, "max_tokens": 200}
            whole = await client.post("/v1/chat/completions", json=body)
            stream = await client.post("/v1/chat/completions", json=body | {"stream": True})
            one = await client.post("/v1/chat/completions", json=body | {"parallel_tool_calls": False})
            return whole.json(), stream.text, one.json()

        original = serving_fakes.ByteEncoder
        serving_fakes.ByteEncoder = Encoder
        try:
            whole, stream, one = serve(test, sampler)
        finally:
            serving_fakes.ByteEncoder = original
        events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
        deltas = [event["choices"][0]["delta"] for event in events]
        content = "".join(delta.get("content") or "" for delta in deltas)
        calls = [call for delta in deltas for call in delta.get("tool_calls") or ()]
        message = whole["choices"][0]["message"]
        assert content == (message["content"] or "")
        if text is good:
            assert (message["content"], whole["choices"][0]["finish_reason"]) == ("Let me see.", "tool_calls")
            expected = [("now", {}), ("weather", {"a": "\u00e9"})]
            for given in (message["tool_calls"], calls):
                assert [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in given] == expected
            assert [call["index"] for call in calls] == [0, 1]
            assert [c["function"]["name"] for c in one["choices"][0]["message"]["tool_calls"]] == ["now"]
            assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"
        else:
            assert (message["content"], calls) == (text, [])
            assert "tool_calls" not in message


def test_an_unclosed_call_is_one_if_it_is_whole():
    text = '<tool_call>\n{"name": "now", "arguments": {"a": [1, "</b>"]}}'
    assert [call.function.arguments for call in read_calls(text, {"now"})[1]] == ['{"a": [1, "</b>"]}']
    assert read_calls(text[:-1], {"now"}) == (text[:-1], [])


@pytest.mark.parametrize(
    "call",
    [
        '{"name": ["now"], "arguments": {}}',
        '{"name": "now", "arguments": {"a": NaN}}',
        '{"name": "now", "arguments": {"a": 1e999}}',
        '{"name": "now", "arguments": {"a": "\\ud800"}}',
        f'{{"name": "now", "arguments": {"[" * 50_000}',
    ],
)
def test_a_call_that_cannot_be_told_is_text(call):
    text = f"<tool_call>{call}</tool_call>"
    assert read_calls(text, {"now"}) == (text, [])


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"response_format": {"type": "json"}}, "response_format.type", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "needs json_schema"),
        ({"response_format": {"type": "json_object", "json_schema": {}}}, "response_format", "only then"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format", "a name"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": []}}},
            "response_format.json_schema.schema",
            "must be an object, got []",
        ),
        ({"tools": TOOLS, "parallel_tool_calls": 1}, "parallel_tool_calls", "boolean"),
        ({"response_format": FORMAT, "stop": ["x"]}, "stop", "stop cannot be used with response_format"),
        ({"response_format": FORMAT, "speculate": 2}, "speculate", "speculate cannot be used with json_schema"),
        ({"response_format": FORMAT, "guided_regex": "a"}, "guided_regex", "exclude each other"),
        ({"guided_regex": "a(?=b)"}, "guided_regex", "a look at what stands ahead"),
        ({"guided_regex": "a{1,100000}"}, "guided_regex", "more than"),
        ({"tools": TOOLS, "response_format": FORMAT}, "response_format", "cannot be used with tools"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tools": TOOLS, "tool_choice": "some"}, "tool_choice", "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "none of"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "pattern"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}],
                "tool_choice": "required",
            },
            "tools",
            "type object",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"default": DEEP}}}]},
            "tools",
            "nested deeper than 100",
        ),
        ({"messages": [{"role": "user"}]}, "messages.content", "content is missing"),
        (
            {"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]},
            "messages.tool_call_id",
            "says nothing",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_field(ask, fields, param, message):
    async def test(client):
        return await client._client.post("http://test/v1/chat/completions", json={"messages": USER} | fields)

    response = ask(test)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert message in error["message"]


def test_a_schema_is_refused_with_the_keyword_and_its_place(ask):
    schema = {"type": "object", "properties": {"a": {"type": "integer", "multipleOf": 3}}}
    with pytest.raises(openai.BadRequestError, match="#/properties/a: keyword 'multipleOf' is not supported") as caught:
        ask(chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}))
    assert caught.value.param == "response_format"


def test_references_of_a_function_are_moved_and_its_values_are_not():
    value = {"$ref": "#/a"}
    schema = {"$defs": {"enum": value}, "properties": {"const": value, "b": {"const": value}, "c": {"enum": [value]}}}
    moved = {"$ref": "#/x/a"}
    properties = {"const": moved, "b": {"const": value}, "c": {"enum": [value]}}
    assert _moved(schema, "#/x") == {"$defs": {"enum": moved}, "properties": properties}


def test_an_operators_speculation_and_the_folders_stop_strings_stand_back(ask):
    assert ask(chat(response_format=FORMAT), speculate=2).choices[0].finish_reason == "stop"


def test_other_requests_go_on_while_a_large_schema_is_prepared(ask):
    """Many distinct languages, each near the bounds, are made one after the other in a thread of their own."""

    async def test(client):
        large = [
            chat(extra_body={"guided_regex": f"([ab]{{0,{900 + i}}}c){{1,4}}"}, max_tokens=4)(client) for i in range(6)
        ]
        busy = asyncio.gather(*large, return_exceptions=True)
        waits = []
        while not busy.done():
            start_s = time.monotonic()
            await client._client.get("http://test/health")
            waits.append(time.monotonic() - start_s)
            await asyncio.sleep(0.02)
        return waits, await busy

    waits, answers = ask(test)
    assert all(isinstance(a, openai.BadRequestError) or a.choices for a in answers)
    assert sorted(waits)[len(waits) // 2] < 0.5
