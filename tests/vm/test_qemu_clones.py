"""VMs that start as clones of one template are nobody's twins, and a template that does not fit is not used."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import replace
from pathlib import Path

from qemu_support import AGENT, Lab, Vm, discard_all, image_root, lab, new_lab, open_lab, output, shared_engine

from rundatsheesh.manager.engines.qemu import Qemu, QemuConfig
from rundatsheesh.manager.guest import Guest
from rundatsheesh.manager.host import process
from rundatsheesh.manager.host.bootfiles import BootFiles

__all__ = ["image_root", "lab", "new_lab", "shared_engine"]  # fixtures

CLONES = int(os.environ.get("CLONES", "3"))
AT_ONCE = 2
CLOCK = 0.1  # seconds from the host's
FACTS = (
    "cat /proc/sys/kernel/random/uuid /proc/sys/kernel/random/boot_id /etc/machine-id /sys/class/net/eth0/address;"
    "python3 -c 'import os; print(os.urandom(16).hex())'; echo 'console.log(crypto.randomUUID())' > /tmp/u.ts;"
    "deno run --no-prompt /tmp/u.ts; ip -4 -o addr show eth0 | awk '{print $4}'; hostname"
)


async def test_clones_share_nothing_that_should_be_their_own(lab: Lab) -> None:
    turns = asyncio.Semaphore(AT_ONCE)

    async def ask(vm: Vm) -> list[str]:
        async with turns:
            machine, guest = await vm.open()
            await check_clock(guest)
            facts = (await output(guest, FACTS)).splitlines()
            await guest.close()
            await machine.stop(0)
            return facts

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(ask(lab.vm())) for _ in range(CLONES)]
    told = [task.result() for task in tasks]
    for own in zip(*told, strict=True):
        assert len(set(own)) == CLONES, own
    assert {facts[3] for facts in told} == {vm.record.slot.guest_mac for vm in lab.vms}


async def check_clock(guest: Guest) -> None:
    before = time.time()
    clock = float(await output(guest, "date +%s.%N"))
    assert before - CLOCK < clock < time.time() + CLOCK


async def test_what_one_clone_writes_no_other_sees(lab: Lab) -> None:
    first, second = lab.vm(), lab.vm()
    _, guest = await first.open()
    await output(guest, "head -c 50M /dev/urandom > /tmp/x; echo secret > /workspace/x; sync")
    _, other = await second.open()
    assert await output(other, "ls -A /tmp /workspace") == "/tmp:\n\n/workspace:"
    await guest.close()
    await other.close()


async def test_a_new_vm_finds_the_disk_of_its_template_mounted_and_it_is_its_own(lab: Lab) -> None:
    first, second = fresh(lab), fresh(lab)
    for vm in (first, second):
        await vm.engine.make_disk(vm.record, vm.files)
    machine, guest = await first.open()
    assert machine.has_workspace
    assert await output(guest, "stat -c %U:%G:%a /workspace; ls -A /workspace") == "user:user:755"
    await output(guest, "echo kept > /workspace/x; head -c 20M /dev/urandom > /workspace/y; sync; rm /workspace/y")
    other_machine, other = await second.open()
    assert await output(other, "ls -A /workspace") == ""
    await output(other, "echo other > /workspace/x")
    await other.shutdown()
    await other_machine.stop(10)
    assert await output(guest, "cat /workspace/x") == "kept"
    await guest.close()
    await machine.stop(0)  # without a word: its journal has to be replayed
    for vm, content in ((first, "kept"), (second, "other")):
        assert await again(vm) == content
        await process.run(["e2fsck", "-f", "-n", str(vm.files.disk)], timeout=60)


async def test_a_disk_of_another_size_is_mounted_when_the_vm_starts(lab: Lab) -> None:
    vm = fresh(lab, lab.engine.config.disk_mb // 2)
    await vm.engine.make_disk(vm.record, vm.files)
    machine, guest = await vm.open()
    assert not machine.has_workspace
    size = int(await output(guest, "df --output=size -m /workspace | tail -1"))
    assert vm.record.spec.disk_mb * 0.8 < size <= vm.record.spec.disk_mb
    await guest.close()
    await machine.stop(0)


def fresh(lab: Lab, disk_mb: int | None = None) -> Vm:
    """Without a disk so far."""
    vm = lab.vm()
    spec = replace(vm.record.spec, disk_mb=disk_mb or lab.engine.config.disk_mb)
    vm.record = replace(vm.record, spec=spec)
    return vm


async def again(vm: Vm) -> str:
    """Start it once more: what is in its file."""
    machine, guest = await vm.open()
    assert not machine.has_workspace
    content = await output(guest, "cat /workspace/x")
    await guest.shutdown()
    await machine.stop(10)
    return content


async def test_a_template_is_made_anew_when_the_image_changes(tmp_path: Path, image_root: Path) -> None:
    image = tmp_path / "image"
    image.mkdir()
    for path in BootFiles(image_root.parent).all:
        os.link(path, image / path.name) if _same_device(path, image) else (image / path.name).symlink_to(path)
    engine = Qemu(QemuConfig(lambda image_id: image / "root", AGENT))
    async with open_lab(tmp_path, engine) as lab:
        vm = lab.vm()
        machine, guest = await vm.open()
        await guest.close()
        await machine.stop(0)
        initrd = image / BootFiles(image).initrd.name
        content = initrd.read_bytes()
        initrd.unlink()
        initrd.write_bytes(content)
        machine, guest = await vm.open()
        await guest.close()
        await machine.stop(0)
        assert len(engine.templates) == 2
    discard_all(engine.templates)


async def test_starts_at_the_same_time_make_one_template(new_lab: Lab) -> None:
    opened = await asyncio.gather(*(new_lab.vm().open() for _ in range(3)))
    assert len(new_lab.engine.templates) == 1
    for _, guest in opened:
        await guest.close()


def _same_device(path: Path, directory: Path) -> bool:
    return path.stat().st_dev == directory.stat().st_dev
