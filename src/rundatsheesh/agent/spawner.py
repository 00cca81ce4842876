"""The server's side of process trees: gets supervisors from init, keeps them busy one call after the other, and counts
the calls that have processes."""

from __future__ import annotations

import marshal
import os
import socket
import threading

from . import descriptors
from .init import FORK as NEW_SUPERVISOR
from .job import CallFailed
from .program import read_failure, send_job
from .supervisor import WORK, kill_message, release_message

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .loop import Loop

# Supervisors that wait for a call ahead of it; each costs memory, but saves the call a fork of the interpreter.
SPARE = 1
# Those that are kept after a call: the next to be started ahead needs one without a call, too.
_KEPT = SPARE + 1
_READ = 1 << 16


class Supervisor:
    """The server's end of a supervisor's control socket."""

    def __init__(self, spawner: Spawner) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.round = 0
        with theirs:
            spawner.ask_init(NEW_SUPERVISOR, [theirs.fileno()])

    def begin(self, order: tuple[Any, ...], fds: list[int]) -> socket.socket:
        """Start a round: the socket on which its failure would come. Raises OSError where the supervisor is gone."""
        job, theirs = socket.socketpair()
        self.round += 1
        try:
            with theirs:
                descriptors.send(self.control, WORK, [theirs.fileno()])
            send_job(job, order, fds)
        except BaseException:
            job.close()
            raise
        return job


class Tree:
    """The processes of one call. `supervisor` is its own until `close`."""

    def __init__(self, spawner: Spawner, supervisor: Supervisor, order: tuple[Any, ...], fds: list[int]) -> None:
        """Raises BrokenPipeError or ConnectionResetError where the supervisor is gone."""
        self._spawner = spawner
        self._supervisor = supervisor
        self.status: int | None = None  # wait status of the program once it has ended
        self.empty = False  # nothing is left below the supervisor
        self._lost = False  # the supervisor itself was killed
        self._counted = False
        self._job = supervisor.begin(order, fds)
        self._round = supervisor.round

    def count(self) -> None:
        """It is a call's from now on."""
        self._counted = True
        self._spawner.count(1)

    @property
    def control(self) -> int:
        """The descriptor to poll before `read`."""
        return self._supervisor.control.fileno()

    def kill(self) -> None:
        """End every process of the call, wherever it went; `read` tells when that is done. Any thread, and even after
        the call's end, when it does nothing."""
        try:
            self._supervisor.control.send(kill_message(self._round))
        except OSError:
            return  # the supervisor has ended, and with it all below it

    def release(self, argument: bytes, line: bytes, fd: int) -> None:
        """Give a program that awaits it its last argument, and then the line on the socket `fd`. Raises OSError where
        its supervisor is gone."""
        descriptors.send(self._supervisor.control, release_message(self._round, argument, line), [fd])

    def read(self) -> None:
        """Take the supervisor's next report; blocks until there is one."""
        try:
            report = self._supervisor.control.recv(256)
        except ConnectionResetError:
            report = b""
        if report:
            _, status, empty = marshal.loads(report)
            if status is not None:
                self.status = status
        else:
            empty = self._lost = True
        if empty and not self.empty:
            self._end()

    def wait(self) -> None:
        """Block until the program has ended and nothing is left."""
        while not self.empty:
            self.read()

    def failure(self) -> tuple[str, Any] | None:
        """(stage, evidence) when the program could not be executed; to be asked once it has ended."""
        return read_failure(self._job)

    def close(self) -> None:
        """Whatever still lives is killed. An empty tree's supervisor is free for the next call."""
        self._job.close()
        if self.empty and not self._lost:
            self._spawner.reuse(self._supervisor)
            return
        self._supervisor.control.close()
        if not self.empty:
            self._end()

    def _end(self) -> None:
        self.empty = True
        if self._counted:
            self._spawner.count(-1)


class Spawner:
    """Gives out process trees. `live` counts those with processes; `on_change` is called, by any thread, after it
    changed."""

    def __init__(self, loop: Loop, init: socket.socket) -> None:
        self._loop = loop
        self._init = init
        self._lock = threading.Lock()
        self._idle: list[Supervisor] = []
        self.live = 0
        self.started = 0  # how many there have been
        self.on_change: Callable[[], None] = lambda: None

    def ask_init(self, request: bytes, fds: list[int]) -> None:
        descriptors.send(self._init, request, fds)

    def start(self, order: tuple[Any, ...], fds: list[int], *, counted: bool = True) -> Tree:
        """A tree at work on the order (see program.py); CallFailed when the guest has no room for another."""
        for _ in range(SPARE + 2):  # memory exhaustion may have killed those that waited
            supervisor = self._take()
            try:
                tree = Tree(self, supervisor, order, fds)
            except (BrokenPipeError, ConnectionResetError):
                supervisor.control.close()
                continue
            if counted:
                tree.count()
            return tree
        raise CallFailed("guest_overloaded", "the guest cannot start another process")

    def refill(self) -> None:
        """Have supervisors forked for later calls; does not wait for them."""
        with self._lock:
            while len(self._idle) < SPARE:
                self._idle.append(Supervisor(self))

    def reuse(self, supervisor: Supervisor) -> None:
        """A supervisor without children is kept for the next call where none is."""
        with self._lock:
            if len(self._idle) < _KEPT:
                self._idle.append(supervisor)
                return
        supervisor.control.close()

    def _take(self) -> Supervisor:
        with self._lock:
            return self._idle.pop() if self._idle else Supervisor(self)

    def count(self, difference: int) -> None:
        with self._lock:
            self.live += difference
            self.started += max(0, difference)
        self.on_change()

    def leave(self, tree: Tree, outputs: list[int]) -> None:
        """Let a tree live on after its call. What its processes write is read, so that they do not stop, and
        dropped. Takes over the descriptors."""
        for fd in outputs:
            self._loop.watch(fd, lambda _, fd=fd: self._drop_output(fd))  # type: ignore[misc]  # the default is an int
        self._loop.watch(tree.control, lambda _: self._on_report(tree))

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
            self._loop.forget(tree.control)
            tree.close()
