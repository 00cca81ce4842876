"""What the host has under this manager's names although no record says so."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

from rundatsheesh.manager.disk import workspace
from rundatsheesh.manager.host import mounts
from rundatsheesh.manager.host.cgroup_layout import find_layout
from rundatsheesh.manager.host.cgroups import Cgroups
from rundatsheesh.manager.store import Store
from rundatsheesh.manager.vms_host import VmHost


async def remove_orphans(host: VmHost, store: Store) -> list[str]:
    """Remove cgroups with their processes, networks, mounts and directories of VMs that have no record; what was
    removed, in words.

    The host is looked at before the records, and records come before their resources, so nothing that is being made is
    taken for an orphan. Slots are handed out in rotation, so one that was just freed is not in new hands meanwhile."""
    cgroups = Cgroups(find_layout(), f"rundatsheesh-{host.node.id}")
    groups = set(await asyncio.to_thread(cgroups.list_names))
    slots = await host.network.list_present()
    directories = await asyncio.to_thread(_vm_directories, host)
    records = await store.list_all(host.node.id)
    ids, used = {record.id for record in records}, {record.slot for record in records}
    removed: list[str] = []
    for name in sorted(groups - ids):
        group = cgroups.group(name)
        await asyncio.to_thread(group.kill)
        await asyncio.to_thread(group.remove)
        removed.append(f"cgroup {name}")
    for slot in sorted(slots - used, key=lambda slot: slot.number):
        await host.network.detach(slot)
        removed.append(f"network {slot.link}")
    for directory in directories:
        if directory.name not in ids:
            await _remove_directory(directory)
            removed.append(f"directory {directory}")
    return removed


def _vm_directories(host: VmHost) -> list[Path]:
    roots = (host.layout.vms, host.layout.runtime_dir / host.node.id)
    return [entry for root in roots if root.is_dir() for entry in root.iterdir()]


async def _remove_directory(directory: Path) -> None:
    await workspace.unmount(directory / "workspace")
    await asyncio.to_thread(_unmount_and_remove, directory)


def _unmount_and_remove(directory: Path) -> None:
    while mounts.find_mount(directory) is not None:
        mounts.unmount(directory)
    shutil.rmtree(directory)
