"""Kill every process below one, however it tried to get away."""

from __future__ import annotations

import os
from signal import SIGKILL, SIGSTOP

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# Processes stop faster than the stopped ones can fork; more rounds than this only happen when somebody outside the
# tree wakes them, and then killing in rounds must do.
_STOP_ROUNDS = 16


def sweep(root: int, spared: set[int], wait: Callable[[], bool]) -> None:
    """Return when `wait` says that nothing is left below `root` except `spared` processes and what is below those.

    `wait` reaps ended children, or blocks until one more has ended or some milliseconds have passed; it says whether
    somebody is left. A tree that forks is stopped first: stopped processes hold their places under RLIMIT_NPROC,
    killed ones would make room for new ones.
    """
    while True:
        stopped: set[int] = set()
        found = descendants(root, spared)
        for _ in range(_STOP_ROUNDS):
            new = found - stopped
            if not new:
                break
            _signal(new, SIGSTOP)
            stopped |= new
            found = descendants(root, spared)
        _signal(stopped | found, SIGKILL)
        if not wait():
            return


def descendants(root: int, spared: set[int]) -> set[int]:
    """All processes below `root`, zombies too, without `spared` and what is below those."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            parent = _parent(name)
            if parent is not None:
                children.setdefault(parent, []).append(int(name))
    found: set[int] = set()
    ahead = [root]
    while ahead:
        for pid in children.get(ahead.pop(), ()):
            if pid not in found and pid not in spared:
                found.add(pid)
                ahead.append(pid)
    return found


def _parent(pid: str) -> int | None:
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None  # it ended
    try:
        stat = os.read(fd, 512)
    except OSError:
        return None
    finally:
        os.close(fd)
    # pid (name) state parent ...; the name may itself hold spaces and parentheses.
    return int(stat[stat.rindex(b")") + 2 :].split(None, 2)[1])


def _signal(pids: set[int], number: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue  # it ended, which is what was wanted
