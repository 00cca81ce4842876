"""Network namespaces, mounts and tap devices: the few system calls for which Python 3.11 has no function.

Everything here blocks and belongs in a thread of its own.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

NETNS_DIRECTORY = Path("/run/netns")  # where iproute2 looks, so that `ip netns` shows ours

CLONE_NEWNET = 0x40000000
MS_BIND, MS_REC, MS_SHARED = 0x1000, 0x4000, 0x100000
MNT_DETACH = 2
TUNSETIFF, TUNSETPERSIST, TUNSETOWNER, TUNSETGROUP = 0x400454CA, 0x400454CB, 0x400454CC, 0x400454CE
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000

_libc = ctypes.CDLL(None, use_errno=True)


def namespace_names() -> set[str]:
    with suppress(FileNotFoundError):
        return {path.name for path in NETNS_DIRECTORY.iterdir()}
    return set()


def create_namespace(name: str) -> None:
    """Make a network namespace and give it its name in /run/netns; a leftover of that name is replaced."""
    _share_netns_directory()
    remove_namespace(name)
    path = NETNS_DIRECTORY / name
    path.touch(mode=0o444)

    def make() -> None:
        enter_new_namespace()
        _mount(b"/proc/thread-self/ns/net", bytes(path), MS_BIND)

    try:
        _in_new_thread(make)
    except BaseException:
        remove_namespace(name)
        raise


def remove_namespace(name: str) -> None:
    """Take the name away; the namespace ends with the last process in it. Idempotent."""
    path = NETNS_DIRECTORY / name
    while _libc.umount2(bytes(path), MNT_DETACH) == 0:
        pass  # mounts stack, and a name that was taken twice has two
    if (number := ctypes.get_errno()) not in (errno.EINVAL, errno.ENOENT):  # no mount, no file
        raise OSError(number, os.strerror(number), str(path))
    path.unlink(missing_ok=True)


def inside_namespace(name: str, call: Callable[[], T]) -> T:
    """Run `call` in a thread that has entered the namespace, and return what it returns."""

    def enter() -> T:
        with open(NETNS_DIRECTORY / name, "rb") as file:
            enter_namespace(file.fileno())
        return call()

    return _in_new_thread(enter)


def enter_new_namespace() -> None:
    """Put the calling thread, and all that it starts from now on, into a fresh network namespace."""
    _check(_libc.unshare(CLONE_NEWNET), "unshare")


def enter_namespace(descriptor: int) -> None:
    """Put the calling thread into the network namespace that this open file names."""
    _check(_libc.setns(descriptor, CLONE_NEWNET), "setns")


def create_tap(name: str) -> None:
    """A persistent tap that root may open. Idempotent."""
    with open("/dev/net/tun", "r+b", buffering=0) as device:
        request = struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)
        fcntl.ioctl(device, TUNSETIFF, request)
        fcntl.ioctl(device, TUNSETOWNER, 0)  # without an owner and a group, anybody may open it
        fcntl.ioctl(device, TUNSETGROUP, 0)
        fcntl.ioctl(device, TUNSETPERSIST, 1)


def write_sysctl(name: str, value: str) -> bool:
    """Set net.* of the calling thread's namespace unless it has the value; False where the kernel lacks it."""
    path = Path("/proc/sys/net") / name
    try:
        if path.read_text().strip() != value:
            path.write_text(value)
    except FileNotFoundError:
        return False
    return True


def _share_netns_directory() -> None:
    """As iproute2 does it: a shared mount, so that a namespace is freed when it is unmounted in one mount namespace."""
    NETNS_DIRECTORY.mkdir(mode=0o755, exist_ok=True)
    directory = bytes(NETNS_DIRECTORY)
    try:
        _mount(b"none", directory, MS_SHARED | MS_REC)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        _mount(directory, directory, MS_BIND | MS_REC)
        _mount(b"none", directory, MS_SHARED | MS_REC)


def _in_new_thread(call: Callable[[], T]) -> T:
    """Run `call` in a thread that ends with it, because its namespace is the wrong one for anything else."""
    results: list[T] = []
    failures: list[BaseException] = []

    def body() -> None:
        try:
            results.append(call())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=body, name="netns")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]


def _mount(source: bytes, target: bytes, flags: int) -> None:
    _check(_libc.mount(source, target, b"none", ctypes.c_ulong(flags), None), f"mount {target.decode()}")


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
