"""The HTTP application: a function of its settings, its engine and its tokenizer, so that tests can hand it fakes.

Not here: sockets, signals and loading a model (``__main__``).
"""

import asyncio
import hmac
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from .engine import Answer, Engine
from .errors import ApiError, from_validation, invalid
from .generation import Generation
from .metrics import Metrics
from .observe import ObserveMiddleware
from .protocol import ChatRequest, CompletionRequest, SamplingRequest
from .responses import ChatCompletion, Completion, Head, ModelCard, ModelList, Usage, chat_completion, completion
from .scheduler import CanvasRequest, SamplingOptions
from .settings import ServerSettings
from .streaming import EventStream, chat_events, completion_events

CLIENT_CLOSED_REQUEST = 499
"""Nobody reads this status; it marks in the log and metrics that the client left (nginx's convention)."""


class Encoder(Protocol):
    """What the app needs of a tokenizer; ``CoDALanguageModel.prompts.Codec`` is one."""

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Ids of a conversation, up to where the answer begins."""

    def encode_text(self, text: str) -> list[int]:
        """Ids of a text."""


class ModelLimits(Protocol):
    """What the app needs to know of a model; ``sampler.ModelSampler`` is one."""

    context_length: int
    document_start_id: int | None

    def check(self, request: CanvasRequest) -> None:
        """Raise ValueError for a canvas that cannot be denoised."""


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
    _add_error_handlers(app)
    app.include_router(_open_routes(service))
    app.include_router(_model_routes(service), dependencies=[Depends(_key_check(service.settings))])
    if service.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(service.settings.cors_origins), allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(ObserveMiddleware, metrics=service.metrics)
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
    started = int(time.time())

    @router.get("/metrics")
    async def metrics() -> Response:
        """Counts in Prometheus' text format."""
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/v1/models")
    async def models() -> ModelList:
        """The one model that is served."""
        context = service.limits.context_length
        return ModelList(data=[ModelCard(id=settings.public_name, created=started, max_model_len=context)])

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> ModelCard:
        """The model of that name."""
        _check_model(settings, name)
        return ModelCard(id=settings.public_name, created=started, max_model_len=service.limits.context_length)

    @router.post("/v1/chat/completions", response_model=ChatCompletion)
    async def chat(body: ChatRequest, request: Request) -> Any:
        """Answer a conversation."""
        _check_model(settings, body.model)
        canvases, prompt_tokens = await run_in_threadpool(_chat_canvases, service, body)
        generation = Generation(service.engine, canvases, settings.request_timeout_s)
        head = Head.new("chatcmpl", settings.public_name)
        if body.stream:
            usage = _usage_of(prompt_tokens) if body.include_usage else None
            return EventStream(generation, chat_events(generation, head, len(canvases), usage))
        answers = await _unless_client_leaves(request, generation)
        return chat_completion(head, answers, Usage.of(prompt_tokens, answers))

    @router.post("/v1/completions", response_model=Completion)
    async def complete(body: CompletionRequest, request: Request) -> Any:
        """Continue texts, or fill the gap between prompt and suffix."""
        _check_model(settings, body.model)
        canvases, prompt_tokens = await run_in_threadpool(_completion_canvases, service, body)
        generation = Generation(service.engine, canvases, settings.request_timeout_s)
        head = Head.new("cmpl", settings.public_name)
        if body.stream:
            usage = _usage_of(prompt_tokens) if body.include_usage else None
            return EventStream(generation, completion_events(generation, head, usage))
        answers = await _unless_client_leaves(request, generation)
        return completion(head, answers, Usage.of(prompt_tokens, answers))

    return router


def _chat_canvases(service: Service, body: ChatRequest) -> tuple[list[CanvasRequest], int]:
    """One canvas per answer, and the number of prompt tokens."""
    try:
        prompt_ids = service.encoder.encode_chat([message.as_text() for message in body.messages])
    except ValueError as error:
        raise invalid(str(error), param="messages") from error
    max_tokens = body.max_completion_tokens or body.max_tokens
    return _canvases(service, body, [prompt_ids], None, max_tokens), len(prompt_ids)


def _completion_canvases(service: Service, body: CompletionRequest) -> tuple[list[CanvasRequest], int]:
    """One canvas per prompt and answer, prompts first; and the number of prompt and suffix tokens."""
    suffix_ids = service.encoder.encode_text(body.suffix) if body.suffix else None
    prompts = []
    for prompt in body.prompts:
        ids = service.encoder.encode_text(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:  # as OpenAI does: the beginning of a new document
            if service.limits.document_start_id is None:
                raise invalid("prompt must not be empty: the model has no token that starts a text", param="prompt")
            ids = [service.limits.document_start_id]
        prompts.append(ids)
    prompt_tokens = sum(map(len, prompts)) + len(prompts) * len(suffix_ids or ())
    return _canvases(service, body, prompts, suffix_ids, body.max_tokens), prompt_tokens


def _canvases(
    service: Service,
    body: SamplingRequest,
    prompts: list[list[int]],
    suffix_ids: list[int] | None,
    max_tokens: int | None,
) -> list[CanvasRequest]:
    settings = service.settings
    options = SamplingOptions(
        steps=_or(body.steps, settings.steps),
        alg=_or(body.alg, settings.alg),
        alg_temp=_or(body.alg_temp, settings.alg_temp),
        temperature=_or(body.temperature, settings.temperature),
        top_p=_or(body.top_p, settings.top_p),
        top_k=settings.top_k if body.top_k is None else body.top_k if body.top_k > 0 else None,
        block_length=_or(body.block_length, settings.block_length),
    )
    seed = _or(body.seed, settings.seed)
    if seed is None:
        seed = 0 if options.temperature == 0 else secrets.randbits(62)
    canvases = []
    for prompt_ids in prompts:
        canvas = CanvasRequest(
            prompt_ids=tuple(prompt_ids),
            suffix_ids=None if suffix_ids is None else tuple(suffix_ids),
            max_tokens=_or(max_tokens, settings.max_tokens),
            options=options,
            seed=seed,
            stop=body.stop_strings,
        )
        try:
            service.limits.check(canvas)
        except ValueError as error:
            raise invalid(str(error)) from error
        canvases += [canvas.with_seed(seed + choice) for choice in range(body.n or 1)]
    return canvases


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _usage_of(prompt_tokens: int):
    return lambda answers: Usage.of(prompt_tokens, answers)


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


def _key_check(settings: ServerSettings):
    bearer = HTTPBearer(auto_error=False)

    async def check(credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
        if settings.api_key is None:
            return
        given = credentials.credentials if credentials else ""
        if not hmac.compare_digest(given.encode(), settings.api_key.get_secret_value().encode()):
            raise ApiError(
                401,
                "a valid key is needed: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    return check


def _add_error_handlers(app: FastAPI) -> None:
    """Give every error OpenAI's shape."""

    def respond(error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), status_code=error.status, headers=error.headers)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return respond(error)

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        return respond(from_validation(list(error.errors())))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        return respond(ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {})))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        return respond(ApiError(500, "internal error; see the server's log"))  # logged by the web server
