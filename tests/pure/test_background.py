"""What works in the background goes on after a failure of any kind: nobody would start it again."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest

from rundatsheesh.manager import pool, reconcile
from rundatsheesh.manager.model import CreateVm, EgressPolicy, VmSpec
from rundatsheesh.manager.pool import Pool
from rundatsheesh.manager.reconcile import Reconciler
from rundatsheesh.manager.settings import Settings

SPEC = VmSpec(engine="gvisor", image_id="image", cpu=1, mem_mb=256, disk_mb=512, policy=EgressPolicy())


class DatabaseGoneError(Exception):
    """Nothing of ours."""


@dataclass
class FailingVms:
    """Warms up one VM, at the third attempt."""

    attempts: int = 0
    warm: asyncio.Event = field(default_factory=asyncio.Event)

    def plan(self, request: CreateVm) -> tuple[VmSpec, None]:
        return SPEC, None

    async def warm_up(self, shape: VmSpec) -> Any:
        self.attempts += 1
        if self.attempts < 3:
            raise DatabaseGoneError
        self.warm.set()
        await asyncio.sleep(3600)


async def test_the_pool_goes_on(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(pool, "RETRY", 0.0)
    monkeypatch.setattr(pool, "CALM", 0.0)
    vms = FailingVms()
    running = asyncio.create_task(Pool(Settings(warm_pool_target=1), vms).run())  # type: ignore[arg-type]
    await asyncio.wait_for(vms.warm.wait(), 10)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert caplog.text.count("the warm pool cannot be filled") == 2


async def test_the_reconciler_goes_on(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(reconcile, "INTERVAL", 0.0)
    rounds, third = 0, asyncio.Event()

    async def fail() -> None:
        nonlocal rounds
        rounds += 1
        if rounds == 3:
            third.set()
        raise DatabaseGoneError

    reconciler = object.__new__(Reconciler)
    reconciler._recovering = set()
    monkeypatch.setattr(reconciler, "round", fail)
    running = asyncio.create_task(reconciler.run())
    await asyncio.wait_for(third.wait(), 10)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert caplog.text.count("reconciling failed") >= 2
