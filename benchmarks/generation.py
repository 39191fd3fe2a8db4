"""Decoding measured side by side: `python benchmarks/generation.py [--case NAME ...] [--run_dir FOLDER]`.

Every case runs its contenders interleaved in one process on the same weights, and reports medians and their ratios to
the first one, the baseline. Results go to `benchmarks/RESULTS.md`, `generation.json` and `generation.png`; a case that
is not run keeps the result that it has there.
"""

import argparse
import json
import logging
import platform
import random
import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from published_sampler import published_generate
from rich.console import Console
from rich.table import Table

from CoDALanguageModel import CoDAConfig, CoDALanguageModel
from CoDALanguageModel.cache import PagedCache
from CoDALanguageModel.constraints import Lexicon, TokenAutomaton
from CoDALanguageModel.decoder import Decoding
from CoDALanguageModel.json_schema import of_schema
from CoDALanguageModel.regular import automaton
from CoDALanguageModel.row import Request
from CoDALanguageModel.schedule import commit_counts

HERE = Path(__file__).parent
BEGIN, END = "<!-- generation:begin -->", "<!-- generation:end -->"
console = Console()


def random_model(dtype: torch.dtype = torch.float32, **shape: Any) -> CoDALanguageModel:
    """A model of the given shape with random weights, its scores as far apart as those of a trained one.

    With the head as it is initialised all confidences are nearly equal, and rounding would decide the order.
    """
    torch.manual_seed(0)
    config = CoDAConfig(initializer_range=0.02, tie_word_embeddings=False, **shape)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = CoDALanguageModel(config).eval()
    finally:
        torch.set_default_dtype(previous)
    with torch.no_grad():
        model.lm_head.weight *= 8
    return model


def small_model(**changes: Any) -> CoDALanguageModel:
    """Hidden 512, 8 layers, the published vocabulary."""
    return random_model(
        **changes,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
    )


def prompts(model: CoDALanguageModel, rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """(rows, length) random prompts."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, min(model.config.num_token_ids, 150_000), (rows, length), generator=generator)


def measure(
    contenders: dict[str, Callable[[], Any]], repeats: int, *, warm_up: bool = True
) -> dict[str, dict[str, Any]]:
    """Median seconds of each contender, run in turn `repeats` times after one warm-up; keeps the last results."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    results: dict[str, Any] = {}
    for run in contenders.values() if warm_up else ():
        run()
    for _ in range(repeats):
        for name, run in contenders.items():
            start = time.perf_counter()
            results[name] = run()
            times[name].append(time.perf_counter() - start)
    first = next(iter(contenders))
    baseline = statistics.median(times[first])
    return {
        name: {
            "median_s": statistics.median(values),
            "speedup": baseline / statistics.median(values),
            "result": results[name],
        }
        for name, values in times.items()
    }


def case_greedy(repeats: int) -> dict[str, Any]:
    """Hidden 512, vocabulary 151,936, prompt 64, 128 new, 32 steps, greedy."""
    model = small_model()
    x = prompts(model, 1, 64)
    settings = {"max_new_tokens": 128, "steps": 32, "alg": "entropy"}
    rows = measure(
        {
            "published": lambda: published_generate(model, x, **settings),
            "exact": lambda: model.diffusion_generate(x, eos_early_stop=False, **settings),
        },
        repeats,
    )
    same = (rows["published"]["result"] == rows["exact"]["result"]).float().mean().item()
    return {"rows": rows, "facts": {"equal tokens": same}, "goal": ">= 1.6x, identical tokens"}


def case_sampled(repeats: int) -> dict[str, Any]:
    """The same with temperature 0.1 and top_p 0.9."""
    model = small_model()
    x = prompts(model, 1, 64)
    settings = {"max_new_tokens": 128, "steps": 32, "alg": "entropy", "temperature": 0.1, "top_p": 0.9}
    rows = measure(
        {
            "published": lambda: published_generate(model, x, **settings),
            "exact": lambda: model.diffusion_generate(x, eos_early_stop=False, **settings),
            "exact, greedy": lambda: model.diffusion_generate(
                x, eos_early_stop=False, **{**settings, "temperature": 0.0, "top_p": None}
            ),
        },
        repeats,
    )
    return {"rows": rows, "facts": {}, "goal": ">= 8x; greedy shows what is left when sampling costs nothing"}


def faster_dtype() -> torch.dtype:
    """bfloat16, unless this CPU multiplies matrices of it more slowly than float32."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(192, 2048, dtype=dtype)
        b = torch.ones(2048, 512, dtype=dtype)
        a @ b
        start = time.perf_counter()
        a @ b
        seconds[dtype] = time.perf_counter() - start
    return min(seconds, key=seconds.get)


def case_published_shape(repeats: int) -> dict[str, Any]:
    """Published 1.7B shape, random weights, bf16 (fp32 where bf16 is slower), prompt 128, 64 new, 8 steps."""
    dtype = faster_dtype()
    model = random_model(dtype)
    x = prompts(model, 1, 128)
    settings = {"max_new_tokens": 64, "steps": 8, "alg": "entropy"}
    cached = {"kv_cache": "dual", "block_length": 32}
    near = {"refresh_window": 32}
    rows = measure(
        {
            "published": lambda: published_generate(model, x, **settings),
            "exact": lambda: model.diffusion_generate(x, eos_early_stop=False, **settings),
            "dual cache, block 32": lambda: model.diffusion_generate(x, eos_early_stop=False, **settings, **cached),
            "dual cache, block 32, refresh window 32": lambda: model.diffusion_generate(
                x, eos_early_stop=False, **settings, **cached, **near
            ),
        },
        min(repeats, 2),  # tens of seconds each
    )
    layers = sum(parameter.numel() for parameter in model.model.layers.parameters())
    head, rows_of_step = model.lm_head.weight.numel(), x.shape[1] + 64
    counts = commit_counts(64, 8, 1e-3)
    masked = [64 - sum(counts[:i]) for i in range(8)]
    facts = {
        "bits of a weight": float(torch.finfo(dtype).bits),
        "most that the skipped rows of the head can gain, by operations of matrix products": 8
        * rows_of_step
        * (layers + head)
        / (8 * rows_of_step * layers + sum(masked) * head),
        **profile_share(model, x),
    }
    return {"rows": rows, "facts": facts, "goal": "exact >= 1.35x, dual >= 4x, share outside <= 15 %"}


def profile_share(model: CoDALanguageModel, x: torch.Tensor) -> dict[str, float]:
    """Share of one exact step spent outside of matrix products and attention."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model.diffusion_generate(x, max_new_tokens=64, steps=1)
    total = sum(event.self_cpu_time_total for event in profile.key_averages())
    heavy = ("aten::mm", "aten::addmm", "aten::bmm", "scaled_dot_product", "mkldnn", "onednn", "aten::linear")
    inside = sum(e.self_cpu_time_total for e in profile.key_averages() if any(word in e.key for word in heavy))
    return {"share outside of matrix products and attention": 1 - inside / total}


def case_quickstart(repeats: int, run_dir: Path) -> dict[str, Any] | None:
    """Quickstart's model on its held-out problems, budget 128: one token a step against cache and parallel rules."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    import coda_eval
    from coda_eval.harness import CoDAEvalModel

    model, data = run_dir / "model", run_dir / "benchmarks"
    if not (model / "config.json").is_file() or not (data / "quickstart_problems.jsonl").is_file():
        console.print(f"quickstart: not measured, {run_dir} holds no model (bash quickstart.sh makes it)")
        return None
    tasks = TaskManager(
        include_path=str(Path(coda_eval.__file__).parent / "tasks"),
        include_defaults=False,
        metadata={"data_dir": str(data)},
    )
    # The model was trained on answers with few end tokens behind them, and knows no canvas of 128 masks: the baseline
    # decodes the same windows as the fast contender, and the whole canvas is shown for comparison.
    windows = {"block_length": 32, "suffix_window": 0}
    settings = {
        "exact, windows of 32": windows,
        "exact, canvas of 128": {},
        "dual cache, entropy bound 0.1": {**windows, "kv_cache": "dual", "refresh_window": 32, "entropy_bound": 0.1},
        "dual cache, threshold 0.9": {**windows, "kv_cache": "dual", "refresh_window": 32, "threshold": 0.9},
    }
    shared = {"max_new_tokens": 128, "steps": 128, "alg": "topk_margin", "temperature": 0.0, "top_p": None}
    rows, facts, baseline = {}, {}, None
    for name, options in settings.items():
        evaluated = CoDAEvalModel(str(model), device="cpu", batch_size=1, **shared, **options)
        output = simple_evaluate(
            evaluated, tasks=["quickstart_problems"], task_manager=tasks, apply_chat_template=True, bootstrap_iters=0
        )
        samples = output["samples"]["quickstart_problems"]
        answers = [json.loads(sample["filtered_resps"][0][0]) for sample in samples]
        seconds = sum(answer["generation_s"] for answer in answers)
        baseline = baseline or seconds
        rows[name] = {"median_s": seconds, "speedup": baseline / seconds, "result": answers}
        facts[f"pass@1 in %, {name}"] = 100 * output["results"]["quickstart_problems"]["pass@1,run"]
        facts[f"tokens evaluated, {name}"] = sum(answer["cost"]["tokens_evaluated"] for answer in answers)
    goal = ">= 10x fewer tokens evaluated, >= 5x, pass@1 within 1 point"
    return {"rows": rows, "facts": facts, "goal": goal}


def case_batch(repeats: int) -> dict[str, Any]:
    """16 prompts of 32 to 62 tokens at once against one by one, 32 new in blocks of 8, 16 steps, greedy, fp32."""
    model = small_model()
    lengths = [32 + 2 * i for i in range(16)]
    rows = [prompts(model, 1, length, seed=length) for length in lengths]
    width = max(lengths)
    x = torch.cat(
        [torch.nn.functional.pad(row, (width - row.shape[1], 0), value=model.config.pad_token_id) for row in rows]
    )
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
    settings = {"max_new_tokens": 32, "steps": 16, "block_length": 8, "alg": "entropy"}
    measured = measure(
        {
            "one by one": lambda: torch.cat([model.diffusion_generate(row, **settings)[:, -32:] for row in rows]),
            "batch of 16": lambda: model.diffusion_generate(x, mask, **settings)[:, -32:],
        },
        repeats,
    )
    same = (measured["one by one"]["result"] == measured["batch of 16"]["result"]).float().mean().item()
    return {"rows": measured, "facts": {"equal tokens": same}, "goal": ">= 2x, identical tokens"}


def words(count: int) -> Lexicon:
    """A vocabulary of bytes and random pieces of text, with the lengths of a real one's tokens."""
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz" * 4 + "ETAOIN_-.:;,/()[]{}<>=\"' 0123456789\n\u00e9\u4e2d\u6587"
    tokens = [bytes([byte]) for byte in range(256)]
    seen = set(tokens)
    while len(tokens) < count:
        text = " " * rng.randint(0, 1) + "".join(
            rng.choice(letters) for _ in range(rng.choice((1, 2, 3, 4, 5, 6, 8, 11)))
        )
        if (token := text.encode()) not in seen:
            seen.add(token)
            tokens.append(token)
    lexicon = Lexicon(None)
    vars(lexicon)["tokens"] = tokens
    return lexicon


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string", "format": "email"},
        "roles": {"type": "array", "items": {"enum": ["reader", "writer", "owner"]}},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string", "maxLength": 40}, "city": {"type": "string"}},
            "required": ["street", "city"],
        },
    },
    "required": ["name", "age", "address"],
}


def case_constrained(repeats: int) -> dict[str, Any]:
    """Hidden 512, vocabulary 151,936, prompt 64, 128 new, 32 steps: free against answers by a schema."""
    model = small_model()
    lexicon, x = words(model.config.num_token_ids - 300), prompts(model, 1, 64)[0].tolist()
    settings = {"max_new_tokens": 128, "steps": 32, "alg": "entropy", "eos_early_stop": False}

    def run(**options: Any) -> list[int]:
        decoding = Decoding(model, lexicon=lexicon)
        row = decoding.admit(Request(ids=x, settings=model.generation_config.merged(settings | options)))
        while decoding.rows:
            decoding.step()
        return row.text_ids()

    shapes = {"object of five fields": {"json_schema": PERSON}, "any object": {"json_schema": {"type": "object"}}}
    rows, facts = {}, {}
    for temperature in (0.0, 1.0):
        free = f"free, temperature {temperature:g}"
        contenders = {free: partial(run, temperature=temperature)}
        contenders |= {
            f"{k}, temperature {temperature:g}": partial(run, temperature=temperature, **v) for k, v in shapes.items()
        }
        measured = measure(contenders, repeats)
        for name in list(contenders)[1:]:
            facts[f"cost of a step in %, {name}"] = 100 * (measured[name]["median_s"] / measured[free]["median_s"] - 1)
        rows |= measured
    for name, schema in (("object of five fields", PERSON), ("any object", {"type": "object"})):
        start = time.perf_counter()
        TokenAutomaton(automaton(of_schema(schema)), lexicon)
        facts[f"seconds to compile, {name}"] = time.perf_counter() - start
    return {"rows": rows, "facts": facts, "goal": "<= 20 % a step where no proposal of the model is allowed"}


def case_length(repeats: int) -> dict[str, Any]:
    """Time against new tokens 64 to 1024, four tokens a step: stepwise, with the dual cache, and with windows too."""
    model = random_model(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        mask_token_id=4095,
        pad_token_id=4094,
        bos_token_id=4093,
        eos_token_id=4093,
    )
    x = prompts(model, 1, 64)
    lengths = [64, 128, 256, 512, 1024]
    windows = {"kv_cache": "dual", "refresh_window": 32, "suffix_window": 64}
    regimes = {"stepwise": {}, "dual cache": {"kv_cache": "dual"}, "dual cache, windows": windows}
    runs = {
        f"{name}, {n} tokens": partial(
            model.diffusion_generate,
            x,
            max_new_tokens=n,
            steps=n // 4,
            block_length=32,
            eos_early_stop=False,
            **options,
        )
        for name, options in regimes.items()
        for n in lengths
    }
    rows = measure(runs, repeats)
    facts = {}
    for name in regimes:
        seconds = [rows[f"{name}, {n} tokens"]["median_s"] for n in lengths]
        facts[f"{name}: exponent of time against tokens, 256 to 1024"] = exponent(lengths[2:], seconds[2:])
    for row in rows.values():
        row["speedup"] = float("nan")  # other lengths are other work
    return {"rows": rows, "facts": facts, "goal": "cached about 1, stepwise about 2"}


def case_blocks_4(repeats: int) -> dict[str, Any]:
    """Block-causal, blocks of 4, hidden 512, 8 layers, vocabulary 151,936, prompt 512, 256 new, 256 steps, greedy."""
    return blocks_of(4, repeats)


def case_blocks_32(repeats: int) -> dict[str, Any]:
    """The same in blocks of 32."""
    return blocks_of(32, repeats)


def blocks_of(size: int, repeats: int) -> dict[str, Any]:
    """What the cache of finished blocks gains over computing all anew, and over full attention's dual cache."""
    blocks = small_model(attention="block_causal", block_size=size)
    full = small_model()
    x = prompts(full, 1, 512)
    settings = {"max_new_tokens": 256, "steps": 256, "alg": "entropy", "eos_early_stop": False}
    settings["return_dict_in_generate"] = True
    rows = measure(
        {
            "recomputed": lambda: blocks.diffusion_generate(x, kv_cache="none", **settings),
            "full attention, dual cache": lambda: full.diffusion_generate(
                x, kv_cache="dual", block_length=size, **settings
            ),
            "cached": lambda: blocks.diffusion_generate(x, **settings),
        },
        repeats,
        warm_up=False,  # minutes each
    )
    results = {name: row["result"] for name, row in rows.items()}
    same = (results["recomputed"].sequences == results["cached"].sequences).float().mean().item()
    facts = {"equal tokens, cached and recomputed": same}
    facts["cached over the dual cache"] = rows["full attention, dual cache"]["median_s"] / rows["cached"]["median_s"]
    for name, result in results.items():
        facts[f"forward passes, {name}"] = result.cost.forwards
        facts[f"tokens evaluated, {name}"] = result.cost.tokens_evaluated
    goal = ">= 8x in blocks of 32, identical tokens; >= 1.5x over the dual cache at equal forward passes"
    return {"rows": rows, "facts": facts, "goal": goal}


class PaddedCache:
    """Keys and values of texts in rows of one length, which is known: what pages are measured against."""

    def __init__(self, num_rows: int, width: int):
        self.stores: tuple[dict[int, torch.Tensor], ...] = ({}, {})
        self.shape = num_rows, width
        self.lengths: list[int] = []

    @property
    def num_bytes(self) -> int:
        """Memory of all rows of all layers."""
        return sum(x.nbytes for store in self.stores for x in store.values())

    def open(self) -> int:
        """Begin a text."""
        self.lengths.append(0)
        return len(self.lengths) - 1

    def close(self, text: int) -> None:
        """Let a text go."""

    def length(self, text: int) -> int:
        """Stored tokens."""
        return self.lengths[text]

    def bind(self, texts: list[int], keep: torch.Tensor) -> "PaddedCache":
        """See `PagedCache`."""
        self.texts, self.longest = texts, max(self.lengths[text] for text in texts)
        row, self.column = keep.nonzero(as_tuple=True)
        self.row, before = row, keep.cumsum(dim=1)[row, self.column] - 1
        self.place = before + torch.tensor([self.lengths[text] for text in texts])[row]
        for text, count in zip(texts, keep.sum(dim=1).tolist(), strict=True):
            self.lengths[text] += count
        return self

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, ...]:
        """See `PagedCache`."""
        given = []
        for store, fresh in zip(self.stores, (keys, values), strict=True):
            num_rows, num_heads, width, head_dim = fresh.shape
            if layer_idx not in store:
                store[layer_idx] = fresh.new_zeros(self.shape[0], num_heads, self.shape[1], head_dim)
            kept, rows = store[layer_idx], torch.tensor(self.texts)
            kept[rows[self.row], :, self.place] = fresh[self.row, :, self.column]
            whole = fresh.new_empty(num_rows, num_heads, self.longest + width, head_dim)
            for i, text in enumerate(self.texts):
                whole[i, :, : self.longest] = kept[text, :, : self.longest]
            whole[:, :, self.longest :] = fresh
            given.append(whole)
        return tuple(given)


RAGGED = [round(128 * 8 ** (i / 15)) for i in range(16)]
"""Tokens of 16 texts, from 128 to 1024."""


def ragged_peak(is_paged: bool) -> dict[str, Any]:
    """Tokens, seconds and peaks of a run in a process of its own: bytes of the cache, and all above the weights."""
    model = random_model(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        mask_token_id=4095,
        pad_token_id=4094,
        bos_token_id=4093,
        eos_token_id=4093,
        num_token_ids=4093,
        attention="block_causal",
        block_size=4,
    )
    settings = model.generation_config.merged({"max_new_tokens": 32, "steps": 16, "eos_early_stop": False})
    peak = 0

    class Watched(PagedCache if is_paged else PaddedCache):
        def update(self, *arguments: Any) -> Any:
            nonlocal peak
            given = super().update(*arguments)
            peak = max(peak, self.num_bytes)
            return given

    texts = [prompts(model, 1, length - 32, seed=length)[0].tolist() for length in RAGGED]
    make = Watched if is_paged else partial(Watched, len(RAGGED), max(RAGGED))
    with mock.patch("CoDALanguageModel.blocks.PagedCache", make):
        decoding = Decoding(model)
        rows = [decoding.admit(Request(ids=ids, settings=settings)) for ids in texts]
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before, start = resident("VmRSS"), time.perf_counter()
    while decoding.rows:
        decoding.step()
    seconds, above = time.perf_counter() - start, resident("VmHWM") - before
    return {"ids": [row.ids for row in rows], "seconds": seconds, "cache": peak, "above": above}


def resident(name: str) -> int:
    """Memory of this process in bytes, now (`VmRSS`) or at most (`VmHWM`)."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def case_ragged(repeats: int) -> dict[str, Any]:
    """16 texts of 128 to 1,024 tokens, each 1.15 times the one before, 32 new; blocks of 4, hidden 512, 8 layers.

    Keys and values in pages against rows of one length, each in a process of its own.
    """
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        padded, paged = pool.map(ragged_peak, (False, True), chunksize=1)
    rows = {
        name: {"median_s": run["seconds"], "speedup": float("nan"), "result": run["ids"]}  # memory is what is compared
        for name, run in (("padded", padded), ("paged", paged))
    }
    tokens = [[a == b for a, b in zip(*ids, strict=True)] for ids in zip(padded["ids"], paged["ids"], strict=True)]
    facts = {"equal tokens": sum(map(sum, tokens)) / sum(map(len, tokens))}
    for what, name in (("keys and values", "cache"), ("all memory above the weights", "above")):
        facts |= {f"peak of {what}, MB, {n}": run[name] / 1e6 for n, run in (("padded", padded), ("paged", paged))}
        facts[f"peak of {what}, paged to padded"] = paged[name] / padded[name]
    return {"rows": rows, "facts": facts, "goal": "peak of keys and values <= 0.6x, identical tokens"}


def exponent(x: list[int], y: list[float]) -> float:
    """Slope of the least-squares line through (log x, log y)."""
    logs = torch.tensor([x, y], dtype=torch.float64).log()
    centred = logs - logs.mean(dim=1, keepdim=True)
    return float((centred[0] * centred[1]).sum() / centred[0].square().sum())


CASES = {
    "greedy": case_greedy,
    "sampled": case_sampled,
    "published_shape": case_published_shape,
    "quickstart": case_quickstart,
    "batch": case_batch,
    "constrained": case_constrained,
    "length": case_length,
    "blocks_4": case_blocks_4,
    "blocks_32": case_blocks_32,
    "ragged": case_ragged,
}


def section(name: str, case: dict[str, Any]) -> list[str]:
    """Markdown of one case, also printed as a table."""
    table = Table("contender", "median s", "speed-up", title=name)
    lines = [f"### {name}", "", case["description"], "", "| contender | median s | speed-up |", "| --- | --- | --- |"]
    for contender, row in case["rows"].items():
        speedup = "" if row["speedup"] is None else f"{row['speedup']:.2f}x"
        table.add_row(contender, f"{row['median_s']:.3f}", speedup)
        lines.append(f"| {contender} | {row['median_s']:.3f} | {speedup} |")
    console.print(table)
    lines.append("")
    for fact, value in case["facts"].items():
        console.print(f"{fact}: {value:.6g}")
        lines.append(f"- {fact}: {value:.6g}")
    return [*lines, f"- goal: {case['goal']}", f"- {case['where']}", ""]


def draw(numbers: dict[str, Any], path: Path) -> None:
    """Speed-ups of all cases, and time against length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    bars = [
        (f"{name}: {contender}", row["speedup"])
        for name, case in numbers.items()
        for contender, row in case["rows"].items()
        if row["speedup"] is not None and row["speedup"] != 1 and contender != "exact, canvas of 128"
    ]
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    labels, values = [b[0] for b in bars][::-1], [b[1] for b in bars][::-1]
    left.bar_label(left.barh(labels, values, color="#4477aa"), fmt=" %.1fx")
    left.axvline(1, color="black", linewidth=0.8)
    left.set_xscale("log")
    left.set_xlim(0.8, 2 * max([1, *values]))
    left.set_xlabel("speed-up over the baseline of the case")
    curves: dict[str, list[tuple[int, float]]] = {}
    for contender, row in numbers.get("length", {"rows": {}})["rows"].items():
        name, _, n = contender.removesuffix(" tokens").rpartition(", ")
        curves.setdefault(name, []).append((int(n), row["median_s"]))
    for name, points in curves.items():
        right.plot(*zip(*points, strict=True), marker="o", label=name)
    right.set(xscale="log", yscale="log", xlabel="new tokens", ylabel="seconds")
    right.grid(alpha=0.3)
    if curves:
        right.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run the cases and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--run_dir", type=Path, default=HERE.parent / "runs" / "quickstart", help="of quickstart.sh")
    options = parser.parse_args()
    logging.getLogger("coda_eval").setLevel(logging.ERROR)
    where = f"CPU {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    stored = HERE / "generation.json"
    numbers = json.loads(stored.read_text()) if stored.is_file() else {}
    for name in options.case:
        run = partial(CASES[name], run_dir=options.run_dir) if name == "quickstart" else CASES[name]
        case = run(options.repeats)
        if case is None:
            continue
        for row in case["rows"].values():
            row.pop("result")
            row["speedup"] = row["speedup"] if row["speedup"] == row["speedup"] else None
        case["description"] = CASES[name].__doc__.splitlines()[0]
        case["where"] = f"{where}; medians of {options.repeats} runs" if name != "quickstart" else f"{where}; one run"
        numbers[name] = case
        section(name, case)
        stored.write_text(json.dumps(numbers, indent=2) + "\n")
    numbers = {name: numbers[name] for name in CASES if name in numbers}
    draw(numbers, HERE / "generation.png")
    lines = [BEGIN, "## Decoding", "", "`python benchmarks/generation.py`; on a GPU: see the end.", ""]
    lines += ["![speed-ups and time against length](generation.png)", ""]
    with console.capture():
        for name, case in numbers.items():
            lines += section(name, case)
    results = HERE / "RESULTS.md"
    text = results.read_text() if results.is_file() else f"# Benchmark results\n\n{BEGIN}\n{END}\n"
    if BEGIN not in text:
        text += f"\n{BEGIN}\n{END}\n"
    block = "\n".join([*lines, END])
    results.write_text(re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: block, text, flags=re.DOTALL))


if __name__ == "__main__":
    main()
