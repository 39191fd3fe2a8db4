"""The loss of rows `[noisy; clean]` is that of each block beside the clean text before it."""

import pytest
import torch
import torch.nn.functional as F
from numpy.polynomial import Polynomial
from transformers import Qwen3Config, Qwen3ForCausalLM

from CoDALanguageModel.diffusion import IGNORE_INDEX
from CoDALanguageModel.noise import Blocks, CleanRows, deal_levels, draw_rows, noise_blocks, spread_levels

SIZE, T = 4, 16
SEGMENTS = torch.tensor([[1] * 6 + [2] * 9 + [0], [1] * 16])
ANSWERS = torch.tensor([[0], [5]])  # row 1 has a prompt of 5: its blocks start at 0, 1, 5, 9 and 13
CONTRACTS = {"same position": False, "shifted": True}


def block_model(make_model, size=SIZE, **changes):
    return make_model(attention="block_causal", block_size=size, **changes)


def clean_rows(tokens):
    return CleanRows(tokens(2, T).masked_fill(SEGMENTS == 0, 66), SEGMENTS, answer_start=ANSWERS)


def noised(rows, blocks, *, shift=True, seed=0):
    drawn = draw_rows(seed, range(2), [15, 16], T)
    t = spread_levels(deal_levels(seed, 0, 2, 0.3), rows.segment_ids, blocks, t_min=0.3, answer_start=rows.answer_start)
    return noise_blocks(rows, t, drawn, blocks, mask_token_id=67, pad_token_id=66, logits_shift=shift)


def arguments(batch):
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "visibility": batch.visibility,
        "doubled": True,
    }


def loss_of(model, batch, denominator=1.0):
    return model(**arguments(batch), labels=batch.labels, loss_weights=batch.weights / denominator).loss


def texts(text):
    """Start and length of each text of a clean row, and the ends of its blocks."""
    if text == 0:
        return [(0, 6, [4, 6]), (6, 9, [4, 8, 9])]
    return [(0, 16, [1, 5, 9, 13, 16])]


def logits_of_blocks(model, ids_of_row, text, *, joint):
    """Row by row of the noisy half, each block from a row of its own: the clean text before it, and itself."""
    found = torch.full((T, model.config.vocab_size), torch.nan, dtype=torch.float64)
    before = found.clone()  # of the position before each, in the same row
    for start, length, ends in texts(text):
        begin = 0
        for end in ends:
            ids = ids_of_row[T + start : T + start + end].clone()
            ids[begin:] = ids_of_row[start + begin : start + end]
            sees = torch.zeros(1, 1, end, end, dtype=torch.bool)
            for place in range(end):
                last = next(e for e in ends if e > place)
                sees[..., place, : place + 1 if joint and place < begin else min(last, end)] = True
            logits = model(ids[None], attention_mask=sees).logits[0]
            found[start + begin : start + end] = logits[begin:]
            low = max(begin, 1)
            before[start + low : start + end] = logits[low - 1 : -1]
            begin = end
        assert begin == length
    return found, before


@pytest.mark.parametrize("complementary", [False, True])
@pytest.mark.parametrize(("shift", "joint"), [(False, False), (True, False), (True, True)])
@torch.no_grad()
def test_each_block_is_scored_as_it_is_decoded(shift, joint, complementary, make_model, tokens):
    model = block_model(make_model, logits_shift=shift).double()
    blocks = Blocks(SIZE, complementary, 0.25 if joint else None)
    batch = noised(clean_rows(tokens), blocks, shift=shift)
    logits, total = model(**arguments(batch)).logits, 0.0
    for row in range(len(batch.input_ids)):
        text = row // 2 if complementary else row
        found, before = logits_of_blocks(model, batch.input_ids[row], text, joint=joint)
        real = SEGMENTS[text] > 0
        assert (logits[row, :T] - found)[real].abs().max() < 1e-10
        labels, weights = batch.labels[row], batch.weights[row].double()
        rows = before if shift else found
        for place in (labels[:T] != IGNORE_INDEX).nonzero().flatten().tolist():
            total += weights[place] * F.cross_entropy(rows[place], labels[place])
        if joint:
            for start, length, _ in texts(text):
                ids = batch.input_ids[row, T + start : T + start + length]
                causal = torch.ones(1, 1, length, length).tril().bool()
                nll = F.cross_entropy(model(ids[None], attention_mask=causal).logits[0, :-1], ids[1:], reduction="sum")
                total += nll * 0.25 / (2 if complementary else 1)
    assert (batch.labels != IGNORE_INDEX).sum() > 15
    assert float(loss_of(model, batch)) == pytest.approx(float(total), rel=1e-6)  # sums are float32


@pytest.mark.parametrize("weight", [None, 0.5], ids=["block", "joint"])
@torch.no_grad()
def test_no_loss_of_a_block_knows_of_those_after_it_or_of_another_text(weight, make_model, tokens):
    model = block_model(make_model)
    batch = noised(clean_rows(tokens), Blocks(SIZE, False, weight))
    logits = model(**arguments(batch)).logits
    # the second block of the second text of row 0: places 10 to 13
    ids = batch.input_ids.clone()
    for start in (10, T + 10):
        ids[0, start : start + 4] = tokens(4, seed=9)
    changed = model(**{**arguments(batch), "input_ids": ids}).logits
    same = [*range(10), *range(T, T + 10)]
    assert torch.equal(changed[0, same], logits[0, same])
    assert torch.equal(changed[1], logits[1])
    assert not torch.allclose(changed[0, 14], logits[0, 14], atol=1e-3)
    kept = torch.zeros_like(batch.weights)
    kept[:, :10] = batch.weights[:, :10]
    kept[1] = batch.weights[1]
    first, second = (
        float(model(**{**arguments(batch), "input_ids": x}, labels=batch.labels, loss_weights=kept).loss)
        for x in (batch.input_ids, ids)
    )
    assert first == second > 0


def twin(model):
    """Qwen3 with the weights of `model`."""
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
    )
    config = Qwen3Config(
        **{name: getattr(model.config, name) for name in names.split()},
        rope_parameters=dict(model.config.rope_parameters),
        rms_norm_eps=model.config.rms_norm_eps,
        tie_word_embeddings=False,
        pad_token_id=None,
    )
    theirs = Qwen3ForCausalLM(config)
    theirs.load_state_dict(model.state_dict(), strict=True)
    return theirs


@pytest.mark.parametrize("complementary", [False, True])
def test_blocks_of_one_token_train_as_qwen3_itself(complementary, make_model, tokens):
    """The loss that Qwen3 gives for its labels, and its gradient: at any level that the caller deals."""
    model = block_model(make_model, size=1)
    theirs, rows = twin(model), clean_rows(tokens)
    own = [theirs(ids[None], labels=ids[None]).loss for ids in (rows.input_ids[0, :6], rows.input_ids[0, 6:15])]
    own.append(theirs(rows.input_ids[1:], labels=rows.input_ids[1:]).loss)
    want = (own[0] * 5 + own[1] * 8 + own[2] * 15) / 28
    got = loss_of(model, noised(rows, Blocks(1, complementary)), denominator=28)
    assert float(got) == pytest.approx(float(want), abs=1e-5)
    got.backward()
    want.backward()
    for (name, ours), other in zip(model.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(ours.grad, other.grad, atol=1e-5), name


@pytest.mark.parametrize("complementary", [False, True])
@torch.no_grad()
def test_the_mean_loss_is_the_exactly_enumerated_bound_of_the_blocks(complementary, make_model):
    """A text of 4 tokens in two blocks: each of its levels is uniform, whatever the other is."""
    t_min = 0.1
    t_max = 1 - t_min if complementary else 1.0
    model = block_model(make_model, size=2, logits_shift=False)
    text, segments = torch.tensor([3, 60, 17, 40]), torch.ones(1, 4, dtype=torch.long)
    bound = 0.0
    for begin in (0, 2):
        for masked in ([0], [1], [0, 1]):
            ids = text[: begin + 2].clone()
            ids[[begin + place for place in masked]] = 67
            logits = model(ids[None]).logits[0]
            nll = sum(float(F.cross_entropy(logits[begin + place], text[begin + place])) for place in masked)
            size = len(masked)
            density = (Polynomial([0, 1]) ** (size - 1) * Polynomial([1, -1]) ** (2 - size)).integ()
            bound += nll * (density(t_max) - density(t_min)) / (t_max - t_min)
    losses, blocks = [], Blocks(2, complementary)
    rows = CleanRows(text.expand(64, -1), segments.expand(64, -1))
    for step in range(40):
        t = spread_levels(deal_levels(0, step, 64, t_min), rows.segment_ids, blocks, t_min=t_min)
        drawn = draw_rows(0, range(step * 64, step * 64 + 64), [4] * 64, 4)
        batch = noise_blocks(rows, t, drawn, blocks, mask_token_id=67, pad_token_id=66, logits_shift=False)
        losses.append(float(loss_of(model, batch, denominator=64)))
    losses = torch.tensor(losses, dtype=torch.float64)
    error = losses.std() / len(losses) ** 0.5
    assert error < 0.02 * bound
    assert abs(losses.mean() - bound) < 4 * error


def test_the_loss_by_blocks_compiles_into_one_graph(make_model, tokens):
    """Where shapes are static all rows go through the head; the sum is the same."""
    model = block_model(make_model)
    batch = noised(clean_rows(tokens), Blocks(SIZE, True, 0.5))
    inputs = {**arguments(batch), "labels": batch.labels, "loss_weights": batch.weights}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert float(compiled(**inputs).loss) == pytest.approx(float(model(**inputs).loss), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_ids": None}, "doubled rows need position_ids and visibility"),
        ({"visibility": None}, "doubled rows need position_ids and visibility"),
        ({"attention_mask": torch.ones(2, 2 * T)}, "tell padding by segments alone"),
        ({"labels": torch.zeros(2, 5).long()}, r"labels must have shape \(2, 16\) or \(2, 32\), got \(2, 5\)"),
    ],
)
def test_doubled_rows_that_miss_a_fact_are_refused(changes, message, make_model, tokens):
    batch = noised(clean_rows(tokens), Blocks(SIZE))
    inputs = {**arguments(batch), "labels": batch.labels, "loss_weights": batch.weights[:, 0], **changes}
    with pytest.raises(ValueError, match=message):
        block_model(make_model)(**inputs)
