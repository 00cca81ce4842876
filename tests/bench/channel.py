"""One VM of the real engine without a server: its agent's channel in this very process, with nothing in between."""

from __future__ import annotations

import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, BinaryIO, cast

from rundatsheesh.bench.connection import milliseconds
from rundatsheesh.bench.samples import STREAM_MB
from rundatsheesh.bench.schedule import Contender
from rundatsheesh.manager import app
from rundatsheesh.manager.build.image import find_image
from rundatsheesh.manager.disk.archive import CheckedUpload, UploadLimits, check_upload
from rundatsheesh.manager.guest import ExecRequest, Guest
from rundatsheesh.manager.model import (
    FIRST_USABLE_SLOT,
    SLOTS_PER_BLOCK,
    EgressPolicy,
    Isolation,
    ProvisionMode,
    Slot,
    State,
    VmRecord,
    VmSpec,
    new_vm_id,
    now,
)
from rundatsheesh.manager.net import Network
from rundatsheesh.manager.settings import Settings
from rundatsheesh.manager.vms_host import VmHost
from rundatsheesh.manager.vms_layout import Layout, load_node
from rundatsheesh.manager.vms_running import CONNECT_TIMEOUT, RunningVm

DISK_MB = 1024
TRUE = ExecRequest(cmd="true", timeout_ms=60_000, max_output=1 << 20, cwd="/workspace", env={})


@asynccontextmanager
async def host(settings: Settings) -> AsyncIterator[VmHost]:
    """All that a manager has of the host, with a block of network slots of its own."""
    layout = Layout(settings.storage_root, settings.runtime_dir)
    layout.prepare()
    node = load_node(settings.storage_root)
    network = Network(node.block, dns_server=settings.dns_server_ip)
    await network.open()
    try:
        yield VmHost(node, layout, network, app.engines(settings))
    finally:
        await network.close()


@asynccontextmanager
async def vm(host: VmHost, settings: Settings, engine: str) -> AsyncIterator[RunningVm]:
    """Booted as a server boots it; nothing of it is left afterwards."""
    record = make_record(host, settings, engine)
    await host.make_disk(record)
    try:
        running = await host.boot(record, _ended)
        yield running
        await running.end("measured")
    finally:
        await host.release(record)


def clone(host: VmHost, settings: Settings) -> Contender:
    """The engine alone, to its agent's first reply. Disk and tap exist beforehand; no record, no rules and no identity
    are made."""
    engine = host.engines["qemu"]

    async def measure() -> Mapping[str, float]:
        record = make_record(host, settings, engine.name)
        await host.make_disk(record)
        try:
            await host.network.attach(record.slot, record.spec.policy, kind=engine.link)
            started = time.perf_counter()
            machine = await engine.start(record, host.files(record))
            guest = await Guest.connect(await machine.connect(), timeout=CONNECT_TIMEOUT)
            took = milliseconds(started)
            await guest.close()
            await machine.stop(0)
        finally:
            await host.release(record)
        return {"engine_clone": took}

    return measure


def exec_true(guest: Guest) -> Contender:
    async def measure() -> Mapping[str, float]:
        started = time.perf_counter()
        await guest.exec(TRUE)
        return {"exec_channel": milliseconds(started)}

    return measure


def upload(guest: Guest, checked: CheckedUpload, spool: IO[bytes]) -> Contender:
    """The same bytes that a server would send, checked beforehand."""

    async def measure() -> Mapping[str, float]:
        spool.seek(0)
        started = time.perf_counter()
        await guest.upload("/workspace/source", checked.manifest, checked.canonical_chunks())
        return {"channel_upload": STREAM_MB / (time.perf_counter() - started)}

    return measure


def download(guest: Guest, path: str) -> Contender:
    async def measure() -> Mapping[str, float]:
        started = time.perf_counter()
        async for _ in (await guest.download(path)).chunks:
            pass
        return {"channel_download": STREAM_MB / (time.perf_counter() - started)}

    return measure


@asynccontextmanager
async def checked_upload(archive: bytes) -> AsyncIterator[tuple[CheckedUpload, IO[bytes]]]:
    async def body() -> AsyncIterator[bytes]:
        yield archive

    with tempfile.TemporaryFile(buffering=1 << 20) as spool:
        limits = UploadLimits(len(archive), DISK_MB << 20)
        yield await check_upload(body(), cast(BinaryIO, spool), limits), spool


def settings_in(directory: Path, runtime: Path, base: Settings) -> Settings:
    return base.model_copy(update={"storage_root": directory, "runtime_dir": runtime})


def make_record(host: VmHost, settings: Settings, engine: str) -> VmRecord:
    image = find_image(settings.image_cache)
    if image is None:
        raise FileNotFoundError("no guest image on this host: run `rds setup`")
    record = VmRecord(
        id=new_vm_id(),
        node_id=host.node.id,
        slot=Slot(max(host.node.block * SLOTS_PER_BLOCK, FIRST_USABLE_SLOT)),
        spec=VmSpec(cpu=1, mem_mb=256, disk_mb=DISK_MB, policy=EgressPolicy(), engine=engine, image_id=image.id),
        state=State.CREATING,
        isolation=Isolation.APPLICATION_KERNEL,
        provision_mode=ProvisionMode.BOOT,
        boot_id=None,
        reason=None,
        created_at=now(),
        started_at=None,
    )
    return replace(record, isolation=host.engine_of(record).isolation)


async def _ended(running: RunningVm, reason: str) -> None:
    """The next call to it fails, and says so."""
