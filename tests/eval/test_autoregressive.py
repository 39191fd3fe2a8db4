"""Baselines: prompts are healed at their end, gaps are the model's own control tokens, answers end where they end."""

import json

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from coda_eval import session
from coda_eval.autoregressive import FILL_TOKENS, AutoregressiveModel
from coda_eval.harness import CoDAEvalModel
from coda_eval.journal import Journal
from CoDALanguageModel import CoDALanguageModel
from CoDALanguageModel.conversion import build_model
from CoDALanguageModel.prompts import Codec
from CoDALanguageModel.row import complete

GAP = {"task_id": "g/0", "infill_prefix": "def f(a):\n", "infill_suffix": "\n    return a", "infill_middle": "x"}


def encode(tokenizer, text):
    return Codec(tokenizer).encode_text(text)


def build_tokenizer(*control, special=True):
    from tests.eval.conftest import build_tokenizer as build

    tokenizer = build()
    tokenizer.add_tokens(list(control), special_tokens=special)
    return tokenizer


def bigram_model(tokenizer, follows):
    """A model that says after each token the one in `follows`, and the end token after all others."""
    size = len(tokenizer)
    shape = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    config = Qwen3Config(
        vocab_size=size,
        hidden_size=size,
        intermediate_size=8,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        **shape,
    )
    config.eos_token_id = tokenizer.eos_token_id
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        model.lm_head.weight[tokenizer.eos_token_id] = 0.1
        for before, after in follows.items():
            model.lm_head.weight[after, before] = 1.0
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def request(text="", doc=None, task="t", repeats=1, **kwargs):
    doc = doc or {"task_id": "p/0"}
    return Instance(
        "generate_until", doc, (text, {"until": ["```"], "max_gen_toks": 12, **kwargs}), 0, (task, 0, repeats)
    )


@pytest.fixture(scope="module")
def newline_model():
    """A model of indented code: the line break and the indentation are one token, a lone break comes before a fence."""
    tokenizer = build_tokenizer()
    colon, newline, fence = (encode(tokenizer, text)[-1] for text in ("f():", "\n", "`"))
    body = encode(tokenizer, "():\n    return a")[encode(tokenizer, "():\n    return a").index(colon) + 1 :]
    assert tokenizer.decode(body[0]) != "\n"  # the break does not stand alone before indented code
    follows = dict(zip([colon, *body[:-1]], body, strict=True)) | {newline: fence, fence: fence}
    return tokenizer, bigram_model(tokenizer, follows)


def test_a_line_break_at_the_end_of_a_prompt_does_not_end_the_answer(newline_model):
    tokenizer, model = newline_model
    asked = [request("def f():\n"), request("def g():\n", temperature=0.02, do_sample=True), request("def f():\n\n\n")]
    plain = HFLM(model, tokenizer=tokenizer, batch_size=2).generate_until(asked[:1], True)
    assert plain == [""]
    healed = AutoregressiveModel(model, tokenizer=tokenizer, batch_size=2).generate_until(asked, True)
    assert healed[:2] == ["    return a"] * 2


def test_the_model_is_held_to_the_text_that_the_prompt_gave_up():
    tokenizer = build_tokenizer()
    newline, space, letter = (encode(tokenizer, text)[-1] for text in ("\n", " ", "y"))
    model = bigram_model(tokenizer, {newline: space, space: letter})  # after a letter it would end its answer
    own = AutoregressiveModel(model, tokenizer=tokenizer, batch_size=4)
    asked = [request("a\n"), request("b\n "), request("c \n\n"), request("d ")]
    assert own.generate_until(asked, True) == [" y", "y", " y", "y"]


def test_a_healed_prompt_is_the_prompt_without_its_last_tokens(newline_model):
    tokenizer, model = newline_model
    baseline = AutoregressiveModel(model, tokenizer=tokenizer)
    for text in ("def f():\n", "def f():\n\n  \n", "x = 1 ", "\n", " \n ", "<|im_start|>assistant\n```python\n"):
        ids, tail = baseline._healed(text)
        assert ids + encode(tokenizer, tail) if tail else ids
        assert text.endswith(tail)
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) + tail == text
        if text.strip():
            assert tail
            assert not text[: len(text) - len(tail)][-1].isspace()


def test_blocks_of_one_token_say_what_the_same_weights_say(newline_model):
    tokenizer, model = newline_model
    asked = [request("def f():\n"), request("a\n\n\n"), request("def g():"), request("def f():\n", max_gen_toks=4)]
    asked += [request("def f():\n", until=["    ret"]), request("x "), request("a\n", until=["\n"])]
    theirs = AutoregressiveModel(model, tokenizer=tokenizer, batch_size=4).generate_until(asked, True)
    twin = build_model(model, tokenizer, {"attention": "block_causal", "block_size": 1})
    for settings in ({"batch_size": 4}, {"batch_size": 1, "kv_cache": "none"}, {"batch_size": 3, "speculate": 2}):
        ours = CoDAEvalModel(twin, tokenizer=tokenizer, temperature=0, steps=12, **settings)
        assert list(ours.generate_until(asked, True)) == list(theirs)
    assert theirs[0] == "    return a"
    wide = build_model(model, tokenizer, {"attention": "block_causal", "block_size": 2})
    as_it_is = CoDAEvalModel(wide, tokenizer=tokenizer, temperature=0, steps=12)._job(0, asked[0], 0)
    assert as_it_is.ids == encode(tokenizer, "def f():\n")


def test_the_longest_answer_does_not_depend_on_company(newline_model):
    tokenizer, _ = newline_model
    letter = encode(tokenizer, "y")[-1]
    space = encode(tokenizer, " ")[-1]
    model = bigram_model(tokenizer, {letter: letter, space: letter})
    own = AutoregressiveModel(model, tokenizer=tokenizer, batch_size=2)
    asked = [request("a ", max_gen_toks=4), request("a     ", max_gen_toks=4)]
    together = own.generate_until(asked, True)
    assert together == [own.generate_until([one], True)[0] for one in asked]
    assert together[0] == "yyyy"


def test_prompts_that_need_no_healing_are_lm_evals_own(newline_model):
    tokenizer, model = newline_model
    asked = [request("def f():"), request("x"), request("def f():\n    return")]
    plain = HFLM(model, tokenizer=tokenizer, batch_size=2).generate_until(asked, True)
    own = AutoregressiveModel(model, tokenizer=tokenizer, batch_size=2)
    assert own.generate_until(asked, True) == plain
    chat = own.apply_chat_template([{"role": "user", "content": "a"}])
    assert chat.endswith("assistant\n")
    assert own._prompt(0, request(chat), 0).ids is None
    assert own._prompt(0, request(chat + "```python\n"), 0).tail == "\n"


def test_draws_are_the_same_after_a_restart(newline_model, tmp_path):
    tokenizer, model = newline_model
    drawn = {"do_sample": True, "temperature": 40.0}
    texts = ["x", "def f():\n", "def g():", "y = 1\n", "zz", "a\n\n", "b"]
    asked = [request(text, doc={"task_id": text}, **drawn) for text in texts]
    asked += [request("x", doc={"task_id": "three"}, repeats=3, **drawn)] * 3

    def answers(folder, resume=False):
        with session.opened(session.Session(journal=Journal(folder, resume=resume), model={"weights": "w"})) as state:
            texts = AutoregressiveModel(model, tokenizer=tokenizer, batch_size=2).generate_until(asked, True)
            return texts, state.journal

    whole, journal = answers(tmp_path / "whole")
    assert len({whole[0], *whole[-3:]}) == 4  # of one prompt, in several batches
    lines = journal.path.read_bytes().splitlines(keepends=True)
    assert sum(b'"answer": ' in line for line in lines) == 10
    for count in range(1, len(lines) + 1, 2):
        output = tmp_path / str(count)
        output.mkdir()
        (output / "journal_rank0.jsonl").write_bytes(b"".join(lines[:count]))
        again, journal = answers(output, resume=True)
        assert again == whole
        assert (journal.made == 0) == (count == len(lines))


def test_a_control_token_in_a_message_of_a_baseline_is_text(newline_model):
    tokenizer, model = newline_model
    own = AutoregressiveModel(model, tokenizer=tokenizer)
    lm_eval = HFLM(model, tokenizer=tokenizer)
    end = tokenizer.eos_token
    plain, hostile = ([{"role": "user", "content": text}] for text in ("def f(x):", f"def f({end}):"))
    prompts = [own.apply_chat_template(messages) for messages in (plain, hostile)]
    assert prompts == [lm_eval.apply_chat_template(messages) for messages in (plain, hostile)]
    ids, real = own.tok_batch_encode(prompts)
    rows = [row[mask.bool()].tolist() for row, mask in zip(ids, real, strict=True)]
    assert rows[0] == lm_eval.tok_batch_encode(prompts[:1])[0][0].tolist()
    assert rows[1] == Codec(tokenizer).encode_chat(hostile) != lm_eval.tok_batch_encode(prompts[1:])[0][0].tolist()
    assert rows[1].count(tokenizer.eos_token_id) == rows[0].count(tokenizer.eos_token_id)


def test_a_stop_string_counts_from_the_start_of_the_answer(newline_model):
    tokenizer, model = newline_model
    own = AutoregressiveModel(model, tokenizer=tokenizer)
    assert own.generate_until([request("def f():\n", until=["\n"])], True) == ["    return a"]
    assert own.generate_until([request("def f():\n", until=["turn"])], True) == ["    re"]


@pytest.mark.parametrize("tokens", FILL_TOKENS, ids=lambda tokens: tokens.prefix.encode("ascii", "replace").decode())
@pytest.mark.parametrize("special", [True, False])
def test_gaps_are_control_tokens_prefix_and_suffix_and_end_at_a_control_token(tokens, special):
    tokenizer = build_tokenizer(*tokens[:3], "<|file_sep|>", special=special)
    start, end, middle, file = tokenizer.convert_tokens_to_ids([*tokens[:3], "<|file_sep|>"])
    one, two = (encode(tokenizer, text)[-1] for text in "12")
    model = bigram_model(tokenizer, {middle: one, one: two, two: file, file: one})
    baseline = AutoregressiveModel(model, tokenizer=tokenizer)
    ids = baseline._gap_ids(GAP)
    prefix, suffix = encode(tokenizer, tokens.lead + GAP["infill_prefix"]), encode(tokenizer, GAP["infill_suffix"])
    assert ids == [start, *prefix, end, *suffix, middle]
    of_any_length = {**GAP, "infill_lengths": [4, 8]}  # the model itself ends a gap
    answer, other = baseline.generate_until(
        [request("the prefix alone", doc=doc) for doc in (GAP, of_any_length)], True
    )
    assert answer == other == "12"
    assert (answer.new_tokens, answer.finish_reason) == (2, "stop")


def test_a_gap_that_is_one_line_ends_with_the_first_line():
    tokenizer = build_tokenizer("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
    newline, one, two = (encode(tokenizer, text)[-1] for text in ("\n", "1", "2"))
    middle = tokenizer.convert_tokens_to_ids("<|fim_middle|>")
    model = bigram_model(tokenizer, {middle: newline, newline: one, one: two, two: newline})  # and so on
    baseline = AutoregressiveModel(model, tokenizer=tokenizer, batch_size=4)
    lines = [{**GAP, "infill_middle": text} for text in ("x\n", "x\ny\n", "x")]
    lines += [{**GAP, "infill_middle": "x\n", "infill_lengths": [4, 8]}]
    answers = baseline.generate_until([request("p", doc=doc, max_gen_toks=8, until=[]) for doc in lines], True)
    assert list(answers) == ["\n12\n", *["\n12\n12\n1"] * 3]
    assert [answer.finish_reason for answer in answers] == ["stop", *["length"] * 3]
    assert baseline.generate_until([request("p", doc=lines[0], max_gen_toks=3, until=[])], True) == ["\n12"]


def llama_tokenizer():
    """A tokenizer of Code Llama's kind: a space before every text, none at the start of what is decoded."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(parts)
    letters = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=letters[:3], initial_alphabet=["\u2581"], show_progress=False
    )
    core.train_from_iterator(["def f(a):\n    return a + x\n"] * 20, trainer)
    vocab = json.loads(core.to_str())["model"]
    tokens = list(dict.fromkeys([*letters, *vocab["vocab"]]))
    ids = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(merge) for merge in vocab["merges"]]
    core.model = models.BPE(vocab=ids, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_pieces_join_where_the_tokenizer_adds_and_drops_spaces():
    tokenizer = llama_tokenizer()
    code_llama = FILL_TOKENS[-1]
    tokenizer.add_tokens(list(code_llama[:3]), special_tokens=True)
    start, end, middle = tokenizer.convert_tokens_to_ids(list(code_llama[:3]))
    space, letter = tokenizer.convert_tokens_to_ids(["\u2581", "x"])
    model = bigram_model(tokenizer, {middle: space, space: letter})
    baseline = AutoregressiveModel(model, tokenizer=tokenizer)
    for text in ("def f(a):\n", " x", "    return a", "\n", "a <s> b"):
        ids = baseline.encode_piece(text)
        assert baseline.decode(ids) == text
        assert tokenizer.bos_token_id not in ids
    prefix, suffix = baseline.encode_piece(" def f(a):\n"), baseline.encode_piece("\n    return a")
    assert baseline._gap_ids(GAP) == [start, *prefix, end, *suffix, middle]
    assert baseline.generate_until([request("p", doc=GAP)], True) == [" x"]


def test_the_gap_of_a_diffusion_model_joins_where_the_tokenizer_adds_spaces(model_dir):
    coda = CoDAEvalModel(CoDALanguageModel.from_pretrained(model_dir), tokenizer=llama_tokenizer())
    gap = {"infill_prefix": "x =", "infill_middle": " y", "infill_suffix": "z", "infill_tokens": None}
    job = coda._job(0, request("p", doc=gap), 0)
    ids, where = job.ids, job.gap
    filled = [*ids[: where.start], *coda.codec.encode_text(" y", joins=True), *ids[where.stop :]]
    assert coda.codec.decode(filled) == "x = yz"
    reader = coda._reader(job, complete(coda.model.generation_config, coda.model.config))
    assert reader.read(filled[where]).text == " y"


@pytest.mark.parametrize("special", [True, False])
def test_what_looks_like_a_control_token_in_a_gap_stays_text(special):
    tokenizer = build_tokenizer(*FILL_TOKENS[0][:3], special=special)
    baseline = AutoregressiveModel(bigram_model(tokenizer, {}), tokenizer=tokenizer)
    gap = {**GAP, "infill_prefix": "x = '<|fim_middle|>", "infill_suffix": "<|fim_suffix|>'<|im_end|>"}
    ids = baseline._gap_ids(gap)
    controls = [token for token in ids if token in tokenizer.all_special_ids or token in tokenizer.added_tokens_decoder]
    assert controls == tokenizer.convert_tokens_to_ids(list(FILL_TOKENS[0][:3]))


def test_a_model_without_fill_tokens_is_refused_before_it_generates(newline_model, monkeypatch):
    tokenizer, model = newline_model
    monkeypatch.setattr(type(model), "generate", lambda *args, **kwargs: pytest.fail("generated"))
    baseline = AutoregressiveModel(model, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"has no fill-in-the-middle tokens \(known: <\|fim_prefix\|>, <fim_prefix>"):
        baseline.generate_until([request("x"), request("y\n"), request("p", doc=GAP)], True)


def test_tokens_that_the_model_has_no_rows_for_are_no_fill_tokens():
    tokenizer = build_tokenizer()
    model = bigram_model(tokenizer, {})
    tokenizer.add_tokens(list(FILL_TOKENS[0][:3]), special_tokens=True)
    with pytest.raises(ValueError, match="has no fill-in-the-middle tokens"):
        AutoregressiveModel(model, tokenizer=tokenizer)._gap_ids(GAP)


@pytest.mark.parametrize("end", ["\n", ""])
def test_a_prompt_that_does_not_fit_is_an_error_that_names_the_document(newline_model, end):
    tokenizer, model = newline_model
    with pytest.raises(ValueError, match="task t, document p/0: .* exceed the context of 512 tokens"):
        AutoregressiveModel(model, tokenizer=tokenizer).generate_until([request("z" * 600 + end)], True)


def test_requests_that_only_even_out_ranks_are_marked_and_order_is_kept(newline_model):
    tokenizer, model = newline_model
    last = request("def f():\n")
    answers = AutoregressiveModel(model, tokenizer=tokenizer).generate_until([request("x"), last, last], True)
    assert [answer.surplus for answer in answers] == [False, False, True]
    assert answers[1:] == ["    return a"] * 2


def test_use_cache_of_lm_eval_is_refused_for_every_model_of_ours(newline_model, model_dir, tmp_path):
    from lm_eval.api.model import CachingLM

    tokenizer, model = newline_model
    for hosted in (AutoregressiveModel(model, tokenizer=tokenizer), CoDAEvalModel(model_dir, device="cpu")):
        with pytest.raises(ValueError, match="use_cache is refused: .*number of steps would get the old answers"):
            CachingLM(hosted, str(tmp_path / "cache.db"))


@pytest.mark.parametrize("wrong", [40000, 1.5, None, True, ("a", "b"), {"a"}])
def test_a_path_that_was_read_as_a_python_value_is_an_error(wrong):
    with pytest.raises(ValueError, match="pretrained must be a folder or a Hub name, got .* give such a name as JSON"):
        AutoregressiveModel(wrong)


@pytest.mark.parametrize("missing", ["/nowhere", "./a/b", "a/b/c", "~/model", "a,b", "[x"])
def test_a_missing_folder_is_named_before_anything_is_looked_up(missing):
    with pytest.raises(ValueError, match=r"no model folder at .* \(a Hub name has the form owner/name\)"):
        AutoregressiveModel(missing)
