"""From the bytes of a body to a checked request, in a thread: nothing that grows with a request runs on the event loop.

Not here: the size of a body (`gate`), or what its fields mean (`protocol`).
"""

import json
from typing import Any, NoReturn, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from .errors import ApiError, client_left, from_validation, invalid

Model = TypeVar("Model", bound=BaseModel)

REFERENCE = "#/components/schemas/{model}"


async def read_body(request: Request, model: type[Model]) -> Model:
    """The request's body as `model`.

    Raises:
        ApiError: 415 for another type or encoding than plain UTF-8 JSON, 400 for what is not JSON or does not fit, 499
            where the client leaves before its end.
    """
    _check_headers(request)
    try:
        body = await request.body()
    except ClientDisconnect:
        raise client_left() from None
    return await run_in_threadpool(_parse, body, model)


def body_schema(model: type[BaseModel]) -> dict[str, Any]:
    """What the OpenAPI document says of a body that the route reads itself; its parts are `body_parts`."""
    schema = model.model_json_schema(ref_template=REFERENCE)
    schema.pop("$defs", None)
    for name in getattr(model, "closed", ()):
        del schema["properties"][name]
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def body_parts(model: type[BaseModel]) -> dict[str, Any]:
    """Schemas that `body_schema` refers to, by their names."""
    return model.model_json_schema(ref_template=REFERENCE).get("$defs", {})


def _check_headers(request: Request) -> None:
    given = request.headers.get("content-type")
    kind, _, parameters = (given or "").partition(";")
    kind = kind.strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        got = "none" if given is None else repr(given)
        raise ApiError(
            415, f"the Content-Type must be application/json, got {got}", param="Content-Type", code="unsupported_type"
        )
    charset = parameters.lower().partition("charset=")[2].split(";")[0].strip(" \"'")
    if charset not in ("", "utf-8", "utf8"):
        raise ApiError(
            415, f"the charset must be utf-8, got {charset!r}", param="Content-Type", code="unsupported_type"
        )
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise ApiError(
            415,
            f"the body must not be compressed: Content-Encoding must be identity, got {encoding!r}",
            param="Content-Encoding",
            code="unsupported_encoding",
        )


def _parse(body: bytes, model: type[Model]) -> Model:
    try:
        return _checked(body, model)
    except RecursionError as error:  # of the parser, of the checks, or of the words about a fault
        raise invalid("the body is nested too deeply", code="invalid_json") from error


def _checked(body: bytes, model: type[Model]) -> Model:
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise invalid(f"the body is not UTF-8: {error.reason} at byte {error.start}", code="invalid_json") from error
    try:
        data = json.loads(text, parse_constant=_no_constant)
    except ValueError as error:  # also an integer of thousands of digits
        raise invalid(f"the body is not JSON: {error}", code="invalid_json") from error
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise from_validation(error.errors(include_url=False)) from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
