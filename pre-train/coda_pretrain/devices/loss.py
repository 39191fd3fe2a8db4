"""The head and its cross-entropy as a loop on the device, whose memory does not grow with the rows.

An unrolled loop of chunks would not do: XLA overlaps its turns, and then holds the logits of all of them.
"""

import torch
import torch_xla.distributed.spmd as xs
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
        chosen: `hardware.loss_chunk`; None for what makes `LOSS_CHUNK_ELEMENTS` logits on a device.
    """
    wanted = max(1, LOSS_CHUNK_ELEMENTS // (vocab_size * rows_of_device)) if chosen is None else chosen
    return min(wanted, seq_len)


def looped_cross_entropy(
    hidden: Tensor,
    labels: Tensor,
    weights: Tensor,
    head: Tensor,
    *,
    chunk: int,
    z_loss: float = 0.0,
    mesh: xs.Mesh | None = None,
) -> Tensor:
    """What `chunked_cross_entropy` gives, with the logits of `chunk` positions of each row in memory at a time.

    The gradients of `hidden` and `head` are made in the same loop as the loss.

    Args:
        hidden: (B, T, hidden_size), row i being the one that scores `labels[:, i]`.
        labels: (B, T) int64, `IGNORE_INDEX` where nothing is scored.
        weights: (B, T) float32.
        head: (V, hidden_size), the head's weight.
        chunk: positions of each row.
        z_loss: see `chunked_cross_entropy`.
        mesh: over (data, fsdp, tensor), B being split over the first two; None for one device.

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
    return _LoopedCrossEntropy.apply(hidden, head, labels, weights, chunk, z_loss, mesh)


class _LoopedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        head: Tensor,
        labels: Tensor,
        weights: Tensor,
        chunk: int,
        z_loss: float,
        mesh: xs.Mesh | None,
    ) -> Tensor:
        needs_gradient = any(ctx.needs_input_grad[:2])
        data, fsdp, _ = (1, 1, 1) if mesh is None else mesh.mesh_shape
        shards = data * fsdp
        ids = torch.arange(head.shape[0], device=head.device, dtype=torch.float32)  # exact up to 2**24
        zero = torch.zeros((), device=head.device)
        # The head is gathered once, and each device sums the gradient of its own rows: inside the loop both would be
        # communication of the head's size at every turn.
        whole = _pinned(head * 1, mesh, ("tensor", None))
        shape = (shards, *head.shape) if needs_gradient else ()
        gradient = torch.zeros(shape, device=head.device)
        if needs_gradient:
            gradient = _pinned(gradient, mesh, (("data", "fsdp"), "tensor", None))

        def turn(carry: tuple[Tensor, ...], x: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
            total, head, gradient, ids = carry
            rows, targets, scales = x  # (S, B / S, c, hidden_size), (S, B / S, c), (S, B / S, c)
            logits = torch.einsum("sbch,vh->sbcv", rows, head).float()
            log_total = logits.logsumexp(-1)  # (S, B / S, c)
            # Compared, not gathered: the vocabulary may be split over devices.
            is_target = (targets[..., None] == ids).float()
            loss = log_total - (logits * is_target).sum(-1) + z_loss * log_total.square()
            total = total + (loss * scales).sum()
            if not needs_gradient:
                return (total, head, gradient, ids), total
            slope = (logits - log_total[..., None]).exp() * (1.0 + 2.0 * z_loss * log_total)[..., None] - is_target
            slope = (slope * scales[..., None]).to(rows.dtype)
            gradient = gradient + torch.einsum("sbcv,sbch->svh", slope, rows).float()
            return (total, head, gradient, ids), torch.einsum("sbcv,vh->sbch", slope, head)

        xs_of_turns = tuple(_split(x, chunk, shards) for x in (hidden, labels.float(), weights))
        with torch.no_grad():
            (total, _, gradient, _), slopes = _scan_impl_pytree(turn, (zero, whole, gradient, ids), xs_of_turns)
        if needs_gradient:
            gradient = _pinned(gradient.sum(0), mesh, ("tensor", "fsdp"))
            ctx.save_for_backward(_join(slopes), gradient.to(head.dtype))
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, scale: Tensor) -> tuple[Tensor | None, ...]:
        slopes, gradient = ctx.saved_tensors
        return slopes * scale.to(slopes.dtype), gradient * scale.to(gradient.dtype), *[None] * 5


def _pinned(x: Tensor, mesh: xs.Mesh | None, spec: tuple[str | tuple[str, ...] | None, ...]) -> Tensor:
    """`x`, a result and no weight, split over the mesh as `spec` says."""
    if mesh is not None:
        xs.mark_sharding(x, mesh, spec)
    return x


def _split(x: Tensor, chunk: int, shards: int) -> Tensor:
    """(B, n * c, ...) to (n, S, B / S, c, ...), a shard being the rows of one device."""
    return x.unflatten(1, (-1, chunk)).unflatten(0, (shards, -1)).movedim(2, 0)


def _join(x: Tensor) -> Tensor:
    """(n, S, B / S, c, ...) to (B, n * c, ...)."""
    return x.movedim(0, 2).flatten(0, 1).flatten(1, 2)
