"""The lifecycle of VMs. Record first, act second, one release.

The record and its slot exist before the first side effect, and everything on the host is named from them; so whatever
is cut short, `VmHost.release` can undo it from any state, now or after a restart. Operations on one VM run one after
the other; calls into it run beside each other and beside them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from rundatsheesh.manager import vms_notes
from rundatsheesh.manager.disk import workspace
from rundatsheesh.manager.engines.base import Engine
from rundatsheesh.manager.errors import Forbidden, LimitReached, NotFound, RdsError, Unavailable
from rundatsheesh.manager.model import (
    HIDDEN,
    Caller,
    CreateVm,
    EgressPolicy,
    ProvisionMode,
    State,
    VmRecord,
    VmSpec,
    now,
)
from rundatsheesh.manager.settings import Settings
from rundatsheesh.manager.store import Store
from rundatsheesh.manager.store.store import vm_not_found, wrong_state
from rundatsheesh.manager.vms_host import VmHost
from rundatsheesh.manager.vms_locks import KeyedLocks
from rundatsheesh.manager.vms_running import RunningVm

log = logging.getLogger(__name__)

SHUTDOWN_GRACE = 10.0  # seconds for a guest to end its processes and flush its disk
IMAGE_RETRY_S = 5.0  # somebody may be building it; as /health/ready says
MANAGER = Caller(request_id="-", who="manager")
STARTABLE = frozenset({State.STOPPED, State.ERROR})
# Every state that a caller can see.
DELETABLE = frozenset(State) - HIDDEN

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Images:
    """Which guest images there are."""

    default: Callable[[], str | None]  # id of this version's image; None where it was not built
    exists: Callable[[str], bool]


class Vms:
    def __init__(self, settings: Settings, store: Store, host: VmHost, images: Images) -> None:
        self._settings = settings
        self._store = store
        self._host = host
        self._images = images
        # For the other modules of this part, which hold a VM's lock while they change anything about it:
        self.running_vms: dict[str, RunningVm] = {}
        self.locks = KeyedLocks()
        self._boots = asyncio.Semaphore(settings.max_concurrent_boots)  # first come, first served
        self._unfinished: set[asyncio.Task[Any]] = set()
        self.lifetimes_changed = asyncio.Event()  # for whoever waits for the next deadline

    # --- looking ---

    async def get(self, vm_id: str) -> VmRecord:
        """Raises NotFound (`vm_not_found`)."""
        record = await self._store.get(vm_id)
        vm = self.running_vms.get(vm_id)
        if record.state is not State.RUNNING or vm is None or not vm.has_ended:
            return record
        async with self.locks.hold(vm_id):  # its end is known already, perhaps to the caller, and about to be recorded
            return await self._store.get(vm_id)

    async def list(self, *, state: State | None, labels: Mapping[str, str]) -> list[VmRecord]:
        """Oldest first."""
        return await self._store.list(state=state, labels=labels)

    def running(self, vm_id: str) -> RunningVm | None:
        return self.running_vms.get(vm_id)

    async def find_running(self, vm_id: str) -> RunningVm:
        """Raises NotFound, or Conflict that says in which state the VM is and why."""
        vm = self.running_vms.get(vm_id)
        if vm is not None and vm.record.state is State.WARM:
            raise vm_not_found(vm_id)
        if vm is not None and not vm.has_ended:
            vm.touch()
            return vm
        if vm is not None:
            await vm.wait_concluded()  # its record says in a moment why it ended
        async with self.locks.hold(vm_id):  # a start or stop on its way has an outcome, which is what counts
            record = await self._store.get(vm_id)
            vm = self.running_vms.get(vm_id)
        if vm is not None and not vm.has_ended:
            vm.touch()
            return vm
        error = wrong_state(vm_id, record.state, {State.RUNNING})
        if record.reason is not None:
            error.message += f" (it ended: {record.reason})"
            error.details["reason"] = record.reason
        raise error

    # --- life ---

    async def create(self, request: CreateVm, caller: Caller) -> VmRecord:
        """A VM whose agent has answered. When it raises or is cancelled, nothing of it is left."""
        spec, engine = self.plan(request)
        record = await self.reserve(spec, engine, caller)
        try:
            return await self.bring_up(record)
        except BaseException:
            await self.to_its_end(self.discard(record))
            raise

    def plan(self, request: CreateVm) -> tuple[VmSpec, Engine]:
        """What the caller asked for, made concrete. Raises InvalidInput, NotFound, Forbidden or Unavailable, above all
        StorageFull."""
        wanted = request.engine or (None if self._settings.engine == "auto" else self._settings.engine)
        engine = self._host.choose_engine(wanted)
        if request.snapshot_id is not None:
            raise NotFound(f"no snapshot {request.snapshot_id[:64]!r}", code="snapshot_not_found")
        spec = VmSpec(
            cpu=request.cpu,
            mem_mb=request.mem_mb,
            disk_mb=request.disk_mb or self._settings.default_disk_mb,
            policy=EgressPolicy(request.outbound, request.allow_ips, request.allow_domains),
            engine=engine.name,
            image_id=self._image(request.image_id),
            name=request.name,
            labels=dict(request.labels),
            lifetime=request.lifetime,
        )
        if spec.disk_mb > self._settings.max_disk_mb:
            raise Forbidden(f"diskSizeMb is at most {self._settings.max_disk_mb} (MAX_DISK_MB)", code="disk_too_large")
        self._host.check_room()
        return spec, engine

    async def reserve(self, spec: VmSpec, engine: Engine, caller: Caller) -> VmRecord:
        """A record in CREATING; raises LimitReached or Unavailable."""
        return await self._reserve(spec, engine, caller, State.CREATING, self._settings.max_vms)

    async def _reserve(self, spec: VmSpec, engine: Engine, caller: Caller, state: State, most: int) -> VmRecord:
        return await self._store.reserve(
            spec,
            node_id=self._host.node.id,
            block=self._host.node.block,
            isolation=engine.isolation,
            provision_mode=ProvisionMode.BOOT,
            max_vms=most,
            caller=caller,
            state=state,
        )

    async def bring_up(self, record: VmRecord) -> VmRecord:
        """From CREATING to RUNNING."""
        async with self.locks.hold(record.id):
            return await self._boot(record, State.CREATING, State.RUNNING, is_new=True)

    # --- ahead of demand ---

    async def warm_up(self, spec: VmSpec) -> VmRecord:
        """A VM of this shape that is nobody's yet; `claim` gives it away, `discard` releases it."""
        engine = self._host.choose_engine(spec.engine)
        record = await self._reserve(spec, engine, MANAGER, State.WARM, self._settings.warm_pool_max_vms)
        try:
            async with self.locks.hold(record.id):
                warm = await self._boot(record, State.WARM, State.WARM, is_new=True)
                await self._host.rehearse(self.running_vms[record.id])
                return warm
        except BaseException:
            await self.to_its_end(self.discard(record))
            raise

    async def claim(self, vm_id: str, spec: VmSpec, caller: Caller) -> VmRecord | None:
        """Make a warm VM the caller's, with policy, name and labels in force when this returns. None when it is gone;
        raises LimitReached as `create` does."""
        vm = self.running_vms.get(vm_id)
        if vm is None or vm.has_ended:
            return None
        try:
            return await self._claim(vm, spec, caller)
        except LimitReached:
            raise  # it stays warm
        except BaseException:
            # Whether the database had given it away already or not: nobody has it, so it goes.
            await self.to_its_end(self.discard(vm.record))
            raise

    async def _claim(self, vm: RunningVm, spec: VmSpec, caller: Caller) -> VmRecord | None:
        async with self.locks.hold(vm.record.id):
            record = await self._store.claim(
                vm.record.id, spec, node_id=self._host.node.id, max_vms=self._settings.max_vms, caller=caller
            )
            if record is None:
                return None
            vm.record = record
            vm.touch()
        self.lifetimes_changed.set()
        await self._host.network.set_policy(record.slot, spec.policy)
        await self._host.note(record, vms_notes.GIVEN_OUT)
        return record

    async def start(self, vm_id: str, caller: Caller) -> None:
        """From STOPPED or ERROR to RUNNING, with the same files. A failure ends in ERROR with its reason; where the
        host's disk is full, StorageFull is raised and the VM is as it was."""
        await self.to_its_end(self._start(vm_id, caller))

    async def _start(self, vm_id: str, caller: Caller) -> None:
        async with self.locks.hold(vm_id):
            self._host.check_room(workspace.MOUNT_BYTES)
            record = await self._store.move(vm_id, STARTABLE, State.STARTING, reason=None)
            try:
                await self._boot(record, State.STARTING, State.RUNNING)
            except BaseException:
                await self._store.move(vm_id, {State.STARTING}, State.ERROR, reason="start_failed")
                raise
            await self._store.history.record_activity("vm.start", caller=caller, vm_id=vm_id)

    async def stop(self, vm_id: str, caller: Caller) -> None:
        """From RUNNING to STOPPED: processes end, files stay."""
        await self.to_its_end(self.stop_held(vm_id, caller))

    async def stop_held(
        self, vm_id: str, caller: Caller, reason: str | None = None, *, only: RunningVm | None = None
    ) -> None:
        """`stop`, where a cancellation is somebody else's care. `only`: not where another one runs by now, or none."""
        async with self.locks.hold(vm_id):
            if only is not None and self.running_vms.get(vm_id) is not only:
                return
            record = await self._store.move(vm_id, {State.RUNNING}, State.STOPPING)
            await self.finish_stop(record, self.running_vms.pop(vm_id, None), caller, reason)

    async def finish_stop(
        self, record: VmRecord, vm: RunningVm | None, caller: Caller, reason: str | None = None
    ) -> None:
        """From STOPPING to STOPPED, while its lock is held."""
        if vm is not None:
            await vm.shut_down(SHUTDOWN_GRACE)
        await self._host.take_down(record)
        await self._host.note(record, vms_notes.stopped(reason))
        await self._store.move(record.id, {State.STOPPING}, State.STOPPED, reason=reason)
        await self._store.history.record_activity("vm.stop", caller=caller, vm_id=record.id, reason=reason)

    async def destroy(self, vm_id: str, caller: Caller) -> None:
        """Returns once process, network, mounts and files are gone. Calls that are open are told so."""
        await self.to_its_end(self._destroy(vm_id, caller))

    async def _destroy(self, vm_id: str, caller: Caller) -> None:
        async with self.locks.hold(vm_id):
            record = await self._store.move(vm_id, DELETABLE, State.DELETING)
            await self.release(record, "destroyed")
        await self._store.history.record_activity("vm.destroy", caller=caller, vm_id=vm_id, reason=record.reason)

    async def discard(self, record: VmRecord) -> None:
        """Release a VM that nobody was ever given. A failure leaves a record in DELETING for the reconciler."""
        try:
            async with self.locks.hold(record.id):
                await self._store.move(record.id, frozenset(State), State.DELETING)
                await self.release(record, "discarded")
        except (RdsError, OSError):
            log.exception("%s could not be released; the reconciler will try again", record.id)

    async def release(self, record: VmRecord, verdict: str) -> None:
        """End of a VM in DELETING, whose lock is held. `verdict` is what its open calls are told."""
        vm = self.running_vms.pop(record.id, None)
        if vm is not None:
            await vm.end(verdict)
        await self._host.release(record)
        await self._store.delete(record.id)

    async def _boot(self, record: VmRecord, from_: State, to: State, *, is_new: bool = False) -> VmRecord:
        async with self._boots:
            if is_new:
                await self._host.make_disk(record)
            vm = await self._host.boot(record, self.ended)
        try:
            moved = await self._store.move(
                record.id, {from_}, to, boot_id=vm.guest.hello.boot_id, started_at=now(), reason=None
            )
        except BaseException:
            await asyncio.shield(asyncio.ensure_future(self._abandon(vm)))
            raise
        vm.record = moved
        self.running_vms[record.id] = vm
        self.lifetimes_changed.set()
        return moved

    async def _abandon(self, vm: RunningVm) -> None:
        await vm.end("abandoned")
        await self._host.take_down(vm.record)

    async def ended(self, vm: RunningVm, reason: str) -> None:
        """The guest ended by itself, or had to be ended."""
        await self.to_its_end(self._bury(vm, reason))

    async def _bury(self, vm: RunningVm, reason: str) -> None:
        async with self.locks.hold(vm.record.id):
            await vm.detach()
            if self.running_vms.get(vm.record.id) is not vm:
                return  # stopped, deleted or restarted meanwhile
            if vm.record.state is State.WARM:
                await self.release(vm.record, reason)
                return
            said = vms_notes.ended(reason, vm.record, vm.exit)
            is_noted = await self._host.note(vm.record, said)
            # First what is shown: should something not go away, the audit finds it.
            try:
                await self._store.move(vm.record.id, {State.RUNNING}, State.ERROR, reason=reason)
            finally:
                del self.running_vms[vm.record.id]  # until then `get` sees from it that the record is about to change
            await self._store.history.record_activity("vm.died", caller=MANAGER, vm_id=vm.record.id, reason=reason)
            await self._host.take_down(vm.record)
            if not is_noted:  # the guest had filled the place where its logs were until now
                await self._host.note(vm.record, said)

    def is_worked_on(self, vm_id: str) -> bool:
        return self.locks.is_held(vm_id)

    async def let_go(self) -> None:
        """At shutdown: finish what is under way, then leave the guests running for the next manager."""
        while self._unfinished:
            await asyncio.gather(*self._unfinished, return_exceptions=True)
        vms, self.running_vms = list(self.running_vms.values()), {}
        await asyncio.gather(*(vm.detach() for vm in vms))

    # --- helpers ---

    def _image(self, wanted: str | None) -> str:
        default = self._images.default()
        if wanted in (None, "default"):
            if default is None:
                hint = "`rds setup` builds it, and the server finds it then"
                raise Unavailable("the guest image is missing", code="not_ready", hint=hint, retry_after=IMAGE_RETRY_S)
            return default
        if not self._images.exists(str(wanted)):
            raise NotFound(f"no image {str(wanted)[:64]!r}", code="image_not_found")
        return str(wanted)

    async def to_its_end(self, work: Coroutine[Any, Any, T]) -> T:
        """Run it to its end even when the caller goes away: half an operation is nobody's wish."""
        task = asyncio.ensure_future(work)
        self._unfinished.add(task)
        task.add_done_callback(self._unfinished.discard)
        task.add_done_callback(_note_failure)
        return await asyncio.shield(task)


def _note_failure(task: asyncio.Task[Any]) -> None:
    """Whoever waited has the exception; this keeps it known where nobody did any more."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.debug("an operation failed: %r", error)
