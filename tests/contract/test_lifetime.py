"""VMs that end by themselves, and creations that happen once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from conftest import NewVm
from server_support import Server, eventually, scale


def state(server: Server, vm_id: str) -> str | None:
    answer = server.http.get(f"/v1/vms/{vm_id}")
    return None if answer.status_code == 404 else str(answer.json()["state"])


def reasons(server: Server, vm_id: str) -> list[tuple[str, str | None]]:
    entries = server.http.get("/v1/admin/activity?limit=200").json()["entries"]
    return [(entry["kind"], entry["reason"]) for entry in entries if entry["vmId"] == vm_id]


def test_a_vm_is_deleted_when_its_time_has_come(server: Server, vm: NewVm) -> None:
    made = vm(ttlMs=2000)
    eventually(lambda: state(server, made.id) is None, scale(15), "the VM deleted")
    assert ("vm.destroy", "expired") in reasons(server, made.id)


def test_an_extended_vm_lives(server: Server, vm: NewVm) -> None:
    ttl = int(scale(2) * 1000)  # the other's ends after the one that this had
    extended = vm(ttlMs=ttl)
    answer = server.http.patch(f"/v1/vms/{extended.id}", json={"ttlMs": None})
    assert answer.status_code == 200 and "expiresAt" not in answer.json()
    short = vm(ttlMs=ttl)
    eventually(lambda: state(server, short.id) is None, scale(15), "the other one deleted")
    assert state(server, extended.id) == "RUNNING"


def test_only_idle_vms_are_stopped(server: Server, vm: NewVm) -> None:
    """A process in the background keeps its VM up; without one it stops, and keeps its files."""
    timeout = int(scale(1) * 1000)
    busy = vm(idleTimeoutMs=timeout)
    start = {"cmd": "echo kept > file; setsid sleep 600 >/dev/null 2>&1 </dev/null &"}
    assert server.http.post(f"/v1/vms/{busy.id}/exec", json=start).status_code == 200
    idle = vm(idleTimeoutMs=timeout)
    eventually(lambda: state(server, idle.id) == "STOPPED", scale(20), "the idle VM stopped")
    assert server.http.get(f"/v1/vms/{idle.id}").json()["reason"] == "idle"
    assert state(server, busy.id) == "RUNNING"
    refused = server.http.post(f"/v1/vms/{idle.id}/exec", json={"cmd": "true"})
    assert refused.status_code == 409 and refused.json()["details"]["reason"] == "idle"
    server.http.post(f"/v1/vms/{busy.id}/exec", json={"cmd": "pkill -x sleep"})
    eventually(lambda: state(server, busy.id) == "STOPPED", scale(20), "the other VM stopped")
    assert server.http.post(f"/v1/vms/{busy.id}/start").status_code == 204
    read = server.http.post(f"/v1/vms/{busy.id}/exec", json={"cmd": "cat file"})
    assert read.json()["stdout"] == "kept\n"


def test_a_creation_that_is_repeated_makes_one_vm(server: Server, engine: str) -> None:
    body = {"cpu": 1, "memMb": 256, "allowIps": [], "engine": engine, "name": "once"}

    def create(_: int) -> Any:
        return server.http.post("/v1/vms", json=body, headers={"Idempotency-Key": f"once-{engine}"}).json()["id"]

    with ThreadPoolExecutor(3) as pool:
        made = set(pool.map(create, range(3)))
    named = [found["id"] for found in server.http.get("/v1/vms").json() if found.get("name") == "once"]
    assert list(made) == named
    assert server.http.delete(f"/v1/vms/{named[0]}").status_code == 204
