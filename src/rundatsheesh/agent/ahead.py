"""A Deno that is started before the script that it will run is known.

Deno itself offers that: told of a control socket, it sets its engine up and then waits there for its arguments. All
that a call decides (arguments, permissions, configuration files, the program) is read after that, so the call cannot
tell. One waits, is used once, and is replaced when the guest has come to rest. None does until a script was run.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import stat
import threading
import time

from .console import report
from .job import CallFailed
from .streams import USER, Streams

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .job import Command
    from .spawner import Spawner, Tree

# Bytes of the guest's memory from which one may wait: it takes about 10 MiB, and what else it shows as used is mapped
# from its file, which memory.py does not count.
LEAST_MEMORY = 256 << 20

_CALM = 0.03  # seconds without a call before another is started: that must not slow the calls which follow
_LOOK_MS = 10  # between two looks for its socket
_PATIENCE = 20.0  # seconds for it to listen; a tenth of one on an idle host
_PLACE = "/tmp"  # of the socket, while it is not connected yet
VARIABLE = "DENO_UNSTABLE_CONTROL_SOCK"


class Waiting:
    """One that waits. `start` or `close` it."""

    def __init__(self, command: Command, tree: Tree, streams: Streams, control: socket.socket) -> None:
        self._program = command.argv[0]
        self._env = command.env
        self.tree = tree
        self.streams = streams
        self._control = control

    def fits(self, command: Command) -> bool:
        return command.argv[0] == self._program and command.env == self._env

    def start(self, command: Command, cwd: str) -> bool:
        """Give it its work; False when it has ended, or cannot be told."""
        try:
            order = json.dumps({"cwd": cwd, "args": command.argv[1:], "env": []}, ensure_ascii=False).encode()
            self.streams.write_stdin(command.stdin)
            self._control.sendall(order + b"\n")
        except (UnicodeEncodeError, BrokenPipeError, ConnectionResetError):
            return False
        self._control.close()
        self.tree.count()
        return True

    def was_killed_before(self) -> bool:
        """Whether it ended by a signal, sent while it waited, and has read nothing of its work."""
        status = self.tree.status
        return status is not None and os.WIFSIGNALED(status) and not self.streams.has_been_read()

    def close(self) -> None:
        self._control.close()
        self.streams.close()
        self.tree.close()


class Ahead:
    """May be used by any thread; one of its own, which the first script makes, replaces what was taken."""

    def __init__(self, spawner: Spawner, *, memory: int) -> None:
        """`memory` is the guest's, in bytes."""
        self._spawner = spawner
        self._has_room = memory >= LEAST_MEMORY
        self._lock = threading.Lock()
        self._waiting: Waiting | None = None
        self._model: Command | None = None  # what the next one is expected to be like
        self._wanted = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self, command: Command, cwd: str) -> Waiting | None:
        """One that is at work on the command, or None: then it has to be started as any other."""
        if not command.may_wait:
            return None
        with self._lock:
            waiting = self._waiting
            if waiting is None or not waiting.fits(command):
                return None
            self._waiting = None
        if waiting.start(command, cwd):
            return waiting
        waiting.close()
        return None

    def expect(self, command: Command) -> None:
        """Such a command has been run; have one wait for the next of its kind."""
        if not command.may_wait or not self._has_room:
            return
        with self._lock:
            self._model = command
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="ahead", daemon=True)
                self._thread.start()
        self._wanted.set()

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            self._wait_for_calm()
            try:
                self._fill()
            except CallFailed:
                continue  # no room for another process now; the next script asks again
            except Exception as error:
                report(error)

    def _wait_for_calm(self) -> None:
        while True:
            started = self._spawner.started
            time.sleep(_CALM)
            if self._spawner.live == 0 and self._spawner.started == started:
                return

    def _fill(self) -> None:
        with self._lock:
            model = self._model
            if self._waiting is not None or model is None:
                return
        waiting = _launch(model, self._spawner)
        with self._lock:
            self._waiting = waiting


def _launch(model: Command, spawner: Spawner) -> Waiting | None:
    """One that listens, and is connected; None where it ended instead."""
    place = f"{_PLACE}/.{os.urandom(16).hex()}"
    streams = Streams(None, channel=True)
    try:
        order = ("execute", [model.argv[0]], model.env | {VARIABLE: f"unix:{place}"}, "/")
        tree = spawner.start(order, streams.theirs, counted=False)
        spawner.refill()
    except BaseException:
        streams.close()
        raise
    try:
        streams.hand_over(all_but_stdin=True)
        control = _connect(place, tree)
        if control is not None:
            return Waiting(model, tree, streams, control)
    except BaseException:
        streams.close()
        tree.close()
        raise
    streams.close()
    tree.close()
    return None


def _connect(place: str, tree: Tree) -> socket.socket | None:
    poll = select.poll()
    poll.register(tree.control, select.POLLIN)
    deadline = time.monotonic() + _PATIENCE
    while not poll.poll(_LOOK_MS):  # else it has ended
        try:
            return _dial(place)
        except (FileNotFoundError, ConnectionRefusedError):  # not made yet, not listening yet
            if time.monotonic() > deadline:
                return None
    return None


def _dial(place: str) -> socket.socket | None:
    """Connect to the very socket that was looked at: what the user puts in its place may lead to the agent's own."""
    fd = os.open(place, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if not stat.S_ISSOCK(found.st_mode) or found.st_uid != USER:
            return None
        control = socket.socket(socket.AF_UNIX)
        try:
            control.connect(f"/proc/self/fd/{fd}")
        except BaseException:
            control.close()
            raise
    finally:
        os.close(fd)
    with contextlib.suppress(FileNotFoundError):  # the user may remove it
        os.unlink(place)
    return control
