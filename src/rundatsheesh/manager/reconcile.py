"""Records and host agree again: at start-up, and on a timer.

At start-up every record of this node is recovered: guests that live are adopted, what was cut short is undone. Then
whatever the host has under our names without a record is removed. Names come from our own block, node and storage root,
so nothing foreign is ever touched.
"""

from __future__ import annotations

import asyncio
import logging

from rundatsheesh.manager.errors import RdsError
from rundatsheesh.manager.model import State, VmRecord
from rundatsheesh.manager.store import Store
from rundatsheesh.manager.vms import Vms
from rundatsheesh.manager.vms_host import VmHost
from rundatsheesh.manager.vms_orphans import remove_orphans

log = logging.getLogger(__name__)

INTERVAL = 30.0  # seconds between two rounds
AT_ONCE = 8  # VMs recovered at the same time


class Reconciler:
    def __init__(self, store: Store, host: VmHost, vms: Vms) -> None:
        self._store = store
        self._host = host
        self._vms = vms

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
        await self._sweep()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(INTERVAL)
            try:
                await self.round()
            except (RdsError, OSError):
                log.exception("reconciling failed; the next round tries again")

    async def round(self) -> None:
        """Finish deletions that failed, put rules back in force that somebody removed, remove what has no record."""
        for record in await self._store.list_all(self._host.node.id):
            if record.state is State.DELETING:
                await self._vms.retry_release(record)
            elif record.state is State.RUNNING and self._vms.running(record.id) is not None:
                await self._host.network.adopt(record.slot, record.spec.policy)
        await self._sweep()

    async def _sweep(self) -> None:
        removed = await remove_orphans(self._host, self._store)
        for what in removed:
            log.warning("removed %s, which belonged to no VM", what)
