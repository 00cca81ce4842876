"""The shape of errors, and what every response carries."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from api_support import KEY, Server, serve

from rundatsheesh.manager import errors
from rundatsheesh.manager.api.problems import OUR_FAULT, STATUS, problem
from rundatsheesh.manager.api.schemas.base import Problem

SECRET = "/var/lib/secret-evidence"


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with serve(tmp_path) as running:
        yield running


def all_errors(cls: type[errors.RdsError] = errors.RdsError) -> list[type[errors.RdsError]]:
    return [cls, *(found for sub in cls.__subclasses__() for found in all_errors(sub))]


@pytest.mark.parametrize("cls", [cls for cls in all_errors() if cls.__module__ == errors.__name__])
async def test_every_class_of_error_becomes_a_problem(server: Server, cls: type[errors.RdsError]) -> None:
    vm_id = await server.vm()
    server.vms.fails_with = cls(SECRET, hint="try harder", details={"reason": "because"})
    answer = await server.client.post(f"/v1/vms/{vm_id}/exec", headers=KEY, json={"cmd": "true"})
    body = answer.json()
    Problem.model_validate(body)
    assert body["requestId"] == answer.headers["x-request-id"]
    assert body["code"] == cls.code
    if answer.status_code == 500:
        assert body["message"] == OUR_FAULT and "hint" not in body and "details" not in body
        assert SECRET not in answer.text
    else:
        assert (body["message"], body["hint"], body["details"]) == (SECRET, "try harder", {"reason": "because"})
    assert ("retry-after" in answer.headers) == (answer.status_code in (429, 503))


def test_a_subclass_takes_the_status_of_its_nearest_ancestor() -> None:
    class GuestGone(errors.GuestDied):
        pass

    assert problem(GuestGone("x"), "r").status_code == 502
    assert set(STATUS) <= set(all_errors())


def test_retry_after_is_rounded_up() -> None:
    assert problem(errors.LimitReached("x", retry_after=1.2), "r").headers["retry-after"] == "2"
    assert problem(errors.Unavailable("x", retry_after=0.01), "r").headers["retry-after"] == "1"


async def test_an_unforeseen_exception_tells_nothing_and_is_logged(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    vm_id = await server.vm()
    server.vms.fails_with = ZeroDivisionError(SECRET)
    answer = await server.client.post(f"/v1/vms/{vm_id}/exec", headers=KEY, json={"cmd": "true"})
    assert answer.status_code == 500 and SECRET not in answer.text
    assert answer.json()["code"] == "internal_error"
    assert answer.headers["x-request-id"] in caplog.text and SECRET in caplog.text


async def test_the_guest_s_last_output_reaches_the_caller(server: Server) -> None:
    vm_id = await server.vm()
    details = {"reason": "out_of_memory", "stdout": "so far", "stderr": ""}
    server.vms.fails_with = errors.GuestDied("the VM ran out of memory", details=details)
    answer = await server.client.post(f"/v1/vms/{vm_id}/exec", headers=KEY, json={"cmd": "true"})
    assert answer.status_code == 502 and answer.json()["details"] == details


@pytest.mark.parametrize(
    "path", ["/nope", "/v1/nope", "/health/", "/v1/vms/", "/docs/nope", "/assets/nope", "//v1/vms"]
)
async def test_unknown_paths(server: Server, path: str) -> None:
    answer = await server.client.get(f"http://localhost:3000{path}", headers=KEY)
    assert answer.status_code == 404
    Problem.model_validate(answer.json())


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("PUT", "/v1/vms", "GET, HEAD, POST"),
        ("PUT", "/v1/vms/vm-1", "DELETE, GET, HEAD, PATCH"),
        ("GET", "/v1/vms/vm-1/exec", "POST"),
        ("POST", "/v1/vms/vm-1/files/download", "GET"),
        ("HEAD", "/v1/vms/vm-1/files/download", "GET"),
        ("DELETE", "/", "GET, HEAD"),
    ],
)
async def test_wrong_methods_name_the_right_ones(server: Server, method: str, path: str, allow: str) -> None:
    answer = await server.client.request(method, path, headers=KEY)
    assert (answer.status_code, answer.headers["allow"]) == (405, allow)


async def test_options_and_head(server: Server) -> None:
    options = await server.client.options("/v1/vms", headers={**KEY, "origin": "https://evil.example"})
    assert (options.status_code, options.headers["allow"]) == (204, "GET, HEAD, OPTIONS, POST")
    assert not [name for name in options.headers if name.startswith("access-control")]
    assert (await server.client.options("/v1/vms")).status_code == 401
    head, get = await server.client.head("/health"), await server.client.get("/health")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == get.headers["content-length"]


@pytest.mark.parametrize("path", ["/", "/health", "/nope", "/v1/vms", "/docs/", "/swagger", "/openapi.json"])
async def test_headers_of_every_response(server: Server, path: str) -> None:
    answer = await server.client.get(path)
    assert answer.headers["x-request-id"].startswith("req-")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "script-src 'unsafe" not in answer.headers["content-security-policy"]


@pytest.mark.parametrize(("offered", "kept"), [("abc-1._Z", True), ("a" * 64, True), ("a" * 65, False), ("a b", False)])
async def test_a_sane_request_id_of_the_client_is_kept(server: Server, offered: str, kept: bool) -> None:
    vm_id = await server.vm()
    headers = {**KEY, "x-request-id": offered}
    answer = await server.client.post(f"/v1/vms/{vm_id}/exec", headers=headers, json={"cmd": "true"})
    assert (answer.headers["x-request-id"] == offered) is kept
    assert server.vms.callers[-1].request_id == answer.headers["x-request-id"]


async def test_the_access_log_has_the_request_id(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "rundatsheesh.access"):
        answer = await server.client.get("/v1/vms", headers=KEY)
    line = next(record.getMessage() for record in caplog.records if record.name == "rundatsheesh.access")
    assert answer.headers["x-request-id"] in line and "key:main" in line and "GET /v1/vms 200" in line


async def test_a_path_writes_no_line_of_its_own_into_the_log(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "rundatsheesh.access"):
        await server.client.get("/nope%0aGET%20/v1/vms%20200%1b[2J")
    line = next(record.getMessage() for record in caplog.records if record.name == "rundatsheesh.access")
    assert line.isprintable() and "/nope%0AGET" in line


async def test_health(server: Server) -> None:
    assert (await server.client.get("/health")).json() == {"status": "ok"}
    assert (await server.client.get("/health/ready")).json() == {"status": "ready"}
    server.readiness[0] = type(server.readiness[0])(False, "no engine")
    answer = await server.client.get("/health/ready")
    assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
    assert answer.json()["message"] == "no engine" and int(answer.headers["retry-after"]) >= 1
