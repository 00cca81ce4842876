"""What one call asks to be run, as whom, and how it can fail. Shared by everything in the agent."""

from __future__ import annotations

import errno

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    class Channel(Protocol):
        """Reads what a script says on CHANNEL_FD. Keeps a bounded amount, whatever it is fed."""

        def feed(self, data: bytes) -> None:
            """The next bytes of the channel, cut anywhere."""

        def finish(self, exit_code: int, stderr: bytes) -> tuple[bytes | None, bytes | None]:
            """The result and the error as JSON text; called once, after the last `feed`. `stderr` is the end of it."""


VERSION = "1"  # of the agent, as the host is told
USER = 1000  # uid and gid of all that callers run
CHANNEL_FD = 3  # of the process that has a channel
FULL = (errno.ENOSPC, errno.EDQUOT)  # what the kernel says where the workspace has no room

DEFAULT_ENV = {
    "HOME": "/workspace",
    "USER": "user",
    "LOGNAME": "user",
    "SHELL": "/bin/bash",
    "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games",
    "LANG": "C.UTF-8",
    "TERM": "dumb",
    "TMPDIR": "/tmp",
}


class CallFailed(Exception):
    """The call ends with this code and message instead of a reply. The host knows what class of error a code is."""

    def __init__(self, code: str, message: str, details: dict[str, object] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = details or {}


def code_of(number: int | None) -> str:
    """The code of a call that ended with this error of the kernel's."""
    return "workspace_full" if number in FULL else "internal"


class Command:
    """A program to execute as the user.

    `cwd` is as the caller gave it and is checked before use. `given` are those of the variables that are the caller's.
    `ahead` names the kind of program that does as well when it was started ahead of the call; see ahead.py.
    """

    __slots__ = ("ahead", "argv", "channel", "cwd", "env", "given", "stdin")

    def __init__(
        self,
        *,
        argv: list[str],
        env: dict[str, str],
        given: dict[str, str] | None = None,
        cwd: str,
        stdin: bytes = b"",
        channel: Channel | None = None,
        ahead: str | None = None,
    ) -> None:
        self.argv = argv
        self.given = given or {}
        self.env = DEFAULT_ENV | env | self.given
        self.cwd = cwd
        self.stdin = stdin
        self.channel = channel
        self.ahead = ahead
