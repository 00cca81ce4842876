"""File work in a workspace that this host has mounted, by processes that can reach nothing but that workspace.

The tree is a guest's, and changes while it is worked on. So the manager opens nothing in it: it starts a worker, which
is the agent's own code (agent/outside.py) behind the agent's own protocol, confined to the workspace before it reads
its first byte, and talks to it as to a guest. A helper that has left the host's files behind forks the workers, which
takes a millisecond; it ends with the manager, and every worker with it.

A worker joins the VM's cgroup: its time and memory count as the VM's, and what ends the VM ends it.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rundatsheesh.manager.errors import HostError
from rundatsheesh.manager.host import loops, mounts, process
from rundatsheesh.manager.host.process import Child, HeldProcess
from rundatsheesh.manager.host.threads import in_thread, opened_in_thread

log = logging.getLogger(__name__)

# The namespaces without /proc of its own, which nobody looks at; what is mounted there stays there.
NAMESPACES = ("unshare", "--fork", "--kill-child", "--pid", "--net", "--ipc", "--mount", "--propagation", "private")
ANSWER_TIMEOUT = 10.0  # seconds, for the helper to fork; a millisecond once it has started, which takes 50
END_TIMEOUT = 10.0
MOST = 8  # workers of one VM at once: each takes a few megabytes of its memory
_STARTED = b"+"
_INT = 4
_LOG = 2  # the manager's own

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True, slots=True)
class WorkPlace:
    """A workspace on this host, and the groups that whoever works in it joins."""

    disk: Path  # what must be mounted there
    mountpoint: Path
    groups: Sequence[Path]  # directories of cgroups


@dataclass(slots=True)
class Worker:
    """`stream` leads to it. To be ended by whoever opened it."""

    stream: Stream
    _process: HeldProcess

    async def end(self) -> None:
        """Kill it, and return when it is gone. Idempotent."""
        self.stream[1].transport.abort()
        self._process.kill()
        try:
            async with asyncio.timeout(END_TIMEOUT):
                await self._process.wait()
        except TimeoutError:  # its file system does not answer; what it holds goes when that does
            log.warning("a file worker does not die")


class Workers:
    """Starts workers. `agent` is the directory of the agent's package."""

    def __init__(self, agent: Path) -> None:
        self._agent = agent
        self._helper: _Helper | None = None
        self._turn = asyncio.Lock()
        self._working: dict[Path, int] = {}

    def start(self) -> None:
        """Have the helper started before anybody waits for it. Raises HostError."""
        self._helper = _Helper(self._agent)

    async def close(self) -> None:
        """Return when the helper and all workers have ended. Idempotent."""
        helper, self._helper = self._helper, None
        if helper is not None:
            await helper.close()

    async def open(self, place: WorkPlace) -> Worker:
        """A worker in this workspace. Raises HostError where there can be none: too many work there, or a step of its
        confinement fails; nobody has looked at the workspace then."""
        leave = self._enter(place.mountpoint)
        with ExitStack() as ours:
            try:
                pidfd, stream = await self._ask(place, ours)
            except BaseException:
                leave()
                raise
            held = HeldProcess(pidfd, leave)
            try:
                return Worker(await asyncio.open_unix_connection(sock=stream), held)
            except BaseException:
                held.kill()
                raise

    async def _ask(self, place: WorkPlace, ours: ExitStack) -> tuple[int, socket.socket]:
        """The worker's pidfd, and our end of its stream; that one is closed where this raises."""
        try:
            stream, theirs = socket.socketpair()
        except OSError as error:
            raise HostError(f"no file worker for {place.mountpoint}: {error}") from error
        ours.enter_context(theirs)
        try:
            fds = await in_thread(_descriptors, place, ours)
            async with self._turn:
                pidfd = await self._asked([theirs.fileno(), *fds])
        except BaseException as error:
            stream.close()
            if isinstance(error, OSError):
                raise HostError(f"no file worker for {place.mountpoint}: {error}") from error
            raise
        return pidfd, stream

    async def _asked(self, fds: Sequence[int]) -> int:
        if self._helper is None or self._helper.has_ended:
            await self.close()
            self.start()
        assert self._helper is not None
        try:
            return await self._helper.fork(fds)
        except OSError:
            await self.close()  # an answer that comes late would be taken for another's
            raise

    def _enter(self, mountpoint: Path) -> Callable[[], None]:
        """Take one of the places there; what gives it back."""
        if self._working.get(mountpoint, 0) >= MOST:
            raise HostError(f"{MOST} file workers are at work in {mountpoint}")
        self._working[mountpoint] = self._working.get(mountpoint, 0) + 1

        def leave() -> None:
            self._working[mountpoint] -= 1
            if not self._working[mountpoint]:
                del self._working[mountpoint]

        return leave


class _Helper:
    def __init__(self, agent: Path) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(ANSWER_TIMEOUT)
        argv = [*NAMESPACES, sys.executable, "-I", "-S", "-B", str(agent), "--outside"]
        with theirs:
            try:
                self._child: Child = process.start(argv, stdin=theirs.fileno(), stderr=_LOG)
            except BaseException:
                self._control.close()
                raise

    @property
    def has_ended(self) -> bool:
        return self._child.returncode is not None

    async def fork(self, fds: Sequence[int]) -> int:
        """The pidfd of a new worker that has these descriptors. Raises HostError, and may be asked again; OSError, and
        may not."""
        return await opened_in_thread(self._fork, fds)

    def _fork(self, fds: Sequence[int]) -> int:
        socket.send_fds(self._control, [b"S"], list(fds))
        answer, ancillary, _, _ = self._control.recvmsg(1024, socket.CMSG_LEN(_INT), socket.MSG_CMSG_CLOEXEC)
        if not answer:
            raise ConnectionError("the helper for file work has ended")
        if answer != _STARTED:
            raise HostError(f"no process for file work: {answer[1:].decode(errors='replace')}")
        if not ancillary:
            raise OSError(errno.EMFILE, "no descriptor is left for the worker's")  # it ends with its helper
        return int.from_bytes(ancillary[0][2][:_INT], sys.byteorder)

    async def close(self) -> None:
        self._control.close()
        try:
            async with asyncio.timeout(END_TIMEOUT):
                await self._child.wait()
        except TimeoutError:
            self._child.kill()  # and the kernel the rest, which has lost its parent
            await self._child.wait()


def _descriptors(place: WorkPlace, ours: ExitStack) -> list[int]:
    """Of the workspace's mount, and of the groups' lists; `ours` closes them. Raises OSError, HostError."""
    tree = mounts.clone(place.mountpoint)
    ours.callback(os.close, tree)
    device = os.fstat(tree).st_dev
    if os.major(device) != loops.LOOP_MAJOR or loops.backing_file(os.minor(device)) != place.disk:
        raise HostError(f"{place.disk} is not mounted at {place.mountpoint}")
    fds = [tree]
    for group in place.groups:
        fds.append(os.open(group / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC))
        ours.callback(os.close, fds[-1])
    return fds
