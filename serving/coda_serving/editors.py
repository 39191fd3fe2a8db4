"""The endpoints that editors' completion plug-ins speak: llama.cpp's `/infill`, and Mistral's `/v1/fim/completions`.

Both fill one gap whose length nobody knows: their limit of tokens bounds the lengths that are tried.
"""

import dataclasses
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, RootModel, model_validator

from CoDALanguageModel.decoding_settings import LARGEST_INTEGER
from CoDALanguageModel.errors import UserError
from CoDALanguageModel.fill_tokens import file_text
from CoDALanguageModel.prompts import TextTooLong

from .bodies import body_schema, read_body
from .canvases import AUTO, Asked, Pieces, encode_pieces, lay_out, started
from .engine import Answer, Delta
from .errors import ApiError, documented, invalid
from .generation import Generation
from .protocol import SamplingRequest, StrictModel, Text, check_one_length
from .replies import check_model, respond
from .responses import (
    AssistantMessage,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    FinishReason,
    Form,
    Head,
    Usage,
)
from .service import Service
from .streaming import MakeUsage, data_event, error_event


class ExtraFile(StrictModel):
    """A piece of another file that may help."""

    text: Text
    filename: Text | None = None
    time: Any = None
    """When the editor saw it; without effect."""


class InfillRequest(SamplingRequest):
    """Body of `/infill`, as llama.cpp's server takes it and llama.vim and llama.vscode send it."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "dry_multiplier": (0,),
        "dynatemp_range": (0,),
        "grammar": ("",),
        "ignore_eos": (False,),
        "json_schema": (),
        "lora": ([],),
        "min_p": (0,),
        "mirostat": (0,),
        "n_probs": (0,),
        "repeat_penalty": (1,),
        "return_progress": (False,),
        "return_tokens": (False,),
        "top_n_sigma": (-1,),
        "typical_p": (1,),
        "xtc_probability": (0,),
    }
    closed: ClassVar[frozenset[str]] = frozenset({"n", "stream_options"})
    ignored: ClassVar[frozenset[str]] = SamplingRequest.ignored | {
        "cache_prompt",
        "dry_allowed_length",
        "dry_base",
        "dry_penalty_last_n",
        "dry_sequence_breakers",
        "dynatemp_exponent",
        "id_slot",
        "min_keep",
        "mirostat_eta",
        "mirostat_tau",
        "n_cache_reuse",
        "n_discard",
        "n_keep",
        "repeat_last_n",
        "samplers",
        "t_max_predict_ms",
        "t_max_prompt_ms",
        "timings_per_token",
        "xtc_threshold",
    }
    """A canvas that is cut off by a clock would be another one each time, so the two limits of time have no effect."""

    input_prefix: Text = ""
    """Text before the gap."""
    input_suffix: Text = ""
    """Text behind the gap; empty: the text simply goes on."""
    input_extra: Annotated[list[ExtraFile], Field(fail_fast=True)] = []
    """Other files, which stand before the prefix, the most useful last."""
    prompt: Text = ""
    """The rest of the prefix: what stands before the gap in its line."""
    n_predict: int | None = Field(None, ge=-1, le=LARGEST_INTEGER)
    """Most tokens of the answer; 0 only warms a cache up, -1 is the server's default."""
    n_indent: int | None = Field(None, ge=0, le=LARGEST_INTEGER)
    """The answer ends before its first line, besides the one it begins in, that is indented by fewer characters."""
    response_fields: Annotated[list[Text], Field(fail_fast=True)] | None = None
    """Fields to send back, those of objects as `timings/predicted_n`; null for all."""
    include_usage: ClassVar[bool] = True

    @model_validator(mode="before")
    @classmethod
    def _random_seed(cls, data: Any) -> Any:
        """-1 is a random seed."""
        return {k: v for k, v in data.items() if (k, v) != ("seed", -1)} if isinstance(data, dict) else data


class FimRequest(SamplingRequest):
    """Body of `/v1/fim/completions`, as Mistral's client and Continue send it."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {"min_tokens": (0,)}
    closed: ClassVar[frozenset[str]] = frozenset({"n"})

    prompt: Text
    """Text before the gap."""
    suffix: Text | None = None
    """Text behind the gap; null or empty: the text simply goes on."""
    max_completion_tokens: int | None = Field(None, ge=1, le=LARGEST_INTEGER)
    """Another name of `max_tokens`, which some clients send beside it."""

    @model_validator(mode="after")
    def _one_length(self) -> "FimRequest":
        check_one_length(self.max_tokens, self.max_completion_tokens)
        return self

    @model_validator(mode="before")
    @classmethod
    def _one_seed(cls, data: Any) -> Any:
        """`random_seed` is Mistral's name of `seed`."""
        if not isinstance(data, dict) or "random_seed" not in data:
            return data
        seed = data["random_seed"]
        return {k: v for k, v in data.items() if k != "random_seed"} | ({} if seed is None else {"seed": seed})


BODIES = (InfillRequest, FimRequest)


def routes(service: Service) -> APIRouter:
    """`/infill` and `/v1/fim/completions`."""
    router = APIRouter()

    @router.post(
        "/infill", response_model=InfillReply, responses=documented(), openapi_extra=body_schema(InfillRequest)
    )
    async def infill(request: Request) -> Any:
        """Fill the gap between prefix and suffix, as llama.cpp's server does."""
        body = await read_body(request, InfillRequest)
        form = InfillForm(body)
        if body.n_predict == 0:  # asks only that the prompt be read in advance
            check_model(service.settings, body.model)
            head = Head.new(form.id_prefix, service.settings.public_name)
            nothing = Answer(text="", num_tokens=0, forwards=0, finish_reason="length")
            return JSONResponse(form.fields(head, nothing, Usage.of(0, [])))
        return await respond(service, request, body, form.canvases, form, events=infill_events)

    @router.post(
        "/v1/fim/completions",
        response_model=FimCompletion,
        responses=documented(),
        openapi_extra=body_schema(FimRequest),
    )
    async def fim(request: Request) -> Any:
        """Fill the gap between prompt and suffix, as Mistral's API does."""
        return await respond(service, request, await read_body(request, FimRequest), fim_canvases, FIM)

    return router


# llama.cpp's


class InfillReply(RootModel[dict[str, Any]]):
    """Response of `/infill`: `content`, `stop_type`, `truncated`, `timings` and counts, or what was asked of them."""


class InfillForm:
    """How one request to `/infill` is laid out and answered.

    Args:
        body: the request.
    """

    id_prefix = "infill"

    def __init__(self, body: InfillRequest) -> None:
        self._body = body
        self._truncated = False
        self._started_s = time.monotonic()

    def canvases(self, service: Service, body: InfillRequest) -> Asked:
        """Files, prefix and prompt before the gap, and the suffix behind it; what does not fit is left out."""
        most = body.n_predict if body.n_predict and body.n_predict > 0 else body.max_tokens
        before, cut_before = _encode(service, body.input_prefix + body.prompt, "input_prefix")
        after, cut_after = _encode(service, body.input_suffix, "input_suffix", is_suffix=True)
        pieces = [before, after] if after else [before]
        context = service.limits.context_length
        if most is not None and most >= context:
            raise invalid(f"n_predict must be less than the context of {context} tokens, got {most}", "n_predict")
        room = context - (most or min(service.settings.max_tokens, context // 2))
        pieces, cut = _fit(pieces, room)
        self._truncated = cut or cut_before or cut_after
        for file in reversed(body.input_extra):
            text = file_text(file.filename, file.text) if file.filename else file.text
            ids, cut = _encode(service, text + ("" if text.endswith("\n") else "\n"), "input_extra")
            if cut or sum(map(len, pieces)) + len(ids) > room:
                self._truncated = True
                break
            pieces = [ids + pieces[0], *pieces[1:]]
        return lay_out(service, body, [started(service, pieces)], most, "input_prefix", AUTO)

    def whole(self, head: Head, answers: Sequence[Answer], usage: Usage) -> InfillReply:
        """The whole response."""
        (answer,) = answers
        return InfillReply(self.fields(head, self.cut(answer), usage))

    def cut(self, answer: Answer) -> Answer:
        """The answer up to its first line that is not indented enough."""
        text = until_dedent(answer.text, self.indent)
        return answer if text == answer.text else dataclasses.replace(answer, text=text, finish_reason="length")

    def fields(self, head: Head, answer: Answer, usage: Usage) -> dict[str, Any]:
        """llama.cpp's fields of an answer, or those that were asked for."""
        elapsed_ms = (time.monotonic() - self._started_s) * 1000
        tokens = answer.num_tokens
        stop_type = "limit" if answer.finish_reason == "length" else "eos" if answer.stop is None else "word"
        fields = {
            "index": 0,
            "content": answer.text,
            "id_slot": -1,
            "stop": True,
            "model": head.model,
            "tokens_predicted": tokens,
            "tokens_evaluated": usage.prompt_tokens,
            "tokens_cached": usage.prompt_tokens_details.cached_tokens,
            "truncated": self._truncated,
            "stop_type": stop_type,
            "stopping_word": answer.stop or "",
            "timings": {
                # A prompt is read in every pass: there is no time of its own.
                "prompt_n": usage.prompt_tokens,
                "prompt_ms": 0.0,
                "prompt_per_token_ms": 0.0,
                "prompt_per_second": 0.0,
                "predicted_n": tokens,
                "predicted_ms": elapsed_ms,
                "predicted_per_token_ms": elapsed_ms / max(1, tokens),
                "predicted_per_second": tokens / elapsed_ms * 1000 if elapsed_ms else 0.0,
            },
            "usage": usage.model_dump(),
            "infill": {"lengths": list(answer.gap_lengths), "score": answer.score},
        }
        asked = self._body.response_fields
        return fields if asked is None else {name: found[0] for name in asked if (found := _find(fields, name))}

    @property
    def indent(self) -> int:
        """Characters by which lines of the answer are indented at least."""
        return self._body.n_indent or 0


async def infill_events(
    generation: Generation, head: Head, form: InfillForm, n: int, make_usage: MakeUsage
) -> AsyncIterator[str]:
    """Frames of a streamed answer, as llama.cpp's server sends them: pieces of content, then all fields."""
    text, shown = "", ""
    try:
        async for _, event in generation.events():
            if isinstance(event, Delta):
                text += event.text
                visible = until_dedent(text, form.indent, is_whole=False)
                if len(visible) > len(shown):
                    yield data_event(json.dumps({"index": 0, "content": visible[len(shown) :], "stop": False}))
                    shown = visible
            else:
                whole = form.cut(event)
                rest = dataclasses.replace(whole, text=whole.text[len(shown) :])
                yield data_event(json.dumps(form.fields(head, rest, make_usage([event]))))
    except ApiError as error:  # the status has been sent already
        yield error_event(error)


def until_dedent(text: str, indent: int, *, is_whole: bool = True) -> str:
    """Text up to its first line that is indented by fewer than `indent` characters.

    Args:
        text: its first line goes on from other text, and empty lines are not judged.
        indent: spaces or tabs.
        is_whole: no more will come; otherwise what may turn out to be such a line is left out.
    """
    if not indent:
        return text
    start = text.find("\n") + 1
    while start:
        end = text.find("\n", start)
        line = text[start:] if end < 0 else text[start:end]
        depth = len(line) - len(line.lstrip(" \t"))
        if depth < indent and (line.strip() or (end < 0 and not is_whole)):
            return text[:start]
        start = end + 1
    return text


def _encode(service: Service, text: str, param: str, *, is_suffix: bool = False) -> tuple[list[int], bool]:
    """Ids of a text; of one that surely does not fit, of so much next to the gap as may. And whether it was cut."""
    cut = False
    while True:
        try:
            ids = service.encoder.encode_text(text, joins=is_suffix, max_tokens=service.limits.context_length)
        except TextTooLong:
            half = len(text) // 2
            text, cut = text[:half] if is_suffix else text[half:], True
        except UserError as error:
            raise invalid(str(error), param=param) from error
        else:
            return ids, cut


def _fit(pieces: Pieces, room: int) -> tuple[Pieces, bool]:
    """The ids around a gap that fit: of the suffix at least a quarter, from its beginning; of the prefix its end."""
    before, after = pieces[0], pieces[1] if len(pieces) > 1 else []
    if len(before) + len(after) <= room:
        return pieces, False
    after = after[: max(room // 4, room - len(before))]
    before = before[len(before) - (room - len(after)) :] if len(before) + len(after) > room else before
    return [before, *([after] if after else [])], True


def _find(fields: dict[str, Any], name: str) -> list[Any]:
    """The value at a path such as `timings/predicted_n`, if there is one."""
    value: Any = fields
    for part in name.split("/"):
        if not isinstance(value, dict) or part not in value:
            return []
        value = value[part]
    return [value]


# Mistral's


def fim_canvases(service: Service, body: FimRequest) -> Asked:
    """The gap between prompt and suffix, or a text that goes on."""
    pieces = encode_pieces(service, body, (body.prompt, body.suffix or ""), "prompt")
    return lay_out(service, body, [pieces], body.max_tokens or body.max_completion_tokens, "prompt", AUTO)


class FimChoice(BaseModel):
    """The answer, as Mistral's clients read it."""

    index: int
    message: AssistantMessage
    text: str
    """The same, as Inception's clients read it."""
    finish_reason: FinishReason


class FimChunkChoice(ChatChunkChoice):
    """What an event adds to the answer, in both forms."""

    text: str


class FimCompletion(ChatCompletion):
    """Response of `/v1/fim/completions`."""

    choices: list[FimChoice]  # type: ignore[assignment]


class FimChunk(ChatChunk):
    """Event of a stream of `/v1/fim/completions`."""

    choices: list[FimChunkChoice]  # type: ignore[assignment]


FIM = Form(
    id_prefix="fim",
    response=FimCompletion,
    event=FimChunk,
    choice=lambda i, a: FimChoice(
        index=i, message=AssistantMessage(content=a.text), text=a.text, finish_reason=a.finish_reason
    ),
    part=lambda i, d, end: FimChunkChoice(
        index=i, delta=ChatDelta(content=d.text or None), text=d.text, finish_reason=end
    ),
    opening=lambda i: FimChunkChoice(index=i, delta=ChatDelta(role="assistant", content=""), text=""),
)
