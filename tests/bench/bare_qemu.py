"""QEMU and nothing else: `-incoming` of the template that the engine uses, with the same devices, as root, without a
cgroup, namespaces, a record or rules. What the engine does besides shows in the difference."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from channel import make_record

from rundatsheesh.bench.connection import milliseconds
from rundatsheesh.bench.schedule import Contender
from rundatsheesh.manager.engines import qemu_args, qemu_files
from rundatsheesh.manager.engines.qemu import Qemu, _resume
from rundatsheesh.manager.engines.qemu_args import Clone, Descriptors
from rundatsheesh.manager.engines.qmp import Qmp
from rundatsheesh.manager.guest import Guest
from rundatsheesh.manager.host import tap
from rundatsheesh.manager.settings import Settings
from rundatsheesh.manager.vms_host import VmHost
from rundatsheesh.manager.vms_running import CONNECT_TIMEOUT

MIB = 1 << 20


def clone(host: VmHost, settings: Settings, scratch: Path) -> Contender:
    """From the start of the process to the agent's first reply. The template exists after the engine's first start."""
    engine = host.engines["qemu"]
    assert isinstance(engine, Qemu)

    async def measure() -> Mapping[str, float]:
        record = make_record(host, settings, engine.name)
        template = await engine.templates.get(engine._key(record), _refuse)
        with ExitStack() as held:
            memory, state = held.enter_context(template.opened())
            files = held.enter_context(_files(scratch, engine._boot_files(record).root, memory))
            argv = qemu_args.command(engine._hardware(record), files, Clone(state), record.slot.guest_mac)
            started = time.perf_counter()
            process = await asyncio.create_subprocess_exec(*argv, pass_fds=[*files.all(), state])
        try:
            # First, for the template was saved with somebody there; a clone would have to be told otherwise.
            stream = await asyncio.open_unix_connection(str(scratch / "agent.sock"))
            qmp = await Qmp.connect(scratch / "qmp.sock")
            await _resume(qmp, Clone(state))
            guest = await Guest.connect(stream, timeout=CONNECT_TIMEOUT)
            took = milliseconds(started)
            await guest.close()
            await qmp.close()
        finally:
            process.kill()
            await process.wait()
        return {"bare_clone": took}

    return measure


async def _refuse() -> None:
    raise AssertionError("the engine starts first, and makes the template")


@contextmanager
def _files(scratch: Path, root: Path, memory: int) -> Iterator[Descriptors]:
    """What the engine gives a machine, as plain files."""
    for name in ("qmp.sock", "agent.sock"):  # of the machine before
        (scratch / name).unlink(missing_ok=True)
    with ExitStack() as held:
        for name, size in (("workspace", 1024 * MIB), ("transfer", qemu_files.TRANSFER_BYTES), ("console", 0)):
            with open(scratch / name, "wb") as file:
                file.truncate(size)
        yield Descriptors(
            memory=memory,
            root=held.enter_context(qemu_files.opened(root, os.O_RDONLY)),
            console=held.enter_context(qemu_files.opened(scratch / "console", os.O_WRONLY | os.O_APPEND)),
            qmp=held.enter_context(qemu_files.listening(scratch / "qmp.sock")),
            agent=held.enter_context(qemu_files.listening(scratch / "agent.sock")),
            network=held.enter_context(tap.temporary()),
            transfer=held.enter_context(qemu_files.opened(scratch / "transfer", os.O_RDWR)),
            workspace=held.enter_context(qemu_files.opened(scratch / "workspace", os.O_RDWR)),
        )
