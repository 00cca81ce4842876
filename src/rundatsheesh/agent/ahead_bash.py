"""A login shell that is started before its command is known, see ahead.py.

It is `bash -lc ARGUMENT` like any other, with a long ARGUMENT that says to the guest's /etc/profile (build/recipe.py)
to wait, before anything of the user's is read. When the call comes, the shell's supervisor writes the command where the
argument is in its memory, and tells it the directory; bash, which looks at the argument after the profiles only, then
does what it always does. So error
messages, `$-`, the last command's execution in the shell's place and all else are those of a shell of the call's own.
What can be told: its arguments in /proc end in more than one NUL, and `declare -p` shows that SECONDS was set.
"""

from __future__ import annotations

import os
import select
import socket

from .job import DEFAULT_ENV
from .paths import WORKSPACE
from .streams import Streams

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .job import Command
    from .spawner import Spawner, Tree

SHELL = ["/bin/bash", "-lc"]
ROOM = 4096  # bytes for a command; a longer one starts its own shell
# What /etc/profile looks for. As a command it does nothing.
ARGUMENT = ": a shell that waits for its command".ljust(ROOM)
_LONGEST_PATH = 1024
_PATIENCE = 20_000  # milliseconds for it to come to its wait; some twenty on an idle host


class WaitingBash:
    """Implements ahead.Waiting."""

    def __init__(self, tree: Tree, streams: Streams, control: socket.socket) -> None:
        self.tree = tree
        self.streams = streams
        self._control = control  # it told us that it waits, and will that it begins

    def fits(self, command: Command, cwd: str) -> bool:
        return (
            command.argv[:-1] == SHELL
            and not command.given
            and "\n" not in cwd
            and len(os.fsencode(cwd)) <= _LONGEST_PATH
            and len(os.fsencode(command.argv[-1])) <= ROOM
        )

    def start(self, command: Command, cwd: str) -> bool:
        try:
            line = b"" if cwd == WORKSPACE else os.fsencode(cwd)
            self.tree.release(os.fsencode(command.argv[-1]), line, self._control.fileno())
        except OSError:
            return False
        self.tree.count()
        return True

    def was_lost(self) -> bool:
        try:
            return not self._control.recv(1)
        except OSError:
            return True

    def let_go(self) -> None:
        self._control.close()

    def close(self) -> None:
        self._control.close()
        self.streams.close()
        self.tree.close()


def launch(model: Command, spawner: Spawner) -> WaitingBash | None:
    """One that waits; None where it ended instead, or does something else."""
    streams = Streams(b"", channel=False)
    control, theirs = socket.socketpair()
    tree: Tree | None = None
    try:
        with theirs:
            order = ("await", [*SHELL, ARGUMENT], DEFAULT_ENV, WORKSPACE)
            tree = spawner.start(order, [*streams.theirs, theirs.fileno()], counted=False)
        streams.hand_over()
        if _comes_to_wait(control, tree):
            control.setblocking(False)
            return WaitingBash(tree, streams, control)
    except BaseException:
        _close(control, streams, tree)
        raise
    _close(control, streams, tree)
    return None


def _comes_to_wait(control: socket.socket, tree: Tree) -> bool:
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(tree.control, select.POLLIN)
    ready = dict(poll.poll(_PATIENCE))
    return control.fileno() in ready and control.recv(1) != b""


def _close(control: socket.socket, streams: Streams, tree: Tree | None) -> None:
    control.close()
    streams.close()
    if tree is not None:
        tree.close()
