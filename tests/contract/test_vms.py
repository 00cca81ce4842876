"""The life of a VM: create, look, list, stop, start, delete, logs."""

from __future__ import annotations

import ipaddress
import re
import threading
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest

from server_support import Box, Server, eventually, scale

NewVm = Callable[..., Box]

FIELDS = [
    "id",
    "state",
    "cpu",
    "memMb",
    "guestIp",
    "allowIps",
    "outboundInternet",
    "engine",
    "isolation",
    "provisionMode",
    "imageId",
    "labels",
    "allowDomains",
    "createdAt",
    "startedAt",
    "bootId",
]


@pytest.mark.every_engine
def test_the_vm_object(box: Box, engine: str) -> None:
    seen = box.look()
    assert set(FIELDS) <= set(seen)
    assert re.fullmatch(r"vm-[0-9a-f]{16}", seen["id"])
    assert seen["state"] == "RUNNING" and seen["engine"] == engine
    allowed = {"gvisor": ["application-kernel"], "qemu": ["hardware-vm", "emulated-vm"]}
    assert seen["isolation"] in allowed[engine]
    assert seen["provisionMode"] in ("boot", "snapshot")
    assert ipaddress.ip_address(seen["guestIp"]) in ipaddress.ip_network("172.16.0.0/12")
    assert seen["allowIps"] == [] and seen["outboundInternet"] is False and seen["labels"] == {}
    for name in ("createdAt", "startedAt"):
        assert seen[name].endswith("Z") and datetime.fromisoformat(seen[name])
    assert seen["bootId"] and "reason" not in seen


def test_the_guest_has_answered_before_201(vm: NewVm) -> None:
    assert vm().output("echo up") == "up\n"


def test_every_accepted_field_has_an_effect(vm: NewVm) -> None:
    box = vm(
        cpu=2,
        memMb=384,
        name="the name",
        labels={"team": "red", "stage": "test"},
        diskSizeMb=128,
        allowIps=["192.0.2.1", "198.51.100.0/24"],
        imageId=vm().seen["imageId"],
    )
    assert (box.seen["cpu"], box.seen["memMb"], box.seen["name"]) == (2, 384, "the name")
    assert box.seen["labels"] == {"team": "red", "stage": "test"}
    assert box.seen["allowIps"] == ["192.0.2.1/32", "198.51.100.0/24"]
    assert box.output("nproc") == "2\n"
    total = int(box.output("awk '/MemTotal/ { print $2 }' /proc/meminfo"))
    assert 300 << 10 < total <= 384 << 10
    size = int(box.output("df -B1M --output=size /workspace | tail -1"))
    assert 90 <= size <= 128


def test_lists_and_filters(server: Server, vm: NewVm) -> None:
    red, blue = vm(labels={"colour": "red", "n": "1"}), vm(labels={"colour": "blue", "n": "1"})

    def ids(*query: tuple[str, str]) -> set[str]:
        return {seen["id"] for seen in server.http.get("/v1/vms", params=list(query)).raise_for_status().json()}

    assert {red.id, blue.id} <= ids()
    assert ids(("label", "colour=red")) == {red.id}
    assert ids(("label", "n=1")) == {red.id, blue.id}
    assert ids(("label", "n=1"), ("label", "colour=blue")) == {blue.id}
    assert ids(("label", "colour=green")) == set()
    assert {red.id, blue.id} <= ids(("state", "RUNNING")) and red.id not in ids(("state", "STOPPED"))
    assert server.http.get("/v1/vms", params={"state": "SLEEPING"}).status_code == 400
    assert server.http.get("/v1/vms", params={"label": "novalue"}).status_code == 400


def test_an_unknown_vm_is_404_everywhere(server: Server) -> None:
    gone = "/v1/vms/vm-0000000000000000"
    calls: list[tuple[str, str, Any]] = [
        ("GET", "", None),
        ("DELETE", "", None),
        ("POST", "/start", None),
        ("POST", "/stop", None),
        ("GET", "/logs", None),
        ("GET", "/exec-logs", None),
        ("POST", "/exec", {"cmd": "true"}),
        ("POST", "/run-ts", {"code": "1"}),
        ("POST", "/run-js", {"code": "1"}),
        ("POST", "/files/upload?dest=/workspace", None),
        ("GET", "/files/download?path=/workspace", None),
    ]
    for method, path, body in calls:
        headers = {"content-type": "application/gzip"} if "upload" in path else {}
        answer = server.http.request(method, gone + path, json=body, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (404, "vm_not_found"), (method, path, answer.text)


@pytest.mark.every_engine
def test_stop_and_start(server: Server, vm: NewVm) -> None:
    box = vm()
    box.output("echo kept > file; echo lost > /tmp/file; setsid sleep 1000 >/dev/null 2>&1 & disown")
    before = box.look()
    assert box.post("stop").status_code == 204
    stopped = box.look()
    assert stopped["state"] == "STOPPED" and "reason" not in stopped
    for verb, body in (("exec", {"cmd": "true"}), ("run-ts", {"code": "1"}), ("stop", None)):
        refused = box.post(verb, body)
        assert (refused.status_code, refused.json()["code"]) == (409, "wrong_state")
        assert refused.json()["details"]["state"] == "STOPPED"
    assert box.upload(b"").status_code == 409 and box.download("/workspace").status_code == 409
    assert box.post("start").status_code == 204
    after = box.look()
    assert after["state"] == "RUNNING"
    assert after["bootId"] != before["bootId"] and after["startedAt"] > before["startedAt"]
    assert {name: after[name] for name in ("id", "guestIp", "createdAt")} == {
        name: before[name] for name in ("id", "guestIp", "createdAt")
    }
    assert box.output("cat file; ls /tmp; pgrep sleep || true") == "kept\n"
    assert box.post("start").status_code == 409


@pytest.mark.every_engine
def test_delete_leaves_nothing(server: Server, vm: NewVm) -> None:
    box = vm()
    box.output("setsid sleep 1000 >/dev/null 2>&1 & disown; echo x > file")
    assert server.http.delete(box.path).status_code == 204
    mine = [trace for trace in server.traces() if box.id in trace]
    assert mine == [], mine
    for again in (server.http.delete(box.path), server.http.get(box.path)):
        assert (again.status_code, again.json()["code"]) == (404, "vm_not_found")


def test_delete_ends_open_calls(server: Server, vm: NewVm) -> None:
    box = vm()
    answers = []
    caller = threading.Thread(target=lambda: answers.append(box.post("exec", {"cmd": "touch on; sleep 1000"})))
    caller.start()
    eventually(lambda: "on" in box.output("ls"), scale(10), "the command runs")
    assert server.http.delete(box.path).status_code == 204
    caller.join(scale(10))
    assert answers and answers[0].status_code in (404, 409, 502), answers
    assert answers[0].json()["code"] in ("guest_died", "vm_not_found", "wrong_state")


@pytest.mark.every_engine
def test_a_workspace_that_was_closed_is_open_after_a_start(vm: NewVm) -> None:
    box = vm()
    box.output("echo kept > file; chmod 000 /workspace")
    assert box.post("stop").status_code == 204
    assert box.post("start").status_code == 204
    assert box.output("cat file; stat -c %a .") == "kept\n700\n"
    box.output("mkdir away; mv file away; touch new")


def test_a_stopped_vm_can_be_deleted(server: Server, vm: NewVm) -> None:
    box = vm()
    assert box.post("stop").status_code == 204
    assert server.http.delete(box.path).status_code == 204
    assert server.http.get(box.path).status_code == 404


def test_many_at_once_have_addresses_of_their_own(server: Server, vm: NewVm) -> None:
    made: list[Box] = []
    makers = [threading.Thread(target=lambda: made.append(vm())) for _ in range(4)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert len({box.ip for box in made}) == 4
    assert len({box.output("cat /etc/machine-id; head -c 16 /dev/urandom | base64") for box in made}) == 4


def test_logs(server: Server, box: Box) -> None:
    for kind in ("engine", "console"):
        log = server.http.get(f"{box.path}/logs", params={"type": kind, "tail": 3}).raise_for_status().json()
        assert set(log) == {"type", "lines", "truncated", "updatedAt"}
        assert log["type"] == kind and len(log["lines"]) <= 3
        assert log["updatedAt"] >= server.http.get(box.path).json()["createdAt"], "also while it is empty"
    assert server.http.get(f"{box.path}/logs", params={"type": "secret"}).status_code == 400


@pytest.mark.every_engine
def test_the_engines_log_tells_how_a_vm_lived(vm: NewVm, engine: str) -> None:
    box = vm(cpu=1, memMb=256)
    started = rf"\d{{4}}-\d\d-\d\dT[0-9:.]+Z manager: started in \d+ ms: engine {engine} \({box.seen['isolation']}\), "
    assert re.search(started + "boot, cpu 1, memory 256 MiB", box.engine_log()), box.engine_log()
    box.post("stop").raise_for_status()
    assert "stopped: somebody asked for it" in box.engine_log()
    box.post("start").raise_for_status()
    lived = box.engine_log()
    assert len(re.findall(started, lived)) == 2, lived
    assert str(box.server.storage) not in lived and str(box.server.runtime) not in lived


def test_the_execution_log(server: Server, vm: NewVm) -> None:
    box = vm()
    first = box.post("exec", {"cmd": "echo one; exit 3", "env": {"TOKEN": "hush"}}, headers={"X-Request-Id": "log-1"})
    assert first.status_code == 200
    box.js("console.log(1)")
    box.download("/workspace")

    def page(**query: Any) -> dict[str, Any]:
        found: dict[str, Any] = server.http.get(f"{box.path}/exec-logs", params=query).raise_for_status().json()
        return found

    eventually(lambda: len(page()["entries"]) == 3, scale(5), "all calls are logged")
    entries = page()["entries"]
    assert [entry["type"] for entry in entries] == ["download", "run-js", "exec"]
    logged = entries[-1]
    assert (logged["input"], logged["exitCode"], logged["requestId"]) == ("echo one; exit 3", 3, "log-1")
    assert logged["who"] == "key:main" and logged["bytesOut"] == 4 and logged["durationMs"] >= 0
    assert logged["startedAt"] <= logged["finishedAt"]
    assert "hush" not in str(entries)
    assert page(limit=1)["hasMore"] is True and len(page(limit=1)["entries"]) == 1
    assert [entry["type"] for entry in page(type="exec")["entries"]] == ["exec"]
