"""Bytes that one chip needs for a training step, before there is a chip.

Weights, gradients and optimizer state follow from shapes and the mesh. What the passes need is counted on a model of
fake tensors, which runs torch's own operations on shapes alone. That is the count of eager torch with a fused
attention kernel; a compiler (torch.compile, XLA) fuses operations and needs less.
"""

import copy
import math
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from CoDALanguageModel import CoDAConfig, CoDALanguageModel
from CoDALanguageModel.attention_coda import full
from CoDALanguageModel.diffusion import LOSS_CHUNK_ELEMENTS
from CoDALanguageModel.errors import UserError

from ..config import RunConfig
from ..devices.backend import check_rows
from ..devices.sharding import AXES, partition_specs
from ..train.optim import build_optimizer, state_tensors

FLOAT32, INT64 = 4, 8
KERNEL = "coda_pretrain_memory"
UPDATE_COPIES = {"adamw": 0, "adafactor": 3}
"""Float32 copies of the largest weight's shard that an update makes for itself."""

MAX_CHUNKS = 3  # of the loss; more of them need no more memory


class Memory(NamedTuple):
    """Bytes on one chip."""

    weights: int
    gradients: int
    optimizer: dict[str, int]  # by name of the state
    gathered: int  # whole weights of fsdp, and their gradients before these are summed and split
    activations: int  # kept by the forward for the backward pass
    working: int  # the most on top: logits of a chunk, one layer's recomputation, gradients in the making, the update
    attention_mask: int  # of kernels that need one
    batch: int

    @property
    def total(self) -> int:
        """The most at any time."""
        return sum(sum(part.values()) if isinstance(part, dict) else part for part in self)


def memory_per_chip(config: RunConfig, shape: CoDAConfig, mesh: tuple[int, int, int], *, masked_share: float) -> Memory:
    """What a step of `config` needs.

    Args:
        config: the run.
        shape: its network.
        mesh: devices along (data, fsdp, tensor).
        masked_share: share of the positions that are scored, in [0, 1]; xla scores all, as its shapes are static.

    Raises:
        UserError: the rows of a micro-batch, or the heads, do not split over the mesh.
    """
    data, fsdp, tensor = mesh
    check_rows("global_batch_size (or micro_batch_size)", config.rows_per_micro_batch, mesh)
    shards = weight_shards(config, shape, mesh)
    optimizer = build_optimizer(config.optimizer, shards, ShapesOnly())
    states: dict[str, int] = {}
    for name, state in state_tensors(optimizer, shards).items():
        kind = name.rpartition(".")[2]
        states[kind] = states.get(kind, 0) + FLOAT32 * state.numel()
    samples, xla = config.rows_per_micro_batch // (data * fsdp), config.hardware.backend == "xla"
    rows, by_blocks = samples * config.rows_per_sample, config.by_blocks
    length = 2 * config.seq_len if by_blocks else config.seq_len
    labelled = length if config.objective == "joint" else config.seq_len  # positions of a row that may be scored
    scored = math.ceil(masked_share * rows * config.seq_len) + rows * (labelled - config.seq_len)
    part = _slice_of_shape(shape, tensor)
    rows_at_once = config.rows_per_micro_batch * config.rows_per_sample
    chunk = max(1, LOSS_CHUNK_ELEMENTS // (shape.vocab_size * (rows_at_once if xla else 1)))
    passes = [
        bytes_of_passes(
            _with_layers(part, layers),
            rows=rows,
            seq_len=length,
            labelled=labelled,
            scored=rows * labelled if xla else scored,
            chunk_rows=chunk * rows if xla else chunk,
            remat=bool(config.hardware.remat),
            bf16=config.hardware.precision == "bf16",
            cast_cache=not xla,
            doubled=by_blocks,
        )
        for layers in (2, 3)
    ]
    # Every layer adds the same to each.
    kept, *peaks = (two + (shape.num_hidden_layers - 2) * (three - two) for two, three in zip(*passes, strict=True))
    weights = FLOAT32 * sum(shard.numel() for shard in shards.values())
    update = UPDATE_COPIES[config.optimizer.name] * FLOAT32 * max(shard.numel() for shard in shards.values())
    needs_mask = config.model.attn_implementation in ("sdpa", "eager") and not xla
    return Memory(
        weights=weights,
        gradients=weights,
        optimizer=states,
        gathered=_gathered_bytes(part) if fsdp > 1 else 0,
        activations=kept,
        working=max(*peaks, update, kept) - kept,
        attention_mask=rows * length**2 if needs_mask else 0,
        # Ids, positions, segments, labels, and what makes a rule of segments; of the next part as well.
        batch=2 * INT64 * rows * ((3 + 3 * by_blocks) * length + labelled),
    )


class ShapesOnly:
    """The `Placement` of tensors without data."""

    traces_steps = True  # these rules keep no count on the device

    def zeros(self, parameter: nn.Parameter, dims: tuple[int, ...]) -> Tensor:
        """See `Placement`."""
        return torch.zeros([parameter.shape[d] for d in dims], device="meta")

    def copy(self, parameter: nn.Parameter) -> Tensor:
        """See `Placement`."""
        return torch.empty_like(parameter)

    def host_scalars(self, values: list[float]) -> list[float]:
        """See `Placement`."""
        return values


def weight_shards(config: RunConfig, shape: CoDAConfig, mesh: tuple[int, int, int]) -> dict[str, nn.Parameter]:
    """The weights of one chip by name, as tensors without data; those that do not divide are rounded up."""
    with torch.device("meta"):
        model = CoDALanguageModel(shape)
    whole = dict(model.named_parameters())
    if config.hardware.backend == "xla":
        specs = partition_specs([(name, p.dim()) for name, p in whole.items()], config.hardware.sharding_rules)
    else:  # FSDP2 splits the first dimension
        specs = {name: ("fsdp", *[None] * (p.dim() - 1)) for name, p in whole.items()}
    parts = {None: 1, **dict(zip(AXES, mesh, strict=True))}
    return {
        name: nn.Parameter(
            torch.empty(
                [-(-size // parts[axis]) for size, axis in zip(p.shape, specs[name], strict=True)], device="meta"
            )
        )
        for name, p in whole.items()
    }


def _slice_of_shape(shape: CoDAConfig, tensor: int) -> CoDAConfig:
    """The part of each layer and of the vocabulary that one of `tensor` devices computes."""
    if tensor == 1:
        return shape
    fields = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    part = copy.deepcopy(shape)
    for name in fields:
        size = getattr(shape, name)
        if size % tensor:
            raise UserError(f"hardware.mesh.tensor must divide the model's {name} {size}, got {tensor}")
        setattr(part, name, size // tensor)
    part.vocab_size = -(-shape.vocab_size // tensor)
    part.mask_token_id = part.pad_token_id = 0
    return part


def _with_layers(shape: CoDAConfig, layers: int) -> CoDAConfig:
    changed = copy.deepcopy(shape)
    changed.num_hidden_layers = layers
    changed._attn_implementation = KERNEL
    return changed


def _gathered_bytes(part: CoDAConfig) -> int:
    """Whole weights that fsdp holds at once, with their gradients: what is outside of the layers, and two layers."""
    with torch.device("meta"):
        model = CoDALanguageModel(_with_layers(part, 1))
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    root = sum(p.numel() for p in model.parameters()) - layer
    return 2 * FLOAT32 * root + (2 + 1) * FLOAT32 * layer  # the next layer's weights come while one is computed


class _SavedAttention(torch.autograd.Function):
    """A fused kernel as memory sees it: keeps queries, keys, values, result and one float32 a row and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = torch.empty_like(query)
        normalizer = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, result, normalizer)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _saved_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    return _SavedAttention.apply(query, key, value).transpose(1, 2), None


AttentionInterface.register(KERNEL, _saved_attention)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that are made inside and still alive, and their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage()) not in given:
                self._add(storage)
        return result

    def _add(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, size)

    def _remove(self, size: int) -> None:
        self.live -= size


class Passes(NamedTuple):
    """Bytes of the passes on one chip; weights and gradients are not in them."""

    kept: int  # from the forward to the backward pass
    forward_peak: int
    backward_peak: int


def bytes_of_passes(
    shape: CoDAConfig,
    *,
    rows: int,
    seq_len: int,
    labelled: int,
    scored: int,
    chunk_rows: int,
    remat: bool,
    bf16: bool,
    cast_cache: bool = True,
    doubled: bool = False,
) -> Passes:
    """Count forward and backward pass of a model of `shape` on fake tensors.

    `seq_len` is the length of a row, and `labelled` the positions of it that may be scored: the half of a row by
    blocks, whose hidden states are then chosen between its copies.
    The loss runs as in `CoDALanguageModel.diffusion`: on `scored` positions, `chunk_rows` at a time, each chunk
    again in the backward pass. `cast_cache`: weights in bf16 live until autocast ends, as eager torch has it.
    """

    def chunk_loss(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model.lm_head(hidden).float(), targets, reduction="none").sum()

    with FakeTensorMode():
        model = CoDALanguageModel(shape).train()
        if remat:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        ids = torch.zeros(rows, seq_len, dtype=torch.long)
        targets = ids[:, :labelled]
        scored = min(scored, MAX_CHUNKS * chunk_rows)
        with LiveBytes() as count:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16, cache_enabled=cast_cache):
                hidden = model.model(ids, position_ids=ids, visibility=full(ids)).last_hidden_state
                if doubled:
                    half = seq_len // 2
                    scoring = torch.where(ids[:, :half, None] > 0, hidden[:, half:], hidden[:, :half])
                    hidden = torch.cat([scoring, hidden[:, half:]], dim=1) if labelled > half else scoring
                    del scoring
                parts = (x.flatten(0, 1)[:scored].split(chunk_rows) for x in (hidden, targets))
                chunks = list(zip(*parts, strict=True))
                if len(chunks) == 1:
                    loss = chunk_loss(*chunks[0])
                else:
                    loss = torch.stack([checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks]).sum()
                del hidden, chunks
            kept, forward_peak, count.peak = count.live, count.peak, count.live
            loss.backward()
        return Passes(kept, forward_peak, count.peak)
