"""Set-up: looking before acting, taking turns, choosing runsc, and the two scripts around it."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from rundatsheesh.manager.errors import HostError
from rundatsheesh.manager.host import tools
from rundatsheesh.manager.host.setup import Report, Step, locked, set_up
from server_support import promised

REPOSITORY = Path(__file__).parents[2]


class Recorder:
    """A display that keeps what it was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def begin(self, number: int, total: int, name: str) -> None:
        self.lines.append(f"{number}/{total} {name}")

    def doing(self, what: str) -> None:
        self.lines.append(f"doing {what}")

    def end(self, fact: str, seconds: float) -> None:
        self.lines.append(f"end {fact}")

    def failed(self, seconds: float) -> None:
        self.lines.append("failed")


def counting_step(name: str, runs: list[str]) -> Step:
    async def run(report: Report) -> str:
        report(f"making {name}")
        runs.append(name)
        return f"made {name}"

    return Step(name, lambda: f"{name} is there" if name in runs else None, run)


async def test_only_what_is_missing_is_done(tmp_path: Path) -> None:
    runs = ["a"]
    steps = [counting_step("a", runs), counting_step("b", runs)]
    display = Recorder()
    await set_up(steps, display, cache=tmp_path, earlier=2)
    assert runs == ["a", "b"]
    assert display.lines == ["3/4 a", "end a is there", "4/4 b", "doing making b", "end made b"]


async def test_a_failure_ends_the_set_up(tmp_path: Path) -> None:
    async def fails(_: Report) -> str:
        raise HostError("no")

    runs: list[str] = []
    display = Recorder()
    with pytest.raises(HostError):
        steps: Sequence[Step] = [Step("x", lambda: None, fails), counting_step("later", runs)]
        await set_up(steps, display, cache=tmp_path)
    assert display.lines == ["1/2 x", "failed"] and runs == []


async def test_two_set_ups_take_turns_and_the_second_finds_it_done(tmp_path: Path) -> None:
    runs: list[str] = []
    entered, release = asyncio.Event(), asyncio.Event()

    async def slow(report: Report) -> str:
        entered.set()
        await release.wait()
        runs.append("slow")
        return "made"

    step = Step("slow", lambda: "there" if runs else None, slow)
    displays = Recorder(), Recorder()
    first = asyncio.create_task(set_up([step], displays[0], cache=tmp_path))
    await entered.wait()
    waiting = asyncio.Event()
    displays[1].doing = lambda what: waiting.set()  # type: ignore[method-assign]
    second = asyncio.create_task(set_up([step], displays[1], cache=tmp_path))
    await waiting.wait()
    release.set()
    await asyncio.gather(first, second)
    assert runs == ["slow"] and displays[1].lines == ["1/1 slow", "end there"]


async def test_waiting_for_the_lock_can_be_cancelled(tmp_path: Path) -> None:
    waiting = asyncio.Event()

    async def wait_for_it() -> None:
        async with locked(tmp_path, lambda _: waiting.set()):
            raise AssertionError("two holders")

    async with locked(tmp_path, print):
        task = asyncio.create_task(wait_for_it())
        await waiting.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    async with asyncio.timeout(5), locked(tmp_path, print):
        return  # free again, although somebody gave up waiting


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("runsc version 0.0~20240729.0\nspec: 1.2.0\n", (20240729, 0)),
        ("runsc version release-20250101.3\n", (20250101, 3)),
        ("runsc version 0.0~20221219.0", (20221219, 0)),
        ("something else", (0, 0)),
    ],
)
def test_runsc_versions(text: str, version: tuple[int, int]) -> None:
    assert tools.parse_runsc_version(text) == version


def fake_runsc(path: Path, version: str) -> Path:
    path.write_text(f"#!/bin/sh\necho runsc version 0.0~{version}\n")
    path.chmod(0o755)
    return path


async def test_a_new_enough_runsc_of_the_host_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = fake_runsc(tmp_path / "host-runsc", "20250101.0")
    monkeypatch.setattr(tools, "find_tool", lambda name: own)
    cache = tmp_path / "cache"
    assert tools.find_runsc(cache) is None
    chosen = await tools.ensure_runsc(cache, {})
    assert chosen == tools.find_runsc(cache) == cache / "bin/runsc" and chosen.resolve() == own
    own.unlink()
    assert tools.find_runsc(cache) is None, "a link to nothing is no runsc"


async def test_an_old_runsc_of_the_host_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = fake_runsc(tmp_path / "host-runsc", "20221219.0")
    monkeypatch.setattr(tools, "find_tool", lambda name: own)

    async def extract(directory: Path, environment: object) -> Path:
        return fake_runsc(directory / "runsc-20240729.0", "20240729.0")

    monkeypatch.setattr(tools, "_extract_runsc", extract)
    chosen = await tools.ensure_runsc(tmp_path, {})
    assert chosen.readlink() == Path("runsc-20240729.0")


def test_missing_packages_are_named_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "find_tool", lambda name: None)
    monkeypatch.setattr(tools, "DEBIAN_KEYRING", tmp_path / "none")
    required, optional = tools.missing_packages(tmp_path)
    assert {"mmdebstrap", "nftables", "e2fsprogs", "debian-archive-keyring"} <= set(required)
    assert len(set(required)) == len(required) and "erofs-utils" in optional
    (tmp_path / tools.REFUSED_LIST).write_text("erofs-utils\n")
    assert "erofs-utils" not in tools.missing_packages(tmp_path)[1]


def test_a_finished_bootstrap_is_quick() -> None:
    started = time.monotonic()
    done = subprocess.run([REPOSITORY / "scripts/bootstrap.sh"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[1/") and "\n[2/" in done.stdout
    if "all present" in done.stdout:
        assert time.monotonic() - started < promised(2)


def test_sigterm_to_make_ends_what_it_runs(tmp_path: Path) -> None:
    """The recipes' last process is the server's own: make passes SIGTERM to it and waits."""
    (tmp_path / "Makefile").write_text(
        f'serve:\n\t@true && exec {REPOSITORY}/scripts/as-root.sh sh -c \'trap "echo ended; exit 0" TERM; '
        "echo ready; while read -r line; do :; done'\n"
    )
    running = subprocess.Popen(
        ["make", "-C", tmp_path, "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert running.stdout is not None and running.stdin is not None
    while running.stdout.readline() != "ready\n":
        assert running.poll() is None
    running.send_signal(signal.SIGTERM)
    # Before its input is closed, which would end it as well.
    readable, _, _ = select.select([running.stdout], [], [], 10)
    assert readable and running.stdout.readline() == "ended\n"
    running.communicate(timeout=10)
