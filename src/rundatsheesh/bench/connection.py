"""One persistent connection to a server, with as little of its own between the call and the clock as possible."""

from __future__ import annotations

import json
import select
import time
from collections.abc import Iterable
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import quote, urlsplit

from rundatsheesh.client.errors import ConnectionFailed
from rundatsheesh.client.transport import vm_path

TIMEOUT = 330.0  # seconds; a create may queue
PIECE = 256 << 10


class UnexpectedAnswerError(Exception):
    """The server answered with something else than the success that is to be measured."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"HTTP {status}: {body[:500].decode(errors='replace')}")
        self.status = status


class Connection:
    """Not for several threads at once. The connection is opened by the first call and kept."""

    def __init__(self, url: str, api_key: str) -> None:
        parts = urlsplit(url)
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._http = kind(parts.hostname or "localhost", parts.port, timeout=TIMEOUT)
        self._prefix = parts.path.rstrip("/")
        self._headers = {"X-API-Key": api_key}
        self.answered: dict[str, str] = {}  # headers of the last answer

    def close(self) -> None:
        self._http.close()

    def ask(self, method: str, path: str, body: bytes | None = None, kind: str = "application/json") -> bytes:
        """The body of a success; raises UnexpectedAnswerError for anything else, ConnectionFailed without an answer."""
        self._renew()
        headers = self._headers if body is None else {**self._headers, "Content-Type": kind}
        try:
            self._http.request(method, self._prefix + path, body, headers)
            answer = self._http.getresponse()
            content = answer.read()
        except (OSError, HTTPException) as error:
            self._http.close()
            raise ConnectionFailed(str(error) or type(error).__name__) from error
        self.answered = {name.lower(): value for name, value in answer.getheaders()}
        if not 200 <= answer.status < 300:
            raise UnexpectedAnswerError(answer.status, content)
        return content

    def post(self, path: str, **fields: Any) -> Any:
        return json.loads(self.ask("POST", path, json.dumps(fields).encode()))

    def drain(self, path: str) -> int:
        """GET without keeping what arrives; the number of bytes."""
        self._renew()
        try:
            self._http.request("GET", self._prefix + path, headers=self._headers)
            answer = self._http.getresponse()
            if answer.status != 200:
                raise UnexpectedAnswerError(answer.status, answer.read())
            return sum(map(len, _pieces(answer.read)))
        except (OSError, HTTPException) as error:
            self._http.close()
            raise ConnectionFailed(str(error) or type(error).__name__) from error

    def _renew(self) -> None:
        """Servers close connections that rest for long; the next request then opens another."""
        if self._http.sock is not None and select.select([self._http.sock], [], [], 0)[0]:
            self._http.close()


def _pieces(read: Any) -> Iterable[bytes]:
    while piece := read(PIECE):
        yield piece


class Box:
    """One VM over one connection."""

    def __init__(self, connection: Connection, vm_id: str) -> None:
        self.connection = connection
        self.id = vm_id

    @classmethod
    def create(cls, connection: Connection, **fields: Any) -> Box:
        """One vCPU, 256 MiB and no network unless `fields` say otherwise."""
        made = connection.post("/v1/vms", **{"cpu": 1, "memMb": 256, "allowIps": [], **fields})
        return cls(connection, made["id"])

    def run(self, verb: str, **fields: Any) -> Any:
        """The outcome of a call that must succeed."""
        outcome = self.connection.post(vm_path(self.id, verb), **fields)
        if outcome["exitCode"] != 0:
            raise UnexpectedAnswerError(200, json.dumps(outcome).encode())
        return outcome

    def upload(self, archive: bytes, dest: str) -> None:
        self.connection.ask("POST", f"{self._files('upload')}?dest={quote(dest)}", archive, "application/gzip")

    def download(self, path: str) -> int:
        """The number of compressed bytes."""
        return self.connection.drain(f"{self._files('download')}?path={quote(path)}")

    def delete(self) -> None:
        self.connection.ask("DELETE", vm_path(self.id))

    def _files(self, verb: str) -> str:
        return vm_path(self.id, "files", verb)


def milliseconds(since: float) -> float:
    """Since a value of time.perf_counter()."""
    return (time.perf_counter() - since) * 1000
