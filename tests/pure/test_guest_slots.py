"""The transfer disk from the host's side: who has which part of it, and guests that lie about what is in it."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from struct import Struct

import pytest
from test_guest_lies import HELLO, FakeGuest, streams

from rundatsheesh.agent import wire
from rundatsheesh.manager.errors import GuestMisbehaved
from rundatsheesh.manager.guest import Guest, GuestGone
from rundatsheesh.manager.guest_slots import RING_BYTES, RING_SLOTS, SLOT_BYTES, TransferDisk, lent
from rundatsheesh.manager.model import UploadManifest

RINGS = 2
LENGTH = Struct(">I")
CONTENT = os.urandom(SLOT_BYTES * (RING_SLOTS + 1) + 12345)
TABLE = b"t" * 40


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    with open(path, "xb") as file:
        file.truncate(RINGS * RING_BYTES)
    return path


@contextlib.asynccontextmanager
async def connected(disk: Path) -> AsyncIterator[tuple[FakeGuest, Guest]]:
    async with streams() as (fake, stream):
        fake.hello = wire.encode(HELLO | {"transfer_disk": True})
        guest = await Guest.connect(stream, timeout=30, transfer_disk=disk)
        try:
            yield fake, guest
        finally:
            await guest.close()


def manifest(content: int) -> UploadManifest:
    return UploadManifest(entries=1, table_bytes=len(TABLE), content_bytes=content)


async def stream(content: bytes) -> AsyncIterator[bytes]:
    whole = TABLE + content
    for at in range(0, len(whole), 1 << 18):
        yield whole[at : at + (1 << 18)]


async def request(fake: FakeGuest) -> tuple[int, int]:
    """The call, and where its ring begins."""
    number, body = await asyncio.wait_for(fake.requests.get(), 30)
    ring = body["ring"]
    assert isinstance(ring, dict)
    assert (ring["slots"], ring["slot_bytes"]) == (RING_SLOTS, SLOT_BYTES)
    return number, ring["offset"]


async def frame(fake: FakeGuest) -> wire.Event:
    """The next that is no credit."""
    while (event := await asyncio.wait_for(fake.others.get(), 30)).kind == wire.WINDOW_MORE:
        continue
    return event


async def test_an_upload_takes_no_slot_that_is_not_free_and_begins_its_content_with_one(disk: Path) -> None:
    async with connected(disk) as (fake, guest):
        task = asyncio.ensure_future(guest.upload("/workspace", manifest(len(CONTENT)), stream(CONTENT)))
        number, offset = await request(fake)
        received: list[bytes] = []
        while len(b"".join(received)) < len(TABLE) + len(CONTENT):
            assert fake.others.empty()
            fake.send(fake.end.data(number, wire.SLOT, b"\0"))
            event = await frame(fake)
            assert event.stream == wire.SLOT
            (length,) = LENGTH.unpack(event.payload)
            with open(disk, "rb") as file:
                file.seek(offset + len(received) % RING_SLOTS * SLOT_BYTES)
                received.append(file.read(length))
        assert received[0] == TABLE
        assert b"".join(received) == TABLE + CONTENT
        assert (await frame(fake)).kind == wire.END
        fake.send(fake.end.reply(number, b"{}"))
        await task


async def test_a_download_frees_what_was_read_and_nothing_earlier(disk: Path) -> None:
    async with connected(disk) as (fake, guest):
        opening = asyncio.ensure_future(guest.download("/workspace"))
        number, offset = await request(fake)
        parts = [CONTENT[at : at + SLOT_BYTES] for at in range(0, len(CONTENT), SLOT_BYTES)]
        with open(disk, "r+b", buffering=0) as file:
            for slot, part in enumerate(parts[:RING_SLOTS]):
                file.seek(offset + slot * SLOT_BYTES)
                file.write(part)
                fake.send(fake.end.data(number, wire.SLOT, LENGTH.pack(len(part))))
            chunks = (await opening).chunks
            got = bytearray(await anext(chunks))
            for slot, part in enumerate(parts[RING_SLOTS:], start=RING_SLOTS):
                assert fake.others.empty() or slot > RING_SLOTS
                while len(got) <= (slot - RING_SLOTS + 1) * SLOT_BYTES:
                    got += await anext(chunks)
                assert (await frame(fake)).payload == b"\0"
                file.seek(offset + slot % RING_SLOTS * SLOT_BYTES)
                file.write(part)
                fake.send(fake.end.data(number, wire.SLOT, LENGTH.pack(len(part))))
            fake.send(fake.end.reply(number, b"{}"))
            async for chunk in chunks:
                got += chunk
        assert got == CONTENT


@pytest.mark.parametrize(
    "lengths", [[0], [SLOT_BYTES + 1], [0xFFFFFFFF], [512] * (RING_SLOTS + 1)], ids=["none", "more", "huge", "many"]
)
async def test_slots_that_do_not_exist_end_the_channel(disk: Path, lengths: list[int]) -> None:
    async with connected(disk) as (fake, guest):
        opening = asyncio.ensure_future(guest.download("/workspace"))
        number, _ = await request(fake)
        fake.send(fake.end.data(number, wire.SLOT, b"".join(LENGTH.pack(length) for length in lengths)))
        with pytest.raises(GuestMisbehaved):
            await (await opening).chunks.__anext__()
        assert isinstance(await asyncio.wait_for(guest.wait_closed(), 30), GuestMisbehaved)


async def test_more_free_slots_than_there_are_end_the_channel(disk: Path) -> None:
    async with connected(disk) as (fake, guest):
        task = asyncio.ensure_future(guest.upload("/workspace", manifest(len(CONTENT)), stream(CONTENT)))
        number, _ = await request(fake)
        fake.send(fake.end.data(number, wire.SLOT, bytes(RING_SLOTS + 1)))
        with pytest.raises(GuestMisbehaved):
            await task


async def test_small_uploads_and_agents_without_a_disk_keep_to_the_channel(disk: Path) -> None:
    async with connected(disk) as (fake, guest):
        task = asyncio.ensure_future(guest.upload("/workspace", manifest(3), stream(b"abc")))
        number, body = await fake.requests.get()
        assert "ring" not in body
        assert (await frame(fake)).payload == TABLE + b"abc"
        fake.send(fake.end.reply(number, b"{}"))
        await task
    async with streams() as (fake, there):
        guest = await Guest.connect(there, timeout=30, transfer_disk=disk)
        task = asyncio.ensure_future(guest.upload("/workspace", manifest(len(CONTENT)), stream(CONTENT)))
        _, body = await fake.requests.get()
        assert "ring" not in body
        await guest.close()
        with pytest.raises(GuestGone):
            await task


async def test_a_ring_is_lent_again_once_both_have_let_go_of_it(disk: Path) -> None:
    async with connected(disk) as (fake, guest):
        downloads = [asyncio.ensure_future(guest.download("/workspace")) for _ in range(RINGS + 1)]
        calls = [await fake.requests.get() for _ in downloads]
        offsets = {body["ring"]["offset"] for _, body in calls[:RINGS]}  # type: ignore[index]
        assert len(offsets) == RINGS and "ring" not in calls[RINGS][1]
        downloads[0].cancel()
        await asyncio.gather(downloads[0], return_exceptions=True)
        another = asyncio.ensure_future(guest.download("/workspace"))
        assert "ring" not in (await fake.requests.get())[1]  # somebody in the guest may still write to it
        fake.send(fake.end.error(calls[0][0], wire.encode({"code": "cancelled", "message": "m", "details": {}})))
        await guest_has_heard(fake, guest)
        last = asyncio.ensure_future(guest.download("/workspace"))
        assert (await request(fake))[1] == calls[0][1]["ring"]["offset"]  # type: ignore[index]
        await guest.close()
        await asyncio.gather(*downloads, another, last, return_exceptions=True)


async def test_the_disk_is_closed_with_the_channel_whatever_is_lent(disk: Path) -> None:
    async with connected(disk) as (fake, guest):
        opening = asyncio.ensure_future(guest.download("/workspace"))
        number, _ = await request(fake)
        fake.send(fake.end.data(number, wire.SLOT, LENGTH.pack(SLOT_BYTES)))
        chunks = (await opening).chunks
        await anext(chunks)
        await guest.close()
        assert str(disk) not in open_files()
        with pytest.raises(GuestGone):
            await anext(chunks)


def test_what_was_transferred_takes_no_room_afterwards(disk: Path) -> None:
    transfer = TransferDisk(disk)
    with lent(transfer) as ring:
        assert ring is not None
        ring.write(0, 0, memoryview(bytes(b"x" * SLOT_BYTES)))
        assert ring.read(RING_SLOTS, 0, 5) == b"xxxxx"
        ring.release()
        assert disk.stat().st_blocks > 0
    assert (disk.stat().st_blocks, disk.stat().st_size) == (0, RINGS * RING_BYTES)
    transfer.close()


async def guest_has_heard(fake: FakeGuest, guest: Guest) -> None:
    ping = asyncio.ensure_future(guest.ping(5))
    number, _ = await fake.requests.get()
    fake.send(fake.end.reply(number, b"{}"))
    await ping


def open_files() -> list[str]:
    return [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
