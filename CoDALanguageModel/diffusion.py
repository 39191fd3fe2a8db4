"""The mathematics of masked diffusion: forward process, which row scores which token, and loss, as pure functions.

Not here: the rows of a step (`noise`), and decoding (`decoder`).
"""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100
"""Label of a position that is not scored."""

LOSS_CHUNK_ELEMENTS = 2**26
"""Logits that the chunked loss holds at a time: 256 MiB in float32."""


def named_rng(name: str, *indices: int) -> np.random.Generator:
    """Give the generator that belongs to a name and some indices, the same on every machine and in any order.

    Args:
        name: what is drawn, e.g. `"noise"`; different names give independent streams.
        *indices: non-negative integers that say for what, e.g. seed, sample index and epoch.

    Returns:
        A counter-based Philox generator (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405).

    Raises:
        ValueError: an index is negative, or the name holds a colon, which separates it from the indices.
    """
    if ":" in name:
        raise ValueError(f"the name of a generator must not hold ':', got {name!r}")
    if any(index < 0 for index in indices):
        raise ValueError(f"indices of a named generator must be >= 0, got {indices} for {name!r}")
    text = ":".join([name, *(str(int(index)) for index in indices)])
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def stratified_noise_levels(num_rows: int, offset: float, *, t_min: float = 1e-3) -> np.ndarray:
    """Spread the noise levels of a batch evenly over [t_min, 1], each row's level still being uniform.

    Systematic sampling: `u_b = frac(offset + b / num_rows)`, `t_b = t_min + (1 - t_min) u_b`. It lowers the variance
    of the loss without bias (Kingma et al. 2021, https://arxiv.org/abs/2107.00630, appendix I.1).

    Args:
        num_rows: rows of the global batch.
        offset: one uniform draw in [0, 1), shared by the batch.
        t_min: smallest noise level, in (0, 1).

    Returns:
        (num_rows,) float32, the level of each row.

    Raises:
        ValueError: an argument is out of its range.
    """
    if num_rows < 1:
        raise ValueError(f"num_rows must be at least 1, got {num_rows}")
    if not 0.0 <= offset < 1.0:
        raise ValueError(f"offset must be in [0, 1), got {offset}")
    if not 0.0 < t_min < 1.0:
        raise ValueError(f"t_min must be in (0, 1), got {t_min}")
    u = (offset + np.arange(num_rows) / num_rows) % 1.0
    return (t_min + (1.0 - t_min) * u).astype(np.float32)


class Corruption(NamedTuple):
    """One noised batch and the fact that the loss needs about it."""

    noised_ids: Tensor
    """(B, T) int64: the mask token where masked, else the clean token."""

    masked: Tensor
    """(B, T) bool: True where a token was replaced."""


def corrupt(
    input_ids: Tensor, maskable: Tensor, t: Tensor, uniforms: Tensor, *, mask_token_id: int, span: int | Tensor = 1
) -> Corruption:
    """Mask each maskable position of row b with probability `t[b]`, or its own level, in runs of `span` tokens.

    A run of k tokens starts with probability `1 - (1-t)^(1/k)` at every position, also up to k-1 positions before
    the row, so k independent starts can cover any position and it stays clean with probability exactly `1 - t`,
    at the edges of the row and beside unmaskable positions too. Where levels differ, each position reads the k draws
    by its own: a run may end at a border of blocks, and the probability is exact on both sides of it.

    Args:
        input_ids: (B, T) int64, clean tokens x_0.
        maskable: (B, T) bool, False at prompt, prefix and padding positions.
        t: (B,) float32 in (0, 1], noise level of each row; or (B, T), of each position.
        uniforms: (B, T + K - 1) float32 in [0, 1), K the largest span, drawn by the caller (see `named_rng`).
        mask_token_id: id of the mask token.
        span: length k of the masked runs in tokens: one int, or (B,) int64 with one per row.

    Returns:
        The noised ids x_t and where they were masked.

    Raises:
        ValueError: a shape does not fit `input_ids`, or a span is not in [1, T].
    """
    num_rows, seq_len = input_ids.shape
    if maskable.shape != input_ids.shape:
        raise ValueError(
            f"maskable must have the shape of input_ids {(num_rows, seq_len)}, got {tuple(maskable.shape)}"
        )
    if t.shape not in ((num_rows,), (num_rows, seq_len)):
        raise ValueError(f"t must have shape {(num_rows,)} or {(num_rows, seq_len)}, got {tuple(t.shape)}")
    spans = torch.as_tensor(span, device=input_ids.device).expand(num_rows)
    longest = int(spans.max())
    if int(spans.min()) < 1 or longest > seq_len:
        raise ValueError(f"span must be in [1, {seq_len}], got {span if isinstance(span, int) else spans.tolist()}")
    width = uniforms.shape[-1] if uniforms.ndim == 2 else -1
    if uniforms.ndim != 2 or len(uniforms) != num_rows or width < seq_len + longest - 1:
        raise ValueError(
            f"uniforms must be at least {(num_rows, seq_len + longest - 1)} for span {longest}, "
            f"got {tuple(uniforms.shape)}"
        )

    levels = t[:, None] if t.ndim == 1 else t
    start_probability = -torch.expm1(torch.log1p(-levels) / spans[:, None])  # 1 - (1-t)^(1/k), exact for small t too
    least = torch.empty_like(uniforms[:, :seq_len])  # of the k draws that let a run start that covers a position
    for k in spans.unique().tolist():
        rows = spans == k
        least[rows] = -F.max_pool1d(-uniforms[rows, width - seq_len - k + 1 :], k, stride=1)
    masked = (least < start_probability) & maskable
    return Corruption(torch.where(masked, mask_token_id, input_ids), masked)


def scored_by(
    attention_mask: Tensor | None,
    segment_ids: Tensor | None = None,
    *,
    shift: bool = True,
    doubled_group: Tensor | None = None,
) -> Tensor:
    """For each position the row of the raw logits that scores it, or -1 where none does: the only place of the shift.

    Rows of an autoregressive model, and of one that started as such, predict the token after them: a position is
    scored by the nearest real position on its left, if that belongs to the same segment. Padding on either side, or
    between prompt and canvas, is stepped over. Nothing scores the first position of a row or segment, nor padding.

    Rows `[noisy; clean]` hold each text twice. There the first position of a noisy block is scored by the clean row of
    the block before it, as in decoding, where that block is finished; other positions by their neighbour.

    Args:
        attention_mask: (B, T), 0 at padding; or none, where the segments alone tell.
        segment_ids: (B, T) int, 0 at padding. Without an attention mask the tokens of a segment lie side by side.
        shift: the model's `logits_shift`; without it every real position is scored by its own row.
        doubled_group: (B, T) int, the `group` of rows `[noisy; clean]`, see `attention_coda.doubled`; with
            `segment_ids` alone.

    Returns:
        (B, T) int64.
    """
    assert attention_mask is not None or segment_ids is not None, "without either nobody knows how many rows there are"
    masks = [x != 0 for x in (attention_mask, segment_ids) if x is not None]
    real = masks[0] if len(masks) == 1 else masks[0] & masks[1]
    index = torch.arange(real.shape[1], device=real.device).expand(real.shape)
    if not shift:
        return torch.where(real, index, -1)
    if doubled_group is not None:
        assert attention_mask is None, "the segments tell what is padding"
        half = real.shape[1] // 2
        before = scored_by(None, segment_ids[:, :half])  # of the same half
        is_first = doubled_group[:, :half] != F.pad(doubled_group[:, : half - 1], (1, 0))
        clean = torch.where(before >= 0, before + half, -1)
        return torch.cat([torch.where(is_first, clean, before), clean], dim=1)
    if attention_mask is None:  # a neighbour; costs a comparison on XLA, where a running maximum is dear
        row = index - 1
        is_scored = real & (segment_ids == F.pad(segment_ids[:, :-1], (1, 0)))  # the padded 0 is no segment
    else:
        row = F.pad(torch.where(real, index, -1).cummax(dim=1).values[:, :-1], (1, 0), value=-1)
        is_scored = real & (row >= 0)
        if segment_ids is not None:
            is_scored &= segment_ids == segment_ids.gather(1, row.clamp(min=0))
    return torch.where(is_scored, row, -1)


def chunked_cross_entropy(
    hidden: Tensor,
    labels: Tensor,
    weights: Tensor,
    head: Callable[[Tensor], Tensor],
    vocab_size: int,
    *,
    z_loss: float = 0.0,
) -> Tensor:
    """Weighted sum of the cross-entropies of the labelled rows, without ever holding all their logits.

    The head runs on labelled rows only, a chunk at a time, and again in the backward pass. On XLA and under
    `torch.compile`, where shapes must be static, it runs on all rows with zero weights instead. A module that gathers
    its weights from other processes in each call is called once, with all labelled rows: the number of chunks differs
    between processes, which would wait for each other forever.

    Args:
        hidden: (B, T, hidden_size), row i being the one that scores `labels[:, i]`.
        labels: (B, T) int64, `IGNORE_INDEX` where nothing is scored.
        weights: (B, T) float32, weight of each position.
        head: the language-model head, (..., hidden_size) -> (..., vocab_size): a function or a module.
        vocab_size: V, to size the chunks.
        z_loss: c; adds `c * log(Z_i)^2` to `CE_i`, Z being the sum of the exponentiated logits, which keeps logits
            from drifting (Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, section 5).

    Returns:
        0-d float32 tensor, `sum_i weights_i * CE_i` in nats.
    """

    def chunk_loss(rows: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        logits = head(rows).float().flatten(0, -2)
        nll = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
        if z_loss:
            nll = nll + z_loss * logits.logsumexp(-1).square()  # ignored rows have the weight 0
        return (nll * weight.flatten()).sum()

    if hidden.device.type == "xla" or torch.compiler.is_compiling():
        step = max(1, LOSS_CHUNK_ELEMENTS // (vocab_size * hidden.shape[0]))
        chunks = list(zip(hidden.split(step, 1), labels.split(step, 1), weights.split(step, 1), strict=True))
    else:
        rows = (labels.flatten() != IGNORE_INDEX).nonzero().squeeze(1)  # (N,)
        step = max(1, LOSS_CHUNK_ELEMENTS // vocab_size)
        if isinstance(head, nn.Module) and _gathers_weights(head):
            step = max(1, len(rows))
        parts = (
            x.index_select(0, rows).split(step) for x in (hidden.flatten(0, 1), labels.flatten(), weights.flatten())
        )
        chunks = list(zip(*parts, strict=True))
    # A single chunk fits in memory: recomputing it would cost time and save nothing.
    if len(chunks) == 1 or not torch.is_grad_enabled():
        return sum((chunk_loss(*chunk) for chunk in chunks), start=hidden.new_zeros((), dtype=torch.float32))
    losses = [checkpoint(chunk_loss, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.stack(losses).sum()


def _gathers_weights(module: nn.Module) -> bool:
    """Whether a call of the module is a collective: DeepSpeed's ZeRO-3, FSDP or FSDP2 hold shards of its weights."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel  # a second, for sharded runs only

    return any(isinstance(part, FSDPModule | FullyShardedDataParallel) for part in module.modules()) or any(
        hasattr(parameter, "ds_id") for parameter in module.parameters()
    )
