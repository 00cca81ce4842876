"""How a sandbox ends without being asked to, that it is noticed at once, and which reason is told."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest
from gvisor_support import Lab, call
from gvisor_support import guest_root as guest_root
from gvisor_support import lab as lab

from rundatsheesh.manager.errors import EngineError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="sandboxes need root")

AT_ONCE = 5.0  # seconds; some ten milliseconds on an idle host


@pytest.mark.parametrize("role", ["runsc", "gofer", "sandbox"])
@pytest.mark.parametrize("frozen", [False, True], ids=["running", "frozen"])
async def test_the_end_of_any_process_is_the_end_of_all(lab: Lab, role: str, frozen: bool) -> None:
    machine = await lab.start()
    victim = lab.role(role)
    if frozen:
        await machine.freeze()
    os.kill(victim, signal.SIGKILL)
    before = time.monotonic()
    end = await asyncio.wait_for(machine.wait(), 30)
    assert time.monotonic() - before < AT_ONCE
    assert end.reason == "killed"
    assert lab.cgroup.pids() == []
    with pytest.raises(EngineError, match="ended"):
        await machine.connect()
    await machine.stop(0)
    assert (await machine.wait()).reason == "killed"


async def test_the_agents_own_end_is_told_with_its_status(lab: Lab) -> None:
    machine = await lab.start()
    await call(machine, "kill -USR1 1; sleep 5")
    end = await machine.wait()
    assert (end.reason, end.status) == ("killed", 128 + signal.SIGUSR1)
    assert "agent up" in end.evidence


@pytest.mark.parametrize(
    "hog",
    [
        "python3 -c 'bytes(1 << 30)'; python3 -c 'x = b\"x\" * (1 << 30)'",
        "for d in /tmp /var/tmp /dev/shm; do cat /dev/zero > $d/file; done; python3 -c 'x = b\"x\" * (1 << 30)'",
    ],
    ids=["process", "temporary files"],
)
async def test_too_much_memory_harms_the_guest_alone_and_is_told(lab: Lab, hog: str) -> None:
    machine = await lab.start()
    told = await asyncio.wait_for(call(machine, f"({hog}) 2> /dev/null; echo survived", as_user=True), 60)
    assert "survived" not in told
    end = await asyncio.wait_for(machine.wait(), 30)
    assert end.reason == "out_of_memory" and end.oom_kills > 0
    assert end.memory_peak is None or end.memory_peak > 100 << 20, "as this host's kernel tells it"


async def test_filling_the_temporary_directories_alone_is_no_end(lab: Lab) -> None:
    machine = await lab.start()
    fill = "for d in /tmp /var/tmp /dev/shm; do cat /dev/zero > $d/file; done 2>&1 | grep -c 'No space left'"
    assert await call(machine, fill, as_user=True) == "3\n"
    assert await call(machine, "echo fine") == "fine\n"


async def test_a_fork_bomb_is_contained(lab: Lab) -> None:
    machine = await lab.start()
    bomb = "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass"
    calling = asyncio.create_task(call(machine, f"timeout -s KILL 20 python3 -c '{bomb}'", as_user=True))
    await asyncio.wait([calling], timeout=3)
    await asyncio.wait_for(machine.stop(0), 20)
    await calling
    assert lab.cgroup.pids() == []
