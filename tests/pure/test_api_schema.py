"""The OpenAPI document, and what the server answers to whatever a generator makes of it."""

from __future__ import annotations

import asyncio
import json
import queue
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
import schemathesis
import uvicorn
from api_support import KEY, LOGIN, Outcome, Server, serve
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from rundatsheesh.manager.errors import StorageFull
from rundatsheesh.manager.model import State
from rundatsheesh.manager.store.database import Database

QUIET: dict[str, Any] = {"suppress_health_check": list(HealthCheck)}
# A valid request is not enough for these: a right password, a known key, a VM in the right state.
NEEDS_MORE = {"/auth/login", "/auth/me", "/v1/admin/api-keys/{key_id}/revoke", "/v1/vms/{vm_id}/start"}
BOUNDED: dict[str, Any] = {"deadline": None, "database": None, "derandomize": True, "phases": [Phase.generate]}
LONG = 200  # characters
METHODS = {"get", "post", "put", "patch", "delete"}
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with serve(tmp_path) as running:
        yield running


@pytest.fixture
async def document(server: Server) -> Any:
    return (await server.client.get("/openapi.json")).json()


def operations(document: Any) -> Iterator[tuple[str, str, Any]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert method in METHODS
            yield method, path, operation


async def test_a_client_can_be_generated_from_it(document: Any) -> None:
    assert document["openapi"].startswith("3.1")
    ids = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(ids) == len(set(ids)) > 15
    for _, path, operation in operations(document):
        assert operation["summary"] and operation["tags"]
        assert "422" not in operation["responses"]
        for code, response in operation["responses"].items():
            assert response["description"] and "X-Request-Id" in response["headers"]
            if int(code) >= 400:
                schema = response["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/Problem"}, (path, code)
        if path.startswith("/v1"):
            assert {"401", "429", "500"} <= set(operation["responses"])
            assert operation.get("security") != []


async def test_every_call_may_meet_a_full_disk_a_server_that_stops_and_a_foreign_name(
    server: Server, document: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    @asynccontextmanager
    async def full(_: Database) -> AsyncIterator[AsyncConnection]:
        raise StorageFull("full")
        yield

    await server.log_in()
    vm = await server.vm()
    monkeypatch.setattr(Database, "write", full)
    server.vms.fails_with = StorageFull("full")
    bodies: dict[str, Any] = {"post /auth/login": LOGIN, "post /v1/admin/api-keys": {"name": "k"}}
    bodies["patch /v1/vms/{vm_id}"] = {"ttlMs": None}
    met = set()
    for method, path, operation in operations(document):
        answers = operation["responses"]
        assert {"403", "500", "503"} <= set(answers), (method, path)
        place = path.format(vm_id=vm, key_id="key-nope")
        answer = await server.client.request(method, place, json=bodies.get(f"{method} {path}", {}))
        assert str(answer.status_code) in answers, (method, path, answer.text)
        if answer.status_code == 503:
            met.add(f"{method} {path}")
        foreign = await server.client.request(method, place, headers={"host": "rebound.example"})
        assert foreign.status_code == 403, (method, path)
    assert {*bodies, "delete /v1/vms/{vm_id}", "post /v1/admin/api-keys/{key_id}/revoke"} <= met


async def test_every_reference_leads_somewhere(document: Any) -> None:
    text = json.dumps(document)
    names = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert names == set(document["components"]["schemas"])
    assert "HTTPValidationError" not in names


async def test_binary_bodies(document: Any) -> None:
    files = document["paths"]
    upload = files["/v1/vms/{vm_id}/files/upload"]["post"]["requestBody"]["content"]
    assert upload["application/gzip"]["schema"] == {"type": "string", "format": "binary"}
    download = files["/v1/vms/{vm_id}/files/download"]["get"]["responses"]["200"]["content"]
    assert list(download) == ["application/gzip"]


async def test_it_describes_exactly_what_the_contract_names(document: Any) -> None:
    vm = document["components"]["schemas"]["VmView"]
    optional = {"name", "reason", "ttlMs", "expiresAt", "remainingMs", "idleTimeoutMs", "idleRemainingMs"}
    assert set(vm["required"]) == set(vm["properties"]) - optional
    assert set(document["components"]["schemas"]["CreateVmBody"]["required"]) == {"cpu", "memMb", "allowIps"}


async def test_no_call_takes_a_query_that_it_does_not_know(server: Server, document: Any) -> None:
    """Before anything else that is wrong with it, but for who asks."""
    await server.log_in()
    for method, path, _ in operations(document):
        if path.startswith("/v1/"):
            place = path.format(vm_id="vm-nope", key_id="key-nope")
            answer = await server.client.request(method, f"{place}?x=1")
            assert (answer.status_code, answer.json()["code"]) == (400, "invalid_input"), (method, path)
            assert {"field": "x", "problem": "unknown"} in answer.json()["details"]["errors"], (method, path)


@pytest.mark.parametrize("number", ["1_0", "1.0", "+1", " 1", "1e1", "0x1", "\u0661"])
async def test_numbers_in_a_query_are_digits(server: Server, number: str) -> None:
    vm = await server.vm()
    for place in (f"/v1/vms/{vm}/exec-logs", f"/v1/vms/{vm}/logs", "/v1/admin/activity"):
        name = "tail" if place.endswith("/logs") else "limit"
        assert (await server.client.get(place, headers=KEY, params={name: "10"})).status_code == 200
        answer = await server.client.get(place, headers=KEY, params={name: number})
        assert (answer.status_code, answer.json()["message"]) == (400, f"{name}: must be an integer, in digits")


def try_operation(operation: Any, base_url: str, server: Server, *, negative: bool) -> None:
    """Requests as the schema allows, or as it forbids, over a real connection."""
    mode = GenerationMode.NEGATIVE if negative else GenerationMode.POSITIVE
    cookies = {"rds_session": server.client.cookies["rds_session"]}

    @settings(max_examples=4 if negative else 8, **BOUNDED, **QUIET)
    @given(case=operation.as_strategy(mode))
    def try_it(case: Any) -> None:
        if not negative and "vm_id" in (case.path_parameters or {}):
            case.path_parameters["vm_id"] = running_vm(server) or create_vm(base_url)
        credentials = {"cookies": cookies} if "/admin/" in operation.path else {"headers": KEY}
        response = case.call(base_url=base_url, session=session, **credentials)
        case.validate_response(response, checks=CHECKS)
        statuses.add(response.status_code)

    statuses: set[int] = set()
    with requests.Session() as session:
        try_it()
    assert negative or statuses & {200, 201, 204} or operation.path in NEEDS_MORE, (operation.label, statuses)


def running_vm(server: Server) -> str | None:
    return next((record.id for record in server.vms.records.values() if record.state is State.RUNNING), None)


def create_vm(base_url: str) -> str:
    new = {"cpu": 1, "memMb": 128, "allowIps": []}
    answer = httpx.post(f"{base_url}/v1/vms", headers=KEY, json=new, timeout=60)
    return str(answer.json()["id"])


@pytest.mark.parametrize("negative", [False, True], ids=["valid", "invalid"])
def test_generated_requests_never_break_the_server(tmp_path: Path, negative: bool) -> None:
    """No operation fails on our side, and each answer is as the document says."""
    with listening(tmp_path) as (server, base_url):
        document = without_long_limits(httpx.get(f"{base_url}/openapi.json", timeout=60).json())
        for found in schemathesis.openapi.from_dict(document).get_all_operations():
            operation = found.ok()
            if not negative or can_be_wrong(operation):
                try_operation(operation, base_url, server, negative=negative)


def without_long_limits(part: Any) -> Any:
    """The same without lengths that no generated text comes near: the generator makes automata of that many states."""
    if isinstance(part, list):
        return [without_long_limits(value) for value in part]
    if not isinstance(part, dict):
        return part
    limit = part.get("maxLength")
    is_long = isinstance(limit, int) and limit > LONG
    return {key: without_long_limits(value) for key, value in part.items() if not (key == "maxLength" and is_long)}


def can_be_wrong(operation: Any) -> bool:
    return bool(operation.body or operation.query)


@contextmanager
def listening(directory: Path) -> Iterator[tuple[Server, str]]:
    """The server on a port of the loopback, on a thread and an event loop of its own, with one VM and a session."""
    ready: queue.SimpleQueue[tuple[Server, str, uvicorn.Server]] = queue.SimpleQueue()

    async def run() -> None:
        async with serve(directory, rate_limit_per_minute=0, max_upload_bytes=10_000) as server:
            server.vms.outcome = Outcome(has_result=True, result={"a": 1})
            await server.vm()
            await server.log_in()
            with socket.create_server(("127.0.0.1", 0)) as listener:
                port = listener.getsockname()[1]
                web = uvicorn.Server(uvicorn.Config(server.app, log_config=None, lifespan="off"))
                ready.put((server, f"http://127.0.0.1:{port}", web))
                await web.serve([listener])

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    server, base_url, web = ready.get(timeout=30)
    try:
        yield server, base_url
    finally:
        web.should_exit = True
        thread.join(30)
