"""Namespaces of the kernel's. A thread is moved into one alone, and is the wrong one for anything else afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import TypeVar

from rundatsheesh.manager.host.libc import check, libc

T = TypeVar("T")

NETNS_DIRECTORY = Path("/run/netns")  # where iproute2 looks, so that `ip netns` shows ours


class Kind(IntEnum):
    """Of clone(2)."""

    MOUNT = 0x20000
    NETWORK = 0x40000000


def enter_new(kind: Kind) -> None:
    """Put the calling thread, and all that it starts from now on, into a fresh namespace."""
    check(libc.unshare(kind), "unshare")


def enter(descriptor: int, kind: Kind) -> None:
    """Put the calling thread into the namespace that this open file names."""
    check(libc.setns(descriptor, kind), "setns")


def in_thread_of_its_own(call: Callable[[], T]) -> T:
    """Run `call`, which may enter namespaces, in a thread that ends with it; what it raises is raised here. Blocks."""
    results: list[T] = []
    failures: list[BaseException] = []

    def body() -> None:
        try:
            results.append(call())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=body, name="namespace")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]
