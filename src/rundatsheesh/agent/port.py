"""The stream over a virtio-serial port: a character device that outlives its host's clients."""

from __future__ import annotations

import fcntl
import os
import select
import signal

from . import wire
from .calls import Connection
from .console import say
from .loop import IN
from .signals import Waiter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .server import Server

_PORTS = "/sys/class/virtio-ports"


class PortTransport:
    """Serves whoever is at the other end, one after the other.

    While nobody is, the device reads as ended and always ready, so it is not watched then; SIGIO tells that somebody
    came. Bytes that make no sense are skipped up to the next greeting.
    """

    def __init__(self, server: Server, name: str) -> None:
        self._loop = server.loop
        self._waiter = Waiter(signal.SIGIO)
        self._fd = os.open(_find(name), os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        fcntl.fcntl(self._fd, fcntl.F_SETOWN, os.getpid())
        self._flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        self._want_signal(True)
        self._connection = Connection(self._fd, self._loop, server.hello, server.dispatch)
        self._connection.piecemeal = True
        self._connection.restart(hunting=True)
        self._watched = False
        self._loop.watch(self._waiter.fd, self._on_signal)
        self._watch_if_connected()

    def _on_signal(self, events: int) -> None:
        self._waiter.clear()
        self._watch_if_connected()

    def _watch_if_connected(self) -> None:
        if self._watched:
            return
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        if not any(events & select.POLLHUP for _, events in poll.poll(0)):
            self._watched = True
            self._want_signal(False)
            self._loop.watch(self._fd, self._on_ready)

    def _want_signal(self, wanted: bool) -> None:
        """Only while nobody is there: the kernel sends one for each page that arrives, too."""
        fcntl.fcntl(self._fd, fcntl.F_SETFL, self._flags | os.O_ASYNC if wanted else self._flags)

    def _on_ready(self, events: int) -> None:
        try:
            if events & ~IN:
                self._connection.write()
            if not self._connection.read():
                self._loop.forget(self._fd)
                self._watched = False
                self._want_signal(True)
                self._connection.restart(hunting=True)
                self._watch_if_connected()  # somebody may have come in between
        except wire.ProtocolError as error:
            say(f"skipping to the next greeting: {error}")
            self._connection.restart(hunting=True)


def _find(name: str) -> str:
    """The device of a port by its name; a path stands for itself."""
    if name.startswith("/dev/") and os.path.exists(name):
        return name
    wanted = os.path.basename(name)
    for device in os.listdir(_PORTS):
        with open(f"{_PORTS}/{device}/name") as file:
            if file.read().strip() == wanted:
                return f"/dev/{device}"
    raise FileNotFoundError(f"there is no virtio-serial port {wanted}")
