"""Errors of the API, in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""

import json
from typing import Any


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
        """The JSON body."""
        return {"error": {"message": self.message, "type": _type(self.status), "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The client's mistake, 400."""
    return ApiError(400, message, param=param, code=code)


def from_validation(errors: list[dict[str, Any]]) -> ApiError:
    """The first of pydantic's ``errors`` about a request body, as 400.

    Args:
        errors: ``ValidationError.errors()`` or ``RequestValidationError.errors()``.
    """
    fault = errors[0]
    param = ".".join(str(part) for part in fault["loc"] if part != "body") or None
    if fault["type"] == "json_invalid":
        return invalid(f"the body is not JSON: {fault.get('ctx', {}).get('error', fault['msg'])}", code="invalid_json")
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return invalid(message, param=param)
    got = _shorten(fault.get("input"))
    return invalid(f"{param}: {message}, got {got}" if param else f"{message}, got {got}", param=param)


def _shorten(value: Any, limit: int = 100) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= limit else text[:limit] + "..."


def _type(status: int) -> str:
    names = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 504: "timeout_error"}
    return names.get(status, "invalid_request_error" if status < 500 else "server_error")
