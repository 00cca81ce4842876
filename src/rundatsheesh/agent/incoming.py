"""The bytes of an upload as they come in: through a pipe, or out of the slots of the transfer disk."""

from __future__ import annotations

import mmap
import os

from .job import CallFailed
from .slots import SECTOR, Ring

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

BLOCK = 4096  # of the workspace's file system: what even a small file takes
_BUFFER = 1 << 18


class Reader:
    """The incoming bytes, read ahead in large pieces."""

    past_cache = True  # whether a large file is worth writing past the kernel's cache

    def __init__(self, aligned_bytes: int) -> None:
        self._ready = memoryview(b"")
        self._aligned_bytes = aligned_bytes
        self._aligned: memoryview | None = None

    def some(self, limit: int) -> memoryview:
        """1 to `limit` bytes, valid until the next call."""
        if not self._ready:
            self._ready = self._read()
            if not self._ready:
                raise CallFailed("upload_incomplete", "the upload ended before its announced length")
        piece = self._ready[:limit]
        self._ready = self._ready[limit:]
        return piece

    def exactly(self, size: int) -> bytes:
        collected = bytearray()
        while len(collected) < size:
            collected += self.some(size - len(collected))
        return bytes(collected)

    def blocks(self, limit: int) -> memoryview:
        """Whole blocks, at an address that fits a transfer past the kernel's cache, `limit` bytes (whole blocks) at
        most; valid until the next call."""
        if self._aligned is None:
            self._aligned = memoryview(mmap.mmap(-1, self._aligned_bytes))
        wanted = view = self._aligned[:limit]
        while view:
            view = view[self._fill(view) :]
        return wanted

    def _fill(self, view: memoryview) -> int:
        """Put the next bytes there, as many as come at once."""
        piece = self.some(len(view))
        view[: len(piece)] = piece
        return len(piece)

    def _read(self) -> memoryview:
        """The next piece; empty at the end."""
        raise NotImplementedError


class PipeReader(Reader):
    def __init__(self, source: int) -> None:
        super().__init__(_BUFFER)
        self._source = source
        self._buffer = memoryview(bytearray(_BUFFER))

    def _read(self) -> memoryview:
        return self._buffer[: os.readv(self._source, [self._buffer])]

    def _fill(self, view: memoryview) -> int:
        """What was not read ahead arrives there without another copy."""
        return (not self._ready and os.readv(self._source, [view])) or super()._fill(view)


class SlotReader(Reader):
    def __init__(self, place: dict[str, Any]) -> None:
        self._ring = Ring(place)
        super().__init__(self._ring.slot_bytes)
        self._size = 0  # of what is in the ring's buffer
        self._ring.give_out()

    def blocks(self, limit: int) -> memoryview:
        """Out of the slot itself, where they begin at an address that fits."""
        whole = min(limit, len(self._ready) // BLOCK * BLOCK)
        if whole and (self._size - len(self._ready)) % SECTOR == 0:
            return self.some(whole)
        return super().blocks(limit)

    def _read(self) -> memoryview:
        received = self._ring.receive()
        self._size = len(received)
        return received
