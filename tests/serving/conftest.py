"""A server without a model, whose answers are written in the test; and a tiny random model in a live server."""

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import uvicorn

from coda_serving.app import Service, build_app
from coda_serving.engine import Engine, RowStep
from coda_serving.metrics import Metrics
from coda_serving.scheduler import CanvasRequest, Scheduler
from coda_serving.settings import ServerSettings
from CoDALanguageModel.decoding_settings import DecodingSettings
from CoDALanguageModel.prompts import TextTooLong
from CoDALanguageModel.row import Change

REPO = Path(__file__).resolve().parents[2]
MASK, EOS, DOCUMENT_START = 256, 257, 258


def bytes_to_text(ids: Sequence[int], after: Sequence[int] = ()) -> str:
    """Decode the fake tokenizer's ids: bytes, and control tokens that have no text."""
    return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


class ByteEncoder:
    """A tokenizer whose ids are bytes."""

    def encode_text(self, text: str, *, joins: bool = False, max_tokens: int | None = None) -> list[int]:
        if max_tokens is not None and len(text) > max_tokens:
            raise TextTooLong(len(text), max_tokens)
        return list(text.encode())

    def encode_chat(
        self, messages: Sequence[dict[str, str]], *, continue_final_message: bool = False, max_tokens: int | None = None
    ) -> list[int]:
        text = "".join(f"[{m['role']}]{m['content']}" for m in messages)
        return self.encode_text(text, max_tokens=max_tokens)


@dataclass
class FakeSampler:
    """Writes the answer that `script` gives, one token per step in an order that the seed decides."""

    script: Callable[[CanvasRequest], bytes] = lambda request: b"hello"
    step_s: float = 0.0
    gate: threading.Event | None = None
    mask_token_id: int = MASK
    eos_token_ids: frozenset[int] = frozenset({EOS})
    context_length: int = 2000
    document_start_id: int | None = DOCUMENT_START
    attention: str = "full"
    block_size: int | None = None
    stop: tuple[str, ...] = ()
    batches: list[list[CanvasRequest]] = field(default_factory=list)
    """Requests that took their first step together."""
    sizes: list[int] = field(default_factory=list)
    """Rows of every step."""
    error: Exception | None = None
    score: Callable[[CanvasRequest], float] = lambda request: -1.0
    """Of a candidate."""

    @property
    def forwards(self) -> int:
        return len(self.sizes)

    def check(self, request: CanvasRequest) -> None:
        if request.num_positions > self.context_length:
            raise ValueError(f"does not fit in the context of {self.context_length} tokens")

    def start(self) -> "FakeRows":
        return FakeRows(self)


@dataclass(eq=False)
class FakeRow:
    """What is left to write, and to show, of one answer."""

    request: CanvasRequest
    target: list[int]
    canvas: list[int]
    order: list[int]
    forwards: int = 0
    num_shown: int = 0


class FakeRows:
    """The rows of a `FakeSampler`."""

    def __init__(self, sampler: FakeSampler) -> None:
        self.sampler = sampler
        self.rows: list[FakeRow] = []

    @property
    def forwards(self) -> int:
        return self.sampler.forwards

    def admit(self, request: CanvasRequest) -> FakeRow:
        target = list(self.sampler.script(request)[: request.max_tokens])
        target += [EOS] * (request.max_tokens - len(target))
        order = random.Random(request.seed).sample(range(len(target)), len(target))
        row = FakeRow(request, target, [MASK] * len(target), order)
        self.rows.append(row)
        return row

    def step(self) -> list[RowStep]:
        sampler = self.sampler
        if fresh := [row.request for row in self.rows if not row.forwards]:
            sampler.batches.append(fresh)
        if sampler.gate is not None:
            sampler.gate.wait(20)
        if sampler.error is not None:
            raise sampler.error
        time.sleep(sampler.step_s)
        sampler.sizes.append(len(self.rows))
        return [self.advance(row) for row in list(self.rows)]

    def advance(self, row: FakeRow) -> RowStep:
        place = row.order[row.forwards]
        row.canvas[place] = row.target[place]
        row.forwards += 1
        settled = row.canvas.index(MASK) if MASK in row.canvas else len(row.canvas)
        ids, row.num_shown = row.canvas[row.num_shown : settled], settled
        if settled == len(row.canvas):
            self.rows.remove(row)
        is_full = settled == len(row.canvas)
        score = self.sampler.score(row.request) if is_full and row.request.is_candidate else None
        changes = self.shown(row, place) if row.request.shows_canvas else ()
        return RowStep(
            row=row, ids=ids, is_full=is_full, forwards=row.forwards, error=None, score=score, changes=changes
        )

    def shown(self, row: FakeRow, place: int) -> list[Change]:
        """What was committed, and a guess that is right and one that is not."""
        start = len(row.request.prompt_ids)
        changes = [Change(start + place, row.target[place], 0.9, True)]
        for i, following in enumerate(row.order[row.forwards : row.forwards + 2]):
            token = row.target[following] if i else 63
            changes.append(Change(start + following, token, round(1 / (2 + row.forwards), 3), False))
        return sorted(changes)

    def drop(self, row: FakeRow) -> None:
        if row in self.rows:
            self.rows.remove(row)


def sampling_options(**changes) -> DecodingSettings:
    return DecodingSettings(**({"steps": 16} | changes))


def make_settings(**changes) -> ServerSettings:
    defaults = {"model_name": "test/tiny", "max_tokens": 32, "_env_file": None}
    return ServerSettings(**(defaults | changes))


def make_engine(sampler: FakeSampler, settings: ServerSettings, metrics: Metrics | None = None) -> Engine:
    scheduler = Scheduler(
        max_queue=settings.max_queue,
        max_batch_size=settings.max_batch_size,
        max_batch_tokens=settings.max_batch_tokens,
    )
    return Engine(
        sampler,
        bytes_to_text,
        scheduler,
        step_timeout_s=settings.step_timeout_s,
        metrics=metrics or Metrics(),
    )


def make_app(sampler: FakeSampler, **settings_changes):
    settings = make_settings(**settings_changes)
    metrics = Metrics()
    engine = make_engine(sampler, settings, metrics)
    return build_app(Service(settings=settings, engine=engine, encoder=ByteEncoder(), limits=sampler, metrics=metrics))


@contextlib.asynccontextmanager
async def open_client(app, **options):
    """An HTTP client of `app`, which is started and stopped around it."""
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=30, **options) as client:
            yield client


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    """No variable of the developer's shell is a setting of the tests."""
    for name in ServerSettings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.delenv("ENV_FILE", raising=False)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, chatml_tokenizer, write_model) -> Path:
    """A tiny random model, saved as a folder that loads by itself."""
    folder = tmp_path_factory.mktemp("models") / "tiny-coda"
    return write_model(folder, chatml_tokenizer, vocab_size=320, tie_word_embeddings=True, initializer_range=0.5)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def served(app, port: int | None = None) -> Iterator[str]:
    """`app` behind a real socket, from a thread; gives its address."""
    port = port or free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@dataclass
class LiveServer:
    """A server process started by the shell script."""

    process: subprocess.Popen
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_until_ready(self, timeout_s: float = 300.0) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended: {self.log.read_text()}")
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(self.url + "/health", timeout=5).status_code == 200:
                    return
            time.sleep(0.1)
        raise AssertionError(f"the server is not ready: {self.log.read_text()}")

    def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@contextlib.contextmanager
def start_server(folder: Path, cwd: Path, **variables: str) -> Iterator[LiveServer]:
    """Run start_server.sh from `cwd`; the process is ended at the end."""
    port = free_port()
    log = cwd / f"server-{port}.log"
    environment = {k: v for k, v in os.environ.items() if k.lower() not in ServerSettings.model_fields}
    environment |= {"MODEL_NAME": str(folder), "PORT": str(port), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["bash", str(REPO / "serving/fast-api/start_server.sh")],
            cwd=cwd,
            env=environment | variables,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    server = LiveServer(process, port, log)
    try:
        yield server
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="session")
def live_server(model_folder, tmp_path_factory) -> Iterator[LiveServer]:
    """One server for all tests that only ask it things."""
    with start_server(model_folder, tmp_path_factory.mktemp("server"), MAX_TOKENS="24", STEPS="24") as server:
        server.wait_until_ready()
        yield server


@pytest.fixture(scope="session")
def serving_fakes():
    """This module's makers of fakes, for tests that need more than a fixture."""
    return sys.modules[__name__]


@pytest.fixture(scope="session")
def serve():
    """Run a coroutine function with a client of an app around a fake sampler."""

    def run(test, sampler=None, *, headers=None, **settings_changes):
        async def inner():
            app = make_app(sampler or FakeSampler(), **settings_changes)
            async with open_client(app, headers=headers) as client:
                return await test(client)

        return asyncio.run(inner())

    return run
