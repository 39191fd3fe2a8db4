"""Tokenizers for raw text: what a document's characters become, and nothing a document says is a control token.

A tokenizer needs more than a hundred bytes for each character that it is given at once, so long documents are given in
pieces that meet where no token can cross. Not here: chat templates and the tokenizer folder of exports.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from CoDALanguageModel.errors import UserError

WINDOW = 1 << 20  # characters given to a tokenizer at once, unless no border is found in them
MAX_WINDOW = 1 << 23
CONTEXT = 1 << 11  # characters on each side of a border that are tokenized to see that no token crosses it
TRIES = 64  # borders of each kind that are looked at
BORDERS = (re.compile(r"(?<=\n)(?=\S)"), re.compile(r"(?<=\S)(?= \w)"), re.compile(r"(?<=[^\W_])(?=[^\w\s])"))
"""Where pieces of a document may meet, the likeliest first. Never inside a run of one kind of characters, whose
division into tokens may depend on where the run began."""


@dataclass(frozen=True, kw_only=True)
class TokenizerFacts:
    """A tokenizer as the workers need it."""

    definition: str
    """The text of a `tokenizer.json` in which control tokens in a document are split like any other text."""

    fingerprint: str
    """SHA-256 of the definition."""

    vocab_size: int
    """One more than the largest id."""

    document_end: str
    document_end_id: int

    def manifest_entry(self) -> dict[str, Any]:
        """What a manifest of token shards says about its tokenizer."""
        names = ("fingerprint", "vocab_size", "document_end", "document_end_id")
        return {name: getattr(self, name) for name in names}


def load_tokenizer(folder: str, document_end: str) -> TokenizerFacts:
    """Load a tokenizer and make the text of its control tokens ordinary text.

    Added tokens that are marked special or are written `<...>` (some tokenizers leave FIM and tool tokens unmarked)
    would let a document forge the end of a document or a mask; other added tokens, such as runs of spaces, stay.

    Raises:
        UserError: the folder holds no tokenizer, not a fast one, or one without `document_end`.
    """
    if not Path(folder).is_dir():
        raise UserError(f"--tokenizer {folder}: no such folder")
    from CoDALanguageModel import weight_files  # with transformers, seconds to import; the workers do without it

    try:
        tokenizer = weight_files.read_tokenizer(folder)
    except UserError as error:
        raise UserError(f"--tokenizer {folder}: {error}") from error
    if not tokenizer.is_fast:
        kind = type(tokenizer).__name__
        raise UserError(f"--tokenizer {folder}: needs a fast tokenizer (tokenizer.json), got {kind}")
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in definition["added_tokens"]:
        token["special"] = token["special"] or (token["content"].startswith("<") and token["content"].endswith(">"))
    definition["truncation"] = definition["padding"] = None
    text = json.dumps(definition, sort_keys=True, ensure_ascii=False)
    vocabulary = tokenizer.get_vocab()
    if document_end not in vocabulary:
        raise UserError(f"--document_end {document_end!r} is not a token of {folder}; name one of its tokens")
    return TokenizerFacts(
        definition=text,
        fingerprint=hashlib.sha256(text.encode("utf-8")).hexdigest(),
        vocab_size=max(vocabulary.values()) + 1,
        document_end=document_end,
        document_end_id=vocabulary[document_end],
    )


def encoder_of(facts: TokenizerFacts) -> Tokenizer:
    """The tokenizer that turns documents into ids, with control tokens in the text treated as text."""
    tokenizer = Tokenizer.from_str(facts.definition)
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode_texts(encoder: Tokenizer, texts: Sequence[str]) -> Iterator[np.ndarray | None]:
    """The ids of each text, uint32; None for one that is too long and has no place where it may be divided."""
    short = iter(encoder.encode_batch_fast([t for t in texts if len(t) <= WINDOW], add_special_tokens=False))
    for text in texts:
        yield np.array(next(short).ids, dtype=np.uint32) if len(text) <= WINDOW else _encode_long(encoder, text)


def _encode_long(encoder: Tokenizer, text: str) -> np.ndarray | None:
    ids, start = [], 0
    while start < len(text):
        stop = _border(encoder, text, start)
        if stop is None:
            return None
        ids.append(np.array(_ids(encoder, text[start:stop]), dtype=np.uint32))
        start = stop
    return np.concatenate(ids)


def _border(encoder: Tokenizer, text: str, start: int) -> int | None:
    """Where the piece that begins at `start` may end; None if it would have more than `MAX_WINDOW` characters."""
    low, high = start + WINDOW // 2, start + WINDOW
    while high < len(text):
        if high > start + MAX_WINDOW:
            return None
        for pattern in BORDERS:
            # the last candidates before high, or those of its last part where there are very many
            found = [match.start() for match in pattern.finditer(text, max(low, high - 64 * TRIES), high)]
            found = found or [match.start() for match in pattern.finditer(text, low, high)]
            for border in found[: -TRIES - 1 : -1]:
                begin = max(start, border - CONTEXT)
                if border > start and _is_border(encoder, text[begin : border + CONTEXT], border - begin):
                    return border
        low, high = high, high + WINDOW
    return len(text) if len(text) - start <= MAX_WINDOW else None


def _is_border(encoder: Tokenizer, text: str, place: int) -> bool:
    """Whether a word of the tokenizer ends at `place` of `text`, and both sides apart give the ids of the whole.

    Ids alone are not enough: within a word that is longer than `text` they may agree by chance.
    """
    whole = encoder.encode(text, add_special_tokens=False)  # the fast way does not say which words there are
    left, right = _ids(encoder, text[:place]), _ids(encoder, text[place:])
    words = whole.word_ids
    return 0 < len(left) < len(words) and words[len(left) - 1] != words[len(left)] and whole.ids == left + right


def _ids(encoder: Tokenizer, text: str) -> list[int]:
    return encoder.encode_batch_fast([text], add_special_tokens=False)[0].ids
