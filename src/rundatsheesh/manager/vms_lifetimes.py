"""When VMs end by themselves: a time to live that deletes them, and an idle time that stops them.

Whatever is decided here is decided while the VM is held, and by compare-and-set in the database: a deadline that was
put off before, or a call that came before, wins.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from rundatsheesh.manager.model import Caller, LifetimeChange, State, VmRecord, now
from rundatsheesh.manager.store import Store
from rundatsheesh.manager.store.lifetimes import EXPIRED
from rundatsheesh.manager.store.store import vm_not_found
from rundatsheesh.manager.vms import MANAGER, Vms

IDLE = "idle"  # why a VM was stopped


class VmLifetimes:
    def __init__(self, store: Store, vms: Vms) -> None:
        self._store = store
        self._vms = vms
        self.changed = vms.lifetimes_changed  # set when a deadline may be nearer than it was

    async def change(self, vm_id: str, change: LifetimeChange, caller: Caller) -> VmRecord:
        """In force when this returns. Raises NotFound."""
        return await self._vms.to_its_end(self._change(vm_id, change, caller))

    async def _change(self, vm_id: str, change: LifetimeChange, caller: Caller) -> VmRecord:
        async with self._vms.locks.hold(vm_id):
            record = await self._store.lifetimes.change(vm_id, change)
            if record is None:
                raise vm_not_found(vm_id)
            vm = self._vms.running_vms.get(vm_id)
            if vm is not None:
                vm.record = record
        self.changed.set()
        await self._store.history.record_activity("vm.update", caller=caller, vm_id=vm_id)
        return self.with_idleness(record)

    def with_idleness(self, record: VmRecord) -> VmRecord:
        """The record with `idle_since` where the VM is idle."""
        vm = self._vms.running_vms.get(record.id)
        idle = None if vm is None else vm.idle_seconds
        return record if idle is None else replace(record, idle_since=now() - timedelta(seconds=idle))

    async def expire(self, vm_id: str) -> None:
        """Delete the VM if its time to live has ended."""
        await self._vms.to_its_end(self._expire(vm_id))

    async def _expire(self, vm_id: str) -> None:
        async with self._vms.locks.hold(vm_id):
            record = await self._store.lifetimes.expire(vm_id, MANAGER)
            if record is not None:
                await self._vms.release(record, EXPIRED)

    def idle_deadlines(self) -> dict[str, float]:
        """Seconds until each VM with an idle timeout may be stopped at the earliest."""
        found = {}
        for vm_id, vm in self._vms.running_vms.items():
            timeout_ms = vm.record.spec.lifetime.idle_timeout_ms
            if timeout_ms is not None and vm.record.state is State.RUNNING and not vm.has_ended:
                found[vm_id] = timeout_ms / 1000 - (vm.idle_seconds or 0.0)
        return found

    async def stop_idle(self, vm_id: str) -> None:
        """Stop the VM if it has been idle for its whole timeout."""
        await self._vms.to_its_end(self._stop_idle(vm_id))

    async def _stop_idle(self, vm_id: str) -> None:
        async with self._vms.locks.hold(vm_id):
            if self.idle_deadlines().get(vm_id, 1.0) > 0:
                return
            # From here on a call finds no running VM: it waits for the lock, and is told that the VM is stopped.
            vm = self._vms.running_vms.pop(vm_id)
            try:
                record = await self._store.move(vm_id, {State.RUNNING}, State.STOPPING)
            except BaseException:
                self._vms.running_vms[vm_id] = vm
                raise
            await self._vms.finish_stop(record, vm, MANAGER, IDLE)
