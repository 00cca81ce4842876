"""Taps: the end of a guest's wire that is held by the process which plays the guest's machine."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR, _IFF_PERSIST = 0x0002, 0x1000, 0x4000, 0x0800
_TUNSETIFF, _TUNGETIFF = 0x400454CA, 0x800454D2
_TUNSETPERSIST, _TUNSETOWNER, _TUNSETGROUP = 0x400454CB, 0x400454CC, 0x400454CE
_REQUEST = "16sH22x"  # struct ifreq


def create(name: str) -> None:
    """Make a persistent tap that root may open, in the calling thread's network namespace. Idempotent."""
    with _opened(name) as device:
        fcntl.ioctl(device, _TUNSETOWNER, 0)  # without an owner and a group, anybody may open it
        fcntl.ioctl(device, _TUNSETGROUP, 0)
        fcntl.ioctl(device, _TUNSETPERSIST, 1)


@contextmanager
def opened(name: str) -> Iterator[int]:
    """A descriptor of the persistent tap of this name. Raises OSError(ENODEV) when there is none, EBUSY when another
    process has it open."""
    # The kernel would make a missing tap, which would have neither rules nor a route.
    if not Path("/sys/class/net", name, "tun_flags").exists():
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), name)
    with _opened(name) as device:
        if not _flags(device) & _IFF_PERSIST:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), name)
        yield device


@contextmanager
def temporary() -> Iterator[int]:
    """A descriptor of a tap that is down and connected to nothing; it vanishes when the last descriptor is closed."""
    with _opened("rdstap%d") as device:
        yield device


@contextmanager
def _opened(name: str) -> Iterator[int]:
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(device, _TUNSETIFF, struct.pack(_REQUEST, name.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR))
        yield device
    finally:
        os.close(device)


def _flags(device: int) -> int:
    flags: int = struct.unpack(_REQUEST, fcntl.ioctl(device, _TUNGETIFF, bytes(40)))[1]
    return flags
