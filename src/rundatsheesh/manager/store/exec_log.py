"""The execution log's writer: calls are noted in memory and written in batches, off the path of the call."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from itertools import chain
from types import TracebackType

from rundatsheesh.manager.errors import StorageFull
from rundatsheesh.manager.model import Caller, CallType, ExecLogEntry, ExecLogPage, now
from rundatsheesh.manager.store.history import EXEC_LOG_PER_VM, History

log = logging.getLogger(__name__)

MAX_INPUT_CHARS = 8192  # of a command or code that is kept
MAX_PENDING = 4096  # calls noted but not yet written: at most 128 MiB of input, of four bytes a character
# An ended call waits this long for company: a transaction costs as much CPU as several calls, however few it notes.
GATHER_S = 1.0
# An open call is written after this long, so that one which the manager does not outlive is known as interrupted. One
# that ends sooner costs one row, not two writes.
OPEN_S = 0.1
MAX_KEPT = 1024  # calls whose begin, and as many whose end, waits for a full disk to have room again; the newest
PRUNE_EVERY = EXEC_LOG_PER_VM // 10  # calls of a VM between two prunings
MOST_COUNTED = 1024  # VMs whose calls since then are counted, before those that are gone are looked for


class ExecLog:
    """Enter to start the writer task; leaving writes what is pending.

    When the database fails, the batch is dropped and counted in the log: a call never fails because of its history.
    Where its disk is full, the batch waits for what is written next, as far as MAX_KEPT allows.
    """

    def __init__(self, history: History) -> None:
        self._history = history
        self._begun: dict[str, ExecLogEntry] = {}  # not yet written, by id, in order
        self._ended: dict[str, ExecLogEntry] = {}  # their begin is written already
        self._since_prune: Counter[str] = Counter()
        self._next_forgetting = MOST_COUNTED
        self._pending = asyncio.Event()
        self._closing = asyncio.Event()
        self._space = asyncio.Condition()
        self._flush_lock = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> ExecLog:
        self._task = asyncio.create_task(self._run(), name="exec-log")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._pending.set()
        if self._task is not None:
            await self._task
        await self.flush()

    async def started(self, vm_id: str, type_: CallType, input_: str, caller: Caller) -> ExecLogEntry:
        """Note that a call began; hand the entry to `finished`. Waits only while MAX_PENDING calls are unwritten."""
        async with self._space:
            await self._space.wait_for(lambda: len(self._begun) + len(self._ended) < MAX_PENDING)
        entry = ExecLogEntry(
            id="call-" + secrets.token_hex(8),
            vm_id=vm_id,
            type=type_,
            input=_storable(input_[:MAX_INPUT_CHARS]),
            input_truncated=len(input_) > MAX_INPUT_CHARS,
            exit_code=None,
            duration_ms=None,
            started_at=now(),
            finished_at=None,
            bytes_in=len(input_.encode(errors="replace")),
            bytes_out=0,
            timed_out=False,
            error=None,
            request_id=caller.request_id,
            who=caller.who,
        )
        self._begun[entry.id] = entry
        self._since_prune[vm_id] += 1
        self._pending.set()
        return entry

    def finished(
        self,
        entry: ExecLogEntry,
        *,
        duration_ms: int,
        exit_code: int | None = None,
        bytes_in: int | None = None,
        bytes_out: int = 0,
        timed_out: bool = False,
        error: str | None = None,
    ) -> None:
        """Note how the call ended; `error` is the code of the error it raised. Never waits."""
        ended = replace(
            entry,
            duration_ms=duration_ms,
            exit_code=exit_code,
            bytes_in=entry.bytes_in if bytes_in is None else bytes_in,
            bytes_out=bytes_out,
            timed_out=timed_out,
            error=error,
            finished_at=now(),
        )
        place = self._begun if entry.id in self._begun else self._ended
        place[entry.id] = ended
        self._pending.set()

    async def page(self, vm_id: str, *, limit: int, type_: CallType | None = None) -> ExecLogPage:
        """Newest first, everything noted so far included."""
        await self.flush()
        return await self._history.exec_log(vm_id, limit=limit, type_=type_)

    async def flush(self) -> None:
        """Write what is noted. Returns when it is in the database (or dropped)."""
        async with self._flush_lock:
            begun, ended = list(self._begun.values()), list(self._ended.values())
            self._begun, self._ended = {}, {}
            self._pending.clear()
            if begun or ended:
                await self._write(begun, ended)
        async with self._space:
            self._space.notify_all()

    async def _run(self) -> None:
        while not self._closing.is_set():
            await self._pending.wait()
            try:
                await asyncio.wait_for(self._closing.wait(), OPEN_S)
            except TimeoutError:
                if self._is_due():
                    await self.flush()

    def _is_due(self) -> bool:
        moment = now()
        noted = chain(self._begun.values(), self._ended.values())
        return any(moment - (entry.finished_at or entry.started_at) >= _patience(entry) for entry in noted)

    async def _write(self, begun: list[ExecLogEntry], ended: list[ExecLogEntry]) -> None:
        surplus = [vm_id for vm_id, count in self._since_prune.items() if count >= PRUNE_EVERY]
        try:
            if not await self._write_or_keep(begun, ended):
                return
            if surplus:
                await self._history.prune_calls(surplus)
            await self._forget_gone()
        except Exception:
            log.exception("execution log: %d entries could not be written", len(begun) + len(ended))
        for vm_id in surplus:
            del self._since_prune[vm_id]

    async def _forget_gone(self) -> None:
        """Of a VM that was deleted, no call comes any more that would take it off the list."""
        if len(self._since_prune) < self._next_forgetting:
            return
        present = await self._history.present(list(self._since_prune))
        for vm_id in self._since_prune.keys() - present:
            del self._since_prune[vm_id]
        self._next_forgetting = max(MOST_COUNTED, 2 * len(self._since_prune))

    async def _write_or_keep(self, begun: list[ExecLogEntry], ended: list[ExecLogEntry]) -> bool:
        try:
            await self._history.write_calls(begun, ended)
        except StorageFull:
            self._keep(begun, ended)
            return False
        return True

    def _keep(self, begun: list[ExecLogEntry], ended: list[ExecLogEntry]) -> None:
        """Put a batch back before what was noted meanwhile, the ends of its own calls among that."""
        self._begun = {entry.id: self._ended.pop(entry.id, entry) for entry in begun} | self._begun
        self._ended = {entry.id: entry for entry in ended} | self._ended
        dropped = 0
        for noted in (self._begun, self._ended):
            for id_ in list(noted)[: max(0, len(noted) - MAX_KEPT)]:
                del noted[id_]
                dropped += 1
        if dropped:
            log.warning("execution log: %d entries are lost, the disk is full", dropped)


def _patience(entry: ExecLogEntry) -> timedelta:
    return timedelta(seconds=OPEN_S if entry.finished_at is None else GATHER_S)


def _storable(text: str) -> str:
    """Text that every database accepts: no NUL (PostgreSQL), no lone surrogates."""
    return text.replace("\0", "\ufffd").encode(errors="replace").decode()
