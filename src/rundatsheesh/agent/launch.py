"""Execute a program as the user without copying the interpreter first.

A fork copies page tables, and later every page that either side writes: in an application kernel that takes longer than
most commands. `vfork` lends the memory instead until the program is executed, so it must not run Python in between:
what there is to set up is set up around it, in this process, which is the call's supervisor and has one thread.
"""

from __future__ import annotations

import _posixsubprocess
import os

from . import limits
from .job import CHANNEL_FD, USER, CallFailed

UMASK = 0o022
_REPORT = 4096  # more than execution has to say about a failure


def become_launcher() -> None:
    """Take on, for good, what every program is to inherit. Root remains, and with it the power over user processes."""
    os.setgroups([])
    os.setresgid(USER, USER, USER)
    limits.apply()
    limits.apply_processes()


def launch(argv: list[str], env: dict[str, str], cwd: str, fds: list[int]) -> int:
    """The pid of the program, a session of its own, with `fds` as 0, 1, 2 and, where there is one more, CHANNEL_FD.

    Raises CallFailed where `cwd` cannot be worked in, OSError where the program cannot be executed, BlockingIOError
    where the user has as many processes as allowed. No descriptor is closed; all others must not be inheritable.
    """
    if len(fds) <= CHANNEL_FD:
        return _launch(argv, env, cwd, fds)
    taken = os.dup(CHANNEL_FD)  # init keeps the number taken, see there
    os.dup2(fds[CHANNEL_FD], CHANNEL_FD, inheritable=True)
    try:
        return _launch(argv, env, cwd, fds)
    finally:
        os.dup2(taken, CHANNEL_FD, inheritable=False)
        os.close(taken)


def _launch(argv: list[str], env: dict[str, str], cwd: str, fds: list[int]) -> int:
    listening, telling = os.pipe2(os.O_CLOEXEC)
    try:
        with as_user():
            pid = _vfork(argv, env, cwd, fds, listening, telling)
    except BaseException:
        os.close(listening)
        raise
    finally:
        os.close(telling)
    try:
        report = os.read(listening, _REPORT)
    finally:
        os.close(listening)
    if report:
        os.waitpid(pid, 0)
        _raise(report, cwd)
    return pid


def _vfork(argv: list[str], env: dict[str, str], cwd: str, fds: list[int], listening: int, telling: int) -> int:
    variables = [os.fsencode(f"{name}={value}") for name, value in env.items()]
    # As subprocess.Popen calls it. It takes vfork where it has no identity to change.
    return _posixsubprocess.fork_exec(
        argv,
        candidates(argv[0], env),
        False,  # every descriptor that is not inheritable closes by itself
        (),
        cwd,
        variables,
        fds[0],
        -1,
        -1,
        fds[1],
        -1,
        fds[2],
        listening,
        telling,
        True,  # signals that Python ignores are as usual for the program
        True,  # a session of its own
        -1,
        None,
        None,
        None,
        UMASK,
        None,  # type: ignore[arg-type]  # which the interpreter's own modules pass, too
        True,
    )


def candidates(program: str, env: dict[str, str]) -> tuple[bytes, ...]:
    """Where the program may be, in the order in which to try."""
    if "/" in program:
        return (os.fsencode(program),)
    return tuple(os.fsencode(f"{directory}/{program}") for directory in env["PATH"].split(":"))


def no_directory(cwd: str, errno: int) -> CallFailed:
    return CallFailed("path_not_found", f"cannot work in {cwd}: {os.strerror(errno)}")


class as_user:  # noqa: N801  (read as a function)
    """While it is entered, what is forked is the user's. The saved id is the way back; execution forgets it.

    Meanwhile other processes of the user can end this one by a signal, as they could end the program itself. They
    cannot look into it: the saved id, and the capabilities that are still permitted, are not theirs.
    """

    def __enter__(self) -> None:
        if limits.preferred_by_oom_killer:
            limits.set_oom_score(limits.USER_OOM_SCORE)
        os.setresuid(USER, USER, 0)

    def __exit__(self, *exception: object) -> None:
        os.setresuid(0, 0, 0)
        if limits.preferred_by_oom_killer:
            limits.set_oom_score(limits.OWN_OOM_SCORE)


def _raise(report: bytes, cwd: str) -> None:
    """What the child wrote is a class, the errno in hexadecimal, and `noexec` where it did not come to the program."""
    kind, number, stage = report.split(b":", 2)
    if kind != b"OSError":
        raise RuntimeError(report.decode(errors="replace"))
    errno = int(number, 16)
    if stage:
        raise no_directory(cwd, errno)
    raise OSError(errno, os.strerror(errno))
