"""Both clients against a server that answers from a table: same calls, same values, same errors."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from rundatsheesh.client import AsyncClient, AsyncVm, Client, Vm, errors
from rundatsheesh.client.archive import pack, unpack
from rundatsheesh.client.transport import vm_path

VM = {
    "id": "vm-0123456789abcdef",
    "state": "RUNNING",
    "cpu": 1,
    "memMb": 256,
    "guestIp": "172.16.1.0",
    "allowIps": [],
    "allowDomains": [],
    "outboundInternet": False,
    "engine": "gvisor",
    "isolation": "application-kernel",
    "provisionMode": "boot",
    "imageId": "e60a",
    "labels": {"team": "a"},
    "createdAt": "2025-01-01T00:00:00Z",
    "startedAt": None,
    "bootId": "b",
    "aFieldOfTomorrow": 1,
}
OUTCOME = {"exitCode": 3, "stdout": "out", "stderr": "err", "durationMs": 5, "timedOut": False, "truncated": False}


Answer = Callable[[], httpx.Response]


def answer(status: int, **content: Any) -> Answer:
    """A new response for each request: httpx ties one to the client that got it."""
    return lambda: httpx.Response(status, **content)


class Server:
    """Remembers requests; answers each path from a table."""

    def __init__(self, answers: dict[str, Answer]) -> None:
        self.answers = answers
        self.requests: list[httpx.Request] = []
        self.bodies: list[bytes] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        self.bodies.append(request.read())
        return self._answer(request)

    async def later(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        self.bodies.append(await request.aread())
        return self._answer(request)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        return self.answers[f"{request.method} {request.url.path}"]()

    def client(self) -> Client:
        return Client(api_key="k", transport_=httpx.MockTransport(self))

    def async_client(self) -> AsyncClient:
        return AsyncClient(api_key="k", transport_=httpx.MockTransport(self.later))


def vm_server(**more: Answer) -> Server:
    path = f"/v1/vms/{VM['id']}"
    return Server(
        {
            "POST /v1/vms": answer(201, json=VM),
            "GET /v1/vms": answer(200, json=[VM]),
            f"GET {path}": answer(200, json=VM),
            f"DELETE {path}": answer(204),
            f"POST {path}/exec": answer(200, json=OUTCOME),
            f"POST {path}/run-ts": answer(200, json=OUTCOME | {"result": None}),
            f"POST {path}/run-js": answer(200, json=OUTCOME | {"error": {"name": "Error"}}),
            f"POST {path}/files/upload": answer(204),
            **more,
        }
    )


def test_a_session_of_calls() -> None:
    server = vm_server()
    with server.client() as client, client.create(allow_ips=["10.0.0.1"], outbound_internet=True, name="n") as vm:
        assert vm.info.created_at.year == 2025 and vm.info.labels == {"team": "a"}
        assert vm.exec("ls", timeout_ms=5).exit_code == 3
        typescript, javascript = vm.run_ts("1", env={"A": "b"}), vm.run_js(path="/workspace/x.js", args=["1"])
        assert typescript.has_result and typescript.result is None
        assert not javascript.has_result and javascript.error == {"name": "Error"}
        assert [info.id for info in client.list(state="RUNNING", label="team=a")] == [vm.id]
    assert all(request.headers["x-api-key"] == "k" for request in server.requests)
    bodies = [json.loads(body) for body in server.bodies if body]
    assert bodies == [
        {
            "cpu": 1,
            "memMb": 256,
            "allowIps": ["10.0.0.1"],
            "outboundInternet": True,
            "allowDomains": [],
            "name": "n",
        },
        {"cmd": "ls", "timeoutMs": 5},
        {"code": "1", "env": ["A=b"]},
        {"path": "/workspace/x.js", "args": ["1"]},
    ]
    assert server.requests[4].url.query == b"state=RUNNING&label=team%3Da"
    assert server.requests[-1].method == "DELETE"


async def test_the_same_session_awaited() -> None:
    server, blocking = vm_server(), vm_server()
    async with server.async_client() as client, await client.create(allow_ips=["10.0.0.1"]) as vm:
        await vm.exec("ls", timeout_ms=5)
        await vm.run_ts("1", env={"A": "b"})
        await vm.run_js(path="/workspace/x.js", args=["1"])
        assert [info.id for info in await client.list()] == [vm.id]

    def same() -> None:
        with blocking.client() as client, client.create(allow_ips=["10.0.0.1"]) as vm:
            vm.exec("ls", timeout_ms=5)
            vm.run_ts("1", env={"A": "b"})
            vm.run_js(path="/workspace/x.js", args=["1"])
            client.list()

    await asyncio.to_thread(same)
    told = [[(r.method, r.url, b) for r, b in zip(s.requests, s.bodies, strict=True)] for s in (server, blocking)]
    assert told[0] == told[1]


async def test_files_go_up_and_come_down(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "hello.txt").write_text("hello")
    path = f"/v1/vms/{VM['id']}/files/download"
    archive = b"".join(pack(source))
    server = vm_server(**{f"GET {path}": lambda: httpx.Response(200, stream=httpx.ByteStream(archive))})

    def blocking() -> None:
        with server.client() as client:
            vm = client.get(VM["id"])
            vm.upload(source, "/workspace/p")
            vm.upload(archive)
            assert vm.download("/workspace/p", tmp_path / "one").files == 1

    await asyncio.to_thread(blocking)
    async with server.async_client() as client:
        vm = await client.get(VM["id"])
        await vm.upload(source, "/workspace/p")
        assert (await vm.download("/workspace/p", tmp_path / "two")).files == 1
        with pytest.raises(FileNotFoundError):
            await vm.upload(tmp_path / "missing")
    assert (tmp_path / "one/hello.txt").read_text() == (tmp_path / "two/hello.txt").read_text() == "hello"
    uploads = [(r, b) for r, b in zip(server.requests, server.bodies, strict=True) if r.url.path.endswith("upload")]
    assert len(uploads) == 3
    for index, (request, body) in enumerate(uploads):
        assert request.headers["content-type"] == "application/gzip"
        (tmp_path / f"{index}.tgz").write_bytes(body)
        with (tmp_path / f"{index}.tgz").open("rb") as file:
            assert unpack(file, tmp_path / f"u{index}").files == 1
    assert uploads[0][0].url.params["dest"] == "/workspace/p"


@pytest.mark.parametrize(
    ("status", "kind"), [*errors.BY_STATUS.items(), (500, errors.ServerError), (418, errors.ApiError)]
)
def test_each_status_has_its_error(status: int, kind: type[errors.ApiError]) -> None:
    body = {"message": "no", "code": "x", "requestId": "r", "hint": "h", "retryable": True, "details": {"a": 1}}
    server = Server({"GET /v1/vms": answer(status, json=body, headers={"retry-after": "7"})})
    with server.client() as client, pytest.raises(errors.ApiError) as caught:
        client.list()
    error = caught.value
    assert type(error) is kind
    assert (error.status, error.code, error.hint, error.request_id) == (status, "x", "h", "r")
    assert error.retryable and error.details == {"a": 1} and error.retry_after == 7


def test_an_answer_that_is_not_ours_is_an_error_too() -> None:
    server = Server({"GET /v1/vms": answer(502, text="<html>proxy</html>")})
    with server.client() as client, pytest.raises(errors.GuestDied, match="proxy"):
        client.list()


@pytest.mark.parametrize(
    ("cause", "kind"),
    [(httpx.ReadTimeout("slow"), errors.RequestTimedOut), (httpx.ConnectError("refused"), errors.ConnectionFailed)],
)
async def test_transport_errors_are_translated(cause: Exception, kind: type[Exception]) -> None:
    def refuse() -> httpx.Response:
        raise cause

    server = Server({"GET /v1/vms": refuse, f"GET {vm_path('x', 'files', 'download')}": refuse})
    async with server.async_client() as client:
        with pytest.raises(kind):
            await client.list()


def test_a_vm_deleted_inside_its_context_is_no_error() -> None:
    gone = answer(404, json={"message": "no", "code": "vm_not_found"})
    server = vm_server(**{f"DELETE /v1/vms/{VM['id']}": gone})
    with server.client() as client, client.create():
        pass


def test_ids_cannot_name_another_route() -> None:
    assert vm_path("../admin?x", "exec") == "/v1/vms/..%2Fadmin%3Fx/exec"


@pytest.mark.parametrize(("blocking", "awaited"), [(Client, AsyncClient), (Vm, AsyncVm)])
def test_both_clients_have_the_same_methods(blocking: type, awaited: type) -> None:
    def signatures(kind: type) -> dict[str, list[str]]:
        methods = inspect.getmembers(kind, inspect.isfunction)
        return {name: list(inspect.signature(m).parameters) for name, m in methods if not name.startswith("_")}

    assert signatures(blocking) == signatures(awaited)
