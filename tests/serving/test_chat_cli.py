"""The chat client, piped and against a live server."""

import importlib.util
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

CLI = Path(__file__).resolve().parents[2] / "serving/fast-api/chat_cli.py"


def chat(url, text, *arguments):
    text = text if isinstance(text, bytes) else text.encode()
    environment = {k: v for k, v in os.environ.items() if k != "API_KEY"}
    return subprocess.run(
        [sys.executable, str(CLI), "--base-url", url, *arguments],
        input=text,
        capture_output=True,
        timeout=120,
        env=environment,
    )


def answer_of(server, messages, **fields):
    body = {"messages": messages, "max_tokens": 6} | fields
    response = httpx.post(server.url + "/v1/chat/completions", json=body, timeout=60)
    return response.json()["choices"][0]["message"]["content"]


def test_a_conversation_has_history_commands_and_meta(live_server):
    script = '/system Be odd.\nhello\n"""\nsecond\n  line\n"""\n/reset\nthird\n/nonsense\n/exit\nnot sent\n'
    result = chat(live_server.url, script, "--model", "tiny-coda", "--max-tokens", "6", "--stream", "--show-meta")
    assert result.returncode == 0, result.stderr
    system = {"role": "system", "content": "Be odd."}
    first = answer_of(live_server, [system, {"role": "user", "content": "hello"}])
    turns = [system, {"role": "user", "content": "hello"}, {"role": "assistant", "content": first}]
    second = answer_of(live_server, [*turns, {"role": "user", "content": "second\n  line"}])
    third = answer_of(live_server, [system, {"role": "user", "content": "third"}])
    assert result.stdout == "".join(f"{a}\n" for a in (first, second, third)).encode()
    notes = result.stderr.decode()
    assert "unknown command /nonsense" in notes
    pattern = r"\[\d+\.\d\d s, first text after .* s, \d+ prompt tokens, \d+ tokens, .* tokens/s, \d+ forwards \(.*\)\]"
    assert len(re.findall(pattern, notes)) == 3


def test_without_stream_and_model_the_only_model_answers_in_one_piece(live_server):
    result = chat(live_server.url + "/v1/", "hello", "--max-tokens", "6", "--show-meta", "--seed", "3", "--steps", "4")
    assert result.returncode == 0, result.stderr
    expected = answer_of(live_server, [{"role": "user", "content": "hello"}], seed=3, steps=4)
    assert result.stdout.decode() == expected + "\n"
    assert re.search(r"\[\d+\.\d\d s, \d+ prompt tokens, .* forwards", result.stderr.decode())


@pytest.mark.parametrize("arguments", [["--model", "x"], []])
def test_a_server_that_is_away_is_a_clear_error(serving_fakes, arguments):
    url = f"http://127.0.0.1:{serving_fakes.free_port()}"
    result = chat(url, "hello\n", *arguments)
    assert result.returncode == 1
    assert f"no server answers at {url}/v1; start one with: bash serving/fast-api/start_server.sh" in (
        result.stderr.decode()
    )
    assert b"Traceback" not in result.stderr


def test_the_servers_refusal_is_shown(live_server):
    result = chat(live_server.url, "hello\n", "--model", "other")
    assert result.returncode == 1
    assert "the server answered 404: model 'other' is not served here" in result.stderr.decode()


def test_input_that_is_no_utf8_is_told(live_server):
    result = chat(live_server.url, b"caf\xe9\n", "--model", "tiny-coda")
    assert result.returncode == 1
    assert b"error: the input is not UTF-8: " in result.stderr
    assert b"Traceback" not in result.stderr


def test_bytes_that_are_no_utf8_are_told_also_when_they_are_typed_or_an_argument(monkeypatch, capsys):
    """A terminal and a shell pass such bytes on as lone surrogates."""
    spec = importlib.util.spec_from_file_location("chat_cli", CLI)
    cli = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "chat_cli", cli)
    spec.loader.exec_module(cli)
    monkeypatch.setattr(cli, "read_messages", lambda is_terminal: iter(["ab\udcff", "/system \udcfe"]))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert cli.main(["--model", "x"]) == 1
    told = capsys.readouterr().err
    assert "the text is not UTF-8: byte 0xff at character 2" in told
    assert "byte 0xfe at character 8" in told
    with pytest.raises(SystemExit):
        cli.parse_arguments(["--system", "\udcff"])
    assert "the text is not UTF-8: byte 0xff at character 0" in capsys.readouterr().err
