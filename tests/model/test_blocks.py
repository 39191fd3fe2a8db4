"""Facts of decoding by blocks: what is stored changes no score, and a pass costs the block."""

import itertools
import random

import pytest
import torch

from CoDALanguageModel import Decoding, DiffusionGenerationConfig, Request
from CoDALanguageModel.attention_coda import block_causal
from CoDALanguageModel.blocks import LEAST_SHARED, BlockScorer
from CoDALanguageModel.scoring import Scorer

EOS, PAD, MASK = 65, 66, 67
CONTRACTS = list(itertools.product((False, True), ("text", "answer")))
ORDERS = ["origin", "maskgit_plus", "topk_margin", "entropy"]
REGIMES = [
    {},
    {"alg_temp": 0.4, "temperature": 0.9, "top_p": 0.8},
    {"temperature": 0.7, "top_k": 9, "logit_bias": {"5": 2.0}},
    {"repetition_penalty": 1.3},
    {"presence_penalty": 1.5, "frequency_penalty": -0.4},
    {"alg": "p2"},
    {"alg": "p2", "temperature": 0.7},
    {"threshold": 0.3},
    {"factor": 1.0},
    {"entropy_bound": 1.5, "block_length": 2},
    {"block_length": 2, "alg": "p2"},
    {"remask": "conf", "temperature": 1.0},
    {"remask": "conf", "temperature": 1.0, "block_length": 2},
    {"stop_strings": ["A", "Bk"]},
    {"speculate": 2},
    {"speculate": 3, "threshold": 0.3, "temperature": 0.8},
]


def letters(ids):
    """A text with one character per token."""
    return "".join(chr(48 + i) for i in ids)


@pytest.fixture(scope="module")
def block_model(make_model):
    """Give a function that makes a tiny model with blocks, in float64: the last bit of a product must not decide."""
    made = {}

    def make(shift=True, origin="text", size=4, seed=0, causal=False):
        changes = {"logits_shift": shift, "block_origin": origin, "block_size": size, "seed": seed}
        changes["causal_context"] = causal
        key = tuple(changes.items())
        if key not in made:
            made[key] = make_model(attention="block_causal", **changes).double()
        return made[key]

    return make


def decode(model, requests, rng=None, **changes):
    """Decode requests, joining and some leaving at random steps if there is a generator, and note all logits.

    Returns:
        The rows in the order of the requests, and {(request, step, position of the text): logits}.
    """
    logits, process = {}, Scorer._process

    def spy(self, step, ids, scores):
        for row, column, raw in zip(scores.row.tolist(), scores.column.tolist(), scores.logits, strict=True):
            owner = self.canvas.rows[step.places[row]]
            place = owner.columns.index(column)
            logits[number[owner], step.commits[row].step, place] = raw.clone()
        return process(self, step, ids, scores)

    decoding, number, rows = Decoding(model, decode=letters), {}, []
    waiting = list(enumerate(requests))[::-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scorer, "_process", spy)
        while waiting or decoding.rows:
            for _ in range(len(waiting) if rng is None else min(len(waiting), rng.randint(0, 2))):
                i, request = waiting.pop()
                settings = request.settings.merged(changes)
                request = Request(
                    ids=request.ids, settings=settings, seed=request.seed, attention_mask=request.attention_mask
                )
                rows.append(decoding.admit(request))
                number[rows[-1]] = i
            if rng is not None and decoding.rows and rng.random() < 0.04:
                decoding.drop(rng.choice(decoding.rows))
            for record in decoding.step():
                assert record.error is None
    for lane in decoding._lanes.values():
        assert not lane.scorer.texts  # nothing is kept of what has left
    return rows, logits


def draw_request(rng, model, regime):
    """A ragged prompt with padding anywhere, sometimes with gaps as far as they are defined."""
    config = model.config
    prompt = [rng.randrange(64) for _ in range(rng.randint(1, 14))]
    if rng.random() < 0.3:  # what is right of the gap is in its block
        start = len(prompt) if config.block_origin == "answer" else len(prompt) // config.block_size * config.block_size
        if config.block_origin == "answer":
            prompt += [MASK] + [rng.randrange(64) for _ in range(config.block_size - 1)]
        elif start:
            prompt += [rng.randrange(64) for _ in range(start + config.block_size - len(prompt))]
            prompt[start] = MASK
    settings = {"alg": rng.choice(ORDERS), "steps": rng.randint(20, 40), **regime}
    if config.block_size % settings.get("block_length", 1):
        del settings["block_length"]
    real = [1] * len(prompt)
    for _ in range(rng.choice([0, 0, 2])):
        place = rng.randint(0, len(prompt))
        prompt.insert(place, PAD), real.insert(place, 0)
    new = rng.choice([1, 6, 13, 20])
    return Request(
        ids=prompt,
        attention_mask=real,
        settings=DiffusionGenerationConfig(max_new_tokens=new, **settings),
        seed=rng.randrange(1000),
    )


def outcome(row):
    """All that must not depend on company and cache."""
    return row.text_ids(), row.reason, row.end, row.num_steps


@pytest.mark.parametrize(
    ("shift", "origin", "size", "causal"),
    [(*contract, size, False) for size in (1, 4, 6) for contract in CONTRACTS] + [(True, "answer", 4, True)],
)
def test_cached_decoding_in_company_equals_recomputing_alone(block_model, shift, origin, size, causal, monkeypatch):
    """Every regime and order in one batch of ragged rows that join at random steps, to rounding."""
    if size == 4:  # prompts and blocks in passes of their own
        monkeypatch.setattr("CoDALanguageModel.scoring.TOKENS_OF_A_PASS", 4)
        monkeypatch.setattr("CoDALanguageModel.blocks.LEAST_SHARED", 1)  # texts share what they happen to share
    if size == 6:  # prompts in several parts
        monkeypatch.setattr("CoDALanguageModel.blocks.LONGEST_PART", 5)
    model = block_model(shift, origin, size, causal=causal)
    rng = random.Random(size)
    requests = [draw_request(rng, model, regime) for regime in REGIMES]
    requests += [Request(ids=requests[0].ids, attention_mask=requests[0].attention_mask, settings=r.settings, seed=7)
                 for r in requests[1:3]]  # fmt: skip
    together, scores = decode(model, requests, rng)
    compared = 0
    assert sum(row.is_finished for row in together) > len(requests) / 2
    for i, (row, request) in enumerate(zip(together, requests, strict=True)):
        if not row.is_finished:  # it was dropped
            continue
        (alone,), own = decode(model, [request], kv_cache="none", speculate=0)
        assert (row.config.kv_cache, alone.config.kv_cache) == ("exact", "none")
        assert outcome(row) == outcome(alone), request
        for (_, step, place), want in own.items():
            if not row.config.speculate:
                assert (scores[i, step, place] - want).abs().max() < 1e-10
                compared += 1
    assert compared > 100


def test_a_pass_computes_the_block_and_what_is_not_stored(block_model, tokens):
    """Columns of each pass: the prompt once, then the block; a finished block with the first step of the next."""
    prompt = tokens(10).tolist()
    settings = DiffusionGenerationConfig(max_new_tokens=10, steps=100, eos_early_stop=False, alg="origin", seed=3)
    for shift, size, want in (
        (False, 4, [12, *[8, 4, 4] * 2]),  # the last step of a block commits two tokens
        (True, 1, [10] + [1] * 9),
        (False, 1, [11] + [2] * 9),
    ):
        model, widths = block_model(shift, size=size), []
        hook = model.model.register_forward_hook(lambda module, args, output, to=widths: to.append(output[0].shape[1]))
        row = decode(model, [Request(ids=prompt, settings=settings)])[0][0]
        hook.remove()
        assert widths == want
        assert (row.cost.forwards, row.cost.tokens_evaluated) == (len(want), sum(want))
    for size, steps in itertools.product((1, 4, 8), (10, 100)):  # with the shift the row before the block may be needed
        model, widths = block_model(True, size=size), []
        hook = model.model.register_forward_hook(lambda module, args, output, to=widths: to.append(output[0].shape[1]))
        decode(model, [Request(ids=prompt, settings=settings.merged({"steps": steps}))])
        hook.remove()
        assert max(widths[1:]) <= 2 * size
        assert sum(width > size + 1 for width in widths[1:]) <= 10 // size + 1


def test_nothing_is_drafted_behind_the_canvas(block_model, tokens):
    """A draft that ends the next block too meets one that the canvas does not hold yet."""
    settings = DiffusionGenerationConfig(max_new_tokens=40, steps=100, speculate=7, eos_early_stop=False, alg="origin")
    decoding, drafted = Decoding(block_model(size=4)), []
    rows = [decoding.admit(Request(ids=tokens(6).tolist(), settings=settings, seed=seed)) for seed in range(8)]
    while decoding.rows:
        decoding.step()
        drafted += [len(columns) for row in rows for columns, _ in row.drafts]
    assert drafted
    assert 0 not in drafted


def training_logits(model, ids, noisy, shift):
    """Logits of each position under the mask of block diffusion, of rows [noisy; clean]."""
    length, size = ids.shape[1], model.config.block_size
    place = torch.arange(length)
    is_clean = torch.arange(2 * length)[None] >= length
    start = place // size * size
    block = torch.cat([start, place if model.config.causal_context else start])
    rule = block_causal(torch.ones(1, 2 * length, dtype=torch.long), block[None], is_clean)
    logits = model(torch.cat([noisy, ids], dim=1), position_ids=place.repeat(2)[None], visibility=rule).logits[0]
    if not shift:
        return logits[:length]
    # A position is scored by the row before it; the first one of a block by the clean row before.
    rows = torch.where(place % size == 0, place - 1 + length, place - 1)
    return logits[rows.clamp(min=0)]


@pytest.mark.parametrize(("shift", "causal"), [(False, False), (True, False), (True, True)])
@torch.no_grad()
def test_logits_under_the_training_mask_are_those_of_cached_decoding(block_model, tokens, shift, causal):
    model = block_model(shift, size=4, causal=causal)
    prompt = tokens(6, seed=3).tolist()
    settings = DiffusionGenerationConfig(max_new_tokens=14, steps=100, eos_early_stop=False, alg="entropy")
    (row,), logits = decode(model, [Request(ids=prompt, settings=settings)])
    steps = sorted({step for _, step, _ in logits})
    ids, compared = torch.tensor([row.ids]), 0
    known = {step: {place for _, s, place in logits if s == step} for step in steps}
    for step in steps:
        # The block as it was: what was scored was masked. In other blocks anything may be masked: nobody sees them.
        noisy = ids.clone()
        noisy[0, list(known[step])] = MASK
        want = training_logits(model, ids, noisy, shift)
        for place in known[step]:
            assert (logits[0, step, place] - want[place]).abs().max() < 1e-10
            compared += 1
    assert compared > 20


def test_more_than_an_answer_needs_costs_nothing_and_changes_nothing(block_model, tokens):
    """No length has to be guessed: the canvas grows block by block, up to an end token or the most allowed."""
    model = block_model(False, size=4, seed=5)
    prompts = [tokens(n, seed=n).tolist() for n in (3, 7)]
    bias = {"logit_bias": {EOS: 2.5}, "temperature": 1.0, "steps": 10**6}
    ended = 0
    for seed in range(6):
        short, long = ({"max_new_tokens": n, **bias} for n in (25, 110))
        requests = [Request(ids=ids, settings=DiffusionGenerationConfig(**short), seed=seed) for ids in prompts]
        few, _ = decode(model, requests)
        decoding = Decoding(model)
        many = [
            decoding.admit(Request(ids=ids, settings=DiffusionGenerationConfig(**long), seed=seed)) for ids in prompts
        ]
        while decoding.rows:
            decoding.step()
            canvas = decoding._lanes[True, False].canvas
            assert canvas.ids.shape[1] <= max(row.settled for row in canvas.rows) + 2 * 4
            for row in canvas.rows:
                assert len(row.plan) <= row.num_steps + 4  # and no step is planned that is not near
        for one, other in zip(few, many, strict=True):
            assert other.ids[: one.end] == one.ids[: one.end]
            if one.reason == "end":
                ended += 1
                assert (other.end, other.reason, other.cost.as_dict()) == (one.end, "end", one.cost.as_dict())
    assert ended > 3


def test_a_row_that_ends_frees_its_pages_at_once(block_model, tokens):
    model = block_model(size=4)
    decoding = Decoding(model)
    config = DiffusionGenerationConfig(max_new_tokens=40, steps=40)
    decoding.admit(Request(ids=tokens(9).tolist(), settings=config.merged({"suppress_tokens": [EOS]})))
    ending = decoding.admit(Request(ids=tokens(90).tolist(), settings=config.merged({"max_new_tokens": 36})))
    dropped = decoding.admit(Request(ids=tokens(80, seed=1).tolist(), settings=config))
    decoding.step()
    scorer = decoding._lanes[True, False].scorer
    assert isinstance(scorer, BlockScorer)
    assert len(scorer.texts) == 3
    full = scorer.cache.num_bytes
    decoding.drop(dropped)
    ending.config.logit_bias = None
    ending.vocabulary.bias[EOS] = 100.0  # from now on it ends
    ending.vocabulary._banned = None
    for _ in range(4):
        decoding.step()
    assert ending.reason == "end"
    assert dropped not in scorer.texts
    assert ending not in scorer.texts
    assert scorer.cache.num_bytes < full / 2
    while decoding.rows:
        decoding.step()
    assert not scorer.texts
    assert scorer.cache.num_bytes == 0


def test_answers_to_one_prompt_store_and_compute_it_once(block_model, tokens):
    model = block_model(size=4)
    prompt = tokens(80).tolist()
    config = DiffusionGenerationConfig(max_new_tokens=8, steps=8, temperature=1.0)
    decoding = Decoding(model)
    rows = [decoding.admit(Request(ids=prompt, settings=config, seed=seed)) for seed in range(5)]
    decoding.step()
    assert decoding.forwards == 2  # the prompt, and the first step of all
    assert sum(row.cost.tokens_evaluated for row in rows) == 80 + 5 * (4 + 1)
    cache = decoding._lanes[True, False].scorer.cache
    shared = cache.num_bytes
    late = decoding.admit(Request(ids=[*prompt[:60], *tokens(5, seed=2).tolist()], settings=config, seed=9))
    decoding.step()
    assert late.cost.tokens_evaluated == 4 + 4  # behind the 60 shared ones a block of the prompt, and one with masks
    while decoding.rows:
        decoding.step()
    for row in [*rows, late]:
        decoding = Decoding(model)
        alone = decoding.admit(row.request)
        decoding.step()
        assert decoding._lanes[True, False].scorer.cache.num_bytes > shared / 2
        while decoding.rows:
            decoding.step()
        assert alone.ids == row.ids


def test_a_long_prompt_is_computed_in_parts_of_whole_blocks(block_model, tokens, monkeypatch):
    monkeypatch.setattr("CoDALanguageModel.blocks.LONGEST_PART", 10)
    config = DiffusionGenerationConfig(max_new_tokens=4, steps=4)
    for origin, prompt, want in (("text", 31, [8, 8, 16]), ("answer", 33, [9, 8, 4, 16]), ("text", 9, [12])):
        model, widths = block_model(False, origin, 4), []
        hook = model.model.register_forward_hook(lambda module, args, output, to=widths: to.append(output[0].shape[1]))
        decoding = Decoding(model)
        row = decoding.admit(Request(ids=tokens(prompt).tolist(), settings=config))
        decoding.step()
        hook.remove()
        assert widths == want
        assert row.cost.tokens_evaluated == sum(want)


def test_candidate_lengths_of_a_gap_share_the_text_left_of_it(block_model, tokens):
    for origin in ("text", "answer"):
        model, left = block_model(False, origin, 8), tokens(LEAST_SHARED + 48).tolist()
        pieces = [left, tokens(3, seed=1).tolist()]
        output = model.infill(pieces, infill_lengths=[1, 3, 5], steps=6)
        assert output.cost.tokens_evaluated < 2 * len(left)
        alone = {(n,): model.infill(pieces, gap_lengths=[n], steps=6, kv_cache="none").score for n in (1, 3, 5)}
        assert output.candidates == pytest.approx(alone, abs=1e-6)


def test_speculation_equals_the_stepwise_sampler_and_saves_passes(block_model, tokens):
    saved = 0
    for n, ((shift, origin), alg) in enumerate(itertools.product(CONTRACTS, ORDERS)):
        model, kv_cache = block_model(shift, origin, 6, seed=1), ("exact", "none", "exact")[n % 3]
        for i, options in enumerate(({"steps": 30}, {"steps": 8, "temperature": 0.9, "block_length": 3})):
            options = {
                "alg": alg,
                "max_new_tokens": 15,
                "kv_cache": kv_cache,
                "return_dict_in_generate": True,
                **options,
            }
            ids = tokens(2, 7, seed=i)
            stepwise = model.diffusion_generate(ids, **options)
            speculative = model.diffusion_generate(ids, speculate=3, **options)
            assert speculative.sequences.tolist() == stepwise.sequences.tolist()
            assert speculative.cost.forwards - speculative.cost.guard_hits <= stepwise.cost.forwards
            saved += stepwise.cost.forwards - speculative.cost.forwards
    assert saved > 0


def test_processors_see_the_whole_canvas(block_model, tokens):
    seen = []

    def note(ids, scores):
        seen.append((ids.shape, len(scores), int((ids == MASK).sum(dim=1)[0])))
        return scores

    model = block_model(size=4)
    model.diffusion_generate(tokens(1, 5), max_new_tokens=11, steps=11, logits_processor=[note], eos_early_stop=False)
    assert {shape[1] for shape, _, _ in seen} == {16}
    assert seen[0] == ((3, 16), 3, 11)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache": "dual"}, "kv_cache 'dual' approximates attention 'full'; .* must be exact or none"),
        ({"kv_cache": "prefix"}, "kv_cache 'prefix' approximates attention 'full'"),
        ({"block_length": 3}, "block_length must divide the model's block_size=4, or be None .* got 3"),
        ({"block_length": 8}, "block_length must divide the model's block_size=4, or be None .* got 8"),
        ({"suffix_window": 4, "block_length": 4}, "suffix_window says nothing with attention 'block_causal'"),
        ({"refresh_interval": 2}, "refresh_interval needs kv_cache 'prefix' or 'dual', got 'auto'"),
        ({"cache_drift": 0.1, "kv_cache": "exact"}, "cache_drift needs kv_cache 'prefix' or 'dual', got 'exact'"),
        (
            {"steps": 2},
            "steps must be at least the number of blocks: 8 masked tokens in blocks of block_length=4 are 3",
        ),
        ({"max_new_tokens": 128}, "do not fit in the context of 128 tokens"),
    ],
)
def test_what_blocks_contradict_is_refused(block_model, tokens, options, message):
    with pytest.raises(ValueError, match=message):
        block_model(size=4).diffusion_generate(tokens(1, 6), **{"max_new_tokens": 8, **options})


def test_the_exact_cache_is_refused_where_attention_is_full(model, tokens):
    with pytest.raises(ValueError, match="kv_cache 'exact' needs attention 'block_causal'.*one of none, prefix, dual"):
        model.diffusion_generate(tokens(1, 6), max_new_tokens=8, kv_cache="exact")


@pytest.mark.parametrize("kv_cache", ["exact", "none"])
def test_a_gap_whose_right_context_is_not_seen_is_refused(block_model, kv_cache):
    config = DiffusionGenerationConfig(max_new_tokens=0, kv_cache=kv_cache)
    for origin, ids, message in (
        (
            "text",
            [1, 2, MASK, 4, 5],
            r"the gap at token 2 .* \(token 4\).* before token 4.*block_size=4.*attention 'full'",
        ),
        ("text", [1, 2, MASK, 4, MASK, 5], r"the gap at token 2 .* \(token 5\)"),
        ("answer", [1, 2, MASK, 4, 5, 6, 7], r"the gap at token 2 .* \(token 6\).* before token 6"),
    ):
        decoding = Decoding(block_model(False, origin, 4))
        with pytest.raises(ValueError, match=message):
            decoding.admit(Request(ids=ids, settings=config))
        assert decoding.rows == []
        decoding.admit(Request(ids=ids[: 4 if origin == "text" else 6], settings=config))


def test_the_first_token_of_a_text_is_scored_without_the_shift_alone(block_model):
    config = DiffusionGenerationConfig(max_new_tokens=5, steps=5)
    (row,), _ = decode(block_model(False), [Request(ids=[], settings=config)])
    assert MASK not in row.ids
    with pytest.raises(ValueError, match="starts with a mask, which nothing scores"):
        decode(block_model(True), [Request(ids=[], settings=config)])
