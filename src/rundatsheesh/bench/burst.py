"""Many creates at once, and how everybody else fares meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Event
from typing import Any

from rundatsheesh.bench.connection import Box, Connection, UnexpectedAnswerError, milliseconds
from rundatsheesh.bench.results import Results
from rundatsheesh.bench.stats import percentile

REFUSALS = (429, 503)
PAUSE = 0.02  # seconds between two looks at a server that should answer at once
QUIET_CALLS = 15


@dataclass
class _Burst:
    """What became of the creates. Refused means: at once, and with the time after which to try again."""

    boxes: list[Box] = field(default_factory=list)
    took: list[float] = field(default_factory=list)
    refused: int = 0
    failed: list[str] = field(default_factory=list)


async def measure_burst(results: Results, url: str, api_key: str, size: int, **fields: Any) -> Mapping[str, int]:
    """Create `size` VMs at once and delete them; what became of them. One more VM and /health are asked meanwhile."""
    own = Box.create(Connection(url, api_key), **fields)
    try:
        quiet = [await asyncio.to_thread(_exec, own) for _ in range(QUIET_CALLS)]
        burst, health, calls = await _storm(url, api_key, size, own, fields)
    finally:
        own.delete()
        own.connection.close()
    for key, values in (("exec_quiet", quiet), ("burst_exec", calls), ("burst_create", burst.took)):
        for value in values:
            results.add({key: value})
    results.add({"burst_health": percentile(health, 0.99), "burst_failed": len(burst.failed)})
    return {"asked": size, "made": len(burst.took), "refused": burst.refused, "failed": len(burst.failed)}


async def _storm(
    url: str, api_key: str, size: int, own: Box, fields: Mapping[str, Any]
) -> tuple[_Burst, list[float], list[float]]:
    over = Event()
    burst = _Burst()
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(size + 2) as threads:
        health = loop.run_in_executor(threads, _ask_until, over, Connection(url, api_key))
        calls = loop.run_in_executor(threads, _exec_until, over, own)
        creates = [loop.run_in_executor(threads, _create, burst, Connection(url, api_key), fields) for _ in range(size)]
        try:
            await asyncio.gather(*creates)
        finally:
            over.set()
            ended = await asyncio.gather(*(loop.run_in_executor(threads, box.delete) for box in burst.boxes))
        seen = await health, await calls
    for box in burst.boxes:
        box.connection.close()
    assert len(ended) == len(burst.boxes)
    return burst, *seen


def _create(burst: _Burst, connection: Connection, fields: Mapping[str, Any]) -> None:
    started = time.perf_counter()
    try:
        box = Box.create(connection, **fields)
    except UnexpectedAnswerError as error:
        if error.status in REFUSALS and "retry-after" in connection.answered:
            burst.refused += 1
        else:
            burst.failed.append(str(error))
        connection.close()
        return
    burst.took.append(milliseconds(started))
    burst.boxes.append(box)


def _ask_until(over: Event, connection: Connection) -> list[float]:
    took = []
    while not over.wait(PAUSE):
        started = time.perf_counter()
        connection.ask("GET", "/health")
        took.append(milliseconds(started))
    connection.close()
    return took or [0.0]


def _exec_until(over: Event, box: Box) -> list[float]:
    took = []
    while not over.wait(PAUSE):
        took.append(_exec(box))
    return took


def _exec(box: Box) -> float:
    started = time.perf_counter()
    box.run("exec", cmd="true")
    return milliseconds(started)
