"""The transfer disk: content goes between host and guest without a byte of it in the agent's stream.

A disk of the VM's own that both ends read and write past their caches. The host lends a call a ring of slots in it
(params["ring"]: where it begins, how many slots, how large). Who sends fills one slot after the other and tells how
many bytes are in it; who receives tells with a byte that a slot is free again. In an upload all are the guest's to
give out at first: the disk is not written to before the ring's last user is gone.

Descriptors of the process that does the work, from the server: see RING_DESCRIPTORS.
"""

from __future__ import annotations

import mmap
import os
import struct

from .job import CallFailed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

FROM_HOST, TO_HOST, _, DISK = RING_DESCRIPTORS = range(4)
SECTOR = 512  # what a transfer past the caches is a multiple of, in memory and on disk
LENGTH = struct.Struct(">I")
FREE = b"\0"


class Ring:
    """This call's slots, and memory for the content of one."""

    def __init__(self, place: dict[str, Any]) -> None:
        self._offset: int = place["offset"]
        self._count: int = place["slots"]
        self.slot_bytes: int = place["slot_bytes"]
        self.buffer = memoryview(mmap.mmap(-1, self.slot_bytes))
        self._number = 0  # of the slot that is next

    def give_out(self) -> None:
        """Let the host fill all slots."""
        os.write(TO_HOST, FREE * self._count)

    def receive(self) -> memoryview:
        """The content of the next slot, in `buffer`. Blocks until the host has filled it; empty when it gave up."""
        told = self._told(LENGTH.size)
        if len(told) < LENGTH.size:
            return self.buffer[:0]
        (length,) = LENGTH.unpack(told)
        _transfer(os.preadv, self.buffer[: length + -length % SECTOR], self._next())
        os.write(TO_HOST, FREE)
        return self.buffer[:length]

    def send(self, length: int) -> None:
        """Hand over what is in `buffer`, a multiple of SECTOR. Blocks until the host has freed a slot."""
        if self._number >= self._count and not self._told(1):
            raise CallFailed("cancelled", "the host is gone")
        _transfer(os.pwritev, self.buffer[:length], self._next())
        os.write(TO_HOST, LENGTH.pack(length))

    def _next(self) -> int:
        """Where the next slot is on the disk."""
        place = self._offset + self._number % self._count * self.slot_bytes
        self._number += 1
        return place

    def _told(self, size: int) -> bytes:
        told = b""
        while len(told) < size and (more := os.read(FROM_HOST, size - len(told))):
            told += more
        return told


def _transfer(function: Any, piece: memoryview, place: int) -> None:
    if function(DISK, [piece], place) != len(piece):
        raise OSError("the transfer disk is too short")
