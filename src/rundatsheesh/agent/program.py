"""The child of a supervisor: waits for a work order, turns into the user, and executes the program.

It is forked ahead of the call, since a fork of the interpreter costs more than all the rest. The order comes over the
`job` socket, with the descriptors; execution closes that socket, or a failure comes back on it.
"""

from __future__ import annotations

import marshal
import os
import signal
import socket
import sys

from . import descriptors, limits
from .job import CallFailed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

USER = 1000

_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)  # which execution would not undo
_MOST_DESCRIPTORS = 8


def send_job(job: socket.socket, order: tuple[Any, ...], fds: list[int]) -> None:
    """Hand a work order and its descriptors (0, 1, 2, ... of the program) to a waiting child.

    ("execute", argv, env, cwd, setup) or ("call", module, function, parameters, descriptor).
    """
    body = marshal.dumps(order)
    descriptors.send(job, len(body).to_bytes(4, "big"), fds)
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


def become_program(job: socket.socket) -> NoReturn:
    """The whole life of a freshly forked child. Never returns into the code that it was forked from."""
    stage = "order"
    try:
        _prepare_for_user()
        _rehearse()
        order, fds = _receive_job(job)
        if order is None:
            os._exit(0)
        (kind, *rest) = order
        stage = "user"
        _place_descriptors(fds)
        if kind == "call":
            _resolve(rest[0], rest[1])  # loaded now, for the user cannot read the agent's files
        os.setresuid(USER, USER, USER)  # drops every capability with it
        limits.apply_processes()
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


def _prepare_for_user() -> None:
    """All that can be done ahead of the order. Root until then: the user must not find it waiting."""
    os.setsid()
    limits.apply()
    os.umask(0o022)
    os.setgroups([])
    os.setresgid(USER, USER, USER)


def _rehearse() -> None:
    """Go through the motions once: the pages that this writes are copied now, after the fork, not during the call."""
    ours, theirs = socket.socketpair()
    with ours, theirs, open(os.devnull, "r+b", 0) as null:
        send_job(ours, ("execute", ["/nothing", ""], {"PATH": ""}, "/", None), 3 * [null.fileno()])
        (_, *rest), fds = _receive_job(theirs)
    _place_descriptors(fds)
    os.setresuid(0, 0, 0)
    limits.apply_processes()
    try:
        _execute(*rest)
    except FileNotFoundError:
        return


def _tell(job: socket.socket, failure: tuple[str, Any]) -> None:
    job.sendall(marshal.dumps(failure))


def _receive_job(job: socket.socket) -> tuple[Any, list[int]]:
    head, fds = descriptors.receive(job, 4, _MOST_DESCRIPTORS)
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
