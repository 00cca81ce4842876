"""The clock of all lifetimes: one task that waits for the next deadline, deletes what expired and stops what is idle.

It only says that a VM may be due. Whether it is, `VmLifetimes` decides while it holds the VM, so a deadline that was
put off meanwhile is not met.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from rundatsheesh.manager.errors import RdsError
from rundatsheesh.manager.model import now
from rundatsheesh.manager.store import Store
from rundatsheesh.manager.vms_lifetimes import VmLifetimes

log = logging.getLogger(__name__)

LONGEST_WAIT = 60.0  # seconds: the clock of the host may be set
RETRY = 5.0  # seconds after a failure
AT_ONCE = 8  # VMs that end at the same time; a burst of deadlines must not starve the calls


class Expiry:
    def __init__(self, store: Store, lifetimes: VmLifetimes, node_id: str) -> None:
        self._store = store
        self._lifetimes = lifetimes
        self._node_id = node_id
        self._ending: dict[str, asyncio.Task[None]] = {}
        self._turns = asyncio.Semaphore(AT_ONCE)

    async def run(self) -> None:
        """Until cancelled. What is being ended then is ended all the same."""
        try:
            while True:
                self._lifetimes.changed.clear()
                await self._wait(await self._round())
        finally:
            ending = list(self._ending.values())
            for task in ending:
                task.cancel()
            await asyncio.gather(*ending, return_exceptions=True)

    async def _round(self) -> float:
        """Begin to end whatever is due; returns the seconds until something else may be."""
        try:
            deadlines = await self._store.lifetimes.due(self._node_id)
        except Exception:
            log.exception("the deadlines of the VMs cannot be read")
            return RETRY
        at = now()
        waits = [self._when(vm_id, (end - at).total_seconds(), self._lifetimes.expire) for vm_id, end in deadlines]
        idle = self._lifetimes.idle_deadlines()
        waits += [self._when(vm_id, wait, self._lifetimes.stop_idle) for vm_id, wait in idle.items()]
        return min(waits, default=LONGEST_WAIT)

    def _when(self, vm_id: str, wait: float, end: Callable[[str], Awaitable[None]]) -> float:
        if vm_id in self._ending:
            return LONGEST_WAIT  # its end begins a new round
        if wait > 0:
            return wait
        task = asyncio.create_task(self._end(vm_id, end))
        self._ending[vm_id] = task
        task.add_done_callback(lambda _: self._ended(vm_id))
        return LONGEST_WAIT

    async def _end(self, vm_id: str, end: Callable[[str], Awaitable[None]]) -> None:
        try:
            async with self._turns:
                await end(vm_id)
        except Exception as error:
            level = logging.WARNING if isinstance(error, RdsError) else logging.ERROR
            log.log(level, "%s could not be ended in its time: %s", vm_id, error, exc_info=error)
            await asyncio.sleep(RETRY)

    def _ended(self, vm_id: str) -> None:
        del self._ending[vm_id]
        self._lifetimes.changed.set()

    async def _wait(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(min(seconds, LONGEST_WAIT)):
                await self._lifetimes.changed.wait()
        except TimeoutError:
            return
