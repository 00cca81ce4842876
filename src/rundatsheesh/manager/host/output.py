"""Reads what a command prints, bounded."""

from __future__ import annotations

import asyncio
import os
from typing import IO

_READ_BYTES = 1 << 16


class OutputOverflow(Exception):
    """More than the limit."""


class Collector:
    """Reads one pipe to its end, keeping at most `limit` bytes.

    Not through a transport of the event loop, which must be awaited before it reads, and closes its descriptor in a
    later turn of the loop. So nothing is awaited before the command runs, and what is closed is closed.
    """

    def __init__(self, source: IO[bytes], limit: int, *, keep_tail: bool) -> None:
        self._source = source
        self._limit = limit
        self._keep_tail = keep_tail
        self._kept = bytearray()

    @classmethod
    def pipe(cls, limit: int, *, keep_tail: bool) -> tuple[Collector, IO[bytes]]:
        """A collector and the writing end of its pipe."""
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        return cls(os.fdopen(reading, "rb", 0), limit, keep_tail=keep_tail), os.fdopen(writing, "wb", 0)

    @property
    def kept(self) -> bytes:
        return bytes(self._kept)

    async def collect(self) -> None:
        """Return at end of file; raises OutputOverflow over the limit unless only the tail is wanted."""
        loop = asyncio.get_running_loop()
        end: asyncio.Future[None] = loop.create_future()
        loop.add_reader(self._source.fileno(), self._read, end)
        try:
            await end
        finally:
            loop.remove_reader(self._source.fileno())

    def _read(self, end: asyncio.Future[None]) -> None:
        if end.done():
            return
        try:
            data = os.read(self._source.fileno(), _READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            end.set_exception(error)
            return
        if not data:
            end.set_result(None)
            return
        self._kept += data
        if len(self._kept) > self._limit:
            if self._keep_tail:
                del self._kept[: -self._limit]
            else:
                end.set_exception(OutputOverflow())

    def close(self) -> None:
        self._source.close()
