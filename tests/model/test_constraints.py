"""Answers under a constraint: always of the language, in any order of commits, and otherwise those of the model."""

import itertools
import json
import random
import re

import jsonschema
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LogitsProcessor, PreTrainedTokenizerFast

from CoDALanguageModel import Decoding, DiffusionGenerationConfig, Request, UserError
from CoDALanguageModel.constraints import Cells, Lexicon, constraint_of
from CoDALanguageModel.row import complete

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"}
CORPUS = [
    '{"name": "a b", "count": 12, "tags": ["x", "yy"], "none": null, "on": true, "off": false}',
    "é ü 日本 \U0001f600",
]
ALGS = ["origin", "maskgit_plus", "topk_margin", "entropy", "p2"]
REGIMES = [
    {},
    {"threshold": 0.3},
    {"factor": 1.0},
    {"entropy_bound": 1.5},
    {"remask": "conf"},
    {"kv_cache": "prefix"},
    {"kv_cache": "dual", "block_length": 8, "refresh_window": 2},
    {"block_length": 4, "suffix_window": 3},
    {"alg_temp": 0.5},
    {"top_p": 0.5},
    {"top_k": 3},
]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["x", "yy", None]}, "maxItems": 2},
    },
    "required": ["name", "age"],
}


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer of bytes with a few merges."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


@pytest.fixture(scope="module")
def ids_of(tokenizer):
    """Give the ids of the model's special tokens."""
    return {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in SPECIAL}


@pytest.fixture(scope="module")
def make(make_model, tokenizer, ids_of):
    """Give a function that makes a model with random weights for the tokenizer."""

    def make(seed=0, **changes):
        size = len(tokenizer)
        return make_model(
            seed, vocab_size=size + 4, num_token_ids=size, max_position_embeddings=256, **ids_of, **changes
        )

    return make


@pytest.fixture(scope="module")
def model(make):
    return make()


def text_of(tokenizer, ids):
    """The text before the first end token."""
    ends = [i for i, token in enumerate(ids) if token in (tokenizer.eos_token_id, tokenizer.pad_token_id)]
    return tokenizer.decode(ids[: ends[0] if ends else len(ids)])


def answer(model, tokenizer, prompt=(70, 71, 72), new=40, **options):
    out = model.diffusion_generate(torch.tensor([prompt]), max_new_tokens=new, tokenizer=tokenizer, **options)
    return out[0, len(prompt) :].tolist()


def no_ascii(tokenizer):
    """Ids that stand for other text than ASCII, or for none and do not end an answer."""
    tokens = Lexicon.of(tokenizer).tokens
    return [i for i, t in enumerate(tokens) if not (t and t.isascii()) and i != tokenizer.eos_token_id]


def least_of(model, tokenizer, **shape):
    config = complete(DiffusionGenerationConfig(**shape), model.config)
    return constraint_of(config, model.config.vocab_size, Lexicon.of(tokenizer)).least


# The rules of the sets, against enumeration.


def small_lexicon(tokens):
    lexicon = Lexicon(None)
    vars(lexicon)["tokens"] = tokens
    return lexicon


def random_pattern(rng, depth=3):
    if depth == 0 or rng.random() < 0.25:
        return rng.choice(["a", "b", "c", "ab", "[ab]", "[^a]", ""])
    one, two = (random_pattern(rng, depth - 1) for _ in range(2))
    return rng.choice([f"{one}{two}", f"({one}|{two})", f"({one})*", f"({one}){{1,2}}", f"({one})?{two}"])


@pytest.mark.parametrize("seed", range(12))
def test_allowed_tokens_are_those_of_enumeration(seed):
    """A vocabulary of 6 (the last one ends an answer) and 5 cells; cells are filled and masked again at random."""
    rng = random.Random(seed)
    tokens = [b"a", b"b", b"ab", b"ca", b"bb", b""]
    pattern = random_pattern(rng)
    settings = {"mask_token_id": 6, "eos_token_id": [5], "num_token_ids": 6, "regex": pattern}
    try:
        constraint = constraint_of(DiffusionGenerationConfig(**settings), 7, small_lexicon(tokens))
    except UserError:  # no text, or none of these tokens
        constraint = None
    matching = []
    for sequence in itertools.product(range(6), repeat=5):
        end = sequence.index(5) if 5 in sequence else 5
        text = b"".join(tokens[t] for t in sequence[:end]).decode()
        if set(sequence[end:]) <= {5} and re.fullmatch(pattern, text):
            matching.append(sequence)
    if constraint is None:
        assert not matching
        return
    canvas = [None] * 5
    cells = Cells(constraint, canvas)
    for _ in range(60):
        fitting = [s for s in matching if all(c in (None, t) for c, t in zip(canvas, s, strict=True))]
        assert cells.is_completable == bool(fitting)
        if not fitting:
            return
        for i in (i for i, token in enumerate(canvas) if token is None):
            expected = {s[i] for s in fitting}
            kinds = constraint.allowed(*cells.sets(i))
            assert {t for t in range(6) if kinds[constraint.class_of[t]]} == expected
            assert {t for t in range(6) if cells.allows(i, int(constraint.class_of[t]))} == expected
        i = rng.randrange(5)
        canvas[i] = None if canvas[i] is not None else rng.choice(fitting)[i]
        cells.update(canvas) if rng.random() < 0.5 else cells.put(
            i, None if canvas[i] is None else int(constraint.class_of[canvas[i]])
        )


def test_the_shortest_text_is_found_and_its_length_is_the_least_that_is_taken(model, tokenizer):
    least = least_of(model, tokenizer, json_schema=SCHEMA)
    prompt, options = torch.tensor([[70, 71]]), {"json_schema": SCHEMA, "tokenizer": tokenizer}
    with pytest.raises(
        UserError, match=f"max_new_tokens must be at least {least} for this json_schema, got {least - 1}"
    ):
        model.diffusion_generate(prompt, max_new_tokens=least - 1, **options)
    ids = model.diffusion_generate(prompt, max_new_tokens=least, **options)[0, 2:].tolist()
    jsonschema.validate(json.loads(text_of(tokenizer, ids)), SCHEMA)
    assert tokenizer.eos_token_id not in ids


# Every answer is valid.


def random_schema(rng, depth=2):
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "pattern"]
    kind = rng.choice(kinds + ["object", "array", "anyOf", "object"] * (depth > 0))
    if kind == "string":
        return {
            "type": "string",
            **rng.choice([{}, {"maxLength": rng.randint(0, 8)}, {"minLength": 2}, {"format": "date"}]),
        }
    if kind in ("integer", "number"):
        low = rng.randint(-200, 200)
        return {
            "type": kind,
            **rng.choice([{}, {"minimum": low}, {"minimum": low, "maximum": low + rng.randint(0, 300)}]),
        }
    if kind == "enum":
        return {"enum": rng.sample([1, "a", "é\n", None, True, [1, "b"], {"k": []}, -2.5], rng.randint(1, 4))}
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice(["^[A-Z]{2}[0-9]+$", 'a\\\\"b', "^(foo|bar)$", "\\w-\\d"])}
    if kind == "object":
        names = rng.sample(["a", "name", "x y", "é", '"q"'], rng.randint(0, 4))
        fields = {name: random_schema(rng, depth - 1) for name in names}
        return {"type": "object", "properties": fields, "required": [n for n in names if rng.random() < 0.6]}
    if kind == "array":
        return {
            "type": "array",
            "items": random_schema(rng, depth - 1),
            "minItems": rng.randint(0, 2),
            "maxItems": rng.randint(2, 4),
        }
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
    return {"type": kind}


def check_random_schemas(model, tokenizer, seeds):
    for seed in seeds:
        rng = random.Random(seed)
        schema = random_schema(rng)
        least = least_of(model, tokenizer, json_schema=schema)
        new = least + rng.choice([0, 1, 5, 25])
        alg = rng.choice(ALGS)
        regimes = [
            r for r in REGIMES if alg != "p2" or not {"threshold", "factor", "entropy_bound", "remask"} & r.keys()
        ]
        options = {"alg": alg, "block_length": rng.choice([None, 7]), **rng.choice(regimes)}
        steps = rng.choice([1, 3, new]) + (new // options["block_length"] if options["block_length"] else 0)
        output = answer(
            model, tokenizer, new=new, json_schema=schema, temperature=2.0, steps=steps, seed=seed, **options
        )
        assert tokenizer.mask_token_id not in output
        text = text_of(tokenizer, output)
        jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())


def test_every_answer_is_valid_by_its_schema_in_every_order_and_regime(model, tokenizer):
    check_random_schemas(model, tokenizer, range(60))


@pytest.mark.slow
def test_every_answer_of_500_random_schemas_is_valid(model, tokenizer):
    check_random_schemas(model, tokenizer, range(1000, 1500))


@pytest.mark.parametrize("alg", ALGS)
@pytest.mark.parametrize("new", [24, 41])
def test_every_answer_matches_its_expression(model, tokenizer, alg, new):
    pattern = "(def|class) [a-z_]{2,8}\\(\\):\n(    [^\n]{3,}\n){1,3}"
    for seed, steps in itertools.product(range(3), (1, 5, new)):
        output = answer(model, tokenizer, new=new, regex=pattern, temperature=2.0, alg=alg, steps=steps, seed=seed)
        assert re.fullmatch(pattern, text_of(tokenizer, output))


@pytest.mark.parametrize("causal_context", [False, True])
def test_a_model_by_blocks_answers_by_the_schema(make, tokenizer, causal_context):
    model = make(attention="block_causal", block_size=8, causal_context=causal_context)
    for seed, kv_cache in itertools.product(range(3), ("none", "exact")):
        ids = answer(model, tokenizer, json_schema=SCHEMA, temperature=2.0, kv_cache=kv_cache, seed=seed, steps=40)
        jsonschema.validate(json.loads(text_of(tokenizer, ids)), SCHEMA)


# Where the model's own answer will do, it is the answer.


@pytest.mark.parametrize("regime", [*REGIMES, {"steps": 3}, {"alg": "p2", "block_length": 8}])
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_an_answer_that_is_valid_by_itself_stays_as_it_is(model, tokenizer, regime, temperature):
    excluded = [*no_ascii(tokenizer), tokenizer.eos_token_id]  # each canvas on the way is completable
    for seed, alg in enumerate(ALGS[:4]):
        options = {"steps": 40, "alg": alg, "temperature": temperature, "seed": seed, "suppress_tokens": excluded}
        options |= regime
        free = answer(model, tokenizer, **options)
        assert answer(model, tokenizer, regex=r"[\x00-\x7f]*", **options) == free


def test_the_draws_that_are_allowed_stay_where_others_are_not(model, tokenizer):
    """A language of two texts, one of them the model's own, leaves the model its own."""
    for seed in range(4):
        options = {"steps": 6, "temperature": 1.0, "seed": seed, "new": 12}
        ascii_only = [*no_ascii(tokenizer), tokenizer.eos_token_id]
        free = answer(model, tokenizer, suppress_tokens=ascii_only, **options)
        pattern = f"{re.escape(tokenizer.decode(free))}|[x-z ]{{5,60}}"
        assert answer(model, tokenizer, regex=pattern, suppress_tokens=ascii_only, **options) == free


def test_rows_in_company_get_what_they_get_alone(model, tokenizer):
    shapes = [
        {},
        {"json_schema": SCHEMA},
        {"regex": "[a-f]{3,9}"},
        {},
        {"json_schema": SCHEMA, "temperature": 0.0},
        {"regex": "(ab)*"},
    ]
    base = {"max_new_tokens": 32, "steps": 32, "temperature": 1.5}
    config = DiffusionGenerationConfig()

    def decode(places):
        decoding = Decoding(model, lexicon=Lexicon.of(tokenizer))
        rows = {}
        for place in places:
            settings = config.merged({**base, **shapes[place]})
            rows[place] = decoding.admit(Request(ids=[70 + place, 75, 80], settings=settings, seed=place))
            decoding.step()  # they come one after the other
        while decoding.rows:
            for record in decoding.step():
                assert record.error is None
        return {place: row.text_ids() for place, row in rows.items()}

    together = decode(range(len(shapes)))
    for place in range(len(shapes)):
        assert decode([place])[place] == together[place]


# Gaps.


def test_a_gap_is_filled_with_a_text_of_the_language(model, tokenizer):
    pieces = [tokenizer('{"name": "a", "count": ')["input_ids"], tokenizer("}")["input_ids"]]
    for seed in range(4):
        output = model.infill(
            pieces,
            gap_lengths=[5],
            end_of_gap=True,
            regex="[1-9][0-9]{1,3}",
            tokenizer=tokenizer,
            temperature=2.0,
            seed=seed,
        )
        assert re.fullmatch("[1-9][0-9]{1,3}", tokenizer.decode(output.gaps[0]))
        assert json.loads(tokenizer.decode(output.ids))["name"] == "a"


def test_what_stands_between_two_gaps_belongs_to_the_text(model, tokenizer):
    pieces = [tokenizer("x = ")["input_ids"], tokenizer(", ")["input_ids"], tokenizer("!")["input_ids"]]
    for seed in range(4):
        output = model.infill(
            pieces, gap_lengths=[3, 4], regex="a+, b+", tokenizer=tokenizer, temperature=2.0, seed=seed
        )
        whole = tokenizer.decode(output.ids)
        assert re.fullmatch("x = a+, b+!", whole.replace("</s>", ""))
    with pytest.raises(
        UserError, match=r"gaps of 7 masks cannot be filled .* matches regex; the shortest text of it has"
    ):
        model.infill(pieces, gap_lengths=[3, 4], regex="[ab]+", tokenizer=tokenizer)


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regex": "a", "json_schema": {}}, "regex and json_schema exclude each other"),
        ({"regex": "a", "speculate": 2}, "speculate cannot be used with regex"),
        ({"json_schema": {}, "stop_strings": ["x"]}, "stop_strings cannot be used with json_schema"),
        ({"regex": 3}, "regex must be a regular expression or None, got 3"),
        ({"json_schema": "{}"}, "json_schema must be a JSON schema"),
        ({"regex": "(a"}, "regex cannot be used: it is no regular expression"),
        ({"regex": "a(?=b)"}, "regex cannot be used: a look at what stands ahead or behind is not taken"),
        ({"regex": "[^\\x00-\\U0010ffff]"}, "regex cannot be used: no text matches it"),
        ({"json_schema": {"not": {}}}, "json_schema at #: keyword 'not' is not supported"),
        (
            {"json_schema": {"type": "string", "maxLength": 10**6}},
            "json_schema cannot be used: it spells out more than",
        ),
    ],
)
def test_what_cannot_hold_is_refused_with_the_reason(model, tokenizer, options, message):
    with pytest.raises(UserError, match=message):
        model.diffusion_generate(torch.tensor([[70]]), max_new_tokens=4, tokenizer=tokenizer, **options)


def test_the_tokenizer_is_needed_and_must_be_one_of_bytes(model, tokens):
    with pytest.raises(UserError, match="pass tokenizer="):
        model.diffusion_generate(tokens(1, 3), regex="a")
    with pytest.raises(UserError, match="lexicon="):
        Decoding(model).admit(Request(ids=[70], settings=DiffusionGenerationConfig(regex="a")))
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(UserError, match="need a fast tokenizer whose tokens are bytes"):
        model.diffusion_generate(tokens(1, 3), regex="a", tokenizer=words)


def test_excluded_tokens_do_not_come_out_and_what_needs_them_is_refused(model, tokenizer):
    (a,) = tokenizer("a")["input_ids"]
    rest = {"regex": "[ab]{4,8}", "temperature": 2.0, "steps": 4, "new": 10}
    assert "a" not in text_of(tokenizer, answer(model, tokenizer, logit_bias={a: float("-inf")}, **rest))
    holding_a = [i for i, token in enumerate(Lexicon.of(tokenizer).tokens) if b"a" in token]
    with pytest.raises(UserError, match="no sequence of the model's tokens matches it"):
        answer(model, tokenizer, regex="a+", suppress_tokens=holding_a)


class OnlyB(LogitsProcessor):
    """Excludes everything but one token."""

    def __init__(self, token):
        self.token = token

    def __call__(self, ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([self.token]), 0.0)


def test_a_processor_that_leaves_nothing_fails_its_row_alone(model, tokenizer):
    (b,) = tokenizer("b")["input_ids"]
    settings = DiffusionGenerationConfig(regex="a{3,9}", max_new_tokens=6, steps=3)
    decoding = Decoding(model, lexicon=Lexicon.of(tokenizer))
    decoding.admit(Request(ids=[70], settings=settings, processors=[OnlyB(b)]))
    decoding.admit(Request(ids=[70], settings=settings))
    first, second = decoding.step()
    assert "exclude every token that the constraint allows" in str(first.error)
    assert second.error is None
