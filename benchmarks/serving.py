"""The server measured under load: `python benchmarks/serving.py [--case NAME ...] [--against CHECKOUT] [--model FOLDER]`.

Contenders of a case get the same requests, in turn: this server, the same one without batching, the published logic
(one request at a time, the whole canvas computed anew in every step, nothing told before the end; what waiting adds to
its measured times is computed), and with `--against` a server of another checkout. Servers are processes of their own.
Results go to `benchmarks/RESULTS.md`, `serving.json` and `serving.png`; a case that is not run keeps what it has there.
`--tiny` runs every case in seconds on a tiny model, with servers in threads, and writes nothing.
"""

import argparse
import asyncio
import contextlib
import heapq
import json
import logging
import multiprocessing
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import torch
import uvicorn
from generation import write_results
from published_sampler import published_generate
from rich.console import Console
from rich.markdown import Markdown

from coda_eval.comparison import markdown_table
from coda_quickstart.problems import held_out_programs
from coda_serving.__main__ import Server, bind, load_app
from coda_serving.settings import ServerSettings
from CoDALanguageModel import CoDAConfig, CoDALanguageModel
from CoDALanguageModel.decoder import Decoding
from CoDALanguageModel.prompts import Codec
from CoDALanguageModel.row import Request

HERE = Path(__file__).resolve().parent
Body = dict[str, Any]
Work = list[list[Body]]
"""What each client asks for, one after the other."""


def random_model(folder: Path, **shape: int) -> None:
    """Save a model with random weights and a tokenizer of bytes, which never wants to end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_end|>", "<|mask|>"]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], eos_token=special[1], mask_token=special[2]
    )
    torch.manual_seed(0)
    model = CoDALanguageModel(
        CoDAConfig(
            **shape,
            num_token_ids=len(fast),
            max_position_embeddings=1024,
            initializer_range=0.1,
            tie_word_embeddings=True,
            mask_token_id=fast.mask_token_id,
            pad_token_id=fast.pad_token_id,
            bos_token_id=fast.pad_token_id,
            eos_token_id=fast.eos_token_id,
        )
    )
    model.save_pretrained(folder)
    fast.save_pretrained(folder)


TINY = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
LARGE = {"vocab_size": 16384, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12}
LARGE |= {"num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 64}
"""97 million parameters; the head is as wide as that of a small vocabulary, of which the tokenizer uses the bytes."""


class Seen(NamedTuple):
    """What a client saw of a request; times on the monotonic clock."""

    sent_s: float
    first_s: float
    """Of the first text that is not empty; the end where there is none."""
    end_s: float
    text: str = ""
    tokens: int = 0
    forwards: int = 0


class Process:
    """A server process of one checkout."""

    def __init__(self, checkout: Path, folder: Path, log: Path, variables: dict[str, str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        places = [checkout, checkout / "serving"]
        environment = os.environ | {"MODEL_NAME": str(folder), "PORT": str(port), "LOG_LEVEL": "warning"}
        environment |= variables | {"PYTHONPATH": os.pathsep.join(map(str, places))}
        self.url = f"http://127.0.0.1:{port}"
        self._log = log.open("wb")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "coda_serving"], cwd=checkout, env=environment, stdout=self._log, stderr=self._log
        )
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(self.url + "/health", timeout=10).status_code == 200:
                    return
            if self._process.poll() is not None:
                raise SystemExit(f"the server of {checkout} ended: {log.read_text()}")
            time.sleep(0.2)

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait(60)
        self._log.close()


class Thread:
    """A server of this checkout in a thread."""

    def __init__(self, folder: Path, variables: dict[str, str]) -> None:
        app = load_app(settings_of(folder, variables))
        listener = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._server = Server(uvicorn.Config(app, log_config=None, log_level="error"), app.state.engine, 0)
        self._thread = threading.Thread(target=self._server.run, args=([listener],))
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def close(self) -> None:
        """End the thread."""
        self._server.should_exit = True
        self._thread.join()


def settings_of(folder: Path, variables: dict[str, str]) -> ServerSettings:
    """Settings of a server in this process."""
    given = {name.lower(): value for name, value in variables.items()}
    return ServerSettings(model_name=str(folder), _env_file=None, **given)


async def ask(client: httpx.AsyncClient, body: Body) -> Seen:
    """Send a request for a stream and read it to its end."""
    sent_s, first_s, text, usage = time.monotonic(), None, "", {}
    asked = body | {"stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", "/v1/completions", json=asked) as response:
        if response.status_code != 200:
            raise SystemExit(f"{client.base_url}: {response.status_code} {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise SystemExit(f"{client.base_url}: {event}")
            usage = event.get("usage") or usage
            piece = "".join(choice["text"] for choice in event["choices"])
            if piece and first_s is None:
                first_s = time.monotonic()
            text += piece
    end_s = time.monotonic()
    return Seen(sent_s, first_s or end_s, end_s, text, usage["completion_tokens"], usage["forwards"])


@contextlib.asynccontextmanager
async def client_of(url: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client with as many connections as it needs."""
    async with httpx.AsyncClient(base_url=url, timeout=1200, limits=httpx.Limits(max_connections=None)) as client:
        yield client


async def closed_loop(url: str, work: Work) -> list[Seen]:
    """All that the clients of `work` see; each sends its next request when it has its answer."""

    async def one(client: httpx.AsyncClient, bodies: list[Body]) -> list[Seen]:
        return [await ask(client, body) for body in bodies]

    async with client_of(url) as client:
        return sum(await asyncio.gather(*(one(client, bodies) for bodies in work)), [])


async def open_loop(url: str, bodies: list[Body], arrivals_s: list[float]) -> list[Seen]:
    """All that is seen of requests that are sent at their times, whatever has been answered by then."""

    async def one(client: httpx.AsyncClient, body: Body, at_s: float) -> Seen:
        await asyncio.sleep(at_s)
        return await ask(client, body)

    async with client_of(url) as client:
        return await asyncio.gather(*(one(client, body, at) for body, at in zip(bodies, arrivals_s, strict=True)))


def one_at_a_time(work: list[list[float]]) -> list[Seen]:
    """What clients see of a server that takes requests one by one, given the seconds of each; a closed loop."""
    ready = [(0.0, client, 0) for client in range(len(work))]
    free_s, seen = 0.0, {}
    while ready:
        sent_s, client, number = heapq.heappop(ready)
        free_s = max(free_s, sent_s) + work[client][number]
        seen[client, number] = Seen(sent_s, free_s, free_s)
        if number + 1 < len(work[client]):
            heapq.heappush(ready, (free_s, client, number + 1))
    return [seen[key] for key in sorted(seen)]


def in_queue(seconds: list[float], arrivals_s: list[float]) -> list[Seen]:
    """The same of an open loop."""
    free_s, seen = 0.0, []
    for needs_s, sent_s in zip(seconds, arrivals_s, strict=True):
        free_s = max(free_s, sent_s) + needs_s
        seen.append(Seen(sent_s, free_s, free_s))
    return seen


@dataclass
class Bench:
    """A model, its requests and its servers, which start when they are needed."""

    options: argparse.Namespace
    scratch: Path
    folder: Path
    name: str
    lengths: Sequence[int]
    prompts: list[str]
    num_requests: int
    """Of each client."""
    servers: dict[str, Process | Thread] = field(default_factory=dict)

    def server(self, name: str) -> str:
        """The URL of a server."""
        if name not in self.servers:
            variables = {"MAX_QUEUE": "1000", "REQUEST_TIMEOUT_S": "3000", "STEPS": "128", "MAX_TOKENS": "128"}
            variables |= {"MAX_BATCH_SIZE": "1"} if name == "batch of 1" else {}
            if self.options.tiny:
                self.servers[name] = Thread(self.folder, variables)
            else:
                checkout = self.options.against if name == "against" else HERE.parent
                log = self.scratch / f"{self.name} {name}.log"
                self.servers[name] = Process(checkout.resolve(), self.folder, log, variables)
            self.closed(name, [bodies[:1] for bodies in self.work[:2]])  # warm it up
        return self.servers[name].url

    @property
    def contenders(self) -> list[str]:
        """Servers that are compared, this one first."""
        return ["this", "batch of 1", *(["against"] if self.options.against else [])]

    @cached_property
    def work(self) -> Work:
        """Fixed by the numbers alone, so that every server gets the same."""
        return [
            [self.body(random.Random(f"client {client}, request {number}")) for number in range(self.num_requests)]
            for client in range(self.options.clients)
        ]

    def body(self, rng: random.Random, **fields: Any) -> Body:
        """A request of some length, with some settings, perhaps for a gap."""
        length = rng.choice(self.lengths)
        body = {
            "prompt": rng.choice(self.prompts),
            "max_tokens": length,
            "steps": length // rng.choice([1, 2]),
            "block_length": length,
            "temperature": rng.choice([0, 0.2, 0.8]),
            "alg": rng.choice(["entropy", "topk_margin"]),
            "seed": rng.randrange(1 << 30),
        }
        return body | ({"suffix": "return x\n"} if rng.random() < 0.2 else {}) | fields

    def closed(self, name: str, work: Work) -> list[Seen]:
        """A closed loop of a server."""
        return asyncio.run(closed_loop(self.server(name), work))

    @cached_property
    def published_s(self) -> list[list[float]]:
        """Seconds of each request with the published logic, without any waiting."""
        model, codec = CoDALanguageModel.from_pretrained(self.folder).eval(), Codec.load(str(self.folder))

        def seconds(body: Body) -> float:
            # What stands behind a gap is as much to compute as what stands before it.
            text = body["prompt"] + body.get("suffix", "")
            ids = torch.tensor([codec.encode_text(text, max_tokens=None)])
            names = ("steps", "alg", "temperature")
            started = time.perf_counter()
            published_generate(model, ids, max_new_tokens=body["max_tokens"], **{name: body[name] for name in names})
            return time.perf_counter() - started

        seconds(self.work[0][0])
        return [[seconds(body) for body in bodies] for bodies in self.work]

    def close(self) -> None:
        """End the servers."""
        for server in self.servers.values():
            server.close()


def summary(seen: list[Seen]) -> dict[str, Any]:
    """Numbers of one run."""
    elapsed = max(one.end_s for one in seen) - min(one.sent_s for one in seen)
    latency = sorted(one.end_s - one.sent_s for one in seen)
    first = sorted(one.first_s - one.sent_s for one in seen)
    return {
        "requests_s": len(seen) / elapsed,
        **{f"p{share}": quantile(latency, share) for share in (50, 95, 99)},
        **{f"first_p{share}": quantile(first, share) for share in (50, 95)},
        "latencies": [round(value, 4) for value in latency],
    }


def quantile(ordered: list[float], share: float) -> float:
    """The value below or at which `share` percent are."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * share / 100))]


HEADER = ["contender", "requests/s", "ratio", "p50 s", "p95 s", "p99 s", "first text p50 s", "p95 s"]


def row_of(name: str, numbers: dict[str, Any], baseline: float) -> list[str]:
    """A line of a table."""
    times = [numbers[key] for key in ("p50", "p95", "p99", "first_p50", "first_p95")]
    requests = numbers["requests_s"]
    return [name, f"{requests:.3g}", f"{requests / baseline:.2f}x", *(f"{value:.3g}" for value in times)]


def comparison(runs: dict[str, list[list[Seen]]], notes: list[str]) -> dict[str, Any]:
    """Runs of contenders, the slowest first by name of the published logic; the median run of each by requests/s."""
    medians = {}
    for name, several in runs.items():
        each = sorted((summary(seen) for seen in several), key=lambda numbers: numbers["requests_s"])
        medians[name] = each[len(each) // 2]
    baseline = next(iter(medians.values()))["requests_s"]
    equal = {name: sum(a.text == b.text for a, b in zip(several[0], runs["this"][0], strict=True))
             for name, several in runs.items() if name not in ("this", "published")}  # fmt: skip
    total = len(runs["this"][0])
    notes = [*notes, *(f"answers equal to those of {name}: {count} of {total}" for name, count in equal.items())]
    return {
        "header": HEADER,
        "rows": [row_of(name, numbers, baseline) for name, numbers in medians.items()],
        "contenders": medians,
        "notes": notes,
    }


def case_closed(bench: Bench) -> dict[str, Any]:
    """Clients that each send their next request when they have their answer: mixed lengths, settings and gaps."""
    names = bench.contenders
    runs: dict[str, list[list[Seen]]] = {"published": [one_at_a_time(bench.published_s)]}
    for _ in range(bench.options.rounds):
        for name in names:
            runs.setdefault(name, []).append(bench.closed(name, bench.work))
    bench.capacity = len(sum(bench.work, [])) / statistics.median(
        max(one.end_s for one in seen) - min(one.sent_s for one in seen) for seen in runs["this"]
    )
    total = sum(map(len, bench.work))
    case = comparison(runs, [f"{len(bench.work)} clients, {total} requests; median of {bench.options.rounds} rounds"])
    return case | {"goal": ">= 3x requests/s of the published logic; >= 2x of the commit before the open loop"}


def case_open(bench: Bench) -> dict[str, Any]:
    """Requests that come by themselves (Poisson), at 70 % of what this server can do in a closed loop."""
    if not hasattr(bench, "capacity"):
        case_closed(bench)
    rng, now, rate = random.Random(0), 0.0, 0.7 * bench.capacity
    bodies, arrivals = sum(bench.work, []), []
    rng.shuffle(bodies)
    for _ in bodies:
        arrivals.append(now)
        now += rng.expovariate(rate)
    seconds = dict(zip(map(id, sum(bench.work, [])), sum(bench.published_s, []), strict=True))
    runs = {"published": [in_queue([seconds[id(body)] for body in bodies], arrivals)]}
    for name in bench.contenders:
        runs[name] = [asyncio.run(open_loop(bench.server(name), bodies, arrivals))]
    return comparison(runs, [f"{len(bodies)} requests, {rate:.3g} a second"]) | {
        "goal": "a bounded wait; requests/s are those that were sent, unless a contender cannot keep up"
    }


REGIMES = {
    "exact": {},
    "lossless (speculate=2)": {"speculate": 2},
    "cached (dual)": {"kv_cache": "dual"},
    "parallel (threshold=0.9)": {"threshold": 0.9},
    "cached+parallel": {"kv_cache": "dual", "threshold": 0.9},
}


def case_regimes(bench: Bench) -> dict[str, Any]:
    """The closed loop by regime, in blocks of 16, a step for each token; this server."""
    rows, contenders = [], {}
    for name, fields in REGIMES.items():
        work = [
            [body | {"steps": body["max_tokens"], "block_length": 16} | fields for body in own[:1]]
            for own in bench.work
        ]
        seen = bench.closed("this", work)
        contenders[name] = numbers = summary(seen)
        per_forward = sum(one.tokens for one in seen) / sum(one.forwards for one in seen)
        baseline = contenders["exact"]["requests_s"]
        rows.append([*row_of(name, numbers, baseline), f"{per_forward:.2f}"])
    header = ["regime", *HEADER[1:], "tokens per forward pass"]
    return {"header": header, "rows": rows, "contenders": contenders, "notes": [], "goal": ""}


def offline(bench: Bench, model: CoDALanguageModel, codec: Codec) -> Callable[[], list[str]]:
    """The open loop of the model room by itself: all requests, as many together as in the server."""

    def run() -> list[str]:
        decoding, texts, rows = Decoding(model), {}, {}
        waiting = list(enumerate(sum(bench.work, [])))
        while waiting or rows:
            while waiting and len(rows) < 16:
                number, body = waiting.pop(0)
                ids = codec.encode_text(body["prompt"], max_tokens=None)
                names = ("steps", "block_length", "temperature", "alg")
                asked = {name: body[name] for name in names} | {"alg_temp": 0.1, "top_p": None, "top_k": None}
                gap = codec.encode_text(body["suffix"], joins=True, max_tokens=None) if "suffix" in body else []
                length = body["max_tokens"]
                canvas = [*ids, *[model.config.mask_token_id] * length, *gap] if gap else ids
                settings = model.generation_config.merged(asked | {"max_new_tokens": 0 if gap else length})
                row = decoding.admit(Request(ids=canvas, settings=settings, seed=body["seed"]))
                rows[row] = number, len(ids), len(ids) + length
            for step in decoding.step():
                number, start, end = rows[step.row]
                final = step.row.ids[start : max(start, min(step.settled, end))]
                ends = [place for place, one in enumerate(final) if one == model.config.eos_token_id]
                if ends or step.finished is not None:
                    texts[number] = codec.decode(final[: ends[0]] if ends else final, ())
                    decoding.drop(step.row)
                    del rows[step.row]
        return [texts[number] for number in sorted(texts)]

    return run


def case_offline(bench: Bench) -> dict[str, Any]:
    """What serving costs: the same requests through the model room alone, the app without sockets, and the server."""
    model, codec = CoDALanguageModel.from_pretrained(bench.folder).eval(), Codec.load(str(bench.folder))
    variables = {"MAX_QUEUE": "1000", "ALG_TEMP": "0.1", "TOP_P": "none", "TOP_K": "none"}
    app = load_app(settings_of(bench.folder, variables))

    async def in_process() -> list[str]:
        transport = httpx.ASGITransport(app=app)

        async def one(client: httpx.AsyncClient, bodies: list[Body]) -> list[str]:
            answers = [await client.post("/v1/completions", json=body) for body in bodies]
            return [answer.raise_for_status().json()["choices"][0]["text"] for answer in answers]

        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://test", timeout=1200) as client,
        ):
            return sum(await asyncio.gather(*(one(client, bodies) for bodies in bench.work)), [])

    fields = {"alg_temp": 0.1, "top_p": "none", "top_k": "none"}
    work = [[body | fields for body in own] for own in bench.work]
    contenders = {
        "open loop offline": torch.inference_mode()(offline(bench, model, codec)),
        "served, without sockets": lambda: asyncio.run(in_process()),
        "served": lambda: [one.text for one in bench.closed("this", work)],
    }
    bench.server("this")
    times: dict[str, list[float]] = {name: [] for name in contenders}
    answers = {}
    for _ in range(bench.options.rounds):
        for name, run in contenders.items():
            started = time.perf_counter()
            answers[name] = run()
            times[name].append(time.perf_counter() - started)
            if name == "served, without sockets":
                app = load_app(settings_of(bench.folder, variables))  # an engine starts once
    medians = {name: statistics.median(values) for name, values in times.items()}
    total = sum(map(len, bench.work))
    first = next(iter(medians))
    equal = {name: sum(map(str.__eq__, answers[name], answers[first])) for name in contenders if name != first}
    return {
        "header": ["contender", "requests/s", "of offline"],
        "rows": [
            [name, f"{total / seconds:.3g}", f"{100 * medians[first] / seconds:.0f} %"]
            for name, seconds in medians.items()
        ],
        "notes": [f"answers of {name} equal to offline: {count} of {total}" for name, count in equal.items()],
        "goal": "served >= 85 % of the offline open loop",
    }


def load_for(url: str, work: Work, seconds: float) -> None:
    """Keep a server busy, in a process of its own."""
    ends_s = time.monotonic() + seconds

    async def one(client: httpx.AsyncClient, bodies: list[Body]) -> None:
        while time.monotonic() < ends_s:
            for body in bodies:
                await ask(client, body)

    async def run() -> None:
        async with client_of(url) as client:
            await asyncio.gather(*(one(client, bodies) for bodies in work))

    asyncio.run(run())


def case_health(bench: Bench) -> dict[str, Any]:
    """`/health` while all clients ask: a probe every 20 ms."""
    url, seconds = bench.server("this"), 0.3 if bench.options.tiny else 15
    kind = threading.Thread if bench.options.tiny else multiprocessing.get_context("spawn").Process
    load = kind(target=load_for, args=(url, [own[:1] for own in bench.work], seconds))
    times, running = [], []
    with httpx.Client(base_url=url, timeout=60) as client:
        client.get("/health")
        load.start()
        while load.is_alive():
            started = time.perf_counter()
            state = client.get("/health").json()
            elapsed = time.perf_counter() - started
            if state["running"]:
                times.append(elapsed)
                running.append(state["running"])
            time.sleep(0.02)
    load.join()
    times.sort()
    numbers = [quantile(times, 50), quantile(times, 99), times[-1]]
    return {
        "header": ["probes", "answers running", "p50 ms", "p99 ms", "longest ms"],
        "rows": [[len(times), f"{statistics.mean(running):.1f}", *(f"{1000 * value:.1f}" for value in numbers)]],
        "notes": [],
        "goal": "p99 <= 50 ms on a quiet machine",
    }


def case_late(bench: Bench) -> dict[str, Any]:
    """A short request that comes when a long one has done 15 %, against both at once."""
    length = 16 if bench.options.tiny else 200
    common = {"prompt": bench.prompts[0], "temperature": 0, "block_length": 1, "suffix": "\n"}
    long = common | {"max_tokens": length, "steps": length}
    short = common | {"max_tokens": 8, "steps": 8, "prompt": bench.prompts[-1]}

    async def pair(url: str, after_s: float) -> tuple[Seen, Seen]:
        async with client_of(url) as client:
            running = asyncio.create_task(ask(client, long))
            await asyncio.sleep(after_s)
            return await ask(client, short), await running

    rows, contenders = [], [name for name in bench.contenders if name != "batch of 1"]
    for name in contenders:
        url, measured = bench.server(name), []
        for _ in range(bench.options.rounds):
            fresh, alone = asyncio.run(pair(url, 0.0))
            step_s = (alone.end_s - alone.sent_s) / alone.forwards
            late, _ = asyncio.run(pair(url, 0.15 * (alone.end_s - alone.sent_s)))
            took = [one.end_s - one.sent_s for one in (fresh, late)]
            measured.append((*took, took[1] / took[0], late.first_s - late.sent_s, step_s))
        medians = [statistics.median(column) for column in zip(*measured, strict=True)]
        rows.append([name, *(f"{value:.3g}" for value in medians)])
    return {
        "header": ["contender", "in a fresh pair s", "late s", "ratio", "first text of the late one s", "a step s"],
        "rows": rows,
        "notes": [f"{length} and 8 tokens, a step for each; median of {bench.options.rounds} rounds"],
        "goal": "ratio <= 1.3; the first text within the step that runs and the first one of its own",
    }


CASES: dict[str, tuple[Callable[[Bench], dict[str, Any]], str]] = {
    "closed": (case_closed, "quickstart"),
    "open": (case_open, "quickstart"),
    "regimes": (case_regimes, "quickstart"),
    "offline": (case_offline, "quickstart"),
    "health": (case_health, "quickstart"),
    "late": (case_late, "quickstart"),
    "large_closed": (case_closed, "large"),
    "large_open": (case_open, "large"),
}
"""Of each case its function and its model."""


@contextlib.contextmanager
def benches(options: argparse.Namespace) -> Iterator[Callable[[str], Bench]]:
    """Give a function that makes the bench of a model, once."""
    made: dict[str, Bench] = {}
    with tempfile.TemporaryDirectory() as scratch:

        def bench(name: str) -> Bench:
            if name not in made:
                folder = options.model if name == "quickstart" and not options.tiny else Path(scratch, name)
                shape = TINY if options.tiny else LARGE
                if folder != options.model:
                    random_model(folder, **shape)
                programs = [program.prompt for program in held_out_programs(40, 0)]
                kind = partial(Bench, options, Path(scratch), folder.resolve(), name)
                if options.tiny:
                    made[name] = kind(lengths=(4, 8), prompts=["ab", "abc "], num_requests=1)
                elif name == "quickstart":
                    made[name] = kind(lengths=(16, 32, 64, 96), prompts=programs, num_requests=options.requests)
                else:
                    made[name] = kind(lengths=(8, 16, 24), prompts=[text[:24] for text in programs], num_requests=1)
            return made[name]

        try:
            yield bench
        finally:
            for one in made.values():
                one.close()


def draw(numbers: dict[str, Any], path: Path) -> None:
    """Requests per second, and which share of the requests was answered by when."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    drawn = {name: case["contenders"] for name, case in numbers.items() if "contenders" in case}
    figure, axes = plt.subplots(2, max(1, len(drawn)), figsize=(4 * max(1, len(drawn)), 6.5), layout="constrained",
                                squeeze=False)  # fmt: skip
    for (above, below), (name, contenders) in zip(axes.T, drawn.items(), strict=False):
        labels = list(contenders)[::-1]
        bars = above.barh(labels, [contenders[label]["requests_s"] for label in labels], color="#4477aa")
        above.bar_label(bars, fmt=" %.3g")
        above.margins(x=0.2)
        above.set(title=name, xlabel="requests/s")
        for contender, found in contenders.items():
            latencies = found["latencies"]
            shares = [100 * (place + 1) / len(latencies) for place in range(len(latencies))]
            below.step(latencies, shares, where="post", label=contender)
        below.set(xscale="log", xlabel="seconds", ylabel="% answered", ylim=(0, 101))
        below.grid(alpha=0.3)
        below.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def section(name: str, case: dict[str, Any]) -> str:
    """Markdown of one case."""
    notes = [*case["notes"], f"goal: {case['goal']}" if case["goal"] else "", case["where"]]
    listed = "\n".join(f"- {note}" for note in notes if note)
    return f"### {name}\n\n{case['title']}\n\n{markdown_table(case['header'], case['rows'])}\n{listed}\n"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the cases and write the results; returns them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", nargs="*", choices=list(CASES), default=list(CASES))
    run = HERE.parent / "runs" / "quickstart" / "model"
    parser.add_argument("--model", type=Path, default=run, help="folder of the quickstart's model")
    parser.add_argument("--against", type=Path, help="another checkout, whose server is measured too")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=2, help="of each client, with the quickstart's model")
    parser.add_argument("--rounds", type=int, default=2, help="of closed loops")
    parser.add_argument("--note", default="", help="what else is to be said of the machine")
    parser.add_argument("--tiny", action="store_true", help="only show that it runs")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.clients, options.rounds, options.against = 3, 1, None
    elif any(CASES[name][1] == "quickstart" for name in options.case) and not options.model.is_dir():
        parser.error(f"--model must be a folder, got {options.model}: quickstart.sh makes it")
    logging.disable(logging.WARNING)
    where = ", ".join(
        filter(None, [f"CPU {platform.machine()}", f"{os.cpu_count()} cores", f"torch {torch.__version__}",
                      f"against {options.against.resolve().name}" if options.against else "", options.note])
    )  # fmt: skip
    stored = HERE / "serving.json"
    numbers = json.loads(stored.read_text()) if stored.is_file() and not options.tiny else {}
    with benches(options) as bench:
        for name in options.case:
            function, model = CASES[name]
            started = time.monotonic()
            case = function(bench(model))
            title = f"{function.__doc__.splitlines()[0]} Model: {model}."
            numbers[name] = {"title": title, **case, "where": where}
            Console().print(Markdown(section(name, numbers[name])), f"{time.monotonic() - started:.0f} s")
            if not options.tiny:
                stored.write_text(json.dumps(numbers, indent=1) + "\n")
    numbers = {name: numbers[name] for name in CASES if name in numbers}
    if options.tiny:
        with tempfile.TemporaryDirectory() as folder:
            draw(numbers, Path(folder, "serving.png"))
    else:
        draw(numbers, HERE / "serving.png")
        parts = ["## Serving\n\n`python benchmarks/serving.py`\n\n![requests and latencies](serving.png)\n"]
        write_results("serving", "\n".join(parts + [section(name, case) for name, case in numbers.items()]))
    return numbers


if __name__ == "__main__":
    main()
