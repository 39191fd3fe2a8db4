"""Facts of the open loop: rows that come and go at any step get what they get alone, and cost nothing once they end."""

import random
import tracemalloc

import numpy as np
import pytest
import torch

from CoDALanguageModel import Decoding, DiffusionGenerationConfig, Request, UserError
from CoDALanguageModel.scoring import TOKENS_OF_A_PASS, even_parts

EOS, PAD, MASK = 65, 66, 67
ORDERS = ["origin", "maskgit_plus", "topk_margin", "entropy"]
REGIMES = [
    {},
    {"alg_temp": 0.4, "temperature": 0.9, "top_p": 0.8},
    {"temperature": 0.7, "top_k": 9, "logit_bias": {"5": 2.0}},
    {"repetition_penalty": 1.3},
    {"presence_penalty": 1.5, "frequency_penalty": -0.4},
    {"suppress_tokens": [1, 2, 3], "output_scores": True},
    {"kv_cache": "prefix"},
    {"kv_cache": "dual", "refresh_interval": 2},
    {"kv_cache": "dual", "cache_drift": 1e-3, "drift_interval": 2},
    {"kv_cache": "dual", "block_length": 4, "refresh_window": 2, "suffix_window": 3},
    {"threshold": 0.3},
    {"factor": 1.0, "kv_cache": "prefix"},
    {"entropy_bound": 1.5},
    {"block_length": 4, "suffix_window": 3},
    {"speculate": 2},
    {"speculate": 3, "threshold": 0.3, "temperature": 0.8},
    {"remask": "conf", "temperature": 1.0, "block_length": 5},
    {"stop_strings": ["A", "Bk"], "block_length": 3},
]
NEED_FINAL = {"threshold", "factor", "entropy_bound", "speculate", "remask"}


def letters(ids):
    """A text with one character per token."""
    return "".join(chr(48 + i) for i in ids)


def draw_request(rng: random.Random, regime: dict) -> Request:
    """A ragged prompt, sometimes with gaps, under a regime."""
    algs = ORDERS if NEED_FINAL & set(regime) else [*ORDERS, "p2"]
    prompt = [rng.randrange(64) for _ in range(rng.randint(1, 12))]
    for i in rng.sample(range(1, len(prompt)), min(len(prompt) - 1, rng.choice([0, 0, 1, 3]))):
        prompt[i] = MASK
    new = rng.choice([0, 3, 8, 14]) if MASK in prompt else rng.choice([1, 6, 12, 17])
    settings = {"alg": rng.choice(algs), "block_length": rng.choice([None, 5]), **regime}
    config = DiffusionGenerationConfig(max_new_tokens=new, steps=rng.randint(8, 16), **settings)
    return Request(ids=prompt, settings=config, seed=rng.randrange(1000))


def alone(model, request: Request):
    """The row after all its steps, with nobody beside it."""
    decoding = Decoding(model, decode=letters)
    row = decoding.admit(request)
    while decoding.rows:
        decoding.step()
    return row


def outcome(row):
    """All that must not depend on company."""
    return row.text_ids(), row.reason, row.end, row.cost.as_dict() if not row.config.speculate else None, row.num_steps


@pytest.fixture(scope="module")
def ending_model(make_model):
    """A model that likes to end, in float64: the last bit of a product must not decide."""
    model = make_model(seed=5).double()
    with torch.no_grad():
        bias = torch.zeros(72, dtype=torch.float64)
        bias[EOS] = 4.0
    model.lm_head.register_forward_hook(lambda module, args, logits: logits + bias)
    return model


@pytest.mark.parametrize("seed", range(6))
def test_rows_that_join_and_leave_at_any_step_get_what_they_get_alone(double_model, ending_model, seed, monkeypatch):
    """Every regime and order in one batch, admitted and dropped at random steps."""
    if seed % 3 == 2:  # rows of like lengths in passes of their own, as those of longer texts are on a CPU
        monkeypatch.setattr("CoDALanguageModel.scoring.TOKENS_OF_A_PASS", 4)
    rng = random.Random(seed)
    model = (double_model, ending_model)[seed % 2]
    requests = [draw_request(rng, regime) for regime in REGIMES]
    rng.shuffle(requests)
    decoding = Decoding(model, decode=letters)
    waiting, admitted, dropped, shown = list(requests), {}, set(), {}
    while waiting or decoding.rows:
        for _ in range(rng.randint(0, 3)):
            if waiting:
                request = waiting.pop()
                admitted[decoding.admit(request)] = request
        if decoding.rows and rng.random() < 0.04:
            row = rng.choice(decoding.rows)
            decoding.drop(row)
            dropped.add(row)
        for record in decoding.step():
            assert record.error is None
            final = record.row.ids[: record.settled]
            before = shown.get(record.row, [])
            assert final[: len(before)] == before  # what is final stays
            shown[record.row] = final
            assert (record.finished is not None) == (record.row not in decoding.rows)
    assert len(dropped) < len(requests) / 2
    for row, request in admitted.items():
        if row in dropped:
            continue
        single = alone(model, request)
        assert outcome(row) == outcome(single), request
        if request.settings.output_scores:
            assert row.commit_steps == single.commit_steps
            torch.testing.assert_close(row.log_probability, single.log_probability, rtol=0, atol=1e-5)


def test_what_a_step_reports_is_what_has_changed(double_model):
    rng = random.Random(3)
    decoding = Decoding(double_model, decode=letters)
    rows = [decoding.admit(draw_request(rng, regime)) for regime in REGIMES]
    seen = {row: list(row.ids) for row in rows}
    while decoding.rows:
        for record in decoding.step():
            different = [i for i, (a, b) in enumerate(zip(seen[record.row], record.row.ids, strict=True)) if a != b]
            assert sorted(set(record.changed)) == different
            seen[record.row] = list(record.row.ids)
            canvas = next(lane.canvas for lane in decoding._lanes.values() if record.row in lane.canvas.rows)
            on_device = canvas.ids[canvas.rows.index(record.row), : record.row.width]
            assert on_device.tolist() == record.row.ids


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"alg": "entropy"}, {"alg": "p2", "temperature": 0.7, "max_new_tokens": 5}),
        ({"alg": "origin", "block_length": 3}, {"alg": "topk_margin", "block_length": 4, "suffix_window": 2}),
        ({"alg": "entropy", "speculate": 1}, {"alg": "maskgit_plus", "speculate": 3, "threshold": 0.4}),
    ],
)
def test_rows_with_different_settings_share_a_forward_pass(model, tokens, one, other):
    decoding, passes = Decoding(model), []
    for i, settings in enumerate((one, other)):
        config = DiffusionGenerationConfig(**{"max_new_tokens": 8, "steps": 8, **settings})
        decoding.admit(Request(ids=tokens(3 + 4 * i).tolist(), settings=config))
    hook = model.register_forward_hook(lambda module, args, output: passes.append(1))
    records = decoding.step()
    hook.remove()
    assert [len(records), len(passes), decoding.forwards] == [2, 1, 1]


def test_a_pass_of_its_own_is_made_where_padding_would_cost_more():
    assert even_parts([100, 110, 90]) == [[0, 1, 2]]
    assert even_parts([100, 2000, 90, 1990]) == [[1, 3], [0, 2]]
    rng = random.Random(0)
    lengths = [rng.randint(20, 900) for _ in range(40)]
    parts = even_parts(lengths)
    assert sorted(place for part in parts for place in part) == list(range(40))

    def cost(parts):
        return sum(len(part) * max(lengths[i] for i in part) + TOKENS_OF_A_PASS for part in parts)

    assert cost(parts) <= min(cost([list(range(40))]), cost([[i] for i in range(40)]))
    assert even_parts([]) == []


@pytest.mark.parametrize("why", ["end", "stop", "dropped"])
def test_a_row_that_has_ended_is_not_computed_again(make_model, tokens, why):
    model = make_model(seed=2)
    widths = []
    model.model.register_forward_hook(lambda module, args, output: widths.append(tuple(output[0].shape[:2])))
    short = DiffusionGenerationConfig(max_new_tokens=6, steps=6, block_length=1, eos_early_stop=False)
    biased = {"end": {"logit_bias": {EOS: 100.0}}, "stop": {"logit_bias": {7: 100.0}, "stop_strings": ["77"]}}
    long = short.merged({"max_new_tokens": 30, "steps": 30, "eos_early_stop": True, **biased.get(why, {})})
    decoding = Decoding(model, decode=lambda ids: "".join(map(str, ids)))
    decoding.admit(Request(ids=tokens(4).tolist(), settings=short))
    row = decoding.admit(Request(ids=tokens(5).tolist(), settings=long))
    for step in range(6):
        if why == "dropped" and step == 2:
            decoding.drop(row)
            decoding.drop(row)  # twice is no error
        decoding.step()
    together = {"end": 1, "stop": 2, "dropped": 2}[why]
    assert widths == [(2, 35)] * together + [(1, 10)] * (6 - together)
    assert decoding.rows == []
    assert row.reason == {"end": "end", "stop": "stop", "dropped": None}[why]
    assert decoding.step() == []


def test_a_late_row_takes_part_in_the_next_step(model, tokens):
    config = DiffusionGenerationConfig(max_new_tokens=9, steps=9)
    decoding = Decoding(model)
    first = decoding.admit(Request(ids=tokens(4).tolist(), settings=config))
    decoding.step()
    late = decoding.admit(Request(ids=tokens(20).tolist(), settings=config))
    assert decoding.rows == [first, late]
    assert decoding.width == 29
    assert [record.row for record in decoding.step()] == [first, late]
    assert (first.num_steps, late.num_steps) == (2, 1)


@pytest.mark.parametrize("regime", [{}, {"speculate": 2}, {"alg": "p2"}])
def test_a_row_whose_scores_are_not_finite_fails_alone(make_model, tokens, regime):
    model = make_model(seed=3)
    with torch.no_grad():
        model.model.embed_tokens.weight[9] = torch.nan
    config = DiffusionGenerationConfig(max_new_tokens=6, steps=6, eos_early_stop=False, suppress_tokens=[9], **regime)
    good = Request(ids=[1, 2, 3], settings=config)
    want = alone(model, good).ids
    decoding = Decoding(model)
    row = decoding.admit(good)
    faulty = decoding.admit(Request(ids=[1, 9, 3], settings=config))
    errors = [record for record in decoding.step() if record.error is not None]
    assert [record.row for record in errors] == [faulty]
    assert "not finite" in str(errors[0].error)
    assert errors[0].finished is None
    assert decoding.rows == [row]
    while decoding.rows:
        decoding.step()
    assert row.ids == want


def test_reading_for_a_stop_string_takes_time_linear_in_the_answer(make_model, tokens):
    read = []

    def decode(ids):
        read.append(len(ids))
        return letters(ids)

    model = make_model(seed=1)
    config = DiffusionGenerationConfig(max_new_tokens=100, steps=100, block_length=1, stop_strings=["???"])
    decoding = Decoding(model, decode=decode)
    row = decoding.admit(Request(ids=tokens(4).tolist(), settings=config.merged({"suppress_tokens": [15, EOS]})))
    while decoding.rows:
        decoding.step()
    assert row.reason == "length"
    assert len(read) == 100
    assert max(read) <= 1 + 4 * (3 + 1)


def test_a_stop_string_is_found_where_it_is_complete_first_though_characters_are_cut(make_model, tokens):
    """Two tokens make a character here, and the first of them alone is none yet."""

    def decode(ids):
        return letters(ids[1::2]) + "\ufffd" * (len(ids) % 2)

    model = make_model(seed=4)
    settings = {"max_new_tokens": 40, "steps": 40, "block_length": 4, "suppress_tokens": [EOS]}
    prompt = tokens(3).tolist()
    free = alone(model, Request(ids=prompt, settings=DiffusionGenerationConfig(**settings)))
    text = decode(free.ids[3:])
    for start in (0, 7, 16):
        stop = text[start : start + 3]
        config = DiffusionGenerationConfig(**settings, stop_strings=[stop, "\ufffd0"])
        decoding = Decoding(model, decode=decode)
        row = decoding.admit(Request(ids=prompt, settings=config))
        while decoding.rows:
            decoding.step()
        assert (row.reason, row.end) == ("stop", 3 + 2 * (text.index(stop) + 3))
        assert row.ids[3 : row.end] == free.ids[3 : row.end]


@pytest.mark.parametrize(
    ("ids", "settings", "message"),
    [
        ([], {}, "starts with a mask, which nothing scores"),
        ([MASK, 1], {}, "starts with a mask, which nothing scores"),
        ([1, 72], {}, r"token ids must be in \[0, 72\), got 1 to 72"),
        ([1], {"max_new_tokens": 0}, "nothing to fill"),
        ([1], {"max_new_tokens": 128}, "do not fit in the context of 128 tokens"),
        ([1], {"stop_strings": ["x"]}, "stop_strings need the tokenizer"),
        ([1], {"seed": [1, 2]}, "seed must be one integer for one row"),
        ([1], {"steps": 2, "block_length": 2}, "steps must be at least the number of blocks"),
        ([1], {"suppress_tokens": list(range(68))}, "exclude all of the 68 ids"),
        ([1], {"suppress_tokens": [72]}, r"suppress_tokens must hold token ids in \[0, 72\)"),
    ],
)
def test_what_cannot_be_decoded_is_refused_and_changes_nothing(model, ids, settings, message):
    decoding = Decoding(model)
    with pytest.raises(ValueError, match=message):
        decoding.admit(Request(ids=ids, settings=DiffusionGenerationConfig(**{"max_new_tokens": 8, **settings})))
    assert decoding.rows == []


def test_a_request_takes_a_row_of_integers_however_it_is_held(model):
    config = DiffusionGenerationConfig(max_new_tokens=4, steps=4)
    want = alone(model, Request(ids=[1, 2, 3], attention_mask=[0, 1, 1], settings=config)).ids
    for ids, real in (
        (torch.tensor([1, 2, 3]), torch.tensor([False, True, True])),
        (np.array([1, 2, 3], dtype=np.int32), np.array([0, 1, 1])),
        ((np.int64(1), torch.tensor(2), 3), (0, True, 1)),
    ):
        assert alone(model, Request(ids=ids, attention_mask=real, settings=config)).ids == want
    for ids, got in (
        (torch.tensor([[1, 2]]), r"torch\.int64 \(1, 2\)"),
        (torch.tensor([1.0]), r"torch\.float32 \(1,\)"),
        (torch.tensor(1), r"torch\.int64 \(\)"),
        ([1, 2.5], r"\[1, 2\.5\]"),
        ([[1], [2]], r"\[\[1\], \[2\]\]"),
        ("a text", "'a text'"),
        (b"bytes", "b'bytes'"),
        ({1, 2}, r"\{1, 2\}"),
    ):
        with pytest.raises(UserError, match=f"^ids must be a list or tensor of one dimension, of integers, got {got}$"):
            Request(ids=ids, settings=config)
    for real in ([1, 1], [1, 2, 1]):
        with pytest.raises(UserError, match=r"attention_mask must hold 0 or 1 for each id \(3\)"):
            Decoding(model).admit(Request(ids=[1, 2, 3], attention_mask=real, settings=config))


def test_an_answer_that_no_context_holds_is_refused_before_there_is_room_for_it(model):
    settings = DiffusionGenerationConfig(max_new_tokens=10**6)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="max_new_tokens=1000000 do not fit in the context of 128 tokens"):
            Decoding(model).admit(Request(ids=[1], settings=settings))
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()
