"""The model card of a folder that is uploaded: what its configuration, runs and score cards say, and no more.

Not here: writing and uploading the folder (`save_hf_model.py`).
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from CoDALanguageModel import CoDALanguageModel
from CoDALanguageModel.config_fields import is_finite
from CoDALanguageModel.decoding_settings import SETTINGS, TOKEN_IDS
from CoDALanguageModel.errors import UserError
from CoDALanguageModel.run_files import is_hub_id

LICENCE = re.compile(r"[a-z0-9]+([.-][a-z0-9]+)*")
"""Identifiers of licences on the Hub."""

USE = """\
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}", trust_remote_code=False)
model = AutoModelForCausalLM.from_pretrained("{repo}", trust_remote_code=True, dtype="auto")
ids = tokenizer("def add(a, b):\\n    ", return_tensors="pt").input_ids
print(tokenizer.decode(model.diffusion_generate(ids, max_new_tokens=64, steps=64)[0], skip_special_tokens=True))
"""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What a folder does not say of itself."""

    license: str
    """Of the weights."""

    backbone: tuple[str, str] | None
    """Name and licence of the model that training began with; None where it began with random weights."""

    data: tuple[tuple[str, str], ...]
    """Name and licence of each data set."""

    stages: tuple[Path, ...] = ()
    """Configurations of the runs, in order: `config.yaml` of pre-training, `run_config.yaml` of fine-tuning."""

    scores: tuple[Path, ...] = ()
    """`scores.json` of evaluations."""


def named_licence(text: str, flag: str) -> tuple[str, str]:
    """`NAME=LICENCE` in its two parts.

    Raises:
        UserError: naming the flag.
    """
    name, sign, licence = (part.strip() for part in text.rpartition("="))
    if not (name and sign and licence):
        raise UserError(f"{flag} must be NAME=LICENCE, got {text!r}")
    return name, licence


def model_card(repo: str, model: CoDALanguageModel, provenance: Provenance, weights: Sequence[str] = ()) -> str:
    """The text of README.md.

    Args:
        repo: name on the Hub.
        model: as it was written.
        provenance: see there.
        weights: hashes, as evaluation makes them, of the folder and of the one that it was made from.

    Raises:
        UserError: a file of the provenance is none, or a score card is of other weights.
    """
    named = [name for name, _ in provenance.data if is_hub_id(name)]
    backbone = provenance.backbone
    facts = ModelCardData(
        license=provenance.license,
        base_model=backbone[0] if backbone and is_hub_id(backbone[0]) else None,
        datasets=named or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["masked-diffusion", "code", "coda"],
    )
    parts = [
        f"---\n{facts.to_yaml()}\n---",
        f"# {repo.rpartition('/')[2]}",
        "A masked-diffusion language model: it writes a text by filling masked tokens in any order.",
        f"```python\n{USE.format(repo=repo)}```",
        "## Architecture\n\n" + _table(("", ""), _architecture(model)),
        "## Decoding settings\n\nUnless a call says otherwise:\n\n" + _table(("setting", "value"), _decoding(model)),
        "## Training\n\n" + _training(provenance),
        "## Licences\n\n" + _table(("", "name", "licence"), _licences(repo, provenance)),
    ]
    cards = [card for file in provenance.scores for card in _read_cards(file, weights)]
    if cards:
        parts.insert(-1, "## Scores\n\n" + _table(SCORE_COLUMNS, map(_score, cards)))
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Any) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(value: Any) -> str:
    """A cell that stays one, whatever a name holds."""
    return re.sub(r"(\\*)\|", r"\1\1\\|", " ".join(str(value).split()))


def _architecture(model: CoDALanguageModel) -> list[tuple[str, Any]]:
    config = model.config
    blocks = f", blocks of {config.block_size} counted from the {config.block_origin}" if config.has_blocks else ""
    tied = "is the embedding" if config.tie_word_embeddings else "has weights of its own"
    return [
        ("parameters", f"{sum(parameter.numel() for parameter in model.parameters()):,}"),
        ("weights", str(model.dtype).removeprefix("torch.")),
        ("layers", config.num_hidden_layers),
        ("hidden size, MLP", f"{config.hidden_size}, {config.intermediate_size}"),
        (
            "heads for queries, for keys and values, size of each",
            f"{config.num_attention_heads}, {config.num_key_value_heads}, {config.head_dim}",
        ),
        ("context", f"{config.max_position_embeddings:,} tokens"),
        ("vocabulary", f"{config.num_token_ids:,} tokens in {config.vocab_size:,} rows"),
        ("attention", config.attention + blocks),
        ("a row of the logits scores", "the next token" if config.logits_shift else "its own token"),
        ("head", tied),
    ]


def _decoding(model: CoDALanguageModel) -> list[tuple[str, str]]:
    settings = model.generation_config
    chosen = {name: getattr(settings, name) for name in SETTINGS if name not in TOKEN_IDS}
    return [(f"`{name}`", f"`{v}`") for name, v in chosen.items() if v != SETTINGS[name].default]


def _training(provenance: Provenance) -> str:
    if not provenance.stages:
        return "The configurations of its runs were not given."
    rows = [(number, *_stage(file)) for number, file in enumerate(provenance.stages, 1)]
    return _table(("", "stage", "data", "length of the run", "batch x tokens", "optimizer"), rows)


def _stage(file: Path) -> tuple[str, str, str, str, str]:
    """Kind, data, length, batch and optimizer of a run."""
    try:
        run = yaml.safe_load(file.read_text(encoding="utf-8"))
        if "data" in run:
            sources = [
                source["path"] + ("" if source.get("weight") is None else f" ({source['weight']:g})")
                for source in run["data"]["sources"]
            ]
            start = "random weights" if run["model"].get("init_from") is None else "an earlier model"
            length = f"{run['max_steps']} steps" if run.get("max_steps") else f"{run['num_epochs']} epochs"
            batch = f"{run['global_batch_size']} x {run['seq_len']}"
            optimizer, schedule = run["optimizer"], run["schedule"]
            how = f"{optimizer['name']}, {schedule['name']}, {optimizer['learning_rate']:g}"
            return f"{run.get('objective', 'masked')} from {start}", ", ".join(sources), length, batch, how
        length = f"{run['max_steps']} steps" if run.get("max_steps", -1) > 0 else f"{run['num_train_epochs']} epochs"
        batch = f"{run['per_device_train_batch_size']} a device x {run['cutoff_len']}"
        how = f"{run.get('lr_scheduler_type', 'linear')}, {float(run['learning_rate']):g}"
        return f"fine-tuning ({run['finetuning_type']})", str(run["dataset"]), length, batch, how
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(
            f"--stage must be the config.yaml of a pre-training run or the run_config.yaml of fine-tuning, got "
            f"{str(file)!r}: {error!r}"
        ) from error


def _licences(repo: str, provenance: Provenance) -> list[tuple[str, str, str]]:
    backbone = provenance.backbone or ("none: training began with random weights", "")
    rows = [("this model", repo, provenance.license), ("backbone", *backbone)]
    return rows + [("data", name, licence) for name, licence in provenance.data]


SCORE_COLUMNS = ("task", "metric", "score", "95 % interval", "n", "settings", "isolation")


def _read_cards(file: Path, weights: Sequence[str]) -> list[Mapping[str, Any]]:
    try:
        cards = json.loads(file.read_text(encoding="utf-8"))
        if not cards:
            raise ValueError("it holds no score")
        for card in cards:
            _score(card)
            found = card["hashes"]["weights"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"--scores must be a scores.json of evaluation, got {str(file)!r}: {error!r}") from error
    for card in cards:
        found = card["hashes"]["weights"]
        if found not in weights:
            raise UserError(
                f"--scores {str(file)!r}: {card['task']} was scored with other weights or another configuration "
                f"(hash {found}) than those of --checkpoint_dir and --output_dir"
            )
    return cards


def _score(card: Mapping[str, Any]) -> tuple[Any, ...]:
    interval, number = card["wilson95"], card["n"]
    if not all(isinstance(card[name], str) for name in ("task", "metric")):
        raise ValueError(f"task and metric must be texts, got {card['task']!r} and {card['metric']!r}")
    if not is_finite(card["score"]):
        raise ValueError(f"score must be a finite number, got {card['score']!r}")
    if number is not None and (type(number) is not int or number < 1):
        raise ValueError(f"n must be a whole number or null, got {number!r}")
    if interval is not None:  # of a share
        is_interval = isinstance(interval, list) and len(interval) == 2 and all(map(is_finite, interval))
        if not is_interval or not 0 <= interval[0] <= interval[1] <= 1 or not 0 <= card["score"] <= 1:
            raise ValueError(f"wilson95 must be two shares, around one in score, or null, got {interval!r}")
    score = f"{100 * card['score']:.1f} %" if interval else f"{card['score']:.4f}"
    low_high = f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}" if interval else ""
    settings = ", ".join(f"{name}={value}" for name, value in (card["settings"]["generation_settings"] or {}).items())
    return card["task"], card["metric"], score, low_high, number or "", settings, card["isolation"] or ""
