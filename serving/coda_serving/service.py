"""What the routes work with."""

from dataclasses import dataclass
from typing import Protocol

from .engine import Engine
from .metrics import Metrics
from .scheduler import CanvasRequest
from .settings import ServerSettings


class Encoder(Protocol):
    """What the app needs of a tokenizer; `CoDALanguageModel.prompts.Codec` is one."""

    def encode_chat(
        self, messages: list[dict[str, str]], *, continue_final_message: bool = False, max_tokens: int | None
    ) -> list[int]:
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
