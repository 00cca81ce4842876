"""The gVisor engine: an application kernel (runsc) in a cgroup, a network namespace and a file tree of its own.

One `runsc run` per VM, in the foreground of a session of its own, so that it outlives the manager and its end is the
guest's end. All of its processes are born in the VM's cgroup, which is made and removed here; its files and its state
are in a tmpfs of the VM's. So nothing of runsc's own clean-up (`runsc delete`) is ever needed: kill, unmount, remove.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rundatsheesh.manager.disk import workspace
from rundatsheesh.manager.engines import gvisor_channel, gvisor_files
from rundatsheesh.manager.engines.base import Availability, Capability, VmFiles
from rundatsheesh.manager.engines.gvisor_files import SandboxFiles
from rundatsheesh.manager.engines.gvisor_machine import GVisorMachine, find_processes
from rundatsheesh.manager.engines.runtime import cgroup_of
from rundatsheesh.manager.errors import EngineError, HostError
from rundatsheesh.manager.host import process, tools
from rundatsheesh.manager.host.cgroup_layout import find_layout
from rundatsheesh.manager.host.cgroups import MIB, Cgroup, Limits
from rundatsheesh.manager.host.namespaces import NETNS_DIRECTORY
from rundatsheesh.manager.host.process import Child
from rundatsheesh.manager.host.threads import in_thread, opened_in_thread
from rundatsheesh.manager.model import Isolation, VmRecord

PIDS_MAX = 2048  # host tasks; an idle sandbox has 25 to 40, each thread of the guest needs two, and there are 512
# The sandbox's own memory on top of the guest's: measured 20 MiB idle, and it grows with open files and processes, 45
# with 20 interpreters, 60 with 100 processes. The rest is how far programs get that use up the guest's memory until the
# agent has killed them: the limits are in agent/memory.py.
OVERHEAD_MB = 192
BOOT_TIMEOUT = 60.0  # seconds; 0.3 on an idle host, and many may start at once
CAP_SYS_ADMIN = 21

# Not left to runsc's defaults. Left to them: the watchdog, which only logs what it finds. After a long freeze its clock
# jumps, and it may take any task for a stuck one.
RUNSC_FLAGS = (
    "--network=sandbox",  # its own network stack; the host's sees Ethernet frames only
    "--host-uds=create",  # the guest may listen on the host, on the agent's socket, and dial nothing
    "--host-fifo=none",
    # The sandbox runs as nobody, without any capability, and its seccomp filter knows no open(2): files are the gofer's
    # business, a second process to break. With directfs it would be the host's uid 0 in a user namespace, holding
    # CAP_DAC_OVERRIDE over the files that it is given. Costs a third in file-heavy work, nothing elsewhere.
    "--directfs=false",
    # The image is read-only and needs no memory to write to. Writes to the workspace go through to the host at once
    # ("shared"), so that a guest that is killed has lost nothing it had written.
    "--overlay2=none",
    "--file-access=exclusive",  # of the image, which nobody changes
    "--file-access-mounts=shared",
    "--net-raw=false",
    "--cpu-num-from-quota",  # what the guest sees of the CPU limit; runsc shows two CPUs at least
    "--log-format=text",
)


@dataclass(frozen=True, slots=True)
class GVisorConfig:
    image_cache: Path  # holds the chosen runsc
    image_root: Callable[[str], Path]  # image id → the guest's root directory
    agent: Path  # directory of the agent's package
    platform: str = "systrap"  # how runsc traps system calls: systrap, ptrace or kvm
    boot_timeout: float = BOOT_TIMEOUT


@dataclass(slots=True)
class GVisor:
    config: GVisorConfig
    name: str = field(default="gvisor", init=False)
    isolation: Isolation = field(default=Isolation.APPLICATION_KERNEL, init=False)
    capabilities: frozenset[Capability] = field(default=frozenset({Capability.FREEZE}), init=False)
    link: Literal["veth", "tap"] = field(default="veth", init=False)
    _versions: dict[tuple[Path, int], tuple[int, int]] = field(default_factory=dict, init=False)

    def available(self) -> Availability:
        try:
            return self._look()
        except (HostError, OSError) as error:
            return Availability(False, str(error), getattr(error, "hint", None))

    async def make_disk(self, record: VmRecord, files: VmFiles) -> None:
        await workspace.create(files.disk, record.spec.disk_mb)

    async def start(self, record: VmRecord, files: VmFiles) -> GVisorMachine:
        await self.release(record, files)
        try:
            return await self._start(record, files)
        except BaseException as error:
            # To its end even when we are cancelled, or processes would go on without an owner.
            await asyncio.shield(asyncio.ensure_future(self.release(record, files)))
            if isinstance(error, OSError):
                raise EngineError(f"cannot start {record.id}: {error}") from error
            if isinstance(error, EngineError):
                error.details["log"] = gvisor_files.evidence(files)
            raise

    async def adopt(self, record: VmRecord, files: VmFiles) -> GVisorMachine | None:
        """As promised by Engine. A guest that was frozen runs again."""
        cgroup = cgroup_of(record)
        processes, members = await in_thread(lambda: (gvisor_files.read_processes(files), cgroup.pids()))
        if not processes or not all(p.pid in members and p.alive() for p in processes):
            return None
        await in_thread(cgroup.thaw)
        return GVisorMachine(files, cgroup, processes, None)

    async def release(self, record: VmRecord, files: VmFiles) -> None:
        cgroup = cgroup_of(record)
        await in_thread(cgroup.kill)
        await in_thread(gvisor_files.remove, files)
        await workspace.unmount(files.workspace)
        await in_thread(cgroup.remove)

    async def _start(self, record: VmRecord, files: VmFiles) -> GVisorMachine:
        cgroup = cgroup_of(record)
        # The guest's machine is as large as the limit that runsc finds at its start, so its overhead is added later.
        limits = Limits(record.spec.cpu, record.spec.mem_mb * MIB, PIDS_MAX)
        await in_thread(cgroup.create, limits)
        await workspace.mount(files.disk, files.workspace)
        await in_thread(gvisor_files.prepare, record, files, cgroup.path)
        child = await self._launch(record, files, cgroup)
        stream = await gvisor_channel.connect(
            SandboxFiles(files.runtime).socket, child.exited, self.config.boot_timeout
        )
        try:
            processes = await in_thread(find_processes, child.ref, cgroup)
            await in_thread(gvisor_files.write_processes, files, processes)
            await in_thread(cgroup.set_memory, (record.spec.mem_mb + OVERHEAD_MB) * MIB)
        except BaseException:
            stream[1].close()
            raise
        return GVisorMachine(files, cgroup, processes, child, stream)

    async def _launch(self, record: VmRecord, files: VmFiles, cgroup: Cgroup) -> Child:
        platform = self.config.platform
        tree = await opened_in_thread(
            lambda: gvisor_files.private_tree(
                record,
                files,
                runsc=self._runsc(),
                image=self.config.image_root(record.spec.image_id),
                agent=self.config.agent,
                device=Path("/dev/kvm") if platform == "kvm" else None,
            )
        )
        netns = NETNS_DIRECTORY / record.slot.netns
        runsc = [gvisor_files.RUNSC, f"--root={gvisor_files.STATE}", f"--log={gvisor_files.ENGINE_LOG}"]
        runsc += [f"--platform={platform}", *RUNSC_FLAGS, "run", f"--bundle={gvisor_files.BUNDLE}", record.id]
        argv = cgroup.entering(["nsenter", f"--mount=/proc/self/fd/{tree}", f"--net={netns}", "--", *runsc])
        try:
            console = os.open(SandboxFiles(files.runtime).console, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            try:
                return process.start(argv, stdout=console, stderr=console, pass_fds=[tree])
            finally:
                os.close(console)
        finally:
            os.close(tree)

    def _runsc(self) -> Path:
        found = tools.find_runsc(self.config.image_cache) or tools.find_tool("runsc")
        if found is None:
            raise HostError("runsc is not installed", hint="run `rds setup`, which fetches it from Debian")
        return found

    def _look(self) -> Availability:
        """Raises HostError or OSError for what is missing."""
        if os.geteuid() != 0 or not _has_capability(CAP_SYS_ADMIN):
            return Availability(False, "not root", "namespaces, mounts and cgroups need root: use sudo")
        if self.config.platform == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
            return Availability(False, "no /dev/kvm for the kvm platform", "set GVISOR_PLATFORM to systrap")
        for program in ("nsenter", "mkfs.ext4"):
            if tools.find_tool(program) is None:
                return Availability(False, f"{program} is not installed", "run `rds setup`")
        find_layout()
        runsc = self._runsc()
        date, patch = self._version(runsc)
        if (date, patch) < tools.MIN_RUNSC:
            hint = f"{tools.MIN_RUNSC[0]} or newer is needed: run `rds setup`"
            return Availability(False, f"{runsc} is of {date}.{patch}", hint)
        return Availability(True, f"runsc {date}.{patch}, {self.config.platform}")

    def _version(self, runsc: Path) -> tuple[int, int]:
        """Asked once per binary, in a thread with an event loop of its own: the caller may or may not have one."""
        key = (runsc.resolve(), runsc.stat().st_mtime_ns)
        if key not in self._versions:
            with ThreadPoolExecutor(1) as thread:
                self._versions[key] = thread.submit(lambda: asyncio.run(tools.runsc_version(runsc))).result()
        return self._versions[key]


def _has_capability(number: int) -> bool:
    status = Path("/proc/self/status").read_text()
    effective = next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(effective, 16) >> number & 1)
