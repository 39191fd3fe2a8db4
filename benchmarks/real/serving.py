"""The server on a real model: one client alone, then several at once, with the same requests."""

import statistics
import threading
import time
from pathlib import Path
from typing import Any

import httpx
from transformers import AutoTokenizer

from serving import process

from .model import REQUESTS
from .task import Task, load, say

CLIENTS = 4
ANSWER_TOKENS = 64
TASKS = ("sum of the squares", "largest element", "median", "number of different values", "product", "mean")
"""What the requests ask a function for, besides those whose greedy texts are compared."""


def serving(task: Task) -> None:
    """Tokens a second of a server process on the converted folder; texts must not depend on company."""
    is_chat = AutoTokenizer.from_pretrained(task.source).chat_template is not None
    texts = [*REQUESTS, *(f"Write a Python function that returns the {what} of a list." for what in TASKS)]
    checkout, folder = Path(__file__).resolve().parents[2], task.converted("float32").resolve()
    with process(checkout, folder, {}) as url, httpx.Client(base_url=url, timeout=600) as client:
        ask(client, texts[0], is_chat)
        answers: dict[int, list[str]] = {}
        for clients in (1, CLIENTS):
            facts, answers[clients] = measured(client, texts[: 2 * CLIENTS], clients, is_chat)
            same = sum(a == b for a, b in zip(answers[1], answers[clients], strict=True))
            say(clients=clients, requests=len(answers[clients]), **facts, texts_as_alone=same, load=load())


def measured(client: httpx.Client, texts: list[str], clients: int, is_chat: bool) -> tuple[dict[str, Any], list[str]]:
    """Have clients ask in turn, each its next request when it has its answer; figures, and the answers in order."""
    answers: dict[int, tuple[str, int, float]] = {}
    left = list(enumerate(texts))[::-1]

    def work() -> None:
        while left:
            number, text = left.pop()
            started = time.monotonic()
            answers[number] = (*ask(client, text, is_chat), time.monotonic() - started)

    threads = [threading.Thread(target=work) for _ in range(clients)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spent = time.monotonic() - started
    if len(answers) < len(texts):
        raise RuntimeError(f"{len(texts) - len(answers)} of {len(texts)} requests failed; the server's log says why")
    tokens = sum(count for _, count, _ in answers.values())
    facts = {"seconds": round(spent, 2), "new_tokens": tokens, "tokens_per_s": tokens / spent}
    facts |= {"median_latency_s": statistics.median(seconds for _, _, seconds in answers.values())}
    return facts, [answers[number][0] for number in range(len(texts))]


def ask(client: httpx.Client, text: str, is_chat: bool) -> tuple[str, int]:
    """One greedy answer and its number of tokens."""
    settings = {"max_tokens": ANSWER_TOKENS, "steps": ANSWER_TOKENS, "temperature": 0}
    if is_chat:
        body, place = {"messages": [{"role": "user", "content": text}]}, "/v1/chat/completions"
    else:
        body, place = {"prompt": f"# {text}\n"}, "/v1/completions"
    reply = client.post(place, json=body | settings).raise_for_status().json()
    choice = reply["choices"][0]
    return choice["message"]["content"] if is_chat else choice["text"], reply["usage"]["completion_tokens"]
