"""`rds bench` against a server that is all fake: what it asks for, and what it does about refusals."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from click.testing import CliRunner

from rundatsheesh.bench import burst
from rundatsheesh.bench.connection import Box, Connection, UnexpectedAnswerError
from rundatsheesh.bench.results import Results
from rundatsheesh.cli import main
from rundatsheesh.client.errors import ConnectionFailed


class Fake(BaseHTTPRequestHandler):
    """Makes VMs until `room` is used up, then refuses; with an hour to wait, or without a word about it."""

    protocol_version = "HTTP/1.1"
    vms: set[str]
    room: int
    retry_after: str | None
    lock: threading.Lock

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.path == "/v1/vms":
            self._create()
        elif "/files/upload" in self.path:
            self._answer(204)
        elif self.path.endswith("/exec"):
            stdout = "12000\n" if "EPOCHREALTIME" in json.loads(body)["cmd"] else "hello\n"
            self._answer(200, {"exitCode": 0, "stdout": stdout})
        else:
            self._answer(200, {"exitCode": 0, "stdout": ""})

    def do_GET(self) -> None:
        self._answer(200, {"status": "ok"})

    def do_DELETE(self) -> None:
        self.vms.remove(self.path.rpartition("/")[2])
        self._answer(204)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def _create(self) -> None:
        with self.lock:
            full = len(self.vms) >= self.room
            name = f"vm-{len(self.vms)}-{threading.get_ident()}"
            if not full:
                self.vms.add(name)
        if full:
            headers = {} if self.retry_after is None else {"Retry-After": self.retry_after}
            self._answer(429, {"code": "quota_exceeded"}, headers)
        else:
            self._answer(201, {"id": name})

    def _answer(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        content = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def fake() -> Iterator[type[Fake]]:
    own = {"vms": set(), "room": 100, "retry_after": "3600", "lock": threading.Lock(), "url": ""}
    server_type: Any = type("Server", (Fake,), own)
    with ThreadingHTTPServer(("127.0.0.1", 0), server_type) as server:
        server_type.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server_type
        server.shutdown()
        thread.join()


def test_it_measures_and_leaves_no_vm(fake: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rundatsheesh.bench.over_http.REST", 0.0)
    monkeypatch.setattr("rundatsheesh.bench.schedule.BREATH", 0.0)
    arguments = ["--rounds", "3", "--burst", "2", "--seconds", "0", "--json", f"{tmp_path}/b.json", "--svg"]
    done = CliRunner().invoke(main, ["bench", "--url", fake.url, *arguments, f"{tmp_path}/b.svg"])
    assert done.exit_code == 0, done.output
    assert "exec true" in done.output and "goals met" in done.output
    told = json.loads((tmp_path / "b.json").read_text())
    assert told["measures"]["bare_deno"]["median"] == 12.0
    assert (tmp_path / "b.svg").read_text().startswith("<svg")
    assert fake.vms == set()


@pytest.mark.parametrize(("retry_after", "failed"), [("1", 0), (None, 4)])
async def test_a_refusal_is_in_order_when_it_says_when_to_come_back(
    fake: Any, retry_after: str | None, failed: int
) -> None:
    fake.room, fake.retry_after = 3, retry_after
    results = Results()
    outcome = await burst.measure_burst(results, fake.url, "key", 6)
    assert outcome == {"asked": 6, "made": 2, "refused": 4 - failed, "failed": failed}
    assert results.samples["burst_failed"] == [failed]
    assert fake.vms == set()


def test_a_command_that_fails_is_no_measurement(fake: Any) -> None:
    fake.room = 0
    connection = Connection(fake.url, "key")
    with pytest.raises(UnexpectedAnswerError, match="429"):
        Box.create(connection)
    connection.close()


def test_no_server_is_an_error_in_a_line() -> None:
    done = CliRunner().invoke(main, ["bench", "--url", "http://127.0.0.1:9"])
    assert done.exit_code == 1 and done.output.splitlines()[-1].startswith("Error: ")
    with pytest.raises(ConnectionFailed):
        Connection("http://127.0.0.1:9", "key").ask("GET", "/health")
