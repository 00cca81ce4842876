"""A virtual machine from its start to its end: what is in it, what survives, who can reach it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from qemu_support import REPLY_TIMEOUT, Lab, image_root, lab, let_go, output, run, shared_engine

from rundatsheesh.manager.engines.qemu import Qemu, vm_user
from rundatsheesh.manager.guest import Guest
from rundatsheesh.manager.model import Isolation

__all__ = ["image_root", "lab", "shared_engine"]  # fixtures

CLOCK = 2.0  # seconds from the host's


async def test_the_guest_is_debian_and_its_user_has_no_privileges(lab: Lab) -> None:
    vm = lab.vm()
    _, guest = await vm.open()
    assert (await output(guest, "uname -r")).endswith("-cloud-amd64")
    assert (
        await output(guest, "id -u; id -g; hostname; cat /etc/hostname")
        == f"1000\n1000\n{vm.record.id}\n{vm.record.id}"
    )
    capabilities = await output(guest, "grep -h -E '^(Cap...|NoNewPrivs):' /proc/self/status | awk '{print $2}'")
    assert set(capabilities.split()) == {"0000000000000000", "1"}
    refused = (
        "unshare -U true || touch /etc/x || touch /opt/rds/x || cat /opt/rds/agent/init.py || cat /dev/vda ||"
        "cat /dev/vdc || cat /dev/vdd || dmesg || ls /run/agent"
    )
    assert (await run(guest, refused)).exit_code != 0
    assert await output(guest, "touch /workspace/a /tmp/a /var/tmp/a /dev/shm/a; stat -c %u /workspace/a") == "1000"
    assert await output(guest, "cat /etc/resolv.conf; getent hosts localhost | wc -l") == "nameserver 172.16.0.1\n1"
    assert lab.engine.isolation in (Isolation.EMULATED_VM, Isolation.HARDWARE_VM)
    await guest.close()


async def test_qemu_holds_no_right_and_sees_no_file_of_the_host(lab: Lab) -> None:
    vm = lab.vm()
    _, guest = await vm.open()
    await guest.close()
    process = Path(f"/proc/{vm.qemu}")
    status = dict(line.split(":\t", 1) for line in process.joinpath("status").read_text().splitlines() if ":\t" in line)
    user = str(vm_user(vm.record.slot))
    assert set(status["Uid"].split()) == set(status["Gid"].split()) == {user}
    assert not status["Groups"].strip()
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    for namespace in ("net", "mnt", "ipc"):
        assert (process / "ns" / namespace).readlink() != Path("/proc/self/ns", namespace).readlink()
    assert {path.name for path in process.joinpath("root").iterdir()} <= {"dev", "etc", "lib", "lib64", "proc", "usr"}
    assert {path.name for path in process.joinpath("root/etc").iterdir()} == {"ld.so.cache"}
    assert {path.name for path in process.joinpath("root/usr/bin").iterdir()} == {"qemu-system-x86_64"}
    assert process.joinpath("oom_score_adj").read_text().strip() == "500"


async def test_the_workspace_survives_a_stop_in_good_order(lab: Lab) -> None:
    vm = lab.vm()
    machine, guest = await vm.open()
    first_boot = await output(guest, "cat /proc/sys/kernel/random/boot_id")
    await output(guest, "echo kept > /workspace/file; echo lost > /tmp/file; sleep 1000 >/dev/null 2>&1 & disown")
    await guest.shutdown()
    stopped = time.monotonic()
    await machine.stop(60)
    assert time.monotonic() - stopped < 30
    assert (await machine.wait()).reason == "stopped"
    await lab.engine.release(vm.record, vm.files)
    assert lab.leftovers() == []

    machine, guest = await vm.open()
    assert await output(guest, "cat /workspace/file; ls /tmp; pgrep sleep | wc -l") == "kept\n0"
    assert await output(guest, "cat /proc/sys/kernel/random/boot_id") != first_boot
    await guest.close()
    await machine.stop(0)


async def test_another_manager_adopts_it(lab: Lab) -> None:
    vm = lab.vm()
    earlier, guest = await vm.open()
    await output(guest, "echo here > /tmp/file")
    await guest.close()
    await let_go(earlier)

    machine = await Qemu(lab.engine.config).adopt(vm.record, vm.files)
    assert machine is not None
    guest = await Guest.connect(await machine.connect(), timeout=REPLY_TIMEOUT)
    assert await output(guest, "cat /tmp/file") == "here"
    await guest.close()
    await machine.stop(0)
    assert (await machine.wait()).reason == "stopped"
    assert await Qemu(lab.engine.config).adopt(vm.record, vm.files) is None


async def test_a_frozen_guest_uses_no_cpu_and_goes_on_afterwards(lab: Lab) -> None:
    vm = lab.vm()
    machine, guest = await vm.open()
    await machine.freeze()
    before = vm.cgroup.usage().cpu_ns
    await asyncio.sleep(0.5)
    assert vm.cgroup.usage().cpu_ns == before
    await machine.thaw()
    assert await output(guest, "echo back") == "back"
    before = time.time()
    clock = float(await output(guest, "date +%s.%N"))
    assert before - CLOCK < clock < time.time() + CLOCK
    await guest.close()
