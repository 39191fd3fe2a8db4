"""Conversations to token ids, asked as evaluation, serving and sampling ask: by the checkpoint's own chat template.

The request of a turn is what the house's codec gives for the conversation up to there, with the assistant's header;
the answer is its text and what the template writes behind it. Text is text: a control token spelled out in a message
is ordinary characters in a row. A template of LLaMA-Factory is taken where it gives the same ids, or where the user
insists. The tokenizer is never changed.
"""

import copy
import logging
from collections.abc import Sequence
from typing import Any

from llamafactory.data.template import TEMPLATES, Template, get_template_and_fix_tokenizer

from CoDALanguageModel.errors import UserError
from CoDALanguageModel.prompts import Codec, Marks

from .records import DataError

logger = logging.getLogger(__name__)

Pairs = list[tuple[list[int], list[int]]]
"""Token ids of each turn: the request with all that stands around it, and the answer with its end."""

Message = dict[str, str]

_PROBE = ("\n  def f(x):\n\treturn x  # ok \n", "It is 1.\n\n- two ", "and then?  ", "Yes")


def _turns(texts: Sequence[str], system: str = "") -> list[Message]:
    roles = ("user", "assistant")
    chat = [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]
    return ([{"role": "system", "content": system}] if system else []) + chat


class ChatTemplate:
    """The checkpoint's own chat template, taken apart into requests and answers.

    Args:
        tokenizer: a fast tokenizer with a chat template.

    Raises:
        UserError: there is no chat template, or it cannot be taken apart.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not isinstance(tokenizer.chat_template, str):
            raise UserError("the checkpoint's tokenizer has no chat template: set template to one of LLaMA-Factory's")
        self.codec = Codec(tokenizer)
        self.closing = self._closing(tokenizer)
        self.start = [*self.codec.encode_chat(_turns(["a"])), *self.answer("b")]
        self.nests = self._check(tokenizer)

    def pairs(self, messages: Sequence[Message], system: str) -> Pairs:
        """Requests and answers of a conversation.

        Raises:
            DataError: there are several turns and the template writes earlier ones in another way than the last.
        """
        if len(messages) > 2 and not self.nests:
            raise DataError(
                "the checkpoint's chat template writes earlier turns in another way than the assistant's last one, so "
                "several turns cannot be learned together; use one turn a row, or set template"
            )
        result = []
        for number in range(0, len(messages), 2):
            request = messages[number]["content"]
            if number == 0:
                source = self.codec.encode_chat(_turns([request], system))
            else:  # what follows any answer: the template writes a turn the same whatever stands before
                source = self.codec.encode_chat(_turns(["a", "b", request]))[len(self.start) :]
            result.append((source, self.answer(messages[number + 1]["content"])))
        return result

    def answer(self, text: str) -> list[int]:
        """Ids of an answer with its end."""
        return [*self.codec.encode_answer(text), *self.closing]

    def _closing(self, tokenizer: Any) -> list[int]:
        """What the template writes behind an answer."""
        answer = "the answer"
        rendered = tokenizer.apply_chat_template(_turns(["a", answer]), tokenize=False)
        if answer not in rendered:
            raise UserError("the checkpoint's chat template does not write the assistant's text: set template")
        ids = tokenizer(rendered.rpartition(answer)[2], add_special_tokens=False)["input_ids"]
        if tokenizer.eos_token_id not in ids:
            raise UserError(
                f"the checkpoint's chat template does not end an answer with the end token {tokenizer.eos_token!r}: "
                f"it writes {tokenizer.decode(ids)!r}; mend the one or the other in the model folder, or set template"
            )
        return ids

    def _check(self, tokenizer: Any) -> bool:
        """Whether requests and answers put together are the whole conversation, for one turn and for several."""
        request, answer, following, _ = _PROBE
        for system in ("", "be brief"):
            chat = _turns([request], system)
            try:
                asked = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            except Exception as error:  # a template is a program of the model's author; it refuses by raising anything
                if not system:
                    raise UserError(f"the checkpoint's chat template refuses a plain request: {error}") from error
                continue  # no system messages with this model; a row that has one is refused
            text = asked + answer + tokenizer.decode(self.closing)
            if (
                _flat(self.pairs(_turns([request, answer]), system))
                != tokenizer(text, add_special_tokens=False).input_ids
            ):
                raise UserError(f"this tokenizer encodes {answer!r} differently alone and behind the request {asked!r}")
        answer = answer.strip()
        begun = _flat(self.pairs(_turns([request, answer]), ""))
        return (
            self.codec.encode_chat(_turns([request, answer, following]))[: len(begun)] == begun
            and self.codec.encode_chat(_turns(["a", "b", following]))[: len(self.start)] == self.start
        )


def _flat(pairs: Pairs) -> list[int]:
    return [token for pair in pairs for part in pair for token in part]


class HostTemplate:
    """A template of LLaMA-Factory, with the text of messages kept text.

    Args:
        template: as LLaMA-Factory has it.
        tokenizer: the checkpoint's.
        codec: the house's.
    """

    def __init__(self, template: Template, tokenizer: Any, codec: Codec) -> None:
        self.template = template
        self.tokenizer = tokenizer
        self.codec = codec

    def pairs(self, messages: Sequence[Message], system: str, tools: str, discarding: bool) -> Pairs:
        """Requests and answers of a conversation, which may use tools."""
        marks = self.codec.marks((system, tools, *(message["content"] for message in messages)))
        hidden = [{**message, "content": marks.hide(message["content"])} for message in messages]
        stand_in = _Host(self.tokenizer, marks)
        return self.template.encode_multiturn(stand_in, hidden, marks.hide(system), marks.hide(tools), discarding)


class _Host:
    """Stands for the tokenizer where a template of LLaMA-Factory calls it: what the template writes is control.

    Args:
        tokenizer: the checkpoint's.
        marks: with which the texts are hidden.
    """

    def __init__(self, tokenizer: Any, marks: Marks) -> None:
        self.eos_token_id, self.bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id
        self.convert_tokens_to_ids = tokenizer.convert_tokens_to_ids
        self.marks = marks

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Ids of what the template wrote, without tokens around it."""
        return self.marks.encode(text)


class TurnEncoder:
    """Chooses how conversations are encoded: by the checkpoint's chat template, or by one of LLaMA-Factory's.

    Args:
        tokenizer: the checkpoint's; it is not changed.
        data_args: LLaMA-Factory's data arguments.
        other_template: whether `template` may give other ids than the checkpoint's chat template.

    Raises:
        UserError: a template that does not fit, with the remedy.
    """

    def __init__(self, tokenizer: Any, data_args: Any, other_template: bool) -> None:
        self.default_system = data_args.default_system or ""
        self.mask_history = data_args.mask_history
        self.chat: ChatTemplate | None = None
        self.host: HostTemplate | None = None
        name = data_args.template
        if name is None:
            self.chat = ChatTemplate(tokenizer)
            return
        template = _fitting(name, tokenizer, data_args)
        if not isinstance(tokenizer.chat_template, str):
            self.host = HostTemplate(template, tokenizer, Codec(tokenizer))
            return
        self.chat = ChatTemplate(tokenizer)
        self.host = HostTemplate(template, tokenizer, self.chat.codec)
        difference = self._difference(tokenizer)
        if difference and not other_template:
            raise UserError(
                f"template={name!r} gives other tokens than the checkpoint's own chat template, by which evaluation "
                f"and serving ask: leave template out, or set diffusion.other_template=true to train so\n{difference}"
            )
        if difference:
            logger.warning("template=%s is trained, which is not the checkpoint's chat template\n%s", name, difference)
            self.chat = None

    def _difference(self, tokenizer: Any) -> str:
        """How the two templates write a probe, where they differ."""
        for texts in (_PROBE[:2], _PROBE):
            for system in ("", "be brief"):
                host = self.host.pairs(_turns(texts), system, "", False)
                try:
                    own = self.chat.pairs(_turns(texts), system)
                except UserError as error:
                    return f"  the chat template: {error}"
                if host != own:
                    return "\n".join(
                        f"  {whose}: {tokenizer.decode(_flat(pairs))!r}"
                        for whose, pairs in (("template", host), ("checkpoint", own))
                    )
        return ""

    def pairs(self, messages: Sequence[Message], system: str, tools: str) -> Pairs:
        """Requests and answers of a conversation.

        Raises:
            DataError: the conversation cannot be encoded by this template.
        """
        system = system or self.default_system
        plain = not tools and all(message["role"] in ("user", "assistant") for message in messages)
        if plain and self.chat is not None:
            try:
                return self.chat.pairs(messages, system)
            except DataError:
                raise
            except UserError as error:
                raise DataError(str(error)) from error
        if self.host is None:
            raise DataError(
                "rows with tools need a template of LLaMA-Factory: set template, e.g. template=qwen3_nothink"
            )
        return self.host.pairs(messages, system, tools, self.mask_history and not self.host.template.preserve_thinking)


def _fitting(name: str, tokenizer: Any, data_args: Any) -> Template:
    """LLaMA-Factory's template of that name, where it needs no other tokenizer than the checkpoint's.

    Raises:
        UserError: there is none of that name, or it changes the vocabulary or the end of an answer.
    """
    if name not in TEMPLATES:
        raise UserError(f"template must be one of LLaMA-Factory's, or left out for the checkpoint's own, got {name!r}")
    changed = copy.deepcopy(tokenizer)
    template = get_template_and_fix_tokenizer(changed, data_args)
    remedy = "leave template out to train with the checkpoint's own chat template"
    if len(changed) != len(tokenizer):
        added = sorted(changed.get_vocab().keys() - tokenizer.get_vocab().keys())
        raise UserError(f"template={name!r} needs tokens that the checkpoint does not have, {added}; {remedy}")
    if changed.eos_token_id != tokenizer.eos_token_id:
        raise UserError(
            f"template={name!r} ends answers with {changed.eos_token!r}, the checkpoint with {tokenizer.eos_token!r}; "
            f"{remedy}"
        )
    if template.efficient_eos:
        raise UserError(f"template={name!r} writes no end behind an answer that another turn follows; {remedy}")
    target = template.encode_multiturn(tokenizer, _turns(["a", "b"]))[-1][1]
    if tokenizer.eos_token_id not in target:
        raise UserError(
            f"template={name!r} writes {tokenizer.decode(target)!r}: it does not end an answer with the end token "
            f"{tokenizer.eos_token!r} of the checkpoint; {remedy}"
        )
    return template


def template_for_collation(tokenizer: Any, data_args: Any) -> Template:
    """What LLaMA-Factory's collator and export want as a template; stands for the function that changes a tokenizer."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return TEMPLATES["empty"]
