"""Kernels that take segment ids: what they compute, and what splash refuses."""

import pytest
import torch
import torch.nn.functional as F

from coda_pretrain.devices.kernels import (
    block_length,
    register_segment_attention,
    register_splash,
    segment_attention,
)
from CoDALanguageModel import CoDAConfig, CoDALanguageModel
from CoDALanguageModel.attention_coda import full


def test_no_position_attends_outside_of_its_segment_and_key_heads_serve_their_group():
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    segments = torch.tensor([[1.0, 1.0, 1.0, 2.0, 2.0, 0.0]])
    mixed, _ = segment_attention(None, query, key, value, None, scaling=0.5, visibility=full(segments))
    assert mixed.shape == (1, 6, 4, 8)
    for start, end in ((0, 3), (3, 5), (5, 6)):
        for head in range(4):
            parts = (query[:, head, start:end], key[:, head // 2, start:end], value[:, head // 2, start:end])
            alone = F.scaled_dot_product_attention(*parts, scale=0.5)
            torch.testing.assert_close(mixed[:, start:end, head], alone)


@pytest.mark.parametrize("is_bf16", [False, True], ids=["float32", "bf16 autocast"])
def test_the_segment_kernel_agrees_with_sdpa_in_loss_and_gradient(is_bf16):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16, "vocab_size": 72}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    ids = {"mask_token_id": 67, "pad_token_id": 66, "bos_token_id": 64, "eos_token_id": 65}
    tokens = torch.randint(64, (2, 19), generator=torch.Generator().manual_seed(0))
    segments = torch.tensor([[1] * 4 + [2] * 9 + [3] * 3 + [0] * 3, [1] * 12 + [2] * 7])
    found = []
    for kernel in ("sdpa", register_segment_attention()):
        torch.manual_seed(0)
        model = CoDALanguageModel(CoDAConfig(**sizes, **heads, **ids, attn_implementation=kernel))
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            loss = model(tokens, segment_ids=segments, labels=tokens).loss
        loss.backward()
        found.append(torch.cat([loss.detach()[None], *(p.grad.flatten() for p in model.parameters())]))
    assert (found[1] - found[0]).norm() / found[0].norm() < (0.02 if is_bf16 else 1e-5)


def test_blocks_of_splash_divide_the_row():
    lengths = {seq_len: block_length(seq_len, 128, 2048) for seq_len in (128, 384, 2048, 2560, 8192)}
    assert lengths == {128: 128, 384: 384, 2048: 2048, 2560: 1280, 8192: 2048}
    with pytest.raises(ValueError, match="needs seq_len to be a multiple of 128, got 100"):
        block_length(100, 128, 2048)
    with pytest.raises(ValueError, match="needs the model's head_dim to be a multiple of 128, got 64"):
        block_length(128, 64, 2048)


@pytest.mark.parametrize(("on_tpu", "interpret"), [(False, False), (True, True)])
def test_splash_is_refused_where_it_would_not_run(on_tpu, interpret):
    with pytest.raises(ValueError, match="'splash' is a TPU kernel"):
        register_splash(None, on_tpu=on_tpu, interpret=interpret, longest_block=512)
