"""Whether a checkpoint may be continued under a configuration: what decides order and shapes must not have changed."""

import logging
from typing import Any

import yaml

from .config import RunConfig
from .plain_data import to_plain
from .storage import Place

logger = logging.getLogger(__name__)

FIXED = ("seed", "global_batch_size", "seq_len", "data", "model.config", "optimizer.name", "optimizer.ema_decay")
"""Changing one of these would silently train on other data, or cannot fit the tensors."""

MACHINE = ("output_dir", "hardware", "checkpoint", "metrics", "micro_batch_size", "data.root", "data.cache")
"""These change nothing that is learnt."""


def check_same_run(config: RunConfig, checkpoint: Place) -> None:
    """Compare with the configuration in the checkpoint; differences that are allowed are logged.

    Raises:
        ValueError: a setting that must stay has changed.
    """
    saved = flatten(yaml.safe_load((checkpoint / "config.yaml").read_text(encoding="utf-8")))
    current = flatten(to_plain(config))
    changed = sorted(key for key in saved.keys() | current.keys() if saved.get(key) != current.get(key))
    for key in changed:
        if _below(key, MACHINE):
            continue
        if _below(key, FIXED):
            raise ValueError(
                f"{key} is {current.get(key)!r}, but the run in {checkpoint} was made with {saved.get(key)!r}; "
                "set it back, or start a new run from its weights: export it, give model.init_from and a new output_dir"
            )
        logger.warning("%s changes from %r to %r at this resume", key, saved.get(key), current.get(key))


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
