"""What comes over a connection and is not HTTP: answered as every other error is, before any request exists."""

from __future__ import annotations

import logging
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from rundatsheesh.manager.api.middleware import DEFAULT_HEADERS, new_request_id
from rundatsheesh.manager.api.problems import problem
from rundatsheesh.manager.errors import InvalidInput

access_log = logging.getLogger("rundatsheesh.access")


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's, which answers such bytes in plain text and without a request id."""

    def send_400_response(self, msg: str) -> None:
        request_id = new_request_id()
        error = InvalidInput(
            "this is not a valid HTTP request",
            code="malformed_request",
            hint="look at the method, the length of the URL, Content-Length and the chunks of the body",
        )
        answer = problem(error, request_id)
        headers = {**DEFAULT_HEADERS, **answer.headers, "X-Request-Id": request_id, "Connection": "close"}
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        status = HTTPStatus(answer.status_code)
        self.transport.write(f"HTTP/1.1 {status.value} {status.phrase}\r\n{head}\r\n".encode("ascii"))
        self.transport.write(bytes(answer.body))
        self.transport.close()
        access_log.info("not HTTP: %d, request %s, -", status, request_id)
