"""What happened: the calls into each VM, and the activity that outlives the VMs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import Row, bindparam, delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from rundatsheesh.manager.model import ActivityEntry, Caller, CallType, ExecLogEntry, ExecLogPage, now
from rundatsheesh.manager.store import schema
from rundatsheesh.manager.store.database import Database, finish

EXEC_LOG_PER_VM = 1000  # newest kept
ACTIVITY_KEPT = 10_000  # newest kept
INTERRUPTED = "interrupted"
_ROW_COLUMNS = tuple(column.name for column in schema.exec_log.c if column.name != "seq")
_FINISH_COLUMNS = ("exit_code", "duration_ms", "finished_at", "bytes_in", "bytes_out", "timed_out", "error")
# One statement for any number of calls, built once: building a statement costs more than the database takes for it.
_FINISH = (
    update(schema.exec_log)
    .where(schema.exec_log.c.id == bindparam("ended_id"))
    .values({name: bindparam(f"new_{name}") for name in _FINISH_COLUMNS})
)


class History:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def record_activity(
        self, kind: str, *, caller: Caller, vm_id: str | None = None, reason: str | None = None
    ) -> None:
        """`kind` is a stable word: `vm.start`, `vm.stop`, `vm.destroy`, `vm.died`; `Store.reserve` adds `vm.create`."""
        values = {
            "at": now(),
            "kind": kind,
            "vm_id": vm_id,
            "reason": reason,
            "who": caller.who,
            "request_id": caller.request_id,
        }
        await self._database.insist(lambda: self._record_activity(values))

    async def _record_activity(self, values: dict[str, Any]) -> None:
        table = schema.activity
        async with self._database.write() as db:
            new = await db.scalar(insert(table).values(values).returning(table.c.id))
            await db.execute(delete(table).where(table.c.id <= (new or 0) - ACTIVITY_KEPT))

    async def activity(self, limit: int) -> list[ActivityEntry]:
        """Newest first."""
        table = schema.activity
        async with self._database.read() as db:
            rows = await db.execute(select(table).order_by(table.c.id.desc()).limit(limit))
            return [ActivityEntry(r.id, r.at, r.kind, r.vm_id, r.reason, r.who, r.request_id) for r in rows]

    async def exec_log(self, vm_id: str, *, limit: int, type_: CallType | None = None) -> ExecLogPage:
        """Newest first. Says nothing about whether the VM exists."""
        table = schema.exec_log
        query = select(table).where(table.c.vm_id == vm_id).order_by(table.c.seq.desc()).limit(limit + 1)
        if type_ is not None:
            query = query.where(table.c.type == type_)
        async with self._database.read() as db:
            rows = (await db.execute(query)).all()
        return ExecLogPage(tuple(_entry(row) for row in rows[:limit]), has_more=len(rows) > limit)

    async def mark_interrupted(self, node_id: str) -> int:
        """At start-up: whatever still runs by the log ended with the manager that logged it. Returns how many."""
        return await self._database.insist(lambda: self._mark_interrupted(node_id))

    async def _mark_interrupted(self, node_id: str) -> int:
        table = schema.exec_log
        mine = select(schema.vms.c.id).where(schema.vms.c.node_id == node_id)
        async with self._database.write() as db:
            result = await db.execute(
                update(table)
                .where(table.c.finished_at.is_(None), table.c.vm_id.in_(mine))
                .values(finished_at=now(), error=INTERRUPTED)
            )
        return result.rowcount

    async def write_calls(self, begun: Sequence[ExecLogEntry], ended: Sequence[ExecLogEntry]) -> None:
        """One transaction: insert `begun`, update `ended`. Entries of VMs that are gone are left out."""
        await finish(self._write_calls(begun, ended))

    async def _write_calls(self, begun: Sequence[ExecLogEntry], ended: Sequence[ExecLogEntry]) -> None:
        async with self._database.write(adds=True) as db:
            present = await _hold_present(db, {entry.vm_id for entry in begun}) if begun else set()
            if rows := [_row(entry) for entry in begun if entry.vm_id in present]:
                await db.execute(insert(schema.exec_log), rows)
            if ended:
                await db.execute(_FINISH, [_finish(entry) for entry in ended])

    async def present(self, vm_ids: Collection[str]) -> set[str]:
        """Which of these VMs exist."""
        ids = schema.vms.c.id
        async with self._database.read() as db:
            return set(await db.scalars(select(ids).where(ids.in_(vm_ids))))

    async def prune_calls(self, vm_ids: Collection[str]) -> None:
        """Keep the newest EXEC_LOG_PER_VM calls of each VM."""
        await finish(self._prune_calls(vm_ids))

    async def _prune_calls(self, vm_ids: Collection[str]) -> None:
        table = schema.exec_log
        async with self._database.write() as db:
            for vm_id in vm_ids:
                newest = select(table.c.seq).where(table.c.vm_id == vm_id).order_by(table.c.seq.desc())
                oldest_surplus = await db.scalar(newest.offset(EXEC_LOG_PER_VM).limit(1))
                if oldest_surplus is not None:
                    await db.execute(delete(table).where(table.c.vm_id == vm_id, table.c.seq <= oldest_surplus))


async def _hold_present(db: AsyncConnection, vm_ids: Collection[str]) -> set[str]:
    """Which of these VMs exist; they cannot be deleted before the transaction ends (SQLite has one writer anyway)."""
    ids = schema.vms.c.id
    return set(await db.scalars(select(ids).where(ids.in_(vm_ids)).with_for_update(read=True, key_share=True)))


def _row(entry: ExecLogEntry) -> dict[str, Any]:
    return {name: getattr(entry, name) for name in _ROW_COLUMNS}


def _finish(entry: ExecLogEntry) -> dict[str, Any]:
    return {"ended_id": entry.id} | {f"new_{name}": getattr(entry, name) for name in _FINISH_COLUMNS}


def _entry(row: Row[Any]) -> ExecLogEntry:
    return ExecLogEntry(
        id=row.id,
        vm_id=row.vm_id,
        type=row.type,
        input=row.input,
        input_truncated=row.input_truncated,
        exit_code=row.exit_code,
        duration_ms=row.duration_ms,
        started_at=row.started_at,
        finished_at=row.finished_at,
        bytes_in=row.bytes_in,
        bytes_out=row.bytes_out,
        timed_out=row.timed_out,
        error=row.error,
        request_id=row.request_id,
        who=row.who,
    )
