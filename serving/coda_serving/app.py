"""The HTTP application: a function of its settings, its engine and its tokenizer, so that tests can hand it fakes.

Not here: sockets, signals and loading a model (`__main__`).
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from fastapi import APIRouter, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from CoDALanguageModel.errors import UserError
from CoDALanguageModel.prompts import TextTooLong

from .bodies import body_parts, body_schema, read_body
from .engine import Answer, Engine
from .errors import ApiError, invalid
from .gate import Gate
from .generation import Generation
from .metrics import Metrics
from .observe import ObserveMiddleware
from .protocol import ChatRequest, CompletionRequest, SamplingRequest
from .responses import CHAT, TEXT, ChatCompletion, Completion, Form, Head, ModelCard, ModelList, Usage
from .scheduler import CanvasRequest
from .settings import ServerSettings
from .streaming import EventStream, answer_events

CLIENT_CLOSED_REQUEST = 499
"""Nobody reads this status; it marks in the log and metrics that the client left (nginx's convention)."""


class Encoder(Protocol):
    """What the app needs of a tokenizer; `CoDALanguageModel.prompts.Codec` is one."""

    def encode_chat(self, messages: list[dict[str, str]], *, max_tokens: int | None) -> list[int]:
        """Ids of a conversation, up to where the answer begins. UserError when it surely has more than max_tokens."""

    def encode_text(self, text: str, *, joins: bool = False, max_tokens: int | None) -> list[int]:
        """Ids of a text, which may join to a text before it. UserError when it surely has more than max_tokens."""


class ModelLimits(Protocol):
    """What the app needs to know of a model; `sampler.ModelSampler` is one."""

    context_length: int
    document_start_id: int | None
    attention: str
    block_size: int | None
    stop: tuple[str, ...]
    """Stop strings of requests that name none: those of the model folder's `generation_config.json`."""

    def check(self, request: CanvasRequest) -> None:
        """Raise UserError for a canvas that cannot be denoised."""


@dataclass(frozen=True, kw_only=True)
class Service:
    """What the routes work with."""

    settings: ServerSettings
    engine: Engine
    encoder: Encoder
    limits: ModelLimits
    metrics: Metrics


def build_app(service: Service) -> FastAPI:
    """An app around one engine, which starts and stops with the app."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        await run_in_threadpool(service.engine.stop, service.settings.drain_timeout_s)

    app = FastAPI(title="CoDA", description="Masked-diffusion code language model", lifespan=lifespan)
    app.state.engine = service.engine
    _add_error_handlers(app)
    _describe_bodies(app)
    routers = (_open_routes(service), _model_routes(service))
    for router in routers:
        app.include_router(router)
    app.add_middleware(Gate, settings=service.settings)
    if service.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(service.settings.cors_origins), allow_methods=["*"], allow_headers=["*"]
        )
    routes = [route for router in routers for route in router.routes]
    app.add_middleware(ObserveMiddleware, metrics=service.metrics, routes=routes)
    return app


def _open_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        """200 while the model can be asked, 503 when its thread is gone."""
        engine = service.engine
        body = {
            "status": "ok" if engine.is_alive else "stopped",
            "model": service.settings.public_name,
            "waiting": engine.num_waiting,
            "running": engine.num_running,
        }
        return JSONResponse(body, status_code=200 if engine.is_alive else 503)

    return router


def _model_routes(service: Service) -> APIRouter:
    router = APIRouter()
    settings = service.settings
    card = ModelCard(
        id=settings.public_name,
        created=int(time.time()),
        max_model_len=service.limits.context_length,
        attention=service.limits.attention,
        block_size=service.limits.block_size,
        defaults=settings.decoding | ({"stop": list(service.limits.stop)} if service.limits.stop else {}),
    )

    @router.get("/metrics")
    async def metrics() -> Response:
        """Counts in Prometheus' text format."""
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/v1/models")
    async def models() -> ModelList:
        """The one model that is served."""
        return ModelList(data=[card])

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> ModelCard:
        """The model of that name."""
        _check_model(settings, name)
        return card

    @router.post("/v1/chat/completions", response_model=ChatCompletion, openapi_extra=body_schema(ChatRequest))
    async def chat(request: Request) -> Any:
        """Answer a conversation."""
        return await _respond(service, request, await read_body(request, ChatRequest), _chat_canvases, CHAT)

    @router.post("/v1/completions", response_model=Completion, openapi_extra=body_schema(CompletionRequest))
    async def complete(request: Request) -> Any:
        """Continue texts, or fill the gap between prompt and suffix."""
        return await _respond(service, request, await read_body(request, CompletionRequest), _completion_canvases, TEXT)

    return router


async def _respond(
    service: Service, request: Request, body: SamplingRequest, canvases_of: Callable[..., Any], form: Form
) -> Response:
    """Denoise what a body asks for, and say it in the endpoint's form, whole or as it becomes final."""
    settings = service.settings
    _check_model(settings, body.model)
    canvases, prompt_tokens = await run_in_threadpool(canvases_of, service, body)
    generation = Generation(service.engine, canvases, settings.request_timeout_s)
    head = Head.new(form.id_prefix, settings.public_name)
    usage_of = partial(Usage.of, prompt_tokens)
    if body.stream:
        events = answer_events(generation, head, form, len(canvases), usage_of if body.include_usage else None)
        return EventStream(generation, events, settings.heartbeat_s)
    answers = await _unless_client_leaves(request, generation)
    # Written in a thread: long answers would keep the event loop.
    content = await run_in_threadpool(lambda: form.whole(head, answers, usage_of(answers)).model_dump_json())
    return Response(content, media_type="application/json")


def _chat_canvases(service: Service, body: ChatRequest) -> tuple[list[CanvasRequest], int]:
    """One canvas per answer, and the number of prompt tokens."""
    _check_number(service, body, 1)
    max_tokens = body.max_completion_tokens or body.max_tokens
    messages = [message.as_text() for message in body.messages]
    try:
        prompt_ids = service.encoder.encode_chat(messages, max_tokens=service.limits.context_length)
    except TextTooLong as error:
        raise _context_exceeded(error.max_tokens, f"at least {error.least_tokens}", max_tokens, "messages") from error
    except UserError as error:
        raise invalid(str(error), param="messages") from error
    return _canvases(service, body, [prompt_ids], None, max_tokens, "messages"), len(prompt_ids)


def _completion_canvases(service: Service, body: CompletionRequest) -> tuple[list[CanvasRequest], int]:
    """One canvas per prompt and answer, prompts first; and the number of prompt and suffix tokens."""
    _check_number(service, body, len(body.prompts))
    suffix_ids = _encode_text(service, body, body.suffix, "suffix", joins=True) if body.suffix else None
    prompts = []
    for prompt in body.prompts:
        ids = _encode_text(service, body, prompt, "prompt") if isinstance(prompt, str) else list(prompt)
        if not ids:  # as OpenAI does: the beginning of a new document
            if service.limits.document_start_id is None:
                raise invalid("prompt must not be empty: the model has no token that starts a text", param="prompt")
            ids = [service.limits.document_start_id]
        prompts.append(ids)
    prompt_tokens = sum(map(len, prompts)) + len(prompts) * len(suffix_ids or ())
    return _canvases(service, body, prompts, suffix_ids, body.max_tokens, "prompt"), prompt_tokens


def _encode_text(service: Service, body: CompletionRequest, text: str, param: str, *, joins: bool = False) -> list[int]:
    try:
        return service.encoder.encode_text(text, joins=joins, max_tokens=service.limits.context_length)
    except TextTooLong as error:
        least = f"at least {error.least_tokens}"
        raise _context_exceeded(error.max_tokens, least, body.max_tokens, param) from error
    except UserError as error:
        raise invalid(str(error), param=param) from error


def _canvases(
    service: Service,
    body: SamplingRequest,
    prompts: list[list[int]],
    suffix_ids: list[int] | None,
    max_tokens: int | None,
    param: str,
) -> list[CanvasRequest]:
    """One canvas per prompt and answer; `param` is the field that the prompts came from."""
    settings = service.settings
    try:
        options = settings.options(body.decoding)
        settings.refuse_approximate(options)
    except UserError as error:
        raise _refused(body, error) from error
    seed = settings.seed if body.seed is None else body.seed
    if seed is None:
        seed = 0 if options.temperature == 0 else secrets.randbits(62)
    canvases = []
    context = service.limits.context_length
    for prompt_ids in prompts:
        given = len(prompt_ids) + len(suffix_ids or ())
        if given + (max_tokens or 1) > context:
            raise _context_exceeded(context, str(given), max_tokens, param)
        canvas = CanvasRequest(
            prompt_ids=tuple(prompt_ids),
            suffix_ids=None if suffix_ids is None else tuple(suffix_ids),
            max_tokens=max_tokens or min(settings.max_tokens, context - given),
            options=options,
            seed=seed,
            stop=service.limits.stop if body.stop is None else body.stop_strings,
        )
        try:
            service.limits.check(canvas)
        except UserError as error:
            raise _refused(body, error) from error
        canvases += [canvas.with_seed(seed + choice) for choice in range(body.n or 1)]
    return canvases


def _check_number(service: Service, body: SamplingRequest, num_prompts: int) -> None:
    """Refuse more answers than the queue ever holds, before there is a canvas for each."""
    answers, most = num_prompts * (body.n or 1), service.engine.max_queue
    if answers > most:
        raise invalid(
            f"one request may ask for at most {most} answers (MAX_QUEUE), got {num_prompts} prompts with "
            f"n={body.n or 1}: more than the queue of {most} holds",
            param="n" if num_prompts == 1 else "prompt",
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


def _refused(body: SamplingRequest, error: UserError) -> ApiError:
    """400 for a message that begins with the name of the setting at fault, or is about several."""
    name = str(error).partition(" ")[0]
    return invalid(str(error), param=name if name in type(body).model_fields else None)


async def _unless_client_leaves(request: Request, generation: Generation) -> list[Answer]:
    """All answers; when the client hangs up first, the generation is cancelled."""

    async def disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            continue

    answers = asyncio.ensure_future(generation.answers())
    left = asyncio.ensure_future(disconnect())
    try:
        await asyncio.wait([answers, left], return_when=asyncio.FIRST_COMPLETED)
        if answers.done():
            return answers.result()
        raise ApiError(CLIENT_CLOSED_REQUEST, "the client closed the connection")
    finally:
        generation.cancel()
        for task in (answers, left):
            task.cancel()
        await asyncio.gather(answers, left, return_exceptions=True)


def _check_model(settings: ServerSettings, name: str | None) -> None:
    if name is not None and not settings.is_served(name):
        raise ApiError(
            404,
            f"model {name!r} is not served here; the model is {settings.public_name!r}",
            param="model",
            code="model_not_found",
        )


def _describe_bodies(app: FastAPI) -> None:
    """Put the parts of the requests' schemas, which the routes read themselves, into the OpenAPI document."""
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        document = describe()
        for model in (ChatRequest, CompletionRequest):
            document["components"]["schemas"].update(body_parts(model))
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _add_error_handlers(app: FastAPI) -> None:
    """Give every error OpenAI's shape."""

    def respond(error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), status_code=error.status, headers=error.headers)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return respond(error)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        return respond(ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {})))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        return respond(ApiError(500, "internal error; see the server's log"))  # logged by the web server
