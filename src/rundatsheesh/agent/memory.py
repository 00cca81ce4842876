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
from .job import USER

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


MIB = 1 << 20

# Used is what the host counts, too: anonymous memory and files in memory, which gVisor shows together as AnonPages.
# Programs mapped from files are left out: by the guest's own count of what is available, twenty interpreters at once
# leave nothing of a guest that holds them easily.
#
# From the first limit on, whoever holds a large part of all memory by himself is killed: this share, and nobody smaller
# than the constant. It is a little below what the guest is shown as its memory.
_RESERVE_SHARE = 64
_LEAST_RESERVE = 6 * MIB
_HOG_SHARE = 2
_LEAST_HOG = 128 * MIB
# From the second limit on, so far above the guest's memory, the largest are killed whatever they are. The host kills
# the guest as a whole at 192 MiB above, of which its kernel takes 25 to 45: the rest is the time until a kill helps.
_ALLOWANCE = 64 * MIB
# From there on, processes that were killed but have not returned their memory are not waited for.
_CRITICAL = _ALLOWANCE + 32 * MIB
# Bytes per second that nobody can use up faster: twice what the fastest of several programs reached.
_FASTEST = 2048 * MIB
_SHORTEST, _LONGEST = 0.002, 0.05  # seconds between two looks
# Seconds for which memory goes on being used up as fast as it is now, until a kill helps: several may be at it.
_RELIEF = 0.05
# Seconds from a process's end during which its memory counts as returned already, and for which it is remembered; and
# seconds that a process may take to end.
_PROMPT = 0.03
_RETURN = 0.3
_END = 1.0
_PATIENCE = 0.02  # between two kills when it is critical


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
        self.total = self._in_meminfo(b"MemTotal:")
        self._limit = self.total - max(_LEAST_RESERVE, self.total // _RESERVE_SHARE)
        self._hog = max(_LEAST_HOG, self.total // _HOG_SHARE)
        self._page = os.sysconf("SC_PAGE_SIZE")
        self._dying: dict[int, Dying] = {}
        self._last_kill = 0.0
        self._last_look = 0.0
        self._used = 0
        self._rate = 0.0  # bytes per second by which use grows

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
        used, now = self._in_meminfo(b"AnonPages:"), time.monotonic()
        grown = max(0.0, (used - self._used) / max(now - self._last_look, _SHORTEST))
        self._rate = (self._rate + grown) / 2
        self._used, self._last_look = used, now
        if used > self.total + _ALLOWANCE:
            self._relieve(used + int(self._rate * _RELIEF) - self.total - _ALLOWANCE, 1, now)
        elif used > self._limit:
            self._relieve(used - self._limit, self._hog, now)
        time.sleep(min(_LONGEST, max(_SHORTEST, (self._limit - used) / _FASTEST)))

    def _relieve(self, excess: int, least: int, now: float) -> None:
        """Kill the largest, none smaller than `least` bytes, as many as it takes to get `excess` bytes back."""
        returning = self._returning(now)
        is_critical = self._used > self.total + _CRITICAL
        if not (is_critical and now - self._last_kill > _PATIENCE):
            excess -= returning
        processes = sorted(self._user_processes(), reverse=True)
        if sum(size for size, _ in processes) < excess:
            # Files in memory, a memfd say, are in no process's size. The largest is taken for their owner at first.
            processes = [(excess, pid) for _, pid in processes[:1]]
        for size, pid in processes:
            if excess <= 0 or size < least:
                return
            if self._kill(pid):
                self._dying[pid] = Dying(size, now)
                self._last_kill = now
                excess -= size

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

    def _in_meminfo(self, name: bytes) -> int:
        """A line of /proc/meminfo, in bytes."""
        return _field(os.pread(self._meminfo, 2048, 0), name) * 1024


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
