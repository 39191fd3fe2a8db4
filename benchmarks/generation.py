"""Decoding measured side by side: `python benchmarks/generation.py [--case NAME ...] [--model FOLDER]`.

Every case runs its contenders interleaved in one process on the same weights, and reports medians and their ratios to
the first one, the baseline. Results go to `benchmarks/RESULTS.md` and `benchmarks/generation.json`.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from published_sampler import published_generate
from rich.console import Console
from rich.table import Table

from CoDALanguageModel import CoDAConfig, CoDALanguageModel

HERE = Path(__file__).parent
console = Console()


def random_model(dtype: torch.dtype = torch.float32, **shape: Any) -> CoDALanguageModel:
    """A model of the given shape with random weights, wide enough apart that no two scores tie."""
    torch.manual_seed(0)
    config = CoDAConfig(initializer_range=0.02, **shape)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return CoDALanguageModel(config).eval()
    finally:
        torch.set_default_dtype(previous)


def small_model() -> CoDALanguageModel:
    """Hidden 512, 8 layers, the published vocabulary."""
    return random_model(
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


def measure(contenders: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, Any]]:
    """Median seconds of each contender, run in turn `repeats` times after one warm-up; keeps the last results."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    results: dict[str, Any] = {}
    for name, run in contenders.items():
        results[name] = run()
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
        },
        repeats,
    )
    return {"rows": rows, "facts": {}, "goal": ">= 8x"}


def case_published_shape(repeats: int) -> dict[str, Any]:
    """Published 1.7B shape, random weights, bf16, prompt 128, 64 new, 8 steps."""
    model = random_model(torch.bfloat16)
    x = prompts(model, 1, 128)
    settings = {"max_new_tokens": 64, "steps": 8, "alg": "entropy"}
    cached = {"kv_cache": "dual", "block_length": 32}
    rows = measure(
        {
            "published": lambda: published_generate(model, x, **settings),
            "exact": lambda: model.diffusion_generate(x, eos_early_stop=False, **settings),
            "dual cache, block 32": lambda: model.diffusion_generate(x, eos_early_stop=False, **settings, **cached),
        },
        repeats,
    )
    return {"rows": rows, "facts": profile_share(model, x), "goal": "exact >= 1.35x, dual >= 4x, other <= 15 %"}


def profile_share(model: CoDALanguageModel, x: torch.Tensor) -> dict[str, float]:
    """Share of one exact step spent outside of matrix products and attention."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model.diffusion_generate(x, max_new_tokens=64, steps=1)
    total = sum(event.self_cpu_time_total for event in profile.key_averages())
    heavy = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_dot_product", "mkldnn", "onednn", "linear")
    inside = sum(e.self_cpu_time_total for e in profile.key_averages() if any(word in e.key for word in heavy))
    return {"share outside of matrix products and attention": 1 - inside / total}


def case_batch(repeats: int) -> dict[str, Any]:
    """16 ragged prompts at once against one by one, fp32."""
    model = small_model()
    lengths = [8 + 5 * i for i in range(16)]
    rows = [prompts(model, 1, length, seed=length) for length in lengths]
    width = max(lengths)
    x = torch.cat(
        [torch.nn.functional.pad(row, (width - row.shape[1], 0), value=model.config.pad_token_id) for row in rows]
    )
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
    settings = {"max_new_tokens": 32, "steps": 16, "alg": "entropy"}
    measured = measure(
        {
            "one by one": lambda: torch.cat([model.diffusion_generate(row, **settings)[:, -32:] for row in rows]),
            "batch of 16": lambda: model.diffusion_generate(x, mask, **settings)[:, -32:],
        },
        repeats,
    )
    same = (measured["one by one"]["result"] == measured["batch of 16"]["result"]).float().mean().item()
    return {"rows": measured, "facts": {"equal tokens": same}, "goal": ">= 2x, identical tokens"}


def case_length(repeats: int) -> dict[str, Any]:
    """Time against new tokens 64 to 1024, four tokens a step: stepwise and with the dual cache."""
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
    rows: dict[str, Any] = {}
    for name, options in {"stepwise": {}, "dual cache": {"kv_cache": "dual"}}.items():
        for n in lengths:
            settings = {"max_new_tokens": n, "steps": n // 4, "block_length": 32, "eos_early_stop": False, **options}
            start = time.perf_counter()
            model.diffusion_generate(x, **settings)
            seconds = time.perf_counter() - start
            rows[f"{name}, {n} tokens"] = {"median_s": seconds, "speedup": float("nan"), "result": None}
    facts = {}
    for name in ("stepwise", "dual cache"):
        seconds = torch.tensor([rows[f"{name}, {n} tokens"]["median_s"] for n in lengths]).log()
        n = torch.tensor(lengths, dtype=torch.float32).log()
        slope = float(((n - n.mean()) * (seconds - seconds.mean())).sum() / ((n - n.mean()) ** 2).sum())
        facts[f"{name}: exponent of time against tokens"] = slope
    return {"rows": rows, "facts": facts, "goal": "cached about 1, stepwise about 2"}


CASES = {
    "greedy": case_greedy,
    "sampled": case_sampled,
    "published_shape": case_published_shape,
    "batch": case_batch,
    "length": case_length,
}


def report(name: str, case: dict[str, Any], description: str) -> list[str]:
    """Markdown of one case, also printed as a table."""
    table = Table("contender", "median s", "speed-up", title=name)
    lines = [f"### {name}", "", description, "", "| contender | median s | speed-up |", "| --- | --- | --- |"]
    for contender, row in case["rows"].items():
        speedup = "" if row["speedup"] != row["speedup"] else f"{row['speedup']:.2f}x"
        table.add_row(contender, f"{row['median_s']:.3f}", speedup)
        lines.append(f"| {contender} | {row['median_s']:.3f} | {speedup} |")
    console.print(table)
    lines.append("")
    for fact, value in case["facts"].items():
        console.print(f"{fact}: {value:.4f}")
        lines.append(f"{fact}: {value:.4f}  ")
    return [*lines, f"Goal: {case['goal']}.", ""]


def main() -> None:
    """Run the cases and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=HERE / "RESULTS.md")
    options = parser.parse_args()
    sections, numbers = [], {}
    for name in options.case:
        case = CASES[name](options.repeats)
        sections += report(name, case, CASES[name].__doc__.splitlines()[0])
        measured = {k: {"median_s": v["median_s"], "speedup": v["speedup"]} for k, v in case["rows"].items()}
        numbers[name] = {"rows": measured, "facts": case["facts"]}
    where = (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    head = [
        "## Decoding",
        "",
        f"`python benchmarks/generation.py`, CPU: {where}; medians of {options.repeats} runs.",
        "",
    ]
    options.output.write_text("\n".join(["# Benchmark results", "", *head, *sections]))
    (HERE / "generation.json").write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
