"""What both clients share about HTTP: addresses, deadlines, and answers that are errors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import httpx

from rundatsheesh.client.errors import BY_STATUS, ApiError, ConnectionFailed, RequestTimedOut, ServerError

DEFAULT_URL = "http://localhost:3000"
CONNECT_TIMEOUT = 10.0  # seconds
CALL_TIMEOUT = 330.0  # seconds for calls without a timeoutMs: creates may queue
DEFAULT_COMMAND_MS = 120_000  # the server's default timeoutMs
GRACE = 60.0  # seconds that a call may take beyond its timeoutMs: the server answers first

GZIP = {"content-type": "application/gzip"}


def vm_path(vm_id: str, *rest: str) -> str:
    """The id is quoted, so that no id can name another route."""
    return "/".join(["/v1/vms", quote(vm_id, safe=""), *rest])


def deadline(timeout_ms: int | None) -> httpx.Timeout:
    """Of a call that runs something for at most `timeout_ms`."""
    return httpx.Timeout((timeout_ms or DEFAULT_COMMAND_MS) / 1000 + GRACE, connect=CONNECT_TIMEOUT)


def options(base_url: str, api_key: str | None = None) -> dict[str, Any]:
    """Arguments of httpx.Client and httpx.AsyncClient."""
    key = {} if api_key is None else {"x-api-key": api_key}
    return {
        "base_url": base_url.rstrip("/"),
        "headers": {"accept": "application/json", **key},
        "timeout": httpx.Timeout(CALL_TIMEOUT, connect=CONNECT_TIMEOUT),
    }


def error_of(response: httpx.Response) -> ApiError:
    """The exception of a read response that is not a success."""
    try:
        body = response.json()
    except ValueError:
        body = {"message": f"HTTP {response.status_code}: {response.text[:200]}"}
    fallback = ServerError if response.status_code >= 500 else ApiError
    kind = BY_STATUS.get(response.status_code, fallback)
    return kind(response.status_code, body if isinstance(body, dict) else {}, _seconds(response))


def _seconds(response: httpx.Response) -> float | None:
    try:
        seconds = float(response.headers.get("retry-after", ""))
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) else None


@contextmanager
def translated() -> Iterator[None]:
    """Inside, httpx's own errors become ours."""
    try:
        yield
    except httpx.TimeoutException as error:
        raise RequestTimedOut(f"no answer in time: {error}") from error
    except httpx.TransportError as error:
        raise ConnectionFailed(str(error) or type(error).__name__) from error
