"""Room on the host's disks: how much there is, and files that hold some of it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_BLOCK = 512  # the unit of st_blocks


def free_bytes(directory: Path) -> int:
    """What may still be written to the file system of this directory. Raises OSError."""
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize


def hold(file: Path, size: int) -> bool:
    """Give the file its first `size` bytes on the disk; where there is less room it has what there is. Content stays,
    and nobody may write to the file meanwhile. Returns whether it has them all. Raises OSError but for want of room."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        found = os.fstat(descriptor)
        is_held = found.st_size >= size and found.st_blocks * _BLOCK >= size  # alone, the second counts extents too
        if is_held or _allocate(descriptor, size):
            return True
        os.fsync(descriptor)  # what was freed a moment ago can be had only now
        return _allocate(descriptor, size)
    finally:
        os.close(descriptor)


def _allocate(descriptor: int, size: int) -> bool:
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        return False
    return True
