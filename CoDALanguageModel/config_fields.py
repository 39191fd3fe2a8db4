"""What the fields of a config.json may hold, of a CoDA model and of those that are converted. Free of torch.

Not here: what they mean, and which values go together (`configuration_coda`).
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from .errors import UserError

ATTENTIONS, BLOCK_ORIGINS = ("full", "block_causal"), ("text", "answer")

_DTYPES = ("float64", "float32", "bfloat16", "float16")

ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
"""Kinds of rotary positions, and what each needs beside `rope_theta`."""


def is_finite(value: Any) -> bool:
    """Whether a value of JSON is a finite number that a float can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_factors(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(is_finite(x) and x > 0 for x in value)


_POSITIVE: tuple[str, Callable[[Any], bool]] = ("a number > 0", lambda x: is_finite(x) and x > 0)
_POSITIVE_OR_NONE: tuple[str, Callable[[Any], bool]] = (
    "a number > 0 or null",
    lambda x: x is None or (is_finite(x) and x > 0),
)
_SIZE: tuple[str, Callable[[Any], bool]] = ("an integer", lambda x: type(x) is int)
_SIZE_OR_NONE: tuple[str, Callable[[Any], bool]] = ("an integer or null", lambda x: x is None or type(x) is int)
_SWITCH: tuple[str, Callable[[Any], bool]] = ("true or false", lambda x: isinstance(x, bool))
_ROPE: tuple[str, Callable[[Any], bool]] = ("an object or null", lambda x: x is None or isinstance(x, Mapping))
_DTYPE: tuple[str, Callable[[Any], bool]] = (
    f"one of {', '.join(_DTYPES)} or null",
    lambda x: x in _DTYPES if isinstance(x, str) else x is None or type(x).__name__ == "dtype",  # torch's own
)


def _one_of(*allowed: str) -> tuple[str, Callable[[Any], bool]]:
    return f"one of {', '.join(allowed)}", lambda x: isinstance(x, str) and x in allowed


FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"), _SIZE),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads"), _SIZE),
    **dict.fromkeys(("num_key_value_heads", "head_dim"), _SIZE_OR_NONE),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "attention_output_bias", "mlp_bias"), _SWITCH),
    **dict.fromkeys(("qk_norm", "logits_shift", "causal_context"), _SWITCH),
    **dict.fromkeys(("dtype", "torch_dtype"), _DTYPE),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), _ROPE),
    "rope_theta": _POSITIVE_OR_NONE,
    "hidden_act": ("the name of an activation", _is_text),
    "initializer_range": ("a number >= 0", lambda x: is_finite(x) and x >= 0),
    "rms_norm_eps": _POSITIVE,
    "attention_dropout": ("a number in [0, 1)", lambda x: is_finite(x) and 0 <= x < 1),
    "architectures": ("a list of names or null", lambda x: x is None or isinstance(x, list) and all(map(_is_text, x))),
    "attention": _one_of(*ATTENTIONS),
    "block_origin": _one_of(*BLOCK_ORIGINS),
}
"""What may be given, in words and as a test, by the field. Others are checked where they are used."""

ROPE_FIELDS = {
    **dict.fromkeys(("rope_theta", "original_max_position_embeddings"), _POSITIVE),
    **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor"), _POSITIVE_OR_NONE),
    **dict.fromkeys(("attention_factor", "beta_fast", "beta_slow"), _POSITIVE_OR_NONE),
    **dict.fromkeys(("short_factor", "long_factor"), ("a list of numbers > 0", _are_factors)),
    "rope_type": _one_of(*ROPE_NEEDS),
    "type": _one_of(*ROPE_NEEDS),
}


def check_fields(values: Mapping[str, Any]) -> None:
    """Refuse a field that holds what is of no use there, before anything is made of it.

    Args:
        values: of a config.json, or some of them by the same names; what is left out is not missed.

    Raises:
        UserError: naming the field, what is allowed and the value got.
    """
    _check(values, FIELDS, "")
    for name in ("rope_parameters", "rope_scaling"):
        rope = values.get(name)
        if not rope:
            continue
        _check(rope, ROPE_FIELDS, f"{name}.")
        nested = next((key for key, value in rope.items() if isinstance(value, Mapping)), None)
        if nested is not None:
            raise UserError(f"{name} must say the same for all layers, got an object of its own for {nested!r}")
        kind = rope.get("rope_type", rope.get("type", "default"))
        for key in ROPE_NEEDS[kind]:
            if rope.get(key) is None:
                raise UserError(f"{name} with rope_type {kind!r} must hold {key}, got {dict(rope)!r}")


def _check(values: Mapping[str, Any], known: Mapping[str, tuple[str, Callable[[Any], bool]]], where: str) -> None:
    for name, (allowed, holds) in known.items():
        if name in values and not holds(values[name]):
            raise UserError(f"{where}{name} must be {allowed}, got {values[name]!r}")
