"""The head and its cross-entropy as a loop on the device, whose memory does not grow with the rows.

An unrolled loop of chunks would not do: XLA overlaps its turns, and then holds the logits of all of them.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch_xla.experimental.scan import _scan_impl_pytree

from CoDALanguageModel.diffusion import IGNORE_INDEX, LOSS_CHUNK_ELEMENTS


def chunk_positions(rows_of_device: int, vocab_size: int, seq_len: int, chosen: int | None) -> int:
    """Positions of each row that go through the head at a time.

    Args:
        rows_of_device: rows of one device.
        vocab_size: V, as one device holds it.
        seq_len: positions of a row.
        chosen: ``hardware.loss_chunk``; None for what makes ``LOSS_CHUNK_ELEMENTS`` logits on a device.
    """
    wanted = max(1, LOSS_CHUNK_ELEMENTS // (vocab_size * rows_of_device)) if chosen is None else chosen
    return min(wanted, seq_len)


def looped_cross_entropy(
    hidden: Tensor, labels: Tensor, weights: Tensor, head: Tensor, *, chunk: int, z_loss: float = 0.0
) -> Tensor:
    """What ``chunked_cross_entropy`` gives, with the logits of ``chunk`` positions of each row in memory at a time.

    The gradients of ``hidden`` and ``head`` are made in the same loop as the loss.

    Args:
        hidden: (B, T, hidden_size), row i being the one that scores ``labels[:, i]``.
        labels: (B, T) int64, ``IGNORE_INDEX`` where nothing is scored.
        weights: (B, T) float32.
        head: (V, hidden_size), the head's weight.
        chunk: positions of each row.
        z_loss: see ``chunked_cross_entropy``.

    Returns:
        0-d float32 tensor.
    """
    positions = hidden.shape[1]
    padding = -positions % chunk
    hidden = torch.nn.functional.pad(hidden, (0, 0, 0, padding))
    labels = torch.nn.functional.pad(labels, (0, padding), value=IGNORE_INDEX)
    weights = torch.nn.functional.pad(weights, (0, padding))
    if torch.is_autocast_enabled("xla"):
        dtype = torch.get_autocast_dtype("xla")
        hidden, head = hidden.to(dtype), head.to(dtype)
    return _LoopedCrossEntropy.apply(hidden, head, labels, weights, chunk, z_loss)


class _LoopedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor, chunk: int, z_loss: float
    ) -> Tensor:
        needs_gradient = any(ctx.needs_input_grad[:2])
        ids = torch.arange(head.shape[0], device=head.device, dtype=torch.float32)  # exact up to 2**24
        zero = torch.zeros((), device=head.device)
        gradient = torch.zeros_like(head, dtype=torch.float32) if needs_gradient else zero

        def turn(carry: tuple[Tensor, ...], x: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
            total, head, gradient, ids = carry
            rows, targets, scales = x  # (B, c, hidden_size), (B, c), (B, c)
            logits = torch.einsum("bch,vh->bcv", rows, head).float()
            log_total = logits.logsumexp(-1)  # (B, c)
            # Compared, not gathered: the vocabulary may be split over devices.
            is_target = (targets[:, :, None] == ids).float()
            loss = log_total - (logits * is_target).sum(-1) + z_loss * log_total.square()
            total = total + (loss * scales).sum()
            if not needs_gradient:
                return (total, head, gradient, ids), total
            slope = (logits - log_total[:, :, None]).exp() * (1.0 + 2.0 * z_loss * log_total)[:, :, None] - is_target
            slope = (slope * scales[:, :, None]).to(rows.dtype)
            gradient = gradient + torch.einsum("bcv,bch->vh", slope, rows).float()
            return (total, head, gradient, ids), torch.einsum("bcv,vh->bch", slope, head)

        xs = tuple(_split(x, chunk) for x in (hidden, labels.float(), weights))
        with torch.no_grad():
            (total, _, gradient, _), slopes = _scan_impl_pytree(turn, (zero, head, gradient, ids), xs)
        if needs_gradient:
            ctx.save_for_backward(_join(slopes), gradient.to(head.dtype))
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, scale: Tensor) -> tuple[Tensor | None, ...]:
        slopes, gradient = ctx.saved_tensors
        return slopes * scale.to(slopes.dtype), gradient * scale.to(gradient.dtype), None, None, None, None


def _split(x: Tensor, chunk: int) -> Tensor:
    """(B, n * c, ...) to (n, B, c, ...)."""
    return x.unflatten(1, (-1, chunk)).transpose(0, 1)


def _join(x: Tensor) -> Tensor:
    """(n, B, c, ...) to (B, n * c, ...)."""
    return x.transpose(0, 1).flatten(1, 2)
