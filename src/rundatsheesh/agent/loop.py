"""The server's main thread: waits for descriptors and calls whom they belong to."""

from __future__ import annotations

import os
import select

from .console import report

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

IN = select.EPOLLIN
OUT = select.EPOLLOUT


class Loop:
    """`watch` and `change` may be called from any thread, `forget` from the main thread (or before the fd's first
    event), so that no callback runs for a descriptor that was closed."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self._rest = 0.0
        self._on_rest: Callable[[], None] | None = None
        self._nudge = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.watch(self._nudge, self._take_nudge)

    def at_rest(self, seconds: float, callback: Callable[[], None]) -> None:
        """Call back, once, when nothing has come for so long after something did. For one callback only."""
        self._rest, self._on_rest = seconds, callback

    def nudge(self) -> None:
        """As if something had come. Any thread."""
        os.eventfd_write(self._nudge, 1)

    def _take_nudge(self, events: int) -> None:
        os.eventfd_read(self._nudge)

    def watch(self, fd: int, callback: Callable[[int], None]) -> None:
        """Call back with the epoll events whenever the descriptor has some."""
        self._callbacks[fd] = callback
        self._epoll.register(fd, IN)

    def change(self, fd: int, events: int) -> None:
        self._epoll.modify(fd, events)

    def forget(self, fd: int) -> None:
        """Before the descriptor is closed."""
        self._epoll.unregister(fd)
        del self._callbacks[fd]

    def run(self) -> NoReturn:
        has_rested = True
        while True:
            ready = self._epoll.poll(None if has_rested else self._rest)
            has_rested = not ready or self._on_rest is None
            if not ready and self._on_rest is not None:
                self._call(self._on_rest)
            for fd, events in ready:
                callback = self._callbacks.get(fd)
                if callback is not None:  # else forgotten by an earlier callback of this round
                    self._call(callback, events)

    def _call(self, callback: Callable[..., None], *arguments: int) -> None:
        try:
            callback(*arguments)
        except Exception as error:
            report(error)  # whatever a guest provoked, the agent goes on serving
