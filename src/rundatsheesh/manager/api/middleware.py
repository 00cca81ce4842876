"""Around every request: its id, its log line, its errors, and headers that browsers obey. Plain ASGI."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rundatsheesh.manager.api.problems import problem, unexpected
from rundatsheesh.manager.errors import HostError, RdsError, Unavailable

log = logging.getLogger(__name__)
access_log = logging.getLogger("rundatsheesh.access")

_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
MAX_LOGGED_PATH = 512
CLIENT_GONE = 499  # in the log only
STOPPING_RETRY_S = 2.0  # until the next server answers

DEFAULT_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}


class RequestContext:
    """Gives each request its id and turns what it raises into a response, as long as none has begun."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, send)
        begun = time.monotonic()
        try:
            await self._answer(exchange, receive)
        finally:
            access_log.info(
                "%s %s %s %d ms, request %s, %s",
                scope["method"],
                _loggable(scope["path"]),
                exchange.status or CLIENT_GONE,
                round((time.monotonic() - begun) * 1000),
                exchange.request_id,
                getattr(exchange.scope.get("rds.identity"), "who", "-"),
            )

    async def _answer(self, exchange: _Exchange, receive: Receive) -> None:
        try:
            await self._app(exchange.scope, receive, exchange.send)
        except ClientDisconnect:
            return
        except asyncio.CancelledError:
            # The server ends, and has waited for as long as it may. Who asked can ask the next one.
            if exchange.status is not None:
                raise
            await problem(_stopping(), exchange.request_id)(exchange.scope, receive, exchange.send)
        except RdsError as error:
            if isinstance(error, HostError) or exchange.status is not None:
                # What the machine itself said of it, which is for the host's eyes only.
                evidence = str(error.details.get("log", "")).strip()
                log.error("request %s failed: %s\n%s", exchange.request_id, error, evidence, exc_info=error)
            await self._send_problem(exchange, receive, problem(error, exchange.request_id), error)
        except Exception as error:
            log.error("request %s failed", exchange.request_id, exc_info=error)
            await self._send_problem(exchange, receive, unexpected(exchange.request_id), error)

    async def _send_problem(self, exchange: _Exchange, receive: Receive, answer: Response, error: Exception) -> None:
        if exchange.status is not None:
            raise error  # half an answer is out: only breaking the connection tells the client that it is not whole
        await answer(exchange.scope, receive, exchange.send)


class _Exchange:
    """One request and what was sent of its response."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.request_id = _request_id(Headers(scope=scope).get("x-request-id"))
        self.status: int | None = None
        self._send = send
        self._head = scope["method"] == "HEAD"
        # HEAD is a GET whose body nobody sees. Not a download's: a guest would work for nothing.
        as_get = self._head and not scope["path"].endswith("/files/download")
        self.scope = {**scope, "rds.request_id": self.request_id, "method": "GET" if as_get else scope["method"]}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = self.request_id
            for name, value in DEFAULT_HEADERS.items():
                headers.setdefault(name, value)
        elif self._head and message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await self._send(message)


def _stopping() -> Unavailable:
    return Unavailable("the server is stopping", code="server_stopping", retry_after=STOPPING_RETRY_S)


def _loggable(path: str) -> str:
    """Percent-encoded again, so that no path can write a line of its own into the log."""
    return quote(path[:MAX_LOGGED_PATH], safe="/:@-._~", errors="replace")


def _request_id(offered: str | None) -> str:
    """The client's own id where it is harmless in headers and logs."""
    if offered is not None and _SANE_REQUEST_ID.fullmatch(offered):
        return offered
    return new_request_id()


def new_request_id() -> str:
    return "req-" + secrets.token_hex(8)
