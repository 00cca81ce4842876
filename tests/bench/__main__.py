"""`make bench`: start servers, measure them as their client and the bare runtime beside them, and tell the outcome.

Two servers, one with a warm pool and one without; the bare runtimes and one VM without a server take turns with them.
Ends within ten minutes, and leaves nothing but its report.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import channel
import phases
from bare import Runsc
from load import KEY, measure_cycles, measure_idle

from rundatsheesh import __version__
from rundatsheesh.bench import report, svg
from rundatsheesh.bench.burst import measure_burst
from rundatsheesh.bench.connection import Box, Connection
from rundatsheesh.bench.results import Results
from rundatsheesh.manager.build import AGENT
from rundatsheesh.manager.build.agent import find_agent
from rundatsheesh.manager.build.image import find_image
from rundatsheesh.manager.guest import Guest
from rundatsheesh.manager.host.tools import find_runsc
from rundatsheesh.manager.settings import Settings
from server_support import Server

REPOSITORY = Path(__file__).parents[2]
WARM_TARGET = 2
DISK_MB = 1024


@dataclass(frozen=True)
class Size:
    """How much of everything. Seconds are shares of the whole, for phases that can end early."""

    rounds: int
    idle: int
    cycles: int
    burst: int
    seconds: float  # for each of four phases
    cycle_seconds: float


QUICK = Size(rounds=20, idle=20, cycles=50, burst=30, seconds=60.0, cycle_seconds=60.0)
FULL = Size(rounds=40, idle=100, cycles=1000, burst=100, seconds=60.0, cycle_seconds=200.0)


def main() -> int:
    arguments = _arguments()
    results = Results()
    started = time.monotonic()
    load = os.getloadavg()[0]
    notes = asyncio.run(_measure(results, arguments))
    facts = {
        "version": __version__,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "engine": arguments.engine,
        "host": {"cpus": os.cpu_count(), "kernel": platform.release(), "load_before": round(load, 2)},
        "seconds": round(time.monotonic() - started),
        "notes": notes,
    }
    print(report.text(results))
    _write(arguments.out, results, facts)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--engine", choices=("gvisor", "qemu"), default="gvisor", help="of qemu, the clones alone")
    parser.add_argument("--full", action="store_true", help="100 idle VMs, 100 creates at once, 1,000 cycles")
    parser.add_argument("--rounds", type=int, help="calls of each kind")
    parser.add_argument("--idle", type=int, help="VMs that do nothing; 0 leaves it out")
    parser.add_argument("--cycles", type=int, help="creates and deletes; 0 leaves it out")
    parser.add_argument("--burst", type=int, help="creates at once; 0 leaves it out")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs", help="where benchmark.json and .svg go")
    arguments = parser.parse_args()
    chosen = FULL if arguments.full else QUICK
    names = ("rounds", "idle", "cycles", "burst")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    arguments.size = Size(**{**chosen.__dict__, **given})
    return arguments


async def _measure(results: Results, arguments: argparse.Namespace) -> list[str]:
    size: Size = arguments.size
    settings = Settings(_env_file=None)
    notes: list[str] = []
    with _directories() as (storage, runtime), _servers(storage, runtime, arguments) as (warm, cold):
        bench = phases.Bench(
            results=results,
            warm=warm,
            cold=cold,
            runsc=_runsc(settings, storage / "bare"),
            scratch=storage / "scratch",
            fields={"engine": arguments.engine},
            rounds=size.rounds,
            warm_target=WARM_TARGET,
        )
        bench.scratch.mkdir()
        own = channel.settings_in(storage / "own", runtime / "own", settings)
        async with channel.host(own) as host:
            if host.engines["qemu"].available().usable:
                _say("clones: server, engine alone, QEMU alone")
                await phases.clones(bench, host, own, size.seconds)
            if arguments.engine == "qemu":
                return notes
            _say("creates: warm, cold, bare")
            await phases.creates(bench, size.seconds)
            async with channel.vm(host, own, arguments.engine) as running, running.call() as guest:
                await _compare(bench, guest, size.seconds)
        notes += await _load(bench, size)
    return notes


async def _compare(bench: phases.Bench, guest: Guest, seconds: float) -> None:
    """One VM of a server, and one whose agent is talked to directly."""
    box = Box.create(Connection(bench.cold.url, KEY), diskSizeMb=DISK_MB, **bench.fields)
    try:
        _say("calls: HTTP, channel, bare")
        await phases.calls(bench, box, guest, seconds)
        _say("scripts: run-ts, run-js, bare")
        await phases.scripts(bench, box, seconds)
        _say("transfers: HTTP, channel, tar")
        await phases.transfers(bench, box, guest, seconds)
    finally:
        await asyncio.to_thread(box.delete)
        box.connection.close()


async def _load(bench: phases.Bench, size: Size) -> list[str]:
    """Bursts, rest, repetition."""
    notes = []
    fields = dict(bench.fields)
    if size.burst:
        _say(f"{size.burst} creates at once")
        outcome = await measure_burst(bench.results, bench.warm.url, KEY, size.burst, **fields)
        notes.append("burst: " + ", ".join(f"{number} {what}" for what, number in outcome.items()))
    if size.idle:
        _say(f"{size.idle} idle VMs")
        await measure_idle(bench.results, bench.cold, size.idle, fields)
        notes.append(f"idle VMs: {size.idle}")
    if size.cycles:
        _say(f"{size.cycles} cycles of create and delete")
        done = await measure_cycles(bench.results, bench.cold, size.cycles, size.cycle_seconds, fields)
        notes.append(f"cycles of create and delete: {done}")
    return notes


@contextmanager
def _directories() -> Iterator[tuple[Path, Path]]:
    """Short names: paths of sockets end at 107 bytes."""
    storage = Path(tempfile.mkdtemp(prefix="rdsb-"))
    runtime = Path("/run") / f"rdsb-{secrets.token_hex(3)}"
    try:
        yield storage, runtime
    finally:
        shutil.rmtree(storage)
        shutil.rmtree(runtime, ignore_errors=True)


@contextmanager
def _servers(storage: Path, runtime: Path, arguments: argparse.Namespace) -> Iterator[tuple[Server, Server]]:
    """As they are by default, but for the pool of the second, and for limits that only a benchmark meets."""
    common = {"RATE_LIMIT_PER_MINUTE": "0", "ENGINE": arguments.engine, "MAX_VMS": "150", "LOG_LEVEL": "info"}
    pool = arguments.engine == "gvisor"  # clones come from templates, and are measured without
    warm = {**common, "ENABLE_WARM_POOL": str(pool).lower(), "WARM_POOL_TARGET": str(WARM_TARGET)}
    with (
        Server(storage / "warm", runtime / "warm", warm).running() as first,
        Server(storage / "cold", runtime / "cold", {**common, "ENABLE_WARM_POOL": "false"}).running() as second,
    ):
        yield first, second


def _runsc(settings: Settings, directory: Path) -> Runsc:
    image, program = find_image(settings.image_cache), find_runsc(settings.image_cache)
    agent = image and find_agent(settings.image_cache, image, AGENT)
    if image is None or program is None or agent is None:
        raise SystemExit("no guest image or runsc on this host: run `rds setup`")
    directory.mkdir()
    return Runsc(program.resolve(), image.root, agent, directory, settings.gvisor_platform)


def _write(directory: Path, results: Results, facts: dict[str, Any]) -> None:
    """benchmark.json and benchmark.svg; another engine's beside them."""
    name = "benchmark" if facts["engine"] == "gvisor" else f"benchmark-{facts['engine']}"
    subtitle = (
        f"{facts['engine']}, {facts['host']['cpus']} CPUs, {facts['at'][:10]}: medians, lines to the 95th percentile"
    )
    (directory / f"{name}.json").write_text(report.as_json(results, facts), encoding="utf-8")
    (directory / f"{name}.svg").write_text(svg.picture(results, "Beside the bare runtime", subtitle), encoding="utf-8")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
