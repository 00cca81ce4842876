"""What the end of a call means: the guest's answer, or the error of ours that the guest's error is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rundatsheesh.manager.errors import GuestError, GuestUnresponsive, InvalidInput, NotFound, RdsError, TooLarge
from rundatsheesh.manager.guest_channel import CallError, GuestCall
from rundatsheesh.manager.guest_output import MAX_TEXT, clean_text

SIMPLE_TIMEOUT = 20.0  # seconds for calls that run nothing of the user's

# Codes of the agent that reach the caller: class and the code of the wire.
_CODES: Mapping[str, type[RdsError]] = {
    "path_not_found": NotFound,
    "path_outside_workspace": InvalidInput,
    "path_conflict": InvalidInput,
    "path_too_long": InvalidInput,
    "path_unreadable": InvalidInput,
    "path_unwritable": InvalidInput,
    "invalid_input": InvalidInput,
    "workspace_full": TooLarge,
    "guest_overloaded": GuestUnresponsive,
    "interpreter_missing": GuestError,
}


async def answer_of(call: GuestCall, timeout: float) -> dict[str, Any]:  # noqa: ASYNC109
    """The call's answer, or the error of ours that the guest's error is."""
    try:
        return await call.result(timeout)
    except CallError as refused:
        error = _translate(refused.answer)
        raise (error if error is not None else call.condemned("an error without a code or a message")) from None


def _translate(answer: dict[str, Any]) -> RdsError | None:
    """None for an error that is none."""
    code, message, details = answer.get("code"), answer.get("message"), answer.get("details")
    if not isinstance(code, str) or not isinstance(message, str) or not isinstance(details, dict):
        return None
    kind = _CODES.get(code)
    text = clean_text(message[:MAX_TEXT])
    if kind is None:
        return GuestError(text)
    return kind(text, code=code, details={clean_text(k)[:100]: v for k, v in details.items() if _is_scalar(v)})


def _is_scalar(value: Any) -> bool:
    return isinstance(value, bool | int) or (isinstance(value, str) and clean_text(value) == value)
