"""Which cgroup hierarchies this host has, and which controller lives in which: v1, v2, or some of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rundatsheesh.manager.errors import HostError
from rundatsheesh.manager.host.mounts import Mounted, list_mounts

REQUIRED = ("cpu", "memory", "pids")
_V1_USED = (*REQUIRED, "cpuacct", "freezer", "name=systemd")


@dataclass(frozen=True, slots=True)
class Layout:
    """Where this host's cgroup hierarchies are mounted."""

    v1: Mapping[str, Path]  # controller, or "name=systemd" → mount point; only those that we use
    v2: Path | None
    v2_controllers: frozenset[str]
    every_v1: tuple[Path, ...] = ()  # mount points, those that we do not use too

    @property
    def missing(self) -> tuple[str, ...]:
        """What a VM needs and this host has nowhere."""
        names = [name for name in REQUIRED if name not in self.v1 and name not in self.v2_controllers]
        return (*names, *(["freezer"] if self.v2 is None and "freezer" not in self.v1 else []))

    def place_of(self, controller: str) -> str:
        """For humans: the hierarchy in which it is."""
        return f"v1 {self.v1[controller]}" if controller in self.v1 else f"v2 {self.v2}"

    @property
    def every_mount(self) -> tuple[Path, ...]:
        """All hierarchies, those that carry no limit of ours too."""
        mounts = [*self.every_v1, *self.v1.values(), *([self.v2] if self.v2 is not None else [])]
        return tuple(dict.fromkeys(mounts))


def find_layout() -> Layout:
    """This host's hierarchies. Raises HostError naming a controller that is nowhere."""
    layout = parse_layout(list_mounts(), lambda mount: (mount / "cgroup.controllers").read_text())
    if layout.missing:
        raise HostError(
            f"no cgroup controller for {', '.join(layout.missing)}",
            hint="mount the cgroup hierarchy writable and with these controllers; in a container, run it privileged",
        )
    return layout


def parse_layout(mounts: Sequence[Mounted], read_v2_controllers: Callable[[Path], str]) -> Layout:
    """The layout that a mount table describes. Of several mounts of one hierarchy the first counts."""
    v1: dict[str, Path] = {}
    every_v1: list[Path] = []
    v2: Path | None = None
    for mounted in mounts:
        if mounted.fstype == "cgroup":
            every_v1.append(mounted.target)
            for name in mounted.super_options.intersection(_V1_USED):
                v1.setdefault(name, mounted.target)
        elif mounted.fstype == "cgroup2" and v2 is None:
            v2 = mounted.target
    controllers = frozenset(read_v2_controllers(v2).split()) if v2 is not None else frozenset[str]()
    return Layout(v1, v2, controllers & set(REQUIRED), tuple(dict.fromkeys(every_v1)))
