"""The host's end of a VM's transfer disk: where its parts are, and who has which.

The disk is a file that the guest sees as a disk of its own (agent/slots.py). Content passes through it in slots, of
which only the lengths go over the channel. The guest can write anything anywhere in it at any time, so what it holds
is copied out once and believed to be nothing but bytes; lengths, order and number of slots are checked by who uses it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rundatsheesh.manager.guest_channel import GuestGone

SLOT_BYTES = 2 << 20
RING_SLOTS = 2
RING_BYTES = RING_SLOTS * SLOT_BYTES
WORTH_IT = 1 << 18  # bytes; fewer are faster in the channel itself


class TransferDisk:
    """Open from the start; raises OSError where that fails. Used by one thread."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115  (`close` is a method)
        self._size = os.fstat(self._file.fileno()).st_size
        self._free = list(range(0, self._size - RING_BYTES + 1, RING_BYTES))
        self._lent = 0

    def lend(self) -> Ring | None:
        """None while all are lent."""
        if not self._free:
            return None
        self._lent += 1
        return Ring(self, self._free.pop())

    def take_back(self, offset: int) -> None:
        self._free.append(offset)
        self._lent -= 1
        if not self._lent and not self._file.closed:
            # What was transferred would take memory for as long as the VM lives.
            self._file.truncate(0)
            self._file.truncate(self._size)

    def close(self) -> None:
        """At once: the file must not be open when the VM's files are removed. Idempotent."""
        self._file.close()

    def write(self, place: int, data: memoryview) -> None:
        """Raises GuestGone once the disk is closed."""
        while data:
            written = os.pwrite(self._descriptor(), data, place)
            place += written
            data = data[written:]

    def read(self, place: int, size: int) -> bytes:
        """Raises GuestGone once the disk is closed."""
        return os.pread(self._descriptor(), size, place)

    def _descriptor(self) -> int:
        if self._file.closed:
            raise GuestGone("the connection was closed")
        return self._file.fileno()


@contextmanager
def lent(disk: TransferDisk | None) -> Iterator[Ring | None]:
    """A ring for who moves content with it; None where there is no disk, or none is left."""
    ring = disk.lend() if disk is not None else None
    try:
        yield ring
    finally:
        if ring is not None:
            ring.release()


class Ring:
    """Slots for one call. Lent to the call, which ends by the guest's word alone, and to who moves the content; free
    when both have let go of it."""

    def __init__(self, disk: TransferDisk, offset: int) -> None:
        self._disk = disk
        self._offset = offset
        self._holders = 2

    @property
    def place(self) -> dict[str, Any]:
        """For the request."""
        return {"ring": {"offset": self._offset, "slots": RING_SLOTS, "slot_bytes": SLOT_BYTES}}

    def release(self) -> None:
        """One of the two lets go."""
        self._holders -= 1
        if self._holders == 0:
            self._disk.take_back(self._offset)

    def write(self, slot: int, at: int, data: memoryview) -> None:
        self._disk.write(self._place(slot) + at, data)

    def read(self, slot: int, at: int, size: int) -> bytes:
        return self._disk.read(self._place(slot) + at, size)

    def _place(self, slot: int) -> int:
        return self._offset + slot % RING_SLOTS * SLOT_BYTES
