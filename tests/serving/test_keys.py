"""Several keys, from the environment and from a file that changes while requests run."""

import asyncio
import logging
import os
import threading
import time
from pathlib import Path

import pytest

from coda_serving.keys import Keys, read_keys
from coda_serving.settings import load_settings
from CoDALanguageModel.errors import UserError

URL, ASK = "/v1/completions", {"prompt": "hi"}
GOOD = "# team\n\nalice:first:key\n  plain-key \nbob.2:sec0nd\r\nalice:third#1\n"


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "keys"
    path.write_text(GOOD)
    return path


def test_a_file_names_callers_by_their_keys(file):
    keys = Keys("own", file)
    shown = {"first:key": "alice", "third#1": "alice", "sec0nd": "bob.2", "plain-key": "unnamed", "own": "unnamed"}
    assert {key: keys.caller([key.encode()]) for key in shown} == shown
    for wrong in ("", "first", "alice:first:key", "# team", "SECOND", "sec0nd "):
        assert keys.caller([wrong.encode()]) is None
    assert keys.caller([b"wrong", b"sec0nd"]) == "bob.2"
    assert not Keys()
    assert Keys(path=file)


def test_every_key_is_compared_whichever_fits(file, monkeypatch):
    compared = []
    compare = "coda_serving.keys.hmac.compare_digest"
    monkeypatch.setattr(compare, lambda a, b: compared.append((len(a), len(b))) or a == b)
    keys = Keys("own", file)
    for shown in (b"own", b"third#1", b"wrong", b"x" * 10_000):
        keys.caller([shown])
    assert compared == [(32, 32)] * 5 * 4


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "there is no such file"),
        (b"", "the file holds no key"),
        (b"# nothing\n\n", "the file holds no key"),
        (b"ok\na secret with spaces\n", "line 2 must be KEY or NAME:KEY"),
        (b"no/name:secret\n", "line 1 must be"),
        (b":secret\n", "line 1 must be"),
        (b"name:\n", "line 1 must be"),
        ("schl\u00fcssel\n".encode(), "line 1 must be"),
        (b"\xff\xfe\n", "cannot be read: invalid start byte"),
        (b"a:same\nb:other\nc:same\n", "line 3 has the key of line 1"),
    ],
)
def test_a_start_with_a_broken_file_ends_and_says_why_but_shows_no_line(file, monkeypatch, content, words):
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    monkeypatch.setenv("MODEL_NAME", "org/model")
    monkeypatch.setenv("API_KEYS_FILE", str(file))
    with pytest.raises(UserError) as caught:
        load_settings()
    told = str(caught.value)
    assert told.startswith("API_KEYS_FILE: ")
    assert words in told
    assert str(file) in told
    assert "secret" not in told


def test_a_file_that_the_system_does_not_let_see_is_told_like_any_other(file, monkeypatch, caplog):
    """A folder that is closed to the server, a name that is too long."""
    with pytest.raises(UserError, match="cannot be read: File name too long"):
        Keys(path=file.with_name("x" * 300))
    keys = Keys(path=file)

    def refused(path, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "stat", refused)
    assert keys.caller([b"sec0nd"]) == "bob.2"
    assert "cannot be read: Permission denied; the 4 keys of before stay valid" in caplog.text
    assert not keys.is_file_valid


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="there is no such file"):
        Keys(path=tmp_path / "pipe")


def test_keys_rotate_while_requests_run(serve, serving_fakes, file, caplog):
    gate = threading.Event()
    sampler = serving_fakes.FakeSampler(gate=gate)
    caplog.set_level(logging.WARNING)

    async def test(client):
        running = asyncio.ensure_future(client.post(URL, json=ASK, headers=bearer("sec0nd")))
        while not sampler.batches:
            await asyncio.sleep(0.01)
        new = file.with_name("new")
        new.write_text("carol:fresh\n")
        new.rename(file)  # as an editor, or a mounted secret, replaces a file
        after = [(await client.get("/v1/models", headers=bearer(key))).status_code for key in ("sec0nd", "fresh")]
        with file.open("a") as more:  # in place
            more.write("dave:another\n")
        after.append((await client.get("/v1/models", headers={"x-api-key": "another"})).status_code)
        gate.set()
        return (await running).status_code, after

    assert serve(test, sampler, api_keys_file=file) == (200, [401, 200, 200])
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "1 keys are valid now",
        "2 keys are valid now",
    ]


def test_a_file_that_changes_twice_within_a_tick_of_the_clock_is_read_twice(file, monkeypatch, caplog):
    keys = Keys(path=file)
    monkeypatch.setattr("coda_serving.keys._stamp", lambda path: stamp)
    reads = []
    monkeypatch.setattr("coda_serving.keys.read_keys", lambda path: reads.append(path) or read_keys(path))
    stamp = (time.time_ns(), 0, 0)
    for name in ("first", "other"):  # of one length, in place
        file.write_text(f"carol:{name}\n")
        assert keys.caller([name.encode()]) == "carol"
    assert keys.caller([b"first"]) is None
    assert sum("has changed" in record.getMessage() for record in caplog.records) == 2
    stamp = (time.time_ns() - 3 * 10**9, 0, 0)  # some seconds later its time says enough
    num_reads = len(reads)
    assert [keys.caller([b"other"]) for _ in range(3)] == ["carol"] * 3
    assert len(reads) == num_reads + 1


def test_a_file_that_breaks_keeps_the_old_keys_and_says_so_once_and_loudly(serve, file, caplog):
    caplog.set_level(logging.INFO, "coda_serving.keys")

    async def test(client):
        async def state():
            text = (await client.get("/metrics", headers=bearer("sec0nd"))).text
            return next(line for line in text.splitlines() if line.startswith("coda_keys_file_valid"))

        states = [await state()]
        for breaks in (lambda: file.write_text("a b c secret\n"), file.unlink):
            breaks()
            states += [await state(), await state()]
        file.write_text(GOOD)
        return [*states, await state()]

    valid = [line.split()[1] for line in serve(test, api_keys_file=file)]
    assert valid == ["1.0", "0.0", "0.0", "0.0", "0.0", "1.0"]
    told = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert [level for level, _ in told] == ["ERROR", "ERROR", "WARNING"]
    assert "line 1 must be KEY or NAME:KEY" in told[0][1]
    assert "there is no such file; the 4 keys of before stay valid" in told[1][1]
    assert "secret" not in str(told)


def test_what_a_proxy_calls_an_address_cannot_forge_the_log(serve, caplog):
    caplog.set_level(logging.INFO, "coda_serving.observe")

    async def call(app, client):
        scope = {"type": "http", "method": "GET", "path": "/health", "headers": [], "client": client}
        await app(scope | {"query_string": b""}, None, lambda message: asyncio.sleep(0))

    async def test(client):
        for name in ("2001:db8::1", "x alice GET / 200\x9b31m"):
            await call(client._transport.app, (name, 1))

    serve(test)
    told = [record.getMessage().rpartition(" - GET ")[0] for record in caplog.records]
    assert told == ["2001:db8::1", "x%20alice%20GET%20/%20200%C2%9B31m"]


def test_logs_and_metrics_name_the_caller_and_never_show_a_key(serve, file, caplog):
    caplog.set_level(logging.DEBUG)

    async def test(client):
        await client.post(URL + "?token=hidden", json={"prompt": "private words"}, headers=bearer("first:key"))
        await client.post(URL, json={}, headers={"x-api-key": "plain-key"})
        await client.post(URL, json=ASK, headers=bearer("guessed"))
        return (await client.get("/metrics", headers=bearer("sec0nd"))).text

    text = serve(test, api_keys_file=file, api_key="0wn")
    counted = {line for line in text.splitlines() if line.startswith("coda_caller_responses_total")}
    assert counted == {
        'coda_caller_responses_total{caller="alice",status="200"} 1.0',
        'coda_caller_responses_total{caller="unnamed",status="400"} 1.0',
    }
    access = [r.getMessage() for r in caplog.records if r.name == "coda_serving.observe"]
    assert access[0].startswith("127.0.0.1 alice POST /v1/completions 200 ")
    assert access[2].startswith("127.0.0.1 - POST /v1/completions 401 ")
    told = text + "\n".join(r.getMessage() for r in caplog.records if r.name.startswith("coda_serving"))
    for private in ("first:key", "plain-key", "sec0nd", "guessed", "0wn", "hidden", "private words", "hello"):
        assert private not in told
