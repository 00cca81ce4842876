"""A VM that takes all it can get harms itself, is told so, and idles for free."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from server_support import Box, Server, eventually

NewVm = Callable[..., Box]


@pytest.fixture
def neighbour(server: Server, engine: str) -> Iterator[Box]:
    """Must not notice anything."""
    made = server.create(engine)
    yield made
    assert made.output("echo fine") == "fine\n"
    assert made.look()["state"] == "RUNNING"
    made.delete()


def processes_of(box: Box) -> list[int]:
    """On the host, by the control group that bears the VM's name."""
    groups = Path("/proc").glob("[0-9]*/cgroup")
    return [int(group.parent.name) for group in groups if box.id in read_or_nothing(group)]


def read_or_nothing(path: Path) -> str:
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


@pytest.mark.every_engine
def test_a_dead_vm_is_not_shown_alive(vm: NewVm) -> None:
    """From the moment that a call was told of its end."""
    box = vm(memMb=256)
    with ThreadPoolExecutor() as threads:
        told = threads.submit(lambda: (box.post("exec", {"cmd": "sleep 60"}), box.look()["state"]))
        eventually(lambda: box.output("pgrep -x sleep || true") != "", box.scale(10), "the call runs")
        for pid in processes_of(box):
            os.kill(pid, signal.SIGKILL)
        answer, state = told.result()
    assert (answer.status_code, answer.json()["code"], state) == (502, "guest_died", "ERROR"), answer.text
    reason = answer.json()["details"]["reason"]
    said = rf"manager: ended: {reason}, .*memory 256 MiB, with its engine at most \d+ MiB in use$"
    assert re.search(said, box.engine_log()), box.engine_log()


@pytest.mark.every_engine
def test_out_of_memory(vm: NewVm, neighbour: Box) -> None:
    box = vm(memMb=256)
    box.output("echo kept > file; sync")
    answer = box.post("exec", {"cmd": "echo before; python3 -c 'x = bytearray(b\"x\") * (1 << 30)'; echo after $?"})
    if answer.status_code == 200:
        assert "after 137" in answer.json()["stdout"] or "MemoryError" in answer.json()["stderr"], answer.text
    else:
        assert (answer.status_code, answer.json()["code"]) == (502, "guest_died"), answer.text
        details = answer.json()["details"]
        assert details["reason"] == "out_of_memory"
        assert details["stdout"] == "before\n", "the output so far is kept"
        refused = box.post("exec", {"cmd": "true"})
        assert (refused.status_code, refused.json()["code"]) == (409, "wrong_state")
        assert "out_of_memory" in refused.text, "the next call says what happened"
        assert (box.look()["state"], box.seen["reason"]) == ("ERROR", "out_of_memory")
        said = box.engine_log().splitlines()[-1]
        assert re.search(r"ended: out_of_memory, .*memory 256 MiB, .* killed for lack of memory: [1-9]", said), said
        assert box.post("start").status_code == 204
    assert box.output("cat file") == "kept\n"
    assert "reason" not in box.look()


def test_memory_filled_with_files(vm: NewVm, neighbour: Box) -> None:
    box = vm(memMb=256)
    answer = box.post("exec", {"cmd": "head -c 1G /dev/zero > /tmp/a; head -c 1G /dev/zero > /dev/shm/b; df /tmp"})
    assert answer.status_code == 200, "temporary directories are smaller than the memory"
    box.output("rm /tmp/a /dev/shm/b")


def test_a_fork_bomb(vm: NewVm, neighbour: Box) -> None:
    box = vm(memMb=512)
    begun = time.monotonic()
    answer = box.post("exec", {"cmd": ":(){ :|:& };:; sleep 99", "timeoutMs": 3000})
    assert time.monotonic() - begun < box.scale(20)
    assert neighbour.output("echo alive") == "alive\n"
    if answer.status_code == 200:
        assert answer.json()["timedOut"] is True, answer.text
        # On a busy host killing takes longer than an answer waits for it, and goes on behind it.
        gone = "pgrep -c -u user sleep || true"
        eventually(lambda: box.output(gone) == "0\n", box.scale(20), "the whole tree is gone")
    else:
        assert (answer.status_code, answer.json()["details"]["reason"]) == (502, "out_of_memory"), answer.text
        assert "out_of_memory" in box.post("exec", {"cmd": "true"}).text
        assert box.post("start").status_code == 204
    assert box.output("echo back") == "back\n"


def test_a_full_disk(vm: NewVm, neighbour: Box) -> None:
    box = vm(diskSizeMb=64)
    done = box.exec("head -c 200M /dev/zero > big; echo $?")
    assert done["stdout"] == "1\n" and "No space left" in done["stderr"]
    size = int(box.output("stat -c %s big"))
    assert 30 << 20 < size < 64 << 20
    assert box.ts("console.log(1)")["stdout"] == "1\n"
    box.output("rm big && head -c 20M /dev/zero > small && rm small")


def test_too_many_open_files(vm: NewVm, neighbour: Box) -> None:
    box = vm()
    code = "import os; held = [os.open('/dev/null', 0) for _ in range(100_000)]"
    done = box.exec(f'python3 -c "{code}"')
    assert done["exitCode"] == 1 and "Too many open files" in done["stderr"]
    assert box.output("echo fine") == "fine\n"


def test_cpu_is_bounded(vm: NewVm) -> None:
    box = vm(cpu=1)
    burn = "timeout 2 python3 -c 'while True: pass' &"
    begun = time.monotonic()
    spent = box.output(f"bash -c '{burn * 3} wait'; times | tail -1").split()
    took = time.monotonic() - begun  # two seconds, and more where the host is busy
    user = float(spent[0].removeprefix("0m").removesuffix("s"))
    assert user < 1.5 * took, f"three loops for {took} s took {user} s of one CPU"


def cgroup_of(box: Box, controller: str) -> Path:
    node = f"rundatsheesh-{box.server.node['id']}"
    found = [*Path("/sys/fs/cgroup").glob(f"{node}/{box.id}"), *Path("/sys/fs/cgroup").glob(f"*/{node}/{box.id}")]
    return next(path for path in found if any(path.glob(f"{controller}*")))


def is_frozen(box: Box) -> bool:
    node = f"rundatsheesh-{box.server.node['id']}"
    unified = [*Path("/sys/fs/cgroup").glob(f"{node}/{box.id}/cgroup.events")]
    unified += Path("/sys/fs/cgroup").glob(f"*/{node}/{box.id}/cgroup.events")
    states = Path("/sys/fs/cgroup").glob(f"freezer/{node}/{box.id}/freezer.state")
    return any("frozen 1" in path.read_text() for path in unified) or any("FROZEN" in p.read_text() for p in states)


def cpu_seconds(box: Box) -> float:
    group = cgroup_of(box, "cpuacct.usage" if Path("/sys/fs/cgroup/cpuacct").exists() else "cpu.stat")
    if (group / "cpuacct.usage").exists():
        return int((group / "cpuacct.usage").read_text()) / 1e9
    return int((group / "cpu.stat").read_text().split()[1]) / 1e6


def test_an_idle_vm_is_frozen_and_costs_no_cpu(vm: NewVm) -> None:
    box = vm()
    box.output("echo used")
    eventually(lambda: is_frozen(box), box.scale(5), "frozen when idle")
    before = cpu_seconds(box)
    time.sleep(2)
    assert cpu_seconds(box) - before < 0.005
    assert box.output("echo awake") == "awake\n", "the next call thaws it"
    box.output("setsid sleep 999 > /dev/null 2>&1 & disown")
    time.sleep(box.scale(1))
    assert not is_frozen(box), "a background process keeps it awake"
    box.output("pkill -x sleep")
    eventually(lambda: is_frozen(box), box.scale(5), "frozen again")
