"""Workers for file work: opened for exactly one disk, confined or ended, counted, and gone with their helper."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from rundatsheesh.manager.build import AGENT
from rundatsheesh.manager.disk import workspace
from rundatsheesh.manager.disk.worker import MOST, Worker, Workers, WorkPlace
from rundatsheesh.manager.errors import GuestError, HostError, InvalidInput, NotFound
from rundatsheesh.manager.guest import Guest, GuestGone

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")

TIMEOUT = 30.0

# A worker that has ended before the helper asks for its pidfd; afterwards no child is left to wait for.
QUICK_END = """
import os, sys
from agent import outside
ask = os.pidfd_open
def ask_late(pid):
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return ask(pid)
os.pidfd_open = ask_late
outside._work = lambda fds: os._exit(0)
outside._leave_reaping_to_the_kernel()
for _ in range(3):
    os.close(outside._fork_worker([]))
try:
    os.wait()
except ChildProcessError:
    print("none left")
"""


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[WorkPlace]:
    """A mounted workspace with one file; its groups are files that take whatever is written."""
    made = WorkPlace(tmp_path / "workspace.img", tmp_path / "workspace", [group(tmp_path / "group", "/dev/null")])
    await workspace.create(made.disk, 64)
    await workspace.mount(made.disk, made.mountpoint)
    (made.mountpoint / "file").write_text("content")
    yield made
    await workspace.unmount(made.mountpoint)


@pytest.fixture
async def workers() -> AsyncIterator[Workers]:
    opened = Workers(AGENT)
    yield opened
    await opened.close()


def group(directory: Path, procs: str) -> Path:
    directory.mkdir()
    (directory / "cgroup.procs").symlink_to(procs)
    return directory


async def guest_of(worker: Worker) -> Guest:
    return await Guest.connect(worker.stream, timeout=TIMEOUT)


async def has_ended(worker: Worker) -> None:
    async with asyncio.timeout(TIMEOUT):
        await worker._process.wait()


async def test_a_worker_answers_as_a_guest_does(workers: Workers, place: WorkPlace) -> None:
    for path, error in {"/workspace/none": NotFound, "/etc/passwd": InvalidInput, "/proc/self": InvalidInput}.items():
        worker = await workers.open(place)
        with pytest.raises(error):
            await (await guest_of(worker)).download(path)
        await worker.end()
    worker = await workers.open(place)
    download = await (await guest_of(worker)).download("/workspace")
    assert b"content" in b"".join([chunk async for chunk in download.chunks])
    await worker.end()
    await worker.end()


async def test_it_does_nothing_else(workers: Workers, place: WorkPlace) -> None:
    worker = await workers.open(place)
    guest = await guest_of(worker)
    with pytest.raises(GuestError):
        await guest.ping(TIMEOUT)
    await worker.end()


async def test_only_the_disk_that_belongs_there_is_worked_on(workers: Workers, place: WorkPlace) -> None:
    elsewhere = place.mountpoint.with_name("elsewhere")
    elsewhere.mkdir()
    for wrong in (
        replace(place, mountpoint=elsewhere),
        replace(place, mountpoint=place.mountpoint / "missing"),
        replace(place, disk=place.disk.with_name("other.img")),
        replace(place, groups=[elsewhere]),
    ):
        with pytest.raises(HostError):
            await workers.open(wrong)
    await (await workers.open(place)).end()


async def test_a_step_of_the_confinement_that_fails_ends_the_worker(workers: Workers, place: WorkPlace) -> None:
    """Nothing may be written to /dev/full, so it cannot join that group: it ends without a greeting."""
    full = group(place.disk.with_name("full"), "/dev/full")
    worker = await workers.open(replace(place, groups=[full]))
    with pytest.raises(GuestGone):
        await guest_of(worker)
    await has_ended(worker)
    await worker.end()
    await (await workers.open(place)).end()


def test_a_worker_that_ends_at_once_is_known_and_reaped() -> None:
    argv = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(AGENT.parent)!r})\n{QUICK_END}"]
    shown = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT)
    assert (shown.stdout, shown.stderr) == ("none left\n", "")


async def test_there_are_so_many_at_once(workers: Workers, place: WorkPlace) -> None:
    opened = [await workers.open(place) for _ in range(MOST)]
    with pytest.raises(HostError):
        await workers.open(place)
    await opened.pop().end()
    opened.append(await workers.open(place))
    for worker in opened:
        await worker.end()


async def test_the_helpers_end_is_everybodys(workers: Workers, place: WorkPlace) -> None:
    opened = [await workers.open(place) for _ in range(2)]
    await workers.close()
    for worker in opened:
        await has_ended(worker)
        await worker.end()
    await (await workers.open(place)).end()  # by a helper that is started for it


async def test_one_that_is_not_wanted_any_more_ends(workers: Workers, place: WorkPlace) -> None:
    """Whenever its opener is cancelled; the helper goes on for the others."""
    other = await workers.open(place)
    for delay in range(20):
        opening = asyncio.create_task(workers.open(place))
        await asyncio.sleep(delay * 0.0002)
        opening.cancel()
        for result in await asyncio.gather(opening, return_exceptions=True):
            if isinstance(result, Worker):
                await result.end()
    await guest_of(other)
    await other.end()


async def test_without_a_helper_there_is_a_plain_error(place: WorkPlace, tmp_path: Path) -> None:
    broken = Workers(tmp_path / "no-agent")
    with pytest.raises(HostError):
        await broken.open(place)
    await broken.close()
