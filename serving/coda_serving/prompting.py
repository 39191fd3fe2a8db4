"""Text to token ids and back, with control tokens only where the chat template puts them.

Text of a client is text: a ``<|im_end|>`` or ``<|mask|>`` inside a message becomes the ordinary tokens of those
characters, never the control token. Ordinary text gets exactly the ids that ``apply_chat_template`` gives.
"""

import json
import re
from collections.abc import Sequence

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
"""Code points to which Unicode gives no meaning, to mark places in a text with."""


class Prompting:
    """Encodes conversations and plain text, decodes answers. All methods may be called from several threads.

    Args:
        tokenizer: a fast tokenizer.

    Raises:
        ValueError: the tokenizer is not a fast one, or its chat template cannot be taken apart as needed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise ValueError(f"the tokenizer must be a fast one (tokenizer.json), got {type(tokenizer).__name__}")
        self._tokenizer = tokenizer
        # Copies that nobody reconfigures, so that threads can share them.
        description = json.loads(tokenizer.backend_tokenizer.to_str())
        self._decoder = Tokenizer.from_str(json.dumps(description))
        control = description["added_tokens"]
        for token in control:
            token["special"] = True
        self._literal = Tokenizer.from_str(json.dumps(description))
        self._literal.encode_special_tokens = True  # "special" tokens are then encoded as the text they are
        self._literal.no_truncation()
        self._literal.no_padding()
        self._control_ids = {token["content"]: token["id"] for token in control}
        by_length = sorted(self._control_ids, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, by_length)) or r"(?!)")
        template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
        # Tags such as <think> that the template looks for in the assistant's earlier turns keep their meaning there.
        self._assistant_tags = {t["content"] for t in _plain_added(tokenizer) if t["content"] in template}
        if tokenizer.chat_template is not None:
            self._check_template()

    @classmethod
    def load(cls, model_name: str) -> "Prompting":
        """Load the tokenizer that lies beside the model.

        Raises:
            ValueError: there is none, or it cannot be used.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(model_name)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"MODEL_NAME={model_name}: no tokenizer can be loaded: {error}") from error
        return cls(tokenizer)

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be encoded."""
        return self._tokenizer.chat_template is not None

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Ids of a conversation, up to where the assistant's next turn begins.

        Args:
            messages: ``{"role", "content"}`` each, roles that the chat template knows.

        Raises:
            ValueError: the tokenizer has no chat template, or the template refuses the messages.
        """
        if not self.has_chat_template:
            raise ValueError("the model's tokenizer has no chat template: use /v1/completions")
        left, right = _absent_characters("".join(message["content"] for message in messages), 2)
        names = list(self._control_ids)
        number = {name: f"{left}{i}{right}" for i, name in enumerate(names)}

        def disguise(message: dict[str, str]) -> dict[str, str]:
            kept = self._assistant_tags if message["role"] == "assistant" else ()
            content = self._control.sub(lambda m: m[0] if m[0] in kept else number[m[0]], message["content"])
            return {**message, "content": content}

        try:
            rendered = self._render([disguise(message) for message in messages])
        except Exception as error:  # a template is a program of the model's author; it refuses by raising anything
            raise ValueError(f"the chat template refuses these messages: {error}") from error
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
        """Ids of ``text`` as it stands; nothing is added and no control token comes out."""
        return self._literal.encode(text, add_special_tokens=False).ids if text else []

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, whitespace untouched, special tokens left out; U+FFFD where a character is incomplete."""
        return self._decoder.decode(list(ids), skip_special_tokens=True)

    def _render(self, messages: list[dict[str, str]]) -> str:
        return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _check_template(self) -> None:
        """Compare our ids with the tokenizer's own on a conversation with awkward spaces."""
        messages = [{"role": "user", "content": "\n\n  def f(x):\n\treturn x  # ok \n\n"}]
        messages += [{"role": "assistant", "content": " 1"}, {"role": "user", "content": "two  "}]
        expected = self._tokenizer(self._render(messages), add_special_tokens=False)["input_ids"]
        got = self.encode_chat(messages)
        if got != expected:
            raise ValueError(
                "this tokenizer does not encode the text between control tokens on its own, which the server relies "
                f"on: {got} against {expected}"
            )


def _plain_added(tokenizer: PreTrainedTokenizerBase) -> list[dict]:
    """Added tokens that the tokenizer counts as content, not as control tokens."""
    return [t for t in json.loads(tokenizer.backend_tokenizer.to_str())["added_tokens"] if not t["special"]]


def _absent_characters(text: str, count: int) -> list[str]:
    """The first ``count`` private characters that ``text`` does not hold."""
    used = set(text)
    free = (chr(code) for codes in PRIVATE_USE for code in codes if chr(code) not in used)
    return [next(free) for _ in range(count)]
