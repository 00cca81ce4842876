"""VMs that this process did not start. After a restart of the manager they are adopted, or brought to the state that
their records lead to.

What callers see is decided first, and quickly; what has to be taken away is taken away afterwards, while the VM is
held: whoever wants to work on it waits for that, and nobody sees anything half done.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial

from rundatsheesh.manager import vms_notes
from rundatsheesh.manager.errors import RdsError
from rundatsheesh.manager.model import State, VmRecord
from rundatsheesh.manager.store import Store
from rundatsheesh.manager.vms import MANAGER, SHUTDOWN_GRACE, STARTABLE, Vms
from rundatsheesh.manager.vms_host import VmHost

log = logging.getLogger(__name__)

INTERRUPTED = "interrupted"  # why a VM is stopped whose start or stop was cut short
# Whoever wanted it was never given it, or gave it up.
_NOBODYS = frozenset({State.CREATING, State.WARM, State.DELETING})
_ON_ITS_WAY = frozenset({State.STARTING, State.STOPPING})

CleanUp = Callable[[], Awaitable[None]]


class VmRecovery:
    def __init__(self, store: Store, host: VmHost, vms: Vms) -> None:
        self._store = store
        self._host = host
        self._vms = vms

    async def recover(
        self, record: VmRecord, decided: Callable[[], None], turn: Callable[[CleanUp], Awaitable[None]]
    ) -> None:
        """Once per record, after a restart. `decided` is called when the VM is shown as what it is from now on, also
        where that fails; `turn` runs what is then left to do. The VM is held from the first step of this coroutine
        until it is done. Raises RdsError or OSError."""
        async with self._vms.locks.hold(record.id):
            try:
                clean_up = await self._decide(record)
            finally:
                decided()
            if clean_up is not None:
                await turn(clean_up)

    async def clean_up(self, record: VmRecord, turn: Callable[[CleanUp], Awaitable[None]]) -> None:
        """Once per VM at rest of which more is left on the host than its directory. Held as above."""
        async with self._vms.locks.hold(record.id):
            await turn(partial(self._host.take_down, record))

    async def settle(self, vm_id: str, remove: Callable[[], Awaitable[None]]) -> None:
        """Make an end of what the audit found of a VM that this manager is not connected to: its record and the host
        agree afterwards. `remove` takes away what no record accounts for."""
        if self._vms.is_worked_on(vm_id):
            return
        async with self._vms.locks.hold(vm_id):
            records = await self._store.list_all(self._host.node.id)
            record = next((record for record in records if record.id == vm_id), None)
            if record is not None and vm_id not in self._vms.running_vms:
                clean_up = await self._decide(record)
                if record.state in STARTABLE:
                    clean_up = partial(self._host.take_down, record)
                if clean_up is not None:
                    await clean_up()
            if record is None or record.state in STARTABLE:
                await remove()

    async def repair_network(self, vm_id: str, *, look: bool) -> None:
        """Put a running VM's rules, addresses and names back in force where somebody changed them. `look`: see which
        rules there are, rather than believe what the last look has shown."""
        if self._vms.is_worked_on(vm_id):
            return
        async with self._vms.locks.hold(vm_id):
            vm = self._vms.running(vm_id)
            if vm is not None and not vm.has_ended:
                await self._host.network.adopt(vm.record.slot, vm.record.spec.policy, look=look)

    async def _decide(self, record: VmRecord) -> CleanUp | None:
        """Adopt the guest, or show the VM as what has become of it; returns what is left to do for that."""
        if record.state is State.RUNNING:
            reason = await self._adopt(record)
            return None if reason is None else await self._declare_dead(record, reason)
        if record.state in _NOBODYS:
            await self._store.move(record.id, {record.state}, State.DELETING)
            return partial(self._vms.release, record, INTERRUPTED)
        if record.state in _ON_ITS_WAY:
            await self._store.move(record.id, {record.state}, State.STOPPED, reason=INTERRUPTED)
            return partial(self._finish_stop if record.state is State.STOPPING else self._abandon_start, record)
        return None

    async def _finish_stop(self, record: VmRecord) -> None:
        """In good order where the guest still answers: what it has not yet written to its disk would be lost."""
        try:
            vm = await self._host.adopt(record, self._vms.ended)
            if vm is not None:
                await vm.shut_down(SHUTDOWN_GRACE)
        except (RdsError, OSError) as error:
            log.info("%s does not shut down by itself: %s", record.id, error)
        await self._take_down(record, vms_notes.stopped(INTERRUPTED))

    async def _abandon_start(self, record: VmRecord) -> None:
        await self._take_down(record, vms_notes.stopped(INTERRUPTED))

    async def _take_down(self, record: VmRecord, said: str) -> None:
        await self._host.take_down(record)
        await self._host.note(record, said)

    async def _adopt(self, record: VmRecord) -> str | None:
        """None once the guest is ours; else the reason why it cannot be."""
        try:
            vm = await self._host.adopt(record, self._vms.ended)
        except (RdsError, OSError) as error:
            log.warning("%s cannot be adopted: %s", record.id, error)
            return f"not_adopted_{getattr(error, 'code', 'internal_error')}"
        if vm is None:
            return "ended_unattended"
        self._vms.running_vms[record.id] = vm
        self._vms.lifetimes_changed.set()
        return None

    async def _declare_dead(self, record: VmRecord, reason: str) -> CleanUp:
        await self._store.move(record.id, {State.RUNNING}, State.ERROR, reason=reason)
        await self._store.history.record_activity("vm.died", caller=MANAGER, vm_id=record.id, reason=reason)
        return partial(self._take_down, record, vms_notes.ended(reason, record, None))
