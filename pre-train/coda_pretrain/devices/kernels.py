"""Attention kernels that take rule or segments themselves, registered with transformers for the xla backend.

`segments` is torch's scaled dot-product attention with the mask made inside the layer, where a scan does not keep
it; it evaluates every rule of who may attend to whom. `splash` is the TPU's kernel: no mask and no attention weights
in memory, and key heads are not repeated. It knows segments alone.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from CoDALanguageModel.attention_coda import RULE_KERNELS, Visibility
from CoDALanguageModel.errors import UserError

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
    visibility: Visibility,
    dropout: float = 0.0,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attention by a rule.

    Args:
        module: the layer's attention.
        query: (B, H, T, D).
        key: (B, H_kv, T, D).
        value: (B, H_kv, T, D).
        attention_mask: None; the rule says it all.
        scaling: of the scores.
        visibility: who may attend to whom, in numbers of any type.
        dropout: of the attention weights.
        unused: what other kernels take.

    Returns:
        (B, T, H, D), and None for the weights.
    """
    groups = query.shape[1] // key.shape[1]
    # Under autocast the norms of queries and keys give float32; torch_xla's autocast leaves the mixture as it is.
    query, key = query.to(value.dtype), key.to(value.dtype)
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    mixed = F.scaled_dot_product_attention(
        query, key, value, attn_mask=visibility.mask(), dropout_p=dropout, scale=scaling
    )
    return mixed.transpose(1, 2).contiguous(), None


def register_segment_attention() -> str:
    """Make `segments` known to transformers; its name."""
    ALL_ATTENTION_FUNCTIONS.register(SEGMENT_KERNEL, segment_attention)
    RULE_KERNELS.add(SEGMENT_KERNEL)
    return SEGMENT_KERNEL


LANES = 128
LONGEST_PRODUCT = 512  # keys of one matrix product of splash: its scores take more room than what they are made of


def block_length(seq_len: int, head_dim: int, longest: int) -> int:
    """The longest block of positions, at most `longest`, that splash can cut rows into.

    Raises:
        UserError: `seq_len` or `head_dim` is not a multiple of the 128 lanes of a TPU's vector unit.
    """
    for name, value in (("seq_len", seq_len), ("the model's head_dim", head_dim)):
        if value % LANES:
            raise UserError(f"model.attn_implementation 'splash' needs {name} to be a multiple of {LANES}, got {value}")
    lengths = range(LANES, min(seq_len, longest) + 1, LANES)
    return max(length for length in lengths if seq_len % length == 0)


def register_splash(mesh: Any, *, on_tpu: bool, interpret: bool, longest_block: int) -> None:
    """Make `splash` known to transformers, for one mesh.

    Args:
        mesh: a `torch_xla` mesh over (data, fsdp, tensor); heads are split over `tensor`.
        on_tpu: whether its devices are TPUs.
        interpret: `hardware.interpret_kernels`.
        longest_block: most positions of a block.

    Raises:
        UserError: the devices are no TPUs and the kernel is not to be interpreted, or the other way round, jax is
            not installed, or jax sees fewer devices than the mesh has.
    """
    if on_tpu == interpret:
        raise UserError(
            "model.attn_implementation 'splash' is a TPU kernel: on virtual CPU devices set "
            "hardware.interpret_kernels true (exact and very slow, for tests) or take 'sdpa'; on TPUs set it false"
        )
    try:
        import jax
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
        from torch_xla.experimental import splash_attention
    except ModuleNotFoundError as error:
        raise UserError(
            f"model.attn_implementation 'splash' needs the package {error.name}, which is not installed"
        ) from error
    num_devices = int(mesh.device_ids.size)
    if interpret:
        if jax.device_count() < num_devices:
            raise UserError(
                f"hardware.interpret_kernels needs {num_devices} devices in jax too, it has {jax.device_count()}: "
                f"start the run with XLA_FLAGS=--xla_force_host_platform_device_count={num_devices}"
            )
        # torch_xla's wrapper has no way to say it.
        make = functools.partial(splash_attention_kernel.make_splash_mha, interpret=True)
        splash_attention_kernel.make_splash_mha = make

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        *,
        scaling: float,
        segment_ids: Tensor,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        block = block_length(query.shape[2], query.shape[3], longest_block)
        product = block_length(block, query.shape[3], LONGEST_PRODUCT)
        settings = splash_attention.SplashAttentionConfig(
            mesh=str(mesh),
            qkv_partition_spec=(BATCH_AXES, "tensor", None, None),
            segment_ids_partition_spec=(BATCH_AXES, None),
            **dict.fromkeys(BLOCK_SETTINGS, block),
            **dict.fromkeys(PRODUCT_SETTINGS, product),
        )
        dtype = torch.get_autocast_dtype("xla") if torch.is_autocast_enabled("xla") else query.dtype
        query, key, value = (x.to(dtype) for x in (query * scaling, key, value))
        mixed = splash_attention.splash_attention(
            query, key, value, settings.to_json(), decoder_segment_ids=segment_ids.int(), causal=False
        )
        return mixed.transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register(SPLASH_KERNEL, attention)


BLOCK_SETTINGS = (
    "sa_block_q",
    "sa_block_kv",
    "sa_block_q_dkv",
    "sa_block_kv_dkv",
    "sa_block_q_dq",
    "sa_block_kv_dq",
)
PRODUCT_SETTINGS = ("sa_block_kv_compute", "sa_block_kv_dkv_compute")
