"""What a key may do, how much, and where; lifetimes on the wire; creations that happen once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from api_support import KEY, Server, serve

from rundatsheesh.manager.errors import Unavailable
from rundatsheesh.manager.model import Rights, Scope

VM = {"cpu": 1, "memMb": 256, "allowIps": []}


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with serve(tmp_path) as running:
        yield running


async def key(server: Server, **rights: Any) -> dict[str, str]:
    """The header of a new key."""
    await server.log_in()
    answer = await server.client.post("/v1/admin/api-keys", json={"name": "k", **rights})
    assert answer.status_code == 201, answer.text
    server.client.cookies.clear()
    return {"X-API-Key": answer.json()["secret"]}


async def test_every_operation_needs_a_scope(server: Server) -> None:
    """A key without any scope gets nowhere, and one scope opens nothing but what is its own."""
    document = (await server.client.get("/openapi.json")).json()
    bare = (await server.store.credentials.create_api_key("bare", None, Rights(scopes=frozenset())))[1]
    for path, operations in document["paths"].items():
        if path.startswith("/v1"):
            for method in operations:
                url = path.replace("{vm_id}", "vm-1").replace("{key_id}", "key-1")
                answer = await server.client.request(method, url, headers={"X-API-Key": bare})
                assert answer.status_code == 403, (method, path, answer.text)


@pytest.mark.parametrize(
    ("method", "path", "scope"),
    [
        ("GET", "", "vm:read"),
        ("GET", "/{id}", "vm:read"),
        ("GET", "/{id}/exec-logs", "vm:read"),
        ("POST", "", "vm:write"),
        ("PATCH", "/{id}", "vm:write"),
        ("POST", "/{id}/stop", "vm:write"),
        ("POST", "/{id}/exec", "exec"),
        ("POST", "/{id}/run-ts", "exec"),
        ("GET", "/{id}/files/download?path=x", "files"),
        ("DELETE", "/{id}", "vm:write"),
    ],
)
async def test_scopes(server: Server, method: str, path: str, scope: str) -> None:
    url = "/v1/vms" + path.replace("{id}", await server.vm())
    body = {"POST": VM, "PATCH": {"ttlMs": 5000}}.get(method) if path in ("", "/{id}") else None
    body = {"cmd": "x"} if "exec" in path and method == "POST" else {"code": "1"} if "run" in path else body
    others = await key(server, scopes=[other.value for other in Scope if other.value != scope])
    refused = await server.client.request(method, url, headers=others, json=body)
    assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
    assert refused.json()["details"] == {"scope": scope} and scope in refused.json()["message"]
    allowed = await server.client.request(method, url, headers=await key(server, scopes=[scope]), json=body)
    assert allowed.status_code < 300, allowed.text


async def test_admin_is_not_in_the_default(server: Server) -> None:
    assert (await server.client.get("/v1/admin/overview", headers=await key(server))).status_code == 403
    admin = await key(server, scopes=["admin"])
    assert (await server.client.get("/v1/admin/overview", headers=admin)).status_code == 200
    refused = await server.client.get("/v1/admin/api-keys", headers=admin)
    assert refused.json()["code"] == "admin_session_required"


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"allowIps": ["10.1.0.0/16", "10.1.2.3"]}, 201),
        ({"allowIps": ["8.8.8.8"]}, 201),
        ({"allowIps": ["10.2.0.0/16"]}, 403),
        ({"allowIps": ["10.0.0.0/8"]}, 403),
        ({"allowIps": ["192.168.0.1"]}, 403),  # private: 0.0.0.0/1 and the like open the public internet only
        ({"allowIps": ["100.64.0.1"]}, 403),
        ({"allowIps": ["0.0.0.0/0"]}, 403),
        ({"allowDomains": ["example.com"]}, 403),
    ],
)
async def test_the_egress_ceiling(server: Server, fields: dict[str, Any], status: int) -> None:
    headers = await key(server, allowIps=["10.1.0.0/16", "0.0.0.0/1"])
    answer = await server.client.post("/v1/vms", headers=headers, json=VM | fields)
    assert answer.status_code == status, answer.text
    if status == 403:
        assert answer.json()["code"] == "egress_not_allowed" and answer.json()["details"]["entry"]


async def test_calls_per_minute(server: Server) -> None:
    headers = await key(server, limits={"callsPerMinute": 2})
    answers = [await server.client.get("/v1/vms", headers=headers) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[2].json()["code"] == "quota_exceeded" and int(answers[2].headers["Retry-After"]) > 1
    assert (await server.client.get("/v1/vms", headers=await key(server))).status_code == 200


@pytest.mark.parametrize(
    "rights",
    [
        {"scopes": []},
        {"scopes": ["root"]},
        {"allowIps": ["::/0"]},
        {"limits": {"maxVms": -1}},
        {"limits": {"callsPerMinute": 0}},
        {"limits": {"vms": 1}},
    ],
)
async def test_wrong_rights(server: Server, rights: dict[str, Any]) -> None:
    await server.log_in()
    assert (await server.client.post("/v1/admin/api-keys", json={"name": "x", **rights})).status_code == 400


async def test_lifetimes(server: Server) -> None:
    body = VM | {"ttlMs": 60_000, "idleTimeoutMs": 5000}
    made = (await server.client.post("/v1/vms", headers=KEY, json=body)).json()
    assert made["ttlMs"] == 60_000 and 0 < made["remainingMs"] <= 60_000 and made["expiresAt"] > made["createdAt"]
    assert made["idleTimeoutMs"] == made["idleRemainingMs"] == 5000
    url = f"/v1/vms/{made['id']}"
    longer = (await server.client.patch(url, headers=KEY, json={"ttlMs": 600_000})).json()
    assert longer["expiresAt"] > made["expiresAt"] and longer["idleTimeoutMs"] == 5000
    cleared = (await server.client.patch(url, headers=KEY, json={"ttlMs": None, "idleTimeoutMs": None})).json()
    assert not cleared.keys() & {"ttlMs", "expiresAt", "remainingMs", "idleTimeoutMs", "idleRemainingMs"}


@pytest.mark.parametrize(
    "body", [{}, {"ttlMs": 999}, {"ttlMs": 10**12}, {"ttlMs": "1"}, {"idleTimeoutMs": 1.5}, {"memMb": 512}]
)
async def test_wrong_lifetimes(server: Server, body: dict[str, Any]) -> None:
    vm_id = await server.vm()
    assert (await server.client.patch(f"/v1/vms/{vm_id}", headers=KEY, json=body)).status_code == 400
    if body:
        create = VM | body | ({"x": 1} if "memMb" in body else {})
        assert (await server.client.post("/v1/vms", headers=KEY, json=create)).status_code == 400


async def create_once(server: Server, name: str = "k", **fields: Any) -> Any:
    return await server.client.post("/v1/vms", headers={**KEY, "Idempotency-Key": name}, json=VM | fields)


async def test_the_same_key_gives_the_same_vm(server: Server) -> None:
    first = await create_once(server)
    again = await server.client.post(
        "/v1/vms",
        headers={**KEY, "Idempotency-Key": "k"},
        content=b'{"allowIps": [], "outboundInternet": false, "memMb": 256, "cpu": 1}',
    )
    assert first.status_code == again.status_code == 201 and first.json()["id"] == again.json()["id"]
    other = await create_once(server, cpu=2)
    assert (other.status_code, other.json()["code"]) == (409, "idempotency_conflict")
    foreign = await server.client.post("/v1/vms", headers={**await key(server), "Idempotency-Key": "k"}, json=VM)
    assert foreign.status_code == 201 and foreign.json()["id"] != first.json()["id"]
    await server.client.delete(f"/v1/vms/{first.json()['id']}", headers=KEY)
    gone = await create_once(server)
    assert (gone.status_code, gone.json()["code"]) == (409, "idempotency_vm_gone")


async def test_two_at_once_make_one_vm(server: Server) -> None:
    server.vms.hang = asyncio.Event()
    both = [asyncio.ensure_future(create_once(server)) for _ in range(2)]
    await server.vms.began.wait()
    server.vms.hang.set()
    ids = {answer.json()["id"] for answer in await asyncio.gather(*both)}
    assert len(ids) == len(server.vms.records) == 1


async def test_a_failed_creation_may_be_tried_again(server: Server) -> None:
    server.vms.fails_with = Unavailable("full")
    assert (await create_once(server)).status_code == 503
    server.vms.fails_with = None
    assert (await create_once(server, cpu=2)).status_code == 201


@pytest.mark.parametrize("name", ["", "a b", "x" * 256, "é"])
async def test_wrong_idempotency_keys(server: Server, name: str) -> None:
    headers = [*KEY.items(), ("Idempotency-Key", name.encode())]
    answer = await server.client.post("/v1/vms", headers=headers, json=VM)  # type: ignore[arg-type]
    assert (answer.status_code, answer.json()["code"]) == (400, "idempotency_key_invalid")
