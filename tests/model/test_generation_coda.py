import json
import math
import random
from fractions import Fraction
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import GenerationConfig, MaxLengthCriteria, PreTrainedTokenizerFast, pipeline

from CoDALanguageModel import CoDALanguageModel, DecodingStalled, DiffusionGenerationConfig
from CoDALanguageModel.diffusion import named_rng
from CoDALanguageModel.generation_coda import NEUTRAL

ALGORITHMS = ("origin", "maskgit_plus", "topk_margin", "entropy", "p2")
BOS, EOS, PAD, MASK, UNDEFINED = 64, 65, 66, 67, (68, 69, 70, 71)


# ---- an independent sampler: one row, dense logits, full sorts, python loops


def textbook_counts(num_masked, steps, eps, alg):
    """Tokens to commit (p2: to keep) at each step, zeros included."""
    if alg == "p2":
        return [num_masked - math.floor(num_masked * (1 - Fraction(i + 1, steps))) for i in range(steps)]
    times = torch.linspace(1, eps, steps + 1).numpy()
    counts, left = [], num_masked
    for i in range(steps):
        share = np.float32(1) - times[i + 1] / times[i]
        counts.append(left if i == steps - 1 else int(np.float32(left) * share))
        left -= counts[-1]
    return counts


def textbook_distribution(row, temperature, top_p, top_k):
    """Probabilities after temperature and filters, in float64."""
    scores = [value / temperature if temperature else value for value in row]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    weights = [math.exp(score - scores[order[0]]) for score in scores]
    total = sum(weights)
    kept, before = [], 0.0
    for i in order:
        if (top_p is not None and before / total > top_p) or (top_k is not None and len(kept) == top_k):
            break
        kept.append(i)
        before += weights[i]
    return [weights[i] / before if i in kept else 0.0 for i in range(len(row))]


def textbook_decode(
    model, prompt, *, max_new_tokens, steps, alg, seed=0, temperature=0.0, top_p=None, top_k=None, alg_temp=None,
    block_length=None, eps=1e-3,
):  # fmt: skip
    """Decode one unpadded prompt to the very last step; returns the row and its history."""
    canvas = list(prompt) + [MASK] * max_new_tokens
    gaps = [p for p, token in enumerate(canvas) if token == MASK]
    length = block_length or len(gaps)
    blocks = [gaps[i : i + length] for i in range(0, len(gaps), length)]
    step, history = 0, []
    for b, block in enumerate(blocks):
        block_steps = steps // len(blocks) + (1 if b < steps % len(blocks) else 0)
        counts = textbook_counts(len(block), block_steps, eps, alg)
        for i, count in enumerate(counts):
            is_idle = count <= (counts[i - 1] if i else 0) if alg == "p2" else count == 0
            if not is_idle:
                textbook_step(model, canvas, block, count, step, alg, seed, temperature, top_p, top_k, alg_temp)
                history.append(list(canvas))
            step += 1
    for p in range(len(prompt), len(canvas)):
        if canvas[p] == EOS:
            canvas[p + 1 :] = [PAD] * (len(canvas) - p - 1)
            break
    return canvas, history


def textbook_step(model, canvas, block, count, step, alg, seed, temperature, top_p, top_k, alg_temp):
    with torch.no_grad():
        logits = model(torch.tensor([canvas])).logits[0].double()
    logits[:, [PAD, MASK, *UNDEFINED]] = -torch.inf
    token_draws = named_rng("token", seed, step).random(len(canvas))
    order_draws = named_rng("order", seed, step).random(len(canvas))
    proposals = {}
    for p in block:
        if alg != "p2" and canvas[p] != MASK:
            continue
        probabilities = textbook_distribution(logits[max(p - 1, 0)].tolist(), temperature, top_p, top_k)
        if canvas[p] != MASK:
            token = canvas[p]
        elif temperature:
            token = int(np.searchsorted(np.cumsum(probabilities), token_draws[p], side="right"))
        else:
            token = int(np.argmax(probabilities))
        best, second = sorted(probabilities, reverse=True)[:2]
        confidence = {
            "origin": order_draws[p],
            "maskgit_plus": probabilities[token],
            "p2": probabilities[token],
            "topk_margin": best - second,
            "entropy": sum(q * math.log(q) for q in probabilities if q > 0),
        }[alg]
        if alg_temp and alg != "origin":
            confidence = confidence / alg_temp - math.log(-math.log(order_draws[p]))
        proposals[p] = (token, confidence)
    chosen = sorted(proposals, key=lambda p: (-proposals[p][1], p))[:count]
    for p in block:
        if p in chosen:
            canvas[p] = proposals[p][0]
        elif alg == "p2":
            canvas[p] = MASK


def random_case(alg, index):
    """A prompt with gaps and settings, from a seed that names the case."""
    rng = random.Random(f"{alg} {index}")
    # At least two tokens: in a canvas of masks alone all positions tie, but for the last bit.
    prompt = [rng.choice([*range(64), BOS, EOS, PAD]) for _ in range(rng.randint(3, 9))]
    max_new_tokens = rng.randint(0, 12)
    for p in rng.sample(range(1, len(prompt)), min(len(prompt) - 2, rng.randint(0 if max_new_tokens else 1, 3))):
        prompt[p] = MASK
    num_masked = prompt.count(MASK) + max_new_tokens
    block_length = rng.choice([None, None, 1, 3, 4, 50])
    num_blocks = math.ceil(num_masked / (block_length or num_masked))
    return prompt, {
        "max_new_tokens": max_new_tokens,
        "steps": num_blocks + rng.choice([0, 1, 3, 8, 40]),
        "alg": alg,
        "seed": rng.randint(0, 2**31),
        "temperature": rng.choice([0.0, 0.0, 0.3, 1.0, 2.0]),
        "top_p": rng.choice([None, 0.2, 0.9, 1.0]),
        "top_k": rng.choice([None, None, 1, 5, 100]),
        "alg_temp": rng.choice([None, None, 0.1, 1.0]),
        "block_length": block_length,
        "eps": rng.choice([1e-3, 1e-2]),
    }


@pytest.fixture(scope="module")
def eos_model(make_model):
    """A model that often ends: its end token is favoured."""
    model = make_model(seed=5)
    model.lm_head.register_forward_hook(lambda module, args, logits: logits + EOS_BIAS)
    return model


EOS_BIAS = torch.zeros(72)
EOS_BIAS[EOS] = 6.0


@pytest.mark.parametrize("alg", ALGORITHMS)
def test_decoding_equals_an_independent_implementation(alg, model, eos_model):
    ended = 0
    for index in range(30):
        prompt, arguments = random_case(alg, index)
        decoder = (model, eos_model)[index % 2]
        want, want_history = textbook_decode(decoder, prompt, **arguments)
        inputs = torch.tensor([prompt], dtype=torch.long)
        output = decoder.diffusion_generate(
            inputs, **arguments, eos_early_stop=False, output_history=True, return_dict_in_generate=True
        )
        case = f"case {index}: {prompt} {arguments}"
        assert output.sequences[0].tolist() == want, case
        assert [canvas[0].tolist() for canvas in output.history] == want_history, case
        assert output.num_forwards.tolist() == [len(want_history)], case
        assert decoder.diffusion_generate(inputs, **arguments)[0].tolist() == want, case  # the early stop is lossless
        ended += EOS in want[len(prompt) :]
    assert ended >= 3  # the cases contain answers that end


# ---- the same tokens in any batch


@cache
def alone(model, prompt, seed, items):
    return model.diffusion_generate(torch.tensor([prompt], dtype=torch.long), seed=seed, **dict(items))[0].tolist()


@pytest.fixture(scope="module")
def exact_models(make_model):
    """In float64, so that a batched matrix product and one of a single row cannot round to different tokens."""
    models = [make_model(seed=7).double(), make_model(seed=5).double()]
    models[1].lm_head.register_forward_hook(lambda module, args, logits: logits + EOS_BIAS)
    return models


SETTINGS = [
    {"steps": 8},
    {"steps": 5, "temperature": 0.9, "top_p": 0.8},
    {"steps": 30, "temperature": 0.7, "top_k": 9, "alg_temp": 0.5, "block_length": 3},
    {"steps": 12, "block_length": 4, "alg_temp": 0.3},
]
PROMPTS = st.lists(st.sampled_from([*range(0, 64, 7), EOS, PAD, MASK]), max_size=7).map(lambda ids: (9, *ids))


@pytest.mark.parametrize("alg", ALGORITHMS)
@given(
    rows=st.lists(st.tuples(PROMPTS, st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=4),
    choice=st.integers(0, 3),
    which=st.integers(0, 1),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_a_row_gets_the_same_tokens_alone_and_in_any_ragged_batch(alg, exact_models, rows, choice, which):
    """Each row is (prompt, seed, padding on its left); the rest of its padding is on the right."""
    model, arguments = exact_models[which], {**SETTINGS[choice], "alg": alg, "max_new_tokens": 5}
    width = max(len(prompt) + left for prompt, _, left in rows)
    inputs, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.long)
    for b, (prompt, _, left) in enumerate(rows):
        inputs[b, left : left + len(prompt)] = torch.tensor(prompt, dtype=torch.long)
        mask[b, left : left + len(prompt)] = 1
    seeds = [seed for _, seed, _ in rows]
    batched = model.diffusion_generate(inputs, mask, seed=seeds, **arguments)
    for b, (prompt, seed, left) in enumerate(rows):
        got = batched[b].tolist()
        want = alone(model, prompt, seed, tuple(arguments.items()))
        assert got[left : left + len(prompt)] + got[width:] == want
        padding = got[:left] + got[left + len(prompt) : width]
        assert padding == [PAD] * len(padding)  # padding is left as it came


def test_a_hole_of_padding_inside_a_prompt_changes_nothing(exact_models, tokens):
    prompt = tokens(6).tolist()
    inputs = torch.tensor([[*prompt[:3], PAD, PAD, *prompt[3:]]])
    mask = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1]])
    got = exact_models[0].diffusion_generate(inputs, mask, max_new_tokens=5, steps=5)
    assert (
        got[0, 8:].tolist() == list(alone(exact_models[0], tuple(prompt), 0, (("max_new_tokens", 5), ("steps", 5))))[6:]
    )


@pytest.mark.parametrize("padded_with", [EOS, 5, PAD])
def test_what_stands_at_padding_is_not_repeated(model, tokens, padded_with):
    """Some families pad with the token that ends an answer, which a penalty of padding would keep from coming."""
    prompt, seen = tokens(1, 6), []

    def note(ids, scores):
        seen.append(ids[:, :3].unique().tolist())
        return scores

    options = {"max_new_tokens": 8, "steps": 8, "repetition_penalty": 5.0, "logit_bias": {str(padded_with): 2.0}}
    options |= {"output_scores": True, "return_dict_in_generate": True, "eos_early_stop": False}
    padded = torch.cat([torch.full((1, 3), padded_with), prompt], dim=1)
    want = model.diffusion_generate(prompt, **options)
    mask = (torch.arange(9) >= 3).long()[None]
    got = model.diffusion_generate(padded, mask, logits_processor=[note], **options)
    assert got.sequences[:, 3:].tolist() == want.sequences.tolist()
    torch.testing.assert_close(got.scores[:, 3:], want.scores, atol=1e-4, rtol=0)
    assert {token for ids in seen for token in ids} == {MASK}


def test_an_unshifted_model_scores_each_position_by_its_own_row(make_model, tokens):
    model = make_model(logits_shift=False)
    prompt = torch.cat([tokens(1, 4), torch.tensor([[MASK]])], dim=1)
    got = model.diffusion_generate(prompt, max_new_tokens=0, steps=1)
    with torch.no_grad():
        logits = model(prompt).logits[0, 4]
    logits[[PAD, MASK, *UNDEFINED]] = -torch.inf
    assert got[0, 4] == logits.argmax()


def test_rows_with_the_same_seed_agree_and_other_seeds_differ(model, tokens):
    prompt = tokens(1, 4).expand(3, -1)
    out = model.diffusion_generate(prompt, max_new_tokens=16, steps=8, temperature=2.0, seed=[1, 2, 1])
    assert torch.equal(out[0], out[2])
    assert not torch.equal(out[0], out[1])
    again = model.diffusion_generate(prompt[:1], max_new_tokens=16, steps=8, temperature=2.0, seed=2)
    assert torch.equal(again[0], out[1])


def test_the_global_random_state_has_no_influence_and_is_not_touched(model, tokens):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = model.diffusion_generate(tokens(1, 4), max_new_tokens=8, steps=8, temperature=1.0, alg="origin")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(
        model.diffusion_generate(tokens(1, 4), max_new_tokens=8, steps=8, temperature=1.0, alg="origin"), first
    )


# ---- what comes out


@pytest.mark.parametrize("alg", ALGORITHMS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_mask_pad_and_undefined_ids_never_come_out_and_prompts_never_change(alg, temperature, make_model, tokens):
    model = make_model()
    bias = torch.zeros(72)
    bias[[MASK, PAD, *UNDEFINED]] = 50.0  # a model that wants nothing else
    model.lm_head.register_forward_hook(lambda module, args, logits: logits + bias)
    prompt = tokens(2, 6)
    prompt[0, 1], prompt[1, :3] = MASK, torch.tensor([70, PAD, EOS])  # a gap, and odd ids that must stay
    out = model.diffusion_generate(prompt, max_new_tokens=20, steps=7, alg=alg, temperature=temperature)
    filled = torch.cat([out[0, 1:2], out[:, 6:].flatten()])
    if EOS not in filled:
        assert filled.max() < PAD
    assert MASK not in out
    kept = prompt != MASK
    assert torch.equal(out[:, :6][kept], prompt[kept])


def test_pads_come_only_behind_the_first_end_token_of_the_new_part(eos_model, tokens):
    prompt = tokens(12, 5, seed=2)
    prompt[:, 2] = EOS  # an end token in the prompt ends nothing
    out = eos_model.diffusion_generate(prompt, max_new_tokens=12, steps=12, temperature=1.0, seed=list(range(12)))
    assert torch.equal(out[:, :5], prompt)
    ends = 0
    for row in out[:, 5:].tolist():
        first = row.index(EOS) if EOS in row else len(row)
        assert PAD not in row[:first]
        assert set(row[first + 1 :]) <= {PAD}
        ends += first < len(row)
    assert 0 < ends


def test_tokens_per_forward_are_told_of_each_row(model, tokens):
    settings = {"max_new_tokens": 8, "steps": 4, "schedule": "even"}
    settings |= {"return_dict_in_generate": True, "suppress_tokens": [EOS]}
    output = model.diffusion_generate(tokens(2, 4), **settings)
    assert output.tokens_per_forward.tolist() == [2.0, 2.0]
    assert output.cost.tokens_per_forward == 2.0
    one = model.diffusion_generate(tokens(2, 4), **settings | {"steps": 8})
    assert one.tokens_per_forward.tolist() == [1.0, 1.0]
    assert one.num_forwards.tolist() == [8, 8]  # the published schedule pauses first and takes seven


@pytest.mark.parametrize("settings", [{}, {"speculate": 3}, {"kv_cache": "dual", "block_length": 4}])
def test_tokens_per_forward_are_those_of_a_row_in_any_company(model, tokens, settings):
    """The end token is no token of the answer, and a pass counts once however many drafts it verifies."""
    prompts = tokens(4, 5)
    more = {"max_new_tokens": 16, "steps": 16, "temperature": 1.0, "logit_bias": {EOS: 2.0}, **settings}
    more["return_dict_in_generate"] = True
    alone = [model.diffusion_generate(prompt[None], seed=i, **more) for i, prompt in enumerate(prompts)]
    together = model.diffusion_generate(prompts, seed=[0, 1, 2, 3], **more)
    counts = []
    for ids, forwards in zip(together.sequences[:, 5:].tolist(), together.num_forwards.tolist(), strict=True):
        counts.append((ids.index(EOS) if EOS in ids else len(ids), forwards))
    assert 0 < sum(EOS in ids for ids in together.sequences[:, 5:].tolist())
    assert together.tokens_per_forward.tolist() == pytest.approx([count / forwards for count, forwards in counts])
    assert together.tokens_per_forward.tolist() == [float(one.tokens_per_forward) for one in alone]
    assert [one.cost.tokens_per_forward for one in alone] == [count / forwards for count, forwards in counts]
    total, passes = map(sum, zip(*counts, strict=True))
    assert together.cost.tokens_per_forward == total / passes
    if "speculate" in settings:
        assert together.cost.rows_evaluated > passes


def test_any_of_several_end_tokens_ends_a_row(make_model, tokens):
    model = make_model(eos_token_id=[EOS, 3])
    bias = torch.zeros(72)
    bias[3] = 50.0
    model.lm_head.register_forward_hook(lambda module, args, logits: logits + bias)
    out = model.diffusion_generate(tokens(1, 4), max_new_tokens=6, steps=6)
    assert out[0, 4:].tolist() == [3, PAD, PAD, PAD, PAD, PAD]


def test_a_pad_token_that_also_ends_answers_can_come_out(make_model, tokens):
    model = make_model(eos_token_id=PAD)
    bias = torch.zeros(72)
    bias[PAD] = 50.0
    model.lm_head.register_forward_hook(lambda module, args, logits: logits + bias)
    assert model.diffusion_generate(tokens(1, 4), max_new_tokens=4, steps=4)[0, 4:].tolist() == [PAD] * 4


@pytest.mark.parametrize("alg", ["entropy", "origin"])
def test_the_early_stop_is_lossless_and_saves_forwards(alg, eos_model, tokens):
    prompt = tokens(8, 5, seed=3)
    arguments = {"max_new_tokens": 24, "steps": 24, "block_length": 4, "alg": alg, "return_dict_in_generate": True}
    stopped = eos_model.diffusion_generate(prompt, **arguments)
    full = eos_model.diffusion_generate(prompt, **arguments, eos_early_stop=False)
    assert torch.equal(stopped.sequences, full.sequences)
    assert full.num_forwards.tolist() == [18] * 8  # 6 blocks, of whose 4 steps one commits nothing
    assert stopped.num_forwards.sum() < full.num_forwards.sum()
    gap_behind = torch.cat([prompt, torch.full((8, 1), MASK)], dim=1)  # a gap in the prompt is filled before a stop
    assert MASK not in eos_model.diffusion_generate(gap_behind, **arguments).sequences


@pytest.mark.parametrize("alg", ALGORITHMS)
def test_every_forward_changes_the_canvas_and_every_mask_is_filled(alg, model, tokens):
    prompt = tokens(3, 6)
    prompt[1, 2:4] = MASK
    for steps, block_length in ((1, None), (7, None), (100, None), (20, 4)):
        passes = []
        hook = model.register_forward_hook(lambda module, args, out, passes=passes: passes.append(1))
        output = model.diffusion_generate(
            prompt,
            max_new_tokens=10,
            steps=steps,
            block_length=block_length,
            alg=alg,
            output_history=True,
            return_dict_in_generate=True,
            eos_early_stop=False,
        )
        hook.remove()
        assert len(passes) == len(output.history) == output.num_forwards.max() <= min(steps, 12)
        canvas = torch.cat([prompt, torch.full((3, 10), MASK)], dim=1)
        for num_pass, after in enumerate(output.history):
            active = output.num_forwards > num_pass
            assert (after != canvas).any(dim=1).tolist() == active.tolist()
            if alg != "p2":  # p2 may take tokens back, the others never do
                assert (after == canvas)[canvas != MASK].all()
            assert (after[1] == MASK).sum() < (canvas[1] == MASK).sum() or not active[1]
            canvas = after
        assert not (canvas == MASK).any()
        assert torch.equal(output.history[0][0, :6], prompt[0])


def test_finished_rows_leave_the_batch(model, tokens):
    prompt = tokens(2, 8)
    prompt[1, 1:7] = MASK
    sizes = []
    hook = model.model.register_forward_hook(lambda module, args, out: sizes.append(len(out[0])))
    output = model.diffusion_generate(prompt, max_new_tokens=2, steps=20, return_dict_in_generate=True)
    hook.remove()
    short, long = output.num_forwards.tolist()
    assert 1 <= short < long
    assert sizes == [2] * short + [1] * (long - short)


def test_the_head_runs_on_masked_rows_of_the_block_only(model, tokens):
    rows = []
    hook = model.lm_head.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    model.diffusion_generate(tokens(2, 5), max_new_tokens=6, steps=6, block_length=3, eos_early_stop=False)
    hook.remove()
    assert rows == [6, 4, 6, 4]  # each row commits one, then two of a block


def test_without_a_history_none_is_returned_and_forward_counts_always_are(model, tokens):
    output = model.diffusion_generate(tokens(2, 3), max_new_tokens=2, steps=1, return_dict_in_generate=True)
    assert output.history is None
    assert output.num_forwards.tolist() == [1, 1]
    assert output.cancelled is False


@pytest.mark.parametrize(
    ("ids", "mask", "new"),
    [
        ([], None, 4),
        ([MASK, 1, 2], None, 0),
        ([PAD, MASK, 1], [0, 1, 1], 0),
        ([PAD, PAD], [0, 0], 3),
    ],
)
def test_a_mask_that_nothing_scores_is_refused_unless_the_model_scores_it_itself(model, make_model, ids, mask, new):
    inputs = torch.tensor([[1] * len(ids), ids], dtype=torch.long)
    mask = None if mask is None else torch.tensor([[1] * len(ids), mask])
    options = {"max_new_tokens": new, "steps": 4}
    if ids:
        with pytest.raises(ValueError, match="row 1 starts with a mask, which nothing scores"):
            model.diffusion_generate(inputs, mask, max_new_tokens=max(new, 1), steps=4)
    with pytest.raises(ValueError, match="row 0 starts with a mask, which nothing scores"):
        model.diffusion_generate(inputs[1:], None if mask is None else mask[1:], **options)
    unshifted = make_model(logits_shift=False)
    assert MASK not in unshifted.diffusion_generate(inputs[1:], None if mask is None else mask[1:], **options)


def test_an_empty_batch_is_fine(model):
    assert model.diffusion_generate(torch.zeros(0, 3, dtype=torch.long), max_new_tokens=4, steps=4).shape == (0, 7)


def test_a_callback_sees_every_canvas_and_can_cancel(model, tokens):
    seen = []

    def watch(canvas, step):
        seen.append((step, canvas.clone()))
        return step < 3

    output = model.diffusion_generate(
        tokens(2, 4), max_new_tokens=8, steps=8, step_callback=watch, return_dict_in_generate=True, eos_early_stop=False
    )
    assert [step for step, _ in seen] == [1, 2, 3]
    assert output.cancelled is True
    assert torch.equal(output.sequences, seen[-1][1])
    assert (output.sequences == MASK).sum(dim=1).tolist() == [5, 5]
    full = model.diffusion_generate(tokens(2, 4), max_new_tokens=8, steps=8, step_callback=lambda canvas, step: None)
    committed = output.sequences != MASK
    assert torch.equal(output.sequences[committed], full[committed])


def test_do_sample_false_is_greedy(model, tokens):
    arguments = {"max_new_tokens": 12, "steps": 12}
    greedy = model.diffusion_generate(tokens(1, 4), **arguments)
    sampled = model.diffusion_generate(tokens(1, 4), **arguments, temperature=3.0)
    assert torch.equal(model.diffusion_generate(tokens(1, 4), **arguments, temperature=3.0, do_sample=False), greedy)
    assert torch.equal(model.diffusion_generate(tokens(1, 4), **arguments, temperature=3.0, do_sample=True), sampled)
    assert not torch.equal(sampled, greedy)


def test_generate_is_diffusion_generate(model, tokens):
    want = model.diffusion_generate(tokens(2, 4), max_new_tokens=5, steps=5)
    mask = torch.ones(2, 4, dtype=torch.long)
    assert torch.equal(model.generate(tokens(2, 4), max_new_tokens=5, steps=5), want)
    assert torch.equal(model.generate(input_ids=tokens(2, 4), attention_mask=mask, max_new_tokens=5, steps=5), want)
    config = DiffusionGenerationConfig(max_new_tokens=5, steps=5)
    assert torch.equal(model.generate(tokens(2, 4), generation_config=config), want)
    with pytest.raises(ValueError, match="inputs and input_ids are the same argument"):
        model.generate(tokens(2, 4), input_ids=tokens(2, 4))


def test_generate_takes_what_callers_of_transformers_pass(model, tokens):
    ids = tokens(2, 4)
    want = model.diffusion_generate(ids, max_new_tokens=6, steps=6)
    nothing = {"use_cache": True, "num_beams": 1, "synced_gpus": False, "disable_compile": True, "top_k": 0}
    assert torch.equal(model.generate(ids, max_length=10, steps=6, **nothing), want)
    plain = GenerationConfig(max_length=10, use_cache=False, num_beams=1, top_k=0)
    assert torch.equal(model.generate(ids, plain, steps=6), want)
    assert torch.equal(model.generate(ids, max_new_tokens=6, steps=6, **NEUTRAL), want)
    plain = GenerationConfig(max_new_tokens=6, **NEUTRAL)
    assert torch.equal(model.generate(ids, plain, steps=6), want)
    gap = ids.clone()
    gap[:, 2] = 67
    assert model.generate(gap, max_length=4, steps=6).shape == (2, 4)
    for arguments, message in (
        ({"num_beams": 4}, "num_beams must be 1: denoising has no beams, got 4"),
        ({"max_length": 3}, "max_length must be an integer >= 4, the tokens of inputs, got 3"),
        ({"max_length": 10, "max_new_tokens": 6}, "max_length and max_new_tokens both say"),
        ({"num_beam_groups": 2}, "unknown generation setting 'num_beam_groups'"),
        ({"min_new_tokens": 2}, "unknown generation setting 'min_new_tokens'"),
        ({"output_attentions": True}, "unknown generation setting 'output_attentions'"),
        ({"length_penalty": "1"}, "unknown generation setting 'length_penalty'"),
        ({"generation_config": {"steps": 3}}, "generation_config must be a GenerationConfig or None, got dict"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(ids, **arguments)
    with pytest.raises(ValueError, match="unknown generation setting 'use_cache'"):  # no setting of ours
        model.diffusion_generate(ids, use_cache=True)


@pytest.mark.parametrize("settings", [{}, {"block_length": 3}, {"alg": "p2", "block_length": 3}, {"threshold": 0.01}])
def test_a_stopping_criterion_ends_each_row_with_the_first_text_that_it_stops(model, tokens, settings):
    ids, seen = tokens(2, 4), []
    settings = {"max_new_tokens": 9, "steps": 9, "temperature": 1.0, "return_dict_in_generate": True} | settings
    free = model.generate(ids, **settings)
    stop = free.sequences[0, 7].item()  # the first row ends with this token, where it comes first

    def criterion(input_ids, scores, **kwargs):
        assert scores is None
        seen.append(input_ids[0].tolist())
        return torch.tensor([seen[-1][-1] == stop])

    stopped = model.generate(ids, stopping_criteria=[criterion], **settings)
    for row, whole in zip(stopped.sequences.tolist(), free.sequences.tolist(), strict=True):
        answer = whole[4:]
        end = 4 + (answer.index(stop) + 1 if stop in answer else len(answer))
        assert row == whole[:end] + [66] * (13 - end)
        asked = dict.fromkeys(tuple(text) for text in seen if text[:4] == row[:4])  # again where none has settled
        assert list(asked) == [tuple(row[:n]) for n in range(5, end + 1)]
    assert stopped.num_forwards[0] <= free.num_forwards[0]


def test_what_ends_an_answer_needs_a_token_to_stand_behind_it(make_model, tokens):
    padless = make_model(pad_token_id=None, eos_token_id=None)
    letters = SimpleNamespace(decode=lambda ids: "x" * len(ids))
    criteria = [lambda ids, _, **__: torch.tensor([ids.shape[1] > 6])]
    ends = [{"stopping_criteria": criteria}, {"stop_strings": ["xx"], "tokenizer": letters}]
    for end in ends:
        with pytest.raises(ValueError, match="need pad_token_id or eos_token_id, to stand behind the answer"):
            padless.generate(tokens(1, 5), max_new_tokens=8, **end)
        out = padless.generate(tokens(1, 5), max_new_tokens=8, pad_token_id=66, **end)
        assert padless.config.mask_token_id not in out[0].tolist()


def test_a_criterion_that_looks_at_the_clock_ends_rows_and_lengths_end_like_tokens(model, tokens):
    ids, asked = tokens(1, 4), []

    def later(input_ids, scores, **kwargs):
        asked.append(input_ids.shape[1])
        return torch.tensor([len(asked) == 4])

    settings = {"max_new_tokens": 9, "steps": 9, "alg": "origin", "seed": 1}
    out = model.generate(ids, stopping_criteria=[later], **settings)
    assert len(asked) == 4
    assert (out[0, asked[-1] :] == 66).all()
    assert (out[0, : asked[-1]] == model.generate(ids, **settings)[0, : asked[-1]]).all()
    short = model.generate(ids, stopping_criteria=[MaxLengthCriteria(6)], **settings)
    assert short[0, 6:].tolist() == [66] * 7
    with pytest.raises(ValueError, match="stopping_criteria end the appended part, and max_new_tokens is 0"):
        model.generate(torch.tensor([[1, 67]]), stopping_criteria=[later], max_new_tokens=0)


def test_a_text_generation_pipeline_decodes_with_the_settings_of_the_model(make_model):
    vocabulary = {chr(33 + i): i for i in range(64)} | {"<pad>": PAD}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="!"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")
    model = make_model()
    model.generation_config = DiffusionGenerationConfig(max_new_tokens=5, steps=5)
    ask = pipeline("text-generation", model=model, tokenizer=fast, device="cpu")
    prompt = fast("ABCD", return_tensors="pt").input_ids
    for arguments in ({}, {"max_new_tokens": 3, "temperature": 0.5, "seed": 4}):
        (answer,) = ask("ABCD", return_full_text=False, **arguments)
        want = model.diffusion_generate(prompt, **arguments)[0, 4:]
        assert answer["generated_text"].strip() == fast.decode(want, skip_special_tokens=True)


# ---- settings


def test_settings_round_trip_through_generation_config_json(tmp_path):
    config = DiffusionGenerationConfig(
        max_new_tokens=7, steps=9, alg="p2", alg_temp=0.2, temperature=0.6, top_p=0.95, top_k=40, block_length=8,
        eps=0.01, seed=5, eos_early_stop=False, eos_token_id=[1, 2], do_sample=True,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    loaded = DiffusionGenerationConfig.from_pretrained(tmp_path)
    assert loaded.to_diff_dict() == config.to_diff_dict()
    written = json.loads((tmp_path / "generation_config.json").read_text())
    for key in ("steps", "alg", "top_p", "block_length", "eps", "seed", "eos_early_stop"):
        assert written[key] == getattr(config, key) == getattr(loaded, key)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stepz": 4}, "unknown generation setting 'stepz'; did you mean 'steps'"),
        ({"temprature": 0.1}, "unknown generation setting 'temprature'; did you mean 'temperature'"),
        ({"num_beams": 4}, "unknown generation setting 'num_beams'"),
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"steps": -3}, "steps must be an integer >= 1, got -3"),
        ({"steps": 2.5}, "steps must be an integer >= 1, got 2.5"),
        ({"steps": None}, "steps must be an integer >= 1, got None"),
        ({"max_new_tokens": -1}, "max_new_tokens must be an integer >= 0, got -1"),
        ({"block_length": 0}, "block_length must be an integer >= 1 or None, got 0"),
        ({"top_k": 0}, "top_k must be an integer >= 1 or None, got 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\] or None, got 0.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\] or None, got 1.5"),
        ({"temperature": -0.1}, r"temperature must be a number in \[0, 1e6\], got -0.1"),
        ({"temperature": math.nan}, r"temperature must be a number in \[0, 1e6\], got nan"),
        ({"temperature": "hot"}, r"temperature must be a number in \[0, 1e6\], got 'hot'"),
        ({"alg_temp": -1}, r"alg_temp must be a number in \[0, 1e6\] or None, got -1"),
        ({"eps": 1.0}, r"eps must be in \(0, 1\), got 1.0"),
        ({"alg": "greedy"}, "alg must be one of origin, maskgit_plus, topk_margin, entropy, p2, got 'greedy'"),
        ({"seed": -1}, "seed must be an integer >= 0 or a list of them, one per row, got -1"),
        ({"seed": [1, 2, 3]}, r"seed must hold one integer per row \(2\), got 3"),
        ({"eos_early_stop": "yes"}, "eos_early_stop must be true or false, got 'yes'"),
        ({"do_sample": "no"}, "do_sample must be true, false or None, got 'no'"),
        ({"steps": 2, "block_length": 2, "max_new_tokens": 8}, "steps must be at least the number of blocks"),
        ({"max_new_tokens": 0}, "nothing to fill: max_new_tokens is 0 and inputs hold no mask token"),
        ({"max_new_tokens": 126}, "the prompt of 3 tokens and max_new_tokens=126 do not fit in the context of 128"),
    ],
)
def test_bad_settings_are_refused_by_name(model, tokens, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.diffusion_generate(tokens(2, 3), **arguments)
    if "got" in message and "one integer per row" not in message or "unknown" in message:
        with pytest.raises(ValueError, match=message):  # and in a file
            DiffusionGenerationConfig(**arguments)
        (tmp_path / "generation_config.json").write_text(json.dumps(arguments))
        if arguments != {"steps": None}:
            with pytest.raises(ValueError, match=message):
                DiffusionGenerationConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("inputs", "mask", "message"),
    [
        (None, None, "inputs must be .* got None"),
        ([[1, 2]], None, "inputs must be .* got list"),
        (torch.zeros(4).long(), None, r"inputs must be a \(B, T\) tensor of token ids, got torch.int64 \(4,\)"),
        (torch.zeros(1, 4), None, "inputs must be .* got torch.float32"),
        (torch.tensor([[1, 72]]), None, r"token ids must be in \[0, 72\), got 1 to 72"),
        (torch.tensor([[-1, 3]]), None, r"token ids must be in \[0, 72\), got -1 to 3"),
        (torch.ones(1, 3).long(), torch.ones(1, 2).long(), r"attention_mask must have the shape of inputs \(1, 3\)"),
        (torch.ones(1, 3).long(), torch.full((1, 3), 2), "attention_mask must hold only 0 and 1"),
        (torch.ones(1, 120).long(), None, "the prompt of 120 tokens and max_new_tokens=9 do not fit"),
    ],
)
def test_bad_inputs_are_refused_by_name(model, inputs, mask, message):
    with pytest.raises(ValueError, match=message):
        model.diffusion_generate(inputs, mask, max_new_tokens=9, steps=9)


def test_padding_does_not_count_towards_the_context(model, tokens):
    mask = torch.cat([torch.zeros(1, 100), torch.ones(1, 20)], dim=1).long()
    out = model.diffusion_generate(tokens(1, 120), mask, max_new_tokens=10, steps=2)
    want = model.diffusion_generate(tokens(1, 120)[:, 100:], max_new_tokens=10, steps=2)
    assert torch.equal(out[:, 120:], want[:, 20:])


@pytest.mark.parametrize("alg", ALGORITHMS)
def test_scores_that_are_not_finite_are_an_error(alg, make_model, tokens):
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    with pytest.raises(ValueError, match="scores that are not finite"):
        model.diffusion_generate(tokens(1, 3), max_new_tokens=2, steps=2, alg=alg, temperature=0.5, top_p=0.9)


def test_a_setting_that_a_trainer_adds_to_a_loaded_configuration_survives_or_is_refused(make_model, tmp_path, tokens):
    model = make_model()
    model.generation_config.do_sample = True  # as LLaMA-Factory does for models that sample
    model.save_pretrained(tmp_path)
    loaded = CoDALanguageModel.from_pretrained(tmp_path)
    assert loaded.generation_config.do_sample is True
    assert loaded.diffusion_generate(tokens(1, 3), max_new_tokens=2, steps=2).shape == (1, 5)
    loaded.generation_config.num_beams = 4
    with pytest.raises(ValueError, match="unknown generation setting 'num_beams'"):
        loaded.diffusion_generate(tokens(1, 3), max_new_tokens=2, steps=2)
    loaded.generation_config.num_beams = None
    loaded.generation_config.steps = -2
    with pytest.raises(ValueError, match="steps must be an integer >= 1, got -2"):
        loaded.diffusion_generate(tokens(1, 3), max_new_tokens=2)


def test_a_plain_generation_config_is_read_as_ours_or_refused(model, tokens):
    plain = GenerationConfig(max_new_tokens=5, do_sample=False, temperature=0.9, top_p=0.9)
    want = model.diffusion_generate(tokens(1, 3), max_new_tokens=5, steps=128)
    assert torch.equal(model.generate(tokens(1, 3), generation_config=plain), want)
    with pytest.raises(ValueError, match="num_beams must be 1: denoising has no beams, got 3"):
        model.generate(tokens(1, 3), generation_config=GenerationConfig(num_beams=3, max_new_tokens=5))


def test_what_a_plain_generation_config_leaves_unset_is_as_the_model_says(make_model, tokens):
    model = make_model()
    model.generation_config = DiffusionGenerationConfig(max_new_tokens=9, steps=4, schedule="even", temperature=1.5)
    want = model.diffusion_generate(tokens(1, 3), max_new_tokens=5)
    for generate in (model.generate, model.diffusion_generate):
        assert torch.equal(generate(tokens(1, 3), generation_config=GenerationConfig(max_new_tokens=5)), want)
    of_model = GenerationConfig.from_model_config(model.config)  # it has the model's ids, and use_cache
    assert torch.equal(model.diffusion_generate(tokens(1, 3), generation_config=of_model, max_new_tokens=5), want)
    ours = DiffusionGenerationConfig(max_new_tokens=5, steps=5)  # which says everything
    got = model.generate(tokens(1, 3), generation_config=ours)
    assert torch.equal(got, make_model().diffusion_generate(tokens(1, 3), max_new_tokens=5, steps=5))


def test_a_stop_string_may_stand_alone_as_in_transformers(model, tokens):
    letters = SimpleNamespace(decode=lambda ids: "".join(chr(33 + i) for i in ids))
    settings = {"max_new_tokens": 8, "steps": 8, "tokenizer": letters}
    text = letters.decode(model.generate(tokens(1, 3), **settings)[0, 3:].tolist())
    stopped = model.generate(tokens(1, 3), stop_strings=text[2:4], **settings)
    assert torch.equal(stopped, model.generate(tokens(1, 3), stop_strings=[text[2:4]], **settings))
    assert stopped[0, -1] == PAD


def test_a_folder_with_an_autoregressive_generation_config_names_the_setting_it_cannot_hold(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.7, "num_beams": 4}))
    with pytest.raises(ValueError, match="unknown generation setting 'num_beams'"):
        CoDALanguageModel.from_pretrained(tmp_path)


EXTREMES = [0, -0.0, 5e-324, 1e-310, 1e-39, 1e-7, 1e-6, 1e-5, 1, 2**31 - 1, 2**31, 2**63, 10**30, 1e30, 1e300]
EXTREMES += [math.inf, -math.inf, math.nan, True, "1"]
NUMBERS = {
    "steps": {},
    "block_length": {},
    "eps": {},
    "temperature": {},
    "alg_temp": {"temperature": 0.7},
    "top_p": {"temperature": 0.7},
    "top_k": {"temperature": 0.7},
    "repetition_penalty": {},
    "presence_penalty": {},
    "frequency_penalty": {},
    "threshold": {},
    "factor": {},
    "entropy_bound": {},
    "eta": {"remask": "conf"},
    "refresh_interval": {"kv_cache": "dual"},
    "refresh_window": {"kv_cache": "dual", "block_length": 3},
    "suffix_window": {"block_length": 3},
    "cache_drift": {"kv_cache": "dual"},
    "drift_interval": {"kv_cache": "dual", "cache_drift": 1e-3},
    "speculate": {},
    "near_tie": {"speculate": 2},
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_at_its_extremes_is_refused_by_name_or_ends_within_its_steps(model, name):
    prompt, new = torch.tensor([[1, 2, 3]]), 6
    for alg in ("entropy", "topk_margin", "origin"):
        for value in EXTREMES:
            options = {"max_new_tokens": new, "steps": 4, "alg": alg, **NUMBERS[name], name: value}
            try:
                output = model.diffusion_generate(prompt, return_dict_in_generate=True, **options)
            except ValueError as error:
                assert name in str(error), (name, value)  # noqa: PT017  refused, and said what
                continue
            assert not (output.sequences == model.config.mask_token_id).any(), (name, value)
            # A cache that is compared with fresh scores, and speculation, look twice at a step.
            assert output.num_forwards.item() <= 2 * max(new, 4), (name, value)


@pytest.mark.parametrize("name", ["temperature", "alg_temp"])
def test_a_temperature_that_means_zero_is_zero(model, name):
    options = {"max_new_tokens": 8, "steps": 8, "alg": "entropy", "seed": 3}
    zero = model.diffusion_generate(torch.tensor([[1, 2, 3]]), **{**options, name: 0.0})
    for value in (1e-310, 1e-39, 9e-7):
        assert model.generation_config.merged({name: value}).to_dict()[name] == 0.0
        assert torch.equal(model.diffusion_generate(torch.tensor([[1, 2, 3]]), **{**options, name: value}), zero)


@pytest.mark.parametrize("value", [math.inf, math.nan, 1e7, True, "1"])
def test_a_bias_that_would_hide_all_other_scores_is_refused(model, value):
    with pytest.raises(ValueError, match="logit_bias must hold numbers in"):
        model.generation_config.merged({"logit_bias": {3: value}})


@pytest.mark.parametrize("options", [{}, {"alg": "p2"}, {"remask": "conf"}, {"speculate": 2}, {"threshold": 0.9}])
def test_a_step_that_commits_nothing_is_an_error_and_not_an_endless_loop(model, monkeypatch, options):
    def nothing(scores, counts):
        return torch.zeros_like(scores, dtype=torch.bool)

    monkeypatch.setattr("CoDALanguageModel.stepwise.choose", nothing)
    with pytest.raises(DecodingStalled, match=r"step \d+ of row 0 committed none of 1 tokens"):
        model.diffusion_generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, steps=4, **options)


@pytest.mark.parametrize("name", ["mask_token_id", "pad_token_id", "eos_token_id", "suppress_tokens", "num_token_ids"])
def test_ids_that_are_no_tokens_are_refused_by_name(model, name):
    numbers = [-1, True, 1.5, "a", math.nan, 2**63, 10**30]
    numbers += [] if name == "num_token_ids" else [model.config.vocab_size]
    lists = name in ("eos_token_id", "suppress_tokens")
    for value in ([[number] for number in numbers] if lists else numbers) + [{3}, range(2)]:
        with pytest.raises(ValueError, match=f"{name} must"):
            model.diffusion_generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, steps=4, **{name: value})


@pytest.mark.parametrize("token", [-1, True, 3.5, "a", "-1", 72, 10**30])
def test_a_bias_for_what_is_no_token_is_refused(model, token):
    with pytest.raises(ValueError, match="logit_bias must"):
        model.diffusion_generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, steps=4, logit_bias={token: 1.0})


@pytest.mark.parametrize("name", ["suppress_tokens", "logit_bias"])
def test_settings_that_leave_no_token_are_named_and_not_blamed_on_the_model(model, name):
    value = list(range(68)) if name == "suppress_tokens" else dict.fromkeys(range(68), -math.inf)
    with pytest.raises(ValueError, match="exclude all of the 68 ids"):
        model.diffusion_generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, steps=4, **{name: value})
