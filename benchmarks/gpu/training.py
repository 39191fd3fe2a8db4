"""A step of fine-tuning and of pre-training of the published 1.7B shape, as the shipped recipes configure them."""

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from training import make_data

from coda_posttrain import curriculum
from coda_pretrain.config import RunConfig, read_settings
from coda_pretrain.plain_data import from_dict, merge
from coda_pretrain.train.start import initial_model
from coda_pretrain.train.trainer import Trainer
from coda_pretrain.watch.flops import training_flops, work_of_batch
from CoDALanguageModel import CoDAConfig, CoDALanguageModel
from CoDALanguageModel.attention_coda import Visibility
from CoDALanguageModel.noise import Blocks, NoisedRows, deal_levels

from .section import Section

PEAK = 989e12
"""Dense bfloat16 operations a second that the maker of H100 and H200 (SXM) states."""

CONFIGS = Path(__file__).resolve().parents[2] / "pre-train" / "configs"
BLOCK = 32


def sft_step(section: Section) -> None:
    """22 rows of 1024: the settings of coda_sft_stage1.yaml on one GPU, without LLaMA-Factory's own loop.

    float32 weights under bfloat16 autocast, sdpa, recomputed activations, AdamW, clipping to 1; the tail of padding is
    learned, the sum divided by all tokens. Noise is made on the CPU, in the time of the step.
    """
    section.measure_rates()
    rows, length = (4, 64) if section.is_tiny else (22, 1024)
    for objective in ("masked", "block"):
        with section.measurement(objective=objective, rows=rows, length=length) as facts:
            section.require(20)
            fine_tune(section, objective, rows, length, facts)


def fine_tune(section: Section, objective: str, rows: int, length: int, facts: dict[str, Any]) -> None:
    """Take steps and tell of those after the first."""
    with torch.device(section.device):
        model = CoDALanguageModel(CoDAConfig(**section.shape())).train()
    if objective == "block":
        model.config.attention, model.config.block_size = "block_causal", BLOCK
    model.set_attn_implementation("sdpa")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0)
    steps: list[dict[str, Any]] = []

    def step() -> None:
        steps.append(tuning_step(model, optimizer, len(steps), rows, length))

    while len(steps) < 3 or (len(steps) < 12 and section.left > 20 and not section.is_tiny):
        seconds = section.seconds(step)
        steps[-1]["seconds"] = seconds
    told(section, facts, steps[1:] if len(steps) < 6 else steps[3:], rows * length)


def tuning_step(
    model: CoDALanguageModel, optimizer: torch.optim.Optimizer, step: int, num_rows: int, length: int
) -> dict[str, Any]:
    """One optimizer step on random conversations; gives its loss and operations."""
    rng = np.random.default_rng(step)
    config = model.config
    ids = torch.from_numpy(rng.integers(0, config.num_token_ids - 1, (num_rows, length)))
    lengths = torch.from_numpy(rng.integers(length // 4, length, (num_rows, 1)))
    place = torch.arange(length)[None]
    ids, present, tail = curriculum.add_tail(
        ids,
        place < lengths,
        complete=torch.ones(num_rows, dtype=torch.bool),
        num_tokens=length,
        tail_token_id=config.pad_token_id,
        max_length=length,
    )
    prompt = place < lengths // 2
    rows = curriculum.Rows(ids, present, prompt, tail, torch.arange(num_rows) + step * num_rows)
    blocks = Blocks(config.block_size) if config.has_blocks else None
    t = deal_levels(0, step, num_rows, 0.001)
    noised = curriculum.noise(
        rows,
        t,
        share=1.0,
        seed=0,
        sample_ids=rows.sample_ids.tolist(),
        t_min=0.001,
        blocks=blocks,
        span_probability=0.25,
        span_lengths=[4, 8, 16, 32],
        mask_token_id=config.mask_token_id,
        pad_token_id=config.pad_token_id,
        logits_shift=config.logits_shift,
    )
    device, total = model.device, num_rows * length
    if isinstance(noised, NoisedRows):
        segments = present.long()
        inputs = {"input_ids": noised.noised_ids, "attention_mask": segments, "loss_weights": 1 / (t * total)}
    else:
        segments = noised.visibility.segment
        inputs = {"input_ids": noised.input_ids, "position_ids": noised.position_ids}
        inputs["loss_weights"] = noised.weights / total
    inputs = {name: x.to(device) for name, x in (inputs | {"labels": noised.labels}).items()}
    if not isinstance(noised, NoisedRows):
        inputs |= {"visibility": Visibility(*(x.to(device) for x in noised.visibility)), "doubled": True}
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = model(**inputs).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    flops = training_flops(config, work_of_batch(segments.numpy(), noised.labels.numpy(), blocks))
    return {"loss": float(loss.detach()), "flops": flops}


def told(section: Section, facts: dict[str, Any], steps: list[dict[str, Any]], tokens: int) -> None:
    """Median step, tokens a second and the share of peak and of the measured matrix product rate."""
    seconds = float(np.median([step["seconds"] for step in steps]))
    rate = float(np.median([step["flops"] / step["seconds"] for step in steps]))
    facts |= {"steps": len(steps), "step_s": seconds, "tokens_per_s": tokens / seconds, "mfu": rate / PEAK}
    facts["share_of_matmul"] = rate / section.rates["matmul"] if section.rates else None
    facts["loss"] = steps[-1]["loss"]
    if section.on_gpu:
        facts["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30


def pretrain_step(section: Section) -> None:
    """Rows of 8192 through the real trainer with pretrain.yaml and hardware/gpu.yaml, on random documents of 2048."""
    section.measure_rates()
    length = 64 if section.is_tiny else 8192
    folder = section.work
    make_data(folder, documents=64, document_length=length // 4)
    shape = {name: value for name, value in CoDAConfig(**section.shape()).to_dict().items() if name in SHAPE}
    # The vocabulary of the data is that of `make_data`; the ids of control tokens come from its tokenizer.
    shape["vocab_size"] = 12_288 if section.is_tiny else shape["vocab_size"]
    cases = [("masked", 4, {}), ("block", 2, {}), ("masked", 4, {"model": {"attn_implementation": "sdpa"}})]
    for objective, rows, changes in cases:
        kernel = changes.get("model", {}).get("attn_implementation", "flex_attention")
        with section.measurement(objective=objective, rows=rows, length=length, kernel=kernel) as facts:
            section.require(45)
            settings = {
                "output_dir": str(folder / f"{objective}-{kernel}"),
                "max_steps": 10_000,
                "global_batch_size": rows,
                "seq_len": length,
                "objective": objective,
                "model": {"tokenizer": str(folder / "tokenizer"), "config": shape},
                "data": {"sources": [{"path": str(folder / "shards")}]},
                "metrics": {"every": 10_000},
            }
            if objective == "block":
                settings["model"]["config"] = {**shape, "attention": "block_causal", "block_size": BLOCK}
            config = run_config(section, ["pretrain", "hardware/gpu"], merge(settings, changes))
            train(section, config, rows * length, facts)


def train(section: Section, config: RunConfig, tokens: int, facts: dict[str, Any]) -> None:
    """Take steps of the trainer and tell of those after the first."""
    trainer = trainer_on(section.device, Trainer, config)
    steps: list[dict[str, Any]] = []
    try:
        while len(steps) < 4 or (len(steps) < 13 and section.left > 25 and not section.is_tiny):
            batch, blocks = trainer.batches.get(trainer.state.step), trainer.batches.blocks(trainer.state.step)
            work = work_of_batch(batch["segment_ids"], batch["labels"], blocks)
            known = trainer.state.row_loss
            seconds = section.seconds(lambda: trainer._step(None))
            loss = trainer.state.row_loss - known
            steps.append({"seconds": seconds, "flops": training_flops(trainer.model_config, work), "loss": loss})
            facts.setdefault("first_step_s", seconds)
        told(section, facts, steps[len(steps) // 3 :], tokens)
        facts["graphs"] = trainer.backend.compile_count()
    finally:
        trainer.close()


def trainer_on(device: torch.device, kind: type[Trainer], config: RunConfig) -> Trainer:
    """A trainer whose random weights are drawn on the device, where that takes a moment and not half a minute."""

    def drawn(*arguments: Any, **settings: Any) -> CoDALanguageModel:
        with device:
            return initial_model(*arguments, **settings)

    with mock.patch("coda_pretrain.train.trainer.initial_model", drawn):
        return kind(config)


SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


def run_config(section: Section, files: list[str], changes: dict[str, Any]) -> RunConfig:
    """A shipped configuration with changes; on a machine without a GPU also those that it needs to run at all."""
    settings = merge(read_settings([str(CONFIGS / f"{name}.yaml") for name in files], []), changes)
    if not section.on_gpu:
        settings = merge(settings, {"model": {"attn_implementation": "sdpa"}})
        settings = merge(settings, {"hardware": {"backend": "cpu", "compile": False}})
    return from_dict(RunConfig, settings)
