"""The store on PostgreSQL, with a real server: the same promises, also between two managers on one database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from postgres_support import postgres
from sqlalchemy import Connection, create_engine, make_url
from store_support import CALLER, SPEC, reserve

from rundatsheesh.manager.errors import Conflict, LimitReached
from rundatsheesh.manager.model import Caller, Lifetime, LifetimeChange, Limits, Once, State, VmRecord, now
from rundatsheesh.manager.store import ExecLog, Store, schema


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with postgres() as started:
        yield started


@pytest.fixture
async def two(url: str) -> AsyncIterator[tuple[Store, Store]]:
    """Two managers that meet an old, or an empty, database at the same time."""
    first, second = await asyncio.gather(Store.open(url), Store.open(url))
    for record in await first.list_all():
        await first.delete(record.id)
    yield first, second
    await first.close()
    await second.close()


def engine_url(url: str) -> str:
    return make_url(url).set(drivername="postgresql+psycopg").render_as_string(hide_password=False)


async def test_migrating_makes_the_schema(two: tuple[Store, Store], url: str) -> None:
    engine = create_engine(engine_url(url))
    with engine.connect() as connection:
        assert isinstance(connection, Connection)
        assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []
    engine.dispose()


async def test_a_record_comes_back_as_it_was(two: tuple[Store, Store]) -> None:
    record = await reserve(two[0], replace(SPEC, lifetime=Lifetime(60_000, 5000)))
    assert await two[1].get(record.id) == record
    moved = await two[1].move(record.id, {State.CREATING}, State.RUNNING, started_at=now(), boot_id="b")
    assert await two[0].list() == [moved]
    with pytest.raises(Conflict):
        await two[0].move(record.id, {State.CREATING}, State.RUNNING)


async def test_two_managers_never_take_the_same_slot(two: tuple[Store, Store]) -> None:
    """Even when both believe that the block is theirs."""
    made = await asyncio.gather(*(reserve(two[n % 2], node_id=f"node{n % 2}") for n in range(40)))
    assert len({record.slot for record in made}) == 40


async def test_neither_limit_is_exceeded(two: tuple[Store, Store]) -> None:
    limited = Caller("r", "key:a", Limits(vms=3))
    made = await asyncio.gather(
        *(reserve(two[n % 2], caller=limited, node_id=f"node{n % 2}", block=1 + n % 2) for n in range(12)),
        return_exceptions=True,
    )
    assert sum(isinstance(result, VmRecord) for result in made) == 3
    assert all(isinstance(result, VmRecord | LimitReached) for result in made), made
    made = await asyncio.gather(
        *(reserve(two[n % 2], max_vms=5, node_id="x") for n in range(12)), return_exceptions=True
    )
    assert sum(isinstance(result, VmRecord) for result in made) == 5


async def test_one_warm_vm_has_one_owner(two: tuple[Store, Store]) -> None:
    warm = await reserve(two[0], state=State.WARM, caller=Caller("-", "manager"))
    claimed = await asyncio.gather(
        *(two[n % 2].claim(warm.id, SPEC, node_id="node", max_vms=9, caller=CALLER) for n in range(8))
    )
    assert sum(record is not None for record in claimed) == 1


async def test_extension_and_expiry_agree(two: tuple[Store, Store]) -> None:
    for _ in range(10):
        record = await reserve(two[0], replace(SPEC, lifetime=Lifetime(ttl_ms=1)))
        await two[0].move(record.id, {State.CREATING}, State.RUNNING)
        await asyncio.sleep(0.005)
        changed, expired = await asyncio.gather(
            two[0].lifetimes.change(record.id, LifetimeChange(ttl_ms=60_000)),
            two[1].lifetimes.expire(record.id, CALLER),
        )
        assert (changed is None) == (expired is not None)


async def test_only_one_creation_begins(two: tuple[Store, Store]) -> None:
    once = Once("key", "body")
    begun = await asyncio.gather(*(two[n % 2].idempotency.begin("w", once, str(n), "node") for n in range(8)))
    assert begun.count(None) == 1


async def test_keys_sessions_and_logs(two: tuple[Store, Store]) -> None:
    key, secret = await two[0].credentials.create_api_key("k", None)
    assert await two[1].credentials.find_api_key(secret) == key
    await two[1].credentials.revoke_api_key(key.id)
    assert await two[0].credentials.find_api_key(secret) is None
    token, session = await two[0].credentials.create_session("a@b")
    assert await two[1].credentials.find_session(token) == session
    record = await reserve(two[0])
    async with ExecLog(two[0].history) as log:
        entry = await log.started(record.id, "exec", "true", CALLER)
        log.finished(entry, duration_ms=1, exit_code=0, bytes_in=None, bytes_out=0, timed_out=False, error=None)
    page = await two[1].history.exec_log(record.id, limit=5)
    assert [found.exit_code for found in page.entries] == [0]
    assert await two[0].history.mark_interrupted("node") == 0
    await two[0].delete(record.id)
    assert (await two[1].history.exec_log(record.id, limit=5)).entries == ()
