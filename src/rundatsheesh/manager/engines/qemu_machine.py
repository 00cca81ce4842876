"""A running virtual machine: one QEMU process. Its end is the guest's end."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from rundatsheesh.manager.engines import qemu_files
from rundatsheesh.manager.engines.base import Exit, Stream, VmFiles
from rundatsheesh.manager.engines.qemu_files import MachineFiles
from rundatsheesh.manager.engines.qmp import Qmp
from rundatsheesh.manager.engines.runtime import GroupedMachine
from rundatsheesh.manager.errors import EngineError
from rundatsheesh.manager.host.cgroups import Cgroup
from rundatsheesh.manager.host.process import Child, ProcessRef
from rundatsheesh.manager.host.threads import in_thread

LAST_WORDS_TIMEOUT = 2.0  # seconds, to read what QEMU said before it ended
QUIT_TIMEOUT = 5.0  # for QEMU to write out its disk

_PANIC = re.compile(r"Kernel panic - not syncing: (.*)")


class QemuMachine(GroupedMachine):
    """Implements engines.base.Machine."""

    def __init__(
        self,
        files: VmFiles,
        cgroup: Cgroup,
        process: ProcessRef,
        child: Child | None,
        qmp: Qmp,
        stream: Stream | None = None,
        *,
        has_workspace: bool = False,
    ) -> None:
        super().__init__(files, cgroup, child, stream)
        self._process = process
        self._qmp = qmp
        self.has_workspace = has_workspace

    @property
    def transfer_disk(self) -> Path | None:
        disk = MachineFiles(self._files.runtime).transfer
        return disk if disk.exists() else None  # machines of earlier managers have none

    @property
    def workplace(self) -> None:
        return None  # the guest's kernel has it: two on one disk would destroy it

    async def connect(self) -> Stream:
        """As promised by Machine, but the stream is there before the agent is: what is sent waits for it."""
        stream, self._stream = self._stream, None
        if stream is not None:
            return stream
        try:
            return await asyncio.open_unix_connection(str(MachineFiles(self._files.runtime).agent))
        except OSError as error:
            evidence = await in_thread(qemu_files.evidence, self._files)
            raise EngineError(f"cannot reach the guest: {error}", details={"log": evidence}) from error

    async def stop(self, grace: float) -> None:
        """Give the guest `grace` seconds to switch itself off, then end it. The agent is the guest's only power button,
        so whoever wants a shutdown in good order has asked it before; otherwise what the guest has not synced is lost.
        """
        self._stopping = True
        await self.thaw()  # a frozen guest could neither switch itself off nor hear QEMU's quit
        if not await self._ends_within(grace):
            asking = asyncio.ensure_future(self._qmp.execute("quit"))
            await self._ends_within(QUIT_TIMEOUT)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)  # refused only where QEMU is gone already
            await in_thread(self._cgroup.kill)
        await self.wait()

    async def _ends_within(self, seconds: float) -> bool:
        done, _ = await asyncio.wait([self._exit], timeout=seconds)
        return bool(done)

    async def _watch(self) -> Exit:
        await self._until(self._process.wait())
        last_words = asyncio.create_task(self._qmp.wait_closed())
        await asyncio.wait([last_words], timeout=LAST_WORDS_TIMEOUT)
        await self._qmp.close()
        await last_words
        self._close_stream()
        await in_thread(self._cgroup.kill)
        status = await self._child.wait() if self._child is not None else None
        evidence = await in_thread(qemu_files.evidence, self._files)
        reason = self._reason(evidence)
        return Exit(reason, status, evidence, self._cgroup.oom_kills(), self._cgroup.memory_peak())

    def _reason(self, evidence: str) -> str:
        if self._stopping:
            return "stopped"
        if self._qmp.shutdown_reason in ("guest-reset", "guest-panic"):
            panic = _PANIC.search(evidence)
            return "agent_exited" if panic and "Attempted to kill init" in panic.group(1) else "kernel_panic"
        if self._qmp.shutdown_reason == "guest-shutdown":
            return "agent_exited" if "the server ended" in evidence else "stopped"
        return "out_of_memory" if self._cgroup.oom_kills() > 0 else "killed"
