"""Loop devices: a file as a block device. One is taken per mounted disk and frees itself when it is unmounted."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rundatsheesh.manager.errors import HostError

LOOP_MAJOR = 7
_CONTROL = "/dev/loop-control"
_LOOP_CTL_GET_FREE = 0x4C82
_LOOP_CONFIGURE = 0x4C0A  # Linux 5.8
_LOOP_CLR_FD = 0x4C01
_AUTOCLEAR = 4
_DIRECT_IO = 16  # else every page of the disk is cached twice, once for the loop file system and once for the file
# struct loop_config: fd, block size, then struct loop_info64, of which only the flags are set, then 8 reserved words
_CONFIG = struct.Struct("=II 5Q 3I I 160x 2Q 64x")
_ATTEMPTS = 1000  # each lost race means that another process took a device, so there was progress


@contextmanager
def attached(path: Path) -> Iterator[Path]:
    """Yield a loop device over the file. It exists while this block runs or something mounted from it is mounted.

    Raises HostError where this host gives out no loop devices, OSError for the file.
    """
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        device, path_of_device = _attach(file)
    finally:
        os.close(file)
    try:
        yield path_of_device
    finally:
        os.close(device)


def backing_file(minor: int) -> Path | None:
    """The file behind a loop device; None when the device is free. A deleted file ends in ' (deleted)'."""
    try:
        return Path(Path(f"/sys/block/loop{minor}/loop/backing_file").read_text().rstrip("\n"))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
            return None
        raise


def list_backing_files() -> dict[int, Path]:
    """The file behind every loop device that is in use, by the device's number."""
    numbers = (int(entry.name.removeprefix("loop")) for entry in Path("/sys/block").glob("loop[0-9]*"))
    found = {number: backing_file(number) for number in numbers}
    return {number: file for number, file in found.items() if file is not None}


def detach(minor: int) -> None:
    """Take the file off the device; while something is mounted from it, the kernel waits for its unmount. Does nothing
    for a device that is free."""
    try:
        device = os.open(f"/dev/loop{minor}", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        fcntl.ioctl(device, _LOOP_CLR_FD)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
    finally:
        os.close(device)


def _attach(file: int) -> tuple[int, Path]:
    config = bytearray(_CONFIG.pack(file, 0, 0, 0, 0, 0, 0, 0, 0, 0, _AUTOCLEAR | _DIRECT_IO, 0, 0))
    for _ in range(_ATTEMPTS):
        node = _free_device()
        device = os.open(node, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.ioctl(device, _LOOP_CONFIGURE, config)
        except OSError as error:
            os.close(device)
            if error.errno == errno.EBUSY:
                continue
            raise
        return device, node
    raise HostError(f"no loop device after {_ATTEMPTS} attempts")


def _free_device() -> Path:
    """The node of a loop device that is free at this moment; the kernel makes a new one when all are taken."""
    try:
        control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(
            f"cannot open {_CONTROL}: {error.strerror}",
            hint="load the kernel module `loop`; in a container, run privileged with the host's /dev",
        ) from error
    try:
        number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
    finally:
        os.close(control)
    node = Path(f"/dev/loop{number}")
    if not node.exists():
        _make_node(node, number)
    return node


def _make_node(node: Path, number: int) -> None:
    """Where /dev is not a devtmpfs, as in most containers, nobody else makes the node of a new device."""
    try:
        os.mknod(node, stat.S_IFBLK | 0o600, os.makedev(LOOP_MAJOR, number))
    except FileExistsError:
        return
    except OSError as error:
        raise HostError(
            f"{node} does not exist and cannot be made: {error.strerror}",
            hint="mount the host's /dev (devtmpfs) into this container and run it privileged",
        ) from error
