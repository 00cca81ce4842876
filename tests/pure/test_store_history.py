"""The execution log and the activity."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from api_support import open_store
from store_support import CALLER, reserve

from rundatsheesh.manager.store import ExecLog, Store, exec_log, history


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[Store]:
    opened = await open_store(tmp_path / "rds.db")
    yield opened
    await opened.close()


@pytest.fixture
async def calls(opened: Store) -> AsyncIterator[ExecLog]:
    async with ExecLog(opened.history) as calls:
        yield calls


async def test_a_call_from_its_begin_to_its_end(opened: Store, calls: ExecLog) -> None:
    vm_id = (await reserve(opened)).id
    entry = await calls.started(vm_id, "exec", "echo é", CALLER)
    (running,) = (await calls.page(vm_id, limit=5)).entries
    assert running == entry and running.finished_at is None and running.bytes_in == 7
    calls.finished(entry, duration_ms=12, exit_code=124, bytes_out=9, timed_out=True)
    (ended,) = (await calls.page(vm_id, limit=5)).entries
    assert (ended.exit_code, ended.duration_ms, ended.bytes_out, ended.timed_out) == (124, 12, 9, True)
    assert ended.finished_at is not None and ended.started_at == entry.started_at
    assert (ended.who, ended.request_id, ended.error) == ("key:main", "req-1", None)


async def test_newest_first_with_a_limit_and_a_type(opened: Store, calls: ExecLog) -> None:
    vm_id = (await reserve(opened)).id
    for n in range(4):
        entry = await calls.started(vm_id, "run-ts" if n == 1 else "exec", str(n), CALLER)
        calls.finished(entry, duration_ms=1, error="guest_died", bytes_in=1 << 40)
    page = await calls.page(vm_id, limit=3)
    assert [entry.input for entry in page.entries] == ["3", "2", "1"] and page.has_more
    page = await calls.page(vm_id, limit=3, type_="exec")
    assert [entry.input for entry in page.entries] == ["3", "2", "0"] and not page.has_more
    assert page.entries[0].error == "guest_died" and page.entries[0].bytes_in == 1 << 40


async def test_a_long_or_odd_input_is_cut_and_cleaned(opened: Store, calls: ExecLog) -> None:
    vm_id = (await reserve(opened)).id
    await calls.started(vm_id, "exec", "x" * 10_000, CALLER)
    await calls.started(vm_id, "exec", "a\0b\udc80", CALLER)
    odd, long = (await calls.page(vm_id, limit=5)).entries
    assert (len(long.input), long.input_truncated, long.bytes_in) == (exec_log.MAX_INPUT_CHARS, True, 10_000)
    assert (odd.input, odd.input_truncated) == ("a\ufffdb?", False)


@pytest.mark.parametrize("ends", [False, True])
async def test_the_writer_needs_no_reader(opened: Store, calls: ExecLog, ends: bool) -> None:
    vm_id = (await reserve(opened)).id
    entry = await calls.started(vm_id, "exec", "true", CALLER)
    if ends:
        calls.finished(entry, duration_ms=1)
    async with asyncio.timeout(10):
        while not (await opened.history.exec_log(vm_id, limit=1)).entries:
            await asyncio.sleep(exec_log.GATHER_S / 4)


async def test_leaving_writes_what_is_pending(opened: Store) -> None:
    vm_id = (await reserve(opened)).id
    async with ExecLog(opened.history) as calls:
        entry = await calls.started(vm_id, "exec", "true", CALLER)
        await calls.flush()
        calls.finished(entry, duration_ms=1, exit_code=0)
    (ended,) = (await opened.history.exec_log(vm_id, limit=5)).entries
    assert ended.exit_code == 0


async def test_what_ran_when_the_manager_ended_is_marked(opened: Store, calls: ExecLog) -> None:
    mine, theirs = (await reserve(opened)).id, (await reserve(opened, node_id="other")).id
    for vm_id in (mine, theirs):
        await calls.started(vm_id, "exec", "sleep 9", CALLER)
    await calls.flush()
    assert await opened.history.mark_interrupted("node") == 1
    assert await opened.history.mark_interrupted("node") == 0
    (entry,) = (await calls.page(mine, limit=5)).entries
    assert entry.error == "interrupted" and entry.finished_at and entry.exit_code is None
    assert (await calls.page(theirs, limit=5)).entries[0].finished_at is None


async def test_a_vm_takes_its_log_along(opened: Store, calls: ExecLog) -> None:
    vm_id = (await reserve(opened)).id
    other = (await reserve(opened)).id
    early = await calls.started(vm_id, "exec", "early", CALLER)
    await calls.flush()
    await opened.delete(vm_id)
    calls.finished(early, duration_ms=1)
    await calls.started(vm_id, "exec", "late", CALLER)
    await calls.started(other, "exec", "kept", CALLER)
    assert (await calls.page(vm_id, limit=5)).entries == ()
    assert [entry.input for entry in (await calls.page(other, limit=5)).entries] == ["kept"]


async def test_each_vm_keeps_its_newest_calls(opened: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "EXEC_LOG_PER_VM", 10)
    monkeypatch.setattr(exec_log, "PRUNE_EVERY", 5)
    quiet, busy = (await reserve(opened)).id, (await reserve(opened)).id
    async with ExecLog(opened.history) as calls:
        await calls.started(quiet, "exec", "q", CALLER)
        for n in range(25):
            await calls.started(busy, "exec", str(n), CALLER)
            if n % 5 == 4:
                await calls.flush()
        page = await calls.page(busy, limit=100)
        assert [entry.input for entry in page.entries] == [str(n) for n in range(24, 14, -1)]
        assert len((await calls.page(quiet, limit=100)).entries) == 1


async def test_deleted_vms_are_not_counted_for_ever(opened: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exec_log, "MOST_COUNTED", 5)
    kept = (await reserve(opened)).id
    async with ExecLog(opened.history) as calls:
        await calls.started(kept, "exec", "x", CALLER)
        for _ in range(30):
            gone = (await reserve(opened)).id
            await calls.started(gone, "exec", "x", CALLER)
            await calls.flush()
            await opened.delete(gone)
        assert len(calls._since_prune) <= 6
        assert calls._since_prune[kept] == 1


async def test_a_broken_database_fails_no_call(
    opened: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    vm_id = (await reserve(opened)).id

    async def broken(*args: Any) -> None:
        raise OSError("disk full")

    async with ExecLog(opened.history) as calls:
        monkeypatch.setattr(calls._history, "write_calls", broken)
        calls.finished(await calls.started(vm_id, "exec", "x", CALLER), duration_ms=1)
        await calls.flush()
        monkeypatch.undo()
        await calls.started(vm_id, "exec", "y", CALLER)
        assert [entry.input for entry in (await calls.page(vm_id, limit=5)).entries] == ["y"]
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1 and "1 entries" in errors[0].getMessage()


async def test_memory_is_bounded_by_waiting(opened: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exec_log, "MAX_PENDING", 3)
    vm_id = (await reserve(opened)).id
    async with ExecLog(opened.history) as calls:
        await asyncio.wait_for(asyncio.gather(*(calls.started(vm_id, "exec", "x", CALLER) for _ in range(10))), 20)
        assert len((await calls.page(vm_id, limit=20)).entries) == 10


async def test_activity_is_kept_up_to_a_number(opened: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "ACTIVITY_KEPT", 3)
    for n in range(5):
        await opened.history.record_activity("vm.stop", caller=CALLER, vm_id=f"vm-{n}", reason="asked")
    assert [entry.vm_id for entry in await opened.history.activity(10)] == ["vm-4", "vm-3", "vm-2"]
