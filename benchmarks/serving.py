"""The server under mixed load: `python benchmarks/serving.py [--baseline CHECKOUT] [--clients 16] [--rounds 3]`.

Clients ask for answers of different lengths, with different settings, some of them gaps; each sends its next request
when it has its answer. With a baseline (another checkout of this repository) both servers run side by side on the same
model and are measured in turn. A second measure is the time to the first text of a request that arrives while a long
one is being denoised. Nothing is written but the table.
"""

import argparse
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parents[1]
console = Console()


def random_model(folder: Path, hidden_size: int, num_layers: int) -> None:
    """Save a model with random weights and a tokenizer of bytes, which never wants to end."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from CoDALanguageModel import CoDAConfig, CoDALanguageModel

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], eos_token=special[2], mask_token=special[3],
        extra_special_tokens=[special[1]],
        chat_template="{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    )  # fmt: skip
    torch.manual_seed(0)
    model = CoDALanguageModel(
        CoDAConfig(
            vocab_size=320,
            num_token_ids=len(fast),
            hidden_size=hidden_size,
            intermediate_size=3 * hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=hidden_size // 4,
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


class Server:
    """A server process of one checkout."""

    def __init__(self, checkout: Path, model: Path, log: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        places = [checkout, checkout / "serving"]
        environment = os.environ | {
            "MODEL_NAME": str(model),
            "PORT": str(port),
            "LOG_LEVEL": "warning",
            "PYTHONPATH": os.pathsep.join(map(str, places)),
        }
        self.log = log.open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "coda_serving"], cwd=checkout, env=environment, stdout=self.log, stderr=self.log
        )
        self.client = httpx.Client(
            base_url=f"http://127.0.0.1:{port}", timeout=600, limits=httpx.Limits(max_connections=None)
        )
        while True:
            try:
                self.client.get("/health").raise_for_status()
                break
            except httpx.HTTPError:
                if self.process.poll() is not None:
                    raise SystemExit(f"the server of {checkout} ended: {log.read_text()}") from None
                time.sleep(0.2)

    def close(self) -> None:
        """End the process."""
        self.client.close()
        self.process.terminate()
        self.process.wait(30)
        self.log.close()


def bodies(clients: int, requests: int) -> list[list[dict]]:
    """What each client asks for, in turn: fixed by the numbers alone, so that every server gets the same."""
    work = []
    for client in range(clients):
        rng = random.Random(f"client {client}")
        own = []
        for number in range(requests):
            length = rng.choice([16, 32, 64, 96, 128])
            body = {
                "prompt": "".join(rng.choice("abcdefgh \n") for _ in range(rng.randint(8, 120))),
                "max_tokens": length,
                "steps": length // rng.choice([1, 2]),
                "temperature": rng.choice([0, 0.2, 0.8]),
                "alg": rng.choice(["entropy", "topk_margin"]),
                "seed": 100 * client + number,
            }
            if rng.random() < 0.2:
                body["suffix"] = "return x\n"
            own.append(body)
        work.append(own)
    return work


def load(server: Server, work: list[list[dict]]) -> tuple[float, list[str], list[float]]:
    """Seconds for all requests, the answers in order, and the seconds of each."""
    answers: dict[tuple[int, int], tuple[str, float]] = {}

    def ask(client: int) -> None:
        for number, body in enumerate(work[client]):
            started = time.perf_counter()
            response = server.client.post("/v1/completions", json=body).raise_for_status()
            answers[client, number] = response.json()["choices"][0]["text"], time.perf_counter() - started

    threads = [threading.Thread(target=ask, args=(client,)) for client in range(len(work))]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - started
    keys = sorted(answers)
    return elapsed, [answers[key][0] for key in keys], [answers[key][1] for key in keys]


def first_text(server: Server) -> tuple[float, float]:
    """Seconds to the first text of a request that comes while a long one runs, and of one step of that long one."""
    long = {"prompt": "abc", "max_tokens": 400, "steps": 400, "block_length": 1, "temperature": 0}
    # Another length, which shares no batch that is fixed at its start; its first step commits its first token.
    late = {"prompt": "def", "max_tokens": 8, "steps": 8, "block_length": 1, "temperature": 0, "stream": True}
    done: list[float] = []

    def run_long() -> None:
        started = time.perf_counter()
        server.client.post("/v1/completions", json=long).raise_for_status()
        done.append(time.perf_counter() - started)

    thread = threading.Thread(target=run_long)
    thread.start()
    time.sleep(0.3)
    started = time.perf_counter()
    with server.client.stream("POST", "/v1/completions", json=late) as response:
        for line in response.iter_lines():
            if line.startswith("data: {") and '"text":""' not in line.replace(" ", ""):
                break
        elapsed = time.perf_counter() - started
    thread.join()
    return elapsed, done[0] / long["steps"]


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--baseline", type=Path, help="another checkout, measured in turn with this one")
    parser.add_argument("--model", type=Path, help="a model folder; by default a small one with random weights")
    parser.add_argument("--hidden_size", type=int, default=64)
    parser.add_argument("--num_layers", type=int, default=4)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=3, help="of each client")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    checkouts = {"this": REPOSITORY}
    if options.baseline is not None:
        checkouts = {"baseline": options.baseline.resolve(), **checkouts}
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model
        if folder is None:
            folder = Path(scratch, "model")
            random_model(folder, options.hidden_size, options.num_layers)
        servers: dict[str, Server] = {}
        try:
            for name, path in checkouts.items():
                servers[name] = Server(path, folder.resolve(), Path(scratch, f"{name}.log"))
            report(servers, options)
        finally:
            for server in servers.values():
                server.close()


def report(servers: dict[str, Server], options: argparse.Namespace) -> None:
    """Measure the servers in turn, and print medians."""
    work = bodies(options.clients, options.requests)
    num = options.clients * options.requests
    seconds: dict[str, list[float]] = {name: [] for name in servers}
    latencies: dict[str, list[float]] = {name: [] for name in servers}
    late: dict[str, list[tuple[float, float]]] = {name: [] for name in servers}
    answers: dict[str, list[str]] = {}
    for server in servers.values():
        load(server, bodies(2, 1))
    for _ in range(options.rounds):
        for name, server in servers.items():
            elapsed, answers[name], each = load(server, work)
            seconds[name].append(elapsed)
            latencies[name] += each
        for name, server in servers.items():
            late[name].append(first_text(server))
    first = next(iter(servers))
    title = f"{options.clients} clients, {num} requests"
    table = Table(
        "server", "requests/s", "ratio", "median latency s", "late first text s", "step of the long s", title=title
    )
    for name in servers:
        median = statistics.median(seconds[name])
        table.add_row(
            name,
            f"{num / median:.2f}",
            f"{statistics.median(seconds[first]) / median:.2f}x",
            f"{statistics.median(latencies[name]):.2f}",
            f"{statistics.median(x for x, _ in late[name]):.3f}",
            f"{statistics.median(x for _, x in late[name]):.4f}",
        )
    console.print(table)
    same = sum(a == b for a, b in zip(answers[first], answers["this"], strict=True))
    console.print(f"equal answers: {same} of {num}")


if __name__ == "__main__":
    main()
