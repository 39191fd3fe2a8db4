"""The HTTP application: a function of its settings, its engine and its tokenizer, so that tests can hand it fakes.

Not here: sockets, signals and loading a model (`__main__`).
"""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from . import editors, messages, page
from .bodies import body_parts, body_schema, read_body
from .canvases import chat_canvases, completion_canvases
from .echo import Echo
from .errors import ApiError, body_at, documented
from .gate import Gate
from .logprobs import Spelling
from .observe import ObserveMiddleware
from .protocol import ChatRequest, CompletionRequest, SamplingRequest
from .replies import check_model, respond
from .responses import CHAT, INFILL, TEXT, ChatCompletion, Completion, Form, ModelCard, ModelList, with_logprobs
from .service import Service
from .tools import completed, form_of


def build_app(service: Service) -> FastAPI:
    """An app around one engine, which starts and stops with the app."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        await run_in_threadpool(service.engine.stop, service.settings.drain_timeout_s)

    about = {"title": "CoDA", "description": "Masked-diffusion code language model"}
    app = FastAPI(**about, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.engine = service.engine
    _add_error_handlers(app)
    _describe_bodies(app)
    routers = (
        page.routes(),
        _open_routes(service),
        _model_routes(service),
        editors.routes(service),
        messages.routes(service),
    )
    for router in routers:
        app.include_router(router)
    keys = service.settings.keys()
    service.metrics.watch_keys(keys)
    app.add_middleware(Gate, settings=service.settings, keys=keys)
    if service.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(service.settings.cors_origins), allow_methods=["*"], allow_headers=["*"]
        )
    routes = [route for router in routers for route in router.routes]
    app.add_middleware(ObserveMiddleware, metrics=service.metrics, routes=routes)
    return app


def _open_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/health", responses={503: {"description": "No: the model's thread is gone"}})
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

    @router.get("/ready", responses={503: {"description": "No: it is loading, draining or stopped"}})
    async def ready() -> Response:
        """Whether to send requests here: 200, or 503 while loading, and while answers are finished before the end."""
        engine = service.engine
        status = "stopped" if not engine.is_alive else "draining" if engine.is_draining else "ready"
        return JSONResponse({"status": status}, status_code=200 if status == "ready" else 503)

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

    unauthorized = documented(statuses=[401], streams=False)

    @router.get("/metrics", response_class=PlainTextResponse, responses=unauthorized)
    async def metrics() -> Response:
        """Counts in Prometheus' text format."""
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/v1/models", responses=unauthorized)
    async def models() -> ModelList:
        """The one model that is served."""
        return ModelList(data=[card])

    @router.get("/v1/models/{name:path}", responses=documented(statuses=[401, 404], streams=False))
    async def model(name: str) -> ModelCard:
        """The model of that name."""
        check_model(settings, name)
        return card

    @router.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses=documented(),
        openapi_extra=body_schema(ChatRequest),
    )
    async def chat(request: Request) -> Any:
        """Answer a conversation."""
        body = await read_body(request, ChatRequest)
        return await respond(service, request, body, chat_canvases, _told(service, body, form_of(body, CHAT)))

    @router.post(
        "/v1/completions",
        response_model=Completion,
        responses=documented(),
        openapi_extra=body_schema(CompletionRequest),
    )
    async def complete(request: Request) -> Any:
        """Continue texts, or fill gaps: between prompt and suffix, or between the pieces of `infill`."""
        body = await read_body(request, CompletionRequest)
        form = TEXT if body.infill is None else INFILL
        form = _told(service, body, form if body.shape is None else completed(form))
        if body.echo:
            echo = Echo(form, service.engine.decode)
            return await respond(service, request, body, echo.canvases, echo, events=echo.events)
        return await respond(service, request, body, completion_canvases, form)

    return router


def _told(service: Service, body: SamplingRequest, form: Form) -> Form:
    """The form of an answer, with log-probabilities where they are asked for."""
    return form if body.num_best is None else with_logprobs(form, Spelling(service.engine.decode, body.num_best))


def _describe_bodies(app: FastAPI) -> None:
    """Put the parts of the requests' schemas, which the routes read themselves, into the OpenAPI document."""
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        document = describe()
        for model in (ChatRequest, CompletionRequest, *editors.BODIES, *messages.BODIES):
            document["components"]["schemas"].update(body_parts(model))
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)  # FastAPI's own, which the routes do not use
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _add_error_handlers(app: FastAPI) -> None:
    """Give every error the shape of its path: OpenAI's, or another that clients look for there."""

    def answer(request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(body_at(request.url.path, error), status_code=error.status, headers=error.headers)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return answer(request, error)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        return answer(request, ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {})))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        return answer(request, ApiError(500, "internal error; see the server's log"))  # logged by the web server
