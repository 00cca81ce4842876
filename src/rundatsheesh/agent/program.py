"""A child of a supervisor that works as the user: on files, as a function of this package, or until it executes a
program, where that could not be done without a fork (see launch.py).
"""

from __future__ import annotations

import marshal
import os
import signal
import socket
import sys

from . import descriptors, launch, limits
from .job import USER, CallFailed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)  # which execution would not undo
_MOST_DESCRIPTORS = 8


def send_job(job: socket.socket, order: tuple[Any, ...], fds: list[int]) -> None:
    """Hand a work order and its descriptors (0, 1, 2, ... of the program) to a supervisor.

    ("execute", argv, env, cwd), ("await", argv, env, cwd) for a program that waits until its last argument is known, or
    ("call", module, function, parameters, descriptor).
    """
    body = marshal.dumps(order)
    descriptors.send(job, len(body).to_bytes(4, "big"), fds)
    job.sendall(body)


def receive_job(job: socket.socket) -> tuple[tuple[Any, ...] | None, list[int]]:
    """The order and its descriptors; None where the server gave it up half way."""
    head, fds = descriptors.receive(job, 4, _MOST_DESCRIPTORS)
    if len(head) < 4:
        return None, fds
    body = bytearray()
    size = int.from_bytes(head, "big")
    while len(body) < size:
        part = job.recv(size - len(body))
        if not part:
            return None, fds
        body += part
    return marshal.loads(body), fds


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


def tell_failure(job: socket.socket, stage: str, error: BaseException) -> None:
    """For `read_failure`."""
    if isinstance(error, CallFailed):
        failure: tuple[str, Any] = ("failed", (error.code, error.message, error.details))
    elif isinstance(error, OSError):
        failure = (stage, (error.errno or 0, os.strerror(error.errno or 0)))
    else:
        failure = ("crash", f"{type(error).__name__}: {error}"[:1000])
    job.sendall(marshal.dumps(failure))


def become_program(job: socket.socket, order: tuple[Any, ...], fds: list[int]) -> NoReturn:
    """The whole life of a freshly forked child. Never returns into the code that it was forked from."""
    (kind, *rest) = order
    stage = "user"
    try:
        os.setsid()
        os.umask(launch.UMASK)
        if limits.preferred_by_oom_killer:
            limits.set_oom_score(limits.USER_OOM_SCORE)
        _place_descriptors(fds)
        if kind == "call":
            _resolve(rest[0], rest[1])  # loaded now, for the user cannot read the agent's files
        os.setresuid(USER, USER, USER)  # drops every capability with it
        stage = kind
        if kind == "call":
            _call(*rest)
        else:
            _execute(*rest)
    except BaseException as error:
        tell_failure(job, stage, error)
    finally:
        os._exit(127)


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


def _execute(argv: list[str], env: dict[str, str], cwd: str) -> None:
    try:
        os.chdir(cwd)
    except OSError as error:
        raise launch.no_directory(cwd, error.errno or 0) from None
    for number in _IGNORED_BY_PYTHON:
        signal.signal(number, signal.SIG_DFL)
    refusal: OSError | None = None
    for program in launch.candidates(argv[0], env):
        try:
            os.execve(program, argv, env)
        except (FileNotFoundError, NotADirectoryError) as error:
            refusal = refusal or error
        except OSError as error:
            refusal = error
    raise refusal or FileNotFoundError(2, "no such program")


def _resolve(module: str, function: str) -> Any:
    name = f"{__package__}.{module}"
    __import__(name)
    return getattr(sys.modules[name], function)
