"""API keys, overview, activity."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from api_support import KEY, Server, serve

from rundatsheesh.manager.api.schemas.admin import (
    ActivityView,
    ApiKeyView,
    HealingView,
    LeaksView,
    NewApiKeyView,
    OverviewView,
)
from rundatsheesh.manager.model import Caller, Leak, LeakKind


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with serve(tmp_path) as running:
        yield running


@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("POST", ""), ("POST", "/key-1/revoke")])
async def test_keys_need_the_session(server: Server, method: str, path: str) -> None:
    answer = await server.client.request(method, f"/v1/admin/api-keys{path}", headers=KEY, json={"name": "x"})
    assert (answer.status_code, answer.json()["code"]) == (403, "admin_session_required")


async def test_the_secret_is_shown_once(server: Server) -> None:
    await server.log_in()
    created = await server.client.post(
        "/v1/admin/api-keys", json={"name": "ci", "expiresAt": "2999-01-01T00:00:00+01:00"}
    )
    assert created.status_code == 201
    NewApiKeyView.model_validate(created.json())
    assert created.json()["expiresAt"] == "2998-12-31T23:00:00.000Z"
    secret = created.json()["secret"]
    listed = await server.client.get("/v1/admin/api-keys")
    ApiKeyView.model_validate(listed.json()[0])
    assert secret not in listed.text
    assert (await server.client.get("/v1/vms", headers={"X-API-Key": secret})).status_code == 200
    assert (await server.client.get("/v1/admin/api-keys")).json()[0]["lastUsedAt"]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"name": ""},
        {"name": "x" * 129},
        {"name": "x", "expiresAt": "soon"},
        {"name": "x", "expiresAt": "2999-01-01T00:00:00"},
        {"name": "x", "expiresAt": "2001-01-01T00:00:00Z"},
        {"name": "x", "expiresAt": 5},
        {"name": "x", "expiresAt": "29990101T000000Z"},  # ISO 8601, but not RFC 3339
        {"name": "x", "expiresAt": "2999-W01-1T00:00:00Z"},
        {"name": "x", "expiresAt": "9999-12-31T23:59:59-23:59"},  # the year 10000 in UTC
        {"name": "x", "scope": "all"},
    ],
)
async def test_wrong_keys(server: Server, body: dict[str, Any]) -> None:
    await server.log_in()
    assert (await server.client.post("/v1/admin/api-keys", json=body)).status_code == 400


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("2999-01-01t00:00:00z", "2999-01-01T00:00:00.000Z"),
        ("2999-01-01T00:00:00.123456789Z", "2999-01-01T00:00:00.123Z"),
        ("9999-12-31T23:59:59Z", "9999-12-31T23:59:59.000Z"),
    ],
)
async def test_times_of_rfc_3339(server: Server, given: str, shown: str) -> None:
    await server.log_in()
    answer = await server.client.post("/v1/admin/api-keys", json={"name": "x", "expiresAt": given})
    assert (answer.status_code, answer.json().get("expiresAt")) == (201, shown)


async def test_revoking(server: Server) -> None:
    await server.log_in()
    unknown = await server.client.post("/v1/admin/api-keys/key-nope/revoke")
    assert (unknown.status_code, unknown.json()["code"]) == (404, "api_key_not_found")
    key_id = (await server.client.post("/v1/admin/api-keys", json={"name": "x"})).json()["id"]
    first = (await server.client.post(f"/v1/admin/api-keys/{key_id}/revoke")).json()["revokedAt"]
    again = (await server.client.post(f"/v1/admin/api-keys/{key_id}/revoke")).json()["revokedAt"]
    assert first == again is not None


async def test_overview(server: Server) -> None:
    vm_id = await server.vm()
    await server.vm()
    await server.client.post(f"/v1/vms/{vm_id}/stop", headers=KEY)
    answer = await server.client.get("/v1/admin/overview", headers=KEY)
    OverviewView.model_validate(answer.json())
    facts = answer.json()
    assert facts["vms"] == {"total": 2, "limit": 100, "byState": {"STOPPED": 1, "RUNNING": 1}}
    assert facts["cpu"]["allocated"] == 1 and facts["memory"]["allocatedMb"] == 256
    assert 0 < facts["disk"]["freeBytes"] <= facts["disk"]["totalBytes"]


async def test_activity(server: Server) -> None:
    await server.log_in()
    caller = Caller("req-1", "manager")
    for vm_id in ("vm-1", "vm-2"):
        await server.store.history.record_activity("vm.died", caller=caller, vm_id=vm_id, reason="out_of_memory")
    answer = await server.client.get("/v1/admin/activity?limit=2", headers=KEY)
    ActivityView.model_validate(answer.json())
    assert [entry["vmId"] for entry in answer.json()["entries"]] == ["vm-2", "vm-1"] and answer.json()["hasMore"]
    whole = (await server.client.get("/v1/admin/activity", headers=KEY)).json()
    assert whole["entries"][-1]["kind"] == "login" and not whole["hasMore"]
    assert (await server.client.get("/v1/admin/activity?limit=0", headers=KEY)).status_code == 400


async def test_leaks_are_shown_and_healed(server: Server) -> None:
    server.vms.leaks = [Leak(LeakKind.LINK, "rds0-300", None), Leak(LeakKind.CGROUP, "/x/vm-1", "vm-1")]
    answer = await server.client.get("/v1/admin/leaks", headers=KEY)
    LeaksView.model_validate(answer.json())
    assert answer.json()["leaks"][0] == {"kind": "link", "name": "rds0-300", "vmId": None}
    healed = await server.client.post("/v1/admin/reconcile", headers=KEY)
    HealingView.model_validate(healed.json())
    assert [leak["kind"] for leak in healed.json()["healed"]] == ["link", "cgroup"]
    assert (await server.client.get("/v1/admin/leaks", headers=KEY)).json() == {"leaks": []}
