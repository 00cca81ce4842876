"""The server's side of process trees: gets supervisors from init, ahead of need, and counts those that have work."""

from __future__ import annotations

import marshal
import os
import socket
import threading

from . import descriptors
from .init import FORK
from .job import CallFailed
from .supervisor import KILL, read_failure, send_job

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .loop import Loop

SPARE = 1  # supervisors that wait for a call; each costs memory, but saves the call two forks
_READ = 1 << 16


class Tree:
    """The processes of one call, from its supervisor's point of view."""

    def __init__(self, spawner: Spawner) -> None:
        self._spawner = spawner
        self.control, supervisors_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._job, childs_end = socket.socketpair()
        self._started = False
        self.status: int | None = None  # wait status of the program once it has ended
        self.lost = False  # the supervisor itself was killed
        self.empty = False  # nothing is left below the supervisor
        with supervisors_end, childs_end:
            spawner.ask_init(FORK, [supervisors_end.fileno(), childs_end.fileno()])

    def start(self, order: tuple[Any, ...], fds: list[int]) -> None:
        """Give the waiting child its work; CallFailed when there is no child."""
        try:
            send_job(self._job, order, fds)
        except (BrokenPipeError, ConnectionResetError):
            raise CallFailed("guest_overloaded", "the guest cannot start another process") from None
        self._started = True
        self._spawner.count(1)

    def kill(self) -> None:
        """End every process of the call, wherever it went; `read` tells when that is done. Any thread."""
        try:
            self.control.send(KILL)
        except OSError:
            return  # the supervisor has ended, and with it all below it

    def read(self) -> None:
        """Take the supervisor's next report; blocks until there is one."""
        try:
            report = self.control.recv(256)
        except ConnectionResetError:
            report = b""
        if report:
            status, empty = marshal.loads(report)
            if status is not None:
                self.status = status
        else:
            empty = self.lost = True
        if empty and not self.empty:
            self.empty = True
            if self._started:
                self._spawner.count(-1)

    def wait(self) -> None:
        """Block until the program has ended and nothing is left."""
        while not self.empty:
            self.read()

    def failure(self) -> tuple[str, Any] | None:
        """(stage, evidence) when the program could not be executed; to be asked once it has ended."""
        return read_failure(self._job)

    def close(self) -> None:
        """Whatever still lives is killed."""
        self.control.close()
        self._job.close()
        if not self.empty and self._started:
            self.empty = True
            self._spawner.count(-1)


class Spawner:
    """Gives out process trees. `live` counts those with processes; `on_change` is called, by any thread, after it
    changed."""

    def __init__(self, loop: Loop, init: socket.socket) -> None:
        self._loop = loop
        self._init = init
        self._lock = threading.Lock()
        self._spare: list[Tree] = []
        self.live = 0
        self.on_change: Callable[[], None] = lambda: None

    def ask_init(self, request: bytes, fds: list[int]) -> None:
        descriptors.send(self._init, request, fds)

    def take(self) -> Tree:
        with self._lock:
            if self._spare:
                return self._spare.pop(0)
        return Tree(self)

    def refill(self) -> None:
        """Have supervisors forked for later calls; does not wait for them."""
        with self._lock:
            while len(self._spare) < SPARE:
                self._spare.append(Tree(self))

    def count(self, difference: int) -> None:
        with self._lock:
            self.live += difference
        self.on_change()

    def leave(self, tree: Tree, outputs: list[int]) -> None:
        """Let a tree live on after its call. What its processes write is read, so that they do not stop, and
        dropped. Takes over the descriptors."""
        for fd in outputs:
            self._loop.watch(fd, lambda _, fd=fd: self._drop_output(fd))  # type: ignore[misc]  # the default is an int
        self._loop.watch(tree.control.fileno(), lambda _: self._on_report(tree))

    def _drop_output(self, fd: int) -> None:
        try:
            data = os.read(fd, _READ)
        except BlockingIOError:
            return
        if not data:
            self._loop.forget(fd)
            os.close(fd)

    def _on_report(self, tree: Tree) -> None:
        tree.read()
        if tree.empty:
            self._loop.forget(tree.control.fileno())
            tree.close()
