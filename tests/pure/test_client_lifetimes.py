"""Lifetimes, creations that happen once, and keys with rights, as the SDK and the command line send them."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import httpx
import pytest
from click.testing import CliRunner
from test_client_calls import VM, Server, answer, vm_server

from rundatsheesh.cli import main
from rundatsheesh.client import UNCHANGED, Admin, Client
from rundatsheesh.commands import vm as verbs

PATH = f"/v1/vms/{VM['id']}"
LASTING = VM | {"ttlMs": 60000, "expiresAt": "2030-01-01T00:00:00Z", "remainingMs": 59000, "idleTimeoutMs": 5000}
KEY = {
    "id": "key-1",
    "name": "ci",
    "scopes": ["exec"],
    "allowIps": ["10.0.0.0/8"],
    "limits": {"maxVms": 2, "maxCpu": None, "maxMemMb": None, "callsPerMinute": None},
    "createdAt": "2025-01-01T00:00:00Z",
    "expiresAt": None,
    "revokedAt": None,
    "lastUsedAt": None,
}


def bodies(server: Server) -> list[object]:
    return [json.loads(body) if body else None for body in server.bodies]


def test_a_creation_says_when_it_ends_and_happens_once() -> None:
    server = vm_server(**{"POST /v1/vms": answer(201, json=LASTING)})
    with server.client() as client:
        info = client.create(ttl_ms=60_000, idle_timeout_ms=5000, idempotency_key="once").info
    assert server.requests[0].headers["idempotency-key"] == "once"
    sent = json.loads(server.bodies[0])
    assert (sent["ttlMs"], sent["idleTimeoutMs"]) == (60_000, 5000)
    assert (info.ttl_ms, info.remaining_ms, info.idle_timeout_ms, info.idle_remaining_ms) == (60000, 59000, 5000, None)
    assert info.expires_at == datetime(2030, 1, 1, tzinfo=UTC)


async def test_an_update_sends_what_changes() -> None:
    server = vm_server(**{f"PATCH {PATH}": answer(200, json=LASTING)})
    with server.client() as client:
        vm = client.get(str(VM["id"]))
        assert vm.update(ttl_ms=60_000).ttl_ms == 60_000
        vm.update(ttl_ms=None, idle_timeout_ms=5000)
        vm.update(idle_timeout_ms=UNCHANGED)
        assert vm.info.idle_timeout_ms == 5000
    async with server.async_client() as client:
        await (await client.get(str(VM["id"]))).update(idle_timeout_ms=None)
    sent = [body for request, body in zip(server.requests, bodies(server), strict=True) if request.method == "PATCH"]
    assert sent == [{"ttlMs": 60000}, {"ttlMs": None, "idleTimeoutMs": 5000}, {}, {"idleTimeoutMs": None}]


def test_the_admin_makes_keys_with_less_than_everything() -> None:
    keys = "/v1/admin/api-keys"
    server = Server(
        {
            "POST /auth/login": answer(200, json={"email": "a"}, headers={"set-cookie": "rds_session=t; Path=/"}),
            "POST /auth/logout": answer(200, json={"ok": True}),
            f"POST {keys}": answer(201, json=KEY | {"secret": "s"}),
            f"GET {keys}": answer(200, json=[KEY]),
            f"POST {keys}/key-1/revoke": answer(200, json=KEY | {"revokedAt": "2025-01-02T00:00:00Z"}),
        }
    )
    with Admin(email="a", password="p", transport_=httpx.MockTransport(server)) as admin:
        ends = datetime(2099, 1, 1, tzinfo=UTC)
        made = admin.create_key("ci", scopes=["exec"], allow_ips=["10.0.0.0/8"], expires_at=ends, max_vms=2)
        assert (made.secret, made.scopes, made.limits["maxVms"]) == ("s", ("exec",), 2)
        assert admin.list_keys()[0].secret is None
        assert admin.revoke_key("key-1").revoked_at is not None
    sent = {
        "name": "ci",
        "scopes": ["exec"],
        "allowIps": ["10.0.0.0/8"],
        "expiresAt": "2099-01-01T00:00:00+00:00",
        "limits": {"maxVms": 2},
    }
    assert bodies(server)[1] == sent
    assert all("x-api-key" not in request.headers for request in server.requests)
    assert all(request.headers.get("cookie") == "rds_session=t" for request in server.requests[1:])
    assert server.requests[-1].url.path == "/auth/logout"


def test_the_command_line_has_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    server = vm_server(**{"POST /v1/vms": answer(201, json=LASTING), f"PATCH {PATH}": answer(200, json=LASTING)})
    monkeypatch.setattr(
        verbs, "Client", lambda url, api_key: Client(transport_=httpx.MockTransport(server), api_key="k")
    )

    def rds(*arguments: str) -> int:
        return CliRunner().invoke(main, ["vm", *arguments]).exit_code

    assert rds("create", "--ttl", "60", "--idle-timeout", "5", "--idempotency-key", "once") == 0
    assert server.requests[-1].headers["idempotency-key"] == "once"
    assert json.loads(server.bodies[-1])["ttlMs"] == 60_000
    assert rds("update", str(VM["id"]), "--ttl", "never", "--idle-timeout", "2.5") == 0
    assert json.loads(server.bodies[-1]) == {"ttlMs": None, "idleTimeoutMs": 2500}
    assert rds("update", str(VM["id"])) == 2
    assert rds("update", str(VM["id"]), "--ttl", "soon") == 2
