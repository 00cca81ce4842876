"""Takes away what the audit found of VMs that have no record, kind by kind."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

from rundatsheesh.manager.errors import HostError
from rundatsheesh.manager.host import loops, mounts
from rundatsheesh.manager.host.threads import in_thread
from rundatsheesh.manager.model import Leak, LeakKind, Slot
from rundatsheesh.manager.net.blocks import is_claimed
from rundatsheesh.manager.net.links import slot_of
from rundatsheesh.manager.store import Store
from rundatsheesh.manager.vms_audit import AT_REST, NETWORK_KINDS, Site


async def remove_orphan(site: Site, leak: Leak, store: Store) -> None:
    """Idempotent: what is gone already, perhaps with another leak of the same VM, is fine. A slot that a new VM was
    given since the audit is that VM's, and in a block that another server has everything is that server's. Raises
    HostError or OSError for what cannot be removed."""
    if leak.kind in NETWORK_KINDS:
        slot = slot_of(leak.name)
        if slot is not None:
            await site.network.detach(slot, unless=lambda: _is_somebodys(slot, site, store))
    elif leak.kind in (LeakKind.PROCESS, LeakKind.CGROUP):
        await asyncio.to_thread(_end_group, site, leak)
    else:
        await asyncio.to_thread(_REMOVE[leak.kind], site, Path(leak.name))


async def _is_somebodys(slot: Slot, site: Site, store: Store) -> bool:
    if not await in_thread(is_claimed, site.node.id, slot.block):
        raise HostError(f"block {slot.block} is another server's by now", hint="start this server anew")
    records = await store.list_all(site.node.id)
    return any(record.slot == slot and record.state not in AT_REST for record in records)


def _end_group(site: Site, leak: Leak) -> None:
    """Processes are ended by their group, which no pid that was given to a stranger meanwhile is in."""
    group = site.cgroups.group(str(leak.vm_id))
    group.kill()
    group.remove()


def _remove_socket(_: Site, path: Path) -> None:
    path.unlink(missing_ok=True)


def _unmount(_: Site, target: Path) -> None:
    mounts.unmount_all(target)


def _detach_loop(site: Site, device: Path) -> None:
    minor = int(device.name.removeprefix("loop"))
    file = loops.backing_file(minor)
    # It frees itself with its last mount, and the next one to take it may be anybody.
    if file is not None and site.owner_of(file) is not None:
        loops.detach(minor)


def _remove_directory(_: Site, directory: Path) -> None:
    mounted = [m.target for m in mounts.list_mounts() if m.target.is_relative_to(directory)]
    if mounted:
        raise HostError(f"{directory} is kept: something is mounted at {mounted[-1]}")
    try:
        shutil.rmtree(directory)
    except FileNotFoundError:
        return


_REMOVE = {
    LeakKind.SOCKET: _remove_socket,
    LeakKind.MOUNT: _unmount,
    LeakKind.LOOP_DEVICE: _detach_loop,
    LeakKind.DIRECTORY: _remove_directory,
}
