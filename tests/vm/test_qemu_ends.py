"""How a virtual machine may end, and what is said of it."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import replace

import pytest
from qemu_support import Lab, ask_root, image_root, lab, new_lab, output, root_lab, run, shared_engine

from rundatsheesh.manager.errors import EngineError
from server_support import promised

__all__ = ["image_root", "lab", "new_lab", "root_lab", "shared_engine"]  # fixtures


async def test_a_killed_qemu_is_noticed_at_once(lab: Lab) -> None:
    vm = lab.vm()
    machine, guest = await vm.open()
    os.kill(vm.qemu, signal.SIGKILL)
    killed = time.monotonic()
    ended = await machine.wait()
    assert time.monotonic() - killed < promised(2)
    assert (ended.reason, ended.status) == ("killed", -signal.SIGKILL)
    assert await guest.wait_closed() is not None
    await guest.close()
    with pytest.raises(EngineError):
        await machine.connect()


async def test_a_kernel_panic_is_told_with_the_end_of_the_console(root_lab: Lab) -> None:
    vm = root_lab.vm()
    machine = await vm.start()
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await ask_root(machine, "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger")
    ended = await machine.wait()
    assert ended.reason == "kernel_panic"
    assert "sysrq triggered crash" in ended.evidence
    await root_lab.engine.release(vm.record, vm.files)
    assert "Kernel panic" in vm.files.console_log.read_text(errors="replace")
    assert not vm.files.console_log.is_symlink()


async def test_the_end_of_the_agent_is_the_end_of_the_guest(root_lab: Lab) -> None:
    vm = root_lab.vm()
    machine = await vm.start()
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await ask_root(machine, "kill -SEGV 1; kill -INT 1; sleep 60")
    assert (await machine.wait()).reason == "agent_exited"


async def test_a_noisy_console_is_bounded(root_lab: Lab) -> None:
    vm = root_lab.vm()
    machine = await vm.start()
    await ask_root(machine, "yes 'a line of noise' | head -c 2200K > /dev/ttyS0; sync")
    assert vm.files.console_log.stat().st_size <= 2 << 20
    assert await ask_root(machine, "echo alive") == "alive\n"
    await machine.stop(0)


HOGS = {
    "tail": "tail /dev/zero",
    "python": "python3 -c 'x = bytearray()\nwhile True: x += bytes(1 << 20)'",
    "node": "node -e 'const a = []; while (true) a.push(Buffer.alloc(1 << 20, 1))'",
}
# Files in memory outlive whoever wrote them: with all of it in their hands the kernel would have nobody to kill.
FILL = "for d in /tmp /dev/shm /var/tmp; do head -c 1G /dev/zero > $d/full; done 2>/dev/null; "


async def test_memory_exhaustion_ends_the_process_not_the_vm(lab: Lab) -> None:
    vm = lab.vm()
    machine, guest = await vm.open()
    for name, hog in HOGS.items():
        ended = await run(guest, hog, timeout_ms=300_000)
        assert ended.exit_code == 137, name
        assert "the VM is out of memory" in ended.stderr, name
        assert await output(guest, "echo alive") == "alive"
    assert (await run(guest, "kill -9 $$")).stderr == ""
    assert (await run(guest, FILL + HOGS["tail"], timeout_ms=300_000)).exit_code == 137
    assert await output(guest, "rm /tmp/full /dev/shm/full /var/tmp/full; echo alive") == "alive"
    await guest.close()
    await machine.stop(0)


async def test_a_start_that_fails_leaves_nothing(lab: Lab) -> None:
    vm = lab.vm()
    await vm.prepare()
    missing = replace(vm.files, disk=vm.files.directory / "missing")
    with pytest.raises(EngineError):
        await lab.engine.start(vm.record, missing)
    assert lab.leftovers() == []


async def test_a_cancelled_start_leaves_nothing(new_lab: Lab) -> None:
    vm = new_lab.vm()
    await vm.prepare()
    for delay in (0.1, 0.5):  # somewhere in the boot of the template
        starting = asyncio.create_task(new_lab.engine.start(vm.record, vm.files))
        await asyncio.wait([starting], timeout=delay)
        if not starting.cancel():
            assert delay > 0.1, "no start is over so soon"
            return
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert new_lab.leftovers() == []
        assert len(new_lab.engine.templates) == 0
