"""What one VM has on this host, put up and taken down: disk, network, machine, channel. The steps of a VM's life."""

from __future__ import annotations

import asyncio
import logging
import secrets
import shutil
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rundatsheesh.manager import vms_notes
from rundatsheesh.manager.disk import workspace
from rundatsheesh.manager.disk.worker import Workers
from rundatsheesh.manager.engines import logs
from rundatsheesh.manager.engines.base import Engine, VmFiles
from rundatsheesh.manager.errors import HostError, InvalidInput, NetworkError, Unavailable
from rundatsheesh.manager.guest import ExecRequest, Identity, ScriptRequest
from rundatsheesh.manager.host.threads import in_thread
from rundatsheesh.manager.model import GATEWAY, Isolation, VmRecord, machine_id
from rundatsheesh.manager.net import Network
from rundatsheesh.manager.vms_layout import Layout, Node
from rundatsheesh.manager.vms_running import ADOPT_TIMEOUT, CONNECT_TIMEOUT, OnEnd, RunningVm

REHEARSAL_MS = 20_000  # for each program; a fraction of a second on an idle host

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class VmHost:
    """The host as VMs need it. Every step is idempotent, and derived from the record alone."""

    node: Node
    layout: Layout
    network: Network
    engines: Mapping[str, Engine]
    workers: Workers | None = None  # for file work on this host; without them all of it is the guests'

    def files(self, record: VmRecord) -> VmFiles:
        return self.layout.files(self.node.id, record.id)

    def engine_of(self, record: VmRecord) -> Engine:
        engine = self.engines.get(record.spec.engine)
        if engine is None:
            raise HostError(f"{record.id} was made by an engine that this version lacks: {record.spec.engine}")
        return engine

    def choose_engine(self, wanted: str | None) -> Engine:
        """The named engine, or the strongest that this host can run at speed: hardware VMs, then the application
        kernel, then emulated VMs. Raises InvalidInput with a hint, or Unavailable where none can run."""
        if wanted is not None:
            return self._named(wanted)
        for engine in sorted(self.engines.values(), key=lambda e: _PREFERENCE[e.isolation]):
            if engine.available().usable:
                return engine
        raise Unavailable("no engine can run on this host", hint="`rds doctor` says what each of them needs")

    def _named(self, wanted: str) -> Engine:
        engine = self.engines.get(wanted)
        if engine is None:
            known = ", ".join(sorted(self.engines))
            raise InvalidInput(f"no engine {wanted!r}", code="engine_unknown", hint=f"there are: {known}, auto")
        availability = engine.available()
        if not availability.usable:
            hint = availability.hint or "`rds doctor` says more"
            raise InvalidInput(
                f"this host cannot run {wanted}: {availability.fact}", code="engine_unavailable", hint=hint
            )
        return engine

    def check_room(self, least: int = workspace.HOST_RESERVE_BYTES) -> None:
        """Raises StorageFull where the disk of the VMs has less room than this, by default than a new one needs."""
        workspace.check_room(self.layout.vms, least)

    async def make_disk(self, record: VmRecord) -> None:
        files = self.files(record)
        await in_thread(files.directory.mkdir, mode=0o700, parents=True, exist_ok=True)
        await self.engine_of(record).make_disk(record, files)

    async def boot(self, record: VmRecord, on_end: OnEnd) -> RunningVm:
        """Network, machine, agent, identity: returns when the guest answers as itself. On failure the machine and the
        network are gone again."""
        engine = self.engine_of(record)
        begun = time.monotonic()
        try:
            await self.network.attach(record.slot, record.spec.policy, kind=engine.link)
            machine = await engine.start(record, self.files(record))
            running = await RunningVm.open(record, engine, machine, on_end, CONNECT_TIMEOUT)
            try:
                async with running.call() as guest:
                    await guest.configure(_identity(record, mount_workspace=not machine.has_workspace))
                await self.note(record, vms_notes.started(record, _milliseconds_since(begun)))
            except BaseException:
                await running.detach()
                raise
        except BaseException as error:
            said = vms_notes.not_started(error, _milliseconds_since(begun))
            await asyncio.shield(asyncio.ensure_future(self._give_up(record, said)))
            raise
        return running

    async def _give_up(self, record: VmRecord, said: str) -> None:
        await self.take_down(record)
        await self.note(record, said)

    async def rehearse(self, running: RunningVm) -> None:
        """Let the guest do once, on nobody's time, what its first caller would wait for: programs are mapped, their
        directories are looked up. Raises GuestError, GuestDied."""
        async with running.call() as guest:
            await guest.exec(ExecRequest(cmd="true", timeout_ms=REHEARSAL_MS, max_output=1024))
            await guest.run_script(_REHEARSAL)

    async def adopt(self, record: VmRecord, on_end: OnEnd) -> RunningVm | None:
        """Take over a guest that an earlier manager left running; None where it no longer runs."""
        engine = self.engine_of(record)
        machine = await engine.adopt(record, self.files(record))
        if machine is None:
            return None
        await self._adopt_network(record)
        running = await RunningVm.open(record, engine, machine, on_end, ADOPT_TIMEOUT)
        if running.guest.hello.boot_id != record.boot_id:
            await running.end("replaced")
            return None
        await self.note(record, vms_notes.ADOPTED)
        return running

    async def _adopt_network(self, record: VmRecord) -> None:
        """Twice where it fails, from what is really there then: a VM that runs is not given up for one refusal."""
        try:
            await self.network.adopt(record.slot, record.spec.policy, look=False)
        except NetworkError as error:
            log.warning("the network of %s is adopted once more: %s", record.id, error)
            await self.network.adopt(record.slot, record.spec.policy)

    async def note(self, record: VmRecord, text: str) -> bool:
        """Say something in the VM's engine log; whether that could be written. Never raises."""
        return await in_thread(logs.note, self.files(record).engine_log, text)

    async def take_down(self, record: VmRecord) -> None:
        """No process and no network of the VM is left; its disk and logs stay."""
        await self.engine_of(record).release(record, self.files(record))
        await self.network.detach(record.slot)

    async def release(self, record: VmRecord) -> None:
        """Nothing of the VM is left on this host."""
        await self.take_down(record)
        files = self.files(record)
        await in_thread(_remove_tree, files.directory)
        await in_thread(_remove_tree, files.runtime)


# Emulation is the strongest wall after hardware, but 10 to 30 times slower than the application kernel.
_PREFERENCE = {Isolation.HARDWARE_VM: 0, Isolation.APPLICATION_KERNEL: 1, Isolation.EMULATED_VM: 2}

_REHEARSAL = ScriptRequest(language="ts", code="", timeout_ms=REHEARSAL_MS, max_output=1024, allow_net=False)


def _identity(record: VmRecord, *, mount_workspace: bool) -> Identity:
    """A new boot id each time; the machine id stays the VM's."""
    return Identity(
        hostname=record.id,
        guest_ip=str(record.slot.guest_ip),
        mac=record.slot.guest_mac,
        gateway=str(GATEWAY),
        machine_id=machine_id(record.id),
        entropy=secrets.token_bytes(64),
        mount_workspace=mount_workspace,
        boot_id=uuid.uuid4().hex,
    )


def _milliseconds_since(begun: float) -> int:
    return int((time.monotonic() - begun) * 1000)


def _remove_tree(directory: Path) -> None:
    try:
        shutil.rmtree(directory)
    except FileNotFoundError:
        return
    except OSError as error:
        raise HostError(f"{directory} cannot be removed: {error}") from error
