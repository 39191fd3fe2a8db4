import itertools
import shutil

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from CoDALanguageModel import CoDALanguageModel, diffusion
from CoDALanguageModel.diffusion import IGNORE_INDEX
from CoDALanguageModel.modeling_coda import CoDAForMaskedLM

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SHAPE = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "max_position_embeddings initializer_range"
).split()
# (our configuration, the class and the extra arguments of the autoregressive twin)
TWINS = {
    "qwen3": ({}, Qwen3ForCausalLM, Qwen3Config, {}),
    "qwen3-wide-heads": ({"head_dim": 24}, Qwen3ForCausalLM, Qwen3Config, {}),
    "qwen3-bias": ({"attention_bias": True, "attention_output_bias": True}, Qwen3ForCausalLM, Qwen3Config, {}),
    "qwen2": ({"attention_bias": True, "qk_norm": False, "head_dim": 8}, Qwen2ForCausalLM, Qwen2Config, {}),
    "llama": ({"qk_norm": False}, LlamaForCausalLM, LlamaConfig, {}),
    "llama-bias": (
        {"qk_norm": False, "attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
        LlamaForCausalLM,
        LlamaConfig,
        {"attention_bias": True, "mlp_bias": True},
    ),
    "llama3-rope": ({"qk_norm": False, "rope_parameters": LLAMA3_ROPE}, LlamaForCausalLM, LlamaConfig, {}),
    "smollm2": (
        {"qk_norm": False, "head_dim": 8, "num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 24}
        | {"tie_word_embeddings": True},
        LlamaForCausalLM,
        LlamaConfig,
        {},
    ),
}


def align_logits(logits):
    """Logits one step right, so that row i scores token i; position 0, which is never masked, keeps its own."""
    return torch.cat([logits[:, :1], logits[:, :-1]], dim=1)


def masked_diffusion_loss(logits, target_ids, masked, t):
    """Equation 6 of the CoDA report over aligned logits, in nats a token: `sum_i 1[masked_i] CE_i / t`, over B x T."""
    nll = F.cross_entropy(logits.float().transpose(1, 2), target_ids, reduction="none")  # (B, T)
    scored = masked.clone()
    scored[:, 0] = False
    return (nll * scored / t[:, None]).sum() / target_ids.numel()


def make_twins(name, make_model, **changes):
    """Our model and the autoregressive one of transformers, with the same random weights."""
    ours_changes, twin_class, twin_config, extra = TWINS[name]
    ours = make_model(seed=1, **ours_changes, **changes)
    config = ours.config
    arguments = {key: getattr(config, key) for key in SHAPE} | {
        "rope_parameters": dict(config.rope_parameters),
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "pad_token_id": None,
    }
    if twin_config is not Qwen2Config:
        arguments |= {"head_dim": config.head_dim, "attention_bias": config.attention_bias}
    with torch.no_grad():  # biases and norms start as zeros and ones, which would hide a mistake
        for parameter in ours.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.3)
    theirs = twin_class(twin_config(**{**arguments, **extra})).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def causal_mask(num_rows, seq_len):
    return torch.ones(seq_len, seq_len).tril().bool().expand(num_rows, 1, -1, -1)


@pytest.mark.parametrize("name", TWINS)
@torch.no_grad()
def test_with_a_causal_mask_it_equals_the_autoregressive_model(name, make_model, tokens):
    ours, theirs = make_twins(name, make_model)
    ids = tokens(2, 40)
    got = ours(ids, attention_mask=causal_mask(2, 40)).logits
    assert (got - theirs(ids).logits).abs().max() < 1e-5 * got.abs().max().clamp(min=1)
    assert not torch.allclose(got, ours(ids).logits, atol=1e-2)  # without it, every token sees every other


@pytest.mark.parametrize("name", TWINS)
@torch.no_grad()
def test_blocks_of_one_are_the_autoregressive_model(name, make_model, tokens):
    ours, theirs = make_twins(name, make_model, attention="block_causal", block_size=1)
    ids, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.long)
    want = theirs(ids).logits
    assert (ours(ids).logits - want).abs().max() < 1e-5 * want.abs().max().clamp(min=1)
    mask[0, :7] = 0  # padding moves no block
    want = theirs(ids[:1, 7:]).logits
    assert (ours(ids, attention_mask=mask).logits[:1, 7:] - want).abs().max() < 1e-5 * want.abs().max().clamp(min=1)


@pytest.mark.parametrize("name", ["qwen3", "qwen2", "llama"])
def test_blocks_of_one_write_the_greedy_text_of_the_autoregressive_model(name, make_model, tokens):
    ours, theirs = make_twins(name, make_model, attention="block_causal", block_size=1)
    undefined = [66, 67, 68, 69, 70, 71]
    theirs.generation_config.update(eos_token_id=65, pad_token_id=66, bos_token_id=64)
    for seed, length in ((0, 7), (1, 12), (2, 20)):
        ids = tokens(2, length, seed=seed)
        want = theirs.generate(ids, max_new_tokens=30, do_sample=False, suppress_tokens=undefined)
        want = F.pad(want, (0, length + 30 - want.shape[1]), value=66)
        for options in ({"kv_cache": "exact"}, {"kv_cache": "none"}, {"speculate": 2}):
            got = ours.generate(ids, max_new_tokens=30, steps=30, **options)
            assert got.tolist() == want.tolist(), options


@pytest.mark.parametrize("name", TWINS)
@torch.no_grad()
def test_without_a_mask_it_equals_the_autoregressive_model_under_an_all_visible_one(name, make_model, tokens):
    ours, theirs = make_twins(name, make_model)
    ids = tokens(2, 40)
    visible = torch.zeros(2, 1, 40, 40)
    want = theirs(ids, attention_mask=visible).logits
    assert (ours(ids).logits - want).abs().max() < 1e-5 * want.abs().max().clamp(min=1)


def test_names_and_shapes_of_the_weights_are_the_published_ones(model):
    layer = {
        "input_layernorm.weight": (32,),
        "mlp.down_proj.weight": (32, 48),
        "mlp.gate_proj.weight": (48, 32),
        "mlp.up_proj.weight": (48, 32),
        "post_attention_layernorm.weight": (32,),
        "self_attn.k_norm.weight": (16,),
        "self_attn.k_proj.weight": (32, 32),
        "self_attn.o_proj.weight": (32, 64),
        "self_attn.q_norm.weight": (16,),
        "self_attn.q_proj.weight": (64, 32),
        "self_attn.v_proj.weight": (32, 32),
    }
    want = {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    want |= {"model.embed_tokens.weight": (72, 32), "model.norm.weight": (32,), "lm_head.weight": (72, 32)}
    assert {name: tuple(weight.shape) for name, weight in model.state_dict().items()} == want


def test_the_published_shape_has_311_tensors():
    from CoDALanguageModel import CoDAConfig

    with torch.device("meta"):
        assert len(CoDALanguageModel(CoDAConfig()).state_dict()) == 311


# ---- who sees whom


def pad(rows, seq_len, pad_id, sides):
    """Rows of different lengths in one (B, T) tensor, each with its padding on the side that is asked for."""
    ids = torch.full((len(rows), seq_len), pad_id)
    mask = torch.zeros(len(rows), seq_len, dtype=torch.long)
    for b, (row, side) in enumerate(zip(rows, sides, strict=True)):
        free = seq_len - len(row)
        if side == "middle":
            where = torch.cat([torch.arange(3), torch.arange(3, len(row)) + free])
        else:
            where = torch.arange(len(row)) + {"left": free, "right": 0, "both": free // 2}[side]
        ids[b, where], mask[b, where] = row, 1
    return ids, mask


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@torch.no_grad()
def test_padding_on_any_side_changes_no_logit_at_real_positions(kernel, make_model, tokens):
    model = make_model(attn_implementation=kernel)
    sides = ["left", "right", "both", "middle", "left"]
    rows = [tokens(n, seed=n) for n in (5, 9, 6, 8, 12)]
    alone = [model(row[None]).logits[0] for row in rows]
    ids, mask = pad(rows, 12, model.config.pad_token_id, sides)
    ids[mask == 0] = tokens(int((mask == 0).sum()), seed=9)  # whatever stands at padding
    logits = model(ids, attention_mask=mask).logits
    for b, want in enumerate(alone):
        assert (logits[b][mask[b] == 1] - want).abs().max() < 1e-5


@torch.no_grad()
def test_a_row_of_padding_only_stays_finite(model, tokens):
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    assert model(tokens(2, 3), attention_mask=mask).logits.isfinite().all()


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(kernel, make_model, tokens):
    model = make_model(attn_implementation=kernel)
    documents = [tokens(n, seed=n) for n in (4, 7, 3)]
    padding = tokens(2, seed=5)
    packed = torch.cat([*documents, padding])[None]
    segment_ids = torch.tensor([[1] * 4 + [2] * 7 + [3] * 3 + [0] * 2])
    logits = model(packed, segment_ids=segment_ids).logits[0]
    alone = torch.cat([model(document[None]).logits[0] for document in documents])
    assert (logits[:14] - alone).abs().max() < 1e-5


@torch.no_grad()
def test_a_block_knows_nothing_of_those_after_it(make_model, tokens):
    model = make_model(attention="block_causal", block_size=4)
    segments = torch.tensor([[1] * 10 + [2] * 13 + [0]])  # blocks of the second document from 10, 14, 18 and 22
    ids = tokens(1, 24)
    before = model(ids, segment_ids=segments).logits
    for start, end, unchanged in ((14, 24, range(14)), (8, 10, [*range(8), *range(10, 23)])):
        other = ids.clone()
        other[:, start:end] = tokens(1, end - start, seed=5)
        after = model(other, segment_ids=segments).logits
        assert torch.equal(after[:, unchanged], before[:, unchanged])
        assert not torch.allclose(after[:, start - 1 : end], before[:, start - 1 : end], atol=1e-3)


@torch.no_grad()
def test_a_padding_mask_and_segments_can_be_given_together(model, tokens):
    ids = tokens(1, 8)
    segment_ids = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 2]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0]])
    got = model(ids, attention_mask=mask, segment_ids=segment_ids).logits[0, :6]
    want = torch.cat([model(ids[:, :3]).logits[0], model(ids[:, 3:6]).logits[0]])
    assert (got - want).abs().max() < 1e-5


@torch.no_grad()
def test_explicit_positions_replace_the_default_ones(model, tokens):
    ids = tokens(1, 6)
    index = torch.arange(6)[None]
    assert torch.equal(model(ids, position_ids=index).logits, model(ids).logits)
    assert torch.allclose(model(ids, position_ids=index + 7).logits, model(ids).logits, atol=1e-4)  # rope is relative
    assert not torch.allclose(model(ids, position_ids=index * 3).logits, model(ids).logits, atol=1e-2)


# ---- loss


def noised_batch(model, tokens, num_rows=3, seq_len=10):
    """Clean ids, noised ids, labels, t and where tokens were masked; one row has no masked token."""
    clean = tokens(num_rows, seq_len, seed=3)
    masked = torch.rand(num_rows, seq_len, generator=torch.Generator().manual_seed(4)) < 0.5
    masked[:, 0], masked[-1] = True, False
    noised = clean.masked_fill(masked, model.config.mask_token_id)
    return clean, noised, clean.masked_fill(~masked, IGNORE_INDEX), torch.linspace(0.2, 0.9, num_rows), masked


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_the_dense_loss_is_equation_6():
    logits, ids = torch.randn(2, 4, 5), torch.randint(0, 5, (2, 4))
    masked, t = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0]]).bool(), torch.tensor([0.5, 0.25])
    want = 0.0
    for b, i in itertools.product(range(2), range(1, 4)):  # position 0 is not scored
        if masked[b, i]:
            want -= F.log_softmax(logits[b, i].double(), dim=-1)[ids[b, i]] / t[b]
    assert masked_diffusion_loss(logits, ids, masked, t).item() == pytest.approx(float(want) / 8, rel=1e-6)


@pytest.mark.parametrize("static_shapes", [False, True], ids=["masked-rows", "static"])
@pytest.mark.parametrize("chunk_rows", [1000, 4, 1])
@pytest.mark.parametrize("tied", [False, True])
def test_the_chunked_loss_equals_the_dense_one_in_value_and_gradient(
    tied, chunk_rows, static_shapes, make_model, tokens, monkeypatch
):
    model = make_model(tie_word_embeddings=tied)
    clean, noised, labels, t, masked = noised_batch(model, tokens)
    dense = masked_diffusion_loss(align_logits(model(noised).logits), clean, masked, t)
    want = gradients(model, dense)
    monkeypatch.setattr(diffusion, "LOSS_CHUNK_ELEMENTS", chunk_rows * 72 * (3 if static_shapes else 1))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: static_shapes)
    head_rows = []
    linear = F.linear

    def counted(rows, weight, bias=None):
        if weight is model.lm_head.weight:
            head_rows.append(rows.numel() // rows.shape[-1])
        return linear(rows, weight, bias)

    monkeypatch.setattr(F, "linear", counted)
    chunked = model(noised, labels=labels, loss_weights=1 / t / clean.numel()).loss
    monkeypatch.setattr(F, "linear", linear)
    scored = int(masked[:, 1:].sum())
    assert sum(head_rows) == (3 * 9 if static_shapes else scored)
    assert max(head_rows) <= chunk_rows * (3 if static_shapes else 1)
    assert (chunked.ndim, chunked.dtype) == (0, torch.float32)
    assert chunked.item() == pytest.approx(dense.item(), rel=1e-6)
    got = gradients(model, chunked)
    for name, gradient in want.items():
        assert (got[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max().clamp(min=1), name


def test_without_weights_the_loss_is_the_mean_over_scored_positions(model, tokens):
    clean, noised, labels, _, masked = noised_batch(model, tokens)
    output = model(noised, labels=labels)
    nll = F.cross_entropy(align_logits(model(noised).logits).transpose(1, 2), clean, reduction="none")
    masked[:, 0] = False
    assert output.logits is None
    assert output.loss.item() == pytest.approx(nll[masked].mean().item(), rel=1e-6)


def test_weights_can_be_given_per_position(model, tokens):
    _, noised, labels, t, _ = noised_batch(model, tokens)
    per_row = model(noised, labels=labels, loss_weights=t).loss
    per_position = model(noised, labels=labels, loss_weights=t[:, None].expand(3, 10)).loss
    assert torch.equal(per_row, per_position)


def test_a_position_without_predecessor_is_never_scored(model, tokens):
    ids = tokens(2, 8, seed=6)
    segments = torch.tensor([[1, 1, 1, 2, 2, 2, 3, 3]] * 2)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 1, 1, 1]])
    ones = torch.ones(2)

    def loss(labels, **arguments):
        return model(ids, labels=labels, loss_weights=ones, **arguments).loss.item()

    def only(*columns):
        labels = torch.full_like(ids, IGNORE_INDEX)
        labels[:, list(columns)] = ids[:, list(columns)]
        return labels

    assert loss(only(0)) == 0.0 < loss(only(1))
    assert loss(only(0, 3, 6), segment_ids=segments) == 0.0 < loss(only(1), segment_ids=segments)
    after_padding = torch.full_like(ids, IGNORE_INDEX)
    after_padding[0, 2], after_padding[1, 5] = 1, 1
    assert loss(after_padding, attention_mask=mask) == 0.0 < loss(after_padding)


def test_packed_and_padded_rows_give_the_loss_of_separate_documents(model, tokens):
    documents = [tokens(n, seed=n) for n in (5, 7)]
    labels = [document.clone() for document in documents]  # every position labelled
    alone = sum(
        model(x[None], labels=y[None], loss_weights=torch.ones(1)).loss for x, y in zip(documents, labels, strict=True)
    )
    segments = torch.tensor([[1] * 5 + [2] * 7])
    packed = model(
        torch.cat(documents)[None], labels=torch.cat(labels)[None], segment_ids=segments, loss_weights=torch.ones(1)
    ).loss
    ids, mask = pad(documents, 9, model.config.pad_token_id, ["left", "left"])
    padded_labels = ids.masked_fill(mask == 0, IGNORE_INDEX)
    padded = model(ids, attention_mask=mask, labels=padded_labels, loss_weights=torch.ones(2)).loss
    assert packed.item() == pytest.approx(alone.item(), rel=1e-5)
    assert padded.item() == pytest.approx(alone.item(), rel=1e-5)


def test_a_batch_without_labels_to_score_has_loss_zero_and_a_gradient(make_model, tokens):
    model = make_model()
    loss = model(tokens(1, 4), labels=torch.full((1, 4), IGNORE_INDEX)).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all((p.grad is not None) and (p.grad == 0).all() for p in model.parameters())


def test_an_unshifted_model_scores_position_zero_by_its_own_row(make_model, tokens):
    model = make_model(logits_shift=False)
    ids = tokens(2, 5)
    got = model(ids, labels=ids, loss_weights=torch.ones(2)).loss
    want = F.cross_entropy(model(ids).logits.transpose(1, 2), ids, reduction="sum")
    assert got.item() == pytest.approx(want.item(), rel=1e-6)


# ---- rows of the output, arguments


@torch.no_grad()
def test_positions_choose_the_rows_that_the_head_runs_on(model, tokens):
    ids = tokens(2, 6)
    full = model(ids).logits
    columns = torch.tensor([[0, 5, 3], [2, 2, 1]])
    wanted = torch.stack([full[b, columns[b]] for b in range(2)])
    assert torch.allclose(model(ids, positions=columns).logits, wanted, atol=1e-6)
    marked = torch.zeros(2, 6, dtype=torch.bool)
    marked[0, 1] = marked[0, 4] = marked[1, 0] = True
    assert torch.allclose(model(ids, positions=marked).logits, full[marked], atol=1e-6)
    flat = torch.tensor([7, 0, 11])
    assert torch.allclose(model(ids, positions=flat).logits, full.flatten(0, 1)[flat], atol=1e-6)


@torch.no_grad()
def test_outputs_as_tuple_embeddings_as_input_and_hidden_states(model, tokens):
    ids = tokens(2, 6)
    want = model(ids).logits
    assert torch.equal(model(ids, return_dict=False)[0], want)
    output = model(inputs_embeds=model.get_input_embeddings()(ids), output_hidden_states=True)
    assert torch.equal(output.logits, want)
    assert [tuple(h.shape) for h in output.hidden_states] == [(2, 6, 32)] * 3


@torch.no_grad()
def test_a_masked_lm_gives_the_row_that_scores_each_token(make_model, tokens):
    model, ids = make_model(), tokens(2, 6)
    masked = CoDAForMaskedLM(model.config).eval()
    masked.load_state_dict(model.state_dict())
    real = torch.ones(2, 6, dtype=torch.long)
    real[1, 2:4] = 0  # padding inside a row is stepped over
    rows, logits = model(ids, attention_mask=real).logits, masked(ids, attention_mask=real).logits
    assert torch.equal(logits[0, 1:], rows[0, :-1])
    assert torch.equal(logits[1, [1, 4, 5]], rows[1, [0, 1, 4]])
    assert not logits[:, 0].any()
    assert not logits[1, 2:4].any()
    assert torch.equal(masked(ids).logits[:, 1:], model(ids).logits[:, :-1])
    segments = torch.tensor([[1, 1, 1, 2, 2, 2]] * 2)
    assert not masked(ids, segment_ids=segments).logits[:, [0, 3]].any()
    labels = ids.clone().masked_fill(torch.arange(6) % 2 == 0, -100)
    assert torch.equal(masked(ids, labels=labels).loss, model(ids, labels=labels).loss)
    loss = F.cross_entropy(masked(ids).logits.flatten(0, 1), labels.flatten())
    assert loss.item() == pytest.approx(model(ids, labels=labels).loss.item(), rel=1e-5)
    settings = {"max_new_tokens": 4, "steps": 4}
    assert torch.equal(masked.diffusion_generate(ids, **settings), model.diffusion_generate(ids, **settings))
    unshifted = CoDAForMaskedLM(make_model(logits_shift=False).config).eval()
    assert torch.equal(unshifted(ids).logits, unshifted.lm_head(unshifted.model(ids).last_hidden_state))


@torch.no_grad()
def test_the_eager_kernel_gives_weights_and_the_others_refuse(make_model, tokens):
    model, ids, mask = make_model(attn_implementation="eager"), tokens(2, 6), torch.ones(2, 6)
    mask[0, 4:] = 0
    output = model(ids, attention_mask=mask, output_attentions=True)
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 4, 6, 6)] * 2
    assert torch.allclose(torch.stack(output.attentions).sum(-1), torch.ones(2, 2, 4, 6), atol=1e-6)
    assert not output.attentions[0][0, :, :, 4:].any()
    assert model(ids, attention_mask=mask).attentions is None
    assert not model.model.layers[0].self_attn._forward_hooks
    with pytest.raises(ValueError, match="output_attentions=True needs attn_implementation 'eager', .* got 'sdpa'"):
        make_model()(ids, output_attentions=True)


@torch.no_grad()
def test_what_the_configuration_asks_for_is_returned_unless_a_call_says_otherwise(make_model, tokens):
    model, ids = make_model(output_hidden_states=True, return_dict=False), tokens(1, 4)
    logits, hidden = model(ids)
    assert torch.equal(logits, model.lm_head(hidden[-1]))
    last, hidden = model.model(ids)
    assert torch.equal(last, hidden[-1])
    assert model.diffusion_generate(ids, max_new_tokens=2, steps=2).shape == (1, 6)
    output = model(ids, return_dict=True, output_hidden_states=False)
    assert output.hidden_states is None
    assert torch.equal(output.logits, logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_mask": torch.ones(2, 4, 4)}, r"attention_mask must be \(B, T\) or \(B, 1, T, T\), got .*4, 4"),
        ({"labels": torch.zeros(2, 3).long()}, r"labels must have shape \(2, 4\), got \(2, 3\)"),
        (
            {"labels": torch.zeros(2, 4).long(), "loss_weights": torch.ones(2, 3)},
            r"loss_weights must be .*got \(2, 3\)",
        ),
        ({"loss_weights": torch.ones(2)}, "loss_weights need labels"),
        ({"labels": torch.zeros(2, 4).long(), "positions": torch.zeros(2, 1).long()}, "labels and positions exclude"),
        ({"positions": torch.zeros(3, 1).long()}, r"positions must be .*got the shape \(3, 1\)"),
        ({"use_cache": True}, "use_cache=True needs a cache in past_key_values"),
        ({"inputs_embeds": torch.zeros(2, 4, 32)}, "exactly one of input_ids and inputs_embeds"),
        (
            {"segment_ids": torch.ones(2, 4).long(), "attention_mask": torch.ones(2, 1, 4, 4).bool()},
            r"segment_ids need a \(B, T\) attention_mask",
        ),
    ],
)
def test_contradictory_arguments_are_refused(model, tokens, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(tokens(2, 4), **arguments)


# ---- training and speed features of the host libraries


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant, make_model, tokens):
    model = make_model().train()
    clean, noised, labels, t, _ = noised_batch(model, tokens)
    mask = torch.ones_like(clean)
    mask[1, :3] = 0
    want = gradients(model, model(noised, attention_mask=mask, labels=labels, loss_weights=t).loss)
    calls = []
    model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    got = gradients(model, model(noised, attention_mask=mask, labels=labels, loss_weights=t).loss)
    assert len(calls) == 2  # the layer ran again in the backward pass
    for name, gradient in want.items():
        assert torch.allclose(got[name], gradient, atol=1e-6), name


@torch.no_grad()
def test_bfloat16_forward_stays_near_float32_and_its_loss_is_float32(make_model, tokens):
    full, half = make_model(), make_model().to(torch.bfloat16)
    clean, noised, labels, t, _ = noised_batch(full, tokens)
    mask = torch.ones_like(clean)
    mask[0, :4] = 0
    want, got = full(noised, attention_mask=mask).logits, half(noised, attention_mask=mask).logits
    assert got.dtype == torch.bfloat16
    assert (got.float() - want)[mask == 1].abs().max() < 0.05 * want.abs().max()
    loss = half(noised, labels=labels, loss_weights=t / clean.numel()).loss
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(
        full(noised, labels=labels, loss_weights=t / clean.numel()).loss.item(), rel=0.05
    )


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@torch.no_grad()
def test_the_forward_compiles_into_one_graph(make_model, tokens):
    model = make_model(num_hidden_layers=1)
    ids, mask = tokens(2, 8), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8])
    want = model(ids, attention_mask=mask).logits
    got = torch.compile(model, fullgraph=True)(ids, attention_mask=mask).logits
    assert (got - want)[mask == 1].abs().max() < 1e-4


def test_the_loss_compiles_into_one_graph(make_model, tokens):
    model = make_model()
    clean, noised, labels, t, _ = noised_batch(model, tokens)
    segments = torch.ones_like(clean)
    segments[:, 5:] = 2
    arguments = {"labels": labels, "loss_weights": t, "segment_ids": segments}
    want = gradients(model, model(noised, **arguments).loss)
    got = gradients(model, torch.compile(model, fullgraph=True, backend="aot_eager")(noised, **arguments).loss)
    for name, gradient in want.items():
        assert torch.allclose(got[name], gradient, atol=1e-4), name


def test_lora_trains_only_adapters_and_merges_into_the_same_model(make_model, tokens):
    peft = pytest.importorskip("peft")
    model = make_model()
    clean, noised, labels, t, _ = noised_batch(model, tokens)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(6):
        loss = adapted(noised, labels=labels, loss_weights=1 / t / clean.numel()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert len(trained) == 2 * 3 * 2
    assert all("lora_" in name for name in trained)
    with torch.no_grad():
        want = adapted.eval()(clean).logits
        merged = adapted.merge_and_unload()
        assert type(merged) is CoDALanguageModel
        assert torch.allclose(merged(clean).logits, want, atol=1e-4)
    assert merged.diffusion_generate(clean, max_new_tokens=2, steps=2).shape == (3, 12)
