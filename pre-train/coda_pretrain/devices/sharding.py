"""What lies where on a mesh: partition specs by name, rows of a batch by device. No tensor is touched here."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from CoDALanguageModel.errors import UserError

AXES = ("data", "fsdp", "tensor")

Spec = tuple[str | None, ...]
ActivationSpec = tuple[str | tuple[str, ...] | None, ...]

DEFAULT_RULES: dict[str, Spec] = {
    "model.embed_tokens.weight": ("tensor", "fsdp"),
    "lm_head.weight": ("tensor", "fsdp"),
    "model.layers.*.self_attn.[qkv]_proj.weight": ("tensor", "fsdp"),
    "model.layers.*.self_attn.[qkv]_proj.bias": ("tensor",),
    "model.layers.*.self_attn.o_proj.weight": ("fsdp", "tensor"),
    "model.layers.*.self_attn.o_proj.bias": (None,),
    "model.layers.*.mlp.gate_proj.weight": ("tensor", "fsdp"),
    "model.layers.*.mlp.up_proj.weight": ("tensor", "fsdp"),
    "model.layers.*.mlp.gate_proj.bias": ("tensor",),
    "model.layers.*.mlp.up_proj.bias": ("tensor",),
    "model.layers.*.mlp.down_proj.weight": ("fsdp", "tensor"),
    "model.layers.*.mlp.down_proj.bias": (None,),
    "*norm.weight": (None,),
}
"""Megatron's split of matrix products over `tensor`, everything else over `fsdp`; small vectors are copied.

Every weight needs a rule: one without an explicit spec comes back from the first step with whatever sharding the
compiler propagated, which changes the graph and the checkpoint.
"""


def partition_specs(
    shapes: Iterable[tuple[str, int]], rules: Mapping[str, Sequence[str | None]] | None = None
) -> dict[str, Spec]:
    """The spec of each weight; the first matching pattern decides.

    Args:
        shapes: (name, number of dimensions) of every weight.
        rules: fnmatch pattern -> mesh axis (or None) of each dimension; `DEFAULT_RULES` when None.

    Raises:
        UserError: an unknown axis, a weight that no pattern covers, or a rule of another number of dimensions.
    """
    table = DEFAULT_RULES if rules is None else rules
    for pattern, spec in table.items():
        _check_axes("sharding_rules", pattern, spec)
    specs: dict[str, Spec] = {}
    for name, num_dims in shapes:
        pattern = next((p for p in table if fnmatchcase(name, p)), None)
        if pattern is None:
            raise UserError(f"hardware.sharding_rules has no pattern for the weight {name}; every weight needs one")
        if len(table[pattern]) != num_dims:
            raise UserError(
                f"hardware.sharding_rules[{pattern!r}] must name {num_dims} axes for {name}, got {list(table[pattern])}"
            )
        specs[name] = tuple(table[pattern])
    return specs


def activation_specs(names: Iterable[str], rules: Mapping[str, Sequence[Any]]) -> dict[str, ActivationSpec]:
    """The spec of the output of each module that a pattern covers; the first matching pattern decides.

    Args:
        names: of the model's modules.
        rules: fnmatch pattern -> mesh axis, axes or None of each dimension, of (B, T, features) as a rule.

    Raises:
        UserError: an unknown axis, or a pattern that covers no module.
    """
    for pattern, spec in rules.items():
        _check_axes("activation_rules", pattern, spec)
    specs: dict[str, ActivationSpec] = {}
    unused = set(rules)
    for name in names:
        pattern = next((p for p in rules if fnmatchcase(name, p)), None)
        if pattern is not None:
            unused.discard(pattern)
            specs[name] = tuple(tuple(axes) if isinstance(axes, (list, tuple)) else axes for axes in rules[pattern])
    if unused:
        raise UserError(f"hardware.activation_rules[{min(unused)!r}] covers no module of the model")
    return specs


def _check_axes(setting: str, pattern: str, spec: Sequence[Any]) -> None:
    for entry in spec:
        for axis in entry if isinstance(entry, (list, tuple)) else (entry,):
            if axis is not None and axis not in AXES:
                raise UserError(f"hardware.{setting}[{pattern!r}] must name {', '.join(AXES)} or null, got {axis!r}")


def rows_of_devices(num_rows: int, device_mesh: np.ndarray, devices: Collection[int]) -> list[int]:
    """The rows of a batch that lie on some devices, when rows are split over the axes data and fsdp.

    Args:
        num_rows: rows of the batch, a multiple of data * fsdp.
        device_mesh: (data, fsdp, tensor) ids of all devices. The devices of one tensor group hold the same rows.
        devices: ids, those of one process say. They need not be neighbours in the mesh.

    Returns:
        Row numbers, ascending.
    """
    groups = device_mesh.reshape(-1, device_mesh.shape[-1])  # (data * fsdp, tensor)
    assert num_rows % len(groups) == 0, "the number of rows is checked when the configuration is read"
    size = num_rows // len(groups)
    shards = np.flatnonzero(np.isin(groups, list(devices)).any(axis=1))
    return [int(shard) * size + row for shard in shards for row in range(size)]
