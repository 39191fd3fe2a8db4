"""Every rule of who may attend to whom means the same to every kernel."""

import importlib.util
import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from transformers import AttentionInterface, masking_utils
from transformers import modeling_flash_attention_utils as flash_utils

from CoDALanguageModel.attention_coda import (
    block_causal,
    block_numbers,
    block_starts,
    causal,
    doubled,
    full,
    layer_mask,
    places,
    rule_of,
    widening,
)


def causal_mask(num_rows, seq_len):
    return torch.ones(seq_len, seq_len).tril().bool().expand(num_rows, 1, -1, -1)


# ---- rules

SEGMENTS = torch.tensor([[1] * 5 + [2] * 6 + [0], [1] * 12])
AHEAD = torch.tensor([2, 5])
BLOCK = torch.arange(12).expand(2, -1) % 6 // 2  # rows [noised; clean], each block twice
IS_CLEAN = torch.arange(12).expand(2, -1) >= 6
HALVES = torch.ones(2, 12, dtype=torch.long)


def block_sees(row, q, k):
    """The mask of block diffusion in words: own noised block and clean blocks before it; clean blocks causally."""
    same, before = BLOCK[row, k] == BLOCK[row, q], BLOCK[row, k] < BLOCK[row, q]
    if IS_CLEAN[row, q]:
        return IS_CLEAN[row, k] and (same or before)
    return before if IS_CLEAN[row, k] else same


HALF = torch.tensor([[1, 1, 1, 2, 2, 0], [1] * 6])
IN_BLOCKS = [[{0, 1}, {2}, {3, 4}, {5}], [{0}, {1, 2}, {3, 4}, {5}]]  # of 2, those of row 1 from an answer at 3
PACKED = (HALF, places(HALF), block_starts(places(HALF), 2, torch.tensor([[0], [3]])))


def copy_sees(row, q, k, causal_context=False):
    """As `block_sees`, for packed texts; `dense` compares the segments."""
    a, b = q % 6, k % 6
    block = next(block for block in IN_BLOCKS[row] if a in block)
    if q < 6:
        return b in block if k < 6 else b < min(block)
    return k >= 6 and (b <= a if causal_context else b <= max(block))


RULES = {
    "doubled": (doubled(*PACKED), copy_sees),
    "doubled, joint": (
        doubled(*PACKED, causal_context=True),
        lambda row, q, k: copy_sees(row, q, k, causal_context=True),
    ),
    "full": (full(SEGMENTS), lambda row, q, k: True),
    "causal": (causal(SEGMENTS), lambda row, q, k: k <= q),
    "widening": (widening(SEGMENTS, AHEAD), lambda row, q, k: k <= q + AHEAD[row]),
    "all ahead": (widening(SEGMENTS, AHEAD + 12), lambda row, q, k: True),
    "block-causal": (block_causal(HALVES, BLOCK, IS_CLEAN), block_sees),
    "clean blocks": (
        block_causal(SEGMENTS, torch.arange(12).expand(2, -1) // 4, torch.ones(2, 12, dtype=torch.bool)),
        lambda row, q, k: k // 4 <= q // 4,
    ),
}


def dense(name):
    """(B, 1, T, T) bool, position by position."""
    rule, sees = RULES[name]
    allowed = torch.zeros(2, 1, 12, 12, dtype=torch.bool)
    for row, q, k in itertools.product(range(2), range(12), range(12)):
        allowed[row, 0, q, k] = bool(rule.segment[row, q] == rule.segment[row, k]) and bool(sees(row, q, k))
    return allowed


@pytest.mark.parametrize("name", RULES)
def test_a_rule_means_the_same_to_every_kernel(name, make_model, tokens, uncompiled):
    rule, ids = RULES[name][0], tokens(2, 12)
    allowed = dense(name)
    assert torch.equal(rule.mask(), allowed)
    model = make_model()
    with torch.no_grad():
        places = torch.arange(12)[None]
        want = model(ids, attention_mask=allowed, position_ids=places).logits
        for kernel in ("sdpa", "eager", "flex_attention"):
            model.config._attn_implementation = kernel
            assert (model(ids, visibility=rule, position_ids=places).logits - want).abs().max() < 1e-5, kernel


@torch.no_grad()
def test_a_mask_in_memory_goes_to_sdpa_where_flex_is_asked_for(make_model, tokens, uncompiled):
    ids, allowed = tokens(2, 12), dense("block-causal")
    settings = {"attention_mask": allowed, "position_ids": torch.arange(12)[None]}
    want, got = (
        make_model(attn_implementation=kernel)(ids, **settings).logits for kernel in ("sdpa", "flex_attention")
    )
    assert torch.equal(got, want)


@torch.no_grad()
def test_padding_is_seen_by_nobody_under_any_rule(make_model, tokens, uncompiled):
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :2] = mask[1, 9:] = 0
    other = torch.where(mask == 1, ids, tokens(2, 12, seed=9))
    for name, kernel in itertools.product(RULES, ("sdpa", "eager", "flex_attention")):
        model = make_model(attn_implementation=kernel)
        got, changed = (model(x, attention_mask=mask, visibility=RULES[name][0]).logits for x in (ids, other))
        real = (mask == 1) & (RULES[name][0].segment > 0)
        assert torch.equal(got[real], changed[real]), (name, kernel)


def test_blocks_begin_at_the_text_or_at_its_answer():
    place = torch.arange(9)[None].expand(3, -1)
    assert block_numbers(place, 4)[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2]
    starts = torch.tensor([[0], [3], [8]])
    assert block_numbers(place, 4, starts).tolist() == [
        [0, 0, 0, 0, 1, 1, 1, 1, 2],
        [0, 0, 0, 1, 1, 1, 1, 2, 2],
        [0, 0, 0, 0, 1, 1, 1, 1, 2],
    ]
    assert block_starts(place, 4, starts)[1].tolist() == [-1, -1, -1, 3, 3, 3, 3, 7, 7]


def test_a_causal_context_is_read_token_by_token(tiny_config):
    blocks = {"attention": "block_causal", "block_size": 4}
    place = places(SEGMENTS)
    by_block, by_token = (rule_of(tiny_config(**blocks, causal_context=x), SEGMENTS, place) for x in (False, True))
    assert torch.equal(by_token.mask(), causal(SEGMENTS).mask())
    assert not torch.equal(by_block.mask(), by_token.mask())


@torch.no_grad()
def test_the_full_rule_is_segments_to_the_bit(model, tokens):
    ids = tokens(2, 12)
    assert torch.equal(model(ids, visibility=full(SEGMENTS)).logits, model(ids, segment_ids=SEGMENTS).logits)


def test_kernels_that_know_segments_alone_refuse_other_rules(make_model, tokens):
    model, ids = make_model(), tokens(2, 12)
    AttentionInterface.register("segments_alone", lambda *_, **__: pytest.fail("asked"))
    for kernel in ("flash_attention_2", "segments_alone"):
        model.config._attn_implementation = kernel
        with pytest.raises(ValueError, match=f"'{kernel}' knows segments alone .* take one of eager, flex_attention"):
            model(ids, visibility=causal(SEGMENTS))
    with pytest.raises(ValueError, match=r"need a \(B, T\) attention_mask or none"):
        make_model()(ids, visibility=causal(SEGMENTS), attention_mask=causal_mask(2, 12))


# ---- kernels


@torch.no_grad()
def test_sdpa_and_eager_agree_with_every_kind_of_mask(make_model, tokens):
    sdpa, eager = (make_model(attn_implementation=kernel) for kernel in ("sdpa", "eager"))
    ids = tokens(2, 9)
    mask = torch.tensor([[0] * 2 + [1] * 7, [1] * 6 + [0] * 3])
    segments = torch.tensor([[1] * 4 + [2] * 5, [1] * 9])
    for arguments, real in [
        ({}, mask | 1),
        ({"attention_mask": mask}, mask),
        ({"attention_mask": causal_mask(2, 9)}, mask | 1),
        ({"segment_ids": segments}, mask | 1),
    ]:
        difference = (sdpa(ids, **arguments).logits - eager(ids, **arguments).logits)[real == 1]
        assert difference.abs().max() < 1e-5


@pytest.fixture
def uncompiled(monkeypatch):
    """flex_attention as plain torch: the masks are ours, the compiled kernel is not."""
    make = masking_utils.create_block_mask
    monkeypatch.setattr(masking_utils, "create_block_mask", lambda **settings: make(**settings | {"_compile": False}))
    with torch.compiler.set_stance("force_eager"):
        yield


def varlen_reference(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal=False):
    """What a kernel of variable length computes: (N, H, D) rows end to end, each segment by itself."""
    assert q.dtype == k.dtype == v.dtype
    assert not causal
    assert cu_seqlens_q.dtype == torch.int32
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    bounds = cu_seqlens_q.tolist()
    assert (bounds[0], bounds[-1]) == (0, len(q))
    assert max(b - a for a, b in itertools.pairwise(bounds)) <= max_seqlen_q == max_seqlen_k
    heads = [x.transpose(0, 1) for x in (q, k, v)]  # (H, N, D)
    mixed = [
        F.scaled_dot_product_attention(*(x[:, a:b] for x in heads), scale=softmax_scale, enable_gqa=True)
        for a, b in itertools.pairwise(bounds)
    ]
    return torch.cat(mixed, dim=1).transpose(0, 1)


@pytest.fixture
def varlen(monkeypatch):
    """Put the reference in the place of flash-attn, which needs a GPU."""
    helpers = (flash_utils._pad_input, flash_utils._unpad_input)
    monkeypatch.setattr(flash_utils, "_lazy_imports", lambda *_, **__: (None, varlen_reference, None, *helpers))
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)


# Later versions of torch refuse to train with flex on a CPU.
FLEX_TRAINS = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10)
PACKED = torch.tensor([[1] * 4 + [2] * 9 + [3] * 3 + [0] * 3, [1] * 12 + [2] * 7])


@pytest.mark.parametrize("is_bf16", [False, True], ids=["float32", "bf16 autocast"])
def test_every_kernel_agrees_on_packed_rows_in_loss_and_gradient(is_bf16, make_model, tokens, uncompiled, varlen):
    ids = tokens(2, 19)

    def run(kernel):
        model = make_model()
        model.config._attn_implementation = kernel
        trains = kernel != "flex_attention" or FLEX_TRAINS
        with torch.set_grad_enabled(trains), torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            loss = model(ids, segment_ids=PACKED, labels=ids).loss
        if trains:
            loss.backward()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            logits = model(ids, segment_ids=PACKED).logits[PACKED > 0].float()
        gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        return [loss.detach(), logits, *([torch.cat(gradients)] if gradients else [])]

    expected = run("sdpa")
    for kernel in ("eager", "flex_attention", "flash_attention_2"):
        results = run(kernel)
        assert len(results) == (3 if kernel != "flex_attention" or FLEX_TRAINS else 2)
        for found, wanted in zip(results, expected, strict=False):
            assert (found - wanted).norm() / wanted.norm() < (0.02 if is_bf16 else 1e-5), kernel


@torch.no_grad()
def test_flex_and_flash_attention_agree_with_sdpa_on_padding(make_model, tokens, uncompiled, varlen):
    ids = tokens(2, 9)
    mask = torch.tensor([[0] * 2 + [1] * 7, [1] * 6 + [0] * 3])
    segments = torch.tensor([[1] * 4 + [2] * 5, [1] * 9])
    sdpa, other = make_model(), make_model()
    for kernel in ("flex_attention", "flash_attention_2"):
        other.config._attn_implementation = kernel
        for arguments in ({"attention_mask": mask}, {"attention_mask": mask, "segment_ids": segments}):
            difference = (other(ids, **arguments).logits - sdpa(ids, **arguments).logits)[mask == 1]
            assert difference.abs().max() < 1e-4, (kernel, arguments.keys())


@pytest.mark.skipif(not FLEX_TRAINS, reason="this version of torch refuses to train with flex on a CPU")
def test_compiled_layers_with_flex_attention_are_traced_once_for_all_packings(make_model, tokens, uncompiled):
    model, reference = make_model(attn_implementation="flex_attention").train(), make_model().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    graphs = [counters["stats"]["unique_graphs"]]
    with torch.compiler.set_stance("default"):
        for cut in (3, 8, 15):
            ids, segments = tokens(2, 19, seed=cut), 1 + (torch.arange(19) >= cut).long().expand(2, -1)
            losses = []
            for trained in (model, reference):
                trained.zero_grad()
                with torch.autocast("cpu", torch.bfloat16):
                    losses.append(trained(ids, segment_ids=segments, labels=ids).loss)
                losses[-1].backward()
            assert losses[0].item() == pytest.approx(losses[1].item(), rel=0.01)
            got, want = (m.model.layers[0].self_attn.q_proj.weight.grad for m in (model, reference))
            assert (got - want).norm() / want.norm() < 0.05
            graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] < graphs[1] == graphs[-1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kernel", ["flex_attention", "flash_attention_2"])
def test_gpu_kernels_agree_with_sdpa_on_packed_rows(kernel, make_model, tokens):
    if kernel == "flash_attention_2" and not importlib.util.find_spec("flash_attn"):
        pytest.skip("needs flash_attn")
    ids, segments = tokens(2, 19).cuda(), PACKED.cuda()
    runs = []
    for name in ("sdpa", kernel):
        model = make_model(attn_implementation=name).cuda().train()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(ids, segment_ids=segments, labels=ids).loss
        loss.backward()
        runs.append(torch.cat([loss.detach()[None], *(parameter.grad.flatten() for parameter in model.parameters())]))
    assert (runs[1] - runs[0]).norm() / runs[0].norm() < 0.05


def test_what_a_kernel_cannot_take_is_refused(make_model, tokens):
    model, ids = make_model(), tokens(1, 4)
    model.config._attn_implementation = "flash_attention_2"
    for apart in ([1, 2, 1, 1], [2, 2, 1, 1], [1, 0, 1, 1]):
        with pytest.raises(ValueError, match="segment_ids must count up along each row"):
            model(ids, segment_ids=torch.tensor([apart]))
    with pytest.raises(ValueError, match=r"flash_attention_2 takes no \(B, 1, T, T\) attention_mask: use .* 'sdpa'"):
        model(ids, attention_mask=causal_mask(1, 4))
    model.config._attn_implementation = "flex_attention"
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    with (
        torch._dynamo.config.patch(disable=True),
        pytest.raises(ValueError, match="'flex_attention' needs torch.compile on a GPU"),
    ):
        layer_mask(model.config, on_gpu, None, None)


@torch.no_grad()
def test_a_registered_kernel_gets_the_segment_ids_and_no_square_mask(make_model, tokens):
    calls = []

    def kernel(module, query, key, value, attention_mask, *, scaling, segment_ids, **kwargs):
        calls.append((query.shape, key.shape, attention_mask))
        allowed = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        out = F.scaled_dot_product_attention(query, key, value, allowed, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None

    AttentionInterface.register("test_kernel", kernel)
    model, reference = make_model(), make_model()
    model.set_attn_implementation("test_kernel")
    ids, segments = tokens(2, 6), torch.tensor([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 2, 2]])
    got = model(ids, segment_ids=segments).logits
    assert calls == [((2, 4, 6, 16), (2, 2, 6, 16), None)] * 2
    assert (got - reference(ids, segment_ids=segments).logits).abs().max() < 1e-5
