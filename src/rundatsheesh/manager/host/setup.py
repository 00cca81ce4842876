"""Setting a host up: a list of steps, each of which looks first, does only what is missing, and may be interrupted.

The steps themselves come from whoever sees all parts; this module has the order, the lock and the two that need nothing
but the host.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rundatsheesh.manager.errors import HostError
from rundatsheesh.manager.host import process, tools

LOCK_TIMEOUT = 3600.0  # seconds: another set-up builds an image meanwhile

Report = Callable[[str], None]  # told what is being done now, a few words


@dataclass(frozen=True, slots=True)
class Step:
    name: str
    look: Callable[[], str | None]  # the fact when there is nothing to do; cheap, without side effects
    run: Callable[[Report], Awaitable[str]]  # does it and returns the new fact
    alone: bool = True  # changes the host: only as root, and no other set-up at the same time


class Display(Protocol):
    """Where a set-up shows its progress. Called in order: begin, doing any number of times, then end or failed."""

    def begin(self, number: int, total: int, name: str) -> None: ...
    def doing(self, what: str) -> None: ...
    def end(self, fact: str, seconds: float) -> None: ...
    def failed(self, seconds: float) -> None: ...


async def set_up(steps: Sequence[Step], display: Display, *, cache: Path, earlier: int = 0) -> None:
    """Do all steps in order; stops at the first that fails, with its error. `earlier` steps were shown by others.

    Two set-ups of one host take turns: the second finds everything done.
    """
    total = earlier + len(steps)
    for number, step in enumerate(steps, earlier + 1):
        started = time.monotonic()
        display.begin(number, total, step.name)
        try:
            fact = step.look() or await _do(step, display.doing, cache)
        except BaseException:
            display.failed(time.monotonic() - started)
            raise
        display.end(fact, time.monotonic() - started)


def host_steps(cache: Path, environment: Mapping[str, str]) -> tuple[Step, ...]:
    """Debian packages and gVisor. `environment` is for the package tools: proxies and certificates."""
    return (
        Step("Debian packages", lambda: _look_at_packages(cache), lambda report: _packages(cache, environment, report)),
        Step("gVisor", lambda: _look_at_runsc(cache), lambda report: _runsc(cache, environment, report)),
    )


@asynccontextmanager
async def locked(cache: Path, report: Report) -> AsyncIterator[None]:
    """Hold the cache against every other set-up on this host; the kernel lets go of it however we end."""
    path = cache / "set-up.lock"
    await asyncio.to_thread(lambda: cache.mkdir(parents=True, exist_ok=True))
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        # flock(1) locks the open file that it shares with us, and so for us: unlike flock(2) it can be cancelled.
        attempt = await process.run(["flock", "-n", str(descriptor)], timeout=10, check=False, pass_fds=[descriptor])
        if attempt.returncode != 0:
            report("waiting for another set-up on this host")
            await process.run(["flock", str(descriptor)], timeout=LOCK_TIMEOUT, pass_fds=[descriptor])
        yield
    finally:
        os.close(descriptor)


async def _do(step: Step, report: Report, cache: Path) -> str:
    if not step.alone:
        return await step.run(report)
    if os.geteuid() != 0:
        raise HostError(f"{step.name}: only root can set this up", hint="run it with sudo")
    async with locked(cache, report):
        return step.look() or await step.run(report)


def _look_at_packages(cache: Path) -> str | None:
    required, optional = tools.missing_packages(cache)
    return None if required or optional else "all present"


async def _packages(cache: Path, environment: Mapping[str, str], report: Report) -> str:
    required, optional = tools.missing_packages(cache)
    report(f"apt-get install {' '.join([*required, *optional])}")
    installed = await tools.install_packages(cache, environment)
    return f"installed {' '.join(installed)}" if installed else "all that this distribution has"


def _look_at_runsc(cache: Path) -> str | None:
    found = tools.find_runsc(cache)
    return None if found is None else found.resolve().name


async def _runsc(cache: Path, environment: Mapping[str, str], report: Report) -> str:
    report(f"runsc from Debian {tools.RUNSC_SUITE}")
    return (await tools.ensure_runsc(cache, environment)).resolve().name
