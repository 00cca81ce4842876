"""The manager is killed at every step of what it does to a VM. The next one leaves it as it was or as it should be.

`WALK_EVERY=1` walks all steps; without it every twelfth is walked.
"""

from __future__ import annotations

import io
import os
import signal
import tarfile
from collections.abc import Callable
from dataclasses import dataclass

import httpx
import pytest
from lives import Lives

EVERY = int(os.environ.get("WALK_EVERY", "12"))
CONTENT = os.urandom(300_000)


@dataclass(frozen=True)
class Operation:
    before: str  # state of the VM before; empty where there is none
    after: str
    run: Callable[[Lives, str], httpx.Response]


def upload(lives: Lives, vm_id: str) -> httpx.Response:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        member = tarfile.TarInfo("uploaded")
        member.size = len(CONTENT)
        tar.addfile(member, io.BytesIO(CONTENT))
    return lives.http.post(
        f"/v1/vms/{vm_id}/files/upload",
        params={"dest": "/workspace"},
        content=packed.getvalue(),
        headers={"content-type": "application/gzip"},
    )


def create(lives: Lives, _: str) -> httpx.Response:
    return lives.http.post("/v1/vms", json={"cpu": 1, "memMb": 192, "allowIps": [], "diskSizeMb": 64})


OPERATIONS = {
    "create": Operation("", "RUNNING", create),
    "start": Operation("STOPPED", "RUNNING", lambda lives, vm_id: lives.http.post(f"/v1/vms/{vm_id}/start")),
    "stop": Operation("RUNNING", "STOPPED", lambda lives, vm_id: lives.http.post(f"/v1/vms/{vm_id}/stop")),
    "destroy": Operation("RUNNING", "", lambda lives, vm_id: lives.http.delete(f"/v1/vms/{vm_id}")),
    "upload": Operation("RUNNING", "RUNNING", upload),
}


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_killed_at_every_step(lives: Lives, name: str) -> None:
    operation = OPERATIONS[name]
    lives.delete_all()
    vm_id = prepared(lives, operation, "")
    lives.arm()
    assert operation.run(lives, vm_id).is_success
    steps = lives.steps()
    assert len(steps) >= 2
    vm_id = restarted(lives)
    first = list(OPERATIONS).index(name) % EVERY
    for number in range(first, len(steps), EVERY):
        vm_id = prepared(lives, operation, vm_id)
        lives.arm(number)
        try:
            answer = operation.run(lives, vm_id)
        except httpx.HTTPError:
            answer = None
        # The order of steps that run side by side is not the same each time, so it may have ended before this one.
        killed = answer is None
        if not killed:
            lives.end(signal.SIGKILL)
        else:
            assert lives.ended() == -signal.SIGKILL
        where = lives.steps()[-1]
        lives.live()
        if number % 2:  # and once more, while the first crash is being cleaned up
            lives.end(signal.SIGKILL)
            lives.live()
        vm_id = judge(lives, operation, vm_id, f"{name}, step {number} ({where})")


def prepared(lives: Lives, operation: Operation, vm_id: str) -> str:
    """The id of a VM in the state that the operation starts from."""
    if not operation.before:
        lives.delete_all()
        return ""
    if not vm_id:
        vm_id = lives.create()["id"]
        lives.exec(vm_id, "echo kept > file && sync")
    state = lives.get(vm_id)["state"]
    if state != operation.before:
        verb = "stop" if operation.before == "STOPPED" else "start"
        lives.http.post(f"/v1/vms/{vm_id}/{verb}").raise_for_status()
    return vm_id


def restarted(lives: Lives) -> str:
    lives.end(signal.SIGKILL)
    lives.live()
    vms = lives.vms()
    return str(vms[0]["id"]) if vms else ""


def judge(lives: Lives, operation: Operation, vm_id: str, where: str) -> str:
    """Nothing differs, and the VM is in one of the two states and works; its id, empty where there is none."""
    assert lives.leaks() == [], where
    vms = lives.vms()
    assert len(vms) <= 1, (where, vms)
    state = vms[0]["state"] if vms else ""
    assert state in (operation.before, operation.after), (where, vms)
    print(f"{where}: {state or 'no VM'}")
    if not vms:
        return ""
    found = str(vms[0]["id"])
    assert vm_id in ("", found), where
    if state == "RUNNING":
        assert lives.exec(found, "cat file 2>/dev/null || true") == ("kept\n" if vm_id else ""), where
        size = lives.exec(found, "stat -c %s uploaded 2>/dev/null || true").strip()
        assert size in ("", str(len(CONTENT))), (where, size)
        lives.exec(found, "rm -f uploaded")
    return found
