"""Cold boots of virtual machines in a row: `tests/bench/boots.py 100` says how many answered and how long they took.

Not a template's clone but a kernel's start, each to its agent's first reply. Stops at the first that does not answer,
with the end of its console; ends when the time is over, with as many as there were.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import cast

sys.path.insert(0, str(Path(__file__).parents[1]))

import channel

from rundatsheesh.bench.connection import milliseconds
from rundatsheesh.manager.engines.qemu import Qemu
from rundatsheesh.manager.guest import Guest
from rundatsheesh.manager.settings import Settings
from rundatsheesh.manager.vms_host import VmHost
from rundatsheesh.manager.vms_running import CONNECT_TIMEOUT


def main() -> int:
    parser = argparse.ArgumentParser(prog="boots.py", description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=100)
    parser.add_argument("--seconds", type=float, default=720.0, help="after which no other is begun")
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="rdsb-"))
    try:
        took = asyncio.run(_measure(scratch, arguments.count, arguments.seconds))
    finally:
        shutil.rmtree(scratch)
    print(f"{len(took)} cold boots, none hung: median {statistics.median(took):.0f} ms, most {max(took):.0f} ms")
    return 0


async def _measure(scratch: Path, count: int, seconds: float) -> list[float]:
    settings = channel.settings_in(scratch / "own", scratch / "run", Settings(_env_file=None))
    ends = time.monotonic() + seconds
    took: list[float] = []
    async with channel.host(settings) as host:
        engine = cast(Qemu, host.engines["qemu"])
        booting = Qemu(replace(engine.config, templates=False))
        while len(took) < count and time.monotonic() < ends:
            took.append(await _boot(host, settings, booting))
            print(f"{len(took)}: {took[-1]:.0f} ms", file=sys.stderr, flush=True)
    return took


async def _boot(host: VmHost, settings: Settings, engine: Qemu) -> float:
    """Milliseconds from nothing to the agent's first reply."""
    record = channel.make_record(host, settings, engine.name)
    await host.make_disk(record)
    try:
        await host.network.attach(record.slot, record.spec.policy, kind=engine.link)
        started = time.perf_counter()
        machine = await engine.start(record, host.files(record))
        try:
            guest = await Guest.connect(await machine.connect(), timeout=CONNECT_TIMEOUT)
        except Exception:
            print(host.files(record).console_log.read_text(errors="replace")[-3000:], file=sys.stderr)
            raise
        taken = milliseconds(started)
        await guest.close()
        await machine.stop(0)
    finally:
        await host.release(record)
    return taken


if __name__ == "__main__":
    sys.exit(main())
