"""Network namespaces by name, and what is set in them.

Everything here blocks and belongs in a thread of its own.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from rundatsheesh.manager.host import mounts, namespaces
from rundatsheesh.manager.host.mounts import Flag
from rundatsheesh.manager.host.namespaces import NETNS_DIRECTORY, Kind

T = TypeVar("T")


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
        namespaces.enter_new(Kind.NETWORK)
        mounts.mount("/proc/thread-self/ns/net", path, flags=Flag.BIND)

    try:
        namespaces.in_thread_of_its_own(make)
    except BaseException:
        remove_namespace(name)
        raise


def remove_namespace(name: str) -> None:
    """Take the name away; the namespace ends with the last process in it. Idempotent."""
    path = NETNS_DIRECTORY / name
    while mounts.unmount(path, lazy=True):
        pass  # mounts stack, and a name that was taken twice has two
    path.unlink(missing_ok=True)


def inside_namespace(name: str, call: Callable[[], T]) -> T:
    """Run `call` in a thread that has entered the namespace, and return what it returns."""

    def enter() -> T:
        with open(NETNS_DIRECTORY / name, "rb") as file:
            namespaces.enter(file.fileno(), Kind.NETWORK)
        return call()

    return namespaces.in_thread_of_its_own(enter)


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
    try:
        mounts.mount("none", NETNS_DIRECTORY, flags=Flag.SHARED | Flag.RECURSIVE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        mounts.mount(str(NETNS_DIRECTORY), NETNS_DIRECTORY, flags=Flag.BIND | Flag.RECURSIVE)
        mounts.mount("none", NETNS_DIRECTORY, flags=Flag.SHARED | Flag.RECURSIVE)
