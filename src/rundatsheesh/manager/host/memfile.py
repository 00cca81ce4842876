"""Files that exist in memory only and have no path: they are gone with their last descriptor, and can be sealed."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

_ALL_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def create(name: str, size: int = 0) -> int:
    """A descriptor of a new, empty file. The name is for humans who look into /proc."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with closed_on_error(descriptor):
        os.ftruncate(descriptor, size)
    return descriptor


def sealed(name: str, content: bytes) -> int:
    """A descriptor of a file with this content that nobody can change."""
    descriptor = create(name)
    with closed_on_error(descriptor):
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        seal(descriptor)
    return descriptor


def seal(descriptor: int) -> None:
    """Make the file unchangeable for ever, for every process that has it or gets it. Private mappings may still be
    written to. Raises OSError(EBUSY) while somebody has it mapped for writing."""
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _ALL_SEALS)


@contextmanager
def closed_on_error(descriptor: int) -> Iterator[None]:
    try:
        yield
    except BaseException:
        os.close(descriptor)
        raise


@contextmanager
def reopened(descriptor: int, flags: int) -> Iterator[int]:
    """A descriptor of the same file with a position of its own."""
    copy = os.open(f"/proc/self/fd/{descriptor}", flags | os.O_CLOEXEC)
    try:
        yield copy
    finally:
        os.close(copy)
