"""When VMs end by themselves. A deadline is passed on by compare-and-set: a change that was answered always wins."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import insert, select, update

from rundatsheesh.manager.model import HIDDEN, Caller, LifetimeChange, State, Unchanged, VmRecord, now
from rundatsheesh.manager.store import schema
from rundatsheesh.manager.store.database import Database, finish
from rundatsheesh.manager.store.rows import deadline, from_row

EXPIRED = "expired"
# A VM that is being worked on expires when that has ended.
EXPIRABLE = frozenset({State.RUNNING, State.PAUSED, State.STOPPED, State.ERROR})


class Lifetimes:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def change(self, vm_id: str, change: LifetimeChange) -> VmRecord | None:
        """Put the change in force; a time to live counts from now. None for an unknown VM, a hidden one too."""
        return await finish(self._change(vm_id, change))

    async def _change(self, vm_id: str, change: LifetimeChange) -> VmRecord | None:
        values: dict[str, Any] = {}
        if not isinstance(change.ttl_ms, Unchanged):
            values |= {"ttl_ms": change.ttl_ms, "expires_at": deadline(change.ttl_ms, now())}
        if not isinstance(change.idle_timeout_ms, Unchanged):
            values["idle_timeout_ms"] = change.idle_timeout_ms
        table = schema.vms
        visible = table.c.state.not_in([state.value for state in HIDDEN])
        async with self._database.write(adds=True) as db:
            statement = update(table).where(table.c.id == vm_id, visible).values(values).returning(table)
            row = (await db.execute(statement)).one_or_none()
        return None if row is None else from_row(row)

    async def due(self, node_id: str) -> list[tuple[str, datetime]]:
        """VMs that have a deadline, with it; the earliest first."""
        table = schema.vms
        query = (
            select(table.c.id, table.c.expires_at)
            .where(
                table.c.node_id == node_id,
                table.c.expires_at.is_not(None),
                table.c.state.in_([state.value for state in EXPIRABLE]),
            )
            .order_by(table.c.expires_at)
        )
        async with self._database.read() as db:
            return [(row.id, row.expires_at) for row in await db.execute(query)]

    async def expire(self, vm_id: str, caller: Caller) -> VmRecord | None:
        """If its deadline has passed, the VM is nobody's any more: in DELETING, and its activity says why."""
        return await self._database.insist(lambda: self._expire(vm_id, caller))

    async def _expire(self, vm_id: str, caller: Caller) -> VmRecord | None:
        table, at = schema.vms, now()
        async with self._database.write() as db:
            statement = (
                update(table)
                .where(
                    table.c.id == vm_id,
                    table.c.expires_at <= at,
                    table.c.state.in_([state.value for state in EXPIRABLE]),
                )
                .values(state=State.DELETING.value, reason=EXPIRED)
                .returning(table)
            )
            row = (await db.execute(statement)).one_or_none()
            if row is None:
                return None
            activity = {"at": at, "kind": "vm.destroy", "vm_id": vm_id, "reason": EXPIRED, "who": caller.who}
            await db.execute(insert(schema.activity).values(**activity, request_id=caller.request_id))
        return from_row(row)
