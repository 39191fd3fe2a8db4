"""What the routes work with."""

from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from CoDALanguageModel.decoding_settings import DecodingSettings

from .engine import Engine
from .metrics import Metrics
from .scheduler import CanvasRequest
from .settings import ServerSettings
from .turns import Turns


class Encoder(Protocol):
    """What the app needs of a tokenizer; `CoDALanguageModel.prompts.Codec` is one."""

    lexicon: Any
    """The bytes of the tokens."""

    def encode_chat(
        self,
        messages: list[dict[str, str]],
        *,
        continue_final_message: bool = False,
        tools: Sequence[dict[str, Any]] | None = None,
        max_tokens: int | None,
    ) -> list[int]:
        """Ids of a conversation, up to where the answer begins. UserError when it surely has more than max_tokens."""

    def encode_answer(self, text: str) -> list[int]:
        """Ids of an answer, in which the template's tags are tags."""

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

    def constraint(self, options: DecodingSettings, lexicon: Any) -> Any:
        """What `regex` or `json_schema` of the options demand, given the tokenizer's bytes; it may take seconds.

        Raises:
            UserError: it cannot be used.
        """

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
    shaper: Executor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="coda-shapes"))
    """Where requests are prepared whose answers must match something: one at a time, so that others go on."""
    turns: Turns = field(default_factory=Turns)
    """Who may use it."""
