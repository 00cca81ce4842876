"""The disk behind /workspace: one sparse ext4 file per VM. It takes space on the host as the guest writes, and gives it
back as the guest deletes.

Engines that share a directory with the guest mount it on the host through a loop device, others attach the file. The
guest never writes raw blocks of a disk that this module mounts: a crafted file system would reach the host's kernel.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rundatsheesh.manager.errors import HostError, StorageFull
from rundatsheesh.manager.host import loops, memfile, mounts, process
from rundatsheesh.manager.host.mounts import Flag
from rundatsheesh.manager.host.space import NO_ROOM, free_bytes
from rundatsheesh.manager.host.threads import in_thread
from rundatsheesh.manager.model import GUEST_UID

log = logging.getLogger(__name__)

MIB = 1 << 20
HOST_RESERVE_BYTES = 256 * MIB  # a new disk is refused when the host has less than this left
# A disk that exists is not mounted with less: its journal, which may never have been written to, takes space then.
MOUNT_BYTES = 32 * MIB
FORMAT_TIMEOUT = 60.0  # seconds; measured 8 ms, most of it the start of the process
UNMOUNT_TIMEOUT = 10.0
RELEASE_TIMEOUT = 2.0
# No background writes into an idle disk (noinit_itable), and deleted files free space on the host (discard).
_MOUNT_OPTIONS = "noinit_itable,discard,errors=remount-ro"
_FAILED = frozenset({"ro", "emergency_ro"})  # what that looks like; the second since Linux 6.15


def check_room(directory: Path, least: int = HOST_RESERVE_BYTES) -> None:
    """Raises StorageFull where the file system of this directory has less room than this, OSError."""
    if free_bytes(directory) < least:
        raise _full()


def list_failed(directory: Path) -> list[Path]:
    """Where beneath this directory disks are mounted that take no more writes since an error of the host's disk."""
    mounted = (m for m in mounts.list_mounts() if m.target.is_relative_to(directory))
    return [m.target for m in mounted if m.fstype == "ext4" and m.super_options & _FAILED]


async def create(path: Path, size_mb: int) -> None:
    """Make an empty disk of this size whose root belongs to the guest's user. It appears complete or not at all, also
    when the host crashes; an existing one is left as it is. Raises StorageFull, HostError."""
    await _make(path, size_mb * MIB, lambda new: _format(new, size_mb))


async def create_copy(path: Path, template: int) -> None:
    """As `create`, with the content of an open file, a disk that nobody writes to."""
    await _make(path, os.fstat(template).st_size, lambda new: in_thread(_copy_to, template, new))


async def create_in_memory(size_mb: int) -> int:
    """A descriptor of an empty disk that has no path. Takes a few hundred kilobytes."""
    disk = memfile.create("disk", size_mb * MIB)
    try:
        await _format(Path(f"/proc/self/fd/{disk}"), size_mb, pass_fds=[disk])
    except BaseException:
        os.close(disk)
        raise
    return disk


def copy_in_memory(template: int) -> int:
    """A descriptor of a copy that may be written to and has no path."""
    disk = memfile.create("disk", os.fstat(template).st_size)
    with memfile.closed_on_error(disk):
        _copy(template, disk)
    return disk


async def mount(path: Path, mountpoint: Path) -> None:
    """Mount the disk, whose owner can enter its root then; the directory is made when missing. Does nothing when just
    this disk is mounted there already. Raises StorageFull, HostError."""
    with _storage_errors(path):
        await in_thread(_mount, path, mountpoint)


async def unmount(mountpoint: Path) -> None:
    """Unmount whatever is mounted there and remove the directory; written data is on the host's file by then.
    Idempotent. Raises HostError while a process on the host still uses it."""
    await in_thread(_unmount, mountpoint)


async def _make(path: Path, size: int, fill: Callable[[Path], Awaitable[None]]) -> None:
    if await in_thread(path.exists):
        return
    new = path.with_name(path.name + ".new")
    with _storage_errors(path):
        await in_thread(_make_sparse, new, size)
        try:
            await fill(new)
            await in_thread(_commit, new, path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise


async def _format(path: Path, size_mb: int, pass_fds: Sequence[int] = ()) -> None:
    journal_mb = 4 if size_mb < 1024 else 16  # its space is taken from the host for good once it was written to
    extended = f"lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner={GUEST_UID}:{GUEST_UID}"
    options = ["-q", "-F", "-b", "4096", "-m", "0", "-J", f"size={journal_mb}", "-E", extended, "-O", "^resize_inode"]
    without = ["debugfs", "-w", "-R", "rmdir lost+found", str(path)]
    await process.run(["mkfs.ext4", *options, str(path)], timeout=FORMAT_TIMEOUT, pass_fds=pass_fds)
    await process.run(without, timeout=FORMAT_TIMEOUT, pass_fds=pass_fds)


def _make_sparse(path: Path, size: int) -> None:
    check_room(path.parent)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.ftruncate(descriptor, size)
    finally:
        os.close(descriptor)


def _copy_to(source: int, path: Path) -> None:
    with open(path, "r+b", 0) as file:
        _copy(source, file.fileno())


def _copy(source: int, target: int) -> None:
    """What holds data; the rest of `target` stays as sparse as it is. Moves the position of `source`."""
    end = 0
    while (start := _seek(source, end, os.SEEK_DATA)) is not None:
        end = os.lseek(source, start, os.SEEK_HOLE)
        os.lseek(target, start, os.SEEK_SET)
        at = start
        while at < end:
            at += os.sendfile(target, source, at, end - at)


def _seek(descriptor: int, position: int, how: int) -> int | None:
    """None where there is no data up to the end."""
    try:
        return os.lseek(descriptor, position, how)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return None


def _commit(new: Path, path: Path) -> None:
    _fsync(new)
    new.rename(path)
    _fsync(path.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _mount(path: Path, mountpoint: Path) -> None:
    present = mounts.find_mount(mountpoint)
    if present is not None:
        if _disk_of(present) != path:
            raise HostError(f"{mountpoint} is taken by another mount, of {_disk_of(present)}")
        return
    mountpoint.mkdir(mode=0o700, exist_ok=True)
    with loops.attached(path) as device:
        # Not noexec: the guest's programs are mapped from here.
        flags = Flag.NOSUID | Flag.NODEV | Flag.NOATIME
        mounts.mount(str(device), mountpoint, "ext4", flags, _MOUNT_OPTIONS)
    _open_to_owner(mountpoint)


def _open_to_owner(mountpoint: Path) -> None:
    """The guest's user may close the root directory to itself, and nothing in the guest could work then, for good."""
    root = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        mode = stat.S_IMODE(os.fstat(root).st_mode)
        if mode & stat.S_IRWXU != stat.S_IRWXU:
            os.fchmod(root, mode | stat.S_IRWXU)
    except OSError as error:  # a damaged file system is read-only: what can be read of it still is
        log.warning("the root of %s keeps its mode: %s", mountpoint, error)
    finally:
        os.close(root)


def _unmount(mountpoint: Path) -> None:
    deadline = time.monotonic() + UNMOUNT_TIMEOUT
    while (present := mounts.find_mount(mountpoint)) is not None:
        disk = _disk_of(present)
        try:
            mounts.unmount(mountpoint)
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise HostError(f"cannot unmount {mountpoint}: {error.strerror}") from error
            time.sleep(0.01)  # nothing announces the last user's end
            continue
        if disk is not None:
            _await_release(present.device[1], disk)
    try:
        mountpoint.rmdir()
    except FileNotFoundError:
        return


def _await_release(minor: int, disk: Path) -> None:
    """Wait until the loop device has let go of the disk, which the kernel completes shortly after the unmount. A copy
    of the mount in a foreign mount namespace may delay that for as long as it likes, so this is not an error."""
    deadline = time.monotonic() + RELEASE_TIMEOUT
    while loops.backing_file(minor) == disk:
        if time.monotonic() > deadline:
            log.warning("/dev/loop%d still holds %s: another mount namespace has a copy of its mount", minor, disk)
            return
        time.sleep(0.001)


def _disk_of(mounted: mounts.Mounted) -> Path | None:
    major, minor = mounted.device
    return loops.backing_file(minor) if major == loops.LOOP_MAJOR else None


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    """Tell a full disk from any other failure."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise _full() from error
        raise HostError(f"disk {path}: {error}") from error
    except process.ProcessError as error:
        if os.strerror(errno.ENOSPC) in error.output:
            raise _full() from error
        raise


def _full() -> StorageFull:
    return StorageFull("the host's disk is full", hint="free space on the server's storage, or destroy VMs")
