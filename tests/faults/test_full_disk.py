"""A full storage root is told as what it is; the server lives, deletes, and works again when there is space."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from lives import Lives

from server_support import tgz
from small_disk import fill, filling, small_file_system

SIZE_MB = 700  # above the reserve that the server keeps
LOGIN = {"email": "admin@localhost", "password": "admin"}
HOG = "head -c 1500M /dev/zero > /workspace/fill; sync; exit 0"


@pytest.fixture
def small() -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("servers need root")
    with small_file_system(SIZE_MB) as mounted:
        yield mounted


@pytest.fixture
def lives(small: Path) -> Iterator[Lives]:
    """One server whose storage root ends there. When it ends, nothing of a VM is left on the host."""
    made = Lives(small / "root", Path("/run") / f"rdsf-{secrets.token_hex(3)}", ENGINE="gvisor")
    made.log = small.with_name("log")
    try:
        with made.running():
            yield made
            (small / "filler").unlink(missing_ok=True)
    finally:
        made.log.unlink()


def code(answer: httpx.Response, status: int = 503) -> str:
    """Of an error that says when to try again."""
    assert answer.status_code == status, answer.text
    assert int(answer.headers["Retry-After"]) > 0
    return str(answer.json()["code"])


def hog(lives: Lives) -> str:
    """A VM that has filled the host's disk with less than it was given."""
    vm_id = str(lives.create(diskSizeMb=2048)["id"])
    lives.http.post(f"/v1/vms/{vm_id}/exec", json={"cmd": HOG, "timeoutMs": 120_000})
    return vm_id


def test_a_full_disk_is_told_and_survived(lives: Lives, small: Path) -> None:
    vm_id = lives.create()["id"]
    lives.exec(vm_id, "echo kept > file && sync")
    for leave_mb in (64, 0):
        fill(small / "filler", leave_mb)
        refused = lives.http.post("/v1/vms", json={"cpu": 1, "memMb": 192, "allowIps": [], "diskSizeMb": 64})
        assert code(refused) == "storage_full"
        assert lives.http.get("/health").status_code == 200
        ready = lives.http.get("/health/ready")
        assert (code(ready), "disk is full" in ready.text) == ("not_ready", True)
        assert lives.get(vm_id)["state"] == "RUNNING"
        assert lives.exec(vm_id, "cat file") == "kept\n"
        (small / "filler").unlink()
    assert lives.http.get("/health/ready").status_code == 200
    created = lives.create()["id"]
    assert lives.exec(created, "echo works") == "works\n"
    assert lives.exec(vm_id, "echo more >> file; cat file") == "kept\nmore\n"
    assert lives.leaks() == []


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_what_a_guest_has_filled_can_be_deleted(lives: Lives, small: Path, how: signal.Signals) -> None:
    """By a server that was there, and by one that starts then."""
    first, second, third = (str(lives.create()["id"]) for _ in range(3))
    greedy = hog(lives)
    fill(small / "filler")
    assert lives.http.post("/auth/login", json=LOGIN).status_code == 200
    assert lives.http.post(f"/v1/vms/{first}/stop").status_code == 204
    assert lives.http.delete(f"/v1/vms/{second}").status_code == 204
    fill(small / "filler")
    lives.end(how)
    lives.live(ready=False)
    fill(small / "filler")
    assert code(lives.http.post(f"/v1/vms/{first}/start")) == "storage_full"
    assert lives.get(first)["state"] == "STOPPED"
    for vm_id in (first, third, greedy):
        assert lives.http.delete(f"/v1/vms/{vm_id}").status_code == 204
    (small / "filler").unlink()
    assert lives.http.get("/health/ready").status_code == 200
    lives.reconcile()
    assert (lives.storage / "rds.db-ballast").stat().st_size == 16 << 20
    assert lives.exec(lives.create()["id"], "echo works") == "works\n"


def test_guests_that_take_all_that_becomes_free_keep_nothing_from_being_deleted(lives: Lives, small: Path) -> None:
    vms = [str(lives.create()["id"]) for _ in range(6)]
    with filling(small / "filler"):
        for vm_id in vms[:2]:
            assert lives.http.post(f"/v1/vms/{vm_id}/stop").status_code == 204
        for vm_id in vms[:4]:
            assert lives.http.delete(f"/v1/vms/{vm_id}").status_code == 204
        lives.end(signal.SIGKILL)
        lives.live(ready=False)
        for vm_id in vms[4:]:
            assert lives.http.delete(f"/v1/vms/{vm_id}").status_code == 204
        assert lives.vms() == []


def test_a_workspace_that_takes_no_more_writes_is_told_and_comes_back(lives: Lives, small: Path) -> None:
    neighbour, vm_id = (str(lives.create(diskSizeMb=2048)["id"]) for _ in range(2))
    lives.exec(vm_id, "echo kept > file; sync")
    fill(small / "filler", 400)
    lives.http.post(f"/v1/vms/{vm_id}/exec", json={"cmd": HOG, "timeoutMs": 120_000})
    lives.http.post(f"/v1/vms/{vm_id}/exec", json={"cmd": "mkdir a; sync; mkdir b; sync", "timeoutMs": 60_000})
    lives.reconcile()
    shown = lives.get(vm_id)
    assert (shown["state"], shown["reason"]) == ("STOPPED", "disk_full")
    assert lives.get(neighbour)["state"] == "RUNNING"
    told = lives.http.get("/v1/admin/activity?limit=50").json()["entries"]
    assert ("vm.stop", vm_id, "disk_full") in {(entry["kind"], entry["vmId"], entry.get("reason")) for entry in told}
    assert code(lives.http.post(f"/v1/vms/{vm_id}/start")) == "storage_full"
    (small / "filler").unlink()
    assert lives.http.post(f"/v1/vms/{vm_id}/start").status_code == 204
    assert lives.exec(vm_id, "rm -f fill; echo more >> file; sync; cat file") == "kept\nmore\n"


def test_an_upload_that_finds_no_room_is_told_so(lives: Lives, small: Path) -> None:
    vm_id = lives.create()["id"]
    archive = tgz({"random": os.urandom(3 << 20)})
    fill(small / "filler")
    for _ in range(3):
        answer = lives.http.post(
            f"/v1/vms/{vm_id}/files/upload",
            params={"dest": "/workspace"},
            content=archive,
            headers={"content-type": "application/gzip"},
        )
        assert code(answer) == "storage_full"
    (small / "filler").unlink()
    assert lives.exec(vm_id, "ls -A") == ""


def test_calls_are_noted_once_there_is_room(lives: Lives, small: Path) -> None:
    vm_id = lives.create()["id"]
    fill(small / "filler")
    lives.exec(vm_id, "echo first")
    assert lives.http.get(f"/v1/vms/{vm_id}/exec-logs").status_code == 200
    (small / "filler").unlink()
    lives.exec(vm_id, "echo second")
    noted = lives.http.get(f"/v1/vms/{vm_id}/exec-logs").json()["entries"]
    assert [(entry["input"], entry["exitCode"]) for entry in noted] == [("echo second", 0), ("echo first", 0)]
