"""Prompts that are repeated before their answers, and scored.

A masked-diffusion model gives the probability of a text as the product of its tokens' probabilities in any order of
commits. Here it is the order from left to right, in a canvas that is as long as the prompt: each token is judged while
all before it stand and all behind it are masked, one in every step.
"""

import dataclasses
from collections.abc import AsyncIterator, Iterator, Sequence

from CoDALanguageModel.answers import Decode, FinishReason
from CoDALanguageModel.decoding_settings import DecodingSettings
from CoDALanguageModel.errors import UserError

from .canvases import Asked, check_rows, completion_canvases, completion_texts
from .engine import Answer, Delta, Judged
from .errors import invalid
from .generation import Generation
from .logprobs import TextLogprobs
from .protocol import NO_ECHO_OF_GAPS, CompletionRequest
from .responses import Completion, CompletionChoice, Form, Head, Usage
from .scheduler import CanvasRequest
from .service import Service
from .streaming import MakeUsage, answer_events

NOTHING = Answer(text="", num_tokens=0, forwards=0, finish_reason="length")
"""An answer of no tokens."""


class Echo:
    """How one request is answered whose prompts come back.

    Args:
        form: of the answers.
        decode: token ids to text.
    """

    def __init__(self, form: Form, decode: Decode) -> None:
        self.id_prefix = form.id_prefix
        self._form = form
        self._decode = decode
        self._prompts: list[list[int]] = []
        self._texts: list[str] = []
        self._n = 1
        self._has_answers = True
        self._scored: list[int] = []
        """Prompts of which there is something to score."""

    def canvases(self, service: Service, body: CompletionRequest) -> Asked:
        """Those of the answers, and behind them one for each prompt that is scored."""
        texts = completion_texts(service, body)
        if any(len(pieces) > 1 for pieces in texts):
            raise invalid(NO_ECHO_OF_GAPS, param="echo")
        self._prompts = [ids for (ids,) in texts]
        for ids in self._prompts:
            if len(ids) > service.limits.context_length:
                raise invalid(f"the prompt of {len(ids)} tokens does not fit in the context", param="prompt")
        self._n, self._has_answers = body.n or 1, body.max_tokens != 0
        num_tokens = sum(map(len, self._prompts))
        asked = completion_canvases(service, body) if self._has_answers else Asked([], num_tokens)
        echoes = [self._scoring(service, body, ids) for ids in self._prompts]
        self._texts = [p if isinstance(p, str) else self._decode(p, ()) for p in body.prompts]
        if body.num_best is None:
            return asked
        self._scored = [i for i, ids in enumerate(self._prompts) if len(ids) > 1]
        answers = [*asked.answers, *([echoes[i]] for i in self._scored)]
        check_rows(service, answers, "prompt")
        return Asked(answers, num_tokens)

    @staticmethod
    def _scoring(service: Service, body: CompletionRequest, ids: list[int]) -> CanvasRequest:
        """The canvas that scores a prompt; of one token there is nothing to score."""
        has_more = len(ids) > 1
        canvas = CanvasRequest(
            prompt_ids=tuple(ids[:1]),
            max_tokens=max(1, len(ids) - 1),
            suffix_ids=() if has_more else None,
            options=DecodingSettings(block_length=1, steps=max(1, len(ids) - 1)),  # one for each token
            seed=0,
            logprobs=body.num_best,
            forced=tuple(ids[1:]) if has_more else None,
        )
        try:
            service.limits.check(canvas)
        except UserError as error:
            raise invalid(str(error), param="prompt") from error
        return canvas

    def whole(self, head: Head, answers: Sequence[Answer], usage: Usage) -> Completion:
        """The whole response."""
        num = len(self._prompts) * self._n
        own = answers[:num] if self._has_answers else [NOTHING] * num
        echoes = dict(zip(self._scored, answers[num if self._has_answers else 0 :], strict=True))
        choices = [
            self._behind(self._form.choice(i, answer), i // self._n, echoes.get(i // self._n))
            for i, answer in enumerate(own)
        ]
        return Completion(**dict(head), choices=choices, usage=usage)

    def _behind(self, choice: CompletionChoice, prompt: int, echo: Answer | None) -> CompletionChoice:
        text = self._texts[prompt]
        update = {"text": text + choice.text}
        if choice.logprobs is not None:
            judged = () if echo is None else echo.tokens
            before = self._form.spelling.text(judged, first=self._prompts[prompt][0])
            update["logprobs"] = _joined(before, choice.logprobs, len(text))
        return choice.model_copy(update=update)

    def events(
        self, generation: Generation, head: Head, form: "Echo", n: int, make_usage: MakeUsage | None
    ) -> AsyncIterator[str]:
        """Frames of streamed answers, each behind its prompt."""
        begun: set[int] = set()

        def part(index: int, delta: Delta, end: FinishReason | None) -> CompletionChoice | None:
            prompt = index // self._n
            if prompt >= len(self._prompts):
                return None  # what scored a prompt, and has been told as a part of its answers
            if index not in begun:
                begun.add(index)
                spelling = self._form.spelling
                told = None if spelling is None else spelling.text(delta.tokens, first=self._prompts[prompt][0])
                return CompletionChoice(index=index, text=delta.text, logprobs=told, finish_reason=None)
            choice = self._form.part(index, delta, end)
            if choice.logprobs is None:
                return choice
            return choice.model_copy(update={"logprobs": _moved(choice.logprobs, len(self._texts[prompt]))})

        form = dataclasses.replace(self._form, part=part)
        return answer_events(generation, head, form, n, make_usage, self._in_turn(generation))

    async def _in_turn(self, generation: Generation) -> AsyncIterator[tuple[int, Delta | Answer]]:
        """Events of which the first of an answer is its prompt, as soon as that has been scored; others wait for it."""
        scored = set(self._scored)
        num = len(self._prompts) * self._n
        waiting: dict[int, list[Delta | Answer]] = {i: [] for i in range(num) if i // self._n in scored}
        """Of each answer at most a part, and its end."""

        def opened(prompt: int, tokens: tuple[Judged, ...] = ()) -> Iterator[tuple[int, Delta | Answer]]:
            for index in range(prompt * self._n, (prompt + 1) * self._n):
                yield index, Delta(self._texts[prompt], tokens)
                events = waiting.pop(index, []) if self._has_answers else [NOTHING]
                yield from ((index, event) for event in events)

        for prompt in range(len(self._prompts)):
            if prompt not in scored:
                for event in opened(prompt):
                    yield event
        first = num if self._has_answers else 0
        async for index, event in generation.events():
            if index >= first:
                if isinstance(event, Answer):
                    yield num, event
                    for told in opened(self._scored[index - first], event.tokens):
                        yield told
            elif index not in waiting:
                yield index, event
            elif isinstance(event, Delta) and waiting[index]:
                waiting[index] = [waiting[index][0].then(event)]
            else:
                waiting[index].append(event)


def _joined(before: TextLogprobs, after: TextLogprobs, start: int) -> TextLogprobs:
    """Both in turn; `after` belongs to text that begins at a character."""
    moved = _moved(after, start)
    names = TextLogprobs.model_fields
    return TextLogprobs(**{name: getattr(before, name) + getattr(moved, name) for name in names})


def _moved(logprobs: TextLogprobs, start: int) -> TextLogprobs:
    """The same of text that begins at a character."""
    return logprobs.model_copy(update={"text_offset": [start + offset for offset in logprobs.text_offset]})
