"""The tokenizer folder: special tokens, chat format, exact round trips."""

import pytest
from transformers import AutoTokenizer

from coda_quickstart.tokenizer import train_tokenizer
from CoDALanguageModel.prompts import CONTROL_TOKENS


def test_special_tokens_have_their_roles_after_reloading(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.mask_token, loaded.pad_token, loaded.eos_token) == ("<|mask|>", "<|endoftext|>", "<|im_end|>")
    assert [loaded.convert_tokens_to_ids(token) for token in CONTROL_TOKENS] == list(range(len(CONTROL_TOKENS)))
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded("return x")["input_ids"] == tokenizer("return x")["input_ids"]


def test_the_chat_format_is_chatml(tokenizer):
    messages = [{"role": "user", "content": "a\n  b"}, {"role": "assistant", "content": "c"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|im_start|>user\na\n  b<|im_end|>\n<|im_start|>assistant\nc<|im_end|>\n"
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n    return x\n",
        "\tif a:\n\t\tb = 'caf\u00e9'\n\n\n",
        "x  =  1   \n",
        "a\r\nb",
        " \u4e16\u754c \U0001f600",
    ],
)
def test_text_comes_back_byte_for_byte(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_digits_are_single_tokens(tokenizer):
    assert len(tokenizer("2048")["input_ids"]) == 4


def test_a_vocabulary_without_room_for_the_bytes_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="vocab_size must be at least 264, got 100"):
        train_tokenizer(["x"], 100, tmp_path, max_length=64)
