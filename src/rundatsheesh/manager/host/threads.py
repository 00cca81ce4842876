"""Blocking calls beside the event loop."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger(__name__)


async def in_thread(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a blocking call to its end, even when we are cancelled: a thread cannot be, and what is done next, a release
    above all, must not overtake it. For calls that change something and end soon; others use `asyncio.to_thread`."""
    return await _finish(asyncio.to_thread(call, *args, **kwargs), None)


async def opened_in_thread(call: Callable[P, int], *args: P.args, **kwargs: P.kwargs) -> int:
    """`in_thread` for a call that returns a file descriptor, which is closed where we are cancelled."""
    return await _finish(asyncio.to_thread(call, *args, **kwargs), os.close)


async def _finish(call: Coroutine[None, None, T], undo: Callable[[T], None] | None) -> T:
    work = asyncio.ensure_future(call)
    cancelled: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.wait({work})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is None:
        return work.result()
    if (failure := work.exception()) is not None:
        log.debug("cancelled while failing: %s", failure)
    elif undo is not None:
        undo(work.result())
    raise cancelled
