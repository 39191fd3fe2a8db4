"""What a row tells of its tokens, tokens that are forced on it, and penalties of those that stand in it."""

import pytest
import torch

from CoDALanguageModel import Decoding, DiffusionGenerationConfig, Request, UserError
from CoDALanguageModel.decoding_settings import NUM_BEST

MASK = 67
REGIMES = [{}, {"speculate": 2}, {"threshold": 0.2}, {"kv_cache": "dual"}, {"remask": "conf", "temperature": 0.8}]


@pytest.fixture(scope="module")
def blocks(make_model):
    return make_model(attention="block_causal", block_size=4).double()


def finish(model, *requests):
    """Decode rows together."""
    decoding = Decoding(model)
    rows = [decoding.admit(request) for request in requests]
    while decoding.rows:
        for record in decoding.step():
            assert record.error is None
    return rows


def asked(ids, keeps_best=True, forced=None, **settings):
    config = DiffusionGenerationConfig().merged({"output_scores": True, "max_new_tokens": 0, "steps": 64} | settings)
    return Request(ids=ids, settings=config, seed=0, keeps_best=keeps_best, forced=forced)


def permitted(model, logits):
    logits = logits.clone()
    for token in (MASK, model.config.pad_token_id):
        logits[..., token] = -torch.inf
    logits[..., model.config.num_token_ids :] = -torch.inf
    return logits


@pytest.mark.parametrize("regime", REGIMES, ids=str)
def test_evidence_is_that_of_output_scores_and_the_best_are_in_order(double_model, tokens, regime):
    prompt = tokens(1, 5)
    options = {"max_new_tokens": 12, "steps": 8, **regime}
    (row,) = finish(double_model, asked(prompt[0].tolist(), **options))
    out = double_model.diffusion_generate(prompt, output_scores=True, return_dict_in_generate=True, **options)
    columns = range(5, row.end)
    assert row.ids[5 : row.end] == out.sequences[0, 5 : row.end].tolist()
    got = torch.tensor([row.evidence[column].log_probability for column in columns])
    torch.testing.assert_close(got, out.scores[0, 5 : row.end])
    assert [row.evidence[column].step for column in columns] == out.commit_steps[0, 5 : row.end].tolist()
    for column in columns:
        evidence = row.evidence[column]
        known = dict(evidence.best)
        assert len(evidence.best) == len(known) == NUM_BEST
        assert list(known.values()) == sorted(known.values(), reverse=True)
        if row.ids[column] in known:
            assert known[row.ids[column]] == pytest.approx(evidence.log_probability, abs=1e-6)


def test_rows_that_keep_the_best_and_rows_that_do_not_get_the_same_tokens_together(double_model, tokens):
    ids = [row.tolist() for row in tokens(3, 6)]
    options = {"max_new_tokens": 9, "steps": 5, "temperature": 0.9}
    alone = [finish(double_model, asked(row, keeps_best=False, **options))[0].ids for row in ids]
    requests = [asked(row, keeps_best=i == 1, **options) for i, row in enumerate(ids)]
    rows = finish(double_model, *requests)
    assert [row.ids for row in rows] == alone
    assert [bool(next(iter(row.evidence.values())).best) for row in rows] == [False, True, False]


def forced_request(ids, **options):
    return asked([ids[0], *[MASK] * (len(ids) - 1)], forced=ids, block_length=1, **options)


def test_forced_tokens_are_judged_from_left_to_right_in_any_company(double_model, tokens):
    texts = [tokens(1, 9)[0].tolist(), tokens(1, 5, seed=1)[0].tolist()]
    free = asked(texts[0], max_new_tokens=6)
    *rows, other = finish(double_model, *map(forced_request, texts), free)
    assert other.ids == finish(double_model, free)[0].ids
    for row, ids in zip(rows, texts, strict=True):
        assert row.ids == ids
        for i in range(1, len(ids)):
            canvas = torch.tensor([ids[:i] + [MASK] * (len(ids) - i)])
            with torch.no_grad():
                scores = permitted(double_model, double_model(canvas).logits[0, i - 1])
            expected = scores.float().log_softmax(dim=0)
            assert row.evidence[i].log_probability == pytest.approx(float(expected[ids[i]]), abs=1e-5)
            assert row.evidence[i].best[0][0] == int(expected.argmax())


def test_a_model_with_blocks_judges_forced_tokens_alike_with_and_without_a_cache(blocks, tokens):
    ids = tokens(1, 14)[0].tolist()
    cached, anew = finish(blocks, forced_request(ids), forced_request(ids, kv_cache="none"))
    assert cached.ids == anew.ids == ids
    for i in range(1, len(ids)):
        assert cached.evidence[i].log_probability == pytest.approx(anew.evidence[i].log_probability, abs=1e-6)


def test_forced_tokens_must_fit_the_canvas(double_model):
    with pytest.raises(UserError, match="one token per column \\(3\\), got 2"):
        finish(double_model, asked([1, MASK, MASK], forced=[1, 2]))


@pytest.mark.parametrize(("presence", "frequency"), [(1.5, 0.0), (0.0, 0.7), (-0.5, 1.1)])
def test_penalties_count_what_was_filled_on_both_sides_and_not_the_prompt(double_model, presence, frequency):
    ids = [5, 5, 7, *[MASK] * 4, 9, *[MASK] * 4, 11]
    options = {"steps": 8, "alg": "maskgit_plus", "presence_penalty": presence, "frequency_penalty": frequency}
    (row,) = finish(double_model, asked(ids, **options))
    canvas, filled = list(ids), []
    for step in sorted(set(row.commit_steps) - {-1}):
        with torch.no_grad():
            logits = permitted(double_model, double_model(torch.tensor([canvas])).logits[0])
        counts = torch.bincount(torch.tensor([canvas[i] for i in filled], dtype=torch.long), minlength=logits.shape[1])
        tokens = (logits - presence * (counts > 0) - frequency * counts).argmax(dim=-1)
        now = [i for i, when in enumerate(row.commit_steps) if when == step]
        assert [row.ids[i] for i in now] == [int(tokens[i - 1]) for i in now]
        for i in now:
            canvas[i] = row.ids[i]
        filled += now
    assert canvas == row.ids
    assert filled != sorted(filled)  # so that some stood on the right of others
    plain = finish(double_model, asked(ids, **options | {"presence_penalty": 0.0, "frequency_penalty": 0.0}))[0]
    assert plain.ids != canvas
