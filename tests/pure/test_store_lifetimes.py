"""Deadlines, limits of a caller, and creations that happen once, in the database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from api_support import open_store
from store_support import CALLER, SPEC, reserve

from rundatsheesh.manager.errors import Conflict, LimitReached, NotFound
from rundatsheesh.manager.model import Caller, Lifetime, LifetimeChange, Limits, Once, State, VmRecord, now
from rundatsheesh.manager.store import Store, idempotency

ONCE = Once("key", "body")
SHORT = replace(SPEC, lifetime=Lifetime(ttl_ms=1, idle_timeout_ms=5000))


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[Store]:
    opened = await open_store(tmp_path / "rds.db")
    yield opened
    await opened.close()


async def running(opened: Store) -> VmRecord:
    """A VM whose deadline has passed."""
    record = await reserve(opened, SHORT)
    await opened.move(record.id, {State.CREATING}, State.RUNNING)
    await asyncio.sleep(0.005)
    return record


async def test_a_deadline_is_kept(opened: Store, tmp_path: Path) -> None:
    record = await running(opened)
    assert record.expires_at == record.created_at + timedelta(milliseconds=1)
    other = await open_store(tmp_path / "rds.db")
    assert await other.lifetimes.due("node") == [(record.id, record.expires_at)]
    assert await other.lifetimes.due("other") == []
    assert (await other.get(record.id)).spec.lifetime == SHORT.lifetime
    await other.close()


async def test_an_expired_vm_says_why(opened: Store) -> None:
    record = await running(opened)
    expired = await opened.lifetimes.expire(record.id, CALLER)
    assert expired and (expired.state, expired.reason) == (State.DELETING, "expired")
    assert await opened.lifetimes.expire(record.id, CALLER) is None
    assert (await opened.history.activity(1))[0].reason == "expired"
    assert await opened.lifetimes.change(record.id, LifetimeChange(ttl_ms=None)) is None


@pytest.mark.parametrize("ttl_ms", [None, 60_000])
async def test_an_extended_vm_never_expires(opened: Store, ttl_ms: int | None) -> None:
    record = await running(opened)
    changed = await opened.lifetimes.change(record.id, LifetimeChange(ttl_ms=ttl_ms))
    assert changed and changed.spec.lifetime == Lifetime(ttl_ms, 5000)
    assert await opened.lifetimes.expire(record.id, CALLER) is None
    assert len(await opened.lifetimes.due("node")) == (ttl_ms is not None)


async def test_extension_and_expiry_agree(opened: Store) -> None:
    """Whichever comes first, the VM either lives with its new deadline or is gone for both."""
    for _ in range(10):
        record = await running(opened)
        changed, expired = await asyncio.gather(
            opened.lifetimes.change(record.id, LifetimeChange(ttl_ms=60_000)),
            opened.lifetimes.expire(record.id, CALLER),
        )
        assert (changed is None) == (expired is not None)
        await opened.delete(record.id)


async def test_vms_that_are_worked_on_do_not_expire(opened: Store) -> None:
    record = await reserve(opened, SHORT)
    await asyncio.sleep(0.005)
    assert await opened.lifetimes.expire(record.id, CALLER) is None and await opened.lifetimes.due("node") == []


@pytest.mark.parametrize(
    ("limits", "quota"),
    [(Limits(vms=1), "maxVms"), (Limits(cpu=SPEC.cpu), "maxCpu"), (Limits(mem_mb=SPEC.mem_mb), "maxMemMb")],
)
async def test_limits_count_the_callers_vms(opened: Store, limits: Limits, quota: str) -> None:
    caller = Caller("r", "key:a", limits)
    await reserve(opened, caller=Caller("r", "key:b"))
    first = await reserve(opened, caller=caller)
    with pytest.raises(LimitReached) as refused:
        await reserve(opened, caller=caller)
    assert refused.value.details["quota"] == quota and refused.value.retry_after
    await opened.delete(first.id)
    warm = await reserve(opened, state=State.WARM, caller=Caller("-", "manager"))
    claim = {"node_id": "node", "max_vms": 100, "caller": caller}
    assert await opened.claim(warm.id, SPEC, **claim)
    other = await reserve(opened, state=State.WARM, caller=Caller("-", "manager"))
    with pytest.raises(LimitReached):
        await opened.claim(other.id, SPEC, **claim)


async def test_many_at_once_stay_within_the_limit(opened: Store) -> None:
    caller = Caller("r", "key:a", Limits(vms=3))
    made = await asyncio.gather(*(reserve(opened, caller=caller) for _ in range(10)), return_exceptions=True)
    assert sum(isinstance(result, VmRecord) for result in made) == 3


async def test_a_creation_is_known_from_its_record_on(opened: Store) -> None:
    known = opened.idempotency
    assert await known.begin("key:a", ONCE, "one", "node") is None
    record = await reserve(opened, caller=Caller("r", "key:a", once=ONCE))
    found = await known.begin("key:a", ONCE, "two", "node")
    assert found and (found.vm_id, found.finished, found.owner) == (record.id, False, "one")
    with pytest.raises(Conflict) as refused:
        await known.begin("key:a", Once("key", "other"), "two", "node")
    assert refused.value.code == "idempotency_conflict"
    assert await known.begin("key:b", ONCE, "two", "node") is None  # another caller's key is another key
    assert await known.take_over("key:a", ONCE, found, "two")
    assert not await known.take_over("key:a", ONCE, found, "three")
    await known.abandon("key:a", ONCE, "one")
    await known.finish("key:a", ONCE, record.id)
    await known.abandon("key:a", ONCE, "two")
    found = await known.begin("key:a", ONCE, "four", "node")
    assert found and found.finished


async def test_only_one_begins(opened: Store, tmp_path: Path) -> None:
    other = await open_store(tmp_path / "rds.db")
    begun = await asyncio.gather(
        *(store.idempotency.begin("w", ONCE, str(n), "node") for n, store in enumerate([opened, other] * 4))
    )
    assert begun.count(None) == 1
    await other.close()


async def test_keys_are_forgotten(opened: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert await opened.idempotency.begin("w", ONCE, "one", "node") is None
    assert await opened.idempotency.begin("w", ONCE, "two", "node")
    monkeypatch.setattr(idempotency, "now", lambda: now() + idempotency.REMEMBERED)
    assert await opened.idempotency.begin("w", Once("key", "else"), "three", "node") is None


async def test_unknown_vms(opened: Store) -> None:
    assert await opened.lifetimes.change("vm-none", LifetimeChange(ttl_ms=None)) is None
    with pytest.raises(NotFound):
        await opened.get("vm-none")
