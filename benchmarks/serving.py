"""The server under load: `python benchmarks/serving.py [--case NAME ...] [--against CHECKOUT] [--model FOLDER]`.

Contenders of a case get the same requests, in turn: this server, the same one without batching, the published logic
(one request at a time, the whole canvas computed anew in every step, nothing told before the end: each request is
timed, and its waiting is added up), and with `--against` the server of another checkout. Results go to
`benchmarks/RESULTS.md`, `serving.json` and `serving.png` after each case; one that is not run keeps what it has there.
`--tiny` runs on tiny models in seconds, with servers in threads, and writes nothing.
"""

import argparse
import asyncio
import contextlib
import heapq
import itertools
import json
import logging
import math
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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import torch
import uvicorn
from generation import random_model, write_results
from gpu.report import said_by
from published_sampler import published_generate
from rich.console import Console
from rich.markdown import Markdown

from coda_eval.comparison import markdown_table
from coda_quickstart.problems import held_out_programs
from coda_quickstart.tokenizer import train_tokenizer
from coda_serving.__main__ import Server, bind, load_app
from coda_serving.settings import ServerSettings
from CoDALanguageModel import CoDALanguageModel
from CoDALanguageModel.cost import tokens_per_forward
from CoDALanguageModel.decoder import Decoding
from CoDALanguageModel.prompts import Codec
from CoDALanguageModel.row import Request

HERE = Path(__file__).resolve().parent
STORED = HERE / "serving.json"
"""Numbers of the cases that were run last."""

Body = dict[str, Any]
Work = list[list[Body]]
"""What each client asks for, one after the other."""


class Seen(NamedTuple):
    """What a client saw of a request; times on the monotonic clock."""

    sent_s: float
    first_s: float
    """Of the first text that is not empty; the end where there is none."""
    end_s: float
    text: str = ""
    tokens: int = 0
    forwards: int = 1


class Refused(Exception):
    """A server does not answer a request, or does not start."""


async def ask(client: httpx.AsyncClient, body: Body) -> Seen:
    """Send a request for a stream and read it to its end.

    Raises:
        Refused: it is not answered, or not to its end.
    """
    sent_s, first_s, text, usage = time.monotonic(), None, "", {}
    asked = body | {"stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", "/v1/completions", json=asked) as response:
        if response.status_code != 200:
            raise Refused(f"it answers {response.status_code} {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise Refused(f"it answers {line}")
            usage = event.get("usage") or usage
            piece = "".join(choice["text"] for choice in event["choices"])
            if piece and first_s is None:
                first_s = time.monotonic()
            text += piece
    end_s = time.monotonic()
    return Seen(sent_s, first_s or end_s, end_s, text, usage["completion_tokens"], usage["forwards"])


def drive(url: str, work: Work, starts_s: Sequence[float] | None = None, app: Any = None) -> list[Seen]:
    """What clients see that begin at their times; each sends its next request when it has its answer.

    Args:
        url: of the server.
        work: of each client.
        starts_s: of each client, in seconds from now; all at once without.
        app: is asked in this process, without sockets.
    """

    async def one(client: httpx.AsyncClient, bodies: list[Body], start_s: float) -> list[Seen]:
        await asyncio.sleep(start_s)
        return [await ask(client, body) for body in bodies]

    async def run() -> list[Seen]:
        transport = httpx.ASGITransport(app) if app else httpx.AsyncHTTPTransport(limits=httpx.Limits())
        async with httpx.AsyncClient(transport=transport, base_url=url, timeout=1200) as client:
            async with app.router.lifespan_context(app) if app else contextlib.nullcontext():
                clients = zip(work, starts_s or [0.0] * len(work), strict=True)
                return sum(await asyncio.gather(*(one(client, *own) for own in clients)), [])

    return asyncio.run(run())


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function gives in a thread of its own, whose threads of OpenMP end with it.

    As long as others are there, those of a server in this process sleep between any two operations.
    """
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(function, *arguments).result()


def one_at_a_time(work_s: list[list[float]], starts_s: Sequence[float] | None = None) -> list[Seen]:
    """What the same clients see of a server that takes requests one by one, given the seconds of each."""
    ready = [(start_s, client, 0) for client, start_s in enumerate(starts_s or [0.0] * len(work_s))]
    heapq.heapify(ready)
    free_s, seen = 0.0, {}
    while ready:
        sent_s, client, number = heapq.heappop(ready)
        free_s = max(free_s, sent_s) + work_s[client][number]
        seen[client, number] = Seen(sent_s, free_s, free_s)
        if number + 1 < len(work_s[client]):
            heapq.heappush(ready, (free_s, client, number + 1))
    return [seen[key] for key in sorted(seen)]


@contextlib.contextmanager
def process(checkout: Path, folder: Path, variables: dict[str, str]) -> Iterator[str]:
    """Run a checkout's server in a process of its own; gives its URL.

    Raises:
        Refused: it ends at once.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    environment = os.environ | {"MODEL_NAME": str(folder), "PORT": str(port), "LOG_LEVEL": "warning"} | variables
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, [checkout, checkout / "serving"]))}
    server = subprocess.Popen([sys.executable, "-m", "coda_serving"], cwd=checkout, env=environment)
    try:
        while server.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(url + "/health", timeout=10).status_code == 200:
                    break
            time.sleep(0.2)
        else:
            raise Refused(f"the server of {checkout.name} ended at its start, with status {server.returncode}")
        yield url
    finally:
        server.terminate()
        server.wait(60)


@contextlib.contextmanager
def thread(folder: Path, variables: dict[str, str]) -> Iterator[str]:
    """Run this checkout's server in a thread; gives its URL."""
    app, listener = load_app(settings_of(folder, variables)), bind("127.0.0.1", 0)
    server = Server(uvicorn.Config(app, log_config=None, log_level="error"), app.state.engine, 5)
    runs = threading.Thread(target=server.run, args=([listener],))
    runs.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        runs.join()


def settings_of(folder: Path, variables: dict[str, str]) -> ServerSettings:
    """Settings of a server in this process."""
    given = {name.lower(): value for name, value in variables.items()}
    return ServerSettings(model_name=str(folder), _env_file=None, **given)


class Bench:
    """A model, its requests and its servers, which start when they are needed.

    Args:
        options: of the command line.
        name: `quickstart`, or a shape of random weights.
        stack: ends the servers and removes the files.
    """

    variables = {"MAX_QUEUE": "1000", "REQUEST_TIMEOUT_S": "3000", "STEPS": "64", "MAX_TOKENS": "64"}

    def __init__(self, options: argparse.Namespace, name: str, stack: contextlib.ExitStack) -> None:
        self.options, self._stack = options, stack
        self.rounds: int = options.rounds
        self.left_out: list[str] = []
        """Notes of contenders that are not compared."""
        self._servers: dict[str, str] = {}
        programs = held_out_programs(40, 0)
        self.prompts = [program.prompt for program in programs]
        num, self.lengths = options.requests, (16, 32, 64, 96)
        if options.tiny:
            num, self.lengths, self.prompts = 1, (4, 8), ["ab", "abc "]
        elif name == "large":
            num, self.lengths, self.rounds = 1, (8, 12, 16), 1  # each round takes minutes
        self.folder: Path = options.model.resolve()
        if options.tiny or name in SHAPES:
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            tokenizer = train_tokenizer([program.body for program in programs], 512, self.folder, max_length=512)
            ids = {key: getattr(tokenizer, key) for key in ("mask_token_id", "pad_token_id", "eos_token_id")}
            hidden, intermediate, layers, heads, vocabulary = SHAPES["tiny" if options.tiny else name]
            model = random_model(
                hidden_size=hidden,
                intermediate_size=intermediate,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=heads,
                head_dim=hidden // heads,
                vocab_size=vocabulary,
                num_token_ids=len(tokenizer),
                max_position_embeddings=512,
                **ids,
            )
            model.save_pretrained(self.folder)
            # Older checkouts refuse names of settings that they do not know; all but the ids are at their defaults.
            settings = self.folder / "generation_config.json"
            known = json.loads(settings.read_text()).items()
            settings.write_text(json.dumps({name: value for name, value in known if name.endswith("_token_id")}))
        self.work: Work = [
            [self._body(random.Random(f"client {client}, request {number}")) for number in range(num)]
            for client in range(options.clients)
        ]

    def _body(self, rng: random.Random) -> Body:
        """A request of some length, with some settings, perhaps for a gap."""
        length = rng.choice(self.lengths)
        body = {
            "prompt": rng.choice(self.prompts),
            "max_tokens": length,
            "steps": length // rng.choice([1, 2]),
            "block_length": length,
            "temperature": rng.choice([0, 0.2, 0.8]),
            "top_p": 0.9,
            "alg": rng.choice(["entropy", "topk_margin"]),
            "alg_temp": 0,
            "seed": rng.randrange(1 << 30),
        }
        return body | ({"suffix": "return x\n"} if rng.random() < 0.2 else {})

    def server(self, name: str) -> str:
        """The URL of a server."""
        if name not in self._servers:
            variables = self.variables | ({"MAX_BATCH_SIZE": "1"} if name == "batch of 1" else {})
            checkout = self.options.against.resolve() if name == "against" else HERE.parent
            runs = thread(self.folder, variables) if self.options.tiny else process(checkout, self.folder, variables)
            self._servers[name] = self._stack.enter_context(runs)
            self.closed(name, [bodies[:1] for bodies in self.work[:2]])  # warms it up
        return self._servers[name]

    @cached_property
    def contenders(self) -> list[str]:
        """Servers that are compared; another checkout's only if it serves this model."""
        own = ["this", "batch of 1"]
        if not self.options.against:
            return own
        try:
            self.server("against")
        except Refused as error:
            self.left_out = [left_out(error)]
            return own
        return [*own, "against"]

    def closed(self, name: str, work: Work | None = None) -> list[Seen]:
        """A closed loop of a server: of its work, unless other is given."""
        return drive(self.server(name), work or self.work)

    @cached_property
    def capacity(self) -> float:
        """Requests a second of this server in a closed loop."""
        return summary(self.closed("this"))["requests_s"]

    @cached_property
    def published_s(self) -> list[list[float]]:
        """Seconds of each request with the published logic."""
        model, codec = CoDALanguageModel.from_pretrained(self.folder).eval(), Codec.load(str(self.folder))

        def seconds(body: Body) -> float:
            # What stands behind a gap is as much to compute as what stands before it.
            ids = torch.tensor([codec.encode_text(body["prompt"] + body.get("suffix", ""))])
            given = {name: body[name] for name in ("steps", "alg", "temperature", "top_p")}
            started = time.perf_counter()
            published_generate(model, ids, max_new_tokens=body["max_tokens"], **given)
            return time.perf_counter() - started

        def all_of_them() -> list[list[float]]:
            seconds(self.work[0][0])
            return [[seconds(body) for body in bodies] for bodies in self.work]

        return apart(all_of_them)


def left_out(error: Refused) -> str:
    """Note of the other checkout's server that cannot be compared."""
    return f"against is left out: {error}"


SHAPES = {
    # hidden, intermediate, layers, heads, vocabulary
    "tiny": (32, 64, 2, 2, 512),
    "small": (192, 512, 4, 3, 4096),  # that of the quickstart's model
    "large": (768, 2048, 12, 12, 16384),  # 110 million parameters
}
"""Of models with random weights, whose texts do not end by themselves."""


def quantile(values: Sequence[float], share: float) -> float:
    """The least value that at least `share` percent of the values do not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * share / 100) - 1)]


def summary(seen: list[Seen]) -> dict[str, Any]:
    """Numbers of one run."""
    latency = [one.end_s - one.sent_s for one in seen]
    first = [one.first_s - one.sent_s for one in seen]
    return {
        "requests_s": len(seen) / (max(one.end_s for one in seen) - min(one.sent_s for one in seen)),
        **{f"p{share}": quantile(latency, share) for share in (50, 95, 99)},
        **{f"first text p{share}": quantile(first, share) for share in (50, 95)},
        "latencies": sorted(round(value, 4) for value in latency),
    }


def comparison(runs: dict[str, list[list[Seen]]]) -> dict[str, Any]:
    """What is reported of the runs of each contender, the first of which is the reference: the median run."""
    medians = {
        name: sorted(map(summary, several), key=lambda one: one["requests_s"])[(len(several) - 1) // 2]
        for name, several in runs.items()
    }
    reference = next(iter(medians.values()))
    keys = [key for key in reference if key not in ("requests_s", "latencies")]
    header = ["contender", "requests/s", "ratio", *(f"{key} s" for key in keys)]
    rows = [
        [name, f"{one['requests_s']:.3g}", f"{one['requests_s'] / reference['requests_s']:.2f}x"]
        + [f"{one[key]:.3g}" for key in keys]
        for name, one in medians.items()
    ]
    return {"header": header, "rows": rows, "contenders": medians}


def equal_answers(runs: dict[str, list[list[Seen]]]) -> list[str]:
    """How many answers of each contender are those of this server."""
    texts = {name: [one.text for one in several[0]] for name, several in runs.items() if name != "published"}
    own = texts.pop("this")
    return [
        f"answers of {name} equal to those of this: {sum(map(str.__eq__, found, own))} of {len(own)}"
        for name, found in texts.items()
    ]


def case_closed(bench: Bench) -> dict[str, Any]:
    """Clients that each send their next request when they have their answer: mixed lengths, settings and gaps."""
    runs = {"published": [one_at_a_time(bench.published_s)]} | {name: [] for name in bench.contenders}
    for _ in range(bench.rounds):
        for name in bench.contenders:
            runs[name].append(bench.closed(name))
    case = comparison(runs)
    bench.capacity = case["contenders"]["this"]["requests_s"]
    clients = f"{len(bench.work)} clients, {sum(map(len, bench.work))} requests; median of {bench.rounds} rounds"
    asked, came = (sum(body["max_tokens"] for body in sum(bench.work, [])), sum(one.tokens for one in runs["this"][0]))
    clients += f"; {asked} tokens asked for, {came} came before the texts ended"
    goal = "goal: >= 3x requests/s of the published logic, >= 2x of the commit before the open loop"
    return case | {"notes": [clients, *equal_answers(runs), *bench.left_out, goal]}


def case_open(bench: Bench) -> dict[str, Any]:
    """Requests that come by themselves (Poisson), at 70 % of what this server can do in a closed loop."""
    rng, rate = random.Random(0), 0.7 * bench.capacity
    order = [(client, number) for client, own in enumerate(bench.work) for number in range(len(own))]
    rng.shuffle(order)
    starts_s = list(itertools.accumulate(rng.expovariate(rate) for _ in order))
    runs = {"published": [one_at_a_time([[bench.published_s[client][number]] for client, number in order], starts_s)]}
    for name in bench.contenders:
        runs[name] = [drive(bench.server(name), [[bench.work[client][number]] for client, number in order], starts_s)]
    sent = f"{len(order)} requests, {rate:.3g} a second are sent: who answers fewer is overrun"
    return comparison(runs) | {"notes": [sent, *equal_answers(runs), *bench.left_out]}


REGIMES = {
    "exact": {},
    "lossless (speculate=2)": {"speculate": 2},
    "cached (kv_cache=dual)": {"kv_cache": "dual"},
    "parallel (threshold=0.9)": {"threshold": 0.9},
    "cached+parallel": {"kv_cache": "dual", "threshold": 0.9},
}


def case_regimes(bench: Bench) -> dict[str, Any]:
    """The closed loop of this server by regime, in blocks of 8, a step for each token."""
    runs = {}
    for name, fields in REGIMES.items():
        asked = {"block_length": 8} | fields
        runs[name] = [
            bench.closed("this", [[body | asked | {"steps": body["max_tokens"]} for body in own] for own in bench.work])
        ]
    case = comparison(runs)
    case["header"].append("tokens per forward pass")
    for row, (seen,) in zip(case["rows"], runs.values(), strict=True):
        per_forward = tokens_per_forward(sum(one.tokens for one in seen), sum(one.forwards for one in seen))
        row.append(f"{per_forward:.2f}")
    return case | {"notes": []}


@torch.inference_mode()
def offline(bench: Bench, model: CoDALanguageModel, codec: Codec) -> list[Seen]:
    """The open loop of the model room by itself: as many rows together as in the server."""
    decoding, seen, rows, begun_s = Decoding(model), {}, {}, time.monotonic()
    waiting = list(enumerate(sum(bench.work, [])))[::-1]
    while waiting or rows:
        while waiting and len(rows) < 16:
            number, body = waiting.pop()
            ids, length = codec.encode_text(body["prompt"]), body["max_tokens"]
            gap = codec.encode_text(body["suffix"], joins=True) if "suffix" in body else []
            asked = {name: body[name] for name in ("steps", "block_length", "temperature", "top_p", "alg", "alg_temp")}
            settings = model.generation_config.merged(asked | {"max_new_tokens": 0 if gap else length})
            canvas = [*ids, *[model.config.mask_token_id] * length, *gap] if gap else ids
            row = decoding.admit(Request(ids=canvas, settings=settings, seed=body["seed"]))
            rows[row] = number, len(ids), len(ids) + length
        for row, settled, _, finished, _ in decoding.step():
            number, start, end = rows[row]
            final = row.ids[start : min(settled, end)]
            if finished is None and model.config.eos_token_id not in final:
                continue
            ids = list(itertools.takewhile(lambda one: one != model.config.eos_token_id, final))
            now_s = time.monotonic()
            seen[number] = Seen(begun_s, now_s, now_s, codec.decode(ids))
            decoding.drop(row)
            del rows[row]
    return [seen[number] for number in sorted(seen)]


def case_offline(bench: Bench) -> dict[str, Any]:
    """What serving costs: the same requests through the model room alone, the app without sockets, and the server."""
    model, codec = CoDALanguageModel.from_pretrained(bench.folder).eval(), Codec.load(str(bench.folder))
    runs: dict[str, list[list[Seen]]] = {"offline": [], "this, without sockets": [], "this": []}
    bench.server("this")
    for _ in range(bench.rounds):
        runs["offline"].append(apart(offline, bench, model, codec))
        app = load_app(settings_of(bench.folder, bench.variables))  # an engine starts once
        runs["this, without sockets"].append(drive("http://in-process", bench.work, app=app))
        runs["this"].append(bench.closed("this"))
    notes = [f"median of {bench.rounds} rounds", *equal_answers(runs), "goal: served >= 0.85x of the offline open loop"]
    return comparison(runs) | {"notes": notes}


def case_health(bench: Bench) -> dict[str, Any]:
    """`/health` while all clients ask, from another process: a probe every 20 ms."""
    url = bench.server("this")
    repeats = 20 if bench.options.tiny else math.ceil(15 * bench.capacity / sum(map(len, bench.work)))
    work = [own * repeats for own in bench.work]
    kind = threading.Thread if bench.options.tiny else multiprocessing.get_context("spawn").Process
    load, times_s, running = kind(target=drive, args=(url, work)), [], []
    with httpx.Client(base_url=url, timeout=60) as client:
        client.get("/health")
        load.start()
        while load.is_alive():
            started = time.perf_counter()
            state = client.get("/health").json()
            if state["running"]:
                times_s.append(time.perf_counter() - started)
                running.append(state["running"])
            time.sleep(0.02)
        load.join()
    return {
        "header": ["probes", "answers running", "p50 ms", "p99 ms", "longest ms"],
        "rows": [
            [len(times_s), f"{statistics.mean(running):.1f}"]
            + [f"{1000 * quantile(times_s, share):.1f}" for share in (50, 99, 100)]
        ],
        "notes": ["goal: p99 <= 50 ms on a quiet machine"],
    }


def case_late(bench: Bench) -> dict[str, Any]:
    """A short request that comes when a long one has done 15 %, against both at once."""
    length, repeats = (16, 1) if bench.options.tiny else (100, 5)
    # From left to right, so that every step shows a text; a gap, so that no end of the text cuts the answer short.
    common = {"temperature": 0, "block_length": 1, "suffix": "\n"}
    long = common | {"prompt": bench.prompts[0], "max_tokens": length, "steps": length}
    short = common | {"prompt": bench.prompts[-1], "max_tokens": 8, "steps": 8}
    rows, notes = [], [f"{length} and 8 tokens, a step for each; medians of {repeats} runs"]

    def measured(url: str) -> tuple[float, ...]:
        alone, fresh = drive(url, [[long], [short]])
        step_s = (alone.end_s - alone.sent_s) / alone.forwards
        _, late = drive(url, [[long], [short]], [0, 0.15 * (alone.end_s - alone.sent_s)])
        took = [one.end_s - one.sent_s for one in (fresh, late)]
        return *took, took[1] / took[0], late.first_s - late.sent_s, step_s

    for name in ("this", "against") if bench.options.against else ("this",):
        try:
            columns = zip(*(measured(bench.server(name)) for _ in range(repeats)), strict=True)
            rows.append([name, *(f"{statistics.median(column):.3g}" for column in columns)])
        except Refused as error:
            if name == "this":
                raise
            notes.append(left_out(error))
    goal = "goal: ratio <= 1.3; the first text within the step that runs and the first one of its own"
    return {
        "header": ["contender", "in a fresh pair s", "late s", "ratio", "first text of the late one s", "a step s"],
        "rows": rows,
        "notes": [*notes, goal],
    }


CASES: dict[str, tuple[Callable[[Bench], dict[str, Any]], str]] = {
    "closed": (case_closed, "quickstart"),
    "open": (case_open, "quickstart"),
    "regimes": (case_regimes, "quickstart"),
    "offline": (case_offline, "quickstart"),
    "health": (case_health, "quickstart"),
    "late": (case_late, "small"),
    "large_closed": (case_closed, "large"),
    "large_open": (case_open, "large"),
}
"""Of each case its function and its model."""


def draw(numbers: dict[str, Any], path: Path) -> None:
    """Requests per second, and which share of the requests was answered by when."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    drawn = {name: case["contenders"] for name, case in numbers.items() if "contenders" in case}
    if not drawn:
        return
    figure, axes = plt.subplots(2, len(drawn), figsize=(4 * len(drawn), 6.5), layout="constrained", squeeze=False)
    for (above, below), (name, contenders) in zip(axes.T, drawn.items(), strict=True):
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
    notes = "\n".join(f"- {note}" for note in [*case["notes"], case["where"]])
    return f"### {name}\n\n{case['title']}\n\n{markdown_table(case['header'], case['rows'])}\n{notes}\n"


def keep(numbers: dict[str, Any]) -> None:
    """Write the results."""
    STORED.write_text(json.dumps(numbers, indent=1) + "\n")
    draw(numbers, STORED.with_suffix(".png"))
    intro = "## Serving\n\n`python benchmarks/serving.py`\n\n![requests and latencies](serving.png)\n"
    write_results("serving", "\n".join([intro, *(section(name, case) for name, case in numbers.items())]))


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the cases and write the results; returns them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", nargs="*", choices=list(CASES), default=list(CASES))
    run = HERE.parent / "runs" / "quickstart" / "model"
    parser.add_argument("--model", type=Path, default=run, help="folder of the quickstart's model")
    parser.add_argument("--against", type=Path, help="another checkout, whose server is measured too")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=2, help="of each client, with the quickstart's model")
    parser.add_argument("--rounds", type=int, default=3, help="of closed loops")
    parser.add_argument("--note", help="what else is to be said of the machine")
    parser.add_argument("--tiny", action="store_true", help="only show that it runs")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.clients, options.rounds, options.against = 3, 1, None
    elif any(CASES[name][1] == "quickstart" for name in options.case) and not options.model.is_dir():
        parser.error(f"--model must be a folder, got {options.model}: quickstart.sh makes it")
    where = [f"CPU {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}", options.note]
    if options.against:
        head = said_by("git", "-C", str(options.against), "rev-parse", "--short", "HEAD")
        where.append(f"against is {head or 'another checkout'}")
    numbers = json.loads(STORED.read_text()) if STORED.is_file() and not options.tiny else {}
    benches: dict[str, Bench] = {}
    with contextlib.ExitStack() as stack:
        for name in options.case:
            function, model = CASES[name]
            if model not in benches:
                benches[model] = Bench(options, model, stack)
            started = time.monotonic()
            case = function(benches[model])
            title = f"{function.__doc__.splitlines()[0]} Model: {model}."
            numbers[name] = {"title": title, **case, "where": "; ".join(filter(None, where))}
            Console().print(Markdown(section(name, numbers[name])), f"{time.monotonic() - started:.0f} s")
            if not options.tiny:
                keep({name: numbers[name] for name in CASES if name in numbers})
    return {name: numbers[name] for name in CASES if name in numbers}


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main()
