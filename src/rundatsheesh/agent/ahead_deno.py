"""A Deno that is started before the script that it will run is known, see ahead.py.

Deno itself offers that: told of a control socket, it sets its engine up and then waits there for its arguments. All
that a call decides (arguments, permissions, configuration files, variables, the program) is read after that. Variables
that could be for its engine, or that it has already, make a call start its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import stat
import time

from .job import USER
from .streams import Streams

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .job import Command
    from .spawner import Spawner, Tree

_LOOK_MS = 10  # between two looks for its socket
_PATIENCE = 20.0  # seconds for it to listen; a tenth of one on an idle host
_PLACE = "/tmp"  # of the socket, while it is not connected yet
VARIABLE = "DENO_UNSTABLE_CONTROL_SOCK"
# How the names of variables begin that the engine, its libraries or the loader may have looked at.
_FOR_THE_ENGINE = (
    *("DENO", "V8", "NODE", "NPM", "UV_", "RUST", "TOKIO", "LD_", "GLIBC", "MALLOC", "ICU", "LANG", "LC_", "TZ"),
    *("NO_COLOR", "FORCE_COLOR", "COLOR", "CLICOLOR", "XDG_", "SSL", "OTEL", "HTTP", "http", "ALL_PROXY", "all_proxy"),
    *("NO_PROXY", "no_proxy", "CI", "JSR", "TS_"),
)


def own_variables(command: Command) -> dict[str, str]:
    """What every command of the kind has."""
    return {name: value for name, value in command.env.items() if name not in command.given}


class WaitingDeno:
    """Implements ahead.Waiting."""

    def __init__(self, command: Command, tree: Tree, streams: Streams, control: socket.socket) -> None:
        self._program = command.argv[0]
        self._env = own_variables(command)
        self.tree = tree
        self.streams = streams
        self._control = control

    def fits(self, command: Command, cwd: str) -> bool:
        return (
            command.argv[0] == self._program
            and own_variables(command) == self._env
            and not any(name in self._env or name.startswith(_FOR_THE_ENGINE) for name in command.given)
        )

    def start(self, command: Command, cwd: str) -> bool:
        try:
            text = {"cwd": cwd, "args": command.argv[1:], "env": list(command.given.items())}
            order = json.dumps(text, ensure_ascii=False).encode()
            self.streams.write_stdin(command.stdin)
            self._control.sendall(order + b"\n")
        except (UnicodeEncodeError, BrokenPipeError, ConnectionResetError):
            return False
        self._control.close()
        self.tree.count()
        return True

    def was_lost(self) -> bool:
        status = self.tree.status
        return status is not None and os.WIFSIGNALED(status) and not self.streams.has_been_read()

    def let_go(self) -> None:
        self.streams.hand_over()

    def close(self) -> None:
        self._control.close()
        self.streams.close()
        self.tree.close()


def launch(model: Command, spawner: Spawner) -> WaitingDeno | None:
    """One that listens, and is connected; None where it ended instead."""
    place = f"{_PLACE}/.{os.urandom(16).hex()}"
    streams = Streams(None, channel=True)
    try:
        order = ("execute", [model.argv[0]], own_variables(model) | {VARIABLE: f"unix:{place}"}, "/")
        tree = spawner.start(order, streams.theirs, counted=False)
        spawner.refill()
    except BaseException:
        streams.close()
        raise
    try:
        streams.hand_over(all_but_stdin=True)
        control = _connect(place, tree)
        if control is not None:
            return WaitingDeno(model, tree, streams, control)
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
