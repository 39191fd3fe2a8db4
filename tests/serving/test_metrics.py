"""What is counted of requests that end well, badly, or not at all; and bodies that never come whole."""

import json
import re
import socket
import threading
import time

import httpx
import pytest

URL, ASK = "/v1/completions", {"prompt": "hi"}


def values(text):
    """Of each series without its buckets."""
    pairs = (line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#" and "_bucket" not in line)
    return {name: float(value) for name, value in pairs if not name.endswith("_created")}


def scrape(url, until=None, timeout_s=10.0):
    """The values, once `until` is among them."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = values(httpx.get(url + "/metrics").text)
        if until is None or until in found or time.monotonic() > deadline:
            return found
        time.sleep(0.02)


def post(url, body, content_length=None):
    """A connection over which a body, or a part of one, was sent."""
    content = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=10)
    head = f"POST {URL} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {content_length or len(content)}\r\n\r\n".encode() + content)
    return connection


def test_work_is_counted_and_timed(serve, serving_fakes):
    sampler = serving_fakes.FakeSampler(step_s=0.02)

    async def test(client):
        await client.post(URL, json={"prompt": "private", "max_tokens": 8})
        return (await client.get("/metrics")).text

    text = serve(test, sampler, served_model_name="m")
    found = values(text)
    assert found["coda_forwards_total"] == found["coda_step_seconds_count"] == 8
    assert found["coda_answer_tokens_total"] == 5
    assert found["coda_batch_size_sum"] == 8
    assert (found["coda_queue_seconds_count"], found["coda_first_text_seconds_count"]) == (1, 1)
    assert 8 * 0.02 <= found["coda_step_seconds_sum"]
    assert 0.02 <= found["coda_first_text_seconds_sum"] <= found['coda_response_seconds_sum{path="/v1/completions"}']
    assert "private" not in text
    assert "hello" not in text


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_counted_as_such_and_not_as_a_success(serving_fakes, stream):
    with serving_fakes.served(serving_fakes.make_app(serving_fakes.FakeSampler(step_s=0.05))) as url:
        connection = post(url, ASK | {"stream": stream})
        scrape(url, "coda_step_seconds_count")
        time.sleep(0.3)
        connection.close()
        aborted = 'coda_responses_total{path="/v1/completions",status="499"}'
        found = scrape(url, aborted)
    assert found[aborted] == 1
    assert 'coda_responses_total{path="/v1/completions",status="200"}' not in found
    assert found["coda_cancelled_total"] == 1
    assert found["coda_answer_tokens_total"] == 0


@pytest.mark.parametrize("path", [URL, "/v1/chat/completions", "/v1/messages"])
def test_a_stream_that_fails_is_counted_by_its_error(serve, serving_fakes, path):
    body = ASK if path == URL else {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}

    async def test(client):
        response = await client.post(path, json=body | {"stream": True})
        assert response.status_code == 200
        return values((await client.get("/metrics")).text)

    found = serve(test, serving_fakes.FakeSampler(error=RuntimeError("broken")))
    assert found[f'coda_responses_total{{path="{path}",status="500"}}'] == 1
    assert found['coda_failed_total{code="model_failure"}'] == 1
    late = serve(test, serving_fakes.FakeSampler(step_s=0.2), request_timeout_s=0.3)
    assert late[f'coda_responses_total{{path="{path}",status="504"}}'] == 1
    assert late["coda_cancelled_total"] == 1


def test_a_body_that_never_comes_whole_holds_nothing_up_and_is_no_failure(serving_fakes, caplog):
    sampler = serving_fakes.FakeSampler(script=lambda request: b"a")
    with serving_fakes.served(serving_fakes.make_app(sampler)) as url:
        halves = [post(url, ASK, content_length=1000) for _ in range(20)]
        assert httpx.post(url + URL, json=ASK).json()["choices"][0]["text"] == "a"
        slow = post(url, ASK, content_length=40)
        for letter in b" " * (40 - len(json.dumps(ASK))):
            slow.sendall(bytes([letter]))
            time.sleep(0.01)
        assert slow.recv(15) == b"HTTP/1.1 200 OK"
        slow.close()
        for half in halves:
            half.close()
        aborted = 'coda_responses_total{path="/v1/completions",status="499"}'
        deadline = time.monotonic() + 10
        while (found := scrape(url)).get(aborted, 0) < 20 and time.monotonic() < deadline:
            time.sleep(0.02)
    assert found[aborted] == 20
    assert 'coda_responses_total{path="/v1/completions",status="500"}' not in found
    assert len(sampler.batches) == 2
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_no_label_grows_with_what_clients_send(serve):
    async def test(client):
        for i in range(50):
            await client.get(f"/v1/models/{i}")
            await client.get(f"/{i}")
            await client.request(f"METHOD{i}", URL)
            await client.post(URL, json={**ASK, "model": f"m{i}"}, headers={"Authorization": f"Bearer {i}"})
        return (await client.get("/metrics")).text

    labels = set(re.findall(r'path="([^"]*)"', serve(test)))
    assert labels == {"/v1/models/{name:path}", "unknown", URL}
    assert threading.active_count() < 20
