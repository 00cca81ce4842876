"""Wait for a change in a directory instead of asking again and again."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import TracebackType

from rundatsheesh.manager.host.libc import check, failure, libc

_IN_MOVED_TO = 0x80
_IN_CREATE = 0x100
_READ_SIZE = 64 << 10


class NewEntries:
    """A context manager; inside, `wait` returns after each time that something was created in the directory.

    What was created between entering and `wait` is not missed. What the entries are called is not told: look again.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._changed = asyncio.Event()

    def __enter__(self) -> NewEntries:
        self._fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        check(self._fd, self._directory)
        if libc.inotify_add_watch(self._fd, os.fsencode(self._directory), _IN_CREATE | _IN_MOVED_TO) < 0:
            error = failure(self._directory)
            os.close(self._fd)
            raise error
        asyncio.get_running_loop().add_reader(self._fd, self._on_events)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.get_running_loop().remove_reader(self._fd)
        os.close(self._fd)

    async def wait(self) -> None:
        await self._changed.wait()
        self._changed.clear()

    def _on_events(self) -> None:
        os.read(self._fd, _READ_SIZE)
        self._changed.set()
