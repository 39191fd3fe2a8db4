"""The server is started, asked and stopped; one that cannot start says why."""

import json
import os
import re
import signal
import sys
import urllib.request

import pytest

from coda_quickstart import __main__ as program
from coda_quickstart.chat import QUESTION, ServerFailed, ask, demonstrate, running_server
from coda_quickstart.runner import StageFailed

FAKE_SERVER = """
import json, os
from http.server import BaseHTTPRequestHandler, HTTPServer


class Handler(BaseHTTPRequestHandler):
    def reply(self, body):
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.reply({"status": "ok", "model": os.environ["MODEL_NAME"]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = f"{body['prompt']}|{body['max_tokens']}|{body['suffix']}" if "prompt" in body else "an answer"
        choice = {"index": 0, "finish_reason": "stop", "text": text, "message": {"role": "assistant", "content": text}}
        self.reply({"id": "1", "object": "x", "created": 0, "model": body["model"], "choices": [choice]})

    def log_message(self, *arguments):
        pass


HTTPServer((os.environ["HOST"], int(os.environ["PORT"])), Handler).serve_forever()
"""


def install(repository, script):
    folder = repository / "serving" / "fast-api"
    folder.mkdir(parents=True)
    (folder / "start_server.sh").write_text(script)


@pytest.fixture
def repository(tmp_path):
    (tmp_path / "fake.py").write_text(FAKE_SERVER)
    install(tmp_path, f"exec {sys.executable} -S {tmp_path / 'fake.py'}\n")
    return tmp_path


@pytest.fixture
def held_out(repository, tokenizer):
    tokenizer.save_pretrained(repository / "tokenizer")
    rows = {
        "problems": {"prompt": "def f(x):\n", "canonical_solution": "    return x\n"},
        "infill": {"prefix": "a = ", "middle": " x", "suffix": "\n"},
    }
    for name, row in rows.items():
        path = repository / "benchmarks" / f"quickstart_{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(row) + "\n")
    return rows


def test_both_requests_are_about_held_out_text_and_the_server_ends_with_the_block(repository, held_out, tokenizer):
    with running_server(repository, repository / "model", repository / "logs" / "server.log") as base_url:
        with urllib.request.urlopen(base_url.removesuffix("/v1") + "/health") as response:
            assert json.load(response)["model"] == str(repository / "model")
        chat, infill = ask(base_url, repository)
    assert (chat["kind"], chat["question"], chat["answer"]) == ("chat", "def f(x):\n", "an answer")
    num_tokens = len(tokenizer(" x")["input_ids"])
    assert infill["answer"] == f"a = |{num_tokens}|\n"
    assert infill["question"] == f"a = [{num_tokens} tokens missing]\n"
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(base_url.removesuffix("/v1") + "/health")


def test_the_demo_shows_both_in_the_chat_client(repository, held_out, tokenizer):
    client = repository / "serving" / "fast-api" / "chat_cli.py"
    log = repository / "asked.jsonl"
    client.write_text(
        "import json, sys, urllib.request\n"
        "url = sys.argv[sys.argv.index('--base-url') + 1]\n"
        "urllib.request.urlopen(url.removesuffix('/v1') + '/health')\n"
        f"print(json.dumps([sys.argv[1:], '--infill' in sys.argv or sys.stdin.read()]), file=open({str(log)!r}, 'a'))\n"
    )
    said = []
    demonstrate(repository, repository, said.append)
    (chat, message), (infill, _) = map(json.loads, log.read_text().splitlines())
    assert "--canvas" in chat
    assert message == held_out["problems"]["prompt"]
    with open(infill[infill.index("--infill") + 1]) as file:
        assert file.read() == f"a = <gap:{len(tokenizer(' x')['input_ids'])}>\n"
    assert "--serve" in said[-2]
    assert QUESTION in said[-1]
    client.write_text("raise SystemExit(3)")
    with pytest.raises(StageFailed, match="exit status 3"):
        demonstrate(repository, repository, said.append)


def test_a_server_that_is_left_running_says_where_its_page_is_and_what_to_ask(repository, monkeypatch, capsys):
    monkeypatch.setattr(program, "REPOSITORY", repository)
    program._leave_serving(repository)
    shown = capsys.readouterr().out
    try:
        page = re.search(r"^page: (http://127.0.0.1:\d+)/$", shown, re.M)[1]
        assert urllib.request.urlopen(f"{page}/health").status == 200
        client = repository / "serving" / "fast-api" / "chat_cli.py"
        assert f"chat: {sys.executable} {client} --base-url {page}\n" in shown  # from any folder, in any environment
        assert QUESTION in shown
    finally:
        os.killpg(int(re.search(r"kill (\d+)", shown)[1]), signal.SIGKILL)


def test_the_servers_page_offers_the_question_too():
    page = program.REPOSITORY / "serving" / "coda_serving" / "page" / "page.js"
    assert f'"{QUESTION}"' in page.read_text()


def test_the_server_ends_also_when_a_request_fails(repository):
    with (
        pytest.raises(KeyError, match="lost"),
        running_server(repository, repository, repository / "server.log") as base_url,
    ):
        raise KeyError("lost")
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(base_url.removesuffix("/v1") + "/health")


def test_a_server_that_ends_early_shows_its_log(tmp_path):
    install(tmp_path, "echo no model here >&2; exit 2\n")
    with (
        pytest.raises(ServerFailed, match="(?s)exit status 2:.*no model here"),
        running_server(tmp_path, tmp_path, tmp_path / "server.log"),
    ):
        pass
