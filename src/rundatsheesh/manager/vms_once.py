"""Creations that happen once: a caller that asks again with the same key gets the VM of the first time."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable

from rundatsheesh.manager.errors import Conflict, NotFound, Unavailable
from rundatsheesh.manager.model import Caller, Once, State, VmRecord
from rundatsheesh.manager.store import Idempotency
from rundatsheesh.manager.store.idempotency import Creation
from rundatsheesh.manager.vms_locks import KeyedLocks

ELSEWHERE_RETRY_S = 1.0  # until asking again whether another server has made the VM


class Creations:
    """One at a time for each key of a caller. What a crash cut short is found out and made again."""

    def __init__(self, known: Idempotency, node_id: str, find: Callable[[str], Awaitable[VmRecord]]) -> None:
        self._known = known
        self._node_id = node_id
        self._find = find
        self._locks = KeyedLocks()

    async def create(self, caller: Caller, make: Callable[[], Awaitable[VmRecord]]) -> VmRecord:
        """What `make` returns, or what it returned for the same key before.

        Raises Conflict: the key was used with another body (`idempotency_conflict`), or its VM was deleted
        (`idempotency_vm_gone`); Unavailable while another server is at it.
        """
        if caller.once is None:
            return await make()
        async with self._locks.hold(f"{caller.who} {caller.once.key}"):
            owner = secrets.token_hex(16)
            found = await self._known.begin(caller.who, caller.once, owner, self._node_id)
            if found is not None:
                record = await self._earlier(caller, caller.once, found)
                if record is not None:
                    return record
                await self._take_over(caller, caller.once, found, owner)
            return await self._make(caller.who, caller.once, owner, make)

    async def _make(self, who: str, once: Once, owner: str, make: Callable[[], Awaitable[VmRecord]]) -> VmRecord:
        try:
            record = await make()
        except BaseException:
            await self._known.abandon(who, once, owner)
            raise
        await self._known.finish(who, once, record.id)
        return record

    async def _earlier(self, caller: Caller, once: Once, found: Creation) -> VmRecord | None:
        """The VM that was made before. None when it never came to be."""
        record = await self._look(found.vm_id)
        if record is not None and record.state is not State.CREATING:
            if not found.finished:  # its server ended between making it and saying so
                await self._known.finish(caller.who, once, record.id)
            return record
        if found.finished:
            raise Conflict(
                f"the VM that this Idempotency-Key created, {found.vm_id}, was deleted",
                code="idempotency_vm_gone",
                hint="use a new key to create another VM",
            )
        if found.node_id != self._node_id:
            raise _elsewhere()
        return None

    async def _look(self, vm_id: str | None) -> VmRecord | None:
        try:
            return None if vm_id is None else await self._find(vm_id)
        except NotFound:
            return None

    async def _take_over(self, caller: Caller, once: Once, found: Creation, owner: str) -> None:
        """Nobody works on it any more: creations of this server hold the lock that we hold."""
        if not await self._known.take_over(caller.who, once, found, owner):
            raise _elsewhere()


def _elsewhere() -> Unavailable:
    return Unavailable(
        "another server is creating the VM of this Idempotency-Key",
        code="creation_in_progress",
        retry_after=ELSEWHERE_RETRY_S,
    )
