"""The chat client, piped and against a live server."""

import fcntl
import importlib.util
import io
import json
import os
import pty
import re
import select
import signal
import stat
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from coda_serving.chat.canvas import CanvasDisplay
from coda_serving.chat.commands import run_command
from coda_serving.chat.conversation import Conversation
from coda_serving.chat.parts import Canvas
from coda_serving.chat.terminal import harmless
from CoDALanguageModel.errors import UserError

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


# -- in this process -------------------------------------------------------------------------------------------------


@pytest.fixture
def ask(monkeypatch, capsys, tmp_path):
    """Give a function that runs the client on piped bytes; returns status, output and notes."""
    spec = importlib.util.spec_from_file_location("chat_cli", CLI)
    cli = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "chat_cli", cli)
    spec.loader.exec_module(cli)
    monkeypatch.setenv("COLUMNS", "200")

    def run(url, text, *arguments):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
        status = cli.main(["--base-url", url, *arguments])
        told = capsys.readouterr()
        return status, told.out, told.err

    return run


PROGRAM = b'# prog\ndef f():\n    """\n    Doc\n    """\n\n    return \'/exit\'\n'


@pytest.mark.parametrize("program", [PROGRAM, b"/* a */\nint x;\n", b"/usr/bin/env\n\nend", b"hello"])
def test_a_piped_program_is_one_message(ask, live_server, program):
    status, out, _ = ask(live_server.url, program, "--max-tokens", "6", "--model", "tiny-coda")
    message = program.decode().removesuffix("\n")
    assert (status, out) == (0, answer_of(live_server, [{"role": "user", "content": message}]) + "\n")


def test_a_piped_script_begins_with_a_command(ask, serving_fakes):
    sampler = serving_fakes.FakeSampler(script=lambda request: bytes(request.prompt_ids[-3:]))
    with serving_fakes.served(serving_fakes.make_app(sampler)) as url:
        script = (
            b'/set temperature 0.5\none\n/multi\ntwo\nsix\n"""\n/retry\n/undo\n/undo\n/undo\n/nonsense\n/quit\nnot\n'
        )
        status, out, notes = ask(url, script, "--stream")
    assert (status, out) == (0, "one\nsix\nsix\n")
    prompts = [bytes(batch[0].prompt_ids).decode() for batch in sampler.batches]
    assert prompts == ["[user]one"] + ["[user]one[assistant]one[user]two\nsix"] * 2
    assert {batch[0].options.temperature for batch in sampler.batches} == {0.5}
    for words in ("temperature = 0.5", "taken back: two...", "taken back: one", "/undo: nothing was asked yet"):
        assert words in notes
    assert "error: unknown command /nonsense; /help lists them" in notes


def conversation(**fields):
    return Conversation(client=None, model="m", stream=False, settings={}, **fields)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/set tempratur 1", "unknown setting 'tempratur'; did you mean temperature"),
        ("/set temperature hot", "temperature must be a number in [0, 1e6], got 'hot'"),
        ("/set temperature -1", "temperature must be a number in [0, 1e6], got -1.0"),
        ("/set max_tokens -4", "max_tokens must be an integer >= 0, got -4"),
        ("/set alg greedy", "alg must be one of origin, "),
        ("/set seed 1.5", "seed must be"),
        ("/retry", "/retry: nothing was asked yet"),
        ("/save", "/save: needs the name of a file"),
        ("/load /no/such/file", "/load: /no/such/file: No such file or directory"),
        ("/save ~nobody-of-this-name/x", "/save: ~nobody-of-this-name/x: Could not determine home directory"),
        ("/load a\0b", "/load: needs the name of a file"),
        ("/load /dev/null", "/load: /dev/null is no saved conversation: it is no file"),
        ("/hlp", "unknown command /hlp; did you mean /help?; /help lists them"),
    ],
)
def test_a_command_that_cannot_be_carried_out_says_why_and_changes_nothing(line, words):
    held = conversation()
    with pytest.raises(UserError) as caught:
        run_command(line, held)
    assert words in str(caught.value)
    assert held == conversation()


def test_settings_are_set_shown_and_left_to_the_server_again():
    held = conversation()
    for line in ("/set steps 9", "/set top_p none", '/set logit_bias {"5": 1.5}', "/set alg p2"):
        run_command(line, held)
    assert held.settings == {"steps": 9, "top_p": "none", "logit_bias": {"5": 1.5}, "alg": "p2"}
    assert 'alg = "p2"' in run_command("/set", held).says
    assert "steps = 9: denoising steps" in run_command("/set steps", held).says
    run_command("/set steps default", held)
    assert "steps" not in held.settings


def test_a_conversation_is_saved_and_gone_on_with_and_no_other_file_is_overwritten(tmp_path):
    turns = [{"role": "user", "content": "a\u2028b"}, {"role": "assistant", "content": ""}]
    held, other = conversation(turns=list(turns), system="Be odd."), conversation()
    for _ in range(2):
        run_command(f"/save {tmp_path}/talk.json", held)
    assert run_command(f"/load {tmp_path}/talk.json", other).says == "2 messages; system: Be odd."
    assert (other.turns, other.system) == (turns, "Be odd.")
    program = tmp_path / "prog.py"
    program.write_text("print()\n")
    with pytest.raises(UserError, match="is no saved conversation, and stays as it is"):
        run_command(f"/save {program}", held)
    half = '{"system": "\\udc80", "messages": []}'
    deep = "[" * 100_000
    for wrong in ("[]", "{}", '{"messages": [{"role": "assistant", "content": "a"}]}', "print()", half, deep):
        program.write_text(wrong)
        with pytest.raises(UserError, match="/load: .* is no saved conversation"):
            run_command(f"/load {program}", other)
    assert other.turns == turns
    program.write_text('{"messages": []}')
    assert run_command(f"/load {program}", other).says == "0 messages; system: (none)"


def test_a_saved_conversation_that_cannot_be_written_anew_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "talk.json"
    held = conversation(system="Be odd.")
    run_command(f"/save {path}", held)
    saved = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *names: (_ for _ in ()).throw(OSError(28, "No space left", str(path))))
    with pytest.raises(UserError, match="No space left"):
        run_command(f"/save {path}", held)
    assert path.read_bytes() == saved
    assert list(tmp_path.iterdir()) == [path]


ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\b\rname\n"


def test_nothing_that_others_say_controls_a_terminal(ask, serving_fakes, monkeypatch, tmp_path):
    """Answers, errors of the server and files; into a file or a pipe an answer goes as it is."""
    sampler = serving_fakes.FakeSampler(script=lambda request: ESCAPES.encode())
    (tmp_path / "talk").write_text(json.dumps({"system": ESCAPES, "messages": []}))
    (tmp_path / "prog").write_text(f"{ESCAPES}<gap:2>")
    with serving_fakes.served(serving_fakes.make_app(sampler)) as url:
        runs = [(b"hello",), (b"hello", "--stream"), (b"", "--infill", str(tmp_path / "prog"))]
        assert ESCAPES in ask(url, *runs[0])[1]
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        for run in [*runs, (b"hello", "--model", ESCAPES), (f"/load {tmp_path}/talk\n".encode(),)]:
            _, out, notes = ask(url, *run)
            assert "owned" in out + notes
            assert all(sign.isprintable() or sign in "\n\ufffd" for sign in out + notes)


def test_what_is_no_file_of_the_history_keeps_its_mode(ask, monkeypatch):
    changed = []
    monkeypatch.setattr(os, "fchmod", lambda *arguments: changed.append(arguments))
    sys.modules["chat_cli"].PrivateHistory(Path(os.devnull)).append_string("hello")
    assert changed == []


def infilled(server, pieces, **fields):
    body = {"infill": {"pieces": pieces, **fields}, "max_tokens": 8 if not fields else None}
    response = httpx.post(server.url + "/v1/completions", json=body, timeout=60)
    return pieces[0] + response.json()["choices"][0]["text"] + pieces[-1]


def test_the_gaps_of_a_file_are_filled_and_printed_or_written(ask, live_server, tmp_path):
    path = tmp_path / "prog.py"
    path.write_bytes(b"a\r\nb<gap:3>c<gap:2>d\n")
    expected = infilled(live_server, ["a\r\nb", "c", "d\n"], lengths=[3, 2])
    for arguments in ([], ["--stream"], ["--canvas"]):
        assert ask(live_server.url, b"", "--infill", str(path), *arguments)[:2] == (0, expected)
    assert ask(live_server.url, path.read_bytes(), "--infill", "-")[:2] == (0, expected)
    path.chmod(0o640)
    assert ask(live_server.url, b"", "--infill", str(path), "--write")[:2] == (0, "")
    assert path.read_bytes() == expected.encode()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [path]
    link = tmp_path / "link"
    link.symlink_to("prog.py")
    path.write_text("a<gap:3>b")
    assert ask(live_server.url, b"", "--infill", str(link), "--write")[:2] == (0, "")
    assert link.is_symlink()
    assert path.read_text() == infilled(live_server, ["a", "b"], lengths=[3])
    path.write_text("one\f\u2028\ntwo\nthree\nfour\n")
    _, out, notes = ask(
        live_server.url, b"", "--infill", str(path), "--lines", "2-3", "--max-tokens", "8", "--show-meta"
    )
    assert out == infilled(live_server, ["one\f\u2028\n", "\nfour\n"])
    assert re.search(r"\[\d+\.\d\d s, \d+ prompt tokens", notes)


def test_a_file_that_changes_while_its_gaps_are_filled_is_not_overwritten(ask, serving_fakes, tmp_path):
    path = tmp_path / "prog.py"
    path.write_text("a<gap:2>")

    def script(request):
        path.write_text("edited")
        return b"xy"

    with serving_fakes.served(serving_fakes.make_app(serving_fakes.FakeSampler(script=script))) as url:
        status, _, notes = ask(url, b"", "--infill", str(path), "--write")
    assert (status, path.read_text()) == (2, "edited")
    assert "the file has changed in the meantime" in notes


@pytest.mark.parametrize(
    ("content", "arguments", "words"),
    [
        (b"nothing", [], "holds no <gap> or <gap:LENGTH>"),
        (b"<gap>a<gap:3>", [], "every gap needs a length, or none"),
        (b"\xff<gap>", [], "is not UTF-8: invalid start byte at byte 0"),
        (b"a\nb\n", ["--lines", "2-3"], "--lines must be within 1-2, got 2-3"),
        (None, [], "No such file or directory"),
    ],
)
def test_a_file_that_cannot_be_filled_is_told_in_a_line(ask, live_server, tmp_path, content, arguments, words):
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    status, out, notes = ask(live_server.url, b"", "--model", "m", "--infill", str(path), *arguments)
    assert (status, out) == (2, "")
    assert words in notes
    assert notes.count("\n") == 1


async def no_such_server(scope, receive, send):
    """Answers everything with a page, and breaks off answers."""
    if scope["type"] == "lifespan":
        for stage in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{stage}.complete"})
        return
    kind = b"text/event-stream" if scope["path"].endswith("completions") else b"text/html"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
    if kind == b"text/html":
        await send({"type": "http.response.body", "body": b"<html>hello</html>"})
    else:
        await send({"type": "http.response.body", "body": b": waiting\n\n", "more_body": True})
        raise RuntimeError("broken")


def test_what_is_no_such_server_and_what_breaks_off_is_told_in_a_line(ask, serving_fakes):
    with serving_fakes.served(no_such_server) as url:
        status, _, notes = ask(url, b"hello")
        assert status == 2
        assert f"what answers at {url}/v1/ lists no models" in notes.replace("\n", "")
        status, out, notes = ask(url, b"hello", "--model", "m", "--stream")
    assert (status, out) == (1, "")
    assert f"error: the connection to {url}/v1 broke" in notes
    assert "Traceback" not in notes


def test_a_stream_that_the_server_ends_with_an_error_is_told_in_a_line(ask, serving_fakes):
    sampler = serving_fakes.FakeSampler(error=RuntimeError("broken"))
    with serving_fakes.served(serving_fakes.make_app(sampler)) as url:
        status, _, notes = ask(url, b"hello", "--stream")
    assert status == 1
    assert notes == "error: the model failed; see the server's log\n"


CELLS = [[0, "a", "committed", 0.5]]
BROKEN_CANVASES = [
    7,
    {"cells": CELLS},
    {"step": "1", "length": 1, "cells": CELLS},
    {"step": 0, "length": 10**12, "cells": []},
    {"step": 0, "length": -1, "cells": []},
    {"step": 0, "cells": CELLS},
    {"step": 0, "length": 1, "cells": 5},
    {"step": 0, "length": 1, "cells": [[1, "a", "committed", 0.5]]},
    {"step": 0, "length": 1, "cells": [[-1, "a", "committed", 0.5]]},
    {"step": 0, "length": 1, "cells": [[0, 5, "committed", 0.5]]},
    {"step": 0, "length": 1, "cells": [[0, "a", [], 0.5]]},
    {"step": 0, "length": 1, "cells": [[0, "a", "committed", "high"]]},
    {"step": 0, "length": 1, "cells": [[0, "a"]]},
]
BROKEN_EVENTS = [
    b"5",
    b'"text"',
    b"{not json",
    b"\xff",
    b"{}",
    b'{"choices": 7}',
    b'{"choices": [7]}',
    b'{"choices": [{"delta": 7}]}',
    b'{"choices": [{"delta": {"content": 7}}]}',
    b'{"choices": [], "usage": {"completion_tokens": "many", "prompt_tokens": 1}}',
    *(json.dumps({"choices": [{"delta": {}, "canvas": canvas}]}).encode() for canvas in BROKEN_CANVASES),
]


def broken_server(events, kind):
    """Answers each request with one of `events`, and then with a word."""
    left = iter(events)
    good = {"choices": [{"delta": {"content": "good"}, "message": {"content": "good"}}]}

    async def app(scope, receive, send):
        if scope["type"] == "lifespan":
            return await no_such_server(scope, receive, send)
        while (await receive()).get("more_body"):
            continue
        event = next(left, json.dumps(good).encode())
        body = b"data: %b\n\ndata: [DONE]\n\n" % event if kind == b"text/event-stream" else event
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        await send({"type": "http.response.body", "body": body})

    return app


@pytest.mark.parametrize("arguments", [["--canvas"], []])
def test_what_a_broken_server_sends_is_told_in_a_line_and_the_client_goes_on(ask, serving_fakes, arguments):
    kind = b"text/event-stream" if arguments else b"application/json"
    events = BROKEN_EVENTS if arguments else BROKEN_EVENTS[:10]
    with serving_fakes.served(broken_server(events, kind)) as url:
        script = b"/set\n" + b"hello\n" * (len(events) + 1)
        status, out, notes = ask(url, script, "--model", "m", *arguments)
    told = [line for line in notes.splitlines() if line.startswith("error: ")]
    assert (status, out.strip()) == (1, "good")
    assert len(told) == len(events)
    assert sum("is no answer of this API" in line for line in told) >= len(events) - 1
    assert "Traceback" not in notes


@pytest.mark.parametrize(("width", "height"), [(8, 5), (40, 12), (80, 3)])
def test_the_canvas_fits_the_terminal_and_shows_where_the_work_is(width, height):
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, _environ={"TERM": "xterm"})
    display = CanvasDisplay(console)
    cells = [[i, f"w{i}\n", "committed", 0.9] for i in range(60)]
    cells += [[60, "draft", "provisional", 0.4], [62, None, "committed", 0.9], [63, "\x1b[31m", "provisional", None]]
    with display:
        display.show(Canvas(step=0, length=64, cells=[]))
        display.show(Canvas(step=3, cells=cells))
    shown = console.file.getvalue().rpartition("step 3")[2]
    assert "draft" in shown
    assert "\u2591" in shown
    assert "w1\n" not in shown
    assert "\x1b[31m" not in shown
    drawn = Console(file=io.StringIO(), width=width, height=height)
    drawn.print(display)
    lines = drawn.file.getvalue().splitlines()
    assert len(lines) <= max(height, 3)
    assert max(map(len, lines)) <= width


# -- at a terminal ---------------------------------------------------------------------------------------------------


PROMPT = b"\x1b[?2004h"
"""Asks for pastes in brackets: the client waits for a message."""


def take_terminal():
    """In a new process: its standard input controls it, and Ctrl-C ends it, whatever the tests were started by."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Terminal:
    """The client in a terminal of its own."""

    def __init__(self, folder, *arguments, columns=80, **variables):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        environment = {k: v for k, v in os.environ.items() if k not in ("API_KEY", "COLUMNS", "NO_COLOR")}
        environment |= {
            "TERM": "xterm-256color",
            "XDG_STATE_HOME": str(folder),
            "PROMPT_TOOLKIT_NO_CPR": "1",
        } | variables
        self.process = subprocess.Popen(
            [sys.executable, str(CLI), *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
            preexec_fn=take_terminal,
        )
        os.close(slave)
        self.seen = b""

    def read(self, seconds=0.1):
        if select.select([self.master], [], [], seconds)[0]:
            try:
                self.seen += os.read(self.master, 1 << 16)
            except OSError:  # the client has ended
                return False
        return True

    def until(self, words, timeout_s=25):
        """Wait for words that were not waited for before."""
        deadline = time.monotonic() + timeout_s
        start = getattr(self, "place", 0)
        while (place := self.seen.find(words, start)) < 0:
            assert self.read(), self.seen
            assert time.monotonic() < deadline, self.seen
        self.place = place + len(words)

    def type(self, keys):
        os.write(self.master, keys)

    def end(self):
        deadline = time.monotonic() + 30
        while self.read() and time.monotonic() < deadline:
            continue
        os.close(self.master)
        return self.process.wait(10)


def test_at_a_terminal_a_paste_is_one_message_and_ctrl_c_ends_an_answer_and_not_the_client(serving_fakes, tmp_path):
    def script(request):
        is_slow = b"slow" in bytes(request.prompt_ids)
        sampler.step_s = 0.2 if is_slow else 0.0  # so that Ctrl-C comes before the end
        return b"x" * 32 if is_slow else b"<" + bytes(request.prompt_ids[-4:]) + b">"

    sampler = serving_fakes.FakeSampler(script=script)
    with serving_fakes.served(serving_fakes.make_app(sampler)) as url:
        terminal = Terminal(tmp_path, "--base-url", url, "--stream", NO_COLOR="1")
        terminal.until(b"/help lists the commands")
        terminal.until(PROMPT)
        terminal.type(b"\x1b[200~one\r\ntwo  \r\n/exit\x1b[201~\r")
        terminal.until(b"<exit>")
        for number in (2, 3):
            terminal.until(PROMPT)
            terminal.type(b"slow\r")
            deadline = time.monotonic() + 20
            while len(sampler.batches) < number:
                terminal.read()
                assert time.monotonic() < deadline, terminal.seen
            terminal.type(b"\x03")
            terminal.until(b"interrupted")
        terminal.until(PROMPT)
        terminal.type(b"bad \xff\r")
        terminal.until(b"not UTF-8: byte 0xff")
        terminal.until(PROMPT)
        terminal.type(b"/multi\r")
        terminal.until(b"Esc Enter sends it")
        terminal.type(b"last\rthis\x1b\r")
        terminal.until(b"<this>")
        terminal.until(PROMPT)
        terminal.type(b"/quit\r")
        assert terminal.end() == 0
        deadline = time.monotonic() + 10
        while "coda_cancelled_total 2.0" not in httpx.get(url + "/metrics").text:
            assert time.monotonic() < deadline, "the server went on"
    prompts = [bytes(batch[0].prompt_ids).decode() for batch in sampler.batches]
    first = "[user]one\ntwo  \n/exit"
    assert prompts[0] == first
    assert prompts[-1] == f"{first}[assistant]<exit>[user]last\nthis"
    assert b"\x1b[31m" not in terminal.seen, "red in spite of NO_COLOR"
    history = tmp_path / "coda/chat_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert "+one\n+two  \n+/exit\n" in history.read_text()


def test_at_a_terminal_the_canvas_is_shown_and_then_the_answer(live_server, tmp_path):
    arguments = ["--base-url", live_server.url, "--canvas", "--no-history", "--max-tokens", "16", "--show-meta"]
    terminal = Terminal(tmp_path, *arguments, columns=30)
    terminal.until(PROMPT)
    terminal.type(b"hello\r")
    terminal.until(b"step 0, 16 of 16 open")
    terminal.until(b" forwards (")
    terminal.until(PROMPT)  # until then the terminal itself would take the key
    terminal.type(b"\x04")
    assert terminal.end() == 0
    assert "\u2591" in terminal.seen.decode(errors="replace")
    expected = answer_of(live_server, [{"role": "user", "content": "hello"}], max_tokens=16)
    plain = harmless(expected).encode().replace(b"\n", b"\r\n")
    assert plain in terminal.seen
    assert not (tmp_path / "coda").exists()


def test_at_a_terminal_the_filled_text_stands_whole_behind_the_canvas(live_server, tmp_path):
    path = tmp_path / "prog.py"
    path.write_text("before<gap:4>behind\n")
    terminal = Terminal(tmp_path, "--base-url", live_server.url, "--infill", str(path), "--canvas", columns=60)
    assert terminal.end() == 0
    drawn, _, printed = terminal.seen.rpartition(b"\x1b[2K")  # the canvas is taken away
    assert b"of 4 open" in drawn
    assert b"before" not in drawn
    expected = harmless(infilled(live_server, ["before", "behind\n"], lengths=[4]))
    assert printed.decode().replace("\r\n", "\n").endswith(expected)
