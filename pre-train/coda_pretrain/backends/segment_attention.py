"""Attention kernels that take segment ids themselves, registered with transformers for the xla backend.

``segments`` is torch's scaled dot-product attention with the mask made inside the layer, where a scan does not keep
it. ``splash`` is the TPU's kernel: no mask and no attention weights in memory, and key and value heads are not repeated.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SEGMENT_KERNEL = "segments"
SPLASH_KERNEL = "splash"
BATCH_AXES = ("data", "fsdp")


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    segment_ids: Tensor,
    dropout: float = 0.0,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attention among positions of the same segment.

    Args:
        module: the layer's attention.
        query: (B, H, T, D).
        key: (B, H_kv, T, D).
        value: (B, H_kv, T, D).
        attention_mask: None; segments say it all.
        scaling: of the scores.
        segment_ids: (B, T), any type.
        dropout: of the attention weights.
        unused: what other kernels take.

    Returns:
        (B, T, H, D), and None for the weights.
    """
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]  # (B, 1, T, T)
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=same, dropout_p=dropout, scale=scaling)
    return mixed.transpose(1, 2).contiguous(), None


def register_segment_attention() -> str:
    """Make ``segments`` known to transformers; its name."""
    ALL_ATTENTION_FUNCTIONS.register(SEGMENT_KERNEL, segment_attention)
    return SEGMENT_KERNEL
