"""Requests of the API: OpenAI's schema, of which every field is honoured, refused by name, or ignored by name.

Not here: what comes back (`responses`).
"""

import logging
import reprlib
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WrapValidator, create_model, model_validator

from CoDALanguageModel.decoding_settings import LARGEST_INTEGER, NUM_BEST, Setting
from CoDALanguageModel.errors import UserError, did_you_mean, half_surrogate

from .errors import FIELDS_OF_BODIES, invalid
from .results import Part, in_order_of_calls
from .settings import DECODING, MAX_SEED, typed

logger = logging.getLogger(__name__)

MAX_CHOICES = 128

MAX_NESTING = 100
"""Objects and lists in each other in the parameters of a tool."""

NO_ECHO_OF_GAPS = "echo repeats a prompt that goes on, not text around a gap"


def check_unicode(text: str) -> str:
    """The text itself.

    Raises:
        UserError: half of a character stands in it.
    """
    if (half := half_surrogate(text)) is not None:
        raise UserError(f"the text is not valid Unicode: lone surrogate at character {half}")
    return text


Text = Annotated[str, AfterValidator(check_unicode)]
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
NonEmptyText = Annotated[str, Field(min_length=1), AfterValidator(check_unicode)]


# A list stops at its first fault: a long one would make an error for every element.
TokenIds = Annotated[list[int], Field(fail_fast=True)]


class StrictModel(BaseModel):
    """Nothing is coerced: 5.0 and "5" are no integers."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        """Let faults be told by the names of the fields."""
        FIELDS_OF_BODIES.update(cls.model_fields)

    @model_validator(mode="before")
    @classmethod
    def _sort_out_fields(cls, data: Any) -> Any:
        """Leave one unknown field at most: each would become an error of its own."""
        if not isinstance(data, dict):
            return data
        unknown = next((name for name in data if name not in cls.model_fields), None)
        return {name: value for name, value in data.items() if name in cls.model_fields or name == unknown}


class StreamOptions(StrictModel):
    """`stream_options`."""

    include_usage: bool = False
    """Send a last event with the usage."""
    include_canvas: bool = False
    """Show each answer's whole canvas while it is denoised. Extension."""
    include_obfuscation: bool = False
    """Accepted; events are never padded."""


NONE = "none"
"""Value of a field that turns a setting off, since null means the server's default."""

BOUNDS = {"temperature": {"le": 2}, "top_k": {"ge": -1}}
"""OpenAI's range, and other servers' way to say all."""


def _field(setting: Setting) -> Any:
    """The type of a setting in a request."""

    def or_none(value: Any, check: Any) -> Any:
        return value if setting.optional and value == NONE else check(value)

    def describe(schema: dict[str, Any]) -> None:
        schema["anyOf"] += [{"const": NONE}] if setting.optional else []
        schema["x-regime"] = setting.regime

    about = Field(description=setting.says, json_schema_extra=describe)
    return Annotated[typed(setting, **BOUNDS.get(setting.api, {})) | None, WrapValidator(or_none), about]


DecodingFields = create_model(
    "DecodingFields",
    __base__=StrictModel,
    **{setting.api: (_field(setting), None) for setting in DECODING},  # type: ignore[call-overload]
)
"""A field for each of `DECODING`; null means the server's default."""


REASONS = {
    "best_of": "the log-probabilities of two answers depend on the orders of their commits, and do not compare; ask "
    "for n answers and choose",
    "min_tokens": "an end token may come anywhere in a canvas, so that no least length can be promised",
}
"""Why fields are not supported, where that is not plain."""


class SamplingRequest(DecodingFields):
    """Fields that conversations and plain texts share. Null means the server's default."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Fields that are not supported, with the values that ask for nothing and are therefore accepted."""
    closed: ClassVar[frozenset[str]] = frozenset()
    """Fields of other endpoints that this one has not."""
    ignored: ClassVar[frozenset[str]] = frozenset(
        {
            "metadata",
            "prompt_cache_key",
            "prompt_cache_options",
            "prompt_cache_retention",
            "safety_identifier",
            "service_tier",
            "store",
            "user",
        }
    )
    """Fields that cannot change an answer here; they are accepted, and named in the log."""

    model: str | None = Field(None, max_length=4096)
    """Served name of the model."""
    stop: NonEmptyText | Annotated[list[NonEmptyText], Field(fail_fast=True)] | None = None
    """The answer ends before the first of these strings that is complete; 16 at most."""
    seed: int | None = Field(None, ge=0, le=MAX_SEED - MAX_CHOICES)
    """Choice c uses seed + c."""
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    """Answers per prompt."""
    stream: bool | None = None
    """Send committed text as it becomes final."""
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _sort_out_fields(cls, data: Any) -> Any:
        """Refuse what is unknown or unsupported, drop what cannot matter."""
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if name in cls.model_fields and name not in cls.closed:
                kept[name] = value
            elif name in cls.ignored:
                logger.info("ignored request field: %s", name)
            elif name in cls.neutral:
                if value is not None and value not in cls.neutral[name]:
                    reason = f": {REASONS[name]}" if name in REASONS else ""
                    message = f"{name} is not supported by this server{reason}"
                    raise invalid(message, param=name, code="unsupported_field")
            else:
                raise _unknown(name, [*(cls.model_fields.keys() - cls.closed), *cls.ignored, *cls.neutral])
        return kept

    @model_validator(mode="after")
    def _check_together(self) -> "SamplingRequest":
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options needs stream=true", param="stream_options")
        if isinstance(self.stop, list) and len(self.stop) > 16:
            raise invalid(f"stop takes at most 16 strings, got {len(self.stop)}", param="stop")
        return self

    @property
    def decoding(self) -> dict[str, Any]:
        """The settings of `DECODING` that the request gives, by their names here."""
        values = ((setting, getattr(self, setting.api)) for setting in DECODING)
        given = {setting.api: setting.read(value) for setting, value in values if value is not None}
        if given.get("top_k") in (-1, 0):
            given["top_k"] = None
        return given

    @property
    def num_best(self) -> int | None:
        """Most probable tokens to tell of; None tells no log-probabilities."""
        return None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def include_canvas(self) -> bool:
        """Whether a stream shows the canvas."""
        return self.stream_options is not None and self.stream_options.include_canvas


class Shape(NamedTuple):
    """What an answer must match."""

    param: str
    """The field that says so."""
    settings: dict[str, Any]
    """`regex` or `json_schema`."""
    beginning: str = ""
    """Text with which the answer begins, and which is not in what must match."""


class ResponseFormat(StrictModel):
    """`response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None
    """`name`, `schema`, and without effect `description` and `strict`: an answer is always by the schema."""

    @model_validator(mode="after")
    def _check_schema(self) -> "ResponseFormat":
        given = self.json_schema
        if (given is None) == (self.type == "json_schema"):
            raise invalid(
                "response_format needs json_schema with type json_schema, and only then", param="response_format"
            )
        for name, value in (given or {}).items():
            kinds = {
                "name": (str, "a string"), "schema": (dict, "an object"), "description": (str | None, "a string"),
                "strict": (bool | None, "true or false"),
            }  # fmt: skip
            param = f"response_format.json_schema.{name}"
            if name not in kinds:
                raise invalid(f"unknown field {param!r}", param, "unknown_field")
            kind, words = kinds[name]
            if not isinstance(value, kind):
                raise invalid(f"{param} must be {words}, got {reprlib.repr(value)}", param)
        if given is not None and not given.get("name"):
            raise invalid("response_format.json_schema needs a name", param="response_format")
        return self


class ShapedRequest(SamplingRequest):
    """Fields that say what answers must match."""

    response_format: ResponseFormat | None = None
    """`json_object`: any object, nested as `CoDALanguageModel.json_schema` says; `json_schema`: by a schema."""
    guided_regex: NonEmptyText | None = None
    """A regular expression that the whole answer matches. Extension."""

    @property
    def shape(self) -> Shape | None:
        """What these fields say.

        Raises:
            ApiError: both say something, or `stop` could cut the answer.
        """
        form = self.response_format
        shape = None if self.guided_regex is None else Shape("guided_regex", {"regex": self.guided_regex})
        if form is not None and form.type != "text":
            if shape is not None:
                raise invalid(
                    "guided_regex and response_format exclude each other: give one of them", param="guided_regex"
                )
            schema = {"type": "object"} if form.json_schema is None else form.json_schema.get("schema", {})
            shape = Shape("response_format", {"json_schema": schema})
        return shape


class TextPart(StrictModel):
    """The one kind of content part that there is."""

    type: Literal["text"]
    text: Text


class EarlierFunction(StrictModel):
    """What was called."""

    name: FunctionName
    arguments: Text
    """JSON."""


class EarlierCall(StrictModel):
    """A call of an earlier turn."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: EarlierFunction

    def as_text(self) -> str:
        """As Qwen's template writes it."""
        return f'<tool_call>\n{{"name": "{self.function.name}", "arguments": {self.function.arguments}}}\n</tool_call>'


class Function(StrictModel):
    """A function that the model may call."""

    name: FunctionName
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of an object."""
    strict: bool | None = None
    """Without effect: a call that is asked for is by the schema, and any other is not held to it."""

    @model_validator(mode="after")
    def _check_depth(self) -> "Function":
        """What follows, from the template of a conversation to the schema of a call, goes down by recursion."""
        level: list[Any] = [self.parameters]
        for _ in range(MAX_NESTING):
            level = [
                part
                for whole in level
                for part in (whole.values() if isinstance(whole, dict) else whole if isinstance(whole, list) else ())
            ]
            if not level:
                return self
        raise invalid(
            f"tools: the parameters of {self.name} are nested deeper than {MAX_NESTING} objects and lists",
            param="tools",
        )


class Tool(StrictModel):
    """One of `tools`."""

    type: Literal["function"]
    function: Function


class Tooling(NamedTuple):
    """What a conversation says of tools."""

    tools: Sequence[Tool] = ()
    choice: Literal["none", "auto", "required"] = "auto"
    name: str | None = None
    """The one that is required; None for any of them."""
    is_parallel: bool = True
    """Whether an answer may have more calls than one."""

    @property
    def callable(self) -> list[Tool]:
        """Those that the model is told of."""
        return [] if self.choice == "none" else list(self.tools)


class NamedFunction(StrictModel):
    """The function that must be called."""

    name: FunctionName


class NamedTool(StrictModel):
    """`tool_choice` that names one."""

    type: Literal["function"]
    function: NamedFunction


class Message(StrictModel):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    """`developer` is another word for `system`; `tool` gives what a function gave back."""
    content: Text | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    tool_calls: Annotated[list[EarlierCall], Field(fail_fast=True)] | None = None
    """Of the assistant."""
    tool_call_id: str | None = None
    """Of a tool: a call of the turn before. The model sees the results in the order of the calls."""

    @model_validator(mode="after")
    def _check_role(self) -> "Message":
        if self.content is None and not self.tool_calls:
            raise invalid("messages: content is missing", param="messages.content")
        for name, role in (("tool_calls", "assistant"), ("tool_call_id", "tool")):
            if getattr(self, name) and self.role != role:
                raise invalid(f"messages: {name} says nothing in the role {self.role!r}", param=f"messages.{name}")
        return self

    @model_validator(mode="before")
    @classmethod
    def _sort_out_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, value in data.items():
            if name == "name":
                logger.info("ignored message field: name")
            elif name not in cls.model_fields and value is not None and value != []:
                raise invalid(
                    f"messages: field {name} is not supported (supported: role, content, tool_calls, tool_call_id)",
                    param=f"messages.{name}",
                    code="unsupported_field",
                )
        return {name: value for name, value in data.items() if name in cls.model_fields}

    def as_part(self) -> Part:
        """Role and text, parts joined by line ends, as the chat template wants it."""
        content = self.content or ""
        text = content if isinstance(content, str) else "\n".join(part.text for part in content)
        text = "\n".join([*([text] if text else []), *(call.as_text() for call in self.tool_calls or ())])
        role = "system" if self.role == "developer" else self.role
        return Part(role, text, tuple(call.id for call in self.tool_calls or ()), self.tool_call_id or None)


class ChatRequest(ShapedRequest):
    """Body of `/v1/chat/completions`."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "audio": (),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "moderation": (),
        "prediction": (),
        "reasoning_effort": (),
        "verbosity": (),
        "web_search_options": (),
    }

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=LARGEST_INTEGER)
    """Newer name of `max_tokens`."""
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=128)] | None = None
    """Functions that the model may call."""
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    """`required`: the answer is a call of one of them; `auto`, the default: it may hold calls."""
    parallel_tool_calls: bool | None = None
    """False keeps the first call of an answer that holds several."""
    logprobs: bool | None = None
    """Tell of each token its log-probability when it was committed."""
    top_logprobs: int | None = Field(None, ge=0, le=NUM_BEST)
    """Most probable tokens to tell of beside each."""

    @property
    def num_best(self) -> int | None:
        """Most probable tokens to tell of; None tells no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def conversation(self) -> list[dict[str, str]]:
        """Roles and texts, as the chat template wants them."""
        parts = in_order_of_calls([message.as_part() for message in self.messages], "tool_call_id")
        return [{"role": part.role, "content": part.text} for part in parts]

    @property
    def tooling(self) -> Tooling:
        """What is said of tools."""
        choice, tools, is_parallel = self.tool_choice or "auto", self.tools or (), self.parallel_tool_calls is not False
        if isinstance(choice, str):
            return Tooling(tools, choice, None, is_parallel)
        return Tooling(tools, "required", choice.function.name, is_parallel)

    @model_validator(mode="after")
    def _top_of_logprobs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise invalid(f"top_logprobs={self.top_logprobs} needs logprobs=true", param="top_logprobs")
        if self.logprobs and self.tools and self.tool_choice != "none":
            raise invalid("logprobs are told of text and not of calls: say tool_choice none", param="logprobs")
        return self

    @model_validator(mode="after")
    def _one_length(self) -> "ChatRequest":
        check_one_length(self.max_tokens, self.max_completion_tokens)
        return self


Lengths = Annotated[list[Annotated[int, Field(ge=1)]], Field(fail_fast=True, min_length=1)]


class Infill(StrictModel):
    """`infill`: gaps to fill, several at once, of known or unknown length."""

    pieces: Annotated[list[Text], Field(fail_fast=True, min_length=2)] | None = None
    """The text around the gaps, in order. Null: prompt and suffix."""
    lengths: Lengths | Literal["auto"] = "auto"
    """Masks of each gap; `auto` tries several and keeps the best answer."""


class CompletionRequest(ShapedRequest):
    """Body of `/v1/completions`; with `suffix` or `infill`, gaps in a text are filled."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "best_of": (1,),
    }

    prompt: (
        Text
        | Annotated[list[Text], Field(fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(fail_fast=True)]
        | None
    ) = None
    """A text, several, or the same as token ids. Only `infill.pieces` takes its place."""
    suffix: Text | None = None
    """Text behind the gap. Null or empty: the text simply goes on."""
    infill: Infill | None = None
    """Gaps in a text. Extension."""
    max_tokens: int | None = Field(None, ge=0, le=LARGEST_INTEGER)
    """Masks of an answer, or of all gaps of unknown length together; 0 only echoes."""
    logprobs: int | None = Field(None, ge=0, le=NUM_BEST)
    """Tell of each token its log-probability when it was committed, and of so many of the most probable ones."""
    echo: bool | None = None
    """Repeat the prompt before the answer. With `logprobs` it is scored too: each token after all before it."""

    @property
    def num_best(self) -> int | None:
        """Most probable tokens to tell of; None tells no log-probabilities."""
        return self.logprobs

    @model_validator(mode="after")
    def _check_echo(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise invalid("max_tokens must be at least 1, or 0 with echo=true, got 0", param="max_tokens")
        if self.echo and (self.suffix or self.infill is not None):
            raise invalid(NO_ECHO_OF_GAPS, param="echo")
        if self.logprobs is not None and self.infill is not None and len(self.infill.pieces or "..") > 2:
            raise invalid("logprobs are told of one gap, not of several", param="logprobs")
        return self

    @model_validator(mode="after")
    def _some_prompt(self) -> "CompletionRequest":
        if self.infill is not None:
            self._check_infill(self.infill)
        if self.prompt is None and (self.infill is None or self.infill.pieces is None):
            raise invalid("prompt: Field required", param="prompt")
        if self.prompt == []:
            raise invalid("prompt must hold at least one text, got []", param="prompt")
        return self

    def _check_infill(self, infill: Infill) -> None:
        if infill.pieces is None and self.suffix is None:
            raise invalid("infill needs pieces, or prompt and suffix around the gap", param="infill.pieces")
        if infill.pieces is not None and (self.prompt is not None or self.suffix is not None):
            raise invalid("infill.pieces are the whole text: give them, or prompt and suffix", param="infill.pieces")
        if infill.lengths == "auto":
            return
        num_gaps = len(infill.pieces or "..") - 1
        if len(infill.lengths) != num_gaps:
            raise invalid(
                f"infill.lengths must hold one length per gap ({num_gaps}), got {len(infill.lengths)}",
                param="infill.lengths",
            )
        if self.max_tokens not in (None, sum(infill.lengths)):
            raise invalid(
                f"max_tokens={self.max_tokens} bounds gaps of unknown length; infill.lengths are known, and make "
                f"{sum(infill.lengths)}: give one of them",
                param="max_tokens",
            )

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """All prompts."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]


def check_one_length(max_tokens: int | None, max_completion_tokens: int | None) -> None:
    """Refuse two lengths that differ."""
    if None not in (max_tokens, max_completion_tokens) and max_tokens != max_completion_tokens:
        raise invalid(
            f"max_tokens={max_tokens} and max_completion_tokens={max_completion_tokens} are the same setting: give one "
            "of them",
            param="max_completion_tokens",
        )


def _unknown(name: str, known: list[str]) -> Exception:
    return invalid(f"unknown field {name!r}{did_you_mean(name, known)}", param=name, code="unknown_field")
