"""The server's configuration: one environment variable per field, checked before anything is loaded.

Not here: what a request may ask for (`protocol`).
"""

import io
import ipaddress
import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from dotenv.parser import parse_stream
from pydantic import BeforeValidator, Field, SecretStr, ValidationError, create_model, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from CoDALanguageModel.decoding_settings import LARGEST_INTEGER, DecodingSettings, Setting, offered
from CoDALanguageModel.errors import UserError, did_you_mean
from CoDALanguageModel.run_files import is_hub_id

from .keys import Keys, read_keys

MAX_SEED = 2**63 - 1
"""Largest seed a request or `SEED` may name."""


DECODING = tuple(setting for setting in offered("server") if setting.name != "seed")
"""Settings of a request and of the environment; the seed of a server is another matter, see `SEED`."""


def typed(setting: Setting, **bounds: Any) -> Any:
    """The pydantic type of a setting's values, with its bounds, or narrower ones."""
    kinds = {list: Annotated[list[int], Field(fail_fast=True)]}
    kind = Literal[setting.choices] if setting.choices else kinds.get(setting.kind, setting.kind)
    bounds = {"ge": setting.least, "gt": setting.above, "le": setting.most, "lt": setting.below} | bounds
    if setting.kind is int:
        bounds["le"] = bounds["le"] or LARGEST_INTEGER
    if setting.api == "max_tokens":
        bounds["ge"] = 1
    known: dict[str, Any] = {name: value for name, value in bounds.items() if value is not None}
    known |= {"allow_inf_nan": False} if setting.kind is float else {}
    return Annotated[kind, Field(**known)]


def _variable(setting: Setting) -> Any:
    """The type of a setting in the environment: also `none`, and JSON for what is no number or word."""

    def read(value: Any) -> Any:
        value = setting.read(value)
        if setting.kind not in (list, dict) or not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError("must be JSON") from error

    kind = typed(setting) | None if setting.optional else typed(setting)
    return Annotated[kind, NoDecode, BeforeValidator(read), Field(description=setting.says)]


DecodingDefaults = create_model(
    "DecodingDefaults",
    __base__=BaseSettings,
    **{setting.api: (_variable(setting), setting.served_default) for setting in DECODING},  # type: ignore[call-overload]
)
"""A field for each of `DECODING`."""


class ServerSettings(DecodingDefaults):
    """Everything that the operator decides. Each field is the environment variable of the same name in capitals.

    An empty variable counts as unset. Those of `DECODING` are defaults that a request may override; where the
    environment sets none, the `generation_config.json` of the model's folder does (`with_defaults`).
    """

    model_config = SettingsConfigDict(env_ignore_empty=True, frozen=True, extra="forbid", protected_namespaces=())

    model_name: str
    """Folder that `save_hf_model.py` or the post-training wrote, or a Hub id. There is no default."""

    served_model_name: str | None = None
    """Name that clients use as `model`; the last part of `MODEL_NAME` when unset."""

    host: str = "127.0.0.1"
    """Address to bind. Any other than loopback needs `API_KEY` or `API_KEYS_FILE`."""

    port: int = Field(8000, ge=1, le=65535)
    """TCP port to bind."""

    api_key: SecretStr | None = None
    """Bearer token that `/v1`, `/infill` and `/metrics` require; none where this and `API_KEYS_FILE` are unset."""

    api_keys_file: Path | None = None
    """File of more such keys, one a line, as `KEY` or `NAME:KEY`; read again when it changes."""

    cors_origins: Annotated[tuple[str, ...], NoDecode] = ()
    """Browser origins that may call the server, separated by commas; none when unset."""

    device: str = Field("auto", pattern=r"^(auto|cpu|mps|(cuda|xpu)(:\d+)?)$")
    """`auto` (the accelerator that torch finds, else cpu), `cpu`, `mps`, `cuda` or `xpu`, or `cuda:N`, `xpu:N`."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights; `auto` is float32 on the CPU and bfloat16 elsewhere."""

    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    """Seed of requests that name none. Unset: 0 at temperature 0, else a fresh one per request."""

    allow_approximate: bool = True
    """Whether requests may ask for regimes whose tokens are not those of the stepwise sampler.

    They may by default: a client gets them by name alone, they cost less than what it would get without, and no other
    request's answer depends on them.
    """

    max_queue: int = Field(64, ge=1)
    """Answers that may wait for the model; beyond that, and beyond the caller's share, a request gets 429."""

    max_batch_size: int = Field(16, ge=1)
    """Answers denoised together at most."""

    max_batch_tokens: int = Field(32768, ge=1)
    """Rows being denoised times the longest of them at most, which bounds memory; one row alone is always allowed."""

    batch_wait_ms: float = Field(10.0, ge=0, allow_inf_nan=False)
    """Accepted for older files, and without effect: requests join the rows being denoised at any step."""

    max_body_bytes: int = Field(2 << 20, ge=1024)
    """Largest body of a request; beyond that it gets 413. A body is read into memory and parsed at once."""

    client_timeout_s: float = Field(60.0, gt=0, allow_inf_nan=False)
    """Seconds in which a client must have sent a request, or else gets 408, and read what it has been sent.

    One that does not read is cut off; of what waits for it 64 KiB and the text of its answers are held until then.
    """

    heartbeat_s: float = Field(15.0, gt=0, allow_inf_nan=False)
    """Seconds of silence after which a stream sends a comment, so that no proxy takes it for dead."""

    request_timeout_s: float = Field(600.0, gt=0, allow_inf_nan=False)
    """Seconds from a request's arrival, queue included, after which it is cancelled with 504."""

    queue_timeout_s: float = Field(600.0, gt=0, allow_inf_nan=False)
    """Seconds from a request's arrival after which it is cancelled with 503 if none of its answers has begun."""

    step_timeout_s: float = Field(600.0, gt=0, allow_inf_nan=False)
    """Seconds that one step of all rows may take before their requests get 500 and others go on without them."""

    drain_timeout_s: int = Field(30, ge=0)
    """Seconds that accepted requests get to finish after SIGTERM or SIGINT."""

    log_level: Literal["debug", "info", "warning", "error", "critical"] = "info"
    """Least severity that is logged. Prompts and answers are never logged."""

    @field_validator("model_name")
    @classmethod
    def _folder_or_hub_id(cls, value: str) -> str:
        path = Path(value).expanduser()
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise UserError("the folder holds no config.json; save_hf_model.py makes one that loads")
            return str(path)
        if not is_hub_id(value):
            raise UserError("there is no such folder")
        return value

    @field_validator("api_keys_file")
    @classmethod
    def _holds_keys(cls, value: Path | None) -> Path | None:
        if value is not None:
            read_keys(value)
        return value

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _split_origins(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("log_level", "device", mode="before")
    @classmethod
    def _lower(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value

    @model_validator(mode="after")
    def _wide_bind_needs_key(self) -> "ServerSettings":
        if self.api_key is None and self.api_keys_file is None and not is_loopback(self.host):
            raise UserError(
                f"HOST={self.host} opens the server to other machines, which needs API_KEY or API_KEYS_FILE; "
                "set one, or HOST=127.0.0.1"
            )
        return self

    def keys(self) -> Keys:
        """The keys that callers may show.

        Raises:
            UserError: the file of keys cannot be used.
        """
        return Keys(self.api_key and self.api_key.get_secret_value(), self.api_keys_file)

    @property
    def decoding(self) -> dict[str, Any]:
        """The decoding defaults by the names of a request."""
        return {setting.api: getattr(self, setting.api) for setting in DECODING}

    def options(self, given: dict[str, Any] | None = None) -> DecodingSettings:
        """How an answer is denoised; its length and seed stand apart.

        Args:
            given: what a request says, by its names.

        Raises:
            UserError: a value or a combination is not allowed.
        """
        values = self.decoding | (given or {})
        return DecodingSettings(
            **{setting.name: values[setting.api] for setting in DECODING if setting.api != "max_tokens"}
        )

    def refuse_approximate(self, options: DecodingSettings) -> None:
        """Hold requests to `ALLOW_APPROXIMATE`.

        Raises:
            UserError: the options make answers approximate, and the operator forbids it.
        """
        if not self.allow_approximate and options.approximate:
            name = options.approximate[0]
            raise UserError(
                f"{name} makes answers approximate, which this server does not allow (ALLOW_APPROXIMATE=false); got "
                f"{getattr(options, name)!r}"
            )

    @property
    def public_name(self) -> str:
        """The model's name in the API."""
        return self.served_model_name or Path(self.model_name).resolve().name

    def with_defaults(self, defaults: dict[str, object]) -> "ServerSettings":
        """The same settings, where those that the operator left open have the model's `defaults`."""
        return self.model_copy(update={k: v for k, v in defaults.items() if k not in self.model_fields_set})

    def is_served(self, name: str) -> bool:
        """Whether clients may ask for `name`: the public name, or `MODEL_NAME` itself where no other is set."""
        return name == self.public_name or (self.served_model_name is None and name == self.model_name)


def is_loopback(host: str) -> bool:
    """True when only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def load_settings(env_file: str | None = None) -> ServerSettings:
    """Settings from the environment and, below it, from `env_file`.

    Args:
        env_file: a file of `NAME=value` lines; a variable of the process wins over it.

    Raises:
        UserError: the file is missing, is not UTF-8, holds something else than such lines or names an unknown variable,
            or a value is not allowed. The message has one line per fault with the variable, what is allowed, and what
            was got.
    """
    if env_file is not None:
        _check_env_file(env_file)
    try:
        return ServerSettings(_env_file=env_file, _env_file_encoding="utf-8-sig")
    except ValidationError as error:
        raise UserError("\n".join(_describe(fault) for fault in error.errors())) from error


def _check_env_file(env_file: str) -> None:
    if not os.path.isfile(env_file):
        raise UserError(f"ENV_FILE={env_file} is not a file")
    try:
        text = Path(env_file).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"ENV_FILE={env_file} is not UTF-8: {error.reason} at byte {error.start}") from error
    known = [name.upper() for name in ServerSettings.model_fields]
    for line in parse_stream(io.StringIO(text)):
        if line.error or (line.key is not None and line.value is None):  # which pydantic would pass over
            text = line.original.string
            number = line.original.line + text[: len(text) - len(text.lstrip())].count("\n")
            given = text.strip().partition("=")[0]  # what stands behind it may be a key
            raise UserError(f"{env_file}: line {number} must be NAME=value, with quotes closed, got {given:.80}")
        name = line.key
        if name is not None and name.upper() not in known:
            hint = did_you_mean(name.upper(), known, str)
            raise UserError(f"{env_file}: unknown variable {name}{hint} (known: {', '.join(known)})")


def _describe(fault: dict) -> str:
    name = ".".join(str(part) for part in fault["loc"]).upper()
    if fault["type"] == "missing":
        return (
            f"{name} is not set; it is a folder that save_hf_model.py wrote, "
            "or a Hub id such as Salesforce/CoDA-v0-Instruct"
        )
    if not name:  # a rule over several fields, whose message names them
        return fault["msg"].removeprefix("Value error, ")
    return f"{name}: {fault['msg'].removeprefix('Value error, ')}, got {fault['input']!r}"
