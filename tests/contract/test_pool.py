"""The warm pool: VMs that wait for their caller, and cannot be told from others afterwards."""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from server_support import Box, Dns, Server, eventually, scale

TARGET = 2
POOL = {"ENABLE_WARM_POOL": "true", "WARM_POOL_TARGET": str(TARGET), "WARM_POOL_MAX_VMS": "3", "MAX_VMS": "3"}


@pytest.fixture(scope="module")
def pooled(directory: Path, dns: Dns) -> Iterator[Server]:
    """A server that keeps VMs warm; when it has ended, none of them is left."""
    name = secrets.token_hex(3)
    settings = {"DNS_SERVER_IP": dns.address, **POOL}
    with Server(directory / name, Path("/run") / f"rdst-{name}", settings).running() as started:
        yield started


def warm_ids(server: Server) -> set[str]:
    """Those that have booted and wait, by the server's own records."""
    query = "SELECT id FROM vms WHERE state = 'WARM' AND boot_id IS NOT NULL"
    with sqlite3.connect(f"file:{server.storage / 'rds.db'}?mode=ro", uri=True) as records:
        return {row[0] for row in records.execute(query)}


def full(server: Server) -> set[str]:
    eventually(lambda: len(warm_ids(server)) >= TARGET, scale(20), "the pool is full")
    return warm_ids(server)


def frozen(server: Server, vm_id: str) -> bool:
    groups = Path("/sys/fs/cgroup").glob(f"**/rundatsheesh-{server.node['id']}/{vm_id}")
    for group in groups:
        if (group / "freezer.state").exists():
            return (group / "freezer.state").read_text().strip() == "FROZEN"
        if (group / "cgroup.freeze").exists() and "frozen 1" in (group / "cgroup.events").read_text():
            return True
    return False


def test_nobody_sees_a_warm_vm(pooled: Server) -> None:
    waiting = full(pooled)
    assert pooled.http.get("/v1/vms").json() == []
    for vm_id in waiting:
        for answer in (
            pooled.http.get(f"/v1/vms/{vm_id}"),
            pooled.http.delete(f"/v1/vms/{vm_id}"),
            pooled.http.post(f"/v1/vms/{vm_id}/stop"),
            pooled.http.post(f"/v1/vms/{vm_id}/exec", json={"cmd": "true"}),
        ):
            assert (answer.status_code, answer.json()["code"]) == (404, "vm_not_found"), answer.request.url
    assert pooled.http.get("/v1/admin/overview").json()["vms"].get("WARM") is None


def test_warm_vms_are_frozen(pooled: Server) -> None:
    for vm_id in full(pooled):
        eventually(lambda vm_id=vm_id: frozen(pooled, vm_id), scale(5), f"{vm_id} is frozen")  # type: ignore[misc]


def test_a_claimed_vm_is_its_callers_in_everything(pooled: Server) -> None:
    waiting = full(pooled)
    vm = pooled.create("gvisor", name="mine", labels={"of": "me"}, allowIps=["172.16.0.1/32"], outboundInternet=True)
    assert vm.id in waiting
    assert vm.look() == vm.seen
    assert (vm.seen["name"], vm.seen["labels"], vm.seen["allowIps"]) == ("mine", {"of": "me"}, ["172.16.0.1/32"])
    assert vm.seen["createdAt"] <= vm.seen["startedAt"]
    answer = vm.call("exec", cmd="hostname; id -u; ls -A /workspace")
    assert answer["stdout"].split() == [vm.id, "1000"]
    started, given = vm.engine_log().splitlines()
    assert " ms, to be kept warm: engine gvisor " in started and "given to its caller" in given
    vm.delete()


def test_its_policy_is_in_force_at_once(pooled: Server) -> None:
    full(pooled)
    reach = f"curl -sS -m 5 -o /dev/null http://172.16.0.1:{pooled.url.rsplit(':', 1)[1]}/"
    closed = pooled.create("gvisor", allowIps=["172.16.0.1/32"], outboundInternet=False)
    assert closed.call("exec", cmd=reach)["exitCode"] == 7
    closed.delete()


def test_two_callers_never_get_the_same(pooled: Server) -> None:
    full(pooled)
    made = [pooled.create("gvisor") for _ in range(3)]
    assert len({vm.id for vm in made}) == len({vm.ip for vm in made}) == 3
    refused = pooled.http.post("/v1/vms", json={"cpu": 1, "memMb": 256, "allowIps": []})
    assert (refused.status_code, refused.json()["code"]) == (429, "quota_exceeded")
    assert int(refused.headers["retry-after"]) > 0
    kept = full(pooled)  # a refusal costs no warm VM
    assert pooled.http.post("/v1/vms", json={"cpu": 1, "memMb": 256, "allowIps": []}).status_code == 429
    assert warm_ids(pooled) == kept
    for vm in made:
        vm.delete()


def test_another_shape_boots_and_is_warm_the_next_time(pooled: Server) -> None:
    full(pooled)
    first: Box = pooled.create("gvisor", memMb=192)
    assert first.call("exec", cmd="true")["exitCode"] == 0
    first.delete()

    def follows() -> bool:
        query = "SELECT count(*) FROM vms WHERE state = 'WARM' AND boot_id IS NOT NULL AND mem_mb = 192"
        with sqlite3.connect(f"file:{pooled.storage / 'rds.db'}?mode=ro", uri=True) as records:
            return bool(records.execute(query).fetchone()[0] == TARGET)

    eventually(follows, scale(20), "the pool follows demand")
