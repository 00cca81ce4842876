"""VM records: reserved with a slot before the first side effect, moved by compare-and-set, deleted after the last."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any, TypeAlias, TypedDict, Unpack

from sqlalchemy import delete, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from rundatsheesh.manager.errors import Conflict, NotFound, Unavailable
from rundatsheesh.manager.model import (
    FIRST_USABLE_SLOT,
    GUEST_NETWORK,
    HIDDEN,
    SLOTS_PER_BLOCK,
    Caller,
    Isolation,
    ProvisionMode,
    Slot,
    State,
    VmRecord,
    VmSpec,
    new_vm_id,
    now,
)
from rundatsheesh.manager.store import schema
from rundatsheesh.manager.store.credentials import Credentials
from rundatsheesh.manager.store.database import Database, finish, is_unique_violation
from rundatsheesh.manager.store.history import History
from rundatsheesh.manager.store.idempotency import Idempotency, note_vm
from rundatsheesh.manager.store.lifetimes import Lifetimes
from rundatsheesh.manager.store.quota import QUOTA_RETRY_AFTER_S, check_key_limits, check_server_limit, hold_counts
from rundatsheesh.manager.store.rows import deadline, from_row, spec_columns, to_row

RESERVE_ATTEMPTS = 5

Records: TypeAlias = list[VmRecord]  # `Store.list` hides the builtin inside the class


class VmChanges(TypedDict, total=False):
    """What may change together with a VM's state."""

    spec: VmSpec
    isolation: Isolation
    provision_mode: ProvisionMode
    boot_id: str | None
    reason: str | None
    started_at: datetime | None


class Store:
    """Every method is one transaction and runs to its end even when its caller is cancelled."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.credentials = Credentials(database)
        self.history = History(database)
        self.lifetimes = Lifetimes(database)
        self.idempotency = Idempotency(database)

    @classmethod
    async def open(cls, url: str) -> Store:
        """Connect to `url` (SQLite or PostgreSQL) and migrate the schema. Raises HostError for a newer schema."""
        return cls(await Database.open(url))

    @classmethod
    async def open_existing(cls, url: str) -> Store | None:
        """For reading beside the server that owns it. None where nothing was stored yet; raises HostError for a
        schema of another version."""
        database = await Database.open_existing(url)
        return None if database is None else cls(database)

    async def close(self) -> None:
        await self._database.close()

    async def keep_room(self) -> None:
        """Let the database hold what it needs to delete things on a full disk, where it had to give that up."""
        await self._database.keep_room()

    async def reserve(
        self,
        spec: VmSpec,
        *,
        node_id: str,
        block: int,
        isolation: Isolation,
        provision_mode: ProvisionMode,
        max_vms: int,
        caller: Caller,
        state: State = State.CREATING,
    ) -> VmRecord:
        """A new record in CREATING (or WARM) with a slot of `block` that nobody else holds.

        Raises LimitReached when the node already has `max_vms` records, of callers or else of warm VMs, or the caller
        as much as its limits allow; Unavailable when the block has no free slot, StorageFull when the database has no
        room for more. A cancelled call leaves no record.
        """
        created = now()
        record = VmRecord(
            id=new_vm_id(),
            node_id=node_id,
            slot=Slot(0),
            spec=spec,
            state=state,
            isolation=isolation,
            provision_mode=provision_mode,
            boot_id=None,
            reason=None,
            created_at=created,
            started_at=None,
            expires_at=deadline(spec.lifetime.ttl_ms, created),
        )
        try:
            return await finish(self._reserve(record, block, max_vms, caller))
        except asyncio.CancelledError:
            await self.delete(record.id)
            raise

    async def _reserve(self, record: VmRecord, block: int, max_vms: int, caller: Caller) -> VmRecord:
        for attempt in range(RESERVE_ATTEMPTS):
            try:
                async with self._database.write(adds=True) as db:
                    slot = await _take_slot(db, block)
                    warm = record.state is State.WARM
                    await _check_quota(db, record.node_id, max_vms, record.spec, None if warm else caller)
                    reserved = replace(record, slot=slot)
                    await db.execute(insert(schema.vms).values(**to_row(reserved), created_by=caller.who))
                    if not warm:
                        await _note_create(db, record.id, record.created_at, caller)
                    return reserved
            except IntegrityError as error:
                # Another manager on the same database took the slot between our look and our insert.
                if not is_unique_violation(error) or attempt == RESERVE_ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")

    async def claim(self, vm_id: str, spec: VmSpec, *, node_id: str, max_vms: int, caller: Caller) -> VmRecord | None:
        """Give a warm VM to a caller: it is RUNNING with this spec, created now. None when it is not warm any more.

        Raises LimitReached as `reserve` does.
        """
        return await finish(self._claim(vm_id, spec, node_id, max_vms, caller))

    async def _claim(self, vm_id: str, spec: VmSpec, node_id: str, max_vms: int, caller: Caller) -> VmRecord | None:
        created = now()
        async with self._database.write(adds=True) as db:
            await _check_quota(db, node_id, max_vms, spec, caller)
            statement = (
                update(schema.vms)
                .where(schema.vms.c.id == vm_id, schema.vms.c.state == State.WARM.value)
                .values(
                    state=State.RUNNING.value,
                    created_at=created,
                    started_at=created,
                    created_by=caller.who,
                    expires_at=deadline(spec.lifetime.ttl_ms, created),
                    **spec_columns(spec),
                )
                .returning(schema.vms)
            )
            row = (await db.execute(statement)).one_or_none()
            if row is not None:
                await _note_create(db, vm_id, created, caller)
        return from_row(row) if row is not None else None

    async def move(self, vm_id: str, from_: Collection[State], to: State, **changes: Unpack[VmChanges]) -> VmRecord:
        """Set the state (and `changes`) if the VM is in one of `from_`; returns the record as it is now.

        Raises Conflict (`wrong_state`, `details.state`) from any other state and NotFound for an unknown VM; a VM in a
        hidden state is unknown unless `from_` names it.
        """
        return await self._database.insist(lambda: self._move(vm_id, from_, to, changes))

    async def _move(self, vm_id: str, from_: Collection[State], to: State, changes: VmChanges) -> VmRecord:
        async with self._database.write() as db:
            statement = (
                update(schema.vms)
                .where(schema.vms.c.id == vm_id, schema.vms.c.state.in_([state.value for state in from_]))
                .values(state=to.value, **_changed_columns(changes))
                .returning(schema.vms)
            )
            row = (await db.execute(statement)).one_or_none()
            if row is not None:
                return from_row(row)
            found = await db.scalar(select(schema.vms.c.state).where(schema.vms.c.id == vm_id))
        if found is None or found in HIDDEN:
            raise vm_not_found(vm_id)
        raise wrong_state(vm_id, State(found), from_)

    async def get(self, vm_id: str) -> VmRecord:
        """Raises NotFound (`vm_not_found`); a VM in a hidden state is unknown."""
        async with self._database.read() as db:
            row = (await db.execute(select(schema.vms).where(schema.vms.c.id == vm_id))).one_or_none()
        if row is None or row.state in HIDDEN:
            raise vm_not_found(vm_id)
        return from_row(row)

    async def list(
        self, *, state: State | None = None, labels: Mapping[str, str] | None = None, node: str | None = None
    ) -> Records:
        """Oldest first, without hidden ones. `labels`: the VM carries all of these pairs."""
        wanted = (labels or {}).items()
        records = await self.list_all(node)
        return [
            record
            for record in records
            if record.state not in HIDDEN
            and (state is None or record.state is state)
            and wanted <= record.spec.labels.items()
        ]

    async def list_all(self, node: str | None = None) -> Records:
        """Every record of `node` (of all nodes when None), those being deleted too. For reconciliation."""
        statement = select(schema.vms).order_by(schema.vms.c.created_at, schema.vms.c.id)
        if node is not None:
            statement = statement.where(schema.vms.c.node_id == node)
        async with self._database.read() as db:
            return [from_row(row) for row in await db.execute(statement)]

    async def delete(self, vm_id: str) -> None:
        """Forget the VM and its execution log, and free its slot. Idempotent."""
        await self._database.insist(lambda: self._delete(vm_id))

    async def _delete(self, vm_id: str) -> None:
        async with self._database.write() as db:
            await db.execute(delete(schema.vms).where(schema.vms.c.id == vm_id))


def vm_not_found(vm_id: str) -> NotFound:
    return NotFound(f"no VM {vm_id[:64]!r}", code="vm_not_found")


def wrong_state(vm_id: str, found: State, allowed: Collection[State]) -> Conflict:
    """The 409 of every operation that a VM's state forbids."""
    needed = " or ".join(sorted(allowed))
    return Conflict(f"VM {vm_id} is {found}; this needs {needed}", code="wrong_state", details={"state": found.value})


async def _note_create(db: AsyncConnection, vm_id: str, at: datetime, caller: Caller) -> None:
    activity = {"at": at, "kind": "vm.create", "vm_id": vm_id, "who": caller.who, "request_id": caller.request_id}
    await db.execute(insert(schema.activity).values(activity))
    if caller.once is not None:
        await note_vm(db, caller.who, caller.once, vm_id)


async def _check_quota(db: AsyncConnection, node_id: str, most: int, spec: VmSpec, caller: Caller | None) -> None:
    """`caller` is None for a warm VM: those are counted apart. Others that count wait until the transaction ends."""
    await hold_counts(db, node_id, caller)
    await check_server_limit(db, node_id, most, warm=caller is None)
    if caller is not None:
        await check_key_limits(db, caller, spec)


async def _take_slot(db: AsyncConnection, block: int) -> Slot:
    """The next free slot after the block's cursor. Holds the cursor's row until the transaction ends."""
    cursor = await _lock_cursor(db, block)
    first, last = usable_slots(block)
    taken = set(await db.scalars(select(schema.vms.c.slot).where(schema.vms.c.slot.between(first, last))))
    after = cursor if first <= cursor <= last else last
    for number in (*range(after + 1, last + 1), *range(first, after + 1)):
        if number not in taken:
            await db.execute(
                update(schema.slot_cursors).where(schema.slot_cursors.c.block == block).values(last_slot=number)
            )
            return Slot(number)
    raise Unavailable("no network address is free on this host", retry_after=QUOTA_RETRY_AFTER_S)


async def _lock_cursor(db: AsyncConnection, block: int) -> int:
    """Last slot handed out; the update is what makes another reservation of the block wait (PostgreSQL)."""
    table = schema.slot_cursors
    touch = update(table).where(table.c.block == block).values(last_slot=table.c.last_slot).returning(table.c.last_slot)
    cursor = await db.scalar(touch)
    if cursor is None:
        cursor = usable_slots(block)[1]
        await db.execute(insert(table).values(block=block, last_slot=cursor))
    return int(cursor)


def usable_slots(block: int) -> tuple[int, int]:
    """First and last slot of a block that give a guest an address: neither the gateway's range nor the broadcast."""
    first = max(block * SLOTS_PER_BLOCK, FIRST_USABLE_SLOT)
    last = min((block + 1) * SLOTS_PER_BLOCK - 1, GUEST_NETWORK.num_addresses - 2)
    return first, last


def _changed_columns(changes: VmChanges) -> dict[str, Any]:
    columns: dict[str, Any] = {**changes}
    spec = columns.pop("spec", None)
    return columns if spec is None else {**columns, **spec_columns(spec)}
