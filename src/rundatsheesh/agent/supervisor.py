"""The parent of one call's processes, which they cannot leave.

A supervisor is root and subreaper, so a process that daemonises becomes its child instead of init's: what is below it
is exactly what the call started. It is used for one call after the other, but for no other call while anything of the
last one lives. Its `control` socket (packets) leads to the server, which sends

    WORK with a descriptor   a round: do the work whose order comes on that `job` socket (see program.py)
    KILL and the round       end everything below; a round that is over is left alone
    RELEASE and the round    with a descriptor: give a program that waits for it its last argument, and a line on that
                             socket

and receives (round, wait status of the program or None, whether nothing is left). End of file, in either direction,
means that the other end is gone, and takes what is below along.
"""

from __future__ import annotations

import marshal
import os
import select
import signal
import socket

from . import foreign, libc
from .console import say
from .descriptors import receive
from .job import CallFailed
from .launch import as_user, become_launcher, launch
from .program import become_program, receive_job, send_job, tell_failure
from .signals import Waiter
from .sweep import sweep

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

WORK = b"W"
KILL = b"K"
RELEASE = b"R"

_SWEEP_WAIT_MS = 20
_HEAD = 5  # bytes of a message that say what it is, and of which round
_MESSAGE = 8192


def kill_message(round_: int) -> bytes:
    return KILL + round_.to_bytes(4, "big")


def release_message(round_: int, argument: bytes, line: bytes) -> bytes:
    return RELEASE + round_.to_bytes(4, "big") + marshal.dumps((argument, line))


class Supervisor:
    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._waiter = Waiter(signal.SIGCHLD)
        self._round = 0
        self._program = 0  # pid, 0 once it is reaped
        self._status: int | None = None  # of the program, until it is reported
        self._busy = False  # whether the round has something left
        self._argument = (0, 0)  # address and length of a waiting program's last argument

    def run(self) -> None:
        """Return when the server is gone and nothing is left below this process."""
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(self._waiter.fd, select.POLLIN)
        self._rehearse()
        while True:
            ready = dict(poll.poll())
            self._waiter.clear()
            if self._control.fileno() in ready and not self._on_control():
                self._kill()
                return
            self._reap_and_report()

    def _on_control(self) -> bool:
        """Whether the server is still there."""
        try:
            message, fds = receive(self._control, _MESSAGE, 1)
        except ConnectionResetError:
            return False
        if message == WORK:
            self._round += 1
            with socket.socket(fileno=fds[0]) as job:
                self._work(job)
        elif message == kill_message(self._round):
            self._kill()
        elif message.startswith(RELEASE):
            with socket.socket(fileno=fds[0]) as waiting:
                if int.from_bytes(message[1:_HEAD], "big") == self._round and self._program:
                    argument, line = marshal.loads(message[_HEAD:])
                    self._release(argument, line, waiting)
        return message != b""

    def _work(self, job: socket.socket) -> None:
        order, fds = receive_job(job)
        if order is None:
            return  # the server will not ask how it ended
        self._busy = True
        try:
            self._program = self._start(job, order, fds)
            if order[0] == "await":
                self._find_argument(os.fsencode(order[1][-1]))
        except Exception as error:
            tell_failure(job, order[0], error)
        finally:
            for fd in fds:
                os.close(fd)

    def _start(self, job: socket.socket, order: tuple[Any, ...], fds: list[int]) -> int:
        kind, *details = order
        if kind in ("execute", "await"):
            argv, env, cwd = details
            try:
                return launch(argv, env, cwd, fds)
            except BlockingIOError:
                # The user has as many processes as allowed. Somebody has to be able to end them: see limits.py.
                return self._fork(job, order, fds)
        return self._fork(job, order, fds)

    def _fork(self, job: socket.socket, order: tuple[Any, ...], fds: list[int]) -> int:
        try:
            pid = os.fork()
        except OSError as error:
            say(f"cannot fork a program: {error}")
            raise CallFailed("guest_overloaded", "the guest cannot start another process") from None
        if pid == 0:
            self._waiter.forget()
            self._control.close()
            become_program(job, order, fds)
        return pid

    def _find_argument(self, argument: bytes) -> None:
        try:
            with as_user():
                self._argument = (foreign.find_argument(self._program, argument), len(argument))
        except (OSError, LookupError):
            self._kill()  # it could never be released
            raise

    def _release(self, argument: bytes, line: bytes, waiting: socket.socket) -> None:
        """Have the program go on with this argument; where that cannot be, it ends before it has done anything."""
        address, size = self._argument
        try:
            os.kill(self._program, signal.SIGCONT)  # the user may have stopped it
            with as_user():
                foreign.write(self._program, address, argument.ljust(size + 1, b"\0"))
            waiting.send(line + b"\n")
        except OSError as error:
            say(f"a program that waited cannot go on: {error}")
            self._kill()

    def _kill(self) -> None:
        if self._program:  # unreaped, so its group is its own; mostly that is everybody
            try:
                os.killpg(self._program, signal.SIGKILL)
            except ProcessLookupError:
                os.kill(self._program, signal.SIGKILL)  # it has only been forked, and made no session yet
        if self._wait_for_children():
            sweep(os.getpid(), set(), self._wait_for_children)

    def _wait_for_children(self) -> bool:
        if self._reap():
            self._waiter.wait(_SWEEP_WAIT_MS)
        return self._reap()

    def _reap(self) -> bool:
        """Reap all that ended; whether children are left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self._program:
                self._program, self._status = 0, status

    def _reap_and_report(self) -> None:
        if not self._busy:
            return
        self._busy = self._reap()
        if self._status is None and self._busy:
            return
        try:
            self._control.send(marshal.dumps((self._round, self._status, not self._busy)))
        except (BrokenPipeError, ConnectionResetError):
            return  # the server is gone, the end of file on this socket says the rest
        self._status = None

    def _rehearse(self) -> None:
        """Do now what a program will make us do: the pages that this writes are copied now, not then."""
        ours, theirs = socket.socketpair()
        with ours, theirs, open(os.devnull, "r+b", 0) as null:
            send_job(ours, ("execute", ["/nothing", ""], {"PATH": ""}, "/"), 3 * [null.fileno()])
            self._work(theirs)
            ours.send(marshal.dumps((0, 0, True)))
        os.kill(os.getpid(), signal.SIGCHLD)
        while self._wait_for_children():  # it was forked: the user has as many processes as allowed
            pass
        self._busy, self._program, self._status = False, 0, None


def supervise(control: socket.socket) -> NoReturn:
    """The whole life of a freshly forked supervisor. Its exit status is 0 when nothing is left below it."""
    status = 1
    try:
        libc.be_subreaper()
        become_launcher()
        Supervisor(control).run()
        status = 0
    finally:
        os._exit(status)
