"""`python -m coda_serving`: settings from the environment, a bound port, the model, then the server."""

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import uvicorn
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from CoDALanguageModel.errors import UserError, run_program

from .connections import Connection
from .errors import LOADING
from .gate import refuse
from .settings import ServerSettings, load_settings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from .engine import Engine
    from .sampler import ModelSampler

logger = logging.getLogger("coda_serving")

SPINS = "2000"
"""Rounds, of 25 to 45 ns each, for which a thread of OpenMP that has nothing to do waits before it sleeps: about what
Python takes from one operation to the next. By default it is 10 ms, which each operation may lose where another program
has the core of one of its threads."""


def bind(host: str, port: int) -> socket.socket:
    """A bound socket, so that a taken port is known before a model is loaded.

    Raises:
        UserError: the address cannot be bound.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise UserError(f"HOST={host} PORT={port} cannot be bound: {error.strerror or error}") from error
    return listener


@contextlib.contextmanager
def answering(listener: socket.socket) -> Iterator[None]:
    """Answer whoever asks in the meantime that the model is being loaded."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in ("/health", "/ready"):
            await JSONResponse({"status": "loading"}, LOADING.status, LOADING.headers)(scope, receive, send)
        else:
            await refuse(send, scope["path"], LOADING, receive)

    config = uvicorn.Config(app, lifespan="off", ws="none", log_config=None, log_level="warning")
    server = uvicorn.Server(config)
    # Both listen to the same port: who is not accepted when this server ends waits for the next one.
    listener.listen()
    thread = threading.Thread(target=server.run, args=([listener.dup()],), name="coda-loading", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()


class Server(uvicorn.Server):
    """A web server that still answers while it finishes what it has accepted, so that `/ready` and refusals are read.

    Queued answers are finished too: they were accepted, and elsewhere they would begin anew, behind others.
    """

    def __init__(self, config: uvicorn.Config, engine: "Engine", drain_timeout_s: float) -> None:
        super().__init__(config)
        self._engine = engine
        self._drain_timeout_s = drain_timeout_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let the engine finish, then close; all within the drain timeout."""
        self._engine.is_draining = True
        ends_s = time.monotonic() + self._drain_timeout_s
        while (self._engine.num_waiting or self._engine.num_running) and not self.force_exit:
            if time.monotonic() >= ends_s:
                break
            await asyncio.sleep(0.05)
        self.config.timeout_graceful_shutdown = max(0.0, ends_s - time.monotonic())
        await super().shutdown(sockets)


def check_defaults(settings: ServerSettings, sampler: "ModelSampler") -> ServerSettings:
    """The settings with the model's own decoding defaults, once a request that names nothing can be answered.

    Raises:
        UserError: it could not: `MAX_TOKENS` does not fit in the context, or `STEPS` in the blocks.
    """
    from .scheduler import CanvasRequest

    most = sampler.context_length - 1
    if "max_tokens" in settings.model_fields_set and settings.max_tokens > most:
        raise UserError(
            f"MAX_TOKENS must be at most {most}: the model's context has {sampler.context_length} tokens and a prompt "
            f"takes at least one; got {settings.max_tokens}"
        )
    settings = settings.with_defaults(sampler.defaults)
    settings = settings.model_copy(update={"max_tokens": min(settings.max_tokens, most)})
    start = sampler.document_start_id
    try:
        options = settings.options()
        settings.refuse_approximate(options)
        prompt = (0 if start is None else start,)
        sampler.check(CanvasRequest(prompt_ids=prompt, max_tokens=settings.max_tokens, options=options, seed=0))
    except UserError as error:
        values = ", ".join(f"{name.upper()}={value}" for name, value in settings.decoding.items())
        raise UserError(f"no request that names nothing could be answered: {error} ({values})") from error
    return settings


def load_app(settings: ServerSettings) -> "FastAPI":
    """The application around the model, which it loads.

    Raises:
        UserError: the model cannot be loaded, or not be asked with the settings.
    """
    # Imported here because they bring torch: a wrong setting should be told at once.
    from CoDALanguageModel.prompts import Codec

    from .app import Service, build_app
    from .engine import Engine
    from .metrics import Metrics
    from .sampler import ModelSampler
    from .scheduler import Scheduler

    try:
        codec = Codec.load(settings.model_name)
    except UserError as error:
        raise UserError(f"MODEL_NAME={error}") from error
    # Each thread that computes keeps threads of OpenMP of its own. As soon as there are more of them than cores, all of
    # them sleep between any two operations, and waking them takes longer than a small operation. What the loader keeps
    # ends with it, so that the engine's are alone.
    with ThreadPoolExecutor(1) as loader:
        load = loader.submit(ModelSampler.load, settings.model_name, device=settings.device, dtype=settings.dtype)
    sampler = load.result()
    settings = check_defaults(settings, sampler)
    logger.info("decoding defaults: %s", settings.decoding)
    metrics = Metrics()
    scheduler = Scheduler(
        max_queue=settings.max_queue,
        max_batch_size=settings.max_batch_size,
        max_batch_tokens=settings.max_batch_tokens,
    )
    engine = Engine(
        sampler,
        codec.decode,
        scheduler,
        step_timeout_s=settings.step_timeout_s,
        metrics=metrics,
    )
    return build_app(Service(settings=settings, engine=engine, encoder=codec, limits=sampler, metrics=metrics))


def serve(settings: ServerSettings) -> None:
    """Load the model and serve it until SIGTERM or SIGINT.

    Raises:
        UserError: the port is taken, or the model cannot be loaded.
    """
    if os.getpid() == 1:  # in a container, where a signal without a handler is ignored: also while the model is loaded
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    listener = bind(settings.host, settings.port)
    with answering(listener):
        app = load_app(settings)
    config = uvicorn.Config(
        app,
        http=partial(Connection, limit_s=settings.client_timeout_s),  # type: ignore[arg-type]
        log_config=None,
        log_level=settings.log_level,
        access_log=False,  # `observe` writes one that names callers and holds no query
    )
    # What the libraries and the model hold stays: walking it again whenever a large request makes many objects would
    # stop every thread each time.
    gc.collect()
    gc.freeze()
    logger.info("%s on http://%s:%d/v1", settings.public_name, settings.host, settings.port)
    before = signal.getsignal(signal.SIGTERM)
    if before is signal.SIG_DFL:
        # uvicorn raises it again when all is answered: libraries then remove what they have in TMPDIR, as torch does.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        Server(config, app.state.engine, settings.drain_timeout_s).run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> int:
    """Entry point; returns the exit status."""
    variables = ", ".join(name.upper() for name in ServerSettings.model_fields)
    parser = argparse.ArgumentParser(
        prog="python -m coda_serving",
        description="Serve a CoDA model over an OpenAI-compatible API.",
        epilog=f"Configuration is by environment variables ({variables}), or by a file that ENV_FILE names.",
    )
    parser.parse_args()
    if "OMP_WAIT_POLICY" not in os.environ:  # read when torch is imported
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    try:
        settings = load_settings(os.environ.get("ENV_FILE") or None)
        logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        logger.info("settings: %s", settings)
        if "batch_wait_ms" in settings.model_fields_set:
            logger.warning("BATCH_WAIT_MS has no effect any more: requests join the rows being denoised at any step")
        serve(settings)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_program(main)
