"""Who may attend to whom: one rule, evaluated by every attention kernel in its own way.

A rule is four integers per position (`Visibility`). `sdpa` and `eager` read it as a boolean mask, `flex_attention` as a
function of two positions, kernels that are registered from outside as the integers themselves; flash attention and
other kernels that know nothing but segments refuse every rule that is more than that.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import eager_attention_forward

from .errors import UserError

NEVER = 2**23
"""A rank above every limit. A float32 holds it, and every place of a row, exactly."""


class Visibility(NamedTuple):
    """Query q may attend to key k if their segments are equal and (their groups are or `rank[k] <= limit[q]`).

    Without group, rank and limit a segment is one group: full attention, at the price of one comparison.
    """

    segment: Tensor
    """(B, T) int, 0 at padding and 1, 2, ... for documents that do not see each other."""

    group: Tensor | None = None
    """(B, T) int, equal where positions of a segment see each other in both directions."""

    rank: Tensor | None = None
    """(B, T) int, when a key comes."""

    limit: Tensor | None = None
    """(B, T) int, the highest rank that a query sees."""

    def mask(self) -> Tensor:
        """(B, 1, T, T) bool, True where the query (third axis) may attend to the key."""
        query, key = ([None if x is None else x.unsqueeze(axis)[:, None] for x in self] for axis in (2, 1))
        return may_attend(query, key)

    def mask_mod(self) -> Callable[[Any, Any, Any, Any], Tensor]:
        """The rule as flex attention takes it: a function of batch row, head, query and key."""
        facts = tuple(self)

        def rule(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return may_attend(*([None if x is None else x[row, place] for x in facts] for place in (query, key)))

        return rule


def may_attend(query: Sequence[Tensor | None], key: Sequence[Tensor | None]) -> Tensor:
    """The formula of `Visibility`, for facts of queries and keys that broadcast."""
    segment, group, _, limit = query
    same = segment == key[0]
    return same if group is None else same & ((group == key[1]) | (key[2] <= limit))


def full(segment_ids: Tensor) -> Visibility:
    """All positions of a segment see each other. `segment_ids` is (B, T) int, here and below."""
    return Visibility(segment_ids)


def causal(segment_ids: Tensor) -> Visibility:
    """A position sees itself and what is before it."""
    return widening(segment_ids, segment_ids.new_zeros(len(segment_ids)))


def widening(segment_ids: Tensor, ahead: Tensor) -> Visibility:
    """A position also sees the next `ahead[b]` ones of row b, (B,) int: causal with 0, full with T."""
    place = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand(segment_ids.shape)
    return Visibility(segment_ids, place, place, place + ahead[:, None])


def block_causal(segment_ids: Tensor, block: Tensor, is_clean: Tensor) -> Visibility:
    """A block sees itself and the clean blocks before it; noised ones are seen by nobody else.

    For rows `[noisy; clean]` that hold each block twice (Arriola et al. 2025, https://arxiv.org/abs/2503.09573), and
    with clean positions alone for attention by blocks.

    Args:
        segment_ids: (B, T) int.
        block: (B, T) int, equal within a block and rising from one block of a text to the next.
        is_clean: (B, T) bool.
    """
    return Visibility(
        segment_ids, 2 * block + is_clean, torch.where(is_clean, block, NEVER), torch.where(is_clean, block, block - 1)
    )


def places(segment_ids: Tensor) -> Tensor:
    """The place of each position in its segment, from 0; (B, T) int64. A run of padding counts like a segment."""
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device)[None]  # (1, T)
    return index - torch.where(run_starts(segment_ids), index, 0).cummax(dim=1).values


def run_starts(numbers: Tensor) -> Tensor:
    """Where runs of equal numbers begin along each row, (B, T) bool."""
    is_start = torch.ones_like(numbers, dtype=torch.bool)
    is_start[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    return is_start


def block_numbers(position_ids: Tensor, block_size: int, answer_start: Tensor | None = None) -> Tensor:
    """The number of each position's block, counted from the start of its text; the shape of `position_ids`, int.

    Args:
        position_ids: (..., T) int, place of each token in its text.
        block_size: tokens per block.
        answer_start: (..., 1) or (..., T) int, place where a block must begin: the first one is then shorter. By
            default at 0.
    """
    return (position_ids + _missing(answer_start, block_size)) // block_size


def block_starts(position_ids: Tensor, block_size: int, answer_start: Tensor | None = None) -> Tensor:
    """The place of the first token of each position's block; below 0 in a shorter first one. See `block_numbers`."""
    return position_ids - (position_ids + _missing(answer_start, block_size)) % block_size


def _missing(answer_start: Tensor | None, block_size: int) -> Tensor | int:
    """Tokens that the first block is shorter by."""
    return 0 if answer_start is None else -answer_start % block_size


def doubled(segment_ids: Tensor, place: Tensor, start: Tensor, *, causal_context: bool = False) -> Visibility:
    """The rule of rows `[noisy; clean]` that hold each text twice.

    Args:
        segment_ids: (B, T) int, of either half.
        place: (B, T) int, of each position in its text.
        start: (B, T) int, place of the first token of its block, see `block_starts`.
        causal_context: whether each clean position is a block of its own, which does not see what it predicts.

    Returns:
        A rule for (B, 2T) positions.
    """
    block = torch.cat([start, place if causal_context else start], dim=1)
    is_clean = torch.zeros_like(block, dtype=torch.bool)
    is_clean[:, start.shape[1] :] = True
    return block_causal(torch.cat([segment_ids, segment_ids], dim=1), block, is_clean)


def rule_of(config: PreTrainedConfig, segment_ids: Tensor, position_ids: Tensor) -> Visibility:
    """The rule of a model's configuration for clean texts; the shapes of both tensors are (B, T)."""
    if not config.has_blocks:
        return full(segment_ids)
    size = 1 if config.causal_context else config.block_size
    block = block_numbers(position_ids, size).expand(segment_ids.shape)
    return block_causal(segment_ids, block, torch.ones_like(segment_ids, dtype=torch.bool))


RULE_KERNELS = {"sdpa", "eager", "flex_attention"}
"""Kernels that evaluate every rule; one that is registered from outside adds its name and is given `visibility`. The
others are given `segment_ids`."""


def layer_mask(
    config: PreTrainedConfig,
    hidden: Tensor,
    attention_mask: Tensor | None,
    segment_ids: Tensor | None,
    visibility: Visibility | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Put "who may attend to whom" into the form that the configured attention kernel reads.

    Args:
        config: of the model; names the kernel.
        hidden: (B, T, hidden_size), for shapes, type and device.
        attention_mask: see `CoDALanguageModel.forward`.
        segment_ids: see `CoDALanguageModel.forward`.
        visibility: see `CoDALanguageModel.forward`.

    Returns:
        The mask and keyword arguments of the kernel.

    Raises:
        UserError: the arguments contradict each other, or the kernel cannot evaluate them.
    """
    kernel = config._attn_implementation
    if visibility is None and segment_ids is not None:
        visibility = full(segment_ids)
    if visibility is not None and attention_mask is not None:
        if attention_mask.ndim == 4:
            raise UserError("segment_ids need a (B, T) attention_mask or none, got a (B, 1, T, T) one")
        visibility = visibility._replace(segment=visibility.segment * attention_mask)
    if visibility is not None and visibility.group is not None and kernel not in RULE_KERNELS:
        raise UserError(
            f"attn_implementation {kernel!r} knows segments alone and no other rule of who may attend to whom: "
            f"take one of {', '.join(sorted(RULE_KERNELS))}"
        )
    if kernel == "flex_attention" and hidden.device.type == "cuda" and torch._dynamo.config.disable:
        raise UserError(
            "attn_implementation 'flex_attention' needs torch.compile on a GPU, which TORCHDYNAMO_DISABLE or "
            "TORCH_COMPILE_DISABLE turns off: without it all scores are kept in memory. Take 'sdpa' instead"
        )
    if attention_mask is not None and attention_mask.ndim == 4:
        if kernel.startswith("flash_attention"):
            raise UserError(f"{kernel} takes no (B, 1, T, T) attention_mask: use attn_implementation 'sdpa'")
        # Flex gains nothing from a mask that is in memory, and compiled for a CPU it writes where it must not: sdpa's.
        return _kernel_mask(attention_mask, "sdpa" if kernel == "flex_attention" else kernel, hidden.dtype), {}
    if kernel in ("sdpa", "eager"):
        if visibility is not None:
            allowed = visibility.mask()
        elif attention_mask is not None:
            allowed = attention_mask.bool()[:, None, None, :]  # (B, 1, 1, T): nobody attends to padding
        else:
            return None, {}
        return _kernel_mask(allowed, kernel, hidden.dtype), {}
    if kernel.startswith("flash_attention"):
        if visibility is not None:
            return None, segment_bounds(visibility.segment)
        return create_bidirectional_mask(config, hidden, attention_mask), {}
    if kernel == "flex_attention":
        rule = None if visibility is None else visibility.mask_mod()
        return create_bidirectional_mask(config, hidden, attention_mask, and_mask_function=rule), {}
    if kernel in RULE_KERNELS:
        return attention_mask, {"visibility": visibility}
    return attention_mask, {"segment_ids": None if visibility is None else visibility.segment}


def attention_kernel(name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function behind `attn_implementation`, with the arguments of transformers' attention functions."""
    if name.startswith("flash_attention"):
        return flash_attention
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)


def flash_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **bounds: Any,
) -> tuple[Tensor, None]:
    """Attention by a flash kernel, without a mask in memory; half precision only.

    transformers' own function for this is passed over: its release 5.6 takes attention sinks for given.

    Args:
        module: the layer's attention.
        query: (B, H, T, D).
        key: (B, H_kv, T, D).
        value: (B, H_kv, T, D).
        attention_mask: (B, T) or none.
        scaling: of the scores.
        dropout: of the attention weights.
        **bounds: of segments, see `segment_bounds`.

    Returns:
        (B, T, H, D), and None for the weights.
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    mixed = _flash_attention_forward(
        query,
        key,
        value,
        attention_mask,
        query_length=query.shape[1],
        is_causal=False,
        dropout=dropout,
        softmax_scale=scaling,
        attn_implementation=module.config._attn_implementation,
        **bounds,
    )
    return mixed, None


def segment_bounds(segment_ids: Tensor) -> dict[str, Any]:
    """Where segments lie in the rows laid end to end, as variable-length kernels want it.

    A run of padding is a segment like others: it attends to itself, and nobody scores it.

    Args:
        segment_ids: (B, T) int, 0 at padding.

    Returns:
        `cu_seq_lens_q` and `cu_seq_lens_k`, the (N + 1,) int32 bounds of N segments, and `max_length_q` and
        `max_length_k`, a bound on their lengths: T, so that no compiled layer depends on the longest.

    Raises:
        ValueError: the ids do not count up along a row, so that the tokens of a segment need not lie side by side.
    """
    is_start = run_starts(segment_ids)
    highest_before = segment_ids.cummax(dim=1).values.roll(1, dims=1)
    highest_before[:, 0] = 0
    if bool((is_start & (segment_ids != 0) & (segment_ids <= highest_before)).any()):
        raise ValueError(
            "segment_ids must count up along each row, with 0 at padding, for kernels of variable length: the tokens "
            "of a segment must lie side by side"
        )
    starts = is_start.flatten().nonzero().flatten()
    bounds = torch.cat([starts, starts.new_tensor([segment_ids.numel()])]).int()
    length = segment_ids.shape[1]
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": length, "max_length_k": length}


def _kernel_mask(allowed: Tensor, kernel: str, dtype: torch.dtype) -> Tensor:
    """A boolean mask as it is for `sdpa`, as an additive one for the others; floats pass through."""
    if kernel == "sdpa" or allowed.dtype != torch.bool:
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)
