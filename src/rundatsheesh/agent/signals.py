"""Signals as something to poll for."""

from __future__ import annotations

import os
import select
import signal


class Waiter:
    """`fd` is readable after one of the signals came. One per process; belongs to the main thread."""

    def __init__(self, *numbers: signal.Signals) -> None:
        self.fd, self._writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        for number in numbers:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)

    def clear(self) -> None:
        try:
            while len(os.read(self.fd, 4096)) == 4096:
                pass
        except BlockingIOError:
            return

    def wait(self, milliseconds: int) -> None:
        """Return when a signal came, or after that time."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        poll.poll(milliseconds)
        self.clear()

    def forget(self) -> None:
        """In a forked child: the signals of this process are no longer the parent's business."""
        signal.set_wakeup_fd(-1)
        os.close(self.fd)
        os.close(self._writing)
