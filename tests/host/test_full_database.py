"""A database on a disk that others have filled: what takes something away goes on, what adds is refused."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "pure"))

from store_support import CALLER, SPEC, reserve

from rundatsheesh.manager.errors import StorageFull
from rundatsheesh.manager.model import Lifetime, LifetimeChange, State
from rundatsheesh.manager.store import ExecLog, Store
from rundatsheesh.manager.store.history import EXEC_LOG_PER_VM
from rundatsheesh.manager.store.room import BALLAST_BYTES, LOG_BYTES
from small_disk import fill, filling, small_file_system

BUSY = 4  # VMs with the longest history there can be, in the largest transactions then


@pytest.fixture
def small() -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    with small_file_system(192) as mounted:
        yield mounted


async def filled(small: Path) -> tuple[Store, list[str]]:
    """VMs on a disk that has no room left."""
    store = await Store.open(f"sqlite:///{small}/x.db")
    vms = [(await reserve(store)).id for _ in range(60)]
    async with ExecLog(store.history) as log:
        for vm_id in vms[:BUSY]:
            for number in range(EXEC_LOG_PER_VM):
                entry = await log.started(vm_id, "exec", "x" * 8192, CALLER)
                log.finished(entry, duration_ms=1, exit_code=0)
                if number % 200 == 0:
                    await log.flush()
    await store.keep_room()
    fill(small / "filler")
    return store, vms


async def destroy(store: Store, vm_id: str) -> None:
    await store.move(vm_id, frozenset(State), State.DELETING)
    await store.delete(vm_id)
    await store.history.record_activity("vm.destroy", caller=CALLER, vm_id=vm_id)


async def test_vms_are_deleted_however_fast_the_disk_fills_again(small: Path) -> None:
    store, vms = await filled(small)
    with filling(small / "filler"):
        for vm_id in vms:
            await destroy(store, vm_id)
        assert await store.list_all() == []
        for _ in range(1000):  # more than fit into what was held: it is used again
            await store.history.record_activity("login", caller=CALLER)
    await store.close()


async def test_what_adds_is_refused_before_it_takes_what_the_rest_needs(small: Path) -> None:
    store, vms = await filled(small)
    held = (small / "x.db-wal").stat().st_size
    for _ in range(200):
        with pytest.raises(StorageFull):
            await reserve(store, replace(SPEC, lifetime=Lifetime(60_000)))
        with pytest.raises(StorageFull):
            await store.lifetimes.change(vms[0], LifetimeChange(ttl_ms=60_000))
        with pytest.raises(StorageFull):
            await store.history.write_calls([], [])
    await store.credentials.mark_used({"key-0": (await store.get(vms[0])).created_at})
    assert (small / "x.db-wal").stat().st_size == held == LOG_BYTES
    assert (small / "x.db-ballast").stat().st_size == BALLAST_BYTES
    await store.close()


async def test_it_is_opened_on_a_full_disk_and_holds_its_room_again_when_there_is_some(small: Path) -> None:
    store, vms = await filled(small)
    for _ in range(2):
        await store.close()
        fill(small / "filler")
        store = await Store.open(f"sqlite:///{small}/x.db")
        fill(small / "filler")
        await destroy(store, vms.pop())
    assert (small / "x.db-ballast").stat().st_size < BALLAST_BYTES
    (small / "filler").unlink()
    await store.keep_room()
    assert (small / "x.db-ballast").stat().st_size == BALLAST_BYTES
    assert (small / "x.db-wal").stat().st_size == LOG_BYTES
    assert (small / "x.db-ballast").stat().st_mode & 0o777 == 0o600
    await reserve(store)
    await store.close()
