"""A VM that runs: its machine, the channel to its agent, and when it may be frozen.

Frozen means: no call is open, and by the agent's word no process of the user lives. Such a guest has nothing to do, so
stopping its CPUs changes nothing that anybody could see.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from rundatsheesh.manager.disk.worker import WorkPlace
from rundatsheesh.manager.engines.base import Capability, Engine, Exit, Machine
from rundatsheesh.manager.errors import (
    EngineError,
    GuestDied,
    GuestError,
    GuestMisbehaved,
    GuestUnresponsive,
    RdsError,
)
from rundatsheesh.manager.guest import Guest, GuestGone
from rundatsheesh.manager.model import VmRecord

log = logging.getLogger(__name__)

FREEZE_AFTER = 0.25  # seconds without a call; a thaw costs a call 1.4 ms, so calls in a row should not pay it
CONNECT_TIMEOUT = 60.0  # for the agent's greeting; 0.1 s on an idle host, and many guests may boot at once
ADOPT_TIMEOUT = 30.0  # for a guest that has been running; on a busy host many are asked at once
END_TIMEOUT = 5.0  # for a machine to end after its channel did
PING_TIMEOUT = 5.0
KILL_GRACE = 0.0

OnEnd = Callable[["RunningVm", str], Awaitable[None]]  # the VM and the reason


class RunningVm:
    """Make it with `open`. `on_end` is called once if the guest ends without having been asked to. It may be cut off by
    `detach`, so what must not be runs in a task of its own."""

    def __init__(self, record: VmRecord, engine: Engine, machine: Machine, guest: Guest, on_end: OnEnd) -> None:
        self.record = record
        self.engine = engine
        self._machine = machine
        self._guest = guest
        self._on_end = on_end
        self._calls = 0
        self._processes: int | None = None  # None until the agent has told
        self._idle_from: float | None = None  # monotonic
        self._frozen = False
        self._temperature = asyncio.Lock()
        self._freeze_timer: asyncio.TimerHandle | None = None
        self._verdict: str | None = None  # why we ended it, where we did
        self._expected = False
        self.exit: Exit | None = None  # once the machine has ended
        self._concluded = asyncio.Event()
        self._exit: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._tasks = {asyncio.create_task(self._watch_machine())}
        self._watching = False
        self._plan_freeze()

    @classmethod
    async def open(cls, record: VmRecord, engine: Engine, machine: Machine, on_end: OnEnd, timeout: float) -> RunningVm:  # noqa: ASYNC109
        """Connect to the agent. Raises EngineError, which says why where the machine has ended, GuestGone,
        GuestUnresponsive or GuestMisbehaved; the machine is then as it was."""
        stream = await machine.connect()
        try:
            guest = await Guest.connect(stream, timeout=timeout, transfer_disk=machine.transfer_disk)
        except GuestGone as gone:
            raise await _why_gone(machine, gone) from gone
        return cls(record, engine, machine, guest, on_end)

    @property
    def guest(self) -> Guest:
        """For whoever knows the guest to be awake; calls use `call`."""
        return self._guest

    @property
    def workplace(self) -> WorkPlace | None:
        """Where files can be worked on without the guest, while it is awake."""
        return self._machine.workplace

    @property
    def has_ended(self) -> bool:
        return self._exit.done()

    @property
    def idle_seconds(self) -> float | None:
        """For how long no call has been open and no process of the user has lived. None while that is not so."""
        return None if self._idle_from is None else time.monotonic() - self._idle_from

    def touch(self) -> None:
        """Somebody is about to call: idleness counts from now."""
        if self._idle_from is not None:
            self._idle_from = time.monotonic()

    async def wait_concluded(self) -> None:
        """Return once whoever had to know of the guest's end has dealt with it, or holds the VM to do so."""
        await self._concluded.wait()

    @asynccontextmanager
    async def call(self) -> AsyncIterator[Guest]:
        """The guest, awake for as long as this is held. Raises GuestDied, with the output so far, where the VM dies."""
        self._calls += 1
        self._idle_from = None
        self._hold_freeze()
        try:
            async with self._temperature:
                if self._frozen:
                    await self._machine.thaw()
                    self._frozen = False
            yield self._guest
        except (GuestGone, GuestMisbehaved) as gone:
            raise await self._died(gone) from gone
        except GuestUnresponsive:
            await self._check_pulse()
            raise
        finally:
            self._calls -= 1
            self._note_idleness()
            self._plan_freeze()

    async def end(self, verdict: str, grace: float = KILL_GRACE) -> None:
        """End the guest because we want it; `verdict` is the reason that its open calls are told."""
        self._expected = True
        self._verdict = verdict
        await self._machine.stop(grace)
        await self.detach()

    async def shut_down(self, grace: float) -> None:
        """End the guest in good order: its processes are asked, its disk is flushed."""
        self._expected = True
        self._verdict = "stopped"
        async with self._temperature:
            self._hold_freeze()
            if self._frozen:
                await self._machine.thaw()
                self._frozen = False
            try:
                async with asyncio.timeout(grace):
                    await self._guest.shutdown()
            except (TimeoutError, GuestError) as error:
                log.warning("%s does not shut down by itself: %s", self.record.id, error)
        await self._machine.stop(grace)
        await self.detach()

    async def detach(self) -> None:
        """Let go of the guest without ending it: it runs on, awake, for the next manager. Idempotent."""
        self._expected = True
        self._hold_freeze()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._guest.close()
        if not self._exit.done():
            self._exit.set_result(self._verdict or "detached")
        self._concluded.set()

    async def _watch_machine(self) -> None:
        """Notice the first end, of the machine or of its channel, and tell."""
        machine = asyncio.ensure_future(self._machine.wait())
        channel = asyncio.ensure_future(self._guest.wait_closed())
        try:
            await asyncio.wait({machine, channel}, return_when=asyncio.FIRST_COMPLETED)
            if not machine.done():
                await asyncio.wait({machine}, timeout=END_TIMEOUT)
            if not machine.done() and not self._expected:
                self._verdict = self._verdict or _channel_verdict(channel.result())
                log.warning("%s: the channel ended (%s); ending the VM", self.record.id, channel.result())
                await self._machine.stop(KILL_GRACE)
            ended = await machine
        except (RdsError, OSError) as error:
            log.exception("%s: its end cannot be followed", self.record.id)
            ended = Exit("lost", None, str(error))
        finally:
            machine.cancel()
            channel.cancel()
        await self._conclude(ended)

    async def _conclude(self, ended: Exit) -> None:
        self.exit = ended
        reason = self._verdict or ended.reason
        if not self._exit.done():
            self._exit.set_result(reason)
        try:
            if not self._expected:
                log.warning("%s ended: %s (%s)", self.record.id, reason, ended.evidence[-500:] or ended.status)
                await self._on_end(self, reason)
        except (RdsError, OSError):
            log.exception("%s is not cleaned up; the reconciler will try again", self.record.id)
        finally:
            self._concluded.set()  # whoever waits for it looks at the record then

    async def _watch_processes(self) -> None:
        try:
            async for number in self._guest.processes():
                self._processes = number
                self._note_idleness()
                self._plan_freeze()
        except RdsError as error:
            # The channel's end is noticed by the other watch; anything else leaves the guest awake, which is safe.
            self._processes = None
            self._note_idleness()
            log.debug("%s: its processes are no longer known: %s", self.record.id, error)

    def _note_idleness(self) -> None:
        if self._calls or self._processes != 0:
            self._idle_from = None
        elif self._idle_from is None:
            self._idle_from = time.monotonic()

    def _hold_freeze(self) -> None:
        if self._freeze_timer is not None:
            self._freeze_timer.cancel()
            self._freeze_timer = None

    def _plan_freeze(self) -> None:
        self._hold_freeze()
        loop = asyncio.get_running_loop()
        if not self._watching and self._calls == 0:
            # Not before: a clone's CPU is busy with its first calls, and would be so for 20 ms longer.
            self._freeze_timer = loop.call_later(FREEZE_AFTER, self._start_watching)
        elif self._idle and Capability.FREEZE in self.engine.capabilities:
            self._freeze_timer = loop.call_later(FREEZE_AFTER, self._start_freeze)

    @property
    def _idle(self) -> bool:
        return self._calls == 0 and self._processes == 0 and not self._frozen and not self._expected

    def _start_watching(self) -> None:
        self._watching = True
        self._start(self._watch_processes())

    def _start_freeze(self) -> None:
        self._start(self._freeze())

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _freeze(self) -> None:
        async with self._temperature:
            if not self._idle or self._exit.done():
                return
            try:
                await self._machine.freeze()
                self._frozen = True
            except EngineError as error:
                log.warning("%s cannot be frozen: %s", self.record.id, error)

    async def _died(self, gone: GuestGone | GuestMisbehaved) -> GuestDied:
        try:
            async with asyncio.timeout(2 * END_TIMEOUT):
                reason = await asyncio.shield(self._exit)
        except TimeoutError:
            reason = "agent_failed"
        details: dict[str, object] = {"reason": reason}
        if isinstance(gone, GuestGone) and gone.partial is not None:
            details |= {"stdout": gone.partial.stdout, "stderr": gone.partial.stderr}
        return GuestDied(f"the VM ended during the call: {reason}", details=details)

    async def _check_pulse(self) -> None:
        """After a call without an answer: an agent that answers nothing else either has to go, and its VM with it."""
        try:
            await self._guest.ping(PING_TIMEOUT)
        except GuestUnresponsive:
            self._verdict = "agent_unresponsive"
            await self._guest.close()
        except GuestError as error:
            log.info("%s: %s", self.record.id, error)


async def _why_gone(machine: Machine, gone: GuestGone) -> RdsError:
    """What ended the machine, where it has ended; the channel's own error where it runs on."""
    try:
        async with asyncio.timeout(END_TIMEOUT):
            ended = await machine.wait()
    except TimeoutError:
        return gone
    status = "" if ended.status is None else f", exit status {ended.status}"
    log.warning("a machine ended before its agent answered: %s%s: %s", ended.reason, status, ended.evidence[-500:])
    return EngineError(
        f"the machine ended before its agent answered: {ended.reason}{status}", details={"log": ended.evidence}
    )


def _channel_verdict(error: RdsError | None) -> str:
    """The reason of a VM that we end because of its channel."""
    reasons = {GuestMisbehaved.code: "guest_misbehaved", GuestUnresponsive.code: "agent_unresponsive"}
    return reasons.get(error.code if error is not None else "", "agent_failed")
