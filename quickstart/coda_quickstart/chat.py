"""Starts the server on the fine-tuned model and asks it a chat and an infill question: by program, or to be seen."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from openai import OpenAI
from tokenizers import Tokenizer

from coda_quickstart.runner import StageFailed
from CoDALanguageModel.run_files import read_rows

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 30.0
MODEL_NAME = "coda-quickstart"
QUESTION = "Return the sum of the squares of the even numbers in numbers."
"""One that the model was made for; it knows the words of its instruction set and no others."""


class ServerFailed(StageFailed):
    """The server ended, or did not answer in time; the message holds the end of its log."""


def free_port() -> int:
    """A loopback port that nothing listens on at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_server(repository: Path, model_dir: Path, port: int, log_path: Path) -> subprocess.Popen:
    """Start the server in a session of its own and wait until it is healthy.

    Raises:
        ServerFailed: it ended, or was not healthy within three minutes.
    """
    environment = {
        "MODEL_NAME": str(model_dir),
        "SERVED_MODEL_NAME": MODEL_NAME,
        "HOST": "127.0.0.1",
        "PORT": str(port),
    }
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("w", encoding="utf-8") as log:
        server = subprocess.Popen(
            ("bash", str(repository / "serving" / "fast-api" / "start_server.sh")),
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_healthy(server, port, log_path)
    except BaseException:
        stop_server(server)
        raise
    return server


def _wait_until_healthy(server: subprocess.Popen, port: int, log_path: Path) -> None:
    started = time.monotonic()
    while True:
        if server.poll() is not None:
            reason = f"ended with exit status {server.returncode}"
            break
        if time.monotonic() - started > START_TIMEOUT_S:
            reason = f"was not healthy after {START_TIMEOUT_S:.0f} s"
            break
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):  # not listening yet, or still loading the model
            time.sleep(0.5)
    tail = "\n".join(log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])
    raise ServerFailed(f"the server {reason}:\n{tail}")


def stop_server(server: subprocess.Popen) -> None:
    """End the server and everything it started."""
    if server.poll() is not None:
        return
    os.killpg(server.pid, signal.SIGTERM)
    try:
        server.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@contextmanager
def running_server(repository: Path, model_dir: Path, log_path: Path) -> Iterator[str]:
    """The base URL of a server that ends with the block, also when this process is asked to end."""
    port = free_port()
    server = start_server(repository, model_dir, port, log_path)
    previous = signal.signal(signal.SIGTERM, _raise_exit)
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        stop_server(server)
        signal.signal(signal.SIGTERM, previous)


def _raise_exit(signal_number: int, frame: object) -> None:
    raise SystemExit(128 + signal_number)


def examples(run_dir: Path) -> tuple[dict[str, str], dict[str, str], int]:
    """A held-out problem, a gap in held-out text, and the tokens of what is missing there."""
    problem = read_rows(run_dir / "benchmarks" / "quickstart_problems.jsonl")[0]
    gap = read_rows(run_dir / "benchmarks" / "quickstart_infill.jsonl")[0]
    tokenizer = Tokenizer.from_file(str(run_dir / "tokenizer" / "tokenizer.json"))  # transformers' takes seconds
    return problem, gap, len(tokenizer.encode(gap["middle"], add_special_tokens=False).ids)


def demonstrate(repository: Path, run_dir: Path, show: Callable[[str], None]) -> None:
    """Show a chat and an infilling of the fine-tuned model, with their canvases, by the server and its terminal client.

    Raises:
        StageFailed: the server or the client ended with an error.
    """
    problem, gap, num_tokens = examples(run_dir)
    text = run_dir / "demo.txt"
    text.write_text(f"{gap['prefix']}<gap:{num_tokens}>{gap['suffix']}", encoding="utf-8")
    with running_server(repository, run_dir / "model", run_dir / "logs" / "demo.log") as base_url:
        client = [sys.executable, str(repository / "serving" / "fast-api" / "chat_cli.py"), "--base-url", base_url]
        client += ["--model", MODEL_NAME, "--canvas", "--show-meta", "--no-history"]
        for title, asked, more in (
            (f"chat: {problem['prompt'].rstrip()}", problem["prompt"], []),
            (f"infilling: {num_tokens} tokens are missing", None, ["--infill", str(text)]),
        ):
            show(f"\n{title}\n")
            ended = subprocess.run([*client, *more], input=asked, text=True, check=False)
            if ended.returncode:
                raise StageFailed(f"the chat client ended with exit status {ended.returncode}")
    show(f"\nto ask it yourself: bash quickstart.sh --serve --run_dir {shlex.quote(str(run_dir))}")
    show(f"such as: {QUESTION}\n")


def ask(base_url: str, run_dir: Path) -> list[dict[str, str | float]]:
    """One chat request and one infill request about held-out text.

    Returns:
        Two rows of kind, question, answer, expected and seconds.
    """
    client = OpenAI(base_url=base_url, api_key="none", timeout=120)
    problem, gap, num_tokens = examples(run_dir)
    started = time.monotonic()
    chat = client.chat.completions.create(model=MODEL_NAME, messages=[{"role": "user", "content": problem["prompt"]}])
    between = time.monotonic()
    infill = client.completions.create(
        model=MODEL_NAME, prompt=gap["prefix"], suffix=gap["suffix"], max_tokens=num_tokens
    )
    ended = time.monotonic()
    return [
        {
            "kind": "chat",
            "question": problem["prompt"],
            "answer": chat.choices[0].message.content or "",
            "expected": problem["canonical_solution"],
            "seconds": between - started,
        },
        {
            "kind": "infill",
            "question": f"{gap['prefix']}[{num_tokens} tokens missing]{gap['suffix']}",
            "answer": infill.choices[0].text,
            "expected": gap["middle"],
            "seconds": ended - between,
        },
    ]
