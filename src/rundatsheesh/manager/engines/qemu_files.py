"""The files of one virtual machine, and the file tree that is all of the host that its QEMU gets to see.

<runtime>/         see runtime.py
├── machine.json   QEMU's process
├── qmp.sock       control: bound here, handed to QEMU as a listening descriptor
├── agent.sock     the host's end of the agent's port, likewise
├── console.log    the guest's serial console
├── transfer/disk  content on its way, a disk of the guest: in a tmpfs of its own, of which logs take no room
└── root/          root of QEMU's mount namespace: its program, libraries, firmware and /proc
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rundatsheesh.manager.engines import runtime
from rundatsheesh.manager.engines.base import VmFiles
from rundatsheesh.manager.engines.runtime import RuntimeFiles
from rundatsheesh.manager.errors import EngineError
from rundatsheesh.manager.host import mounts
from rundatsheesh.manager.host.mounts import Bind, Flag
from rundatsheesh.manager.host.process import ProcessRef

# Devices are made in it, so not NODEV; nobody but root can reach it, and QEMU can write to none of it.
TMPFS_FLAGS = Flag.NOSUID | Flag.NOEXEC
TRANSFER_BYTES = 16 << 20  # four transfers at once, see manager/guest_slots.py; others take the channel
TRANSFER_OPTIONS = f"size={TRANSFER_BYTES},nr_inodes=4,mode=0700"
BACKLOG = 4
FIRMWARE = "usr/share/qemu"
LIBRARIES = ("usr/lib", "usr/lib64")
LINKS = ("lib", "lib64")  # where usr is merged; directories elsewhere
CONSOLE_EVIDENCE = 6000  # bytes of the log's end; a panic's trace takes 4000


@dataclass(frozen=True, slots=True)
class MachineFiles(RuntimeFiles):
    @property
    def qmp(self) -> Path:
        return self.runtime / "qmp.sock"

    @property
    def agent(self) -> Path:
        return self.runtime / "agent.sock"

    @property
    def proc(self) -> Path:
        return self.runtime / "proc"

    @property
    def transfer(self) -> Path:
        return self.runtime / "transfer/disk"


def prepare(files: VmFiles) -> None:
    """Mount the runtime directory and make what QEMU's files go into. Raises OSError."""
    machine = MachineFiles(files.runtime)
    runtime.prepare(files, TMPFS_FLAGS)
    machine.root.mkdir(mode=0o755)
    machine.transfer.parent.mkdir(mode=0o700)
    mounts.mount("rundatsheesh", machine.transfer.parent, "tmpfs", TMPFS_FLAGS, TRANSFER_OPTIONS)
    with open(machine.transfer, "xb") as disk:
        disk.truncate(TRANSFER_BYTES)


def private_tree(files: VmFiles, program: Path, kvm_user: int | None) -> int:
    """A descriptor of QEMU's mount namespace. `kvm_user` is who may open /dev/kvm in it. Raises OSError."""
    root = MachineFiles(files.runtime).root
    binds = _binds(root, program)
    _make_devices(root / "dev", kvm_user)
    (root / "proc").mkdir()
    proc = MachineFiles(files.runtime).proc
    proc.mkdir()
    # A view of its own, in which no process of another user exists. The copy in the namespace stays.
    mounts.mount("proc", proc, "proc", Flag.NOSUID | Flag.NODEV | Flag.NOEXEC, "hidepid=invisible,subset=pid")
    try:
        return mounts.private_namespace(root, [*binds, Bind(proc, "proc")])
    finally:
        mounts.unmount(proc)


@contextmanager
def listening(path: Path) -> Iterator[int]:
    """The descriptor of a listening socket at the path; who inherits it keeps it open."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(BACKLOG)
        yield listener.fileno()


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def remove(files: VmFiles) -> None:
    """Keep the logs, then remove the runtime directory with all that is in it. Idempotent; QEMU must be gone."""
    machine = MachineFiles(files.runtime)
    runtime.keep_logs(files)
    mounts.unmount(machine.proc)  # where a manager died while it made the tree
    mounts.unmount_all(machine.transfer.parent)  # its host's end may be open for a moment longer than QEMU's
    runtime.remove(files)


def evidence(files: VmFiles) -> str:
    """The end of both logs."""
    return runtime.evidence(files, CONSOLE_EVIDENCE)


def write_process(files: VmFiles, process: ProcessRef) -> None:
    """Note QEMU's process. Complete or not at all."""
    runtime.write_note(files, [process.pid, process.start_time])


def read_process(files: VmFiles) -> ProcessRef | None:
    """What write_process noted; None when nothing was."""
    note = runtime.read_note(files)
    return None if note is None else ProcessRef(*note)


def _binds(root: Path, program: Path) -> list[Bind]:
    """What a dynamically linked program needs, and its firmware. Makes the mount points."""
    binds = []
    for name in (*LIBRARIES, *LINKS, FIRMWARE):
        source = Path("/", name)
        if source.is_symlink():
            (root / name).symlink_to(source.readlink())
        elif source.is_dir():
            (root / name).mkdir(parents=True)
            binds.append(Bind(source, name, read_only=True))
    for file, name in ((program.resolve(), f"usr/bin/{program.name}"), (Path("/etc/ld.so.cache"), "etc/ld.so.cache")):
        if not file.is_file():
            raise EngineError(f"there is no {file}")
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
        binds.append(Bind(file, name, read_only=True))
    return binds


def _make_devices(directory: Path, kvm_user: int | None) -> None:
    directory.mkdir()
    null = directory / "null"
    os.mknod(null, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    null.chmod(0o666)
    if kvm_user is not None:
        kvm = directory / "kvm"
        os.mknod(kvm, 0o600 | stat.S_IFCHR, Path("/dev/kvm").stat().st_rdev)
        os.chown(kvm, kvm_user, kvm_user)
