"""Lets scripts start as the guest's memory has room for them.

In a kernel of the guest's own, more interpreters at once than fit end by its OOM killer, though all of them would have
run one after the other. So a script waits while others grow; not for ever, for those may run for hours.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import contextmanager

from .calls import Cancelled

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from .calls import Call

_NEED = 64 << 20  # bytes that an interpreter takes with a small script: a Deno 45 MiB, a Node.js 40
_GROWTH = 15.0  # seconds after which it has taken them, even where the CPU is emulated
_LOOK = 0.1  # seconds between two looks at the memory while somebody waits
_LONGEST = 60.0  # seconds to wait, and not more than half of the call's own time


class Room:
    """May be used by any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._started: list[float] = []  # when those started that run
        self._meminfo = os.open("/proc/meminfo", os.O_RDONLY | os.O_CLOEXEC)

    @contextmanager
    def place(self, call: Call, timeout_ms: int) -> Iterator[int]:
        """For one script; gives the milliseconds that it has waited. Raises Cancelled when nobody wants it any more."""
        arrived = time.monotonic()
        with self._changed:
            end = arrived + min(_LONGEST, timeout_ms / 2000)
            while not self._is_there() and time.monotonic() < end:
                self._changed.wait(_LOOK)
                if call.cancelled:
                    raise Cancelled
            started = time.monotonic()
            self._started.append(started)
        try:
            yield int((started - arrived) * 1000)
        finally:
            with self._changed:
                self._started.remove(started)
                self._changed.notify_all()

    def _is_there(self) -> bool:
        if not self._started:
            return True
        growing = sum(time.monotonic() - started < _GROWTH for started in self._started)
        return self._available() >= (growing + 1) * _NEED

    def _available(self) -> int:
        """Bytes."""
        text = os.pread(self._meminfo, 4096, 0)
        at = text.index(b"MemAvailable:") + len(b"MemAvailable:")
        return int(text[at : text.index(b"\n", at)].split()[0]) * 1024
