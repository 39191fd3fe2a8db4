"""The host side of training measured: `python benchmarks/training_reader.py` prints one JSON object.

`reader`: tokens a second of packed, noised batches as the trainer reads them, in one thread. `masking`: time and memory
of noising 32 rows of 8192 tokens in runs, ours against the window arrays of the published pre-training code.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coda_pretrain.config import RunConfig
from coda_pretrain.data.mixture import Mixture
from coda_pretrain.data.shards import ShardWriter, build_manifest, token_dtype
from coda_pretrain.noise.masking import TokenFacts
from coda_pretrain.plain_data import from_dict
from coda_pretrain.train.batches import Batches
from CoDALanguageModel.noise import CleanRows, draw_rows, noise_rows

MASK_ID, PAD_ID, VOCAB_SIZE = 151669, 151643, 151670


def published_windows(input_ids: Tensor, maskable: Tensor, sigma: Tensor, *, mask_token_id: int, block: int) -> Tensor:
    """Block masking as the published pre-training code does it, rewritten here to be measured.

    Every window of `block` tokens is hit with probability `1 - (1 - sigma)^(1 / block)`, unless it touches a token that
    must not be masked; the tokens of the hit windows are found with an array of all windows by offset by position, and
    one of all rows by window by position.
    """
    num_rows, seq_len = input_ids.shape
    windows = torch.arange(seq_len - block + 1)[:, None] + torch.arange(block)  # (W, b)
    hit = torch.rand(num_rows, len(windows)) < 1 - (1 - sigma[:, None]) ** (1 / block)
    hit &= maskable[:, windows].all(dim=-1)  # (B, W)
    covers = (torch.arange(seq_len) == windows[..., None]).any(dim=1)  # (W, b, L) -> (W, L)
    masked = (hit[:, :, None] & covers).any(dim=1)  # (B, W, L) -> (B, L)
    return torch.where(masked, mask_token_id, input_ids)


def masking_case(num_rows: int, seq_len: int, block: int) -> dict[str, Callable[[], Any]]:
    """Both contenders on the same rows."""
    torch.manual_seed(0)
    ids = torch.randint(0, 150_000, (num_rows, seq_len))
    maskable = torch.ones(num_rows, seq_len, dtype=torch.bool)
    t = torch.linspace(0.01, 0.99, num_rows)

    rows, lengths = CleanRows(ids, torch.ones_like(ids)), [seq_len] * num_rows

    def ours() -> None:
        drawn = draw_rows(0, range(num_rows), lengths, seq_len, strategies=(0, 0, 1), span_lengths=[block])
        noise_rows(rows, t, drawn, mask_token_id=MASK_ID, pad_token_id=PAD_ID)

    def published() -> None:
        published_windows(ids, maskable, t, mask_token_id=MASK_ID, block=block)

    return {"published": published, "ours": ours}


def seconds_of(function: Callable[[], Any], repeats: int) -> float:
    """Median time of a call, after one that is not counted."""
    function()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def peak_bytes_of(function: Callable[[], Any]) -> int:
    """How far one call, in a process of its own, raises the resident memory. Linux."""
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)  # the parent's threads did not come along
        for warm_up in masking_case(1, 64, 2).values():
            warm_up()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
        before = _status("VmHWM")
        function()
        os.write(send, str(_status("VmHWM") - before).encode())
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return int(text)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def measure_masking(num_rows: int = 32, seq_len: int = 8192, block: int = 8) -> dict[str, Any]:
    """Time and memory of both, and how many times ours is better."""
    case = masking_case(num_rows, seq_len, block)
    # Memory first: a process that has started threads of torch must not be forked.
    memory = {name: peak_bytes_of(function) for name, function in case.items()}
    seconds = {"published": seconds_of(case["published"], 1), "ours": seconds_of(case["ours"], 20)}
    return {
        "rows": num_rows,
        "seq_len": seq_len,
        "span": block,
        "seconds": seconds,
        "peak_bytes": memory,
        "times_faster": seconds["published"] / seconds["ours"],
        "times_less_memory": memory["published"] / memory["ours"],
    }


def write_random_shards(folder: Path, num_tokens: int) -> None:
    """Documents of 20 to 4,000 random tokens, in shards as the preparation writes them."""
    rng = np.random.default_rng(0)
    dtype, records, left = token_dtype(VOCAB_SIZE - 1), [], num_tokens
    while left > 0:
        with ShardWriter(folder, f"train-{len(records):06d}", dtype) as writer:
            size = min(left, 4_000_000)
            left -= size
            while size > 0:
                length = min(int(rng.integers(20, 4000)), size)
                writer.add(np.append(rng.integers(0, 150_000, length - 1), PAD_ID))
                size -= length
            records.append(writer.commit())
    tokenizer = {"fingerprint": "random", "vocab_size": VOCAB_SIZE, "document_end_id": PAD_ID}
    manifest = build_manifest(split="train", dtype=dtype, shards=records, tokenizer=tokenizer)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def measure_reader(seq_len: int, global_batch_size: int, num_steps: int, num_tokens: int = 8_000_000) -> dict[str, Any]:
    """Tokens a second of batches read in random order from memory-mapped shards, packed and noised, in one thread."""
    with tempfile.TemporaryDirectory() as scratch:
        write_random_shards(Path(scratch), num_tokens)
        config = from_dict(
            RunConfig,
            {
                "output_dir": scratch,
                "max_steps": num_steps,
                "global_batch_size": global_batch_size,
                "seq_len": seq_len,
                "model": {"tokenizer": "none", "config": {}},
                "data": {"sources": [{"path": scratch}]},
                "masking": {"prefix_probability": 0.2, "truncate_probability": 0.2, "span_probability": 0.25},
                "optimizer": {"learning_rate": 1e-3},
            },
        )
        mixture = Mixture(config.data, seq_len=seq_len, seed=0)
        rows = range(global_batch_size)
        batches = Batches(config, mixture, rows=rows, num_steps=num_steps, tokens=TokenFacts(MASK_ID, PAD_ID))
        batches.make(0)
        started = time.perf_counter()
        for step in range(1, num_steps + 1):
            batches.make(step)
        seconds = time.perf_counter() - started
        batches.close()
    tokens = num_steps * global_batch_size * seq_len
    return {
        "seq_len": seq_len,
        "rows_per_batch": global_batch_size,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
    }


def measure() -> dict[str, Any]:
    """All of it."""
    return {
        "masking": measure_masking(),
        "reader": [measure_reader(256, 64, 40), measure_reader(8192, 32, 8)],
    }


def main(argv: list[str] | None = None) -> None:
    """Print the measurements as JSON."""
    argparse.ArgumentParser(description=__doc__.split("\n\n")[0]).parse_args(argv)
    torch.set_num_threads(1)
    print(json.dumps(measure(), indent=1))


if __name__ == "__main__":
    main()
