"""Bytes from the network to parsed models: limits first, then JSON, then the schema. Every refusal is a 400 by name."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, TypeVar, get_origin
from urllib.parse import parse_qsl

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json
from starlette.requests import Request

from rundatsheesh.manager.api.problems import RequestTimeout
from rundatsheesh.manager.api.schemas.base import NO_NUL, ONE_LINE, NoQuery
from rundatsheesh.manager.api.schemas.run import ENV_KEY, ENV_PAIR, FLAG
from rundatsheesh.manager.api.schemas.vms import LABEL_KEY
from rundatsheesh.manager.errors import InvalidInput, TooLarge

M = TypeVar("M", bound=BaseModel)

MAX_JSON_BYTES = 8 << 20
BODY_TIMEOUT_S = 60.0  # for the whole of a JSON body
STALL_TIMEOUT_S = 300.0  # between two pieces of an upload or a download
MAX_ITEMS = 1024  # of any list or object in a body: bounds the number of errors that one body can cause
MAX_ERRORS_SHOWN = 20
MAX_QUERY_FIELDS = 64

_PATTERNS = {
    NO_NUL: "must not contain a NUL character",
    ONE_LINE: "must not contain control characters",
    LABEL_KEY: "must not contain '=' or control characters",
    FLAG: "must be a flag: -x, --name or --name=value",
    ENV_PAIR: "must be KEY=value, KEY of letters, digits and _, without NUL",
    ENV_KEY: "must consist of letters, digits and _, and not begin with a digit",
}


async def read_json(request: Request, model: type[M]) -> M:
    """The body as `model`, whatever its content type says; there is no query. Raises InvalidInput, TooLarge,
    RequestTimeout."""
    read_no_query(request)
    data = await _read_body(request)
    if not data.strip():
        raise InvalidInput("the body is empty; it must be a JSON object", code="malformed_json")
    return _validate(_load_object(data), model)


async def read_nothing(request: Request) -> None:
    """For calls without fields: no query, and an empty body or `{}`; anything else is refused by name."""
    read_no_query(request)
    data = await _read_body(request)
    if data.strip():
        _validate(_load_object(data), _NoFields)


def read_no_query(request: Request) -> None:
    """For calls without query parameters: any is refused by name."""
    read_query(request, NoQuery)


def read_query(request: Request, model: type[M]) -> M:
    """The query string as `model`. A parameter may be repeated only where the model has a list."""
    values: dict[str, Any] = {}
    lists = {field.alias or name for name, field in model.model_fields.items() if get_origin(field.annotation) is list}
    for name, value in _query_pairs(request.scope["query_string"]):
        if name in lists:
            values.setdefault(name, []).append(value)
        elif name in values:
            raise InvalidInput(f"query parameter {name[:64]!r} is given twice")
        else:
            values[name] = value
    try:
        return model.model_validate(values, strict=False)
    except ValidationError as error:
        raise _invalid(error, "query parameter") from None


async def stream_body(request: Request, limit: int, too_large: str) -> AsyncIterator[bytes]:
    """The body in pieces as they arrive. Raises TooLarge with the message `too_large` beyond `limit` bytes."""
    check_declared_length(request, limit, too_large)
    received = 0
    pieces = request.stream()
    while (piece := await _next_piece(pieces)) is not None:
        received += len(piece)
        if received > limit:
            raise TooLarge(too_large, details={"limit": limit})
        if piece:
            yield piece


def check_declared_length(request: Request, limit: int, too_large: str) -> None:
    """Refuse by Content-Length before a byte of the body is asked for."""
    declared = request.headers.get("content-length", "0")
    if declared.isascii() and declared.isdigit() and int(declared[:20]) > limit:
        raise TooLarge(too_large, details={"limit": limit})


async def _next_piece(pieces: AsyncIterator[bytes]) -> bytes | None:
    try:
        async with asyncio.timeout(STALL_TIMEOUT_S):
            return await anext(pieces, None)
    except TimeoutError:
        raise RequestTimeout(f"no data arrived for {STALL_TIMEOUT_S:.0f} s") from None


async def _read_body(request: Request) -> bytes:
    message = f"the body is larger than {MAX_JSON_BYTES} bytes"
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return b"".join([piece async for piece in stream_body(request, MAX_JSON_BYTES, message)])
    except TimeoutError:
        raise RequestTimeout(f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s") from None


def _load_object(data: bytes) -> dict[str, Any]:
    try:
        # Depth, invalid UTF-8, NaN and endless numbers are refused by the parser.
        value = from_json(data, allow_inf_nan=False, cache_strings="none")
    except ValueError as error:
        raise InvalidInput(f"the body is not JSON: {error}", code="malformed_json") from None
    if not isinstance(value, dict):
        raise InvalidInput("the body must be a JSON object", code="malformed_json")
    for name, item in (("the body", value), *value.items()):
        if isinstance(item, (list, dict)) and len(item) > MAX_ITEMS:
            raise InvalidInput(f"{name[:64]} has more than {MAX_ITEMS} entries")
    return value


def _validate(value: dict[str, Any], model: type[M]) -> M:
    try:
        return model.model_validate(value, strict=True)
    except ValidationError as error:
        raise _invalid(error, "field") from None


def _query_pairs(raw: bytes) -> list[tuple[str, str]]:
    try:
        return parse_qsl(raw.decode("utf-8"), keep_blank_values=True, errors="strict", max_num_fields=MAX_QUERY_FIELDS)
    except ValueError:  # UnicodeDecodeError is one
        raise InvalidInput("the query string is not valid UTF-8, or has too many parameters") from None


def _invalid(error: ValidationError, noun: str) -> InvalidInput:
    """Names what is wrong where; never repeats a value, which may be a secret."""
    found = error.errors(include_url=False, include_input=False)
    shown = [{"field": _place(item), "problem": _sentence(item)} for item in found[:MAX_ERRORS_SHOWN]]
    first = shown[0]
    message = first["problem"] if not first["field"] else f"{first['field']}: {first['problem']}"
    if found[0]["type"] == "extra_forbidden":
        message = f"unknown {noun} {first['field']!r}"
    return InvalidInput(message, details={"errors": shown})


def _place(item: ErrorDetails) -> str:
    place = ""
    for part in item["loc"]:
        place += f"[{part}]" if isinstance(part, int) else f".{part[:64]}" if place else part[:64]
    return place


def _sentence(item: ErrorDetails) -> str:
    if item["type"] == "extra_forbidden":
        return "unknown"
    if item["type"] == "missing":
        return "is required"
    if item["type"] == "string_pattern_mismatch":
        return _PATTERNS.get(item["ctx"]["pattern"], item["msg"])
    return item["msg"].removeprefix("Value error, ")


class _NoFields(BaseModel):
    model_config = {"extra": "forbid"}
