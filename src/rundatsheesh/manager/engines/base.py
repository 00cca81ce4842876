"""The seam to hypervisors and sandboxes, modelled on a process.

An engine knows how a record becomes a running guest, how the agent's byte stream is reached, and which extra powers it
has. Policy, quota, records, calls and files are above it, once.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal, Protocol

from rundatsheesh.manager.disk.worker import WorkPlace
from rundatsheesh.manager.model import Isolation, VmRecord

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Capability(StrEnum):
    FREEZE = "freeze"  # an idle guest can be frozen and thawed in about a millisecond


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether this host can run the engine: a fact in one sentence, and what to do where it cannot."""

    usable: bool
    fact: str
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class Exit:
    """How a guest ended. `reason` is a stable word: stopped, out_of_memory, killed, kernel_panic, agent_exited, ..."""

    reason: str
    status: int | None = None  # exit status of the outermost process where it is known
    evidence: str = ""  # the tail of the engine's log, for the log
    oom_kills: int = 0  # processes that the host's kernel killed because the guest's group was out of memory
    memory_peak: int | None = None  # bytes, of the whole group; None where the kernel does not tell


@dataclass(frozen=True, slots=True)
class VmFiles:
    """Where one VM's files lie on this host. Derived from settings and the record; nothing is created by asking."""

    directory: Path  # STORAGE_ROOT/vms/<id>: private to the VM, 0700
    disk: Path  # the sparse ext4 image that is /workspace, <directory>/workspace.img
    workspace: Path  # mount point of `disk` on the host (engines that share a directory), <directory>/workspace
    runtime: Path  # RUNTIME_DIR/<node>/<id>: sockets; short, because socket paths end at 107 bytes
    engine_log: Path  # <directory>/engine.log
    console_log: Path  # <directory>/console.log


class Machine(Protocol):
    """A running guest."""

    @property
    def transfer_disk(self) -> Path | None:
        """The file of a disk through which content passes to and from the guest's agent (manager/guest_slots.py); None
        where the channel alone is fast enough."""

    @property
    def workplace(self) -> WorkPlace | None:
        """Where this host has the workspace mounted, for file work without the guest; None where only the guest has."""

    @property
    def has_workspace(self) -> bool:
        """Whether the guest has mounted its workspace by the time its agent answers."""

    async def connect(self) -> Stream:
        """Open a byte stream to the agent. Waits for the agent to listen; raises EngineError when the guest ended."""

    async def wait(self) -> Exit:
        """Return when the guest has ended. May be awaited by several tasks and again later."""

    async def stop(self, grace: float) -> None:
        """Ask, then kill after `grace` seconds; returns when every process of the guest is gone."""

    async def freeze(self) -> None:
        """Stop the guest's CPU use. A no-op on engines without FREEZE."""

    async def thaw(self) -> None:
        """Undo `freeze`. Idempotent."""


class Engine(Protocol):
    name: str
    capabilities: frozenset[Capability]
    link: Literal["veth", "tap"]  # what the engine connects the guest's eth0 to, see net.Network.attach

    @property
    def isolation(self) -> Isolation: ...

    def available(self) -> Availability:
        """Look at the host without side effects. Never hangs."""

    async def make_disk(self, record: VmRecord, files: VmFiles) -> None:
        """Make the empty disk of a VM that has never run, unless it exists; `files.directory` does. It appears complete
        or not at all. Raises StorageFull, HostError."""

    async def start(self, record: VmRecord, files: VmFiles) -> Machine:
        """Boot the guest. The network of `record.slot` is attached and its disk exists. On failure nothing is left
        running and EngineError carries the log's tail."""

    async def adopt(self, record: VmRecord, files: VmFiles) -> Machine | None:
        """Re-attach to a guest that an earlier manager started; None when it no longer runs."""

    async def release(self, record: VmRecord, files: VmFiles) -> None:
        """Undo whatever `start` may have done, from any state, as often as wanted: processes, cgroups, mounts, state
        files. Returns when all of it is gone."""
