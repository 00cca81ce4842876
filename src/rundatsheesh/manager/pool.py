"""Warm VMs: started ahead of demand, frozen, and given away by a compare-and-set.

A warm VM is a record in state WARM that nobody sees, booted like any other and closed to all networks. A claim gives it
the caller's policy, name and labels; from then on nothing tells it from a cold one. The pool follows demand: it holds
VMs of the shape that was asked for last. An empty pool costs a caller nothing but the boot it would have paid anyway.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from dataclasses import replace

from rundatsheesh.manager.errors import LimitReached, RdsError
from rundatsheesh.manager.model import Caller, CreateVm, EgressPolicy, Lifetime, VmRecord, VmSpec
from rundatsheesh.manager.settings import Settings
from rundatsheesh.manager.vms import Vms

log = logging.getLogger(__name__)

CALM = 0.5  # seconds without a create before the pool is filled again: refilling must not slow the calls that follow
RETRY = 30.0  # seconds after a failure
FIRST_SHAPE = CreateVm(cpu=1, mem_mb=256)


class Pool:
    """`run` fills it until cancelled; `create` takes from it, or boots; `drain` empties it for good."""

    def __init__(self, settings: Settings, vms: Vms) -> None:
        self._vms = vms
        self._target = min(settings.warm_pool_target, settings.warm_pool_max_vms) if settings.enable_warm_pool else 0
        self._most = settings.warm_pool_max_vms
        self._warm: deque[VmRecord] = deque()  # oldest first
        self._shape: VmSpec | None = None
        self._creating = 0
        self._demand = asyncio.Event()

    async def create(self, request: CreateVm, caller: Caller) -> VmRecord:
        """As `Vms.create`, from the pool where it has the shape."""
        spec, _ = self._vms.plan(request)
        self._shape = _shape_of(spec)
        self._creating += 1
        try:
            return await self._claim(spec, caller) or await self._vms.create(request, caller)
        finally:
            self._creating -= 1
            self._demand.set()

    async def run(self) -> None:
        """Keep the target number of VMs of the wanted shape warm, one boot at a time."""
        if not self._target:
            return
        await self._choose_first_shape()
        while True:
            self._demand.clear()
            try:
                filled = await self._fill()
            except RdsError as error:
                log.warning("the warm pool cannot be filled: %s", error)
                await self._wait(RETRY)
                continue
            except Exception:  # whatever the database or the host may think of: the pool has to go on
                log.exception("the warm pool cannot be filled")
                await self._wait(RETRY)
                continue
            if filled:
                await self._demand.wait()
            await self._wait_for_calm()

    async def drain(self) -> None:
        """Release every warm VM. Call it when `run` has ended."""
        while self._warm:
            await self._vms.discard(self._warm.popleft())

    async def _claim(self, spec: VmSpec, caller: Caller) -> VmRecord | None:
        shape = _shape_of(spec)
        while (record := self._take(shape)) is not None:
            try:
                claimed = await self._vms.claim(record.id, spec, caller)
            except LimitReached:
                self._warm.appendleft(record)
                raise
            if claimed is not None:
                return claimed
        return None

    def _take(self, shape: VmSpec) -> VmRecord | None:
        """Out of the pool before anybody waits for anything, so that no two callers get the same."""
        found = next((record for record in self._warm if _shape_of(record.spec) == shape), None)
        if found is not None:
            self._warm.remove(found)
        return found

    async def _fill(self) -> bool:
        """Boot one if one is missing. Returns whether none is missing any more."""
        shape = self._shape
        if shape is None:
            return True
        self._forget_ended()
        ready = sum(_shape_of(record.spec) == shape for record in self._warm)
        if ready >= self._target:
            return True
        while len(self._warm) >= self._most:
            await self._vms.discard(self._warm.popleft())
        self._warm.append(await self._vms.warm_up(shape))
        return ready + 1 >= self._target

    def _forget_ended(self) -> None:
        self._warm = deque(record for record in self._warm if self._vms.running(record.id) is not None)

    async def _choose_first_shape(self) -> None:
        if self._shape is None:
            try:
                self._shape = _shape_of(self._vms.plan(FIRST_SHAPE)[0])
            except RdsError as error:
                log.warning("nothing can be kept warm yet: %s", error)

    async def _wait_for_calm(self) -> None:
        while True:
            self._demand.clear()
            if not await self._wait(CALM) and not self._creating:
                return

    async def _wait(self, seconds: float) -> bool:
        """Whether a create ended within this time."""
        try:
            async with asyncio.timeout(seconds):
                await self._demand.wait()
            return True
        except TimeoutError:
            return False


def _shape_of(spec: VmSpec) -> VmSpec:
    """What must be decided at boot; everything else is given at the claim."""
    return replace(spec, policy=EgressPolicy(), name=None, labels={}, lifetime=Lifetime())
