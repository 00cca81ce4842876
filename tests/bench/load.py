"""What a server holds and costs: idle VMs, and whether it grows with what it has done."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rundatsheesh.bench.connection import Box, Connection, milliseconds
from rundatsheesh.bench.results import Results
from rundatsheesh.bench.stats import median
from server_support import Server

KEY = "dev-key"
MIB = 1 << 20
CGROUPS = Path("/sys/fs/cgroup")
MEMORY_STAT = "memory.stat"
AT_ONCE = 3  # creates and deletes side by side; more only queue on a few cores
QUERIES = 30
SETTLE = 3.0  # seconds in which VMs come to rest
WATCH = 10.0  # seconds over which the CPU of idle VMs is taken
WARM_UP_CYCLES = 10
WARM = "SELECT count(*) FROM vms WHERE state = 'WARM' AND boot_id IS NOT NULL"
FILLED = 60.0  # seconds within which a warm pool is full again
LOOK = 0.05  # seconds between two looks


async def wait_for_warm(server: Server, target: int) -> None:
    """Return when the pool holds so many VMs. Raises TimeoutError."""
    async with asyncio.timeout(FILLED):
        while await asyncio.to_thread(_warm, server.storage / "rds.db") < target:
            await asyncio.sleep(LOOK)


def _warm(database: Path) -> int:
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        found = int(connection.execute(WARM).fetchone()[0])
    connection.close()
    return found


async def measure_idle(results: Results, server: Server, number: int, fields: dict[str, Any]) -> None:
    """Memory and CPU of `number` VMs that do nothing, and of their manager."""
    boxes = await _in_parallel([_create] * number, server, fields)
    try:
        await asyncio.sleep(SETTLE)
        processes = list(members(server))
        before, started = cpu_seconds(processes), time.monotonic()
        await asyncio.sleep(WATCH)
        used = cpu_seconds(processes) - before
        results.add({"idle_cpu": 100 * used / (time.monotonic() - started)})
        results.add({"idle_memory": sum(map(working_set, memory_groups(processes))) / MIB / number})
        results.add({"manager_memory": proportional_memory(server.pid) / MIB})
    finally:
        await _in_parallel([box.delete for box in boxes], None, {})
        for box in boxes:
            box.connection.close()


async def measure_cycles(results: Results, server: Server, number: int, seconds: float, fields: dict[str, Any]) -> int:
    """Create and delete `number` VMs, fewer where `seconds` do not suffice; whether anything of the manager grew. How
    many there were."""
    await _cycles(server, WARM_UP_CYCLES, fields)
    await asyncio.to_thread(_query, results, server, "query_before")
    files = _descriptors(server.pid)
    end, done, memory = time.monotonic() + seconds, 0, [proportional_memory(server.pid)]
    while done < number and (time.monotonic() < end or done < WARM_UP_CYCLES):
        await _cycles(server, WARM_UP_CYCLES, fields)
        done += WARM_UP_CYCLES
        memory.append(proportional_memory(server.pid))
    await asyncio.to_thread(_query, results, server, "query_after")
    half = memory[len(memory) // 2 :]
    growth = (half[-1] - half[0]) / MIB
    results.add({"growth_memory": growth, "growth_files": _descriptors(server.pid) - files})
    return done


def members(server: Server) -> Iterable[int]:
    """The processes of all VMs of a server: those in its cgroups."""
    node = f"rundatsheesh-{server.node['id']}"
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if node in (entry / "cgroup").read_text():
                yield int(entry.name)
        except (FileNotFoundError, ProcessLookupError):
            continue


def memory_groups(pids: Iterable[int]) -> set[Path]:
    """Where the kernel keeps account of the memory of these processes. Their own mappings tell less: the processes of a
    guest share whole address spaces, each of which would count as often as it is shared."""
    groups = set()
    for pid in pids:
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            mount = CGROUPS / "memory" if controllers == "memory" else CGROUPS if not controllers else None
            if mount is not None and (mount / path.lstrip("/") / MEMORY_STAT).exists():
                groups.add(mount / path.lstrip("/"))
    return groups


def working_set(group: Path) -> int:
    """Bytes that are charged to the group, less the page cache that the kernel could drop at once."""
    usage = next(file for name in ("memory.usage_in_bytes", "memory.current") if (file := group / name).exists())
    pairs = (line.split() for line in (group / MEMORY_STAT).read_text().splitlines())
    counters = {name: int(value) for name, value in pairs}
    return int(usage.read_text()) - counters.get("total_inactive_file", counters.get("inactive_file", 0))


def proportional_memory(pid: int) -> int:
    """Bytes; what is shared is counted in parts."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no Pss of {pid}")


def cpu_seconds(pids: Iterable[int]) -> float:
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def _create(server: Server, fields: dict[str, Any]) -> Box:
    return Box.create(Connection(server.url, KEY), **fields)


def _cycle(server: Server, fields: dict[str, Any]) -> None:
    box = _create(server, fields)
    box.delete()
    box.connection.close()


async def _cycles(server: Server, number: int, fields: dict[str, Any]) -> None:
    await _in_parallel([_cycle] * number, server, fields)


async def _in_parallel(calls: list[Any], server: Server | None, fields: dict[str, Any]) -> list[Any]:
    """AT_ONCE of them at the same time; with `server` they are given it and the fields."""
    turn = asyncio.Semaphore(AT_ONCE)

    async def one(call: Any) -> Any:
        async with turn:
            return await (asyncio.to_thread(call) if server is None else asyncio.to_thread(call, server, fields))

    return await asyncio.gather(*map(one, calls))


def _query(results: Results, server: Server, key: str) -> None:
    connection = Connection(server.url, KEY)
    took = []
    for _ in range(QUERIES):
        started = time.perf_counter()
        connection.ask("GET", "/v1/vms")
        took.append(milliseconds(started))
    connection.close()
    results.add({key: median(took)})
