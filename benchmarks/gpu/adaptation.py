"""SmolLM2-135M becomes a diffusion model in the seconds that are left, by the recipe adapt_smollm2_135m.sh.

Trained on the source code of the running interpreter's standard library and then of its packages; measured on single
lines cut out of files of the standard library that were held out.
"""

import hashlib
import json
import sysconfig
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from training import make_data
from transformers import PreTrainedTokenizerBase

from coda_pretrain.config import ModelConfig
from coda_pretrain.data.shards import ShardWriter, build_manifest, token_dtype
from coda_pretrain.data.tokenization import encode_texts, encoder_of, load_tokenizer
from coda_pretrain.train.learning_rate import learning_rate
from coda_pretrain.train.start import initial_model, load_tokenizer_folder
from coda_pretrain.train.trainer import Trainer
from CoDALanguageModel import CoDALanguageModel

from .section import Section, emit
from .training import run_config

SMOLLM2 = {
    "vocab_size": 49_153,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "qk_norm": False,
    "tie_word_embeddings": True,
    "rope_theta": 100_000.0,
}
"""Its shape, for a random model where there are no weights."""

HELD_OUT = 20
"""One file in so many."""

DOCUMENT_END = "<|endoftext|>"
LEFT, RIGHT, LONGEST_GAP = 256, 128, 24
RESOLUTION = 10_000
"""Steps that a run is said to have: the schedule follows the clock, not the steps."""


def adaptation(section: Section) -> None:
    """Adapt to full attention, and with much time left by blocks too; infilling of held-out lines before and after."""
    names = section.work
    if section.weights is None:
        make_data(names, documents=1)
        tokenizer_folder, start = names / "tokenizer", {"config": shape_of(section)}
    else:
        tokenizer_folder, start = section.weights, {"init_from": str(section.weights)}
    source = {"tokenizer": str(tokenizer_folder), **start}
    tokenizer = load_tokenizer_folder(str(tokenizer_folder), complete=section.weights is not None)
    shards = names / "code"
    held_out: list[str] = []
    with section.measurement(what="corpus", weights="given" if section.weights else "random") as facts:
        held_out = make_shards(section, tokenizer_folder, shards, facts)
    gaps = gaps_of(held_out, tokenizer, 4 if section.is_tiny else 128)
    autoregressive_baseline(section, source, gaps, tokenizer)
    infilling(section, partial(initial_model, ModelConfig(**source), seed=0), gaps, tokenizer, "before")
    objectives = ("masked", "block") if section.left > 240 or section.is_tiny else ("masked",)
    share = section.left / len(objectives)
    for objective in objectives:
        end = time.monotonic() + min(share, section.left)
        kernels = ("flex_attention", "sdpa") if section.on_gpu else ("sdpa",)
        for kernel in kernels:  # the second where the first fails
            if adapt(section, objective, source, shards, end - time.monotonic(), gaps, tokenizer, kernel):
                break


def shape_of(section: Section) -> dict[str, Any]:
    """Fields of a random model; ids of control tokens come from the tokenizer of random data."""
    if not section.is_tiny:
        return SMOLLM2
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim")
    return {name: value for name, value in section.shape().items() if name in names} | {"vocab_size": 12_288}


class TimedTrainer(Trainer):
    """A trainer whose learning rate follows the share of its time that is spent."""

    began, seconds = 0.0, 1.0

    def _rate(self, step: int) -> float:
        share = min((time.monotonic() - self.began) / self.seconds, 1 - 1 / RESOLUTION) if self.began else 0.0
        optimizer, schedule = self.config.optimizer, self.config.schedule
        return learning_rate(int(share * RESOLUTION), num_steps=RESOLUTION, optimizer=optimizer, schedule=schedule)


def adapt(
    section: Section,
    objective: str,
    source: dict[str, Any],
    shards: Path,
    seconds: float,
    gaps: list["Gap"],
    tokenizer: PreTrainedTokenizerBase,
    kernel: str,
) -> bool:
    """Train for so many seconds, compilation included; the rate falls to a tenth over those after the first steps.

    Rows and rate are those of a short run: 64 x 1024 tokens, 3e-4, against 128 x 2048 and 1e-4 of the recipe.

    Returns:
        Whether it went well.
    """
    deadline = time.monotonic() + seconds - (0 if section.is_tiny else 15)  # the infilling afterwards
    rows, length = (4, 64) if section.is_tiny else (64, 1024)
    files = ["adapt", "hardware/gpu", *(["adapt_block"] if objective == "block" else [])]
    changes = {
        "output_dir": str(section.work / f"adapt-{objective}-{kernel}"),
        "max_steps": RESOLUTION,
        "global_batch_size": rows,
        "micro_batch_size": rows // 2,
        "seq_len": length,
        "model": {**source, "attn_implementation": kernel},
        "hardware": {"compile": kernel == "flex_attention"},
        "data": {"sources": [{"path": str(shards)}]},
        "optimizer": {"learning_rate": 3e-4},
        "schedule": {"warmup_steps": RESOLUTION // 20},
        "metrics": {"every": RESOLUTION},
    }
    if objective == "block":
        changes["blocks"] = {"growth_steps": 40}
        if "config" in source:  # a random model says by its shape what it attends to
            changes["model"] |= {"config": {**source["config"], "attention": "block_causal", "block_size": 32}}
            changes["model"] |= {"attention": None, "block_size": None}
    curve: list[dict[str, Any]] = []
    trainer = None
    with section.measurement(objective=objective, kernel=kernel, rows=rows, length=length) as facts:
        trainer = TimedTrainer(run_config(section, files, changes))
        for step in range(3):  # which compile
            started = time.monotonic()
            trainer._step(None)
            facts[f"step_{step + 1}_s"] = time.monotonic() - started
        trainer.began, trainer.seconds = time.monotonic(), max(deadline - time.monotonic(), 1.0)
        state, losses, shown = trainer.state, [], time.monotonic()
        while time.monotonic() < deadline and not (section.is_tiny and state.step > 5):
            known = state.row_loss
            trainer._step(None)
            losses.append(state.row_loss - known)
            if time.monotonic() - shown > 2.0 or state.step == 4:
                mean = sum(losses) / len(losses)
                curve.append({"step": state.step, "loss": mean, "rate": trainer._rate(state.step)})
                emit({"objective": objective, "tokens": state.tokens, **curve[-1]})
                shown, losses = time.monotonic(), []
        spent = time.monotonic() - trainer.began
        facts |= {"steps": state.step, "tokens": state.tokens, "training_s": spent}
        facts["tokens_per_s"] = rows * length * (state.step - 3) / max(spent, 1e-6)
        facts["curve"] = curve
    if trainer is None or "error" in facts:
        return False
    if objective == "masked":
        infilling(section, partial(trained_model, trainer), gaps, tokenizer, "after")
    trainer.close()
    return True


def trained_model(trainer: Trainer) -> CoDALanguageModel:
    """A copy of what was trained, without compiled layers."""
    model = CoDALanguageModel(trainer.model_config)
    model.load_state_dict(trainer.functions.model.state_dict())
    return model


class Gap(NamedTuple):
    """A line cut out of a file."""

    left: list[int]
    line: list[int]
    right: list[int]


def make_shards(section: Section, tokenizer_folder: Path, folder: Path, facts: dict[str, Any]) -> list[str]:
    """Write the shards of the training files; gives the texts that are held out."""
    most = 60_000 if section.is_tiny else 48_000_000
    held_out, texts, size = [], [], 0
    for place, (is_library, name) in enumerate(source_files()):
        text = name.read_text(encoding="utf-8", errors="ignore")
        if is_library and place % HELD_OUT == 0:
            held_out.append(text)
        elif 200 < len(text) < 400_000:
            texts.append(text)
            size += len(text)
        if size > most:
            break
    tokens = load_tokenizer(str(tokenizer_folder), DOCUMENT_END)
    encoder = encoder_of(tokens)
    folder.mkdir()
    dtype = token_dtype(tokens.vocab_size - 1)
    with ShardWriter(folder, "train-000000", dtype) as writer:
        for first in range(0, len(texts), 512):
            for ids in encode_texts(encoder, texts[first : first + 512]):
                if ids is not None and len(ids):
                    writer.add([*ids.tolist(), tokens.document_end_id])
        record = writer.commit()
    manifest = build_manifest(split="train", dtype=dtype, shards=[record], tokenizer=tokens.manifest_entry())
    (folder / "manifest.json").write_text(json.dumps(manifest))
    facts |= {"files": len(texts), "held_out": len(held_out), "mb": size / 1e6, "tokens": record.tokens}
    return held_out


def source_files() -> Iterator[tuple[bool, Path]]:
    """Python files, those of the standard library first, in an order that does not depend on the disk."""
    for is_library, key in ((True, "stdlib"), (False, "purelib")):
        root = Path(sysconfig.get_path(key))
        found = [name for name in root.rglob("*.py") if name.is_file()]
        if is_library:
            found = [name for name in found if not {"site-packages", "dist-packages"} & set(name.parts)]
        for name in sorted(found, key=lambda name: hashlib.sha256(str(name.relative_to(root)).encode()).digest()):
            yield is_library, name


def gaps_of(texts: list[str], tokenizer: PreTrainedTokenizerBase, most: int) -> list[Gap]:
    """Lines of the texts, up to four of each, with what stands around them."""
    gaps = []
    for text in texts:
        lines = text.splitlines(keepends=True)
        for place in range(len(lines) // 6, len(lines) - 2, max(len(lines) // 5, 1)):
            line = lines[place].strip()
            if not 12 <= len(line) <= 80 or line.startswith("#"):
                continue
            indent = lines[place][: len(lines[place]) - len(lines[place].lstrip())]
            if indent.endswith(" "):  # which belongs to the token behind it
                indent, line = indent[:-1], f" {line}"
            around = "".join(lines[max(0, place - 40) : place]) + indent, "\n" + "".join(lines[place + 1 : place + 30])
            left, inside, right = (tokenizer.encode(x, add_special_tokens=False) for x in (around[0], line, around[1]))
            if left and len(inside) <= LONGEST_GAP:
                gaps.append(Gap(left[-LEFT:], inside, right[:RIGHT]))
    step = max(len(gaps) // most, 1)
    return gaps[::step][:most]


def padded(rows: list[list[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows padded on the left, and their attention mask."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids.to(device), mask.to(device)


def ready(section: Section, model: CoDALanguageModel) -> CoDALanguageModel:
    """For decoding on the device; bfloat16 there."""
    model.set_attn_implementation("sdpa")
    return model.to(section.device, torch.bfloat16 if section.on_gpu else torch.float32).eval()


def infilling(
    section: Section,
    make: Callable[[], CoDALanguageModel],
    gaps: list[Gap],
    tokenizer: PreTrainedTokenizerBase,
    when: str,
) -> None:
    """Fill each gap with as many tokens as were cut out, one token a step, the most certain first."""
    with section.measurement(what="infilling", when=when, gaps=len(gaps)) as facts:
        model = ready(section, make())
        filled = []
        for first in range(0, len(gaps), 64):
            part = gaps[first : first + 64]
            rows = [[*gap.left, *[model.config.mask_token_id] * len(gap.line), *gap.right] for gap in part]
            ids, mask = padded(rows, model.config.pad_token_id, section.device)
            settings = {"max_new_tokens": 0, "steps": LONGEST_GAP, "alg": "entropy", "kv_cache": "none"}
            result = model.diffusion_generate(ids, mask, **settings).tolist()
            for gap, row in zip(part, result, strict=True):
                start = len(row) - len(gap.right) - len(gap.line)
                filled.append(row[start : start + len(gap.line)])
        judge(facts, filled, gaps, tokenizer)


def autoregressive_baseline(
    section: Section, source: dict[str, Any], gaps: list[Gap], tokenizer: PreTrainedTokenizerBase
) -> None:
    """The line as the unchanged autoregressive model writes it from what stands before it alone."""
    with section.measurement(what="infilling", when="autoregressive, left side alone", gaps=len(gaps)) as facts:
        facts_of_model = {"attention": "block_causal", "block_size": 1}
        settings = dict(source)
        if "config" in source:
            settings["config"] = {**source["config"], **facts_of_model}
        else:
            settings |= facts_of_model
        model = ready(section, initial_model(ModelConfig(**settings), seed=0))
        written = []
        for first in range(0, len(gaps), 64):
            part = gaps[first : first + 64]
            ids, mask = padded([gap.left for gap in part], model.config.pad_token_id, section.device)
            given = {"max_new_tokens": LONGEST_GAP, "steps": LONGEST_GAP, "alg": "origin"}
            result = model.diffusion_generate(ids, mask, eos_early_stop=False, **given)[:, ids.shape[1] :].tolist()
            written += [row[: len(gap.line)] for gap, row in zip(part, result, strict=True)]
        judge(facts, written, gaps, tokenizer)


def judge(facts: dict[str, Any], found: list[list[int]], gaps: list[Gap], tokenizer: PreTrainedTokenizerBase) -> None:
    """Shares of lines and of tokens that are those of the file, and some samples."""
    facts["equal_lines"] = sum(x == gap.line for x, gap in zip(found, gaps, strict=True)) / len(gaps)
    tokens = [a == b for x, gap in zip(found, gaps, strict=True) for a, b in zip(x, gap.line, strict=True)]
    facts["equal_tokens"] = sum(tokens) / len(tokens)
    facts["samples"] = [
        {
            "before": tokenizer.decode(gap.left[-24:]),
            "line": tokenizer.decode(gap.line),
            "found": tokenizer.decode(x),
            "after": tokenizer.decode(gap.right[:16]),
        }
        for x, gap in islice(zip(found, gaps, strict=True), 6)
    ]
