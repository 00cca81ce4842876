"""Records and host agree again: at start-up, on a timer, and when an admin asks.

At start-up every record of this node is recovered: guests that live are adopted, what was cut short is undone. From
then on the audit says what differs, and each difference is healed: a VM with a record by its lifecycle, under its lock;
what has no record is removed. Names come from our own block, node and directories, so nothing foreign is ever touched.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from functools import partial

from rundatsheesh.manager.errors import RdsError
from rundatsheesh.manager.model import Healing, Leak, LeakKind, State, VmRecord
from rundatsheesh.manager.store import Store
from rundatsheesh.manager.vms import Vms
from rundatsheesh.manager.vms_audit import Attend, Attended, Site, audit
from rundatsheesh.manager.vms_host import VmHost
from rundatsheesh.manager.vms_orphans import remove_orphan

log = logging.getLogger(__name__)

INTERVAL = 30.0  # seconds between two rounds
AT_ONCE = 8  # VMs recovered at the same time


class _Attended(Attend):
    """What this manager attends to."""

    def __init__(self, vms: Vms) -> None:
        self._vms = vms

    def __call__(self, records: Collection[VmRecord]) -> Attended:
        ids = [record.id for record in records]
        held = {vm_id for vm_id in ids if self._vms.running(vm_id) is not None}
        return Attended(held, {vm_id for vm_id in ids if self._vms.is_worked_on(vm_id)})


class Reconciler:
    def __init__(self, store: Store, host: VmHost, vms: Vms) -> None:
        self._store = store
        self._host = host
        self._vms = vms
        self._site = Site(host.node, host.layout, host.network)
        self._attend = _Attended(vms)
        self._one_round = asyncio.Lock()

    async def recover(self) -> None:
        """Once, before the first request. A VM that cannot be recovered is logged, and tried again by the timer."""
        await self._store.history.mark_interrupted(self._host.node.id)
        places = asyncio.Semaphore(AT_ONCE)

        async def one(record: VmRecord) -> None:
            async with places:
                try:
                    await self._vms.recover(record)
                except (RdsError, OSError):
                    log.exception("%s could not be recovered", record.id)

        records = await self._store.list_all(self._host.node.id)
        await asyncio.gather(*(one(record) for record in records))
        await self.round()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(INTERVAL)
            try:
                await self.round()
            except (RdsError, OSError):
                log.exception("reconciling failed; the next round tries again")

    async def audit(self) -> list[Leak]:
        """Every difference between records and host, in the order in which it would be healed."""
        return await audit(self._site, self._store, self._attend)

    async def round(self) -> Healing:
        """Put rules back in force that somebody removed, heal what the audit finds, and look again."""
        async with self._one_round:
            await self._repair_networks()
            found = await self.audit()
            for leak in found:
                await self._heal(leak)
            left = await self.audit() if found else []
        healed = tuple(leak for leak in found if leak not in left)
        for leak in healed:
            log.warning("healed: %s %s of %s", leak.kind, leak.name, leak.vm_id or "no VM that is known")
        return Healing(healed, tuple(left))

    async def _repair_networks(self) -> None:
        for record in await self._store.list_all(self._host.node.id):
            vm = self._vms.running(record.id)
            if record.state is not State.RUNNING or vm is None or vm.has_ended:
                continue
            try:
                await self._vms.repair_network(record.id)
            except RdsError as error:
                log.warning("the network of %s cannot be repaired: %s", record.id, error)

    async def _heal(self, leak: Leak) -> None:
        """One that fails keeps none of the others from being healed."""
        try:
            if leak.vm_id is None:
                await remove_orphan(self._site, leak)
            else:
                await self._vms.settle(leak.vm_id, partial(self._remove, leak))
        except (RdsError, OSError) as error:
            log.warning("%s %s of %s cannot be healed: %s", leak.kind, leak.name, leak.vm_id, error)

    async def _remove(self, leak: Leak) -> None:
        if leak.kind is not LeakKind.RECORD:
            await remove_orphan(self._site, leak)
