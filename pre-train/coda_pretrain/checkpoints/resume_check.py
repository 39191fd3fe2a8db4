"""Whether a checkpoint may be continued: what decides order, shapes and rows must not have changed.

That is a part of the configuration, the content of the token shards, and the model's own configuration.
"""

import json
import logging
from collections.abc import Mapping
from typing import Any

import yaml
from transformers import PretrainedConfig

from CoDALanguageModel.errors import UserError

from ..config import RunConfig
from ..places import Place
from ..plain_data import merge, to_plain

logger = logging.getLogger(__name__)

FIXED = (
    *("seed", "global_batch_size", "seq_len", "data", "optimizer.name", "optimizer.ema_decay"),
    *("objective", "model.config", "model.attention", "model.block_size", "model.block_origin"),
)
"""Changing one of these would silently train on other data or another model, or cannot fit the tensors."""

MACHINE = (
    *("output_dir", "hardware", "checkpoint", "metrics", "micro_batch_size"),
    *("data.root", "data.cache", "data.verify"),
)
"""These change nothing that is learnt."""


def check_same_run(config: RunConfig, checkpoint: Place) -> None:
    """Compare with the configuration in the checkpoint; differences that are allowed are logged.

    Raises:
        UserError: a setting that must stay has changed.
    """
    saved = flatten(yaml.safe_load((checkpoint / "config.yaml").read_text(encoding="utf-8")))
    saved = {"objective": "masked"} | saved  # runs of before there were others do not say it
    current = flatten(to_plain(config))
    changed = sorted(key for key in saved.keys() | current.keys() if saved.get(key) != current.get(key))
    for key in changed:
        if _below(key, MACHINE):
            continue
        if _below(key, FIXED):
            raise UserError(
                f"{key} is {current.get(key)!r}, but the run in {checkpoint} was made with {saved.get(key)!r}; "
                "set it back, or start a new run from its weights: export it, give model.init_from and a new output_dir"
            )
        logger.warning("%s changes from %r to %r at this resume", key, saved.get(key), current.get(key))


DATA_NAME = "data.json"
"""File of a checkpoint: what the run has been trained and evaluated on, and which changes of it were accepted."""


def record_of_data(
    sources: dict[str, dict[str, Any]], checkpoint: Place | None, *, accept_changed: bool
) -> dict[str, Any]:
    """Compare what a run reads with what it read up to the checkpoint that it continues from.

    Args:
        sources: what it reads now: `Mixture.identities` by section of the configuration.
        checkpoint: None at the beginning. One of before this was recorded is taken with a warning.
        accept_changed: go on with other data.

    Returns:
        What its checkpoints hold as `DATA_NAME`: `sources`, and `accepted_changes` with the `step` after
        which, the `source`, `before` and `after`.

    Raises:
        UserError: a source has other content than before and `accept_changed` is not set.
    """
    if checkpoint is None:
        return {"sources": sources, "accepted_changes": []}
    path = checkpoint / DATA_NAME
    if not path.is_file():
        logger.warning(
            "%s does not say which shards it was trained on, so that they are the same now is not known; "
            "what is read from here on is recorded",
            checkpoint,
        )
        return {"sources": sources, "accepted_changes": []}
    saved = json.loads(path.read_text(encoding="utf-8"))
    step = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["step"]
    changes = [
        {"step": step, "source": f"{section} {name}", "before": before, "after": sources[section][name]}
        for section, known in saved["sources"].items()
        for name, before in known.items()
        if sources.get(section, {}).get(name, before) != before
    ]
    listed = "; ".join(f"{change['source']}: {_difference(change['before'], change['after'])}" for change in changes)
    if changes and not accept_changed:
        raise UserError(
            f"the token shards are not those that the run in {checkpoint} has read ({listed}); put the old ones back, "
            "start a new run in another output_dir, or go on with these by --accept_changed_data"
        )
    if changes:
        logger.warning("the run goes on from step %d with other token shards: %s", step, listed)
    return {"sources": merge(saved["sources"], sources), "accepted_changes": [*saved["accepted_changes"], *changes]}


def _difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    lengths = [f"{before[n]} {n} before, {after[n]} now" for n in ("documents", "tokens") if before[n] != after[n]]
    return ", ".join(lengths) or f"as long as before ({before['tokens']} tokens), with other content"


UNIMPORTANT = (
    *PretrainedConfig().to_dict(),
    *("torch_dtype", "auto_map", "initializer_range", "bos_token_id", "eos_token_id", "attn_implementation"),
)
"""Keys of a model's configuration that change nothing in what it learns from a batch."""


def check_same_model(current: Mapping[str, Any], checkpoint: Place) -> None:
    """Compare the model's configuration with the one in the checkpoint: a folder may have been replaced.

    Raises:
        UserError: they differ, so the weights of the checkpoint would mean something else.
    """
    saved = json.loads((checkpoint / "model_config.json").read_text(encoding="utf-8"))
    current = json.loads(json.dumps(current))
    for key in sorted(saved.keys() & current.keys()):
        if key not in UNIMPORTANT and saved[key] != current[key]:
            raise UserError(
                f"the model's {key} is {current[key]!r}, but the run in {checkpoint} was made with {saved[key]!r}: "
                "model.init_from or model.tokenizer is another folder than before; put the old one back"
            )


def _below(key: str, names: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
