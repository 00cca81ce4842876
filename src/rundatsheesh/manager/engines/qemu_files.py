"""The files of one virtual machine, and the file tree that is all of the host that its QEMU gets to see.

<runtime>/             a tmpfs of its own: bounded in bytes and files, and gone with one unmount
├── machine.json       QEMU's process, for the manager that comes after us
├── qmp.sock           control: bound here, handed to QEMU as a listening descriptor
├── agent.sock         the host's end of the agent's port, likewise
├── console.log        the guest's serial console; STORAGE_ROOT links to it while the guest runs
├── engine.log         what QEMU says
├── transfer/disk      content on its way, a disk of the guest: in a tmpfs of its own, of which logs take no room
└── root/              root of QEMU's mount namespace: its program, libraries, firmware and /proc
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rundatsheesh.manager.engines import logs
from rundatsheesh.manager.engines.base import VmFiles
from rundatsheesh.manager.errors import EngineError
from rundatsheesh.manager.host import mounts
from rundatsheesh.manager.host.mounts import Bind, Flag
from rundatsheesh.manager.host.process import ProcessRef

# Devices are made in it, so not NODEV; nobody but root can reach it, and QEMU can write to none of it.
TMPFS_FLAGS = Flag.NOSUID | Flag.NOEXEC
TMPFS_OPTIONS = "size=2m,nr_inodes=256,mode=0700"
TRANSFER_BYTES = 16 << 20  # four transfers at once, see manager/guest_slots.py; others take the channel
TRANSFER_OPTIONS = f"size={TRANSFER_BYTES},nr_inodes=4,mode=0700"
BACKLOG = 4
FIRMWARE = "usr/share/qemu"
LIBRARIES = ("usr/lib", "usr/lib64")
LINKS = ("lib", "lib64")  # where usr is merged; directories elsewhere
ENGINE_EVIDENCE, CONSOLE_EVIDENCE = 2000, 6000  # bytes of each log's end; a panic's trace takes 4000


@dataclass(frozen=True, slots=True)
class MachineFiles:
    """Paths on the host, derived from the runtime directory; nothing is created by asking."""

    runtime: Path

    @property
    def qmp(self) -> Path:
        return self.runtime / "qmp.sock"

    @property
    def agent(self) -> Path:
        return self.runtime / "agent.sock"

    @property
    def console(self) -> Path:
        return self.runtime / "console.log"

    @property
    def engine(self) -> Path:
        return self.runtime / "engine.log"

    @property
    def root(self) -> Path:
        return self.runtime / "root"

    @property
    def proc(self) -> Path:
        return self.runtime / "proc"

    @property
    def transfer(self) -> Path:
        return self.runtime / "transfer/disk"

    @property
    def process(self) -> Path:
        return self.runtime / "machine.json"


def prepare(files: VmFiles) -> None:
    """Mount the runtime directory and open the logs in it. Raises OSError."""
    machine = MachineFiles(files.runtime)
    files.runtime.mkdir(mode=0o700, parents=True, exist_ok=True)
    mounts.mount("rundatsheesh", files.runtime, "tmpfs", TMPFS_FLAGS, TMPFS_OPTIONS)
    for kept, live in _logs(files):
        logs.open_log(kept, live)
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
    if files.directory.is_dir():
        for kept, live in _logs(files):
            logs.settle_log(kept, live)
    mounts.unmount(MachineFiles(files.runtime).proc)  # where a manager died while it made the tree
    mounts.unmount_all(
        MachineFiles(files.runtime).transfer.parent
    )  # its host's end may be open for a moment longer than QEMU's
    mounts.unmount_all(files.runtime)
    if files.runtime.is_dir():
        shutil.rmtree(files.runtime)


def trim_logs(files: VmFiles) -> None:
    """Make room in the logs of a running guest, so that they go on with what is new."""
    for _, live in _logs(files):
        logs.trim_log(live)


def evidence(files: VmFiles) -> str:
    """The end of both logs."""
    tails = logs.read_tail(files.engine_log, ENGINE_EVIDENCE), logs.read_tail(files.console_log, CONSOLE_EVIDENCE)
    return b"\n".join(tail.strip() for tail in tails if tail.strip()).decode(errors="replace")


def write_process(files: VmFiles, process: ProcessRef) -> None:
    """Note QEMU's process. Complete or not at all."""
    path = MachineFiles(files.runtime).process
    new = path.with_suffix(".new")
    new.write_text(json.dumps([process.pid, process.start_time]))
    new.rename(path)


def read_process(files: VmFiles) -> ProcessRef | None:
    """What write_process noted; None when nothing was."""
    try:
        pid, start_time = json.loads(MachineFiles(files.runtime).process.read_text())
    except FileNotFoundError:
        return None
    return ProcessRef(pid, start_time)


def _logs(files: VmFiles) -> tuple[tuple[Path, Path], ...]:
    machine = MachineFiles(files.runtime)
    return (files.console_log, machine.console), (files.engine_log, machine.engine)


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
