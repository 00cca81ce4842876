"""What every engine has of a guest that runs: a directory in memory, and a group that all of its processes are in.

<runtime>/         a tmpfs of its own: bounded in bytes and files, and gone with one unmount
├── machine.json   the processes that are the guest, for the manager that comes after us
├── console.log    what the guest says; STORAGE_ROOT links to it while the guest runs
├── engine.log     what the engine says, likewise
└── root/          root of the engine's mount namespace
"""

from __future__ import annotations

import asyncio
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rundatsheesh.manager.engines import logs
from rundatsheesh.manager.engines.base import Exit, Stream, VmFiles
from rundatsheesh.manager.errors import EngineError
from rundatsheesh.manager.host import cgroups, mounts
from rundatsheesh.manager.host.cgroups import Cgroup
from rundatsheesh.manager.host.mounts import Flag
from rundatsheesh.manager.host.process import Child
from rundatsheesh.manager.host.threads import in_thread
from rundatsheesh.manager.model import VmRecord

TMPFS_OPTIONS = "size=2m,nr_inodes=256,mode=0700"
ENGINE_EVIDENCE = 2000  # bytes of the log's end


@dataclass(frozen=True, slots=True)
class RuntimeFiles:
    """Paths on the host, derived from the runtime directory; nothing is created by asking."""

    runtime: Path

    @property
    def machine(self) -> Path:
        return self.runtime / "machine.json"

    @property
    def console(self) -> Path:
        return self.runtime / "console.log"

    @property
    def engine(self) -> Path:
        return self.runtime / "engine.log"

    @property
    def root(self) -> Path:
        return self.runtime / "root"


class GroupedMachine(ABC):
    """The part of engines.base.Machine that a cgroup is enough for. Make one only for a guest that runs; it watches
    from then on."""

    def __init__(self, files: VmFiles, cgroup: Cgroup, child: Child | None, stream: Stream | None) -> None:
        self._files = files
        self._cgroup = cgroup
        self._child = child  # None when an earlier manager started it: then the exit status is not ours to read
        self._stream = stream  # to the agent, for the first who connects
        self._stopping = False
        self._freezing = asyncio.Lock()
        self._exit = asyncio.create_task(self._watch(), name=f"watch {cgroup.name}")

    @abstractmethod
    async def _watch(self) -> Exit:
        """Notice the guest's end, see to it that nothing of it is left, and say why."""

    async def wait(self) -> Exit:
        return await asyncio.shield(self._exit)

    async def freeze(self) -> None:
        """As promised by Machine; raises EngineError when the guest has ended."""
        async with self._freezing:
            try:
                await in_thread(self._cgroup.freeze)
            except OSError as error:
                raise EngineError(f"cannot freeze {self._cgroup.name}: {error}") from error

    async def thaw(self) -> None:
        async with self._freezing:
            await in_thread(self._cgroup.thaw)

    async def _until(self, end: Awaitable[object]) -> None:
        """Return at the end, and make room in the logs until then."""
        ending = asyncio.ensure_future(end)
        try:
            while not (await asyncio.wait([ending], timeout=logs.TRIM_INTERVAL))[0]:
                await in_thread(trim_logs, self._files)
        finally:
            ending.cancel()

    def _close_stream(self) -> None:
        if self._stream is not None:
            self._stream[1].close()
            self._stream = None


def cgroup_of(record: VmRecord) -> Cgroup:
    return cgroups.of_node(record.node_id).group(record.id)


def prepare(files: VmFiles, flags: Flag) -> None:
    """Mount the runtime directory and open the logs in it. Raises OSError."""
    files.runtime.mkdir(mode=0o700, parents=True, exist_ok=True)
    mounts.mount("rundatsheesh", files.runtime, "tmpfs", flags, TMPFS_OPTIONS)
    for kept, live in _logs(files):
        logs.open_log(kept, live)


def keep_logs(files: VmFiles) -> None:
    """Keep what of the logs is worth it beyond the runtime directory. Idempotent."""
    for kept, live in _logs(files):
        logs.settle_log(kept, live)


def remove(files: VmFiles) -> None:
    """Remove the runtime directory with all that is in it. Idempotent; the guest's processes must be gone."""
    mounts.unmount_all(files.runtime)
    if files.runtime.is_dir():
        shutil.rmtree(files.runtime)


def trim_logs(files: VmFiles) -> None:
    """Make room in the logs of a running guest, which are bounded anyway, so that they go on with what is new."""
    for _, live in _logs(files):
        logs.trim_log(live)


def evidence(files: VmFiles, console: int) -> str:
    """The end of both logs; `console` is how many bytes of that one."""
    tails = logs.read_tail(files.engine_log, ENGINE_EVIDENCE), logs.read_tail(files.console_log, console)
    return b"\n".join(tail.strip() for tail in tails if tail.strip()).decode(errors="replace")


def write_note(files: VmFiles, note: Any) -> None:
    """Leave a JSON value for the next manager. Complete or not at all."""
    path = RuntimeFiles(files.runtime).machine
    new = path.with_suffix(".new")
    new.write_text(json.dumps(note))
    new.rename(path)


def read_note(files: VmFiles) -> Any:
    """What `write_note` left; None when nothing was."""
    try:
        return json.loads(RuntimeFiles(files.runtime).machine.read_text())
    except FileNotFoundError:
        return None


def _logs(files: VmFiles) -> tuple[tuple[Path, Path], ...]:
    """Each log where it is looked for, and where it is written while the guest runs."""
    own = RuntimeFiles(files.runtime)
    return (files.console_log, own.console), (files.engine_log, own.engine)
