"""Errors of the API, in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

import json
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel

MESSAGES = "/v1/messages"
"""Path of Anthropic's endpoint."""


class Fault(BaseModel):
    """What was wrong with a request, or with the server."""

    message: str
    type: str
    param: str | None
    """Field at fault, if one is."""
    code: str | None


class ErrorBody(BaseModel):
    """Every answer that is no success."""

    error: Fault


class MessagesFault(BaseModel):
    """The same in Anthropic's words."""

    type: str
    message: str


class MessagesErrorBody(BaseModel):
    """Every answer below `/v1/messages` that is no success."""

    type: Literal["error"]
    error: MessagesFault


STATUSES = {
    400: "The request is at fault; `param` names the field",
    401: "The key is missing or wrong",
    404: "Another model than the one served",
    408: "The body was not there within CLIENT_TIMEOUT_S",
    413: "The body is larger than MAX_BODY_BYTES",
    415: "The body is no plain JSON",
    429: "MAX_QUEUE answers wait already, the caller's share of them included; Retry-After says when to try again",
    500: "The model failed; the log says why",
    503: "QUEUE_TIMEOUT_S is over and no answer was begun, or the server is loading or shutting down",
    504: "REQUEST_TIMEOUT_S is over",
}


def documented(
    model: type[BaseModel] = ErrorBody, statuses: Iterable[int] = STATUSES, *, streams: bool = True
) -> dict[int | str, dict[str, Any]]:
    """What the OpenAPI document says of a route beside its answer: its errors, and whether it may answer in events."""
    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": model, "description": STATUSES[status]} for status in statuses
    }
    return errors | ({200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}} if streams else {})


class ApiError(Exception):
    """A request that cannot be answered, with the HTTP status and body its client gets.

    Args:
        status: HTTP status code.
        message: what was wrong, what is allowed, what was got.
        param: name of the field at fault, if one is.
        code: short machine-readable name.
        headers: extra response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The JSON body. Words of the client are cut, and escaped where they are no Unicode text (lone surrogates)."""
        message, param = (
            None if text is None else _cut(text, 1000).encode("utf-8", "backslashreplace").decode()
            for text in (self.message, self.param)
        )
        return {"error": {"message": message, "type": _type(self.status), "param": param, "code": self.code}}


def body_at(path: str, error: ApiError) -> dict[str, Any]:
    """The JSON body of an error in the shape that clients of a path read: Anthropic's below `/v1/messages`."""
    body = error.body()
    if path == MESSAGES or path.startswith(MESSAGES + "/"):
        return {"type": "error", "error": {"type": _anthropic_type(error.status), "message": body["error"]["message"]}}
    return body


def client_left() -> ApiError:
    """For requests whose client is gone."""
    return ApiError(CLIENT_LEFT, "the client closed the connection")


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The client's mistake, 400."""
    return ApiError(400, message, param=param, code=code)


SHUTTING_DOWN = ApiError(
    503, "the server is shutting down", code="server_shutting_down", headers={"Retry-After": "5", "Connection": "close"}
)
"""For requests that the end of the server cuts off, or that come after it has begun."""

LOADING = ApiError(
    503, "the model is being loaded", code="model_loading", headers={"Retry-After": "5", "Connection": "close"}
)
"""For requests that come too early."""

CLIENT_LEFT = 499
"""Nobody reads this status; it marks in the log and metrics that the client left (nginx's convention)."""

FIELDS_OF_BODIES: set[str] = set()
"""Names that may stand in the path to a fault: those of all fields, which `protocol.StrictModel` puts here. Pydantic
puts the branch of a union there too, which is no field."""

SEVERAL_KINDS = {
    "stop": "a string or a list of strings, none of them empty",
    "content": "a string or a list of text parts",
    "lengths": "a list of integers of at least 1, or 'auto'",
    "tool_choice": "none, auto, required, or a function's name as {type: function, function: {name}}",
    "prompt": "a string, a list of strings, a list of token ids, or a list of lists of token ids",
    "system": "a string or a list of text blocks",
}
"""Fields that take values of more than one kind, and which."""


def from_validation(errors: list[dict[str, Any]]) -> ApiError:
    """The fault of a request body that tells most, as 400.

    A value of several possible kinds has a fault for each of them. The one that lies deepest in the value is about the
    kind that was meant, and a wrong type alone says least.

    Args:
        errors: `ValidationError.errors()`.
    """
    paths = [[part for part in fault["loc"] if isinstance(part, int) or part in FIELDS_OF_BODIES] for fault in errors]

    def tells(index: int) -> tuple[bool, int, bool]:
        is_about_type = errors[index]["type"].endswith("_type")
        return paths[index][:1] == paths[0][:1], len(paths[index]), not is_about_type

    best = max(range(len(errors)), key=tells)
    fault, path = errors[best], paths[best]
    if fault["type"] == "extra_forbidden":
        name = fault["loc"][-1]  # one that is a field elsewhere stands in the path already
        path = [*path[: len(path) - (name in FIELDS_OF_BODIES)], name]
        return invalid(f"unknown field {'.'.join(map(str, path))!r}", ".".join(map(str, path)), "unknown_field")
    param = ".".join(map(str, path)) or None
    if fault["type"].endswith("_type") or fault["type"] == "literal_error":
        named = next((part for part in reversed(path) if isinstance(part, str)), None)
        if named in SEVERAL_KINDS and len(errors) > 1:
            return invalid(f"{param}: must be {SEVERAL_KINDS[named]}, got {_shorten(fault.get('input'))}", param=param)
    message = "must be an object" if fault["type"] == "model_type" else fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return invalid(message, param=param)
    got = _shorten(fault.get("input"))
    return invalid(f"{param or 'the body'}: {message}, got {got}", param=param)


def _shorten(value: Any, limit: int = 100) -> str:
    return _cut(json.dumps(value, default=str), limit)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[:limit] + "..."


def _type(status: int) -> str:
    names = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    names |= {408: "timeout_error", 504: "timeout_error"}
    return names.get(status, "invalid_request_error" if status < 500 else "server_error")


def _anthropic_type(status: int) -> str:
    names = {401: "authentication_error", 404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error"}
    names |= {408: "timeout_error", 503: "overloaded_error", 504: "timeout_error"}
    return names.get(status, "invalid_request_error" if status < 500 else "api_error")
