"""The leak audit: what the host has under this manager's names, against what the records say.

Names are arithmetic on a record, so everything on the host that bears one of ours can be told from everything foreign:
groups beneath our own parent, links of our own block of slots, and in our own directories whatever is named like a VM.
Nothing else is looked at.
"""

from __future__ import annotations

import asyncio
import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rundatsheesh.manager.host import cgroups, loops, mounts
from rundatsheesh.manager.host.cgroups import Cgroups
from rundatsheesh.manager.model import Leak, LeakKind, State, VmRecord
from rundatsheesh.manager.net import Network
from rundatsheesh.manager.store import Store
from rundatsheesh.manager.vms_layout import Layout, Node

NETWORK_KINDS = frozenset({LeakKind.LINK, LeakKind.NAMESPACE, LeakKind.RULES})
AT_REST = frozenset({State.STOPPED, State.ERROR})  # only a VM's directory exists
RUNS = frozenset({State.RUNNING, State.WARM, State.PAUSED})
_VM_ID = re.compile(r"vm-[0-9a-f]{16}")
_DELETED = " (deleted)"  # what the kernel adds to the name of a file that has none any more


@dataclass(frozen=True, slots=True)
class Attended:
    """What the manager of these records takes care of at this moment."""

    held: Collection[str]  # VMs that it is connected to
    worked_on: Collection[str]  # VMs in the middle of an operation


Attend = Callable[[Collection[VmRecord]], Attended]


@dataclass(frozen=True, slots=True)
class Site:
    """One manager's part of a host, by name."""

    node: Node
    layout: Layout
    network: Network

    @property
    def runtime(self) -> Path:
        return self.layout.runtime_dir / self.node.id

    @property
    def cgroups(self) -> Cgroups:
        return cgroups.of_node(self.node.id)

    def owner_of(self, path: Path) -> str | None:
        """The VM in whose directory, of storage or of runtime, a path lies."""
        for root in (self.layout.vms, self.runtime):
            if path.is_relative_to(root) and path != root:
                name = path.relative_to(root).parts[0]
                return name if _VM_ID.fullmatch(name) else None
        return None


def compare(found: Iterable[Leak], records: Collection[VmRecord], attended: Attended, *, storage: Path) -> list[Leak]:
    """Which of `found` no record accounts for, and which records nothing accounts for. `storage` holds the directories
    that VMs at rest keep. In the order in which it is to be healed."""
    traces = list(found)
    by_id, by_link = {r.id: r for r in records}, {r.slot.link: r for r in records}
    leaks = []
    for trace in traces:
        owner = by_link.get(trace.name) if trace.kind in NETWORK_KINDS else by_id.get(trace.vm_id or "")
        if owner is None:
            leaks.append(trace)
        elif owner.state in AT_REST and owner.id not in attended.worked_on and not _is_kept(trace, storage):
            leaks.append(replace(trace, vm_id=owner.id))
    alive = {trace.vm_id for trace in traces if trace.kind is LeakKind.PROCESS}
    leaks += [
        Leak(LeakKind.RECORD, record.state.value, record.id)
        for record in records
        if record.state not in AT_REST and record.id not in attended.worked_on and not _runs(record, alive, attended)
    ]
    order = list(LeakKind)
    return sorted(leaks, key=lambda leak: order.index(leak.kind))


def find_remnants(found: Iterable[Leak], records: Collection[VmRecord], *, storage: Path) -> set[str]:
    """VMs at rest of which `found` has more than they keep."""
    resting = {record.id for record in records if record.state in AT_REST}
    leaks = compare(found, records, Attended((), ()), storage=storage)
    return {leak.vm_id for leak in leaks if leak.vm_id in resting}


async def audit(site: Site, store: Store, attend: Attend, *, apart: float = 0.0) -> list[Leak]:
    """The differences that two looks, so many seconds `apart`, both show: what is on its way in or out is none."""
    first = await _audit_once(site, store, attend)
    if not first:
        return []
    await asyncio.sleep(apart)
    again = set(await _audit_once(site, store, attend))
    return [leak for leak in first if leak in again]


async def look(site: Site) -> list[Leak]:
    """Everything that the host has under this manager's names, as if there were no records."""
    traces = await site.network.list_traces()
    network = [
        Leak(kind, slot.link, None)
        for kind, slots in (
            (LeakKind.LINK, traces.links),
            (LeakKind.NAMESPACE, traces.namespaces),
            (LeakKind.RULES, traces.rules),
        )
        for slot in slots
    ]
    return network + await asyncio.to_thread(lambda: [*_in_groups(site), *_on_disk(site)])


async def _audit_once(site: Site, store: Store, attend: Attend) -> list[Leak]:
    # The host first: a record exists before anything of its VM does, so nothing that is being made looks orphaned.
    found = await look(site)
    records = await store.list_all(site.node.id)
    return compare(found, records, attend(records), storage=site.layout.vms)


def _is_kept(trace: Leak, storage: Path) -> bool:
    return trace.kind is LeakKind.DIRECTORY and Path(trace.name).parent == storage


def _runs(record: VmRecord, alive: Collection[str | None], attended: Attended) -> bool:
    return record.state in RUNS and record.id in attended.held and record.id in alive


def _in_groups(site: Site) -> Iterator[Leak]:
    cgroups = site.cgroups
    for name in sorted(cgroups.list_names()):
        if not _VM_ID.fullmatch(name):
            continue
        group = cgroups.group(name)
        yield Leak(LeakKind.CGROUP, group.path, name)
        for pid in group.pids():
            yield Leak(LeakKind.PROCESS, str(pid), name)


def _on_disk(site: Site) -> Iterator[Leak]:
    for target in dict.fromkeys(mounted.target for mounted in mounts.list_mounts()):
        if (owner := site.owner_of(target)) is not None:
            yield Leak(LeakKind.MOUNT, str(target), owner)
    for minor, file in loops.list_backing_files().items():
        if (owner := site.owner_of(Path(str(file).removesuffix(_DELETED)))) is not None:
            yield Leak(LeakKind.LOOP_DEVICE, f"/dev/loop{minor}", owner)
    for root in (site.layout.vms, site.runtime):
        for path in sorted(root.iterdir()) if root.is_dir() else ():
            if _VM_ID.fullmatch(path.name):
                yield Leak(LeakKind.DIRECTORY, str(path), path.name)
    for path in _sockets(site.runtime):
        if (owner := site.owner_of(path)) is not None:
            yield Leak(LeakKind.SOCKET, str(path), owner)


def _sockets(directory: Path) -> Iterator[Path]:
    """Links are not followed; a guest may write to a part of this tree, of bounded size."""
    for parent, _, names in os.walk(directory):
        for name in names:
            path = Path(parent, name)
            try:
                if stat.S_ISSOCK(path.lstat().st_mode):
                    yield path
            except OSError:
                continue  # gone meanwhile
