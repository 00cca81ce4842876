"""One cgroup per VM: its limits, its freezer, and the list of its processes that nothing can leave.

    <hierarchy>/<parent>/<VM id>        parent is "rundatsheesh-<node>"

Each controller is taken from where this host has it, v1 or v2. A group is made in every hierarchy, also in those that
carry no limit of ours, because sandboxes join all that they find and would make, and leave behind, their own. The v2
hierarchy is used for freezing and killing wherever one is mounted, even when it holds no controller: both are one write
there and their completion is an event. A VM's processes are put into the hierarchies with which systemd tracks
services too, so that they are no part of the manager's service and outlive it.

All operations block (milliseconds, bounded); callers on the event loop go through `asyncio.to_thread`. The names of
files, and what they hold, are those of the kernel's admin guide, cgroup-v1/ and cgroup-v2.rst.
"""

from __future__ import annotations

import errno
import os
import select
import shlex
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from rundatsheesh.manager.errors import HostError
from rundatsheesh.manager.host.cgroup_layout import Layout, find_layout

CPU_PERIOD_US = 100_000
OOM_SCORE = 500
MIB = 1 << 20

FREEZE_TIMEOUT = 5.0  # seconds; measured under 1 ms
KILL_TIMEOUT = 20.0  # a process that writes out dirty pages may take a while to die
REMOVE_TIMEOUT = 5.0
_parents = threading.Lock()  # held while a parent gets a child, and while one that may be empty is removed
_ABSENT = (errno.ENOENT, errno.ENODEV)  # a group that was never made, or one that is removed while we use its files
_POLL_INTERVAL = 0.0005  # where the kernel has no event to wait for


@dataclass(frozen=True, slots=True)
class Limits:
    cpu: int  # whole CPUs of time
    memory_bytes: int
    pids: int


@dataclass(frozen=True, slots=True)
class Usage:
    memory_bytes: int
    cpu_ns: int


class Cgroups:
    """All groups of one manager."""

    def __init__(self, layout: Layout, parent: str) -> None:
        self.layout = layout
        self.parent = parent

    def group(self, name: str) -> Cgroup:
        """The handle of a group, whether it exists or not."""
        return Cgroup(self.layout, self.parent, name)

    def list_names(self) -> set[str]:
        """Names of all groups that exist beneath the parent in any hierarchy, for adoption and the leak audit."""
        return {
            entry.name for mount in self.layout.every_mount for entry in _entries(mount / self.parent) if entry.is_dir()
        }


@cache
def of_node(node_id: str) -> Cgroups:
    """All groups of the manager with this id, on this host. Raises HostError where it has not what they need."""
    return Cgroups(find_layout(), f"rundatsheesh-{node_id}")


class Cgroup:
    def __init__(self, layout: Layout, parent: str, name: str) -> None:
        self._layout = layout
        self._parent = parent
        self.name = name
        self.path = f"/{parent}/{name}"  # below the mount point of each hierarchy
        self._v2 = self._below(layout.v2) if layout.v2 is not None else None
        self._list = self._v2 or self._below(layout.v1["freezer"])  # where membership is looked up

    def create(self, limits: Limits) -> None:
        """Make the group, empty and with these limits. Also sets the limits of a group that exists. Raises HostError;
        what was made by then, `remove` undoes."""
        try:
            with _parents:
                if self._layout.v2 is not None:
                    self._enable_v2_controllers(self._layout.v2)
                for mount in self._layout.every_mount:
                    _make_group(self._below(mount))
            self._set_cpu(limits.cpu)
            self._set_pids(limits.pids)
            self.set_memory(limits.memory_bytes)
        except OSError as error:
            raise HostError(f"cannot make the cgroup {self.path}: {error}") from error

    def exists(self) -> bool:
        return self._list.is_dir()

    def directories(self) -> list[Path]:
        """Its directory in each hierarchy that limits or tracks it: who joins all of them is in the group."""
        v1 = [self._below(mount) for mount in dict.fromkeys(self._layout.v1.values())]
        return v1 if self._v2 is None else [*v1, self._v2]

    def entering(self, argv: Sequence[str]) -> list[str]:
        """A command line that moves itself into the group and becomes `argv`, so that no process of it ever ran
        outside. When the host itself runs out of memory, these processes go first. They dump no core, which would write
        a guest's memory to the host's disk."""
        moves = [f"echo $$ > {shlex.quote(str(d / 'cgroup.procs'))}" for d in self.directories()]
        return [
            "sh",
            "-c",
            " && ".join(["ulimit -c 0", f"echo {OOM_SCORE} > /proc/self/oom_score_adj", *moves, 'exec "$@"']),
            "sh",
            *argv,
        ]

    def set_memory(self, limit: int) -> None:
        """Limit memory to so many bytes, without swap. Raises OSError(EBUSY) when more is in use and stays so."""
        v1 = self._v1("memory")
        if v1 is None:
            self._write_v2("memory.max", str(limit))
            self._write_v2("memory.swap.max", "0", optional=True)
            return
        with_swap = v1 / "memory.memsw.limit_in_bytes"  # absent where the kernel does not count swap
        files = [v1 / "memory.limit_in_bytes", *([with_swap] if with_swap.exists() else [])]
        # Memory and swap together may never be limited below memory alone, so the order depends on the direction.
        if int(files[0].read_text()) < limit:
            files.reverse()
        for file in files:
            file.write_text(str(limit))

    def pids(self) -> list[int]:
        """Processes in the group, those of groups that were made beneath it excluded; empty when it does not exist."""
        try:
            return [int(line) for line in (self._list / "cgroup.procs").read_text().split()]
        except OSError as error:
            if error.errno in _ABSENT:
                return []
            raise

    def freeze(self) -> None:
        """Stop all processes; returns once none runs. Raises HostError when the kernel does not get there."""
        self._request_freeze(True)
        if self._v2 is not None:
            self._wait_for_event(self._v2, "frozen 1", FREEZE_TIMEOUT)
        else:
            state = self._freezer() / "freezer.state"
            _poll_until(lambda: state.read_text().strip() == "FROZEN", FREEZE_TIMEOUT, f"{self.path} does not freeze")

    def thaw(self) -> None:
        """Let the processes run again. Does nothing when they run, or when the group does not exist (any more)."""
        try:
            self._request_freeze(False)
        except OSError as error:
            if error.errno not in _ABSENT:
                raise

    def kill(self) -> None:
        """Kill every process of the group, frozen ones too; returns when it is empty or does not exist. Raises
        HostError when one does not die."""
        deadline = time.monotonic() + KILL_TIMEOUT
        while pids := self.pids():
            pidfds = _open_members(pids, self.pids)
            try:
                self._kill_now(pidfds)
                _wait_for_end(pidfds, deadline)
            finally:
                for pidfd in pidfds:
                    os.close(pidfd)
            if time.monotonic() > deadline:
                raise HostError(f"{len(self.pids())} processes of {self.path} do not die")
        if self._v2 is not None:
            # A process is not listed any more as soon as it begins to exit; it still holds files and mounts then.
            try:
                self._wait_for_event(self._v2, "populated 0", KILL_TIMEOUT)
            except OSError as error:
                if error.errno not in _ABSENT:  # somebody else killed them too, and has removed it
                    raise
        self.thaw()  # or whoever enters next would stand still

    def remove(self) -> None:
        """Remove the group from every hierarchy, and the parent where it was the last one. Idempotent; its processes
        must be gone. Raises HostError when the kernel still has it in use after a while."""
        for mount in self._layout.every_mount:
            group = self._below(mount)
            _poll_until(partial(_rmdir, group), REMOVE_TIMEOUT, f"{group} cannot be removed")
            with _parents:
                _rmdir(group.parent)

    def oom_kills(self) -> int:
        """How many processes the kernel killed for lack of memory since the group was made; 0 when it is gone."""
        v1 = self._v1("memory")
        if v1 is None and (self._v2 is None or "memory" not in self._layout.v2_controllers):
            return 0
        file = v1 / "memory.oom_control" if v1 is not None else self._v2_file("memory.events")
        try:
            return _read_keyed(file).get("oom_kill", 0)
        except OSError as error:
            if error.errno not in _ABSENT:
                raise
            return 0

    def memory_peak(self) -> int | None:
        """The most bytes that were in use at once; None where the kernel does not tell, or the group is gone."""
        v1 = self._v1("memory")
        try:
            file = v1 / "memory.max_usage_in_bytes" if v1 is not None else self._v2_file("memory.peak")
            return int(file.read_text())
        except (OSError, HostError):
            return None

    def usage(self) -> Usage:
        """Memory in use now and CPU time used so far, of all processes that were ever in it."""
        memory, cpu = self._v1("memory"), self._v1("cpuacct")
        used = memory / "memory.usage_in_bytes" if memory is not None else self._v2_file("memory.current")
        if cpu is not None:
            cpu_ns = int((cpu / "cpuacct.usage").read_text())
        else:
            cpu_ns = _read_keyed(self._v2_file("cpu.stat"))["usage_usec"] * 1000
        return Usage(int(used.read_text()), cpu_ns)

    def _below(self, mount: Path) -> Path:
        return mount / self._parent / self.name

    def _v1(self, controller: str) -> Path | None:
        mount = self._layout.v1.get(controller)
        return self._below(mount) if mount is not None else None

    def _v2_file(self, name: str) -> Path:
        if self._v2 is None:
            raise HostError(f"no cgroup v2 hierarchy, so no {name}")
        return self._v2 / name

    def _freezer(self) -> Path:
        return self._below(self._layout.v1["freezer"])

    def _write_v2(self, name: str, value: str, *, optional: bool = False) -> None:
        file = self._v2_file(name)
        if not optional or file.exists():
            file.write_text(value)

    def _set_cpu(self, cpus: int) -> None:
        v1 = self._v1("cpu")
        if v1 is not None:
            (v1 / "cpu.cfs_period_us").write_text(str(CPU_PERIOD_US))
            (v1 / "cpu.cfs_quota_us").write_text(str(cpus * CPU_PERIOD_US))
        else:
            self._write_v2("cpu.max", f"{cpus * CPU_PERIOD_US} {CPU_PERIOD_US}")

    def _set_pids(self, limit: int) -> None:
        v1 = self._v1("pids")
        (v1 / "pids.max" if v1 is not None else self._v2_file("pids.max")).write_text(str(limit))

    def _enable_v2_controllers(self, mount: Path) -> None:
        """Hand the controllers that live in v2 down to the group; a v2 group has none that its parent does not pass."""
        wanted = " ".join(f"+{name}" for name in sorted(self._layout.v2_controllers))
        if not wanted:
            return
        try:
            (mount / "cgroup.subtree_control").write_text(wanted)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            _move_processes_down(mount)
            (mount / "cgroup.subtree_control").write_text(wanted)
        parent = mount / self._parent
        parent.mkdir(exist_ok=True)
        (parent / "cgroup.subtree_control").write_text(wanted)

    def _request_freeze(self, frozen: bool) -> None:
        if self._v2 is not None:
            (self._v2 / "cgroup.freeze").write_text("1" if frozen else "0")
        else:
            (self._freezer() / "freezer.state").write_text("FROZEN" if frozen else "THAWED")

    def _kill_now(self, pidfds: Sequence[int]) -> None:
        if self._v2 is not None and (self._v2 / "cgroup.kill").exists():  # Linux 5.14
            (self._v2 / "cgroup.kill").write_text("1")
            return
        # Frozen, so that none can start another between our look and its end. A signal arrives with the thaw.
        self._request_freeze(True)
        try:
            for pidfd in pidfds:
                _send_kill(pidfd)
        finally:
            self._request_freeze(False)

    def _wait_for_event(self, group: Path, line: str, timeout: float) -> None:
        """Wait until cgroup.events holds the line; the kernel wakes pollers at each change."""
        deadline = time.monotonic() + timeout
        with open(group / "cgroup.events") as file:
            poll = select.poll()
            poll.register(file, select.POLLPRI)
            while line not in file.read().splitlines():
                if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                    raise HostError(f"{group} is not {line!r} after {timeout:g} s")
                file.seek(0)


def _entries(directory: Path) -> list[Path]:
    """Empty where there is none, which may become so at any moment: the last group takes its parent along."""
    try:
        return list(directory.iterdir())
    except OSError as error:
        if error.errno in _ABSENT:
            return []
        raise


def _make_group(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for group in (directory.parent, directory):
        for name in ("cpuset.cpus", "cpuset.mems"):  # in v1 nobody can join before these are set
            if (group / name).exists() and not (group / name).read_text().strip():
                (group / name).write_text((group.parent / name).read_text())


def _move_processes_down(mount: Path) -> None:
    """A v2 group that passes controllers on may hold no process itself. Only the real root is exempt; the root that a
    container sees is an ordinary group, so its processes go one level down, as container runtimes do when nested."""
    host = mount / "rundatsheesh-host"
    host.mkdir(exist_ok=True)
    for pid in (mount / "cgroup.procs").read_text().split():
        try:
            (host / "cgroup.procs").write_text(pid)
        except ProcessLookupError:
            continue  # ended meanwhile


def _open_members(pids: Sequence[int], list_pids: Callable[[], list[int]]) -> list[int]:
    """Descriptors of those processes. One that is still listed after it was opened is certainly a member: its number
    cannot have gone to a stranger."""
    opened: dict[int, int] = {}
    for pid in pids:
        try:
            opened[pid] = os.pidfd_open(pid)
        except ProcessLookupError:
            continue  # ended meanwhile
    members = set(list_pids())
    for pid in [pid for pid in opened if pid not in members]:
        os.close(opened.pop(pid))
    return list(opened.values())


def _wait_for_end(pidfds: Sequence[int], deadline: float) -> None:
    """Return when all have ended or time is up."""
    waiting = set(pidfds)
    poll = select.poll()
    for pidfd in waiting:
        poll.register(pidfd, select.POLLIN)
    while waiting and (left := deadline - time.monotonic()) > 0:
        for pidfd, _ in poll.poll(left * 1000):
            poll.unregister(pidfd)
            waiting.discard(pidfd)


def _send_kill(pidfd: int) -> None:
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        return


def _rmdir(directory: Path) -> bool:
    """Whether the directory is gone; False while something is in it."""
    try:
        directory.rmdir()
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno in (errno.EBUSY, errno.ENOTEMPTY):
            return False
        raise
    return True


def _poll_until(done: Callable[[], bool], timeout: float, complaint: str) -> None:
    """For what the kernel completes by itself within a moment and announces nowhere."""
    deadline = time.monotonic() + timeout
    interval = _POLL_INTERVAL
    while not done():
        if time.monotonic() > deadline:
            raise HostError(complaint)
        time.sleep(interval)
        interval = min(interval * 2, 0.02)


def _read_keyed(file: Path) -> dict[str, int]:
    """A file of "key number" lines."""
    return {key: int(value) for key, value in (line.split() for line in file.read_text().splitlines())}
