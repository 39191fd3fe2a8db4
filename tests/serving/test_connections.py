"""What a client can do to a connection: ask slowly, never, or without end, and not read."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from functools import partial

import pytest
import uvicorn

from coda_serving import __main__ as server_room
from coda_serving.connections import MOST_HEAD_BYTES, Connection

LIMIT_S = 0.4
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


async def plain(scope, receive, send):
    """Answers with what the path asks for."""
    if scope["path"] == "/waiting":
        async with asyncio.timeout(6):
            while (await receive())["type"] != "http.disconnect":
                continue
        plain.left.set()
    if scope["path"].startswith("/late"):
        await asyncio.sleep(3 * LIMIT_S)
    headers = [(b"connection", b"close")] if scope["path"] == "/large" else []
    body = b"xx"
    if scope["path"] == "/said":
        body = b""
        while (message := await receive()).get("more_body"):
            body += message["body"]
        body += message["body"]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    if scope["path"] == "/endless":
        while True:
            await send({"type": "http.response.body", "body": b"x" * (1 << 16), "more_body": True})
            await asyncio.sleep(0)
            if not plain.connections():
                plain.left.set()
                return
    await send({"type": "http.response.body", "body": b"x" * (30 << 20) if scope["path"] == "/large" else body})


@contextlib.contextmanager
def served(app):
    config = uvicorn.Config(app, port=0, log_config=None, lifespan="auto", http=partial(Connection, limit_s=LIMIT_S))
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname(), lambda: set(server.server_state.connections)
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def address():
    with served(plain) as (address, connections):
        plain.connections, plain.left = connections, threading.Event()
        yield address


@contextlib.contextmanager
def connected(address, *pieces, pause_s=0.0):
    with socket.create_connection(address, timeout=10) as client:
        for piece in pieces:
            with contextlib.suppress(ConnectionError):
                client.sendall(piece)
            time.sleep(pause_s)
        yield client


def rest(client):
    received = b""
    with contextlib.suppress(ConnectionError):
        while part := client.recv(1 << 16):
            received += part
    return received


def seconds_of(action):
    started_s = time.monotonic()
    return action(), time.monotonic() - started_s


@pytest.mark.parametrize("sent", [b"", b"GET /", b"\r\n", HEAD], ids=str)
def test_a_client_that_does_not_ask_is_left(address, sent):
    with connected(address, sent) as client:
        received, seconds = seconds_of(lambda: rest(client))
    assert received == b""
    assert LIMIT_S / 2 < seconds < LIMIT_S + 2


def test_a_head_that_comes_slowly_is_not_waited_for_and_one_without_end_is_not_kept(address):
    with connected(address, *[b"GET / HTTP/1.1\r\n", *[b"a: b\r\n"] * 12], pause_s=LIMIT_S / 8) as client:
        assert rest(client) == b""
    with connected(address, b"GET / HTTP/1.1\r\nX: ", *[b"x" * (MOST_HEAD_BYTES // 4)] * 8, pause_s=0.005) as client:
        assert rest(client).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("pause_s", [0.0, 0.05], ids=["in one packet", "in several"])
def test_a_client_that_would_rather_have_http2_is_answered_and_its_body_read(address, pause_s):
    head = HEAD.replace(b"/v1/completions", b"/said") + b"Connection: Upgrade, HTTP2-Settings\r\n"
    head += b"uPgrade:  h2c \r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"
    sized, chunked = b"Content-Length: 5\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"
    pieces = [head + sized, b"said1", head + chunked, b"3\r\nsai\r\n", b"2\r\nd2\r\n0\r\n\r\n"]
    for sent in (pieces[:2], pieces[2:], *([pieces[2:] + pieces[:2]] if pause_s else ())):
        with connected(address, *(sent if pause_s else [b"".join(sent)]), pause_s=pause_s) as client:
            received = rest(client)
        assert b"400 Bad Request" not in received
        assert received.count(b"HTTP/1.1 200 OK") == received.count(b"said") == len(sent) // 2


def test_what_follows_a_body_as_a_part_of_its_request_has_an_end(address):
    head = HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n"
    for trailer in (b"X: y\r\n" * 4000, b"X: " + b"x" * 24000):
        with connected(
            address, head.replace(b"POST /", b"POST /late/") + b"0\r\n", *[trailer] * 4, pause_s=0.02
        ) as client:
            assert rest(client).startswith(b"HTTP/1.1 400 ")
    with connected(address, head, *[b"%x\r\n%s\r\n" % (60000, b"x" * 60000)] * 4, b"0\r\nX: y\r\n\r\n") as client:
        assert rest(client).startswith(b"HTTP/1.1 200 OK")


def test_a_client_that_leaves_with_requests_behind_the_first_is_heard_to_leave(address):
    plain.left.clear()
    with connected(address, b"GET /waiting HTTP/1.1\r\nHost: x\r\n\r\n" * 2, pause_s=0.1):
        pass
    assert plain.left.wait(5)


def test_an_answer_that_takes_long_and_a_connection_that_is_used_again_are_not_cut_off(address):
    with connected(address) as client:
        for path in (b"/", b"/late", b"/"):
            client.sendall(b"GET " + path + b" HTTP/1.1\r\nHost: x\r\n\r\n")
            received = b""
            while not received.endswith(b"0\r\n\r\n"):
                assert (part := client.recv(1000)), received
                received += part
            assert received.startswith(b"HTTP/1.1 200 OK")
            time.sleep(LIMIT_S / 2)


@pytest.mark.parametrize("path", ["endless", "large"])
def test_a_client_that_does_not_read_is_cut_off(address, path):
    """In the midst of a stream, whose application hears of it, and behind an answer that has been given whole."""
    plain.left.clear()
    with connected(address, f"GET /{path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()):
        deadline_s = time.monotonic() + 10
        while not plain.connections():
            assert time.monotonic() < deadline_s
        while plain.connections():
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
    assert path == "large" or plain.left.wait(5)


def test_a_body_that_comes_slowly_gets_408_and_one_that_comes_in_time_an_answer(serving_fakes, monkeypatch):
    monkeypatch.setattr("coda_serving.gate.LINGER_S", 0.1)
    app = serving_fakes.make_app(serving_fakes.FakeSampler(), client_timeout_s=LIMIT_S)
    with served(app) as (address, _):
        for length in (b"Content-Length: 1000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"):
            drip = [b" "] * 30 if length[:1] == b"C" else [b"1\r\n \r\n"] * 30
            with connected(address, HEAD + length, *drip, pause_s=LIMIT_S / 20) as client:
                head, _, body = rest(client).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 408 ")
            assert b"connection: close" in head
            error = json.loads(body)["error"]
            assert (error["code"], error["type"]) == ("body_timeout", "timeout_error")
            assert "within 0.4 s (CLIENT_TIMEOUT_S)" in error["message"]
        body = json.dumps({"prompt": "a"}).encode()
        pieces = [HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body), body[:5], body[5:]]
        with connected(address, *pieces, pause_s=LIMIT_S / 4) as client:
            assert rest(client).startswith(b"HTTP/1.1 200 OK")


def test_the_server_has_these_connections(monkeypatch, serving_fakes):
    found = []
    app = serving_fakes.make_app(serving_fakes.FakeSampler())
    monkeypatch.setattr(server_room, "load_app", lambda settings: app)
    monkeypatch.setattr(server_room.Server, "run", lambda self, sockets: found.append(self.config.http))
    monkeypatch.setattr(server_room.gc, "freeze", lambda: None)
    server_room.serve(serving_fakes.make_settings(port=serving_fakes.free_port(), client_timeout_s=7))
    assert (found[0].func, found[0].keywords) == (Connection, {"limit_s": 7.0})
