"""How full this host is: for the admin's overview."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from rundatsheesh.manager.model import HIDDEN, Overview, State, VmRecord

# A stopped VM holds its disk, but neither CPU nor memory.
_HOLDS_MEMORY = frozenset({State.CREATING, State.STARTING, State.RUNNING, State.STOPPING, State.PAUSED})


async def collect_overview(records: Iterable[VmRecord], *, storage_root: Path, max_vms: int) -> Overview:
    """Counts over `records` (those nobody has are left out), and what the host has and has left."""
    shown = [record for record in records if record.state not in HIDDEN]
    holding = [record.spec for record in shown if record.state in _HOLDS_MEMORY]
    disk = await asyncio.to_thread(shutil.disk_usage, storage_root)
    memory = await asyncio.to_thread(_read_meminfo)
    return Overview(
        vms_by_state=Counter(record.state for record in shown),
        max_vms=max_vms,
        cpu_allocated=sum(spec.cpu for spec in holding),
        cpu_host=os.cpu_count() or 1,
        load_1m=os.getloadavg()[0],
        mem_allocated_mb=sum(spec.mem_mb for spec in holding),
        mem_host_mb=memory["MemTotal"] // 1024,
        mem_available_mb=memory["MemAvailable"] // 1024,
        disk_total=disk.total,
        disk_free=disk.free,
    )


def _read_meminfo() -> dict[str, int]:
    """/proc/meminfo in KiB."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
