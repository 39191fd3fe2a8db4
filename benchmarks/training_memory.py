"""python benchmarks/training_memory.py: memory that XLA reserves for layers and loss, in bytes, as JSON.

Every case is a process of its own on one virtual CPU device, whose compiler writes a memory report. What is counted is
the temporary memory of one graph, without weights, optimizer state and batch. `--quick` takes small sizes.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}

LAYER_CASES: dict[str, dict[str, Any]] = {
    "loop": {},
    "loop_remat": {"remat": True},
    "scan": {"layers": "scan"},
    "scan_remat": {"layers": "scan", "remat": True},
}
LAYERS = {"num_layers": 12, "hidden_size": 256, "vocab_size": 512, "num_rows": 8, "seq_len": 512}
QUICK_LAYERS = {"num_layers": 4, "hidden_size": 64, "vocab_size": 512, "num_rows": 4, "seq_len": 128}

LOSS_CASES = {"naive": None, "chunked": 64}
"""Positions of each row at a time."""
LOSS = {"hidden_size": 256, "vocab_size": 16384, "num_rows": 4, "seq_len": 1024}
QUICK_LOSS = {"hidden_size": 64, "vocab_size": 4096, "num_rows": 4, "seq_len": 512}


def measure_layers(quick: bool = False) -> dict[str, Any]:
    """Temporary memory of one training step (AdamW, float32) with the layers as a loop or a scan.

    Args:
        quick: small sizes.

    Returns:
        `sizes`, `bytes` of each case of `LAYER_CASES`, and `ratio_to_loop`.
    """
    sizes = QUICK_LAYERS if quick else LAYERS
    found = {name: _measure({"kind": "layers", "settings": s, **sizes}) for name, s in LAYER_CASES.items()}
    return {"sizes": sizes, "bytes": found, "ratio_to_loop": {name: n / found["loop"] for name, n in found.items()}}


def measure_loss(quick: bool = False) -> dict[str, Any]:
    """Temporary memory of head, cross-entropy and both gradients, with all logits at once and in a loop of chunks.

    Args:
        quick: small sizes.

    Returns:
        `sizes`, `bytes` of each case of `LOSS_CASES`, and `chunked_to_naive`.
    """
    sizes = QUICK_LOSS if quick else LOSS
    found = {name: _measure({"kind": "loss", "chunk": chunk, **sizes}) for name, chunk in LOSS_CASES.items()}
    return {"sizes": sizes, "bytes": found, "chunked_to_naive": found["chunked"] / found["naive"]}


def _measure(case: dict[str, Any]) -> int:
    """Temporary bytes of the largest graph of a case."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_dump_to={folder} --xla_dump_hlo_as_text --xla_backend_optimization_level=0"
        environment = {
            **os.environ,
            "XLA_FLAGS": flags,
            "PJRT_DEVICE": "CPU",
            "CPU_NUM_DEVICES": "1",
            "TF_CPP_MIN_LOG_LEVEL": "2",
            "PYTHONPATH": os.pathsep.join([str(REPO), str(REPO / "pre-train"), os.environ.get("PYTHONPATH", "")]),
        }
        command = [sys.executable, __file__, "--case", json.dumps(case)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"the case {case} failed: {result.stderr[-3000:]}")
        reports = [path.read_text() for path in Path(folder).glob("*memory-usage-report.txt")]
    return max(temporary_bytes(report) for report in reports)


def temporary_bytes(report: str) -> int:
    """The size of the preallocated temporary buffer that a memory report of XLA names; 0 if it names none."""
    found = re.findall(r"allocation \d+: (?:size )?([\d.]+)(B|KiB|MiB|GiB)?,? preallocated-temp", report)
    return max((int(float(number) * UNITS[unit or "B"]) for number, unit in found), default=0)


def run_case(case: dict[str, Any]) -> None:
    """Compile and run one case in this process."""
    if case["kind"] == "loss":
        _run_loss(case)
    else:
        _run_layers(case)
    sys.stdout.flush()
    os._exit(0)  # the runtime has nothing more to write, and its threads may not end by themselves


def _run_layers(case: dict[str, Any]) -> None:
    from coda_pretrain.config import OptimizerConfig
    from coda_pretrain.devices import create_backend
    from coda_pretrain.devices.config import HardwareConfig
    from coda_pretrain.train.optim import build_optimizer
    from coda_pretrain.train.step import StepFunctions

    backend = create_backend(HardwareConfig(backend="xla", **case["settings"]))
    model = backend.prepare_model(_network(case))
    config = OptimizerConfig(name="adamw", learning_rate=1e-3)
    optimizer = build_optimizer(config, dict(model.named_parameters()), backend)
    functions = StepFunctions(model, optimizer, max_grad_norm=1.0, backend=backend)
    result = functions.step([_batch(case)], learning_rate=1e-3, count=1)
    assert result.is_finite, f"the step of {case} gave {result}"


def _network(case: dict[str, Any]) -> Any:
    import torch

    from CoDALanguageModel import CoDAConfig, CoDALanguageModel

    torch.manual_seed(0)
    width = case["hidden_size"]
    config = CoDAConfig(
        vocab_size=case["vocab_size"],
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=case["num_layers"],
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        head_dim=32,
        mask_token_id=3,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=2,
    )
    config._attn_implementation = "sdpa"
    return CoDALanguageModel(config).train()


def _batch(case: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    shape = (case["num_rows"], case["seq_len"])
    ids = np.random.default_rng(0).integers(4, case["vocab_size"], shape)
    masked = np.arange(shape[1])[None] % 2 == 1
    return {
        "noised_ids": np.where(masked, 3, ids),
        "labels": np.where(masked, ids, -100),
        "loss_weights": np.full(shape[0], 1.0 / ids.size, dtype=np.float32),
        "position_ids": np.broadcast_to(np.arange(shape[1]), shape),
        "segment_ids": np.ones(shape, dtype=np.int64),
    }


def _run_loss(case: dict[str, Any]) -> None:
    import torch
    import torch.nn.functional as F
    import torch_xla

    from coda_pretrain.devices.loss import looped_cross_entropy

    device = torch_xla.device()
    shape = (case["num_rows"], case["seq_len"])
    hidden = torch.randn(*shape, case["hidden_size"]).to(device).requires_grad_()
    head = torch.randn(case["vocab_size"], case["hidden_size"]).to(device).requires_grad_()
    labels = torch.randint(case["vocab_size"], shape).to(device)
    weights = torch.rand(shape).to(device)
    if case["chunk"] is None:
        nll = F.cross_entropy(F.linear(hidden, head).flatten(0, 1), labels.flatten(), reduction="none")
        loss = (nll * weights.flatten()).sum()
    else:
        loss = looped_cross_entropy(hidden, labels, weights, head, chunk=case["chunk"])
    loss.backward()
    torch_xla.sync(wait=True)
    assert torch.isfinite(loss).item(), f"the loss of {case} is not finite"


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, for a test of the program itself")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        run_case(json.loads(arguments.case))
    report = {"layers": measure_layers(arguments.quick), "loss": measure_loss(arguments.quick)}
    sys.stdout.write(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
