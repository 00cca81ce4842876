"""The only door to subprocesses.

Every child runs in a new session (it shares no terminal, no process group and no fate with the manager), sees only the
environment that it is given, and inherits only the descriptors that are named. `run` is for commands that end, `start`
for children that may outlive the manager, `ProcessRef` for processes that an earlier manager started.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import shlex
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rundatsheesh.manager.errors import HostError
from rundatsheesh.manager.host.output import Collector, OutputOverflow

log = logging.getLogger(__name__)

SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
BASE_ENV: Mapping[str, str] = {"PATH": SEARCH_PATH, "LANG": "C.UTF-8"}
EVIDENCE_BYTES = 2000  # of output that an error message carries

File = int | IO[bytes]

# Held until reaped: the interpreter warns about a Popen that is forgotten while its process runs.
_unreaped: dict[int, subprocess.Popen[bytes]] = {}


class ProcessError(HostError):
    """A command could not be started, failed, took too long or wrote too much.

    Carries `argv`, `returncode` (None when it never ran or was killed by us) and `output`, the tail of what it wrote.
    """

    code = "process_failed"

    def __init__(self, what: str, argv: Sequence[str], returncode: int | None, output: bytes) -> None:
        self.argv = tuple(argv)
        self.returncode = returncode
        self.output = output[-EVIDENCE_BYTES:].decode(errors="replace").strip()
        super().__init__(f"{shlex.join(self.argv)}: {what}" + (f": {self.output}" if self.output else ""))


class ProcessTimeoutError(ProcessError):
    """The command did not end in time; its whole process group has been killed."""


@dataclass(frozen=True, slots=True)
class Completed:
    argv: tuple[str, ...]
    returncode: int  # negative: killed by that signal
    stdout: bytes
    stderr: bytes  # the last `limit` bytes


async def run(
    argv: Sequence[str],
    *,
    timeout: float,  # noqa: ASYNC109  (the deadline also kills and reaps, which a caller's timeout could not)
    input: bytes | None = None,
    limit: int = 1 << 20,
    check: bool = True,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    pass_fds: Sequence[int] = (),
) -> Completed:
    """Run a command to its end, which includes the end of every process that holds its output open.

    `timeout` is in seconds. More than `limit` bytes on stdout is an error (it is data, half of it is wrong); of stderr
    the last `limit` bytes are kept. Raises ProcessTimeoutError; ProcessError for too much output, for a program that
    cannot start and, with `check`, for an exit status other than 0. After any exception, cancellation too, the process
    group has been killed and the child is reaped.
    """
    stdout, stdout_end = Collector.pipe(limit, keep_tail=False)
    stderr, stderr_end = Collector.pipe(limit, keep_tail=True)
    try:
        with stdout_end, stderr_end, _stdin_of(input) as stdin:
            child = start(
                argv,
                stdin=stdin,
                stdout=stdout_end,
                stderr=stderr_end,
                env=env,
                cwd=cwd,
                pass_fds=pass_fds,
                reap=False,  # unreaped it keeps its pid, so its group can be killed safely until the output has ended
            )
        async with _killed_on_error(child):
            async with asyncio.timeout(timeout):
                await _all_of(stdout.collect(), stderr.collect(), child.exited())
    except TimeoutError:
        raise ProcessTimeoutError(f"no end after {timeout:g} s", argv, None, stdout.kept + stderr.kept) from None
    except OutputOverflow:
        raise ProcessError(f"more than {limit} bytes of output", argv, None, stderr.kept) from None
    finally:
        stdout.close()
        stderr.close()
    returncode = await child.wait()
    if check and returncode != 0:
        raise ProcessError(_describe(returncode), argv, returncode, stderr.kept or stdout.kept)
    return Completed(tuple(argv), returncode, stdout.kept, stderr.kept)


async def _all_of(*work: Coroutine[Any, Any, None]) -> None:
    """Return when all have ended; where one fails the others have ended, too, and hold no descriptor any more that is
    about to be closed."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def start(
    argv: Sequence[str],
    *,
    stdin: File | None = None,
    stdout: File | None = None,
    stderr: File | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    pass_fds: Sequence[int] = (),
    user: int | None = None,
    group: int | None = None,
    umask: int = -1,
    reap: bool = True,
) -> Child:
    """Start a child in a session of its own; it runs on when the manager ends.

    Streams left out are /dev/null. `env` is the whole environment (default BASE_ENV). `user` and `group` are numeric;
    with `group` the supplementary groups are dropped. A bare program name is looked up in SEARCH_PATH. Returns once
    the program has been executed; raises ProcessError where it cannot be. Needs a running event loop, which reaps the
    child (`reap=False` leaves that to `Child.reap_on_exit`).
    """
    environment = dict(BASE_ENV if env is None else env)
    command = shlex.join(argv)
    log.debug("start: %s", f"env -i {shlex.join(f'{k}={v}' for k, v in environment.items())} {command}")
    program = shutil.which(argv[0], path=SEARCH_PATH)
    if program is None:
        raise ProcessError("no such program", argv, None, b"")
    try:
        # Not in a thread: vfork holds the interpreter until the child has executed anyway, and takes about 1 ms.
        popen = subprocess.Popen(
            [program, *argv[1:]],
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=subprocess.DEVNULL if stdout is None else stdout,
            stderr=subprocess.DEVNULL if stderr is None else stderr,
            env=environment,
            cwd=cwd,
            pass_fds=pass_fds,
            user=user,
            group=group,
            extra_groups=None if group is None else [],
            umask=umask,
            start_new_session=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ProcessError(str(error), argv, None, b"") from error
    try:
        return Child(popen, tuple(argv), reap=reap)
    except OSError as error:  # no descriptor is left; nobody would own it
        popen.kill()
        popen.wait()
        raise ProcessError(str(error), argv, None, b"") from error


class Child:
    """A process that this manager started. It is reaped as soon as it ends, whether anybody waits or not."""

    def __init__(self, popen: subprocess.Popen[bytes], argv: tuple[str, ...], *, reap: bool) -> None:
        self.argv = argv
        self.pid = popen.pid
        self._popen = popen
        # An unreaped child keeps its pid, so both of these are certain to be about it.
        self.ref = ProcessRef(popen.pid, _start_time(popen.pid))
        self._pidfd = os.pidfd_open(popen.pid)
        _unreaped[popen.pid] = popen
        self._loop = asyncio.get_running_loop()
        self._exited: asyncio.Future[None] = self._loop.create_future()
        self._reap_wanted = reap
        self._loop.add_reader(self._pidfd, self._on_exit)

    @property
    def returncode(self) -> int | None:
        """Exit status, negative for a signal; None until the child is reaped."""
        return self._popen.returncode

    async def exited(self) -> None:
        """Return when the child has ended, reaped or not. Any number of tasks may wait, now and later."""
        await asyncio.shield(self._exited)

    async def wait(self) -> int:
        """Return the exit status (negative: killed by that signal). Any number of tasks may wait, now and later."""
        await self.exited()
        self.reap_on_exit()
        assert self._popen.returncode is not None
        return self._popen.returncode

    def signal(self, number: int) -> bool:
        """Send a signal to the child alone; False when it has ended."""
        if self._exited.done():
            return False
        return _send(self._pidfd, number)

    def kill(self) -> None:
        """Kill the child's whole process group. Does nothing once the child is reaped."""
        if self._popen.returncode is None:  # unreaped, so the number still means this group
            _kill_group(self.pid)

    def reap_on_exit(self) -> None:
        """From now on reap the child as soon as it ends. Until then its pid, and so its group, stays its own."""
        self._reap_wanted = True
        if self._exited.done():
            self._reap()

    def _on_exit(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        if self._reap_wanted:
            self._reap()
        if not self._exited.done():
            self._exited.set_result(None)

    def _reap(self) -> None:
        self._popen.wait()
        _unreaped.pop(self.pid, None)
        log.debug("ended: pid %d, %s: %s", self.pid, _describe(self._popen.returncode), self.argv[0])


@dataclass(frozen=True, slots=True)
class ProcessRef:
    """A process named so that a recycled pid is not mistaken for it. Any process of this boot, child or not."""

    pid: int
    start_time: int  # clock ticks from boot to the process's start, field 22 of /proc/<pid>/stat

    @classmethod
    def of(cls, pid: int) -> ProcessRef:
        """The process that has this pid now; raises ProcessLookupError when there is none."""
        return cls(pid, _start_time(pid))

    def alive(self) -> bool:
        """Whether it still runs. A zombie does not."""
        pidfd = self._open()
        if pidfd is None:
            return False
        os.close(pidfd)
        return True

    def signal(self, number: int) -> bool:
        """Send a signal to exactly this process; False when it is gone."""
        pidfd = self._open()
        if pidfd is None:
            return False
        try:
            return _send(pidfd, number)
        finally:
            os.close(pidfd)

    async def wait(self) -> None:
        """Return when it no longer runs; at once when it is gone already."""
        pidfd = self._open()
        if pidfd is None:
            return
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        try:
            loop.add_reader(pidfd, lambda: None if ended.done() else ended.set_result(None))
            await ended
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)

    def _open(self) -> int | None:
        """A pidfd of the running process, None when it has ended."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        # The descriptor holds whatever process it got; only then is the start time a proof.
        if _start_time_or_none(self.pid) == self.start_time and not _ended(pidfd):
            return pidfd
        os.close(pidfd)
        return None


class HeldProcess:
    """A process known by its descriptor alone, which this takes over; another one's child. `when_ended` is called once,
    when it has ended, and its descriptor is closed then. Needs a running event loop."""

    def __init__(self, pidfd: int, when_ended: Callable[[], None]) -> None:
        self._pidfd = pidfd
        self._when_ended = when_ended
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._loop.add_reader(pidfd, self._on_end)

    def kill(self) -> None:
        """Does nothing once it has ended."""
        if not self._ended.is_set():
            _send(self._pidfd, signal.SIGKILL)

    async def wait(self) -> None:
        """Return when it has ended. Any number of tasks may wait, now and later."""
        await self._ended.wait()

    def _on_end(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._ended.set()
        self._when_ended()


@contextlib.asynccontextmanager
async def _killed_on_error(child: Child) -> AsyncIterator[None]:
    try:
        yield
    except BaseException:
        child.kill()
        await child.wait()
        raise


def _stdin_of(data: bytes | None) -> IO[bytes]:
    """The input as a file in memory: a child that does not read it cannot block us."""
    if data is None:
        return open(os.devnull, "rb")
    file = os.fdopen(os.memfd_create("stdin"), "w+b")
    file.write(data)
    file.seek(0)
    return file


def _describe(returncode: int) -> str:
    if returncode >= 0:
        return f"exit status {returncode}"
    return f"killed by {signal.Signals(-returncode).name}"


def _start_time(pid: int) -> int:
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except FileNotFoundError:
        raise ProcessLookupError(f"no process {pid}") from None
    # The second field is the command in parentheses and may itself hold spaces and parentheses.
    return int(stat[stat.rindex(b")") + 2 :].split()[19])


def _start_time_or_none(pid: int) -> int | None:
    try:
        return _start_time(pid)
    except ProcessLookupError:
        return None


def _ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _send(pidfd: int, number: int) -> bool:
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return False
    return True


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        log.debug("process group %d is already gone", pid)
