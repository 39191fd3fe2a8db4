"""Kernels that take segment ids: what they compute, and what splash refuses."""

import pytest
import torch
import torch.nn.functional as F

from coda_pretrain.backends.segment_attention import block_length, register_splash, segment_attention


def test_no_position_attends_outside_of_its_segment_and_key_heads_serve_their_group():
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    segments = torch.tensor([[1.0, 1.0, 1.0, 2.0, 2.0, 0.0]])
    mixed, _ = segment_attention(None, query, key, value, None, scaling=0.5, segment_ids=segments)
    assert mixed.shape == (1, 6, 4, 8)
    for start, end in ((0, 3), (3, 5), (5, 6)):
        for head in range(4):
            parts = (query[:, head, start:end], key[:, head // 2, start:end], value[:, head // 2, start:end])
            alone = F.scaled_dot_product_attention(*parts, scale=0.5)
            torch.testing.assert_close(mixed[:, start:end, head], alone)


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
