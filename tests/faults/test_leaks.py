"""The audit finds what is planted, of every kind, and reconciliation removes it; what is foreign stays."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import time
from pathlib import Path

from lives import Lives

from rundatsheesh.manager.host.cgroup_layout import find_layout
from rundatsheesh.manager.host.cgroups import Cgroups, Limits
from rundatsheesh.manager.model import Slot, new_vm_id
from rundatsheesh.manager.vms_layout import is_managed


def run(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


def test_nothing_leaks_from_vms_at_work_and_at_rest(lives: Lives) -> None:
    working, resting = lives.create()["id"], lives.create()["id"]
    lives.http.post(f"/v1/vms/{resting}/stop").raise_for_status()
    assert lives.leaks() == []
    assert lives.reconcile() == {"healed": [], "remaining": []}
    assert lives.exec(working, "echo here") == "here\n"


def test_leaks_are_found_from_outside_whether_the_server_runs_or_not(lives: Lives) -> None:
    working = lives.create()["id"]
    assert lives.doctor() == (0, set())
    assert is_managed(lives.storage)
    lives.end(signal.SIGKILL)
    assert not is_managed(lives.storage)
    assert lives.doctor() == (0, set()), "VMs outlive the server"
    planted = lives.storage / "vms" / new_vm_id()
    planted.mkdir()
    with sqlite3.connect(lives.storage / "rds.db") as database:
        database.execute("UPDATE vms SET state = 'STOPPING' WHERE id = ?", (working,))
    database.close()
    assert lives.doctor() == (1, {("directory", planted.name), ("record", working)})
    lives.live()
    assert lives.reconcile()["remaining"] == []
    assert lives.doctor() == (0, set())
    assert not planted.exists() and lives.get(working)["state"] == "STOPPED"
    lives.delete_all()


def test_ten_planted_leaks_are_found_and_removed(lives: Lives) -> None:
    node = json.loads((lives.storage / "node.json").read_text())
    ids = {kind: new_vm_id() for kind in ("process", "mount", "loop_device", "directory", "socket", "cgroup")}
    slots = {kind: Slot(node["block"] * 1024 + 900 + i) for i, kind in enumerate(("link", "namespace", "rules"))}
    groups = Cgroups(find_layout(), f"rundatsheesh-{node['id']}")
    for kind in ("process", "cgroup"):
        groups.group(ids[kind]).create(Limits(1, 64 << 20, 64))
    sleeper = subprocess.Popen(
        groups.group(ids["process"]).entering(["sleep", "1000"]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    run("ip", "link", "add", slots["link"].link, "type", "veth", "peer", "name", f"rdsy-{os.getpid() % 10000}")
    run("ip", "netns", "add", slots["namespace"].netns)
    foreign = f"rdsx-{os.getpid() % 10000}"
    run("ip", "netns", "add", foreign)
    table = f"rundatsheesh_{node['block']}"
    guest = f'"{slots["rules"].link}" . {slots["rules"].guest_ip}'
    run("nft", f"add element inet {table} guests {{ {guest} }}")
    vms, runtime = lives.storage / "vms", lives.runtime / node["id"]
    (vms / ids["directory"]).mkdir()
    (vms / ids["mount"] / "workspace").mkdir(parents=True)
    run("mount", "-t", "tmpfs", "none", str(vms / ids["mount"] / "workspace"))
    disk = vms / ids["loop_device"] / "workspace.img"
    disk.parent.mkdir()
    disk.write_bytes(bytes(1 << 20))
    loop = run("losetup", "--find", "--show", str(disk))
    (runtime / ids["socket"]).mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(runtime / ids["socket"] / "qmp.sock"))
    strange = vms / "backup-of-somebody"
    strange.mkdir()
    dead = lives.create()["id"]
    lives.http.post(f"/v1/vms/{dead}/stop").raise_for_status()
    with sqlite3.connect(lives.storage / "rds.db") as database:
        database.execute("UPDATE vms SET state = 'RUNNING' WHERE id = ?", (dead,))
    database.close()

    found = {(leak["kind"], leak["vmId"]) for leak in lives.leaks()}
    planted = set(ids.items()) | {(kind, None) for kind in slots} | {("record", dead)}
    assert len({kind for kind, _ in planted}) == len(planted) == 10
    assert planted <= found
    assert lives.doctor() == (1, found), "from outside it looks the same"
    assert (vms / ids["directory"]).is_dir(), "and looking changes nothing"

    began = time.monotonic()
    done = lives.reconcile()
    assert time.monotonic() - began < 30
    assert done["remaining"] == []
    assert planted <= {(leak["kind"], leak["vmId"]) for leak in done["healed"]}
    assert lives.leaks() == []
    assert sleeper.wait(10) == -9
    assert not (vms / ids["mount"]).exists() and not (runtime / ids["socket"]).exists()
    assert loop not in run("losetup", "--list", "--noheadings", "--output", "NAME").split()
    assert slots["link"].link not in {name for _, name in socket.if_nameindex()}
    assert slots["rules"].link not in run("nft", "list", "table", "inet", table)
    assert (lives.get(dead)["state"], lives.get(dead)["reason"]) == ("ERROR", "ended_unattended")
    assert strange.is_dir() and Path("/run/netns", foreign).exists()
    strange.rmdir()
    run("ip", "netns", "delete", foreign)
