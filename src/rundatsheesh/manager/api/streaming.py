"""Calls and transfers that end when their client goes away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any, Protocol, TypeVar, cast

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from rundatsheesh.manager.api.requests import STALL_TIMEOUT_S
from rundatsheesh.manager.errors import RdsError

T = TypeVar("T")

log = logging.getLogger(__name__)


class ClientGone(ClientDisconnect):
    """The client closed its connection before the answer; there is nobody to answer to."""


async def until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Run `work`; when the client disconnects first, cancel it, wait for its end and raise ClientGone.

    The body must have been read: what the client sends next can then only be its farewell.
    """
    call = asyncio.ensure_future(work)
    farewell = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait((call, farewell), return_when=asyncio.FIRST_COMPLETED)
        if call.done():
            return call.result()
        raise ClientGone
    finally:
        await _end(call, farewell)


async def _end(*tasks: asyncio.Future[Any]) -> None:
    """Cancel what still runs and wait for it. Its own failure has no caller left, so it goes to the log."""
    running = [task for task in tasks if not task.done()]
    for task in running:
        task.cancel()
    for error in await asyncio.gather(*running, return_exceptions=True):
        if isinstance(error, Exception) and not isinstance(error, RdsError):
            log.error("a call failed after its client had gone", exc_info=error)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Closable(Protocol):
    def __aiter__(self) -> AsyncIterator[bytes]: ...
    async def aclose(self) -> None: ...


class StreamedDownload(Response):
    """Sends `chunks` as they come and closes them, however the transfer ends."""

    def __init__(self, chunks: AsyncIterator[bytes], *, media_type: str, filename: str) -> None:
        super().__init__(media_type=media_type)
        self._chunks = chunks
        del self.headers["content-length"]
        self.headers["content-disposition"] = f'attachment; filename="{filename}"'

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(cast(_Closable, self._chunks)):
            transfer = asyncio.ensure_future(self._transfer(send))
            farewell = asyncio.ensure_future(_disconnected(receive))
            try:
                await asyncio.wait((transfer, farewell), return_when=asyncio.FIRST_COMPLETED)
                if not transfer.done():
                    raise ClientGone
                transfer.result()
            finally:
                await _end(transfer, farewell)

    async def _transfer(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for chunk in self._chunks:
            await _send_in_time(send, {"type": "http.response.body", "body": chunk, "more_body": True})
        await _send_in_time(send, {"type": "http.response.body", "body": b"", "more_body": False})


async def _send_in_time(send: Send, message: dict[str, Any]) -> None:
    """A client that stops reading must not hold the guest's call open for ever."""
    try:
        async with asyncio.timeout(STALL_TIMEOUT_S):
            await send(message)
    except TimeoutError:
        raise ClientGone from None
