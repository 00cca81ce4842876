"""VM records: slots, quota, moves, and what cancellation leaves behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from api_support import open_store
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.engine import make_url
from store_support import SPEC, reserve

from rundatsheesh.manager.errors import Conflict, LimitReached, NotFound, StorageFull, Unavailable
from rundatsheesh.manager.model import (
    EgressPolicy,
    Isolation,
    ProvisionMode,
    State,
    VmRecord,
    now,
)
from rundatsheesh.manager.store import Store, store
from rundatsheesh.manager.store.database import _room
from rundatsheesh.manager.store.room import Room


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[Store]:
    opened = await open_store(tmp_path / "rds.db")
    yield opened
    await opened.close()


async def test_a_record_comes_back_as_it_was(opened: Store) -> None:
    record = await reserve(opened, replace(SPEC, name="n"))
    assert record.state is State.CREATING and record.started_at is None and record.slot.block == 1
    assert await opened.get(record.id) == record
    assert await opened.list() == await opened.list_all("node") == [record]
    assert await opened.list_all("other") == []
    (created,) = await opened.history.activity(5)
    assert (created.kind, created.vm_id, created.who, created.request_id) == (
        "vm.create",
        record.id,
        "key:main",
        "req-1",
    )


async def test_a_freed_slot_is_the_last_to_be_used_again(opened: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "usable_slots", lambda block: (1024, 1026))
    first, second = await reserve(opened), await reserve(opened)
    assert [first.slot.number, second.slot.number] == [1024, 1025]
    await opened.delete(first.id)
    assert (await reserve(opened)).slot.number == 1026
    assert (await reserve(opened)).slot.number == 1024
    with pytest.raises(Unavailable):
        await reserve(opened)


@pytest.mark.parametrize(("block", "slots"), [(0, (256, 1023)), (1, (1024, 2047)), (63, (64512, 65534))])
def test_slots_are_addresses_of_guests(block: int, slots: tuple[int, int]) -> None:
    assert store.usable_slots(block) == slots


async def test_concurrent_reservations_share_no_slot_and_keep_the_quota(opened: Store) -> None:
    results = await asyncio.gather(*(reserve(opened, max_vms=20) for _ in range(30)), return_exceptions=True)
    records = [result for result in results if isinstance(result, VmRecord)]
    refused = [result for result in results if isinstance(result, LimitReached)]
    assert (len(records), len(refused)) == (20, 10)
    assert len({record.slot for record in records}) == len({record.id for record in records}) == 20
    assert refused[0].code == "quota_exceeded" and refused[0].retry_after


async def test_two_managers_on_one_database_share_no_slot(tmp_path: Path, opened: Store) -> None:
    other = await open_store(tmp_path / "rds.db")
    try:
        reservations = [reserve(which, node_id=name) for which, name in [(opened, "a"), (other, "b")] * 10]
        records = await asyncio.gather(*reservations)
    finally:
        await other.close()
    assert len({record.slot for record in records}) == 20
    assert len(await opened.list_all("a")) == 10
    with pytest.raises(LimitReached):
        await reserve(opened, node_id="a", max_vms=10)
    await reserve(opened, node_id="c", max_vms=1)


async def test_a_slot_taken_meanwhile_is_another_try(opened: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = (await reserve(opened)).slot
    real, answers = store._take_slot, [taken]

    async def stale(*args: Any) -> Any:
        return answers.pop() if answers else await real(*args)

    monkeypatch.setattr(store, "_take_slot", stale)
    assert (await reserve(opened)).slot != taken and not answers


@given(cut=st.integers(0, 40))
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
async def test_a_cancelled_reservation_leaves_no_record(opened: Store, cut: int) -> None:
    before = len(await opened.list_all())
    task = asyncio.create_task(reserve(opened))
    for _ in range(cut):
        await asyncio.sleep(0)
    task.cancel()
    try:
        kept = await task
    except asyncio.CancelledError:
        assert len(await opened.list_all()) == before
    else:
        await opened.delete(kept.id)


async def test_a_cancelled_move_has_happened(opened: Store) -> None:
    record = await reserve(opened)
    task = asyncio.create_task(opened.move(record.id, {State.CREATING}, State.RUNNING))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await opened.get(record.id)).state is State.RUNNING


async def test_a_move_is_a_compare_and_set(opened: Store) -> None:
    record = await reserve(opened)
    moves = [opened.move(record.id, {State.CREATING}, State.RUNNING, boot_id=f"b{n}") for n in range(5)]
    results = await asyncio.gather(*moves, return_exceptions=True)
    (won,) = [result for result in results if isinstance(result, VmRecord)]
    lost = [result for result in results if isinstance(result, Conflict)]
    assert len(lost) == 4 and lost[0].code == "wrong_state" and lost[0].details == {"state": "RUNNING"}
    assert "needs CREATING" in lost[0].message
    assert await opened.get(record.id) == won


async def test_what_changes_with_a_move(opened: Store) -> None:
    record = await reserve(opened)
    at = datetime(2024, 1, 2, 3, 4, 5, 678901, tzinfo=timezone(timedelta(hours=2)))
    spec = replace(SPEC, policy=EgressPolicy(), name="claimed", labels={})
    moved = await opened.move(
        record.id,
        {State.CREATING, State.STOPPED},
        State.RUNNING,
        spec=spec,
        boot_id="b",
        started_at=at,
        reason="r",
        provision_mode=ProvisionMode.SNAPSHOT,
        isolation=Isolation.HARDWARE_VM,
    )
    assert moved == replace(
        record,
        spec=spec,
        state=State.RUNNING,
        boot_id="b",
        started_at=at,
        reason="r",
        provision_mode=ProvisionMode.SNAPSHOT,
        isolation=Isolation.HARDWARE_VM,
    )
    assert moved.started_at is not None and moved.started_at.tzinfo is UTC
    cleared = await opened.move(record.id, {State.RUNNING}, State.RUNNING, reason=None)
    assert cleared == replace(moved, reason=None)


async def test_a_vm_that_is_being_deleted_is_unknown(opened: Store) -> None:
    record = await reserve(opened)
    deleting = await opened.move(record.id, set(State), State.DELETING)
    with pytest.raises(NotFound) as unknown:
        await opened.get(record.id)
    assert unknown.value.code == "vm_not_found"
    with pytest.raises(NotFound):
        await opened.move(record.id, {State.RUNNING}, State.STOPPING)
    assert await opened.list() == [] and await opened.list_all("node") == [deleting]
    with pytest.raises(LimitReached):
        await reserve(opened, max_vms=1)
    await opened.move(record.id, {State.DELETING}, State.DELETING)
    await opened.delete(record.id)
    await opened.delete(record.id)
    assert await opened.list_all() == []
    with pytest.raises(NotFound):
        await opened.move(record.id, set(State), State.ERROR)


async def test_list_filters(opened: Store) -> None:
    one = await reserve(opened, replace(SPEC, labels={"a": "b", "c": "d"}))
    two = await reserve(opened, node_id="other")
    two = await opened.move(two.id, {State.CREATING}, State.ERROR, reason="died")
    assert await opened.list(labels={"a": "b"}) == [one, two]
    assert await opened.list(labels={"a": "b", "c": "d"}) == [one]
    assert await opened.list(labels={"a": "x"}) == []
    assert await opened.list(state=State.ERROR) == [two] == await opened.list(node="other")


async def test_a_naive_time_is_refused(opened: Store) -> None:
    record = await reserve(opened)
    with pytest.raises(Exception, match="naive"):
        await opened.move(record.id, {State.CREATING}, State.RUNNING, started_at=now().replace(tzinfo=None))


async def test_a_full_disk_is_told_as_such(opened: Store) -> None:
    async with opened._database._engine.connect() as connection:
        await connection.exec_driver_sql("PRAGMA max_page_count = 1")  # SQLite's own limit; as if the disk ended there
    with pytest.raises(StorageFull):
        for _ in range(200):
            await reserve(opened, replace(SPEC, name="n" * 128, labels={str(n): "v" * 200 for n in range(30)}))


@pytest.mark.parametrize("url", ["postgresql://host/db", "sqlite://", "sqlite:///:memory:"])
def test_only_a_database_in_a_file_of_ours_holds_room(url: str) -> None:
    assert _room(make_url(url)) is None
    assert _room(make_url("sqlite+aiosqlite:////root/x.db")) == Room(Path("/root/x.db"))


async def test_records_survive_a_restart(tmp_path: Path) -> None:
    first = await open_store(tmp_path / "x.db")
    record = await reserve(first)
    await first.close()
    second = await open_store(tmp_path / "x.db")
    assert await second.get(record.id) == record
    await second.close()
