"""Real cgroups, in the layout of this host and, where it has both, with v1 alone too."""

from __future__ import annotations

import dataclasses
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from rundatsheesh.manager.errors import HostError
from rundatsheesh.manager.host.cgroup_layout import Layout, find_layout
from rundatsheesh.manager.host.cgroups import MIB, Cgroup, Cgroups, Limits

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="cgroups need root")

Launch = Callable[[Cgroup, list[str]], subprocess.Popen[bytes]]
LIMITS = Limits(cpu=1, memory_bytes=64 * MIB, pids=32)
SPIN = [sys.executable, "-c", "while True: pass"]
FORKING = [
    sys.executable,
    "-c",
    "import os\nwhile True:\n  pid = os.fork()\n  if pid == 0: os._exit(0)\n  os.waitpid(pid, 0)",
]
FORK_TO_THE_LIMIT = """
import os, signal
children = 0
try:
    while True:
        if os.fork() == 0:
            signal.pause()
        children += 1
except OSError:
    print(children, flush=True)
    signal.pause()
"""


def layouts() -> list[Layout]:
    if os.geteuid() != 0:
        return []
    here = find_layout()
    v1_alone = dataclasses.replace(here, v2=None, v2_controllers=frozenset())
    return [here, *([v1_alone] if here.v2 is not None and not v1_alone.missing else [])]


@pytest.fixture(params=layouts(), ids=lambda layout: "v1" if layout.v2 is None else "v2" if not layout.v1 else "both")
def groups(request: pytest.FixtureRequest) -> Iterator[Cgroups]:
    parent = f"rundatsheesh-test-{secrets.token_hex(4)}"
    groups = Cgroups(request.param, parent)
    yield groups
    for name in groups.list_names():
        groups.group(name).kill()
        groups.group(name).remove()
    assert [str(mount) for mount in find_layout().every_mount if (mount / parent).exists()] == []


@pytest.fixture
def group(groups: Cgroups) -> Cgroup:
    group = groups.group("vm-1")
    group.create(LIMITS)
    return group


@pytest.fixture
def launch(groups: Cgroups) -> Iterator[Launch]:
    with ExitStack() as children:

        def launch(group: Cgroup, argv: list[str]) -> subprocess.Popen[bytes]:
            child = subprocess.Popen(group.entering(argv), start_new_session=True, stdout=subprocess.PIPE)
            children.push(child)
            children.callback(child.kill)
            return child

        yield launch


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.002)


def is_inhabited(group: Cgroup) -> bool:
    return bool(group.pids())


def is_frozen(group: Cgroup) -> bool:
    """Whether freezing was asked for."""
    files = (directory / name for name in ("cgroup.freeze", "freezer.state") for directory in group.directories())
    return next(file for file in files if file.exists()).read_text().strip() not in ("0", "THAWED")


def test_a_process_is_born_inside(group: Cgroup, launch: Launch) -> None:
    child = launch(group, ["cat", "/proc/self/cgroup"])
    assert child.stdout is not None
    lines = child.stdout.read().decode().splitlines()
    assert sum(line.endswith(group.path) for line in lines) >= 1
    for line in lines:
        controllers = line.split(":")[1]
        if {"cpu", "memory", "pids", "freezer"} & set(controllers.split(",")):
            assert line.endswith(group.path), line


def test_freezing_stops_all_cpu_use_and_thawing_resumes_it(group: Cgroup, launch: Launch) -> None:
    launch(group, SPIN)
    until(lambda: group.usage().cpu_ns > 50_000_000)
    group.freeze()
    assert is_frozen(group)
    used = group.usage().cpu_ns
    time.sleep(0.2)
    assert group.usage().cpu_ns == used
    group.freeze()
    group.thaw()
    group.thaw()
    assert not is_frozen(group)
    used = group.usage().cpu_ns
    until(lambda: group.usage().cpu_ns > used)


def test_killing_leaves_no_process_frozen_or_not_forking_or_not(group: Cgroup, launch: Launch) -> None:
    for argv, frozen in ((SPIN, False), (SPIN, True), (FORKING, False), (FORKING, True)):
        launch(group, argv)
        until(lambda: group.usage().cpu_ns > 0 and bool(group.pids()))
        if frozen:
            group.freeze()
        group.kill()
        assert group.pids() == []
        assert not is_frozen(group)
    group.kill()


def test_killing_what_somebody_removes_is_fine(group: Cgroup, launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where two end a VM at once."""

    def removed_meanwhile(directory: Path, line: str, timeout: float) -> None:
        with open(directory / "cgroup.events") as events:
            group.remove()
            events.read()

    monkeypatch.setattr(group, "_wait_for_event", removed_meanwhile)
    launch(group, SPIN)
    until(partial(is_inhabited, group))
    group.kill()
    assert group.pids() == []


def test_killing_touches_nobody_else(groups: Cgroups, launch: Launch) -> None:
    first, second = groups.group("vm-1"), groups.group("vm-2")
    for each in (first, second):
        each.create(LIMITS)
        launch(each, SPIN)
        until(partial(is_inhabited, each))
    survivors = second.pids()
    first.kill()
    assert second.pids() == survivors


def test_removing_undoes_everything_as_often_as_wanted(groups: Cgroups) -> None:
    first, second = groups.group("vm-1"), groups.group("vm-2")
    first.create(LIMITS)
    second.create(LIMITS)
    assert groups.list_names() == {"vm-1", "vm-2"}
    first.remove()
    first.remove()
    assert groups.list_names() == {"vm-2"}
    assert not first.exists()
    assert first.pids() == []
    first.kill()
    first.thaw()
    assert first.oom_kills() == 0
    second.remove()
    assert groups.list_names() == set()


def test_a_group_in_use_is_not_removed_silently(group: Cgroup, monkeypatch: pytest.MonkeyPatch, launch: Launch) -> None:
    monkeypatch.setattr("rundatsheesh.manager.host.cgroups.REMOVE_TIMEOUT", 0.05)
    launch(group, SPIN)
    until(lambda: bool(group.pids()))
    with pytest.raises(HostError, match="cannot be removed"):
        group.remove()
    group.kill()


def test_creating_again_sets_the_limits_anew(group: Cgroup) -> None:
    group.create(dataclasses.replace(LIMITS, memory_bytes=128 * MIB))
    group.create(dataclasses.replace(LIMITS, memory_bytes=32 * MIB))


def test_too_much_memory_ends_the_process_and_is_counted(group: Cgroup, launch: Launch) -> None:
    child = launch(group, [sys.executable, "-c", "x = b'x' * (256 << 20); print('survived')"])
    assert child.stdout is not None
    assert child.stdout.read() == b""
    assert child.wait() == -9
    assert group.oom_kills() >= 1  # v2 kills, and counts, the group as a whole too
    group.set_memory(512 * MIB)
    child = launch(group, [sys.executable, "-c", "x = b'x' * (256 << 20); print('survived')"])
    assert child.stdout is not None
    assert child.stdout.read() == b"survived\n"


def test_cpu_time_is_bounded(group: Cgroup, launch: Launch) -> None:
    for _ in range(3):
        launch(group, SPIN)
    until(lambda: len(group.pids()) == 3)
    used, begun = group.usage().cpu_ns, time.monotonic_ns()
    time.sleep(1)
    used = group.usage().cpu_ns - used
    assert used < 1.3 * (time.monotonic_ns() - begun)  # a second may be a long one on a busy host


def test_the_number_of_processes_is_bounded(group: Cgroup, launch: Launch) -> None:
    child = launch(group, [sys.executable, "-c", FORK_TO_THE_LIMIT])
    assert child.stdout is not None
    assert int(child.stdout.readline()) == LIMITS.pids - 1
    assert len(group.pids()) == LIMITS.pids
    group.kill()


def test_groups_come_and_go_at_the_same_time(groups: Cgroups) -> None:
    """The parent goes with its last group and comes back with the next, whoever is quicker."""

    def come_and_go(number: int) -> None:
        for _ in range(20):
            group = groups.group(f"vm-{number}")
            group.create(LIMITS)
            subprocess.run(group.entering(["true"]), check=True)
            group.remove()

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(come_and_go, number) for number in range(4)]:
            done.result()
    assert groups.list_names() == set()


def test_groups_are_listed_while_the_last_one_comes_and_goes(groups: Cgroups) -> None:
    """With it goes the parent, at any moment of the look."""
    done = threading.Event()

    def come_and_go() -> None:
        for _ in range(100):
            groups.group("fleeting").create(LIMITS)
            groups.group("fleeting").remove()
        done.set()

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(come_and_go)
        seen = 0
        while not (done.is_set() or coming.done()):
            seen += len(groups.list_names())
            assert groups.group("fleeting").pids() == []
        coming.result()
    assert seen > 0


def test_every_hierarchy_can_be_joined(group: Cgroup, launch: Launch) -> None:
    child = launch(group, SPIN)
    for mount in find_layout().every_mount:
        if mount.joinpath(group.path.lstrip("/")).is_dir():
            (mount / group.path.lstrip("/") / "cgroup.procs").write_text(str(child.pid))
