"""One error tree for the whole manager. It knows nothing of HTTP; `api/problems.py` maps classes to status codes.

RdsError
├── InvalidInput          the caller's input is wrong and says what to change
│   └── TooLarge          the input is well formed but over a limit
├── NotFound              no such thing
├── Conflict              the thing exists, but its state forbids the operation
├── Forbidden             the caller is known and may not do this
├── LimitReached          a quota or rate of the caller; `retry_after` says when to try again
├── Unavailable           this host cannot do it now (capacity, not ready); worth retrying
│   └── StorageFull       the host's disk is full
├── GuestError            something went wrong inside one VM, and only there
│   ├── GuestDied         the VM ended during the call; `details["reason"]` says how
│   ├── GuestUnresponsive the agent did not answer in time
│   └── GuestMisbehaved   the guest broke the protocol
└── HostError             our side failed; the evidence goes to the log, not to the caller
    ├── EngineError       a hypervisor or sandbox could not be started or controlled
    └── NetworkError      a link, address or firewall rule could not be put in force
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class RdsError(Exception):
    """Base of all. `code` is the wire's stable snake_case word; `message` says what happened, `hint` what to do."""

    code = "internal_error"
    retryable = False

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        hint: str | None = None,
        details: Mapping[str, Any] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code
        self.hint = hint
        self.details = dict(details) if details else {}
        self.retry_after = retry_after  # seconds


class InvalidInput(RdsError):
    code = "invalid_input"


class TooLarge(InvalidInput):
    code = "too_large"


class NotFound(RdsError):
    code = "not_found"


class Conflict(RdsError):
    code = "wrong_state"


class Forbidden(RdsError):
    code = "forbidden"


class LimitReached(RdsError):
    code = "quota_exceeded"
    retryable = True


class Unavailable(RdsError):
    code = "unavailable"
    retryable = True


class StorageFull(Unavailable):
    code = "storage_full"


class GuestError(RdsError):
    code = "guest_error"


class GuestDied(GuestError):
    code = "guest_died"


class GuestUnresponsive(GuestError):
    code = "guest_unresponsive"
    retryable = True


class GuestMisbehaved(GuestError):
    code = "guest_misbehaved"


class HostError(RdsError):
    code = "internal_error"


class EngineError(HostError):
    code = "engine_error"


class NetworkError(HostError):
    code = "network_error"
