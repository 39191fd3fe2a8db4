"""A byte-level BPE tokenizer for the small loop, saved as a Hugging Face tokenizer folder.

It has the special tokens and the chat format of the published model, so that every room treats both alike.
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from CoDALanguageModel.errors import UserError
from CoDALanguageModel.prompts import CHATML_TEMPLATE, CONTROL_TOKENS

# Words and single digits with one leading space, runs of punctuation, line breaks with the indentation that follows.
SPLIT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s*\n *|\s+(?!\S)|\s+"


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path, max_length: int) -> PreTrainedTokenizerFast:
    """Train on `texts` and save to `folder`.

    Args:
        texts: training documents.
        vocab_size: number of entries, special tokens included.
        folder: where tokenizer.json and tokenizer_config.json go.
        max_length: longest input of the model that uses it, in tokens.

    Raises:
        UserError: `vocab_size` leaves no room for 256 bytes and the special tokens.
    """
    if vocab_size < 256 + len(CONTROL_TOKENS):
        raise UserError(f"vocab_size must be at least {256 + len(CONTROL_TOKENS)}, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        mask_token="<|mask|>",
        additional_special_tokens=[t for t in CONTROL_TOKENS if t not in ("<|im_end|>", "<|endoftext|>", "<|mask|>")],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        chat_template=CHATML_TEMPLATE,
    )
    wrapped.save_pretrained(folder)
    return wrapped
