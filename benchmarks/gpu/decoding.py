"""Decoding of the published 1.7B shape: the regimes, what a pass costs, and attention by blocks."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from generation import prompts
from published_sampler import published_generate
from torch.nn.attention import SDPBackend, sdpa_kernel

from coda_pretrain.watch.flops import Work, forward_flops
from CoDALanguageModel import CoDALanguageModel

from .section import Section

BATCHES = (1, 8, 32)
DUAL = {"kv_cache": "dual", "block_length": 32}
REGIMES: dict[str, dict[str, Any] | None] = {
    "published": None,
    "exact": {},
    "dual cache": DUAL,
    "dual cache, windows": {**DUAL, "refresh_window": 32, "suffix_window": 64},
    "threshold 0.9": {"threshold": 0.9},
}
"""Settings of each; the first is the sampler that the others are measured against."""


def decoding(section: Section) -> None:
    """128 new tokens behind 128, 32 steps, greedy, bfloat16."""
    section.measure_rates()
    model = section.model(torch.bfloat16)
    length, new, steps = (16, 16, 8) if section.is_tiny else (128, 128, 32)
    alone: dict[int, float] = {}
    for batch in section.some(BATCHES):
        x = prompts(model, batch, length).to(section.device)
        for regime in REGIMES:
            settings = settings_of(section, regime)
            with section.measurement(batch=batch, regime=regime) as facts:
                section.require(8)
                measure_regime(section, model, x, new, steps, settings, facts)
                seconds = facts["seconds"]
                facts["times_faster"] = alone.setdefault(batch, seconds) / seconds
    for way in ("eager", "graph", "compile", "compile, graph"):
        for batch in section.some(BATCHES):
            measure_pass(section, model, batch, length, new, way)
    if section.on_gpu:
        for batch in BATCHES:
            with section.measurement(batch=batch, regime="exact, compiled layers") as facts, compiled(model):
                section.require(30)
                x = prompts(model, batch, length).to(section.device)
                measure_regime(section, model, x, new, steps, {}, facts)
                facts["times_faster"] = alone[batch] / facts["seconds"]


def settings_of(section: Section, regime: str) -> dict[str, Any] | None:
    """Decoding settings of a regime; none for the published sampler."""
    settings = REGIMES[regime]
    if section.is_tiny and settings and "block_length" in settings:
        settings = {**settings, "block_length": 4}
    return settings


def measure_regime(
    section: Section,
    model: CoDALanguageModel,
    x: torch.Tensor,
    new: int,
    steps: int,
    settings: dict[str, Any] | None,
    facts: dict[str, Any],
) -> None:
    """Time of one answer of each row after a short one, and its share of both ceilings.

    Bytes are those that must move: the weights once a pass, and keys and values of the canvas where they are kept.
    Operations are those of `coda_pretrain.watch.flops`, each pass attending to the whole canvas.
    """
    shared = {"max_new_tokens": new, "alg": "entropy"}

    def run(steps: int) -> Any:
        if settings is None:
            return published_generate(model, x, steps=steps, **shared)
        return model.diffusion_generate(x, steps=steps, eos_early_stop=False, **shared, **settings)

    run(4)
    with counted(model) as work:
        seconds = section.seconds(lambda: run(steps))
    if section.left > 30 and seconds < 2:
        seconds = min(seconds, section.seconds(lambda: run(steps)))
    canvas = x.shape[1] + new
    is_cached = bool(settings and "kv_cache" in settings)
    facts |= {"seconds": seconds, "tokens_per_s": len(x) * new / seconds, "ms_per_pass": 1e3 * seconds / work["passes"]}
    facts |= dict(work)
    shares_of_ceilings(section, model, work, seconds, len(x), canvas, is_cached, facts)


def shares_of_ceilings(
    section: Section,
    model: CoDALanguageModel,
    work: Counter[str],
    seconds: float,
    rows: int,
    canvas: int,
    is_cached: bool,
    facts: dict[str, Any],
) -> None:
    """Put what was reached of the measured copy bandwidth and matrix product rate into the facts."""
    if not section.rates:
        return
    config = model.config
    layers = sum(weight.nbytes for weight in model.model.layers.parameters())
    kept = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * rows * canvas
    moved = work["passes"] * (layers + model.lm_head.weight.nbytes + (kept if is_cached else 0))
    flops = sum(forward_flops(config, Work(work["tokens"], work["tokens"] * canvas, work["scored"])).values())
    facts["bandwidth_share"] = moved / seconds / section.rates["copy"]
    facts["matmul_share"] = flops / seconds / section.rates["matmul"]


@contextmanager
def counted(model: CoDALanguageModel) -> Iterator[Counter[str]]:
    """Count passes, positions that they compute and rows of the head, padding included."""
    work: Counter[str] = Counter()

    def note_tokens(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        work.update(passes=1, tokens=arguments[0].numel())

    def note_scored(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        work.update(scored=arguments[0].numel() // arguments[0].shape[-1])

    hooks = [
        model.model.embed_tokens.register_forward_pre_hook(note_tokens),
        model.lm_head.register_forward_pre_hook(note_scored),
    ]
    try:
        yield work
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def compiled(model: CoDALanguageModel) -> Iterator[None]:
    """Each layer through `torch.compile`, as the trainers do it."""
    for layer in model.model.layers:
        layer.compile(dynamic=False)
    try:
        yield
    finally:
        for layer in model.model.layers:
            layer._compiled_call_impl = None


@torch.no_grad()
def measure_pass(section: Section, model: CoDALanguageModel, batch: int, length: int, new: int, way: str) -> None:
    """One pass that scores the new tokens, all masked: as it is, in a CUDA graph, and with compiled layers."""
    if way != "eager" and not section.on_gpu:
        return
    with section.measurement(batch=batch, one_pass=way) as facts:
        section.require(25 if way.startswith("compile") else 5)
        ids = prompts(model, batch, length + new).to(section.device)
        ids[:, length:] = model.config.mask_token_id
        rows = (ids == model.config.mask_token_id).flatten().nonzero().flatten()

        def run() -> torch.Tensor:
            return model(input_ids=ids, positions=rows).logits

        expected = run()
        if way.startswith("compile"):
            with compiled(model):
                start = section.seconds(run)
                facts["first_s"] = start
                time_pass(section, run, way, expected, facts)
        else:
            time_pass(section, run, way, expected, facts)
        with counted(model) as work:
            run()
        shares_of_ceilings(section, model, work, facts["ms"] / 1e3, batch, length + new, False, facts)


def time_pass(
    section: Section, run: Callable[[], torch.Tensor], way: str, expected: torch.Tensor, facts: dict[str, Any]
) -> None:
    """Median milliseconds of a pass, replayed from a graph where asked, and how far its scores are from `expected`."""
    result = run()
    if way.endswith("graph"):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = run()
        run = graph.replay
        run()
    facts["ms"] = 1e3 * section.seconds(run, 3 if section.is_tiny else 9)
    errors = [
        float((a.float() - b.float()).norm() / b.float().norm())
        for a, b in zip(result[:256], expected[:256], strict=True)
    ]
    facts["largest_error_of_a_row"] = max(errors)


def blocks(section: Section) -> None:
    """One token a pass behind a prompt of 512: keys and values of finished blocks kept, and what that is worth.

    The keys of a cached pass grow with the text, and a kernel that is planned for each shape anew is planned often:
    the second time no shape is new, and without cuDNN's attention nothing is planned.
    """
    section.measure_rates()
    model = section.model(torch.bfloat16)
    length, new = (16, 8) if section.is_tiny else (512, 64)
    for batch in section.some(BATCHES):
        x = prompts(model, batch, length).to(section.device)
        for size in (4, 8) if section.is_tiny else (4, 32):
            found: dict[str, Any] = {}
            for way in ("cached", "cached, again", "cached, without cuDNN", "full attention, dual cache", "recomputed"):
                with section.measurement(batch=batch, block=size, way=way) as facts:
                    section.require(20 if batch == max(BATCHES) else 10)
                    found[way] = decode_by_blocks(section, model, x, new, size, way, facts)
                    if "cached" in found:
                        facts["cached_is_faster"] = facts["seconds"] / found["cached"][1]
                        facts["tokens_equal_to_cached"] = float((found["cached"][0] == found[way][0]).float().mean())


def decode_by_blocks(
    section: Section, model: CoDALanguageModel, x: torch.Tensor, new: int, size: int, way: str, facts: dict[str, Any]
) -> tuple[torch.Tensor, float]:
    """Decode one token a step with the model made one of this way; gives the tokens and the seconds."""
    by_blocks = not way.startswith("full")
    is_cached = way != "recomputed"
    model.config.attention, model.config.block_size = ("block_causal", size) if by_blocks else ("full", None)
    settings: dict[str, Any] = {"kv_cache": "dual", "block_length": size}
    if by_blocks:
        settings = {"kv_cache": "exact" if is_cached else "none"}
    results: list[torch.Tensor] = []

    def run(new: int) -> None:
        shared = {"max_new_tokens": new, "steps": new, "alg": "entropy", "eos_early_stop": False}
        results.append(model.diffusion_generate(x, **shared, **settings))

    run(min(new, size))
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with counted(model) as work, sdpa_kernel(kernels) if way.endswith("cuDNN") else nullcontext():
        seconds = section.seconds(lambda: run(new))
    facts |= {"seconds": seconds, "tokens_per_s": len(x) * new / seconds}
    facts |= {"ms_per_pass": 1e3 * seconds / work["passes"], **work}
    shares_of_ceilings(section, model, work, seconds, len(x), x.shape[1] + new, is_cached, facts)
    return results[-1], seconds
