"""`plan --compile-only`: the graphs of a training step compiled by XLA for the mesh, and what it reserves for them.

The compiler is XLA for CPUs with as many virtual devices as the mesh has; it partitions the step as for TPUs but fuses
and schedules in its own way, so its temporary memory is an estimate of a TPU's. No step runs.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from CoDALanguageModel.attention_coda import Visibility
from CoDALanguageModel.errors import UserError

from ..config import RunConfig
from ..plain_data import from_dict, to_plain
from .memory import FLOAT32

UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
GIB = UNITS["GiB"]
ALLOCATION = re.compile(r"^\s*allocation \d+: (?:size )?([\d.]+)(B|KiB|MiB|GiB|TiB)?,? (.*)$", re.MULTILINE)
LARGEST_SHOWN = 6


def compile_step(config: RunConfig, shape: dict[str, Any], num_devices: int) -> list[dict[str, Any]]:
    """Compile every graph of a training step in a process of its own.

    Args:
        config: the run; what it says of data, tokenizer and folders is not used.
        shape: fields of its `CoDAConfig`.
        num_devices: of the mesh, all in one process.

    Returns:
        Per graph: `name`, `compile_s`, and bytes of one device: `arguments` (weights, state, batch and
        constants), `temporary`, `results` (in a run they take the place of arguments), `total` of all three;
        `largest`, a list of the largest allocations, each with `bytes` and `what`.

    Raises:
        UserError: the backend has no graphs, the host has too little memory for the weights, or the step cannot be
            compiled.
    """
    if config.hardware.backend != "xla":
        raise UserError(f"--compile-only needs hardware.backend xla, got {config.hardware.backend!r}")
    with tempfile.TemporaryDirectory() as folder:
        flags = [
            f"--xla_dump_to={folder}",
            "--xla_dump_hlo_as_text",
            "--xla_dump_hlo_module_re=SyncTensorsGraph.*",
            "--xla_backend_optimization_level=0",  # of the machine code, after memory is laid out
            f"--xla_force_host_platform_device_count={num_devices}",
        ]
        environment = {
            **os.environ,
            "XLA_FLAGS": " ".join(flags),
            "PJRT_DEVICE": "CPU",
            "CPU_NUM_DEVICES": str(num_devices),
            "TF_CPP_MIN_LOG_LEVEL": "2",
        }
        settings = {"config": to_plain(config), "shape": shape, "dump": folder}
        result = subprocess.run(
            [sys.executable, "-m", __name__],
            input=json.dumps(settings),
            env=environment,
            capture_output=True,
            text=True,
        )
        if result.returncode != 0:
            last = (result.stderr.strip().splitlines() or ["no message"])[-1]
            if result.returncode == -9:
                last = "it was killed, probably for want of memory"
            raise UserError(f"--compile-only: the step cannot be compiled (exit {result.returncode}): {last}")
        return json.loads(result.stdout.splitlines()[-1])


def read_report(text: str) -> dict[str, Any]:
    """The sizes in one of XLA's memory usage reports; see `compile_step`."""
    kinds = {"arguments": 0, "temporary": 0, "results": 0}
    largest = []
    for number, unit, rest in ALLOCATION.findall(text):
        size = int(float(number) * UNITS[unit or "B"])
        what = rest.strip().rstrip(":").strip()
        kind = "temporary" if "preallocated-temp" in what else "results" if "maybe-live-out" in what else "arguments"
        if "parameter" in what or "constant" in what:
            kind = "arguments"
        kinds[kind] += size
        largest.append({"bytes": size, "what": what})
    largest.sort(key=lambda row: -row["bytes"])
    return {**kinds, "total": sum(kinds.values()), "largest": largest[:LARGEST_SHOWN]}


def print_compilation(graphs: list[dict[str, Any]], console: Console) -> None:
    """Show what `compile_step` returned."""
    columns = ("arguments", "temporary", "results", "total")
    table = Table(title="Memory of one device that XLA reserves (CPU compiler, virtual devices), GiB")
    table.add_column("graph")
    for column in (*columns, "compiled in"):
        table.add_column(column, justify="right")
    for graph in graphs:
        table.add_row(graph["name"], *(f"{graph[c] / GIB:.3f}" for c in columns), f"{graph['compile_s']:.1f} s")
    console.print(table)
    for graph in graphs:
        console.print(f"largest allocations of the {graph['name']}:")
        for row in graph["largest"]:
            console.print(f"  {row['bytes'] / GIB:9.3f} GiB  {row['what']}", highlight=False)


def _check_memory(needed: int) -> None:
    found = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    if found and needed > int(found[1]) * 1024:
        raise UserError(
            f"weights, gradients and optimizer state of the whole mesh need {needed / GIB:.1f} GiB of this machine, "
            f"which has {int(found[1]) / 2**20:.1f} GiB free: give model.config with fewer num_hidden_layers"
        )


def _compile(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Compile in this process, whose environment names the devices and the folder of the reports."""
    import torch_xla
    from transformers.initialization import no_init_weights

    from CoDALanguageModel import CoDAConfig, CoDALanguageModel

    from ..devices import create_backend
    from ..train.assembly import assemble
    from ..train.batches import split_rows

    config = from_dict(RunConfig, settings["config"])
    on_tpu_only = {"offload": False, "interpret_kernels": config.model.attn_implementation == "splash"}
    backend = create_backend(replace(config.hardware, **on_tpu_only))
    backend.prepare_kernel(config.model.attn_implementation)
    shape = CoDAConfig(**settings["shape"])
    shape._attn_implementation = config.model.attn_implementation
    with no_init_weights():  # memory that is never written is never taken
        model = CoDALanguageModel(shape).train()
    parts = split_rows(_batch(config), config.global_batch_size // config.rows_per_micro_batch)
    copies = 1 + 2 * (config.optimizer.name == "adamw") + (config.optimizer.ema_decay is not None) + (len(parts) > 1)
    sizes = [parameter.numel() * FLOAT32 for parameter in model.parameters()]
    _check_memory(sum(sizes) * copies * backend.mesh_shape[0] + 4 * max(sizes))  # the largest is moved with copies
    functions = assemble(config, model, backend).functions
    torch_xla.sync()
    dump, graphs = Path(settings["dump"]), []
    for name, tensors in functions.trace(parts):
        before = set(dump.glob("*memory-usage-report.txt"))
        started = time.perf_counter()
        torch_xla._XLAC._xla_warm_up_cache(tensors, [])
        seconds = time.perf_counter() - started
        reports = [path.read_text() for path in sorted(set(dump.glob("*memory-usage-report.txt")) - before)]
        assert reports, f"XLA wrote no report about the {name}"
        report = max((read_report(text) for text in reports), key=lambda report: report["total"])
        graphs.append({"name": name, "compile_s": seconds, **report})
    return graphs


def _batch(config: RunConfig) -> dict[str, np.ndarray]:
    """A batch of the shapes and types of the run's."""
    rows, length = config.global_batch_size * config.rows_per_sample, config.seq_len
    shape = (rows, 2 * length if config.by_blocks else length)
    ids = np.zeros(shape, dtype=np.int64)
    labels = ids if config.objective == "joint" else ids[:, :length]
    return {
        "noised_ids": ids,
        "labels": labels,
        "loss_weights": np.zeros(labels.shape if config.by_blocks else rows, dtype=np.float32),
        "position_ids": np.broadcast_to(np.arange(shape[1]), shape),
        "segment_ids": ids,
        **(dict.fromkeys(Visibility._fields[1:], ids) if config.by_blocks else {}),
    }


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(_compile(json.load(sys.stdin))) + "\n")
    sys.stdout.flush()
    os._exit(0)  # traced and never run: the runtime must not be asked for values at exit
