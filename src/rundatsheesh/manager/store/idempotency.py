"""Creations that must happen once, by the key that a caller chose for each. Remembered for a day."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import ColumnElement, and_, delete, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from rundatsheesh.manager.errors import Conflict
from rundatsheesh.manager.model import Once, now
from rundatsheesh.manager.store import schema
from rundatsheesh.manager.store.database import Database, finish, is_unique_violation

REMEMBERED = timedelta(hours=24)

_table = schema.idempotency_keys


@dataclass(frozen=True, slots=True)
class Creation:
    """What is known under a key."""

    owner: str  # who works on it, or did
    node_id: str
    vm_id: str | None
    finished: bool  # its VM was given to the caller


class Idempotency:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def begin(self, who: str, once: Once, owner: str, node_id: str) -> Creation | None:
        """None: the creation is `owner`'s to make. Else what there is already.

        Raises Conflict (`idempotency_conflict`) when the key was used for something else.
        """
        try:
            return await finish(self._begin(who, once, owner, node_id))
        except IntegrityError as error:
            if not is_unique_violation(error):
                raise
        return await finish(self._begin(who, once, owner, node_id))  # somebody else was first: see what they do

    async def _begin(self, who: str, once: Once, owner: str, node_id: str) -> Creation | None:
        at = now()
        async with self._database.write(adds=True) as db:
            await db.execute(delete(_table).where(_table.c.created_at <= at - REMEMBERED))
            row = (await db.execute(select(_table).where(_is(who, once)))).one_or_none()
            if row is None:
                values = {"who": who, "key_hash": once.key, "body_hash": once.body, "owner": owner}
                await db.execute(insert(_table).values(**values, node_id=node_id, finished=False, created_at=at))
                return None
        if row.body_hash != once.body:
            raise Conflict(
                "this Idempotency-Key was used with another body",
                code="idempotency_conflict",
                hint="use a new key for each thing that you create",
            )
        return Creation(row.owner, row.node_id, row.vm_id, row.finished)

    async def take_over(self, who: str, once: Once, found: Creation, owner: str) -> bool:
        """Begin again what `found` left unfinished; false when somebody else has already."""
        return await finish(self._take_over(who, once, found, owner))

    async def _take_over(self, who: str, once: Once, found: Creation, owner: str) -> bool:
        left = and_(_is(who, once), _table.c.owner == found.owner, ~_table.c.finished)
        async with self._database.write() as db:
            result = await db.execute(update(_table).where(left).values(owner=owner, vm_id=None, created_at=now()))
        return result.rowcount == 1

    async def finish(self, who: str, once: Once, vm_id: str) -> None:
        """The VM was made and is the caller's."""
        await finish(self._finish(who, once, vm_id))

    async def _finish(self, who: str, once: Once, vm_id: str) -> None:
        async with self._database.write() as db:
            await db.execute(update(_table).where(_is(who, once)).values(vm_id=vm_id, finished=True))

    async def abandon(self, who: str, once: Once, owner: str) -> None:
        """The creation failed: the next one with this key begins anew."""
        await finish(self._abandon(who, once, owner))

    async def _abandon(self, who: str, once: Once, owner: str) -> None:
        mine = and_(_is(who, once), _table.c.owner == owner, ~_table.c.finished)
        async with self._database.write() as db:
            await db.execute(delete(_table).where(mine))


async def note_vm(db: AsyncConnection, who: str, once: Once, vm_id: str) -> None:
    """In the transaction that makes the VM's record, so that no crash can part the two."""
    await db.execute(update(_table).where(_is(who, once)).values(vm_id=vm_id))


def _is(who: str, once: Once) -> ColumnElement[bool]:
    return and_(_table.c.who == who, _table.c.key_hash == once.key)
