"""Templates: machines that were booted once and stopped, of which each VM is a clone.

A template is three files in memory: the guest's memory, the state of its devices, and the empty disk that it had
mounted as its workspace, as that was when it was stopped. They are sealed, so no clone can
change what others start from. They live as long as this manager: a template that would outlive a change of the host, of
QEMU or of the image does not exist, and within one life the key tells.
"""

from __future__ import annotations

import asyncio
import os
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from weakref import WeakValueDictionary

from rundatsheesh.manager.engines.qemu_args import Hardware
from rundatsheesh.manager.host import memfile

# Each takes what its guest touched while it booted, some 100 MiB of the host's memory.
MAX_TEMPLATES = 4


@dataclass(frozen=True, slots=True)
class Key:
    """All that a template depends on. Equal keys, equal machines."""

    hardware: Hardware
    image: tuple[tuple[int, ...], ...]  # of each boot file: device, inode, size, time of change
    agent: str  # digest of its files
    program: tuple[int, ...]  # QEMU's, like that of a boot file
    cpu_model: str  # of the host


class Template:
    def __init__(self, memory: int, state: int, disk: int) -> None:
        """Seals the files, and keeps descriptors of its own; no process may have them mapped for writing. Raises
        OSError."""
        with ExitStack() as kept:
            self._memory, self._state, self._disk = (_duplicate(file, kept) for file in (memory, state, disk))
            for file in (memory, state, disk):
                memfile.seal(file)
            self._kept = kept.pop_all()

    @contextmanager
    def opened(self) -> Iterator[tuple[int, int]]:
        """Descriptors of memory and state for one clone. They stay valid when the template is closed meanwhile."""
        with ExitStack() as stack:
            memory = stack.enter_context(memfile.reopened(self._memory, os.O_RDWR))
            # Its position is where reading begins, so it must not be shared.
            state = stack.enter_context(memfile.reopened(self._state, os.O_RDONLY))
            yield memory, state

    @contextmanager
    def disk(self) -> Iterator[int]:
        """A descriptor of the disk, to copy it from."""
        with memfile.reopened(self._disk, os.O_RDONLY) as disk:
            yield disk

    def close(self) -> None:
        self._kept.close()


def _duplicate(descriptor: int, kept: ExitStack) -> int:
    duplicate = os.dup(descriptor)
    kept.callback(os.close, duplicate)
    return duplicate


class Templates:
    """The most recently used ones."""

    def __init__(self, limit: int = MAX_TEMPLATES) -> None:
        self._limit = limit
        self._kept: OrderedDict[Key, Template] = OrderedDict()
        self._making: WeakValueDictionary[Key, asyncio.Lock] = WeakValueDictionary()  # a lock lives while it is used

    async def get(self, key: Key, make: Callable[[], Awaitable[Template]]) -> Template:
        """The template of this key, made by the first who asks while the others wait. Where making fails its caller
        gets the error and the next one tries. Open the template before the next await: it may be closed later."""
        lock = self._making.setdefault(key, asyncio.Lock())
        async with lock:
            if key not in self._kept:
                self._kept[key] = await make()
                self._shrink()
            self._kept.move_to_end(key)
            return self._kept[key]

    def __len__(self) -> int:
        return len(self._kept)

    def discard(self, key: Key) -> None:
        """Have it made anew when it is next asked for. Running clones are not affected."""
        template = self._kept.pop(key, None)
        if template is not None:
            template.close()

    def _shrink(self) -> None:
        while len(self._kept) > self._limit:
            self.discard(next(iter(self._kept)))
