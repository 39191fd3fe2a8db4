"""Server-sent events: OpenAI's shape, and the text of the plain answer."""

import asyncio
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coda_serving.engine import Answer
from coda_serving.generation import Generation
from coda_serving.scheduler import CanvasRequest
from CoDALanguageModel.canvas_view import CanvasStep, Cell, rebuilt

CODE = "\n\ndef f(x):\n\treturn  x   # two  spaces\n\n\n"
CHAT = {"messages": [{"role": "user", "content": "hi"}]}
URL = "/v1/chat/completions"


def post(url, **body):
    async def test(client):
        return await client.post(url, json=body)

    return test


def events_of(text):
    """Parsed events of a stream, which must end with [DONE]."""
    frames = text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]


def test_a_stream_has_openais_events(serve, serving_fakes):
    sampler = serving_fakes.FakeSampler(script=lambda r: CODE.encode())
    body = CHAT | {"stream": True, "max_tokens": 60, "stream_options": {"include_usage": True}, "seed": 5}
    response = serve(post(URL, **body), sampler)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, last = events_of(response.text)
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events) == CODE
    assert [e["choices"][0]["finish_reason"] for e in events if e["choices"][0]["finish_reason"]] == ["stop"]
    assert events[-1]["choices"][0]["delta"] == {}
    assert len({e["id"] for e in [*events, last]}) == 1
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == len(CODE)
    assert all("usage" not in e for e in events)


@settings(max_examples=25, deadline=None)
@given(
    text=st.text("ab \n\u00e9\u4e2d\U0001f600", max_size=10),
    stop=st.lists(st.sampled_from(["\n", "ab", "\u4e2d ", "b\n"]), max_size=2),
    seed=st.integers(0, 99),
    n=st.integers(1, 3),
    chat=st.booleans(),
)
def test_streamed_text_adds_up_to_the_plain_answer(serve, serving_fakes, text, stop, seed, n, chat):
    sampler = serving_fakes.FakeSampler(script=lambda r: text.encode() + bytes([128 + r.seed % 5, 65]))
    url, prompt = (URL, CHAT) if chat else ("/v1/completions", {"prompt": ["p", "q"]})
    body = prompt | {"stop": stop, "seed": seed, "n": n, "max_tokens": 50}

    async def test(client):
        plain = await client.post(url, json=body)
        return plain.json(), (await client.post(url, json=body | {"stream": True})).text

    plain, stream = serve(test, sampler)
    texts, reasons = {}, {}
    for event in events_of(stream):
        (choice,) = event["choices"]
        piece = choice["delta"].get("content", "") if chat else choice["text"]
        texts[choice["index"]] = texts.get(choice["index"], "") + piece
        if choice["finish_reason"]:
            reasons[choice["index"]] = choice["finish_reason"]
    expected = {c["index"]: c["message"]["content"] if chat else c["text"] for c in plain["choices"]}
    assert texts == expected
    assert reasons == {c["index"]: c["finish_reason"] for c in plain["choices"]}


WITH_CANVAS = {"stream": True, "stream_options": {"include_canvas": True}}


def canvases_of(events):
    """The steps of each choice's canvas, by its index; an event has the canvas of one choice."""
    steps = {}
    for event in events:
        for choice in event["choices"]:
            if "canvas" in choice:
                canvas = choice["canvas"]
                cells = tuple(Cell(*cell) for cell in canvas["cells"])
                steps.setdefault(choice["index"], []).append(CanvasStep(canvas["step"], cells, canvas.get("length")))
    return steps


@settings(max_examples=25, deadline=None)
@given(
    text=st.text("ab \n\u00e9\u4e2d\U0001f600", min_size=1, max_size=10),
    stop=st.lists(st.sampled_from(["\n", "ab"]), max_size=1),
    seed=st.integers(0, 99),
    n=st.integers(1, 2),
    chat=st.booleans(),
)
def test_a_canvas_adds_nothing_to_the_text_and_its_committed_cells_add_up_to_it(
    serve, serving_fakes, text, stop, seed, n, chat
):
    sampler = serving_fakes.FakeSampler(script=lambda r: text.encode() + b"." * (r.seed % 3))
    url, prompt = (URL, CHAT) if chat else ("/v1/completions", {"prompt": "p"})
    body = prompt | {"stop": stop, "seed": seed, "n": n, "max_tokens": 50, "stream": True}

    async def test(client):
        plain = (await client.post(url, json=body)).text
        return events_of(plain), events_of((await client.post(url, json=body | WITH_CANVAS)).text)

    plain, events = serve(test, sampler)
    steps = canvases_of(events)
    texts = {}
    for event in events:
        for choice in event["choices"]:
            piece = choice["delta"].get("content", "") if chat else choice["text"]
            texts[choice["index"]] = texts.get(choice["index"], "") + piece
            assert "\ufffd" not in piece
    told = [e["choices"] for e in plain if any(c.get("delta") or c.get("text") for c in e["choices"])]
    for event in events:
        for choice in event["choices"]:
            choice.pop("canvas", None)
    assert [e["choices"] for e in events if any(c.get("delta") or c.get("text") for c in e["choices"])] == told
    assert steps.keys() == texts.keys() == set(range(n))
    for index, shown in steps.items():
        assert [step.step for step in shown] == list(range(len(shown)))
        cells = rebuilt(shown)
        assert len(cells) == 50
        end = next((cell.position for cell in cells if cell.text is None), 50)
        final = [cell for cell in cells[:end] if cell.state == "committed"]
        if not stop:
            assert "".join(cell.text for cell in final) == texts[index]
        for step in shown:
            assert all("\ufffd" not in (cell.text or "") for cell in step.cells)


def test_a_canvas_is_not_computed_where_it_is_not_asked_for(serve, serving_fakes, monkeypatch):
    seen = []
    real = serving_fakes.FakeRows.shown
    monkeypatch.setattr(serving_fakes.FakeRows, "shown", lambda *a: seen.append(1) or real(*a))
    assert '"canvas"' not in serve(post(URL, **CHAT, stream=True)).text
    assert not seen
    assert '"canvas"' in serve(post(URL, **CHAT, **WITH_CANVAS)).text
    assert seen


def test_a_slow_reader_gets_the_same_canvases_in_fewer_steps_and_they_are_not_all_kept(serving_fakes, monkeypatch):
    sampler = serving_fakes.FakeSampler(script=lambda r: b"abc" * 30)
    canvases = [
        CanvasRequest(
            prompt_ids=(1,), max_tokens=60 + i, shows_canvas=True, seed=i, options=serving_fakes.sampling_options()
        )
        for i in range(2)
    ]

    async def read(is_slow):
        engine = serving_fakes.make_engine(sampler, serving_fakes.make_settings())
        generation = Generation(engine, [[canvas] for canvas in canvases], 60)
        engine.start()
        while is_slow and not all(job.done for job in generation._jobs):
            await asyncio.sleep(0.01)
        unread = sum(
            len(event.canvas.cells) for events in generation._unread.values() for event in events if event.canvas
        )
        steps, texts, answers = [[], []], ["", ""], {}
        async for index, event in generation.events():
            if isinstance(event, Answer):
                answers[index] = event
            else:
                steps[index].append(event.canvas)
                texts[index] += event.text
        await asyncio.to_thread(engine.stop)
        assert texts == [answers[i].text for i in range(2)]
        return [rebuilt(shown) for shown in steps], texts, [len(shown) for shown in steps], unread

    expected, texts, _, _ = asyncio.run(read(False))
    monkeypatch.setattr("coda_serving.generation.MOST_UNREAD_CELLS", 100)
    canvas, same_texts, numbers, unread = asyncio.run(read(True))
    assert (canvas, same_texts) == (expected, texts)
    assert unread <= 100 + 2 * 61
    assert all(3 < number < 60 for number in numbers)


def test_of_lengths_that_compete_the_best_canvas_comes_whole(serve, serving_fakes):
    sampler = serving_fakes.FakeSampler(
        script=lambda r: bytes([97 + r.max_tokens]) * r.max_tokens, score=lambda r: -abs(r.max_tokens - 2)
    )
    body = {"prompt": "x", "suffix": "y", "infill": {}, "max_tokens": 4}
    events = events_of(serve(post("/v1/completions", **body, **WITH_CANVAS), sampler).text)
    ((step,),) = canvases_of(events).values()
    assert [cell.text for cell in rebuilt([step])] == ["c", "c"]


@pytest.mark.parametrize("value", ["yes", 1])
def test_include_canvas_is_a_boolean(serve, value):
    response = serve(post(URL, **CHAT, stream=True, stream_options={"include_canvas": value}))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "stream_options.include_canvas"
