"""The life of a sandbox as the engine's user sees it: start, use, freeze, adopt, stop, start again."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import pickle
import time
from pathlib import Path

import pytest
from gvisor_support import MEM_MB, Lab, call, in_another_manager, open_lab
from gvisor_support import guest_root as guest_root
from gvisor_support import lab as lab

from rundatsheesh.manager.engines.base import Capability
from rundatsheesh.manager.errors import EngineError
from rundatsheesh.manager.host import mounts
from server_support import promised

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="sandboxes need root")


def test_this_host_can_run_it(lab: Lab) -> None:
    availability = lab.engine.available()
    assert availability.usable, availability
    assert "runsc" in availability.fact
    assert lab.engine.capabilities == {Capability.FREEZE}


async def test_the_guest_is_what_the_record_says(lab: Lab) -> None:
    machine = await lab.start()
    told = await call(machine, "hostname; cd /etc; cat hostname resolv.conf machine-id; grep MemTotal /proc/meminfo")
    lines = told.splitlines()
    assert lines[:3] == [lab.record.id, lab.record.id, "nameserver 172.16.0.1"]
    assert len(lines[3]) == 32
    assert lines[4].split()[1] == str(MEM_MB * 1024)
    assert await call(machine, "id -u; pwd", as_user=True) == "1000\n/\n"
    assert str(lab.record.slot.guest_ip) in await call(machine, "cat /etc/hosts")
    routes = await call(machine, "cat /proc/net/route")
    assert [line.split()[0] for line in routes.splitlines()[1:]] == ["eth0", "eth0"]


async def test_files_survive_a_stop_and_processes_do_not(lab: Lab) -> None:
    machine = await lab.start()
    await call(machine, "echo kept > /workspace/file; (setsid sleep 1000 &) > /dev/null 2>&1", as_user=True)
    await machine.stop(0)
    assert (await machine.wait()).reason == "stopped"
    assert lab.cgroup.pids() == []
    machine = await lab.start()
    assert await call(machine, "cat /workspace/file; ls -ld /workspace | cut -d' ' -f3") == "kept\nuser\n"
    assert "sleep" not in await call(machine, "cat /proc/[0-9]*/comm")


async def test_a_frozen_guest_uses_no_cpu_and_goes_on_when_thawed(lab: Lab) -> None:
    machine = await lab.start()
    await call(machine, "(while :; do :; done) > /dev/null 2>&1 &", as_user=True)
    before = time.monotonic()
    await machine.freeze()
    assert time.monotonic() - before < promised(1)
    used = lab.cgroup.usage().cpu_ns
    await asyncio.sleep(0.5)
    assert lab.cgroup.usage().cpu_ns == used
    await machine.thaw()
    await machine.thaw()
    assert await call(machine, "echo here") == "here\n"
    assert lab.cgroup.usage().cpu_ns > used


async def test_many_connections_at_once(lab: Lab) -> None:
    machine = await lab.start()
    told = await asyncio.gather(*(call(machine, f"echo {number}") for number in range(20)))
    assert told == [f"{number}\n" for number in range(20)]


async def test_it_outlives_its_manager_and_is_adopted(lab: Lab) -> None:
    """Another interpreter starts the guest and ends; this one finds it, frozen as it was left, and uses it."""
    told = await in_another_manager(
        """
import asyncio, pickle, sys
sys.path.insert(0, sys.argv[1])
from gvisor_support import call

async def main():
    lab = pickle.loads(bytes.fromhex(sys.argv[2]))
    machine = await lab.start()
    print(await call(machine, "echo first > /dev/shm/who; cat /proc/sys/kernel/random/boot_id"))
    await machine.freeze()

asyncio.run(main())
""",
        str(Path(__file__).parent),
        pickle.dumps(lab).hex(),
    )
    assert len(told.strip()) == 36
    machine = await lab.engine.adopt(lab.record, lab.files)
    assert machine is not None
    assert await call(machine, "cat /dev/shm/who /proc/sys/kernel/random/boot_id") == f"first\n{told.strip()}\n"
    waiting = asyncio.create_task(machine.wait())
    await machine.stop(0)
    assert (await waiting).reason == "stopped"


async def test_what_does_not_run_is_not_adopted(lab: Lab) -> None:
    assert await lab.engine.adopt(lab.record, lab.files) is None
    machine = await lab.start()
    other = dataclasses.replace(lab.record, id="vm-0000000000000000")
    assert await lab.engine.adopt(other, lab.files) is None
    os.kill(lab.role("sandbox"), 9)
    await machine.wait()
    assert await lab.engine.adopt(lab.record, lab.files) is None


async def test_release_works_from_every_state(lab: Lab) -> None:
    await lab.engine.release(lab.record, lab.files)
    machine = await lab.start()
    await machine.freeze()
    await lab.engine.release(lab.record, lab.files)
    assert lab.leftovers() == []
    assert (await machine.wait()).reason == "killed"
    await lab.engine.release(lab.record, lab.files)


async def test_logs_stay_where_they_are_looked_for(lab: Lab) -> None:
    for runs in (1, 2):
        machine = await lab.start()
        assert lab.files.console_log.read_text().count("agent up") == runs
        await machine.stop(0)
        await lab.engine.release(lab.record, lab.files)
        assert lab.files.console_log.read_text().count("agent up") == runs
        assert not lab.files.console_log.is_symlink()


async def test_a_guest_without_an_image_is_told_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    async with open_lab(tmp_path, tmp_path / "empty") as lab:
        with pytest.raises(EngineError) as caught:
            await lab.start()
        assert lab.leftovers() == []
        assert caught.value.details["log"] != ""


async def test_a_guest_whose_agent_ends_at_once_is_told_with_its_last_words(tmp_path: Path, guest_root: Path) -> None:
    async with open_lab(tmp_path, guest_root, agent="raise SystemExit('no, thanks')") as lab:
        with pytest.raises(EngineError, match="ended before its agent answered") as caught:
            await lab.start()
        assert "no, thanks" in caught.value.details["log"]
        assert lab.leftovers() == []


async def test_a_guest_whose_agent_never_listens_is_given_up(tmp_path: Path, guest_root: Path) -> None:
    async with open_lab(tmp_path, guest_root, agent="import time\nwhile True: time.sleep(60)") as lab:
        lab.engine.config = dataclasses.replace(lab.engine.config, boot_timeout=3)
        with pytest.raises(EngineError, match="does not listen after 3 s"):
            await lab.start()
        assert lab.leftovers() == []


async def test_a_start_that_is_cancelled_leaves_nothing(lab: Lab) -> None:
    for delay in (0.01, 0.1, 0.2, 0.3):
        starting = asyncio.create_task(lab.start())
        await asyncio.wait([starting], timeout=delay)
        if not starting.cancel():
            assert delay > 0.1, "no start is over so soon"
            return
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert lab.leftovers() == []


async def test_one_guest_does_not_keep_anothers_files_busy(tmp_path: Path, guest_root: Path) -> None:
    """The second is started while the first's disk is mounted, and outlives it."""
    async with open_lab(tmp_path / "1", guest_root, 1) as first, open_lab(tmp_path / "2", guest_root, 2) as second:
        one = await first.start()
        two = await second.start()
        seen = Path(f"/proc/{second.role('runsc')}/mountinfo").read_text()
        assert first.record.id not in seen
        targets = {str(mounted.target) for mounted in mounts.parse_mountinfo(seen)}
        assert {"/", "/image", "/workspace"} <= targets
        assert not any(target.startswith(("/home", "/root", "/var", "/etc", "/run")) for target in targets)
        await one.stop(0)
        await first.engine.release(first.record, first.files)
        assert first.leftovers() == []
        assert await call(two, "echo still here") == "still here\n"
