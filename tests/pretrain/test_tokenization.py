import re

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from coda_pretrain.tokenization import encoder_of, load_tokenizer


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


def test_facts_of_a_tokenizer(tokenizer_dir):
    facts = load_tokenizer(str(tokenizer_dir), "<|im_end|>")
    assert facts.document_end_id == encoder_of(facts).token_to_id("<|im_end|>")
    assert facts.vocab_size == 256 + 4
    assert facts.fingerprint == load_tokenizer(str(tokenizer_dir), "<|endoftext|>").fingerprint


def test_a_folder_without_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"--tokenizer {tmp_path}: cannot be loaded as a tokenizer folder")):
        load_tokenizer(str(tmp_path), "<|endoftext|>")


def test_an_unknown_document_end_is_named(tokenizer_dir):
    with pytest.raises(ValueError, match=r"--document_end '</s>' is not a token of"):
        load_tokenizer(str(tokenizer_dir), "</s>")
