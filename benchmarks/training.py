"""Training measured side by side: `python benchmarks/training.py --room pretrain [--rounds N]`.

Every contender trains the same 20M-parameter model on the same rows, in a process of its own; the processes take turns,
one step each a round, and medians and their ratios to the first one, the baseline, are reported. Results go to
`benchmarks/RESULTS.md`, between the markers of this benchmark, to `benchmarks/training.json` and `training.png`.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
BEGIN, END = "<!-- training:begin -->", "<!-- training:end -->"
ROWS, LENGTH, VOCABULARY = 4, 256, 12_288
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": LENGTH,
}
CONTENDERS: dict[str, dict[str, Any]] = {
    "torch, eager": {"backend": "cpu"},
    "torch.compile": {"backend": "cpu", "compile": True},
    "XLA, 1 device": {"backend": "xla"},
    "XLA, 4 virtual devices": {"backend": "xla"},
}
DEVICES = {"XLA, 4 virtual devices": "4"}
OTHERS = {"memory": "training_memory.py", "reader": "training_reader.py"}
console = Console()


def make_data(folder: Path, *, documents: int = 400, document_length: int = LENGTH) -> None:
    """A tokenizer folder and shards of random tokens below `folder`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from coda_pretrain.data.shards import ShardWriter, build_manifest

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    names = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>", "mask_token": "<|mask|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder / "tokenizer")
    shards = folder / "shards"
    shards.mkdir()
    rng = np.random.default_rng(0)
    with ShardWriter(shards, "train-000000", "uint16") as writer:
        for _ in range(documents):
            writer.add([*rng.integers(300, VOCABULARY, document_length - 1).tolist(), 0])
        record = writer.commit()
    facts = {
        "fingerprint": "benchmark",
        "vocab_size": VOCABULARY,
        "document_end": "<|endoftext|>",
        "document_end_id": 0,
    }
    manifest = build_manifest(split="train", dtype="uint16", shards=[record], tokenizer=facts)
    (shards / "manifest.json").write_text(json.dumps(manifest))


def contend(name: str, folder: Path) -> None:
    """Train as contender `name`: one step for each line on stdin, its seconds and loss on stdout."""
    from coda_pretrain.config import RunConfig
    from coda_pretrain.plain_data import from_dict
    from coda_pretrain.train.trainer import Trainer

    config = {
        "output_dir": str(folder / re.sub(r"\W+", "-", name)),
        "max_steps": 10_000,
        "global_batch_size": ROWS,
        "seq_len": LENGTH,
        "model": {"tokenizer": str(folder / "tokenizer"), "config": SHAPE},
        "data": {"sources": [{"path": str(folder / "shards")}]},
        "optimizer": {"name": "adamw", "learning_rate": 1e-3},
        "hardware": CONTENDERS[name],
        "metrics": {"every": 10_000},
    }
    trainer = Trainer(from_dict(RunConfig, config))
    for _ in sys.stdin:
        started = time.perf_counter()
        before = trainer.state.row_loss
        trainer._step(None)
        seconds, loss = time.perf_counter() - started, trainer.state.row_loss - before
        print(json.dumps({"seconds": seconds, "loss": loss}), flush=True)
    os._exit(0)  # torch_xla may fail in its last moments


def measure(rounds: int, warmup: int = 3) -> dict[str, dict[str, float]]:
    """Seconds of each contender, in turns of one step; the first `warmup` rounds compile and are left out."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder)
        processes = {}
        for contender in CONTENDERS:
            variables = {
                **os.environ,
                "PJRT_DEVICE": "CPU",
                "CPU_NUM_DEVICES": DEVICES.get(contender, "1"),
                "TF_CPP_MIN_LOG_LEVEL": "2",
            }
            processes[contender] = subprocess.Popen(
                [sys.executable, __file__, "--contender", contender, "--folder", name],
                env=variables,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        steps: dict[str, list[dict[str, float]]] = {contender: [] for contender in CONTENDERS}
        for _ in range(warmup + rounds):
            for contender, process in processes.items():
                process.stdin.write("step\n")
                process.stdin.flush()
                line = process.stdout.readline()
                if not line:
                    raise RuntimeError(f"{contender} ended with status {process.wait()}")
                steps[contender].append(json.loads(line))
        for process in processes.values():
            process.stdin.close()
            process.wait()
    medians = {name: statistics.median(step["seconds"] for step in found[warmup:]) for name, found in steps.items()}
    baseline = medians[next(iter(CONTENDERS))]
    return {
        name: {
            "median_s": median,
            "ratio": median / baseline,
            "first_step_s": steps[name][0]["seconds"],
            "loss": steps[name][-1]["loss"],
        }
        for name, median in medians.items()
    }


def other_benchmarks() -> dict[str, Any]:
    """The JSON that the benchmarks beside this one print."""
    results: dict[str, Any] = {}
    for name, script in OTHERS.items():
        done = subprocess.run([sys.executable, HERE / script], stdout=subprocess.PIPE, text=True, check=True)
        results[name] = json.loads(done.stdout)
    return results


def report(results: dict[str, Any], rounds: int) -> list[str]:
    """Markdown of the results, also printed."""
    where = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    table = Table("contender", "median s", "ratio", "first step s", title="pretrain")
    lines = [
        "## Training",
        "",
        f"`python benchmarks/training.py --room pretrain`, CPU: {where}; 20M parameters, {ROWS} x {LENGTH} tokens, "
        f"AdamW, fp32; medians of {rounds} interleaved steps.",
        "",
        "| contender | median s | ratio | first step s |",
        "| --- | --- | --- | --- |",
    ]
    for name, row in results["contenders"].items():
        cells = (f"{row['median_s']:.3f}", f"{row['ratio']:.2f}", f"{row['first_step_s']:.1f}")
        table.add_row(name, *cells)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    console.print(table)
    lines += ["", *findings(results)]
    for line in findings(results):
        console.print(line)
    return [*lines, "", "![seconds per step](training.png)", ""]


def findings(results: dict[str, Any]) -> list[str]:
    """What the benchmarks beside this one found, one line each, with its goal."""
    layers, loss = results["memory"]["layers"], results["memory"]["loss"]
    masking, (reader, _) = results["reader"]["masking"], results["reader"]["reader"]
    step_tokens_per_s = ROWS * LENGTH / next(iter(results["contenders"].values()))["median_s"]
    sizes = layers["sizes"]
    ratios = ", ".join(f"{name.replace('_', ' + ')} {ratio:.2f}" for name, ratio in layers["ratio_to_loop"].items())
    return [
        f"- temporary memory of a step, {sizes['num_layers']} layers, by XLA's report (loop = "
        f"{layers['bytes']['loop'] / 2**20:.0f} MiB): {ratios}",
        f"- memory of the loss, {loss['sizes']['num_rows']} x {loss['sizes']['seq_len']} tokens, vocabulary "
        f"{loss['sizes']['vocab_size']:,}: {loss['bytes']['naive'] / 2**20:.0f} MiB at once, "
        f"{loss['bytes']['chunked'] / 2**20:.0f} MiB in chunks, ratio {loss['chunked_to_naive']:.3f} (goal <= 0.125)",
        f"- masking of {masking['rows']} x {masking['seq_len']} tokens in runs of {masking['span']}, against the "
        f"published windows: {masking['times_faster']:.0f}x less time (goal >= 50x), "
        f"{masking['times_less_memory']:.0f}x less memory (goal >= 100x)",
        f"- reader, one thread, rows of {reader['seq_len']}: {reader['tokens_per_s']:,.0f} tokens/s, "
        f"{reader['tokens_per_s'] / step_tokens_per_s:.0f}x what the eager step consumes (goal >= 5x)",
    ]


def write_section(path: Path, lines: list[str]) -> None:
    """Put the lines between this benchmark's markers in `path`, after what is there if it has none."""
    section = "\n".join([BEGIN, *lines, END])
    text = path.read_text() if path.exists() else "# Benchmark results\n"
    if BEGIN in text and END in text:
        text = text[: text.index(BEGIN)] + section + text[text.index(END) + len(END) :]
    else:
        text = f"{text.rstrip()}\n\n{section}\n"
    path.write_text(text)


def draw(contenders: dict[str, dict[str, float]], path: Path) -> None:
    """A bar for each contender."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 2.2), layout="constrained")
    bars = axis.barh(list(contenders), [row["median_s"] for row in contenders.values()], color="#3b7dd8")
    axis.bar_label(bars, [f"{row['ratio']:.2f}x" for row in contenders.values()], padding=3)
    axis.margins(x=0.12)
    axis.invert_yaxis()
    axis.set_xlabel("seconds per step (median)")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run the benchmark and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--room", choices=["pretrain"], default="pretrain")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=HERE / "RESULTS.md")
    parser.add_argument("--contender", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender is not None:
        contend(options.contender, options.folder)
    results = {"contenders": measure(options.rounds), **other_benchmarks()}
    write_section(options.output, report(results, options.rounds))
    (options.output.parent / "training.json").write_text(json.dumps(results, indent=2) + "\n")
    draw(results["contenders"], options.output.parent / "training.png")


if __name__ == "__main__":
    main()
