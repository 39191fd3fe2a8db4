"""What every section of the GPU benchmark is given: the device, its time, and a place for what it measures."""

import gc
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from generation import random_model

from CoDALanguageModel import CoDALanguageModel

from .report import RECORD, said_by

TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "mask_token_id": 511,
    "pad_token_id": 510,
    "bos_token_id": 509,
    "eos_token_id": 509,
    "num_token_ids": 509,
}
"""The shape of a dry run."""

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy", "flash-attn")


@dataclass
class Section:
    """A section at work."""

    device: torch.device
    is_tiny: bool
    weights: Path | None
    """Folder of SmolLM2-135M."""

    deadline: float
    """Of `time.monotonic`; a section stops by itself before it, and is killed at it."""

    work: Path
    """Scratch folder."""

    rates: dict[str, float] = field(default_factory=dict)
    """`copy` in bytes a second and `matmul` in operations a second, once measured."""

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU."""
        return self.device.type == "cuda"

    def some(self, items: Sequence[Any]) -> Sequence[Any]:
        """All of them; in a dry run on a CPU the first and the last."""
        return items if self.on_gpu or not self.is_tiny else [items[0], *items[1:][-1:]]

    def shape(self, **published: Any) -> dict[str, Any]:
        """Fields of `CoDAConfig`: those given (none is the published 1.7B model), or tiny ones."""
        return dict(TINY) if self.is_tiny else published

    def model(self, dtype: torch.dtype, **published: Any) -> CoDALanguageModel:
        """A random model, made on the device."""
        with torch.device(self.device):
            return random_model(dtype, **self.shape(**published))

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], Any], repeats: int = 1) -> float:
        """Median time of `run`."""
        times = []
        for _ in range(repeats):
            self.wait()
            start = time.perf_counter()
            run()
            self.wait()
            times.append(time.perf_counter() - start)
        return sorted(times)[repeats // 2]

    def require(self, seconds: float) -> None:
        """End a measurement before it begins where less time is left.

        Raises:
            Skipped: less is left.
        """
        if not self.is_tiny and self.left < seconds:
            raise Skipped(f"it needs about {seconds:.0f} s, {max(self.left, 0):.0f} s were left")

    @contextmanager
    def measurement(self, **facts: Any) -> Iterator[dict[str, Any]]:
        """Collect the facts of one measurement, and hand them on with what went wrong, if anything did.

        Args:
            **facts: what tells it from others.

        Yields:
            The facts, to be added to.
        """
        self.free()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        start = time.monotonic()
        try:
            yield facts
        except Skipped as reason:
            facts["skipped"] = str(reason)
        except Exception as error:
            traceback.print_exc()
            traceback.clear_frames(error.__traceback__)  # or their tensors would stay on the device
            facts["error"] = f"{type(error).__name__}: {error}"[:600]
        if self.on_gpu:
            facts["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        facts["took_s"] = time.monotonic() - start
        emit(facts)
        self.free()

    def free(self) -> None:
        """Give the device's memory back that nothing refers to."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def measure_rates(self) -> None:
        """The two ceilings: a device-to-device copy, bytes read and written, and a bfloat16 matrix product."""
        n, size = (256, 2**20) if self.is_tiny else (8192, 2**32)
        with self.measurement(what="ceilings") as facts:
            source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=self.device)
            target = torch.empty_like(source)
            target.copy_(source)
            self.rates["copy"] = 2 * size / self.seconds(lambda: target.copy_(source), 7)
            a, b = (torch.randn(n, n, device=self.device).bfloat16() for _ in range(2))
            for _ in range(3):
                a @ b
            self.rates["matmul"] = 2 * n**3 / self.seconds(lambda: a @ b, 9)
            facts["copy_gb_per_s"], facts["matmul_tflops"] = self.rates["copy"] / 1e9, self.rates["matmul"] / 1e12


class Skipped(Exception):
    """A measurement is not made, for the reason given."""


def emit(facts: dict[str, Any]) -> None:
    """Hand a measurement to the parent process."""
    sys.stdout.write(f"{RECORD}{json.dumps(facts)}\n")
    sys.stdout.flush()


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on and with."""
    found: dict[str, Any] = {"python": platform.python_version(), "cores": os.cpu_count()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    found["commit"] = os.environ.get("CODA_COMMIT") or said_by("git", "rev-parse", "HEAD")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "card": properties.name,
            "memory_gib": properties.total_memory / 2**30,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "driver": said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    else:
        found["card"] = f"none: CPU {platform.machine()}"
    return found
