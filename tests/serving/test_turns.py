"""What is done one after the other is done for callers in turn."""

import asyncio
import threading

import httpx
import pytest

from coda_serving.scheduler import QueueFull
from coda_serving.turns import Turns


def run(arrivals, limit=100):
    """Names of those who had a turn, in order, and of those who were refused; each of `arrivals` comes at once."""
    had, refused = [], []

    async def test():
        turns, at_once = Turns(), asyncio.Event()

        async def take(name):
            try:
                async with turns.turn(name, limit):
                    await at_once.wait()
                    had.append(name)
            except QueueFull:
                refused.append(name)

        tasks = [asyncio.create_task(take(name)) for name in arrivals]
        await asyncio.sleep(0)
        at_once.set()
        await asyncio.gather(*tasks)
        assert (len(turns), turns._is_taken) == (0, False)

    asyncio.run(test())
    return "".join(had), "".join(refused)


def test_callers_take_turns_and_each_has_its_share_of_a_full_queue():
    assert run("aaaaabbc") == ("aabcabaa", "")
    assert run("aaaaaaabbbc", limit=4) == ("aabcabaa", "aab")


def test_who_leaves_gives_the_turn_to_the_next():
    async def test():
        turns, had = Turns(), []

        async def take(name):
            async with turns.turn(name, 10):
                had.append(name)
                await asyncio.sleep(0.01)
            if name == "a":
                others[1].cancel()  # whose turn it is now, which it has not heard of

        first, *others = (asyncio.create_task(take(name)) for name in "abcd")
        await asyncio.sleep(0)
        others[0].cancel()  # while it waits
        await asyncio.gather(first, *others, return_exceptions=True)
        assert (had, turns._is_taken) == (["a", "d"], False)

    asyncio.run(test())


@pytest.mark.parametrize(
    "leave", [slice(0, None), slice(0, 3), slice(1, None), slice(None, None, 2), slice(None, None, -1)]
)
def test_when_many_leave_at_once_the_others_have_their_turns(leave):
    async def test():
        turns, had = Turns(), []

        async def take(name):
            async with turns.turn(name[0], 10):
                await asyncio.sleep(0.001)
                had.append(name)

        names = ["a1", "a2", "b1", "a3", "c1"]
        tasks = [asyncio.create_task(take(name)) for name in names]
        await asyncio.sleep(0)
        for task in tasks[leave]:
            task.cancel()
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
        await asyncio.wait_for(take("d1"), 5)
        assert sorted(had) == sorted({*names, "d1"} - {*names[leave]})

    asyncio.run(test())


@pytest.mark.parametrize("url", ["/v1/completions", "/v1/messages"])
def test_a_flood_that_is_prepared_shuts_nobody_else_out_and_who_leaves_it_costs_nothing(
    serving_fakes, monkeypatch, url
):
    held, prepared = threading.Event(), []
    sampler = serving_fakes.FakeSampler()

    def constraint(options, lexicon):
        prepared.append(options.regex or "call")
        held.wait(20)

    sampler.constraint = constraint
    encoder = serving_fakes.ByteEncoder
    encode_chat = encoder.encode_chat
    monkeypatch.setattr(encoder, "encode_chat", lambda self, *args, tools=(), **kw: encode_chat(self, *args, **kw))
    monkeypatch.setattr(encoder, "encode_answer", lambda self, text: list(text.encode()), raising=False)
    monkeypatch.setattr(encoder, "lexicon", None, raising=False)
    app = serving_fakes.make_app(sampler, max_queue=4)
    tool = {"name": "now", "input_schema": {"type": "object", "properties": {}}}
    body = {"prompt": "a", "guided_regex": "a"}
    if url == "/v1/messages":
        body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 9, "tools": [tool]}
        body["tool_choice"] = {"type": "any"}

    async def test():
        async with app.router.lifespan_context(app):
            ones, two = (
                httpx.AsyncClient(transport=httpx.ASGITransport(app, client=(host, 1)), base_url="http://test")
                for host in ("10.0.0.1", "10.0.0.2")
            )
            flood = [asyncio.create_task(ones.post(url, json=body)) for _ in range(7)]
            while sum(task.done() for task in flood) < 2:  # one is prepared and four wait
                await asyncio.sleep(0.01)
            other = asyncio.create_task(two.post(url, json=body))
            await asyncio.sleep(0.1)
            assert not other.done()
            waiting = [task for task in flood if not task.done()]
            refused = [task.result() for task in flood if task.done()]
            waiting[-1].cancel()
            await asyncio.gather(waiting[-1], return_exceptions=True)
            held.set()
            assert (await other).status_code == 200
            return refused, await asyncio.gather(*waiting[:-1])

    refused, answers = asyncio.run(test())
    assert len(refused) == 2
    for answer in refused:
        assert answer.status_code == 429
        assert "4 requests wait already to be prepared" in answer.text
        assert int(answer.headers["Retry-After"]) >= 1
    assert len(prepared) <= 6
    # What is prepared waits for the model, whose queue is as long: it is full where the engine's thread is late.
    assert answers[0].status_code == 200
    assert {answer.status_code for answer in answers} <= {200, 429}
