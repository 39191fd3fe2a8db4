"""Plain YAML data to checked dataclasses and back. Nothing here knows what a run is."""

import dataclasses
import types
import typing
from typing import Any, Literal

import yaml

from CoDALanguageModel.errors import UserError, did_you_mean


def require_range(
    name: str,
    value: float,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> None:
    """Check a number against bounds.

    Raises:
        UserError: it is outside; the message names the setting and every bound.
    """
    bounds = [(">=", at_least), ("<=", at_most), (">", above), ("<", below)]
    inside = (
        (at_least is None or value >= at_least)
        and (at_most is None or value <= at_most)
        and (above is None or value > above)
        and (below is None or value < below)
    )
    if not inside:
        wanted = " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)
        raise UserError(f"{name} must be {wanted}, got {value}")


def from_dict(cls: type, data: Any, path: str = "") -> Any:
    """Build the dataclass `cls` from nested plain data, refusing what it does not declare.

    Args:
        cls: a dataclass with real (not textual) field types.
        data: a mapping of field names to plain values.
        path: dotted prefix for messages, ending in a dot unless empty.

    Raises:
        UserError: an unknown key (the nearest known one is named), a missing key, or a value of the wrong type.
    """
    if not isinstance(data, dict):
        raise UserError(f"{path.rstrip('.') or 'the configuration'} must be a mapping, got {data!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            raise UserError(f"unknown key {path}{key}{did_you_mean(key, fields)} (known: {', '.join(fields)})")
    hints = typing.get_type_hints(cls)
    values = {key: convert(hints[key], value, path + key) for key, value in data.items()}
    for name, declared in fields.items():
        required = declared.default is dataclasses.MISSING and declared.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise UserError(f"missing key {path}{name}: it has no default")
    return cls(**values)


def convert(kind: Any, value: Any, name: str) -> Any:
    """Turn a plain YAML value into the declared type `kind`; `name` is for messages.

    Raises:
        UserError: the value does not fit.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, name)
    if dataclasses.is_dataclass(kind):
        return from_dict(kind, value, f"{name}.")
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"{name} must be one of {', '.join(map(str, arguments))}, got {value!r}")
        return value
    if origin in (list, tuple):
        return _convert_sequence(origin, arguments, value, name)
    if origin is dict or kind is dict:
        if not isinstance(value, dict):
            raise UserError(f"{name} must be a mapping, got {value!r}")
        of = arguments[1] if arguments else Any
        return {key: convert(of, item, f"{name}.{key}") for key, item in value.items()}
    return _convert_scalar(kind, value, name)


def _convert_union(arguments: tuple[Any, ...], value: Any, name: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    kinds = [kind for kind in arguments if kind is not type(None)]
    if len(kinds) == 1:
        return convert(kinds[0], value, name)
    errors = []
    for kind in kinds:
        try:
            return convert(kind, value, name)
        except UserError as error:
            errors.append(str(error))
    raise UserError("; or ".join(errors))


def _convert_sequence(origin: type, arguments: tuple[Any, ...], value: Any, name: str) -> Any:
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{name} must be a list, got {value!r}")
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            raise UserError(f"{name} must have {len(arguments)} entries, got {value!r}")
        return tuple(
            convert(kind, item, f"{name}[{i}]") for i, (kind, item) in enumerate(zip(arguments, value, strict=True))
        )
    of = arguments[0] if arguments else Any
    return origin(convert(of, item, f"{name}[{i}]") for i, item in enumerate(value))


def _convert_scalar(kind: type, value: Any, name: str) -> Any:
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 3e-4, without a dot, as text
        except ValueError as error:
            raise UserError(f"{name} must be a number, got {value!r}") from error
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{name} must be {kind.__name__}, got {value!r}")
    return value


def merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """`base` with `extra` laid over it, mappings key by key. Neither argument is changed."""
    result = dict(base)
    for key, value in extra.items():
        old = result.get(key)
        result[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def to_plain(config: Any) -> dict[str, Any]:
    """A dataclass as nested mappings, lists and plain values."""
    return _plain(dataclasses.asdict(config))


def to_yaml(config: Any) -> str:
    """A dataclass as YAML that `from_dict` reads back to an equal one."""
    return yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
