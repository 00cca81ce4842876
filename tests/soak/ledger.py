"""What was acknowledged, by the clients' own books: which VMs exist, which are gone, which files have which content."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Machine:
    """A VM that the server has acknowledged. `files` maps a name beneath /workspace to its SHA-256; none of them is
    ever written again."""

    id: str
    engine: str
    files: dict[str, str] = field(default_factory=dict)


class Ledger:
    """Shared by all clients."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._alive: dict[str, Machine] = {}
        self._doomed: set[str] = set()  # its deletion was asked for, and not answered
        self._deleted: set[str] = set()
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []

    def count(self, what: str, number: int = 1) -> None:
        with self._lock:
            self.counts[what] += number

    def problem(self, what: str) -> None:
        with self._lock:
            self.problems.append(what)

    def created(self, machine: Machine) -> None:
        with self._lock:
            if machine.id in self._alive or machine.id in self._deleted:
                self.problems.append(f"{machine.id} was given out twice")
            self._alive[machine.id] = machine

    def wrote(self, machine: Machine, files: dict[str, str]) -> None:
        with self._lock:
            machine.files |= files
            self.counts["files acknowledged"] += len(files)

    def known_files(self, machine: Machine) -> dict[str, str]:
        with self._lock:
            return dict(machine.files)

    def compare(self, machine: Machine, expected: dict[str, str], found: dict[str, str], where: str) -> None:
        """Whether the content of files that were acknowledged before somebody looked is what they were."""
        wrong = [name for name, digest in expected.items() if found.get(name) != digest]
        with self._lock:
            self.counts["files verified"] += len(expected) - len(wrong)
            for name in wrong:
                fate = "is damaged" if name in found else "is lost"
                self.problems.append(f"{machine.id} ({machine.engine}): {name} {fate} ({where})")

    def doom(self, machine: Machine) -> None:
        with self._lock:
            del self._alive[machine.id]
            self._doomed.add(machine.id)

    def deleted(self, vm_id: str) -> None:
        with self._lock:
            self._doomed.discard(vm_id)
            self._deleted.add(vm_id)

    def alive(self) -> list[Machine]:
        with self._lock:
            return list(self._alive.values())

    def check_list(self, seen: set[str], *, complete: bool) -> None:
        """`seen` is what the server lists. What it has said is deleted must not be in it; where the list was asked for
        while nobody worked (`complete`), nothing may be in it that nobody was given."""
        with self._lock:
            back = seen & self._deleted
            self.problems += [f"{vm_id} was deleted and is back" for vm_id in back]
            if complete:
                lost = self._alive.keys() - seen
                unknown = seen - self._alive.keys() - self._doomed - back
                self.problems += [f"{vm_id} is lost" for vm_id in lost]
                self.problems += [f"{vm_id} is nobody's" for vm_id in unknown]

    def snapshot_of_deleted(self) -> set[str]:
        with self._lock:
            return set(self._deleted)
