"""Text to token ids and back, the same for every caller: control tokens only where the chat template puts them.

The text of a person is text: a `<|im_end|>` or `<|mask|>` inside a message becomes the ordinary tokens of those
characters, never the control token. Ordinary text gets exactly the ids that `apply_chat_template` gives.
"""

import json
import logging
import re
from collections.abc import Sequence

from transformers import AutoTokenizer, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
"""Code points to which Unicode gives no meaning, to mark places in a text with."""

PROBES = (
    [
        {"role": "user", "content": "\n\n  def f(x):\n\treturn x  # ok \n\n"},
        {"role": "assistant", "content": " 1"},
        {"role": "user", "content": "two  "},
    ],
    [{"role": "system", "content": " brief "}, {"role": "user", "content": "\n  x \n"}],
    [{"role": "user", "content": "\n  x \n"}],
)
"""Conversations with awkward spaces, on which ids are compared with the tokenizer's own; templates may refuse some."""

JOINTS = ("def f(x):\n    return ", "x + 1\n", " y", "    if a:", "\n\n", "\tb", "c")
"""Pieces of code: whatever two of them follow each other, they must come back as they are."""

MOST_COMPOSED = 4
"""Code points that Unicode's canonical composition makes one of, at most."""


class Codec:
    """Encodes conversations and plain text, decodes answers. All methods may be called from several threads.

    Args:
        tokenizer: a fast tokenizer.

    Raises:
        ValueError: the tokenizer is not a fast one, does not give pieces of text back as they were, or its chat
            template cannot be taken apart as needed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise ValueError(f"the tokenizer must be a fast one (tokenizer.json), got {type(tokenizer).__name__}")
        self._tokenizer = tokenizer
        # Copies that nobody reconfigures, so that threads can share them.
        backend = tokenizer.backend_tokenizer
        description = json.loads(backend.to_str())
        self._decoder = type(backend).from_str(json.dumps(description))
        control = description["added_tokens"]
        self._plain_added = {token["content"] for token in control if not token["special"]}
        for token in control:
            token["special"] = True
        self._literal = type(backend).from_str(json.dumps(description))
        self._literal.encode_special_tokens = True  # "special" tokens are then encoded as the text they are
        self._literal.no_truncation()
        self._literal.no_padding()
        self._control_ids = {token["content"]: token["id"] for token in control}
        by_length = sorted(self._control_ids, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, by_length)) or r"(?!)")
        self._longest_token = self._most_characters(description)
        template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
        # Tags such as <think> that the template looks for in the assistant's earlier turns keep their meaning there.
        self._assistant_tags = {content for content in self._plain_added if content in template}
        self._check_joints()
        self._template_is_checked = tokenizer.chat_template is None or self._probe_template()

    @classmethod
    def load(cls, folder: str) -> "Codec":
        """Load the tokenizer that lies beside a model.

        Raises:
            ValueError: there is none, or it cannot be used.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{folder}: no tokenizer can be loaded: {error}") from error
        try:
            return cls(tokenizer)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be encoded."""
        return self._tokenizer.chat_template is not None

    def encode_chat(self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation.

        Args:
            messages: `{"role", "content"}` each, roles that the chat template knows.
            add_generation_prompt: end where the assistant's next turn begins.

        Raises:
            ValueError: the tokenizer has no chat template, the template refuses the messages, or it turns out that
                it cannot be taken apart as needed.
        """
        if not self.has_chat_template:
            raise ValueError("the model's tokenizer has no chat template")
        if not self._template_is_checked:  # it refused every probe, so the first conversation that it takes is one
            self._compare_with_tokenizer(messages)
            self._template_is_checked = True
        return self._encode_chat(messages, add_generation_prompt)

    def _encode_chat(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> list[int]:
        left, right = _absent_characters("".join(message["content"] for message in messages), 2)
        names = list(self._control_ids)
        number = {name: f"{left}{i}{right}" for i, name in enumerate(names)}

        def disguise(message: dict[str, str]) -> dict[str, str]:
            kept = self._assistant_tags if message["role"] == "assistant" else ()
            content = self._control.sub(lambda m: m[0] if m[0] in kept else number[m[0]], message["content"])
            return {**message, "content": content}

        rendered = self._render([disguise(message) for message in messages], add_generation_prompt)
        ids: list[int] = []
        position = 0
        marked = re.compile(f"{left}(\\d+){right}")
        for match in [*self._control.finditer(rendered), None]:
            end = match.start() if match else len(rendered)
            ids += self.encode_text(marked.sub(lambda m: names[int(m[1])], rendered[position:end]))
            if match:
                ids.append(self._control_ids[match[0]])
                position = match.end()
        return ids

    def encode_text(self, text: str) -> list[int]:
        """Ids of `text` as it stands; nothing is added and no control token comes out."""
        # Unlike `encode`, `encode_batch` lets other threads work meanwhile.
        return self._literal.encode_batch([text], add_special_tokens=False)[0].ids if text else []

    def least_tokens(self, text: str) -> int:
        """How many tokens `text` has at least, without encoding it: what is too long is known at once."""
        return 0 if self._longest_token is None else -(-len(text) // self._longest_token)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, whitespace untouched, special tokens left out; U+FFFD where a character is incomplete."""
        return self._decoder.decode(list(ids), skip_special_tokens=True)

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template is a program of the model's author; it refuses by raising anything
            raise TemplateRefusal(f"the chat template refuses these messages: {error}") from error

    def _probe_template(self) -> bool:
        """Whether some conversation could be compared."""
        for probe in PROBES:
            try:
                self._compare_with_tokenizer(probe)
            except TemplateRefusal as error:
                refusal = error
                continue
            return True
        logger.warning("the chat template could not be tried before its first use: %s", refusal)
        return False

    def _compare_with_tokenizer(self, messages: Sequence[dict[str, str]]) -> None:
        """Our ids of a conversation without control tokens must be the tokenizer's own."""
        plain = [{**message, "content": self._control.sub("", message["content"])} for message in messages]
        expected = self._tokenizer(self._render(plain), add_special_tokens=False)["input_ids"]
        got = self._encode_chat(plain)
        if got != expected:
            raise ValueError(
                "this tokenizer does not encode the text between control tokens on its own, which is relied on: "
                f"{got} against {expected}"
            )

    def _check_joints(self) -> None:
        """Refuse tokenizers that add or drop a space where pieces meet, as those of SentencePiece's kind do.

        The pieces of an infilling are encoded, and an answer is decoded, without what stands beside them.
        """
        for first in JOINTS:
            for second in JOINTS:
                ids = self.encode_text(first) + self.encode_text(second)
                got = self.decode(ids)
                if got == first + second:
                    cuts = [self.decode(ids[:cut]) + self.decode(ids[cut:]) for cut in range(1, len(ids))]
                    got = next((text for text in cuts if text != first + second), got)
                if got != first + second and not self._is_lossy(first + second):
                    raise ValueError(
                        "this tokenizer does not give pieces of text back as they were (those of SentencePiece's kind "
                        f"add or drop a space at a joint): {first!r} and {second!r} become {got!r}"
                    )

    def _is_lossy(self, text: str) -> bool:
        """Whether the tokenizer cannot even give back the whole text: its vocabulary is a toy, not its joints wrong."""
        return self.decode(self.encode_text(text)) != text

    def _most_characters(self, description: dict) -> int | None:
        """Characters that one token can stand for at most; None where that cannot be said."""
        normalizer = description.get("normalizer")
        pieces = json.dumps(description.get("pre_tokenizer"))
        keeps_all = '"ByteLevel"' in pieces and '"Removed"' not in pieces  # every byte is in some token
        if description["model"]["type"] != "BPE" or not keeps_all or (normalizer and normalizer["type"] != "NFC"):
            return None
        own = self._literal.get_vocab(with_added_tokens=False)
        return max(map(len, own), default=1) * (MOST_COMPOSED if normalizer else 1)


class TemplateRefusal(ValueError):
    """The chat template does not take these messages."""


def _absent_characters(text: str, count: int) -> list[str]:
    """The first `count` private characters that `text` does not hold."""
    used = set(text)
    free = (chr(code) for codes in PRIVATE_USE for code in codes if chr(code) not in used)
    return [next(free) for _ in range(count)]
