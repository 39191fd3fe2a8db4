"""Token shards of given documents, and a run small enough for tests: byte-level tokenizer, two-layer model."""

import copy
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from coda_pretrain.data.shards import ShardWriter, build_manifest

os.environ.setdefault("PJRT_DEVICE", "CPU")

FAST_XLA = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
"""Graphs of the CPU compile in a sixth of the time, and run a little slower."""

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"]


@pytest.fixture(scope="session")
def write_shards() -> Callable[..., Path]:
    """A function that writes lists of token ids as shards; each document gets the document-end token 0."""

    def write(
        folder: Path, documents: list[list[int]], documents_per_shard: int = 1000, fingerprint: str = "test"
    ) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        records = []
        for number, start in enumerate(range(0, len(documents), documents_per_shard)):
            with ShardWriter(folder, f"train-{number:06d}", "uint16") as writer:
                for document in documents[start : start + documents_per_shard]:
                    writer.add([*document, 0])
                records.append(writer.commit())
        tokenizer = {"fingerprint": fingerprint, "vocab_size": 256, "document_end_id": 0}
        manifest = build_manifest(split="train", dtype="uint16", shards=records, tokenizer=tokenizer)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder

    return write


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer folder: one token per byte, and the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        mask_token="<|mask|>",
        additional_special_tokens=["<|im_start|>"],
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shards_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """Token shards of 120 short functions, with a held-out part in `validation/`."""
    from coda_pretrain.data.__main__ import main

    folder = tmp_path_factory.mktemp("shards")
    lines = [f"def add_{i}(x):\n    return x + {i}\n" * (1 + i % 5) for i in range(120)]
    source = folder / "text"
    source.mkdir()
    for i, line in enumerate(lines):
        (source / f"{i}.py").write_text(line)
    arguments = ["--input", str(source), "--tokenizer", str(tokenizer_dir), "--output", str(folder / "shards")]
    assert main([*arguments, "--validation_fraction", "0.2", "--num_workers", "1"]) == 0
    return folder / "shards"


@pytest.fixture(scope="session")
def dirty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every bad input beside good ones: 24 good records in 14 files of which 8 are bad."""
    folder = tmp_path_factory.mktemp("dirty")

    def records(name: str) -> list[str]:
        return [json.dumps({"text": f"{name} {i} " + "word " * (i % 40)}) for i in range(4)]

    bad_records = [
        f'{{"text": "x", "n": {"7" * 5000}}}',
        f'{{"text": "x", "n": {"[" * 5000 + "]" * 5000}}}',
        '{"content": "x"}',
        '["x"]',
        '{"text": 3}',
        '{"text": "\\ud800"}',
        '{"text": "cut',
    ]
    (folder / "a.jsonl").write_text("\n".join([*records("a"), *bad_records]))
    (folder / "bom.jsonl").write_text("\ufeff" + "\n".join(records("bom")), encoding="utf-8")
    pq.write_table(pa.table({"text": [f"parquet {i}" for i in range(4)]}), folder / "c.parquet")
    for name in (b"caf\xe9.jsonl", b"d.ndjson"):
        with open(os.path.join(os.fsencode(folder), name), "w") as file:
            file.write("\n".join(records(name.decode("latin-1"))))
    far = tmp_path_factory.mktemp("far")
    (far / "e.jsonl").write_text("\n".join(records("linked")))
    (folder / "mounted").symlink_to(far)
    (folder / "loop").symlink_to(folder)
    (folder / "gone.jsonl").symlink_to("nowhere")
    (folder / "self.jsonl").symlink_to("self.jsonl")
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "fake.jsonl.gz").write_bytes(b"no gzip")
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress("\n".join(records("cut")).encode())[:-12])
    (folder / "broken.parquet").write_bytes((folder / "c.parquet").read_bytes()[:-30])
    pq.write_table(pa.table({"body": ["x"]}), folder / "shape.parquet")
    (folder / "pointer.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    (folder / "notes.pdf").write_bytes(b"%PDF")
    return folder


@pytest.fixture
def run_config(tmp_path: Path, tokenizer_dir: Path, shards_dir: Path) -> dict[str, Any]:
    """The plain configuration of a run of six steps in `tmp_path / "run"`, to be changed by a test."""
    return copy.deepcopy(
        {
            "output_dir": str(tmp_path / "run"),
            "seed": 3,
            "max_steps": 6,
            "global_batch_size": 8,
            "seq_len": 32,
            "model": {
                "tokenizer": str(tokenizer_dir),
                "config": {
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                    "head_dim": 8,
                    "max_position_embeddings": 64,
                },
            },
            "data": {"sources": [{"path": str(shards_dir)}]},
            "masking": {"prefix_probability": 0.25, "truncate_probability": 0.25, "span_probability": 0.25},
            "optimizer": {"name": "adamw", "learning_rate": 1e-2, "weight_decay": 0.1},
            "schedule": {"name": "linear", "warmup_steps": 2},
            "checkpoint": {"every": None},
            "hardware": {"num_threads": 1},
            "metrics": {"every": 1},
        }
    )


@pytest.fixture
def train_in_process(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """A function that trains a configuration through the command line in a fresh process and gives its metrics rows.

    `num_processes` starts it under torchrun; `environment` is added to this process's one.
    """

    def train(
        config: dict[str, Any], *, num_processes: int = 1, environment: dict[str, str] | None = None
    ) -> list[dict[str, Any]]:
        path = tmp_path / f"{Path(config['output_dir']).name}.yaml"
        path.write_text(yaml.safe_dump(config))
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
        command = [
            sys.executable,
            *(launcher if num_processes > 1 else []),
            "-m",
            "coda_pretrain",
            "--config",
            str(path),
        ]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "2", **FAST_XLA}
        variables |= environment or {}
        result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=900)
        assert result.returncode == 0, result.stderr[-6000:]
        lines = (Path(config["output_dir"]) / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    return train


DRIVER = """
import json, os, signal, sys
import torch
import torch.distributed as dist
from coda_pretrain.config import RunConfig
from coda_pretrain.plain_data import from_dict

rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
torch.set_num_threads(1)
if world > 1:
    dist.init_process_group("gloo")
from coda_pretrain.train.trainer import Trainer

for run in json.loads(sys.argv[1]):
    trainer = Trainer(from_dict(RunConfig, run["config"]))
    step = trainer._step
    def signalled(reporter, trainer=trainer, step=step, run=run):
        if run.get("stop") and rank == world - 1 and trainer.state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(reporter)
    trainer._step = signalled
    trainer.train()
    trainer.close()
if world > 1:
    dist.destroy_process_group()
os._exit(0)
"""
"""Trains the given configurations one after the other; a run with `stop` gets SIGTERM in its third step, on the last
rank only."""


@pytest.fixture
def drive(tmp_path: Path) -> Callable[..., None]:
    """A function that trains several runs (`config`, and `stop` as `DRIVER` reads it) in one launch of processes."""

    def drive(runs: list[dict[str, Any]], *, num_processes: int = 1, environment: dict[str, str] | None = None) -> None:
        driver = tmp_path / "driver.py"
        driver.write_text(DRIVER)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
        command = [sys.executable, *(launcher if num_processes > 1 else []), str(driver), json.dumps(runs)]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "2", **FAST_XLA}
        variables |= environment or {}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-6000:]

    return drive


FAMILIES = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 8}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
}
SHAPE = {
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def autoregressive_folder(folder: Path, family: str) -> Any:
    """A model with random weights, and a byte-level tokenizer without mask and pad tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    model_class, config_class, changes = FAMILIES[family]
    torch.manual_seed(0)
    source = model_class(config_class(**{**SHAPE, **changes})).eval()
    source.save_pretrained(folder)
    return source
