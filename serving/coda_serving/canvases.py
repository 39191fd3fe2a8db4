"""From a checked request to the canvases that answer it.

Not here: denoising them (`engine`), or replying (`replies`).
"""

import secrets
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from CoDALanguageModel.decoding_settings import SETTINGS, DecodingSettings
from CoDALanguageModel.errors import UserError
from CoDALanguageModel.fill_tokens import read_fill_prompt
from CoDALanguageModel.infilling import candidate_lengths
from CoDALanguageModel.prompts import NoTools, TextTooLong

from .errors import ApiError, invalid
from .protocol import ChatRequest, CompletionRequest, DecodingFields, SamplingRequest, Shape
from .scheduler import CanvasRequest
from .service import Service
from .tools import Conversation, shape_of

AUTO = "auto"
"""Lengths of gaps that nobody knows: several are tried, and the best answer is kept."""

Pieces = list[list[int]]
"""Token ids of a text: one list, which goes on, or those on both sides of its gaps."""


class Asked(NamedTuple):
    """What a request asks to denoise."""

    answers: list[list[CanvasRequest]]
    """Of each answer the canvases that compete for it, prompts first."""

    prompt_tokens: int
    """Of all prompts, what stands behind their gaps included."""

    @property
    def regime(self) -> str:
        """`exact`, or the approximate regimes that the answers are denoised in."""
        approximate = self.answers[0][0].options.approximate if self.answers else []
        return "+".join(sorted({SETTINGS[name].regime for name in approximate})) or "exact"


def chat_canvases(service: Service, body: ChatRequest) -> Asked:
    """One canvas per answer to a conversation."""
    max_tokens = body.max_completion_tokens or body.max_tokens
    _check_number(service, body, 1)
    shape = shape_of(body)
    prompt_ids = conversation_ids(service, body, body.conversation, max_tokens, shape)
    return lay_out(service, body, [[prompt_ids]], max_tokens, "messages", shape=shape)


def conversation_ids(
    service: Service,
    body: Conversation,
    messages: list[dict[str, str]],
    max_tokens: int | None,
    shape: Shape | None = None,
    *,
    continue_final_message: bool = False,
) -> list[int]:
    """Ids of a conversation up to where an answer begins that has a shape, or where the last message goes on.

    Raises:
        ApiError: it cannot be encoded, or surely does not fit in the context.
    """
    options: dict[str, Any] = {"continue_final_message": True} if continue_final_message else {}
    if tools := body.tooling.callable:
        options["tools"] = [tool.model_dump(exclude_none=True) for tool in tools]
    try:
        prompt_ids = service.encoder.encode_chat(messages, max_tokens=service.limits.context_length, **options)
    except TextTooLong as error:
        raise _context_exceeded(error.max_tokens, f"at least {error.least_tokens}", max_tokens, "messages") from error
    except UserError as error:
        raise invalid(str(error), param="tools" if isinstance(error, NoTools) else "messages") from error
    beginning = "" if shape is None else shape.beginning
    return [*prompt_ids, *service.encoder.encode_answer(beginning)] if beginning else prompt_ids


def completion_canvases(service: Service, body: CompletionRequest) -> Asked:
    """One canvas per prompt and answer, or several where a gap's length is not known; prompts first."""
    infill, texts = body.infill, completion_texts(service, body)
    if infill is None:
        lengths: tuple[int, ...] | Literal["auto"] | None = None if body.suffix else AUTO
    else:
        lengths = infill.lengths if infill.lengths == AUTO else tuple(infill.lengths)
    param = "prompt" if infill is None or infill.pieces is None else "infill"
    return lay_out(service, body, texts, body.max_tokens, param, lengths, body.shape)


def completion_texts(service: Service, body: CompletionRequest) -> list[Pieces]:
    """The prompts, and what stands behind their gaps."""
    infill = body.infill
    if infill is not None and infill.pieces is not None:
        _check_number(service, body, 1)
        return [encode_pieces(service, body, infill.pieces, "infill.pieces")]
    _check_number(service, body, len(body.prompts))
    suffix = encode_text(service, body, body.suffix, "suffix", joins=True) if body.suffix else None
    return [_prompt_pieces(service, body, prompt, suffix) for prompt in body.prompts]


def _prompt_pieces(
    service: Service, body: CompletionRequest, prompt: str | list[int], suffix: list[int] | None
) -> Pieces:
    """A prompt and what stands behind its gap, where it has one."""
    if not isinstance(prompt, str):
        return started(service, [list(prompt), *([] if suffix is None else [suffix])])
    if body.suffix is None and body.infill is None:
        try:
            gap = read_fill_prompt(prompt)
        except UserError as error:
            raise invalid(str(error), param="prompt") from error
        if gap is not None:
            return encode_pieces(service, body, gap, "prompt")
    return started(service, [encode_text(service, body, prompt, "prompt"), *([] if suffix is None else [suffix])])


def encode_pieces(service: Service, body: DecodingFields, pieces: Sequence[str], param: str) -> Pieces:
    """Ids of the pieces of one text. An end that is empty is no piece: the text simply goes on."""
    if len(pieces) == 2 and not pieces[1]:
        pieces = pieces[:1]
    ids = [encode_text(service, body, piece, param, joins=place > 0) for place, piece in enumerate(pieces)]
    return started(service, ids)


def started(service: Service, pieces: Pieces) -> Pieces:
    """The same, where an empty beginning is the beginning of a document, as OpenAI has it."""
    if pieces[0]:
        return pieces
    if service.limits.document_start_id is None:
        raise invalid("prompt must not be empty: the model has no token that starts a text", param="prompt")
    return [[service.limits.document_start_id], *pieces[1:]]


def encode_text(service: Service, body: DecodingFields, text: str, param: str, *, joins: bool = False) -> list[int]:
    """Ids of a text.

    Raises:
        ApiError: it cannot be encoded, or surely does not fit in the context.
    """
    try:
        return service.encoder.encode_text(text, joins=joins, max_tokens=service.limits.context_length)
    except TextTooLong as error:
        least = f"at least {error.least_tokens}"
        raise _context_exceeded(error.max_tokens, least, body.max_tokens, param) from error
    except UserError as error:
        raise invalid(str(error), param=param) from error


def lay_out(
    service: Service,
    body: SamplingRequest,
    texts: Sequence[Pieces],
    max_tokens: int | None,
    param: str,
    lengths: tuple[int, ...] | Literal["auto"] | None = None,
    shape: Shape | None = None,
) -> Asked:
    """The canvases of each text and answer.

    Args:
        service: whose limits and defaults hold.
        body: settings, seed, stop strings and number of answers.
        texts: one or several.
        max_tokens: masks of a text, of all its gaps together; None for the default.
        param: the field that the texts came from.
        lengths: masks of each gap; None for one of `max_tokens`; `auto` tries several lengths for the gaps of texts
            that have any.
        shape: what the answers must match.

    Raises:
        ApiError: something does not fit, or cannot be denoised.
    """
    options, seed = _options(service, body)
    stop = service.limits.stop if body.stop is None else body.stop_strings
    constraint = None
    if shape is not None:
        options, constraint = _shaped(service, body, options, shape)
        stop = ()
    answers: list[list[CanvasRequest]] = []
    for pieces in texts:
        is_auto = lengths == AUTO and len(pieces) > 1
        candidates = [
            CanvasRequest(
                prompt_ids=tuple(pieces[0]),
                max_tokens=combination[0],
                suffix_ids=tuple(pieces[1]) if len(pieces) > 1 else None,
                more_gaps=tuple(zip(combination[1:], map(tuple, pieces[2:]), strict=True)),
                options=options,
                seed=seed,
                stop=stop,
                is_candidate=is_auto,
                logprobs=body.num_best,
                shows_canvas=body.include_canvas,
                constraint=constraint,
            )
            for combination in _combinations(service, pieces, max_tokens, param, AUTO if is_auto else lengths)
        ]
        faults = {canvas: fault for canvas in candidates if (fault := _fault(service, canvas)) is not None}
        # Of lengths that compete some may be too short for what must match.
        if faults and (len(faults) == len(candidates) or shape is None):
            error = next(iter(faults.values()))
            raise _refused(body, error) from error
        candidates = [canvas for canvas in candidates if canvas not in faults]
        answers += [[canvas.with_seed(seed + i) for canvas in candidates] for i in range(body.n or 1)]
    check_rows(service, answers, param)
    return Asked(answers, sum(len(piece) for pieces in texts for piece in pieces))


def _fault(service: Service, canvas: CanvasRequest) -> UserError | None:
    """Why a canvas cannot be denoised."""
    try:
        service.limits.check(canvas)
    except UserError as error:
        return error
    return None


def _shaped(
    service: Service, body: SamplingRequest, options: DecodingSettings, shape: Shape
) -> tuple[DecodingSettings, Any]:
    """The options with what answers must match, and what is made of it."""
    if body.stop_strings:
        name = "stop" if "stop" not in body.closed else "stop_sequences"
        raise invalid(f"{name} cannot be used with {shape.param}: an answer that is cut would not match", param=name)
    # Speculation changes no token, so that an operator's default may be left out.
    own = shape.settings | ({} if body.decoding.get("speculate") else {"speculate": 0})
    try:
        options = DecodingSettings(**(vars(options) | own))
    except UserError as error:
        raise _refused(body, error) from error
    try:
        return options, service.limits.constraint(options, service.encoder.lexicon)
    except UserError as error:
        raise invalid(str(error), param=shape.param) from error


def _combinations(
    service: Service, pieces: Pieces, max_tokens: int | None, param: str, lengths: tuple[int, ...] | str | None
) -> list[tuple[int, ...]]:
    """Lengths of the gaps of a text: those that are known, or all that compete."""
    context, num_gaps = service.limits.context_length, max(1, len(pieces) - 1)
    given = sum(map(len, pieces))
    asked = sum(lengths) if isinstance(lengths, tuple) else max_tokens
    if given + (asked or num_gaps) > context:
        raise _context_exceeded(context, str(given), asked, param)
    if isinstance(lengths, tuple):
        return [lengths]
    most = asked or min(service.settings.max_tokens, context - given)
    if lengths is None or len(pieces) == 1:
        return [(most,)]
    try:
        return candidate_lengths(most, num_gaps)
    except UserError as error:
        raise invalid(str(error), param="infill") from error


def _options(service: Service, body: SamplingRequest) -> tuple[DecodingSettings, int]:
    """How answers are denoised, and the seed of the first."""
    settings = service.settings
    try:
        options = settings.options(body.decoding)
        settings.refuse_approximate(options)
    except UserError as error:
        raise _refused(body, error) from error
    seed = settings.seed if body.seed is None else body.seed
    if seed is None:
        seed = 0 if options.temperature == 0 else secrets.randbits(62)
    return options, seed


def _check_number(service: Service, body: SamplingRequest, num_prompts: int) -> None:
    """Refuse more answers than the queue ever holds, before there is a canvas for each."""
    answers, most = num_prompts * (body.n or 1), service.engine.max_queue
    if answers > most:
        raise invalid(
            f"one request may ask for at most {most} answers (MAX_QUEUE), got {num_prompts} prompts with "
            f"n={body.n or 1}: more than the queue of {most} holds",
            param="n" if num_prompts == 1 else "prompt",
        )


def check_rows(service: Service, answers: list[list[CanvasRequest]], param: str) -> None:
    """Refuse more canvases than the queue ever holds."""
    rows, most = sum(map(len, answers)), service.engine.max_queue
    if rows > most:
        raise invalid(
            f"the lengths to try and the prompts to score make {rows} answers, more than the queue of {most} holds "
            "(MAX_QUEUE): give the lengths, a smaller max_tokens, or fewer prompts at a time",
            param=param,
        )


def _context_exceeded(context: int, prompt_tokens: str, max_tokens: int | None, param: str) -> ApiError:
    """In the words and with the code that clients look for."""
    asked = f"{prompt_tokens} tokens in the prompt" + (f" and {max_tokens} in the completion" if max_tokens else "")
    return invalid(
        f"This model's maximum context length is {context} tokens. However, you requested {asked}. "
        "Please reduce the length of the prompt or max_tokens.",
        param=param,
        code="context_length_exceeded",
    )


def _refused(body: DecodingFields, error: UserError) -> ApiError:
    """400 for a message that begins with the name of the setting at fault, or is about several."""
    text = str(error).replace("max_new_tokens", "max_tokens")
    name = text.partition(" ")[0]
    return invalid(text, param=name if name in type(body).model_fields else None)
