"""Text to token ids and back, the same for every caller: control tokens only where the chat template puts them.

The text of a person is text: a `<|im_end|>` or `<|mask|>` inside a message becomes the ordinary tokens of those
characters, never the control token. Ordinary text gets exactly the ids that `apply_chat_template` gives. Gaps are
laid out in `infilling`; where an answer ends is decided in `answers`.
"""

import json
import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .constraints import Lexicon
from .errors import UserError, half_surrogate
from .weight_files import read_tokenizer

logger = logging.getLogger(__name__)

CONTROL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|mask|>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
)
"""Those of the published vocabulary that mean something to this project."""

CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The format of the published model's conversations."""

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
        template_arguments: what the chat template is rendered with besides the messages, e.g. `enable_thinking`.

    Raises:
        UserError: the tokenizer is not a fast one, does not give pieces of text back as they were, or its chat
            template cannot be taken apart as needed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_arguments: Mapping[str, Any] | None = None) -> None:
        if not tokenizer.is_fast:
            raise UserError(f"the tokenizer must be a fast one (tokenizer.json), got {type(tokenizer).__name__}")
        self._tokenizer = tokenizer
        self._template_arguments = dict(template_arguments or {})
        # Copies that nobody reconfigures, so that threads can share them.
        backend = tokenizer.backend_tokenizer
        description = json.loads(backend.to_str())
        self._decoder = type(backend).from_str(json.dumps(_without_implicit_space(description)))
        control = description["added_tokens"]
        self._plain_added = {token["content"] for token in control if not token["special"]}
        for token in control:
            token["special"] = True
        self._first = _literal(type(backend), description)
        without = _without_implicit_space(description)
        self._later = self._first if without == description else _literal(type(backend), without)
        self._control_ids = {token["content"]: token["id"] for token in control}
        # A mask is text that is not known yet.
        self._not_text = frozenset(self._control_ids.values()) - {tokenizer.mask_token_id}
        by_length = sorted(self._control_ids, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, by_length)) or r"(?!)")
        self._longest_token = self._most_characters(description)
        # A control token of the template, or the mark of one in a message, which stands for at least one token.
        marks = [*map(len, self._control_ids), len(str(len(self._control_ids))) + 2]
        self._longest_rendered = None if self._longest_token is None else max(self._longest_token, *marks)
        template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
        # Tags such as <think> that the template looks for in the assistant's earlier turns keep their meaning there.
        self._assistant_tags = {content for content in self._plain_added if content in template}
        self._knows_tools = "tools" in template and "<tool_call>" in template
        self._adds_space = _ids(self._first, "x") != _ids(self._later, "x")
        self._after_control = self._find_after_control()
        self._check_joints()
        self._template_is_checked = tokenizer.chat_template is None or self._probe_template()

    @classmethod
    def load(cls, folder: str) -> "Codec":
        """Load the tokenizer that lies beside a model.

        Raises:
            UserError: there is none, or it cannot be used.
        """
        try:
            return cls(read_tokenizer(folder))
        except UserError as error:
            raise UserError(f"{folder}: {error}") from error

    @property
    def lexicon(self) -> Lexicon:
        """The bytes of the tokens, which constraints need."""
        return Lexicon.of(self._tokenizer)

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be encoded."""
        return self._tokenizer.chat_template is not None

    def encode_chat(
        self,
        messages: Sequence[dict[str, str]],
        *,
        continue_final_message: bool = False,
        tools: Sequence[dict[str, Any]] = (),
        max_tokens: int | None = None,
    ) -> list[int]:
        """Ids of a conversation, up to where the assistant's next turn begins.

        Args:
            messages: `{"role", "content"}` each, roles that the chat template knows.
            continue_final_message: the last message is the beginning of the answer: stop where its text stops.
            tools: functions that the model may call, as the template wants them.
            max_tokens: as for `encode_text`.

        Raises:
            TextTooLong: it has more than `max_tokens`.
            NoTools: the template knows none.
            UserError: the tokenizer has no chat template, the template refuses the messages, leaves one out or opens
                no answer, a text is no Unicode, or it turns out that the template cannot be taken apart as needed.
        """
        if not self.has_chat_template:
            raise UserError("the model's tokenizer has no chat template")
        if tools and not self._knows_tools:
            raise NoTools(
                "tools cannot be used: the model's chat template does not write them, with calls in <tool_call>"
            )
        if not self._template_is_checked:  # it refused every probe, so the first conversation that it takes is one
            self._compare_with_tokenizer(messages)
            self._template_is_checked = True
        if not continue_final_message and self._missing_header:
            raise TemplateRefusal(
                f"the chat template writes {self._missing_header!r} before an answer but knows no generation prompt "
                "(add_generation_prompt), so that the model would not be asked to answer"
            )
        return self._encode_chat(messages, continue_final_message, max_tokens, tools)

    def _encode_chat(
        self,
        messages: Sequence[dict[str, str]],
        continue_final_message: bool = False,
        max_tokens: int | None = None,
        tools: Sequence[dict[str, Any]] = (),
    ) -> list[int]:
        marks = self.marks([*(message["content"] for message in messages), *_texts(tools)])

        def hidden(message: dict[str, str]) -> dict[str, str]:
            kept = self._assistant_tags if message["role"] == "assistant" else ()
            return {**message, "content": marks.hide(message["content"], kept)}

        chat = [hidden(message) for message in messages]
        more = {"tools": _mapped(tools, marks.hide)} if tools else {}
        rendered = self._render(
            chat,
            add_generation_prompt=not continue_final_message,
            continue_final_message=continue_final_message,
            **more,
        )
        self._refuse_too_long(rendered, self._longest_rendered, max_tokens)
        for message in chat:  # earlier turns of the assistant may be shortened, e.g. by their thoughts
            if message["role"] != "assistant" and message["content"].strip() not in rendered:
                raise TemplateRefusal(f"the chat template leaves out the text of the role {message['role']!r}")
        return marks.encode(rendered)

    def encode_answer(self, text: str) -> list[int]:
        """Ids of an assistant's whole answer: text, in which the tags that the chat template looks for are tags."""
        ids: list[int] = []
        position = 0
        for match in self._control.finditer(text):
            if match[0] in self._assistant_tags:
                ids += [*self.encode_text(text[position : match.start()]), self._control_ids[match[0]]]
                position = match.end()
        return ids + self.encode_text(text[position:])

    def marks(self, texts: Iterable[str]) -> "Marks":
        """Stand-ins for the control tokens that `texts` spell out, for a template that is to be rendered with them."""
        return Marks(self, texts)

    def encode_pieces(self, pieces: Sequence[str]) -> list[list[int]]:
        """Ids of the pieces of one text, each on its own: no side of a gap shifts the other; see `lay_out`."""
        return [self.encode_text(piece, joins=place > 0) for place, piece in enumerate(pieces)]

    def encode_text(self, text: str, *, joins: bool = False, max_tokens: int | None = None) -> list[int]:
        """Ids of `text` as it stands; no control token comes out.

        Args:
            text: any text.
            joins: it goes on behind other text, so that a tokenizer which puts a space before a text (SentencePiece's
                kind) puts none here.
            max_tokens: refuse a text that is so long that it must have more, without encoding it. A text with more
                tokens may come back all the same.

        Raises:
            TextTooLong: it has more than `max_tokens`.
            UserError: it holds half of a surrogate pair.
        """
        self._refuse_too_long(text, self._longest_token, max_tokens)
        return _ids(self._later if joins else self._first, text)

    @staticmethod
    def _refuse_too_long(text: str, longest: int | None, max_tokens: int | None) -> None:
        if longest is not None and max_tokens is not None and len(text) > longest * max_tokens:
            raise TextTooLong(-(-len(text) // longest), max_tokens)

    def decode(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        """Text that `ids` add, whitespace untouched, special tokens left out; U+FFFD where a character is incomplete.

        Args:
            ids: token ids.
            after: ids that stand left of them. With none, or behind a control token, a text begins, and the space
                that the tokenizer puts before a text is none of it.
        """
        text = self._decoder.decode(list(ids), skip_special_tokens=True)
        return text.removeprefix(" ") if self._adds_space and self._begins_behind(after) else text

    def _begins_behind(self, after: Sequence[int]) -> bool:
        if len(after) and self._after_control is self._first:
            return after[-1] in self._not_text
        return all(token in self._not_text for token in after)

    def _find_after_control(self) -> Any:
        """The one of our two encoders that does what the tokenizer does with text behind a control token."""
        for name, token in self._control_ids.items():
            got = self._tokenizer(f"{name}x", add_special_tokens=False)["input_ids"]
            for encoder in (self._first, self._later):
                if got == [token, *_ids(encoder, "x")]:
                    return encoder
        return self._first

    def render(self, messages: Sequence[dict[str, str]], continue_final_message: bool = False) -> str:
        """A conversation as the chat template writes it, for people to read: its control tokens look like text.

        Raises:
            TemplateRefusal: the template refuses the messages.
        """
        return self._render(
            messages, add_generation_prompt=not continue_final_message, continue_final_message=continue_final_message
        )

    def _render(self, messages: Sequence[dict[str, str]], **options: Any) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, **self._template_arguments, **options
            )
        except Exception as error:  # a template is a program of the model's author; it refuses by raising anything
            raise TemplateRefusal(f"the chat template refuses these messages: {error}") from error

    @cached_property
    def _missing_header(self) -> str:
        """What the template writes before an answer where it was not asked to, and leaves out where it was."""
        user, answer = {"role": "user", "content": "ask"}, {"role": "assistant", "content": "answer"}
        try:
            asked, closed = self._render([user], add_generation_prompt=True), self._render([user])
            answered = self._render([user, answer])
        except TemplateRefusal:
            return ""
        if asked != closed or not answered.startswith(asked) or "answer" not in answered[len(asked) :]:
            return ""
        return answered[len(asked) :].partition("answer")[0].strip()

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
        expected = self._tokenizer(self.render(plain), add_special_tokens=False)["input_ids"]
        got = self._encode_chat(plain)
        if got != expected:
            raise UserError(
                "this tokenizer does not encode the text between control tokens on its own, which is relied on: "
                f"{got} against {expected}"
            )

    def _check_joints(self) -> None:
        """Refuse tokenizers whose pieces do not join to the text.

        The pieces of an infilling are encoded, and an answer is decoded, without what stands beside them.
        """
        behind = _ids(self._later, "x")
        for first in JOINTS:
            for second in JOINTS:
                text = first + second
                ids = self.encode_text(first, joins=True) + self.encode_text(second, joins=True)
                readings = [self.decode(ids[:i], behind) + self.decode(ids[i:], behind) for i in range(1, len(ids) + 1)]
                got = next((reading for reading in readings if reading != text), text)
                if got != text and not self._is_lossy(text):
                    raise UserError(
                        "this tokenizer does not give pieces of text back as they were, which infilling and streamed "
                        f"answers need: {first!r} and {second!r} become {got!r}"
                    )

    def _is_lossy(self, text: str) -> bool:
        """Whether the tokenizer cannot even give back the whole text: its vocabulary is a toy, not its joints wrong."""
        return self.decode(self.encode_text(text)) != text

    def _most_characters(self, description: dict) -> int | None:
        """Characters that one token can stand for at most; None where that cannot be said."""
        pieces = json.dumps(description["pre_tokenizer"])
        if description["model"]["type"] != "BPE" or '"Removed"' in pieces:
            return None
        own = self._first.get_vocab(with_added_tokens=False)
        is_byte_level = '"ByteLevel"' in pieces and own.keys() >= set(bytes_to_unicode().values())
        falls_back = description["model"]["byte_fallback"] and own.keys() >= {f"<0x{byte:02X}>" for byte in range(256)}
        if not is_byte_level and not falls_back:  # an unknown character may vanish, or many of them be one token
            return None
        normalizer, factor = description["normalizer"], 1
        for step in normalizer.get("normalizers", [normalizer]) if normalizer else ():
            marks_spaces = step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"]
            if step["type"] == "NFC":
                factor = MOST_COMPOSED
            elif step["type"] != "Prepend" and not marks_spaces:
                return None
        return max(map(len, own), default=1) * factor


def _literal(backend: Any, description: dict) -> Any:
    """A tokenizer of the class `backend` to which control tokens are text."""
    tokenizer = backend.from_str(json.dumps(description))
    tokenizer.encode_special_tokens = True  # "special" tokens are then encoded as the text they are
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _ids(tokenizer: Any, text: str) -> list[int]:
    if (half := half_surrogate(text)) is not None:
        raise UserError(f"a text holds half of a surrogate pair, which is no character, at {half}")
    # Unlike `encode`, `encode_batch` lets other threads work meanwhile.
    return tokenizer.encode_batch([text], add_special_tokens=False)[0].ids if text else []


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A value of JSON with other texts."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): _mapped(part, change) for key, part in value.items()}
    return [_mapped(part, change) for part in value] if isinstance(value, (list, tuple)) else value


def _texts(value: Any) -> list[str]:
    """All texts in a value of JSON."""
    found: list[str] = []
    _mapped(value, lambda text: found.append(text) or text)
    return found


def _without_implicit_space(description: dict) -> dict:
    """The description of a tokenizer that puts no space before a text, and takes none away."""

    def changed(part: dict | None) -> dict | None:
        if part is None or part["type"] == "Prepend" or (part["type"], part.get("content")) == ("Strip", " "):
            return None
        new = dict(part)
        for name in ("normalizers", "pretokenizers", "decoders"):
            if name in part:
                new[name] = [step for step in map(changed, part[name]) if step is not None]
        if part["type"] == "Metaspace":
            new["prepend_scheme"] = "never"
        if part["type"] == "ByteLevel":
            new["add_prefix_space"] = False
        return new

    return description | {name: changed(description[name]) for name in ("normalizer", "pre_tokenizer", "decoder")}


class Marks:
    """Control tokens that texts spell out, replaced by marks that stand for them until the template was rendered.

    Args:
        codec: whose control tokens.
        texts: all texts that will be hidden; a mark occurs in none of them.
    """

    def __init__(self, codec: Codec, texts: Iterable[str]) -> None:
        self._codec = codec
        self._left, self._right = _absent_characters("".join(texts), 2)
        self._names = list(codec._control_ids)
        self._marks = {name: f"{self._left}{i}{self._right}" for i, name in enumerate(self._names)}
        self._mark = re.compile(f"{self._left}(\\d+){self._right}")

    def hide(self, text: str, kept: Collection[str] = ()) -> str:
        """`text` with marks for its control tokens, except for those in `kept`."""
        return self._codec._control.sub(lambda m: m[0] if m[0] in kept else self._marks[m[0]], text)

    def encode(self, rendered: str) -> list[int]:
        """Ids of what a template made of the hidden texts: a control token is one, a mark is the text it hides."""
        codec, ids, position = self._codec, [], 0
        for match in [*codec._control.finditer(rendered), None]:
            text = rendered[position : match.start() if match else len(rendered)]
            text = self._mark.sub(lambda mark: self._names[int(mark[1])], text)
            ids += _ids(codec._after_control if ids else codec._first, text)
            if match:
                ids.append(codec._control_ids[match[0]])
                position = match.end()
        return ids


class TextTooLong(UserError):
    """A text that does not fit.

    Args:
        least_tokens: how many tokens it has at least.
        max_tokens: how many would fit.
    """

    def __init__(self, least_tokens: int, max_tokens: int) -> None:
        super().__init__(f"the text of at least {least_tokens} tokens does not fit in {max_tokens} tokens")
        self.least_tokens, self.max_tokens = least_tokens, max_tokens


class NoTools(UserError):
    """The chat template does not write tools."""


class TemplateRefusal(UserError):
    """The chat template does not take these messages."""


def _absent_characters(text: str, count: int) -> list[str]:
    """The first `count` private characters that `text` does not hold."""
    used = set(text)
    free = (chr(code) for codes in PRIVATE_USE for code in codes if chr(code) not in used)
    return [next(free) for _ in range(count)]
