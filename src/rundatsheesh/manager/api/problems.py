"""Errors on the wire: which class is which status, and the one shape of an error body."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from starlette.responses import Response

from rundatsheesh.manager import errors

STATUS: Mapping[type[errors.RdsError], int] = {
    errors.TooLarge: 413,
    errors.InvalidInput: 400,
    errors.NotFound: 404,
    errors.Conflict: 409,
    errors.Forbidden: 403,
    errors.LimitReached: 429,
    errors.Unavailable: 503,
    errors.GuestDied: 502,
    errors.GuestUnresponsive: 504,
    errors.GuestMisbehaved: 502,
    errors.GuestError: 502,
    errors.HostError: 500,
    errors.RdsError: 500,
}
DEFAULT_RETRY_AFTER_S = 1
OUR_FAULT = "the server failed; its log has the details under this request id"


class Unauthenticated(errors.RdsError):
    """No credentials, or wrong ones. Only the edge knows credentials, so this is no error of the manager's tree."""

    code = "unauthenticated"


class UnsupportedMediaType(errors.InvalidInput):
    code = "unsupported_media_type"


class RequestTimeout(errors.InvalidInput):
    """The client stopped sending."""

    code = "request_timeout"


class MethodNotAllowed(errors.RdsError):
    code = "method_not_allowed"

    def __init__(self, method: str, allowed: frozenset[str]) -> None:
        super().__init__(f"{method} is not allowed here", details={"allowed": sorted(allowed)})
        self.allowed = allowed


_EDGE_STATUS: Mapping[type[errors.RdsError], int] = {
    Unauthenticated: 401,
    UnsupportedMediaType: 415,
    RequestTimeout: 408,
    MethodNotAllowed: 405,
}
_ALL_STATUS = {**STATUS, **_EDGE_STATUS}


def status_of(error: errors.RdsError) -> int:
    """By the nearest class that has one."""
    return next(_ALL_STATUS[cls] for cls in type(error).__mro__ if cls in _ALL_STATUS)


def problem(error: errors.RdsError, request_id: str) -> Response:
    """The response for an error. What a 500 knows about our side stays out of it."""
    status = status_of(error)
    body: dict[str, object] = {"message": error.message, "code": error.code, "requestId": request_id}
    if status == 500:
        body["message"] = OUR_FAULT
    else:
        if error.hint:
            body["hint"] = error.hint
        if error.details:
            body["details"] = error.details
    if error.retryable:
        body["retryable"] = True
    return Response(json.dumps(body), status, _headers(error, status), media_type="application/json")


def unexpected(request_id: str) -> Response:
    """The response for an exception that nobody foresaw."""
    return problem(errors.HostError("unexpected"), request_id)


def _headers(error: errors.RdsError, status: int) -> dict[str, str]:
    headers = {}
    if status in (429, 503):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after or DEFAULT_RETRY_AFTER_S)))
    if status == 401:
        headers["WWW-Authenticate"] = 'ApiKey realm="rds"'
    if isinstance(error, MethodNotAllowed):
        headers["Allow"] = ", ".join(sorted(error.allowed))
    return headers
