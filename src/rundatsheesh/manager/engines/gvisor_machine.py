"""A running gVisor sandbox: three host processes (runsc, its sandbox, its gofer) and the stubs of the guest's
processes, all in one cgroup. The end of any of the three is the end of the guest."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from rundatsheesh.manager.disk.worker import WorkPlace
from rundatsheesh.manager.engines import gvisor_channel, gvisor_files
from rundatsheesh.manager.engines.base import Exit, Stream, VmFiles
from rundatsheesh.manager.engines.gvisor_files import SandboxFiles
from rundatsheesh.manager.engines.runtime import GroupedMachine
from rundatsheesh.manager.errors import EngineError
from rundatsheesh.manager.host.cgroups import Cgroup
from rundatsheesh.manager.host.process import Child, ProcessRef
from rundatsheesh.manager.host.threads import in_thread

CONNECT_TIMEOUT = 10.0  # seconds, for a guest whose agent listens already
AFTERMATH_TIMEOUT = 2.0  # for runsc to notice that its sandbox ended, and to tell the exit status
SIGNALLED = 128  # exit statuses above it name a signal


class GVisorMachine(GroupedMachine):
    """Implements engines.base.Machine."""

    def __init__(
        self,
        files: VmFiles,
        cgroup: Cgroup,
        processes: Sequence[ProcessRef],
        child: Child | None,
        stream: Stream | None = None,
    ) -> None:
        super().__init__(files, cgroup, child, stream)
        self._runsc = processes[0]
        self._processes = tuple(processes)

    @property
    def transfer_disk(self) -> None:
        return None

    @property
    def workplace(self) -> WorkPlace:
        """The guest sees at once what is changed there, for runsc asks the host at each access."""
        return WorkPlace(self._files.disk, self._files.workspace, self._cgroup.directories())

    @property
    def has_workspace(self) -> bool:
        return True

    async def connect(self) -> Stream:
        stream, self._stream = self._stream, None
        if stream is not None:
            return stream
        try:
            return await gvisor_channel.connect(SandboxFiles(self._files.runtime).socket, self.wait, CONNECT_TIMEOUT)
        except EngineError as error:
            error.details["log"] = gvisor_files.evidence(self._files)
            raise

    async def stop(self, grace: float) -> None:
        """As promised by Machine, but at once: a sandbox has no power button. Who wants the guest's processes to end in
        good order asks the agent before. Nothing written is lost, for it is with the host's kernel already."""
        self._stopping = True
        await in_thread(self._cgroup.kill)
        await self.wait()

    async def _watch(self) -> Exit:
        await self._until(gvisor_channel.first_of([process.wait() for process in self._processes], None))
        self._close_stream()
        await self.thaw()  # a frozen runsc could not tell us anything
        await gvisor_channel.first_of([self._runsc.wait()], AFTERMATH_TIMEOUT)
        crashed = self._runsc.alive()
        await in_thread(self._cgroup.kill)
        await asyncio.gather(*(process.wait() for process in self._processes))
        status = await self._child.wait() if self._child is not None else None
        reason = self._reason(status, crashed)
        return Exit(
            reason, status, gvisor_files.evidence(self._files), self._cgroup.oom_kills(), self._cgroup.memory_peak()
        )

    def _reason(self, status: int | None, crashed: bool) -> str:
        if self._stopping:
            return "stopped"
        if self._cgroup.oom_kills() > 0:
            return "out_of_memory"
        if crashed or (status is not None and (status < 0 or status > SIGNALLED)):
            return "killed"
        return "agent_exited" if status is not None else "ended"


def find_processes(runsc: ProcessRef, cgroup: Cgroup) -> list[ProcessRef]:
    """runsc and those that it started itself, the sandbox and the gofer; the others of the group are the sandbox's."""
    return [runsc, *(ref for ref in map(_reference, cgroup.pids()) if ref and _parent(ref.pid) == runsc.pid)]


def _reference(pid: int) -> ProcessRef | None:
    try:
        return ProcessRef.of(pid)
    except ProcessLookupError:
        return None


def _parent(pid: int) -> int | None:
    """The process's parent; None when it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("PPid:"))
