"""The server's main thread: waits for descriptors and calls whom they belong to."""

from __future__ import annotations

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
        while True:
            for fd, events in self._epoll.poll():
                callback = self._callbacks.get(fd)
                if callback is None:
                    continue  # forgotten by an earlier callback of this round
                try:
                    callback(events)
                except Exception as error:
                    # Whatever a guest provoked, the agent goes on serving.
                    report(error)
