"""What can go wrong for a caller, one tree.

ClientError
├── ConnectionFailed      the server could not be reached, or the connection broke
├── RequestTimedOut       this client gave up waiting; the server may still be working
├── ArchiveError          a directory could not be packed, or a download is not safe to unpack
└── ApiError              the server said no: `status`, `code`, `message`, `hint`, `details`, `request_id`
    ├── BadRequest        400, 413: change the input
    ├── Unauthorized      401
    ├── Forbidden         403
    ├── NotFound          404
    ├── Conflict          409: the VM's state forbids it
    ├── LimitReached      429: a quota or rate; `retry_after` seconds
    ├── GuestDied         502: the VM ended during the call; `details` has the reason and the output so far
    ├── Unavailable       503: not ready or out of capacity; `retry_after` seconds
    ├── GuestUnresponsive 504: the VM's agent did not answer
    └── ServerError       any other 5xx
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ClientError(Exception):
    """Base of all."""


class ConnectionFailed(ClientError):
    pass


class RequestTimedOut(ClientError):
    pass


class ArchiveError(ClientError):
    pass


class ApiError(ClientError):
    def __init__(self, status: int, body: Mapping[str, Any], retry_after: float | None) -> None:
        self.status = status
        self.message = str(body.get("message") or f"HTTP {status}")
        self.code = str(body.get("code") or "unknown")
        self.hint: str | None = body.get("hint")
        self.retryable = bool(body.get("retryable", False))
        self.details: Mapping[str, Any] = body.get("details") or {}
        self.request_id: str | None = body.get("requestId")
        self.retry_after = retry_after
        super().__init__(f"{self.message} ({self.code})")


class BadRequest(ApiError):
    pass


class Unauthorized(ApiError):
    pass


class Forbidden(ApiError):
    pass


class NotFound(ApiError):
    pass


class Conflict(ApiError):
    pass


class LimitReached(ApiError):
    pass


class GuestDied(ApiError):
    pass


class Unavailable(ApiError):
    pass


class GuestUnresponsive(ApiError):
    pass


class ServerError(ApiError):
    pass


BY_STATUS: Mapping[int, type[ApiError]] = {
    400: BadRequest,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    413: BadRequest,
    429: LimitReached,
    502: GuestDied,
    503: Unavailable,
    504: GuestUnresponsive,
}
