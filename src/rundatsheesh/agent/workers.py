"""Threads for calls. Starting one takes milliseconds in an application kernel, so those that are done wait for more."""

from __future__ import annotations

import threading
from _queue import SimpleQueue

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_KEPT = 2  # that wait; each costs a stack


class Workers:
    """`run` may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[SimpleQueue[Callable[[], None]]] = []

    def prepare(self) -> None:
        """Have one wait for the first call."""
        self.run(lambda: None)

    def run(self, work: Callable[[], None]) -> None:
        """In a thread of its own; `work` raises nothing. RuntimeError where the kernel has no room for another."""
        with self._lock:
            inbox = self._idle.pop() if self._idle else None
        if inbox is None:
            inbox = SimpleQueue()
            threading.Thread(target=self._serve, args=(inbox,), daemon=True).start()
        inbox.put(work)

    def _serve(self, inbox: SimpleQueue[Callable[[], None]]) -> None:
        while True:
            inbox.get()()
            with self._lock:
                if len(self._idle) >= _KEPT:
                    return
                self._idle.append(inbox)
