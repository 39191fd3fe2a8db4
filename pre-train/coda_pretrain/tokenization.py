"""Tokenizers for raw text: what a document's characters become, and nothing a document says is a control token.

Not here: chat templates and the tokenizer folder of exports.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class TokenizerFacts:
    """A tokenizer as the workers need it."""

    definition: str
    """The text of a ``tokenizer.json`` in which control tokens in a document are split like any other text."""

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

    Added tokens that are marked special or are written ``<...>`` (some tokenizers leave FIM and tool tokens unmarked)
    would let a document forge the end of a document or a mask; other added tokens, such as runs of spaces, stay.

    Raises:
        ValueError: the folder holds no tokenizer, not a fast one, or one without ``document_end``.
    """
    from transformers import AutoTokenizer  # seconds to import; the workers do without it

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--tokenizer {folder}: cannot be loaded as a tokenizer folder: {error}") from error
    if not tokenizer.is_fast:
        kind = type(tokenizer).__name__
        raise ValueError(f"--tokenizer {folder}: needs a fast tokenizer (tokenizer.json), got {kind}")
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in definition["added_tokens"]:
        token["special"] = token["special"] or (token["content"].startswith("<") and token["content"].endswith(">"))
    definition["truncation"] = definition["padding"] = None
    text = json.dumps(definition, sort_keys=True, ensure_ascii=False)
    vocabulary = tokenizer.get_vocab()
    if document_end not in vocabulary:
        raise ValueError(f"--document_end {document_end!r} is not a token of {folder}; name one of its tokens")
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
