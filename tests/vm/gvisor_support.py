"""Real sandboxes with an agent that does whatever the test says, as the guest's root: one gone over to the enemy."""

from __future__ import annotations

import asyncio
import os
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from rundatsheesh.manager.disk import workspace
from rundatsheesh.manager.engines.base import Machine, VmFiles
from rundatsheesh.manager.engines.gvisor import GVisor, GVisorConfig
from rundatsheesh.manager.host import loops, mounts
from rundatsheesh.manager.host.cgroup_layout import find_layout
from rundatsheesh.manager.host.cgroups import Cgroup, Cgroups
from rundatsheesh.manager.model import (
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
BLOCK = 900 + os.getpid() % 50  # two runs of the tests at once have two
MEM_MB = 192
CALL_TIMEOUT = 60.0  # seconds

AGENT = r"""
import os, socket, subprocess, threading

def serve(connection):
    with connection, connection.makefile("rb") as lines:
        command = lines.read()
        told = subprocess.run(["/bin/bash", "-c", command], stdin=-3, stdout=-1, stderr=-2).stdout
        connection.sendall(told)

os.umask(0o077)
listener = socket.socket(socket.AF_UNIX)
listener.bind("/run/agent/agent.sock")
listener.listen(16)
print("agent up", flush=True)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],)).start()
"""


@dataclass(frozen=True)
class OneImage:
    """Finds the same root for every image; unlike a lambda it can be handed to another interpreter."""

    root: Path

    def __call__(self, image_id: str) -> Path:
        return self.root


@dataclass
class Lab:
    """One VM's worth of everything that the engine is given, and the means to look for what it leaves."""

    directory: Path
    engine: GVisor
    record: VmRecord
    files: VmFiles

    @property
    def cgroup(self) -> Cgroup:
        return Cgroups(find_layout(), f"rundatsheesh-{self.record.node_id}").group(self.record.id)

    async def start(self) -> Machine:
        reset_network(self.record.slot)
        return await self.engine.start(self.record, self.files)

    def role(self, name: str) -> int:
        """The pid of one of the sandbox's three processes: runsc, gofer or sandbox."""
        return next(pid for pid in self.cgroup.pids() if _role(pid) == name)

    def leftovers(self) -> list[str]:
        """Processes, cgroups, mounts, loop devices and runtime files of this VM that exist now."""
        mounted = [m.target for m in mounts.list_mounts() if m.target.is_relative_to(self.directory)]
        held = [loops.backing_file(int(node.name[4:])) for node in Path("/sys/block").glob("loop*")]
        return [
            *(f"process {pid}" for pid in self.cgroup.pids()),
            *(f"process {pid}" for pid in processes_of(self.record.id)),
            *(f"cgroup {m}" for m in find_layout().every_mount if (m / f"rundatsheesh-{self.record.node_id}").exists()),
            *(f"mount {target}" for target in mounted),
            *(f"loop device of {file}" for file in held if file is not None and file.is_relative_to(self.directory)),
            *(str(path) for path in (self.files.runtime, self.files.workspace) if path.exists()),
        ]


@pytest.fixture(scope="session")
def guest_root() -> Path:
    found = next(IMAGE_CACHE.glob("images/*/root"), None)
    if found is None:
        pytest.skip("no guest image on this host: run `rds setup`")
    return found


@pytest.fixture
async def lab(tmp_path: Path, guest_root: Path) -> AsyncIterator[Lab]:
    async with open_lab(tmp_path, guest_root) as opened:
        yield opened


@asynccontextmanager
async def open_lab(directory: Path, root: Path, number: int = 0, *, agent: str = AGENT) -> AsyncIterator[Lab]:
    """A VM ready to be started. Whatever the test does with it, nothing of it is left afterwards."""
    record = make_record(number)
    own = directory / record.id
    (own / "agent").mkdir(parents=True)
    (own / "agent/__main__.py").write_text(agent)
    files = VmFiles(
        directory=own,
        disk=own / "workspace.img",
        workspace=own / "workspace",
        runtime=own / "run" / record.id,
        engine_log=own / "engine.log",
        console_log=own / "console.log",
    )
    engine = GVisor(GVisorConfig(IMAGE_CACHE, OneImage(root), own / "agent"))
    await workspace.create(files.disk, record.spec.disk_mb)
    lab = Lab(directory, engine, record, files)
    try:
        yield lab
        await engine.release(record, files)
        assert lab.leftovers() == []
    finally:
        await engine.release(record, files)
        subprocess.run(["ip", "netns", "delete", record.slot.netns], check=False, stderr=subprocess.DEVNULL)


def make_record(number: int) -> VmRecord:
    return VmRecord(
        id=new_vm_id(),
        node_id=f"test-{secrets.token_hex(4)}",
        slot=Slot(BLOCK * 1024 + 300 + number),
        spec=VmSpec(cpu=1, mem_mb=MEM_MB, disk_mb=64, policy=EgressPolicy(), engine="gvisor", image_id="image"),
        state=State.CREATING,
        isolation=Isolation.APPLICATION_KERNEL,
        provision_mode=ProvisionMode.BOOT,
        boot_id=None,
        reason=None,
        created_at=now(),
        started_at=None,
    )


async def call(machine: Machine, command: str, *, as_user: bool = False) -> str:
    """What a shell command of the guest's root, or of its user, says; as much of it as arrives if the guest ends."""
    reader, writer = await machine.connect()
    told = b""
    if as_user:
        command = f"exec setpriv --reuid 1000 --regid 1000 --clear-groups --inh-caps=-all bash -c {_quoted(command)}"
    try:
        writer.write(command.encode())
        writer.write_eof()
        async with asyncio.timeout(CALL_TIMEOUT):
            while data := await reader.read(65536):
                told += data
    except (ConnectionResetError, BrokenPipeError):
        told += b"(the guest ended)"
    writer.close()
    return told.decode()


def reset_network(slot: Slot) -> None:
    """The VM's network namespace anew, with a guest end as the engine expects it and the host end inside too."""
    run = subprocess.run
    if Path("/run/netns", slot.netns).exists():
        run(["ip", "netns", "delete", slot.netns], check=True)
    run(["ip", "netns", "add", slot.netns], check=True)
    commands = f"""
        link add eth0 type veth peer name host
        link set host up
        link set eth0 up
        addr add {slot.guest_ip}/32 dev eth0
        route add 172.16.0.1 dev eth0
        route add default via 172.16.0.1 dev eth0
    """
    run(["ip", "-n", slot.netns, "-batch", "-"], input=commands.encode(), check=True)


def processes_of(vm_id: str) -> list[int]:
    """Processes that name the VM on their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue  # ended meanwhile
            if b"runsc" in command and vm_id.encode() in command:
                found.append(int(entry.name))
    return found


async def in_another_manager(code: str, *arguments: str) -> str:
    """Run code in an interpreter of its own, as the manager before or after this one; what it printed."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    told, complaints = await child.communicate()
    assert child.returncode == 0, complaints.decode()
    return told.decode()


def _role(pid: int) -> str:
    name = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
    return {"runsc-gofer": "gofer", "runsc-sandbox": "sandbox", "/bin/runsc": "runsc"}.get(name, name)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
