"""Real virtual machines with the real agent, or with one that does what the test says as the guest's root."""

from __future__ import annotations

import asyncio
import os
import secrets
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import rundatsheesh.agent
from rundatsheesh.manager.build import kernel
from rundatsheesh.manager.disk import workspace
from rundatsheesh.manager.engines.base import VmFiles
from rundatsheesh.manager.engines.qemu import Qemu, QemuConfig, vm_user
from rundatsheesh.manager.engines.qemu_machine import QemuMachine
from rundatsheesh.manager.engines.templates import Templates
from rundatsheesh.manager.guest import CallResult, ExecRequest, Guest, Identity
from rundatsheesh.manager.host import mounts, tap
from rundatsheesh.manager.host.bootfiles import BootFiles
from rundatsheesh.manager.host.cgroup_layout import find_layout
from rundatsheesh.manager.host.cgroups import Cgroup, Cgroups
from rundatsheesh.manager.model import (
    GATEWAY,
    EgressPolicy,
    Isolation,
    ProvisionMode,
    Slot,
    State,
    VmRecord,
    VmSpec,
    new_vm_id,
    now,
)

IMAGE_CACHE = Path("/var/cache/rundatsheesh")
AGENT = Path(rundatsheesh.agent.__file__).parent
BLOCK = 950 + os.getpid() % 50  # two runs of the tests at once have two
MEM_MB = 256
REPLY_TIMEOUT = 120.0  # seconds; the machines that run the tests are busy, and the CPU is emulated

# An agent gone over to the enemy: a root shell. It speaks no protocol, so it cannot become a template.
ROOT_SHELL = r"""
import os, subprocess

port = open("/dev/vport0p1", "r+b", buffering=0)
print("root shell", flush=True)
pending = b""
while True:
    data = port.read(4096)
    if not data:  # nobody is connected
        import time
        time.sleep(0.01)
        continue
    pending += data
    while b"\0" in pending:
        command, _, pending = pending.partition(b"\0")
        told = subprocess.run(["/bin/bash", "-c", command], stdin=-3, stdout=-1, stderr=-2).stdout
        port.write(told + b"\0")
"""


@dataclass
class Lab:
    """One engine, one directory, and any number of VMs in it."""

    directory: Path
    engine: Qemu
    node_id: str
    vms: list[Vm]

    def vm(self, *, mem_mb: int = MEM_MB, cpu: int = 1) -> Vm:
        """A VM that may be started: it has a disk and a tap once it is opened."""
        record = make_record(self.node_id, len(self.vms), mem_mb, cpu)
        own = self.directory / record.id
        own.mkdir(mode=0o700)
        files = VmFiles(
            directory=own,
            disk=own / "workspace.img",
            workspace=own / "workspace",
            runtime=own / "run",
            engine_log=own / "engine.log",
            console_log=own / "console.log",
        )
        vm = Vm(self.engine, record, files)
        self.vms.append(vm)
        return vm

    def leftovers(self) -> list[str]:
        """Processes, cgroups, mounts and runtime files of these VMs that exist now."""
        mounted = [m.target for m in mounts.list_mounts() if m.target.is_relative_to(self.directory)]
        users = {vm_user(vm.record.slot) for vm in self.vms}
        return [
            *(f"process {pid}" for pid in _processes_of(users)),
            *(f"cgroup {m}" for m in find_layout().every_mount if (m / f"rundatsheesh-{self.node_id}").exists()),
            *(f"mount {target}" for target in mounted),
            *(str(vm.files.runtime) for vm in self.vms if vm.files.runtime.exists()),
        ]


@dataclass
class Vm:
    engine: Qemu
    record: VmRecord
    files: VmFiles

    @property
    def cgroup(self) -> Cgroup:
        return Cgroups(find_layout(), f"rundatsheesh-{self.record.node_id}").group(self.record.id)

    @property
    def qemu(self) -> int:
        """The pid of QEMU."""
        (pid,) = self.cgroup.pids()
        return pid

    async def prepare(self) -> None:
        await workspace.create(self.files.disk, self.record.spec.disk_mb)
        tap.create(self.record.slot.link)

    async def start(self) -> QemuMachine:
        await self.prepare()
        return await self.engine.start(self.record, self.files)

    async def open(self) -> tuple[QemuMachine, Guest]:
        """Started, and made itself."""
        machine = await self.start()
        guest = await Guest.connect(await machine.connect(), timeout=REPLY_TIMEOUT)
        await guest.configure(replace(self.identity(), mount_workspace=not machine.has_workspace))
        return machine, guest

    def identity(self) -> Identity:
        return Identity(
            hostname=self.record.id,
            guest_ip=str(self.record.slot.guest_ip),
            mac=self.record.slot.guest_mac,
            gateway=str(GATEWAY),
            machine_id=secrets.token_hex(16),
            entropy=secrets.token_bytes(64),
            boot_id=secrets.token_hex(16),
        )


async def run(guest: Guest, command: str, timeout_ms: int = 60_000) -> CallResult:
    return await guest.exec(ExecRequest(command, timeout_ms=timeout_ms, max_output=1 << 20))


async def output(guest: Guest, command: str) -> str:
    result = await run(guest, command)
    assert result.exit_code == 0, result
    return result.stdout.strip()


async def ask_root(machine: QemuMachine, command: str) -> str:
    """What the ROOT_SHELL says to a command. Raises IncompleteReadError when the guest ends first."""
    reader, writer = await machine.connect()
    try:
        writer.write(command.encode() + b"\0")
        async with asyncio.timeout(REPLY_TIMEOUT):
            return (await reader.readuntil(b"\0"))[:-1].decode()
    finally:
        writer.close()


@pytest.fixture(scope="session")
def image_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A guest root beside which this recipe's boot files lie."""
    found = sorted(IMAGE_CACHE.glob("images/*/root"), key=lambda root: kernel.has_vm_files(root.parent))
    if not found:
        pytest.skip("no guest image on this host: run `rds setup`")
    root = found[-1]
    if kernel.has_vm_files(root.parent):
        yield root
        return
    if (reason := kernel.unsupported_because()) is not None:
        pytest.skip(reason)
    directory = tmp_path_factory.mktemp("image")
    (directory / "root").symlink_to(root)
    asyncio.run(kernel.build_vm_files(root, directory, dict(os.environ)))
    yield directory / "root"
    for path in BootFiles(directory).all:
        path.unlink()


def discard_all(templates: Templates) -> None:
    """Give back the memory that they take."""
    for key in list(templates._kept):
        templates.discard(key)


async def let_go(machine: QemuMachine) -> None:
    """The guest runs on: what the end of a manager does."""
    machine._exit.cancel()
    await asyncio.gather(machine._exit, return_exceptions=True)
    await machine._qmp.close()
    machine._close_stream()


@pytest.fixture(scope="session")
def shared_engine(image_root: Path) -> Iterator[Qemu]:
    """One engine, so that the tests share its templates."""
    engine = Qemu(QemuConfig(lambda image_id: image_root, AGENT))
    yield engine
    discard_all(engine.templates)


@pytest.fixture
async def lab(tmp_path: Path, shared_engine: Qemu) -> AsyncIterator[Lab]:
    async with open_lab(tmp_path, shared_engine) as opened:
        yield opened


@pytest.fixture
async def new_lab(tmp_path: Path, image_root: Path) -> AsyncIterator[Lab]:
    """Without a template."""
    engine = Qemu(QemuConfig(lambda image_id: image_root, AGENT))
    async with open_lab(tmp_path, engine) as opened:
        yield opened
    discard_all(engine.templates)


@pytest.fixture
async def root_lab(tmp_path: Path, image_root: Path) -> AsyncIterator[Lab]:
    """Its VMs boot, each with a root shell for an agent."""
    agent = tmp_path / "agent"
    agent.mkdir()
    (agent / "__main__.py").write_text(ROOT_SHELL)
    engine = Qemu(QemuConfig(lambda image_id: image_root, agent, templates=False))
    async with open_lab(tmp_path, engine) as opened:
        yield opened


@asynccontextmanager
async def open_lab(directory: Path, engine: Qemu) -> AsyncIterator[Lab]:
    """Whatever the test does with it, nothing of it is left afterwards."""
    lab = Lab(directory, engine, f"test-{secrets.token_hex(4)}", [])
    try:
        yield lab
        await asyncio.gather(*(engine.release(vm.record, vm.files) for vm in lab.vms))
        assert lab.leftovers() == []
    finally:
        for vm in lab.vms:
            await engine.release(vm.record, vm.files)
            subprocess.run(["ip", "link", "delete", vm.record.slot.link], check=False, stderr=subprocess.DEVNULL)


def make_record(node_id: str, number: int, mem_mb: int, cpu: int) -> VmRecord:
    return VmRecord(
        id=new_vm_id(),
        node_id=node_id,
        slot=Slot(BLOCK * 1024 + 300 + number),
        spec=VmSpec(cpu=cpu, mem_mb=mem_mb, disk_mb=256, policy=EgressPolicy(), engine="qemu", image_id="image"),
        state=State.CREATING,
        isolation=Isolation.EMULATED_VM,
        provision_mode=ProvisionMode.BOOT,
        boot_id=None,
        reason=None,
        created_at=now(),
        started_at=None,
    )


def _processes_of(users: set[int]) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and entry.stat().st_uid in users:
                found.append(int(entry.name))
        except FileNotFoundError:
            continue
    return found
