"""Records and host agree again: at start-up, on a timer, and when an admin asks.

At start-up every record of this node is recovered: guests that live are adopted, what was cut short is finished or
undone. The server need not wait for the latter. From then on the audit says what differs, and each difference is
healed: a VM with a record by its lifecycle, under its lock; what has no record is removed. Names come from our own
block, node and directories, so nothing foreign is ever touched.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Coroutine
from functools import partial
from typing import Any

from rundatsheesh.manager.errors import RdsError, StorageFull
from rundatsheesh.manager.model import Healing, Leak, LeakKind, State, VmRecord
from rundatsheesh.manager.store import Store
from rundatsheesh.manager.vms import Vms
from rundatsheesh.manager.vms_audit import AT_REST, Attended, Site, audit, find_remnants, look
from rundatsheesh.manager.vms_host import VmHost
from rundatsheesh.manager.vms_orphans import remove_orphan
from rundatsheesh.manager.vms_recovery import CleanUp, VmRecovery
from rundatsheesh.manager.vms_storage import VmStorage

log = logging.getLogger(__name__)

INTERVAL = 30.0  # seconds between two rounds
CLEAN_UPS_AT_ONCE = 2  # after a restart; the VMs that live have calls to answer meanwhile
# Seconds until the server answers, although guests have not been heard of: calls into these wait for them.
PATIENCE = 1.0


class Reconciler:
    def __init__(self, store: Store, host: VmHost, vms: Vms) -> None:
        self._store = store
        self._host = host
        self._vms = vms
        self._recovery = VmRecovery(store, host, vms)
        self._storage = VmStorage(store, host, vms)
        self._site = Site(host.node, host.layout, host.network)
        self._one_round = asyncio.Lock()
        self._recovering: set[asyncio.Task[None]] = set()
        self._clean_ups = asyncio.Semaphore(CLEAN_UPS_AT_ONCE)

    async def recover(self) -> None:
        """Once, before the first request. When it returns, nothing that was cut short is shown any more, and guests
        that answer are adopted; the rest goes on beside the requests, see `recovered`."""
        try:
            await self._store.history.mark_interrupted(self._host.node.id)
        except StorageFull as error:  # that VMs live is no matter of what their history says
            log.warning("calls that were cut short are not marked: %s", error)
        records = await self._store.list_all(self._host.node.id)
        decisions = {record.id: asyncio.Event() for record in records if record.state not in AT_REST}
        for record in records:
            if record.id in decisions:
                self._begin(self._recovery.recover(record, decisions[record.id].set, self._in_turn), record)
        await self._clean_up_what_rests(records)
        for record in records:
            if record.id in decisions and record.state is not State.RUNNING:
                await decisions[record.id].wait()
        living = [asyncio.ensure_future(decisions[r.id].wait()) for r in records if r.state is State.RUNNING]
        if living:
            await asyncio.wait(living, timeout=PATIENCE)
        for waiting in living:
            waiting.cancel()

    async def recovered(self) -> None:
        """Return once every VM that an earlier manager left is adopted or cleaned up."""
        while self._recovering:
            await asyncio.wait(self._recovering)
            self._recovering = {task for task in self._recovering if not task.done()}

    async def run(self) -> None:
        """Until cancelled."""
        await self.recovered()
        while True:
            try:
                await self.round()
            except Exception:  # whatever the database or the host may think of: nobody else heals
                log.exception("reconciling failed; the next round tries again")
            await asyncio.sleep(INTERVAL)

    async def audit(self) -> list[Leak]:
        """Every difference between records and host, in the order in which it would be healed."""
        return await audit(self._site, self._store, self._attended)

    async def round(self) -> Healing:
        """Put rules back in force that somebody removed, heal what the audit finds, and look again. Before that, see
        what a full disk has done."""
        await self.recovered()
        async with self._one_round:
            await self._storage.look()
            await self._repair_networks()
            found = await self.audit()
            for leak in found:
                await self._heal(leak)
            left = await self.audit() if found else []
        healed = tuple(leak for leak in found if leak not in left)
        for leak in healed:
            log.warning("healed: %s %s of %s", leak.kind, leak.name, leak.vm_id or "no VM that is known")
        return Healing(healed, tuple(left))

    async def _clean_up_what_rests(self, records: Collection[VmRecord]) -> None:
        try:
            remnants = find_remnants(await look(self._site), records, storage=self._host.layout.vms)
        except (RdsError, OSError):
            log.exception("the host cannot be looked at; the timer tries again")
            return
        for record in records:
            if record.id in remnants:
                self._begin(self._recovery.clean_up(record, self._in_turn), record)

    def _begin(self, recovery: Coroutine[Any, Any, None], record: VmRecord) -> None:
        """A VM that cannot be recovered is logged, and tried again by the timer."""

        async def to_its_end() -> None:
            try:
                await recovery
            except Exception:
                log.exception("%s could not be recovered", record.id)

        self._recovering.add(asyncio.create_task(to_its_end()))

    async def _in_turn(self, clean_up: CleanUp) -> None:
        async with self._clean_ups:
            await clean_up()

    def _attended(self, records: Collection[VmRecord]) -> Attended:
        ids = [record.id for record in records]
        held = {vm_id for vm_id in ids if self._vms.running(vm_id) is not None}
        # The end of a guest that we are connected to is noticed and dealt with: one whose processes are gone is dying.
        return Attended(held, held | {vm_id for vm_id in ids if self._vms.is_worked_on(vm_id)})

    async def _repair_networks(self) -> None:
        look = True  # once for all of them
        for record in await self._store.list_all(self._host.node.id):
            vm = self._vms.running(record.id)
            if record.state is not State.RUNNING or vm is None or vm.has_ended:
                continue
            try:
                await self._recovery.repair_network(record.id, look=look)
                look = False
            except RdsError as error:
                log.warning("the network of %s cannot be repaired: %s", record.id, error)

    async def _heal(self, leak: Leak) -> None:
        """One that fails keeps none of the others from being healed."""
        try:
            if leak.vm_id is None:
                await remove_orphan(self._site, leak, self._store)
            else:
                await self._recovery.settle(leak.vm_id, partial(self._remove, leak))
        except (RdsError, OSError) as error:
            log.warning("%s %s of %s cannot be healed: %s", leak.kind, leak.name, leak.vm_id, error)

    async def _remove(self, leak: Leak) -> None:
        if leak.kind is not LeakKind.RECORD:
            await remove_orphan(self._site, leak, self._store)
