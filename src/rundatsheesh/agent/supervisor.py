"""One call's processes: a supervisor that they cannot leave, and its first child, which becomes the program.

The supervisor is root and subreaper, so a process that daemonises becomes its child instead of init's: what is below
it is exactly what the call started. Both are forked ahead of the call and wait for it, since a fork of the
interpreter costs more than all the rest.

Two sockets lead to the server. `control` (packets): the server says KILL; the supervisor reports (wait status of the
program or None, whether nothing is left below it). Its end of file, in either direction, means that the other end is
gone. `job` (stream): the child's work order with its descriptors; closed by execution, or it brings a failure.
"""

from __future__ import annotations

import marshal
import os
import select
import signal
import socket
import sys

from . import descriptors, libc, limits
from .job import CallFailed
from .signals import Waiter
from .sweep import sweep

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

KILL = b"K"
USER = 1000

_SWEEP_WAIT_MS = 20
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)  # which execution would not undo


class Supervisor:
    def __init__(self, control: socket.socket, program: int) -> None:
        self._control = control
        self._program = program  # pid, 0 once it is reaped
        self._waiter = Waiter(signal.SIGCHLD)
        self._status: int | None = None

    def run(self) -> None:
        """Return when nothing is left below this process."""
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(self._waiter.fd, select.POLLIN)
        while True:
            left = self._reap()
            if self._status is not None or not left:
                self._report(left)
            if not left:
                return
            ready = dict(poll.poll())
            self._waiter.clear()
            if self._control.fileno() in ready and not self._on_control():
                self._kill()

    def _on_control(self) -> bool:
        """Whether the processes may live on."""
        try:
            return self._control.recv(16) not in (KILL, b"")
        except ConnectionResetError:
            return False

    def _kill(self) -> None:
        if self._program:  # unreaped, so its group is its own; mostly that is everybody
            try:
                os.killpg(self._program, signal.SIGKILL)
            except ProcessLookupError:
                os.kill(self._program, signal.SIGKILL)  # it has not made its session yet
            if not self._wait_for_children():
                return
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

    def _report(self, left: bool) -> None:
        try:
            self._control.send(marshal.dumps((self._status, not left)))
        except (BrokenPipeError, ConnectionResetError):
            return  # the server is gone, the end of file on this socket says the rest
        self._status = None


def supervise(control: socket.socket, job: socket.socket) -> NoReturn:
    """The whole life of a freshly forked supervisor. Its exit status is 0 when nothing is left below it."""
    status = 1
    try:
        libc.be_subreaper()
        program = os.fork()
        if program == 0:
            control.close()
            _become_program(job)
        job.close()
        Supervisor(control, program).run()
        status = 0
    finally:
        os._exit(status)


def send_job(job: socket.socket, order: tuple[Any, ...], fds: list[int]) -> None:
    """Hand a work order and its descriptors (0, 1, 2, ... of the program) to a waiting child."""
    body = marshal.dumps(order)
    head = len(body).to_bytes(4, "big")
    descriptors.send(job, head, fds)
    job.sendall(body)


def read_failure(job: socket.socket) -> tuple[str, Any] | None:
    """Why the program was not executed, once its process has ended: (stage, evidence). None when it was."""
    parts = []
    job.settimeout(0)
    try:
        while part := job.recv(65536):
            parts.append(part)
    except (BlockingIOError, ConnectionResetError):
        pass
    return marshal.loads(b"".join(parts)) if parts else None


def _become_program(job: socket.socket) -> NoReturn:
    """Wait for the work order, turn into the user, execute it. Never returns into the forked server's code."""
    stage = "order"
    try:
        order, fds = _receive_job(job)
        if order is None:
            os._exit(0)
        (kind, *rest) = order
        stage = "user"
        _place_descriptors(fds)
        _turn_into_user()
        stage = kind
        if kind == "call":
            _call(*rest)
        else:
            _execute(*rest)
    except CallFailed as failure:
        _tell(job, ("failed", (failure.code, failure.message, failure.details)))
    except OSError as error:
        _tell(job, (stage, (error.errno or 0, os.strerror(error.errno or 0))))
    except BaseException as error:
        _tell(job, ("crash", f"{type(error).__name__}: {error}"[:1000]))
    finally:
        os._exit(127)


def _tell(job: socket.socket, failure: tuple[str, Any]) -> None:
    job.sendall(marshal.dumps(failure))


def _receive_job(job: socket.socket) -> tuple[Any, list[int]]:
    head, fds = descriptors.receive(job, 4, 8)
    if not head:
        return None, []
    while len(head) < 4:
        head += job.recv(4 - len(head))
    body = bytearray()
    size = int.from_bytes(head, "big")
    while len(body) < size:
        part = job.recv(size - len(body))
        if not part:
            return None, []
        body += part
    return marshal.loads(body), fds


def _place_descriptors(fds: list[int]) -> None:
    """Make them 0, 1, 2, ... of this process; all others close when the program is executed.

    None of them is below 4 now: init keeps those numbers taken.
    """
    for target, fd in enumerate(fds):
        os.dup2(fd, target, inheritable=True)
        os.close(fd)


def _turn_into_user() -> None:
    os.setsid()
    limits.apply()
    os.umask(0o022)
    os.setgroups([])
    os.setresgid(USER, USER, USER)
    os.setresuid(USER, USER, USER)  # drops every capability with it


def _call(module: str, function: str, params: Any, fd: int) -> NoReturn:
    _resolve(module, function)(params, fd)
    os._exit(0)


def _execute(argv: list[str], env: dict[str, str], cwd: str, setup: tuple[str, str, Any] | None) -> None:
    try:
        os.chdir(cwd)
    except OSError as error:
        raise CallFailed("path_not_found", f"cannot work in {cwd}: {os.strerror(error.errno or 0)}") from None
    if setup is not None:
        module, function, argument = setup
        _resolve(module, function)(argument)
    for number in _IGNORED_BY_PYTHON:
        signal.signal(number, signal.SIG_DFL)
    program = argv[0]
    if "/" in program:
        os.execve(program, argv, env)
    refusal: OSError | None = None
    for directory in env["PATH"].split(":"):
        try:
            os.execve(f"{directory}/{program}", argv, env)
        except (FileNotFoundError, NotADirectoryError) as error:
            refusal = refusal or error
        except OSError as error:
            refusal = error
    raise refusal or FileNotFoundError(2, "no such program")


def _resolve(module: str, function: str) -> Any:
    name = f"{__package__}.{module}"
    __import__(name)
    return getattr(sys.modules[name], function)
