"""Memory exhaustion ends processes of the user, not the guest, on an engine whose kernel has no such mercy.

gVisor has no OOM killer: a sandbox that outgrows its limit on the host is killed whole. So somebody watches how much
memory is left while there are user processes, and kills whichever of them holds most of it before nothing is. Sleeps
without a timer while there are none, for such a guest may be frozen.
"""

from __future__ import annotations

import os
import signal
import threading
import time

from .console import report

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from .spawner import Spawner

    class Guard(Protocol):
        """Who ends processes of the user when memory is used up."""

        total: int  # bytes of memory

        @property
        def kills(self) -> int:
            """How many were ended so far."""


USER = 1000
MIB = 1 << 20

# Below this much, somebody is killed: this share of all memory, but not less than the constant. The host's limit is
# 128 MiB above what the guest is shown, so there is time until it strikes, and nobody is killed on a forecast: twenty
# interpreters that start at once use memory up faster than any hog, and stop.
_RESERVE_SHARE = 64
_LEAST_RESERVE = 6 * MIB
# Only who holds this share of all memory by himself is killed, and nobody smaller than the constant. What the guest is
# shown as used includes programs mapped from files, which the host does not count: twenty interpreters at once leave
# nothing by the guest's count and fit by the host's. Several that are too large together are left to the host's limit.
_HOG_SHARE = 2
_LEAST_HOG = 128 * MIB
_CRITICAL = 4 * MIB
# Bytes per second that nobody can use up faster: twice what the fastest of several programs reached.
_FASTEST = 2048 * MIB
_SHORTEST, _LONGEST = 0.002, 0.05  # seconds between two looks
# Seconds for which memory goes on being used up as fast as it is now, until a kill helps: several may be at it.
_RELIEF = 0.15
# Seconds from a process's end during which its memory counts as returned already, and for which it is remembered; and
# seconds that a process may take to end.
_PROMPT = 0.03
_RETURN = 0.3
_END = 1.0
_PATIENCE = 0.02  # between two kills while next to nothing is left


class KernelsGuard:
    """Counts the kills of a kernel that has an OOM killer. It is told whom to prefer, see limits.py."""

    def __init__(self) -> None:
        self._vmstat = os.open("/proc/vmstat", os.O_RDONLY | os.O_CLOEXEC)
        with open("/proc/meminfo", "rb") as file:
            self.total = _field(file.read(), b"MemTotal:") * 1024

    @property
    def kills(self) -> int:
        return _field(os.pread(self._vmstat, 1 << 16, 0), b"\noom_kill ")

    def start(self) -> None:
        """It is always at work."""

    def wake(self) -> None:
        """It never sleeps."""


class MemoryGuard:
    """Watches from a thread of its own. `kills` counts; a call that ended by SIGKILL learns from it who did that."""

    def __init__(self, spawner: Spawner) -> None:
        self.kills = 0
        self._spawner = spawner
        self._wanted = threading.Event()
        self._meminfo = os.open("/proc/meminfo", os.O_RDONLY | os.O_CLOEXEC)
        self.total = self._read(b"MemTotal:")
        self._reserve = max(_LEAST_RESERVE, self.total // _RESERVE_SHARE)
        self._hog = max(_LEAST_HOG, self.total // _HOG_SHARE)
        self._page = os.sysconf("SC_PAGE_SIZE")
        self._dying: dict[int, Dying] = {}
        self._last_kill = 0.0
        self._last_look = 0.0
        self._available = self.total
        self._rate = 0.0  # bytes per second by which memory shrinks
        self._shortfall = 0  # bytes, doubled while kills do not help: with nothing left there is no rate to see

    def start(self) -> None:
        threading.Thread(target=self._run, name="memory guard", daemon=True).start()

    def wake(self) -> None:
        """There may be user processes now. Any thread."""
        self._wanted.set()

    def _run(self) -> None:
        while True:
            if self._spawner.live == 0:
                self._wanted.clear()
                if self._spawner.live == 0:
                    self._wanted.wait()
            try:
                self._look()
            except Exception as error:
                report(error)  # and watch on: it is all that keeps the guest alive

    def _look(self) -> None:
        available = self._read(b"MemAvailable:")
        now = time.monotonic()
        shrunk = max(0.0, (self._available - available) / max(now - self._last_look, _SHORTEST))
        self._rate = (self._rate + shrunk) / 2
        self._available, self._last_look = available, now
        if available < self._reserve:
            self._relieve(available, now)
        spare = max(0, available - self._reserve)
        time.sleep(min(_LONGEST, max(_SHORTEST, spare / _FASTEST)))

    def _relieve(self, available: int, now: float) -> None:
        """Kill the largest, as many as it takes for their memory to be enough."""
        critical = available < _CRITICAL
        returning = self._returning(now)
        lost = critical and now - self._last_kill > _PATIENCE  # it does not come back in time
        self._shortfall = min(self.total, max(self._reserve, 2 * self._shortfall)) if lost else 0
        left = available - self._rate * _RELIEF - self._shortfall + (0 if lost else returning)
        if left >= self._reserve:
            return
        for size, pid in sorted(self._user_processes(), reverse=True):
            if left >= self._reserve or size < self._hog:
                return
            if self._kill(pid):
                self._dying[pid] = Dying(size, now)
                self._last_kill = now
                left += size

    def _kill(self, pid: int) -> bool:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        self.kills += 1
        return True

    def _returning(self, now: float) -> int:
        """Bytes that those who were killed still hold, or that have not been counted as free yet."""
        for pid, dying in list(self._dying.items()):
            if now - dying.killed < _END and self._size(str(pid)):
                dying.seen = now
            elif now - dying.seen > _RETURN:
                del self._dying[pid]
        return sum(dying.size for dying in self._dying.values() if now - dying.seen <= _PROMPT)

    def _user_processes(self) -> list[tuple[int, int]]:
        """(bytes in memory, pid) of those that live and were not killed yet."""
        names = [name for name in os.listdir("/proc") if name.isdecimal() and int(name) not in self._dying]
        found = [(self._size(name), int(name)) for name in names if self._is_users(name)]
        return [(size, pid) for size, pid in found if size]

    def _is_users(self, pid: str) -> bool:
        try:
            return os.stat(f"/proc/{pid}").st_uid == USER
        except OSError:
            return False  # it ended

    def _size(self, pid: str) -> int:
        """Bytes in memory; 0 of a process that has ended."""
        try:
            fd = os.open(f"/proc/{pid}/statm", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return 0
        try:
            return int(os.read(fd, 256).split()[1]) * self._page
        except (OSError, IndexError):
            return 0
        finally:
            os.close(fd)

    def _read(self, name: bytes) -> int:
        """A line of /proc/meminfo, in bytes."""
        return _field(os.pread(self._meminfo, 512, 0), name) * 1024


class Dying:
    __slots__ = ("killed", "seen", "size")

    def __init__(self, size: int, killed: float) -> None:
        self.size = size
        self.killed = killed
        self.seen = killed  # when it last held memory


def _field(text: bytes, name: bytes) -> int:
    """The number after the name, in a file of /proc."""
    at = text.index(name) + len(name)
    return int(text[at : text.index(b"\n", at)].split()[0])
