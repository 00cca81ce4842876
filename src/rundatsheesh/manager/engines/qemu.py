"""The QEMU engine: a small virtual machine with a kernel of its own.

One QEMU process per VM, in a session of its own, so that it outlives the manager. It runs as a user that is the VM's
alone, without any privilege, in the VM's cgroup, in a mount namespace that shows it no file but its own program, in a
network namespace without a network, and under its own seccomp filter. All that it works with are descriptors that it
inherits.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rundatsheesh.manager.disk import workspace
from rundatsheesh.manager.engines import qemu_args, qemu_boot, qemu_files
from rundatsheesh.manager.engines.base import Availability, Capability, Stream, VmFiles
from rundatsheesh.manager.engines.qemu_args import Accelerator, Boot, Clone, Descriptors, Hardware
from rundatsheesh.manager.engines.qemu_files import MachineFiles
from rundatsheesh.manager.engines.qemu_machine import QemuMachine
from rundatsheesh.manager.engines.qmp import Qmp
from rundatsheesh.manager.engines.runtime import cgroup_of
from rundatsheesh.manager.engines.templates import Key, Template, Templates
from rundatsheesh.manager.errors import EngineError, HostError
from rundatsheesh.manager.host import memfile, process, tap, tools, tsc
from rundatsheesh.manager.host.bootfiles import BootFiles
from rundatsheesh.manager.host.cgroup_layout import find_layout
from rundatsheesh.manager.host.cgroups import MIB, Limits
from rundatsheesh.manager.host.doctor import usable_kvm
from rundatsheesh.manager.host.process import Child
from rundatsheesh.manager.host.threads import in_thread, opened_in_thread
from rundatsheesh.manager.model import Isolation, Slot, VmRecord

# Each VM's QEMU is a user of its own, from a range that no distribution and no container manager gives out.
FIRST_UID = 1_900_000_000
PIDS_MAX = 128  # QEMU's threads: one per CPU, and up to 64 that wait for the disk
# QEMU's own memory on top of the guest's: 35 MiB, and what translated code takes where the CPU is emulated.
# The transfer disk is in memory, too.
_OWN_MB = 96 + (qemu_files.TRANSFER_BYTES >> 20)
OVERHEAD_MB = {Accelerator.KVM: _OWN_MB, Accelerator.TCG: _OWN_MB + 2 * qemu_args.TRANSLATION_MB}
BOOT_TIMEOUT = 120.0  # seconds; 3 on an idle host, and many may boot at once
START_TIMEOUT = 60.0  # for QEMU to be up, or a clone to have its state; a tenth of a second on an idle host
NEEDED = (qemu_args.PROGRAM, "nsenter", "unshare")


def vm_user(slot: Slot) -> int:
    """Uid and gid of a VM's QEMU."""
    return FIRST_UID + slot.number


@dataclass(frozen=True, slots=True)
class QemuConfig:
    image_root: Callable[[str], Path]  # image id → the guest's root directory, beside which its boot files lie
    agent: Path  # directory of the agent's package
    templates: bool = True  # start VMs as clones; otherwise each boots its kernel
    disk_mb: int = 1024  # of the workspace that templates have mounted: new VMs with such a disk start faster
    boot_timeout: float = BOOT_TIMEOUT


@dataclass(slots=True)
class Qemu:
    config: QemuConfig
    name: str = field(default="qemu", init=False)
    capabilities: frozenset[Capability] = field(default=frozenset({Capability.FREEZE}), init=False)
    link: Literal["veth", "tap"] = field(default="tap", init=False)
    templates: Templates = field(default_factory=Templates, init=False)
    # VMs whose disk is the copy of a template's and was not in use since, until they are started.
    _fresh: dict[str, Template] = field(default_factory=dict, init=False)
    _accelerator: Accelerator | None = field(default=None, init=False)
    _agent: qemu_boot.Agent | None = field(default=None, init=False)

    @property
    def isolation(self) -> Isolation:
        hardware = self.accelerator is Accelerator.KVM
        return Isolation.HARDWARE_VM if hardware else Isolation.EMULATED_VM

    @property
    def accelerator(self) -> Accelerator:
        if self._accelerator is None:
            self._accelerator = Accelerator.KVM if usable_kvm()[0] else Accelerator.TCG
        return self._accelerator

    def available(self) -> Availability:
        try:
            return self._look()
        except (HostError, OSError) as error:
            return Availability(False, str(error), getattr(error, "hint", None))

    async def make_disk(self, record: VmRecord, files: VmFiles) -> None:
        """As promised by Engine: where it can, what the template has mounted, so that the guest need not mount it."""
        if not self.config.templates or record.spec.disk_mb != self.config.disk_mb or files.disk.exists():
            return await workspace.create(files.disk, record.spec.disk_mb)
        _, template = await self._template(record, files)
        with template.disk() as disk:
            await workspace.create_copy(files.disk, disk)
        self._fresh[record.id] = template

    async def start(self, record: VmRecord, files: VmFiles) -> QemuMachine:
        fresh = self._fresh.pop(record.id, None)
        await self.release(record, files)
        try:
            return await self._start(record, files, fresh)
        except BaseException as error:
            log = qemu_files.evidence(files)
            # To its end even when we are cancelled, or a process would go on without an owner.
            await asyncio.shield(asyncio.ensure_future(self.release(record, files)))
            if isinstance(error, OSError):
                raise EngineError(f"cannot start {record.id}: {error}", details={"log": log}) from error
            if isinstance(error, EngineError):
                error.details["log"] = log
            raise

    async def adopt(self, record: VmRecord, files: VmFiles) -> QemuMachine | None:
        """As promised by Engine. A guest that was frozen runs again."""
        cgroup = cgroup_of(record)
        found, members = await in_thread(lambda: (qemu_files.read_process(files), cgroup.pids()))
        if found is None or found.pid not in members or not found.alive():
            return None
        await in_thread(cgroup.thaw)
        qmp = await Qmp.connect(MachineFiles(files.runtime).qmp)
        return QemuMachine(files, cgroup, found, None, qmp)

    async def release(self, record: VmRecord, files: VmFiles) -> None:
        self._fresh.pop(record.id, None)
        cgroup = cgroup_of(record)
        await in_thread(cgroup.kill)
        await in_thread(qemu_files.remove, files)
        await in_thread(cgroup.remove)

    async def _start(self, record: VmRecord, files: VmFiles, fresh: Template | None) -> QemuMachine:
        if not self.config.templates:
            return await self._run(record, files, None, is_fresh=False)
        key, template = await self._template(record, files)
        try:
            # Any disk may be mounted as one that is not fresh, that of another template too.
            return await self._run(record, files, template, is_fresh=template is fresh)
        except EngineError:
            # Whatever the reason, the next start is not to meet it again.
            self.templates.discard(key)
            raise

    async def _template(self, record: VmRecord, files: VmFiles) -> tuple[Key, Template]:
        key = await in_thread(self._key, record)
        return key, await self.templates.get(key, lambda: self._make_template(record, files))

    async def _run(self, record: VmRecord, files: VmFiles, template: Template | None, *, is_fresh: bool) -> QemuMachine:
        """Start QEMU for a VM; returns once the guest runs. `is_fresh`: its disk is what the template has mounted."""
        with ExitStack() as held:
            start, memory = self._boot(record, held) if template is None else _clone(template, held)
            network = held.enter_context(tap.opened(record.slot.link))
            own = held.enter_context(qemu_files.opened(files.disk, os.O_RDWR))
            # What the template has mounted must be there in any case, for the guest to unmount.
            disks = (None, own) if is_fresh else (own, _copy_of_disk(template, held))
            child = await self._launch(record, files, start, memory, network, disks)
        # Before the template is loaded, which was saved connected.
        stream = await asyncio.open_unix_connection(str(MachineFiles(files.runtime).agent))
        qmp = await _or_close(stream, Qmp.connect(MachineFiles(files.runtime).qmp))
        try:
            await _resume(qmp, start)
            await in_thread(qemu_files.write_process, files, child.ref)
        except BaseException:
            stream[1].close()
            await qmp.close()
            raise
        return QemuMachine(files, cgroup_of(record), child.ref, child, qmp, stream, has_workspace=is_fresh)

    async def _make_template(self, record: VmRecord, files: VmFiles) -> Template:
        try:
            return await self._boot_template(record, files)
        except OSError as error:
            raise EngineError(f"cannot make a template: {error}") from error
        finally:
            # To its end even when we are cancelled, or a process would go on without an owner.
            await asyncio.shield(asyncio.ensure_future(self.release(record, files)))

    async def _boot_template(self, record: VmRecord, files: VmFiles) -> Template:
        """Boot a machine in the place of the VM that is the first to need it, and keep it. No user's code ever runs in
        it."""
        with ExitStack() as held:
            disk = await workspace.create_in_memory(self.config.disk_mb)
            held.callback(os.close, disk)
            start, memory = self._boot(record, held)
            network = held.enter_context(tap.temporary())
            state = memfile.create("state")
            held.callback(os.close, state)
            child = await self._launch(record, files, start, memory, network, (None, disk))
            await self._save(files, state)
            await child.wait()
            return Template(memory, state, disk)

    async def _save(self, files: VmFiles, state: int) -> None:
        """Wait for the agent, then stop the machine and write out the state of its devices; its memory is a file
        already. QEMU ends. The machine is saved with somebody at the other end of the agent's port: to be told of that
        takes a clone longer than to answer."""
        machine = MachineFiles(files.runtime)
        stream = await asyncio.open_unix_connection(str(machine.agent))
        try:
            await qemu_boot.rehearse(stream, self.config.boot_timeout)
            await self._stop_and_save(machine, state)
        finally:
            stream[1].close()

    async def _stop_and_save(self, machine: MachineFiles, state: int) -> None:
        qmp = await Qmp.connect(machine.qmp)
        try:
            await qmp.execute("stop")
            await _set_capabilities(qmp, "x-ignore-shared", "events")
            saved = qmp.expect("MIGRATION", status="completed")
            await qmp.execute("getfd", descriptor=state, fdname="state")
            await qmp.execute("migrate", uri="fd:state")
            await asyncio.wait([saved], timeout=START_TIMEOUT)
            if not saved.done() or saved.cancelled():
                raise EngineError("QEMU did not save the template")
            await qmp.execute("quit")
        finally:
            await qmp.close()

    async def _launch(
        self,
        record: VmRecord,
        files: VmFiles,
        start: Boot | Clone,
        memory: int,
        network: int,
        disks: tuple[int | None, int | None],
    ) -> Child:
        """`disks`: the VM's own, and the fresh one."""
        hardware = self._hardware(record)
        cgroup = cgroup_of(record)
        # The guest cannot use more than its CPUs, each a thread. Devices are one more; with less both would be stopped
        # for the rest of each period when they work at the same time, as they do at a start.
        limits = Limits(hardware.cpu + 1, (hardware.mem_mb + OVERHEAD_MB[hardware.accelerator]) * MIB, PIDS_MAX)
        await in_thread(cgroup.create, limits)
        await in_thread(qemu_files.prepare, files)
        machine = MachineFiles(files.runtime)
        user = vm_user(record.slot)
        with ExitStack() as held:
            descriptors = Descriptors(
                memory=memory,
                root=held.enter_context(qemu_files.opened(self._boot_files(record).root, os.O_RDONLY)),
                console=held.enter_context(qemu_files.opened(machine.console, os.O_WRONLY | os.O_APPEND)),
                qmp=held.enter_context(qemu_files.listening(machine.qmp)),
                agent=held.enter_context(qemu_files.listening(machine.agent)),
                network=network,
                transfer=held.enter_context(qemu_files.opened(machine.transfer, os.O_RDWR)),
                workspace=disks[0],
                fresh=disks[1],
            )
            kvm_user = user if hardware.accelerator is Accelerator.KVM else None
            tree = await opened_in_thread(qemu_files.private_tree, files, _program(), kvm_user)
            held.callback(os.close, tree)
            log = held.enter_context(qemu_files.opened(machine.engine, os.O_WRONLY | os.O_APPEND))
            argv = qemu_args.command(hardware, descriptors, start, record.slot.guest_mac)
            confined = ["nsenter", f"--mount=/proc/self/fd/{tree}", f"--setgid={user}", f"--setuid={user}", "--", *argv]
            inherited = [*descriptors.all(), *_descriptors(start), tree]
            entered = cgroup.entering(["unshare", "--net", "--ipc", "--", *confined])
            return process.start(entered, stderr=log, pass_fds=inherited)

    def _boot(self, record: VmRecord, held: ExitStack) -> tuple[Boot, int]:
        """What a machine needs to boot, and the file that becomes its memory."""
        boot_files = self._boot_files(record)
        initrd = self._find_agent().initrd(boot_files)
        held.callback(os.close, initrd)
        kernel = held.enter_context(qemu_files.opened(boot_files.kernel, os.O_RDONLY))
        memory = memfile.create("memory", record.spec.mem_mb * MIB)
        held.callback(os.close, memory)
        return Boot(kernel, initrd), memory

    def _key(self, record: VmRecord) -> Key:
        return Key(
            hardware=self._hardware(record),
            image=tuple(qemu_boot.identity(path) for path in self._boot_files(record).all),
            agent=self._find_agent().digest,
            program=qemu_boot.identity(_program()),
            cpu_model=qemu_boot.cpu_model(),
        )

    def _hardware(self, record: VmRecord) -> Hardware:
        return Hardware(record.spec.cpu, record.spec.mem_mb, self.accelerator, tsc.frequency_khz())

    def _boot_files(self, record: VmRecord) -> BootFiles:
        return BootFiles(self.config.image_root(record.spec.image_id).parent)

    def _find_agent(self) -> qemu_boot.Agent:
        if self._agent is None:
            self._agent = qemu_boot.Agent(self.config.agent)
        return self._agent

    def _look(self) -> Availability:
        """Raises HostError or OSError for what is missing."""
        if os.uname().machine != "x86_64":
            return Availability(False, f"not supported on {os.uname().machine}", "use the gvisor engine")
        if os.geteuid() != 0:
            return Availability(False, "not root", "namespaces, mounts and cgroups need root: use sudo")
        for program in NEEDED:
            if tools.find_tool(program) is None:
                return Availability(False, f"{program} is not installed", "run `rds setup`")
        if not Path("/dev/net/tun").exists():
            return Availability(False, "no /dev/net/tun", "load the kernel module tun")
        find_layout()
        kvm, fact = usable_kvm()
        return Availability(True, "QEMU with KVM" if kvm else f"QEMU, which emulates the CPU: {fact}")


def _program() -> Path:
    found = tools.find_tool(qemu_args.PROGRAM)
    if found is None:
        raise EngineError(f"{qemu_args.PROGRAM} is not installed", hint="run `rds setup`")
    return found


def _clone(template: Template, held: ExitStack) -> tuple[Clone, int]:
    memory, state = held.enter_context(template.opened())
    return Clone(state), memory


def _copy_of_disk(template: Template | None, held: ExitStack) -> int | None:
    if template is None:
        return None
    with template.disk() as disk:
        copy = workspace.copy_in_memory(disk)
    held.callback(os.close, copy)
    return copy


def _descriptors(start: Boot | Clone) -> tuple[int, ...]:
    return (start.kernel, start.initrd) if isinstance(start, Boot) else (start.state,)


async def _set_capabilities(qmp: Qmp, *names: str) -> None:
    """x-ignore-shared: memory is no part of the saved state, for it is in its file."""
    states = [{"capability": name, "state": True} for name in names]
    await qmp.execute("migrate-set-capabilities", capabilities=states)


async def _or_close(stream: Stream, connecting: Awaitable[Qmp]) -> Qmp:
    try:
        return await connecting
    except BaseException:
        stream[1].close()
        raise


async def _resume(qmp: Qmp, start: Boot | Clone) -> None:
    """Return when the guest's processors run; raises EngineError when QEMU ends instead."""
    if isinstance(start, Boot):
        return
    await _set_capabilities(qmp, "x-ignore-shared", "events")
    loaded = qmp.expect("MIGRATION", status="completed")
    await qmp.execute("migrate-incoming", uri=f"fd:{start.state}")
    await asyncio.wait([loaded], timeout=START_TIMEOUT)
    if not loaded.done() or loaded.cancelled():
        raise EngineError("QEMU could not load the template")
    await qmp.execute("cont")  # as stopped as the template was
