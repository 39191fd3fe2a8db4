"""The server on Ray Serve: replicas of the same application, each with a model of its own, behind Ray's proxy.

    pip install -c constraints-newest.txt -e ".[ray]"
    MODEL_NAME=runs/quickstart/model serve run --app-dir serving ray_app:build replicas=2 gpus=1

Settings are the environment variables of the server, read where this is started and handed to the replicas; a folder or
file that one names must be on each machine that a replica runs on. Where Ray's proxy listens is said to Ray, not by
HOST and PORT; on any other address than loopback set API_KEY or API_KEYS_FILE. Each replica counts for itself: /metrics
is that of the one that happens to be asked, and Ray has metrics of its own.
"""

import logging
import os

from fastapi import FastAPI
from pydantic import BaseModel, Field
from ray import serve

from coda_serving.__main__ import load_app
from coda_serving.settings import load_settings


class Arguments(BaseModel, extra="forbid"):
    """What `serve run` is told."""

    replicas: int = Field(1, ge=1)
    gpus: float = Field(1, ge=0)
    """Of each replica; 0 runs it on the CPU."""


def build(arguments: Arguments) -> serve.Application:
    """The application for `serve run` and `serve build`."""
    settings = load_settings(os.environ.get("ENV_FILE") or None)

    def app() -> FastAPI:
        logging.getLogger("coda_serving").setLevel(settings.log_level.upper())
        return load_app(settings)

    # Local, so that it is sent to the replicas, where this file is not to be found.
    @serve.ingress(app)
    class Replica:
        def check_health(self) -> None:
            """Raise where no request can be answered any more; Ray then starts another replica."""
            if not self.app.state.engine.is_alive:
                raise RuntimeError("the model's thread is gone; the log says why")

    deployment = serve.deployment(
        Replica,
        name="coda",
        num_replicas=arguments.replicas,
        ray_actor_options={"num_gpus": arguments.gpus},
        # The replica's own queue decides who waits and who gets 429; the rest is for questions that wait for no model.
        max_ongoing_requests=settings.max_queue + settings.max_batch_size + 16,
        graceful_shutdown_timeout_s=settings.drain_timeout_s,
    )
    return deployment.bind()
