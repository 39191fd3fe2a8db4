import json
import random
import re
import shutil

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from coda_pretrain.data import tokenization
from coda_pretrain.data.tokenization import encode_texts, encoder_of, load_tokenizer


@pytest.fixture(scope="module")
def fim_tokenizer_dir(tokenizer_dir, tmp_path_factory):
    """A tokenizer with a FIM token that is not marked special, as Qwen's are, and a token for four spaces."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.add_tokens([AddedToken("<|fim_prefix|>", special=False), AddedToken("    ", special=False)])
    folder = tmp_path_factory.mktemp("fim-tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


def test_control_tokens_in_a_document_stay_text(fim_tokenizer_dir):
    facts = load_tokenizer(str(fim_tokenizer_dir), "<|endoftext|>")
    encoder = encoder_of(facts)
    text = "a<|mask|>b<|endoftext|><|im_start|>user<|fim_prefix|>x <|im_end|>"
    ids = encoder.encode(text, add_special_tokens=False).ids
    control = {encoder.token_to_id(t) for t in ("<|mask|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")}
    control.add(encoder.token_to_id("<|fim_prefix|>"))
    assert None not in control
    assert not control & set(ids)
    assert encoder.decode(ids, skip_special_tokens=False) == text


def test_tokens_that_are_only_text_are_still_used(fim_tokenizer_dir):
    encoder = encoder_of(load_tokenizer(str(fim_tokenizer_dir), "<|endoftext|>"))
    assert encoder.token_to_id("    ") in encoder.encode("if x:\n    pass", add_special_tokens=False).ids


def test_a_tokenizer_beside_a_model_with_code_of_its_own_is_loaded_without_a_question(
    tokenizer_dir, tmp_path, monkeypatch
):
    folder = tmp_path / "model"
    shutil.copytree(tokenizer_dir, folder)
    config = {"model_type": "unheard-of", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda text="": pytest.fail(f"asked: {text}"))
    want = load_tokenizer(str(tokenizer_dir), "<|endoftext|>")
    assert load_tokenizer(str(folder), "<|endoftext|>") == want


def test_facts_of_a_tokenizer(tokenizer_dir):
    facts = load_tokenizer(str(tokenizer_dir), "<|im_end|>")
    assert facts.document_end_id == encoder_of(facts).token_to_id("<|im_end|>")
    assert facts.vocab_size == 256 + 4
    assert facts.fingerprint == load_tokenizer(str(tokenizer_dir), "<|endoftext|>").fingerprint


def test_a_folder_without_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"--tokenizer {tmp_path}: no tokenizer can be loaded")):
        load_tokenizer(str(tmp_path), "<|endoftext|>")


def test_an_unknown_document_end_is_named(tokenizer_dir):
    with pytest.raises(ValueError, match=r"--document_end '</s>' is not a token of"):
        load_tokenizer(str(tokenizer_dir), "</s>")


def train(pre_tokenizer, model, trainer, normalizer=None):
    """An encoder with multi-character tokens, learnt from words, numbers and runs of white space."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.normalizer = pre_tokenizer, normalizer
    corpus = [
        "def value(x):\n        return x + 12345\n\n\n",
        "caf\u00e9 na\u00efve     \u4f60\u597d\uff0cworld aaaa bbbb",
        *("_" * 64 + "." * 64 + "_" * 7 + "." * 5, '"_._', " " * 64 + "x", "\n" * 32 + "x"),
    ] * 50
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def encoders():
    """Tokenizers of the kinds that there are: GPT-2's and Qwen's patterns, and SentencePiece with its first space."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe = {"vocab_size": 400, "show_progress": False, "initial_alphabet": alphabet}
    qwen = [
        pre_tokenizers.Split(Regex(QWEN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    unigram = trainers.UnigramTrainer(vocab_size=150, show_progress=False, unk_token="<unk>", special_tokens=["<unk>"])
    return {
        "gpt2": train(pre_tokenizers.ByteLevel(add_prefix_space=False), models.BPE(), trainers.BpeTrainer(**bpe)),
        "qwen": train(pre_tokenizers.Sequence(qwen), models.BPE(), trainers.BpeTrainer(**bpe), normalizers.NFC()),
        "sentencepiece": train(pre_tokenizers.Metaspace(), models.Unigram(), unigram),
    }


@pytest.mark.parametrize("kind", ["gpt2", "qwen", "sentencepiece"])
def test_a_long_document_gets_the_ids_that_it_gets_at_once(kind, monkeypatch):
    encoder = encoders()[kind]
    rng, divided = random.Random(0), 0
    pieces = [
        "value",
        " value",
        "(x):",
        "\n",
        "\n\n\n",
        "        ",
        " ",
        "123",
        "e\u0301",
        "caf\u00e9",
        "\u4f60\u597d",
        "\uff0c",
    ]
    pieces += ["aaaaaaa", "\r\n", "\t", "'s", "...", "{", '"', ",", "\U0001f600"]
    pieces += ["_" * 61, "." * 71, " " * 80, "\n" * 50, "x" * 90]  # longer than the context that is looked at
    for trial in range(30):
        weights = [rng.random() ** 3 for _ in pieces]
        text = "".join(rng.choices(pieces, weights, k=400))
        whole = encoder.encode(text, add_special_tokens=False).ids
        for window in (40, 300, 1 << 20):
            monkeypatch.setattr(tokenization, "WINDOW", window)
            monkeypatch.setattr(tokenization, "CONTEXT", 32)
            assert next(encode_texts(encoder, [text])).tolist() == whole, (trial, window, text)
            divided += tokenization._border(encoder, text, 0) < len(text)
    assert divided > 20


def test_two_long_runs_do_not_meet_at_a_border_although_the_ids_near_it_agree(monkeypatch):
    encoder = encoders()["gpt2"]
    for name, value in (("WINDOW", 130), ("CONTEXT", 32)):
        monkeypatch.setattr(tokenization, name, value)
    for length in range(66, 130):
        text = "_" * length + "." * 100 + " x" * 100
        whole = encoder.encode(text, add_special_tokens=False).ids
        assert next(encode_texts(encoder, [text])).tolist() == whole, length


def test_long_documents_are_really_divided_and_one_without_a_border_is_none(monkeypatch):
    encoder = encoders()["qwen"]
    monkeypatch.setattr(tokenization, "WINDOW", 100)
    monkeypatch.setattr(tokenization, "MAX_WINDOW", 300)
    monkeypatch.setattr(tokenization, "CONTEXT", 50)
    given = []
    encode = tokenization._ids
    monkeypatch.setattr(tokenization, "_ids", lambda encoder, text: given.append(len(text)) or encode(encoder, text))
    texts = ["short", "def value(x): return x\n" * 100, "a" * 299, "a" * 301, "last"]
    ids = list(encode_texts(encoder, texts))
    assert [array is None for array in ids] == [False, False, False, True, False]
    for text, array in zip(texts, ids, strict=True):
        assert array is None or array.tolist() == encode(encoder, text)
    assert max(given) <= 300
