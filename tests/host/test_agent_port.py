"""The agent on a character device: a terminal in raw mode stands for the virtio-serial port."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import socket
import tty
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from agent_support import native_agent, sh

from rundatsheesh.agent import wire
from rundatsheesh.manager.guest import Guest, GuestGone


class Port:
    """Connects one client after the other to the device, as QEMU does with a socket."""

    def __init__(self, device: int) -> None:
        self.device = device

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Guest]:
        here, there = socket.socketpair()
        reader, writer = await asyncio.open_unix_connection(sock=there)
        relay = asyncio.create_task(self._relay(reader))
        loop = asyncio.get_running_loop()
        loop.remove_reader(self.device)
        loop.add_reader(self.device, lambda: writer.write(os.read(self.device, 1 << 16)))
        guest = await Guest.connect(await asyncio.open_unix_connection(sock=here), timeout=20)
        try:
            yield guest
        finally:
            await guest.close()
            loop.remove_reader(self.device)
            await relay
            writer.transport.abort()
            await asyncio.sleep(0)

    async def _relay(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionResetError):
            while data := await reader.read(2048):
                await asyncio.to_thread(os.write, self.device, data)


@pytest.fixture
def port(tmp_path: Path) -> Iterator[Port]:
    ours, theirs = pty.openpty()
    tty.setraw(theirs)
    try:
        with native_agent(tmp_path, "--port", os.ttyname(theirs)):
            yield Port(ours)
    finally:
        os.close(ours)
        os.close(theirs)


async def test_calls_over_a_device(port: Port) -> None:
    async with port.client() as guest:
        await guest.ping(10)
        seen = await sh(guest, "head -c 300000 /dev/zero | tr '\\0' x; echo end >&2")
        assert (len(seen.stdout), seen.stderr, seen.exit_code) == (300_000, "end\n", 0)


@pytest.mark.parametrize(
    "stale",
    [
        b"garbage that is no frame",
        b"\x07\0\0\0\x01\0\0\xff\xff half a frame",
        wire.HostEnd(bytes(16)).greeting()[:-3],
        wire.HostEnd(bytes(16)).greeting(),
        wire.HostEnd(bytes(16)).greeting() + b"\x04\0\0\0\x01\0\0\0\x10{",
    ],
    ids=["garbage", "torn frame", "torn greeting", "unread greeting", "torn request"],
)
async def test_a_client_comes_after_one_that_left_in_the_middle(port: Port, stale: bytes) -> None:
    os.write(port.device, stale[-2000:])
    for _ in range(2):
        async with port.client() as guest:
            assert (await sh(guest, "echo well")).stdout == "well\n"


async def test_commands_of_a_client_that_left_are_ended(port: Port) -> None:
    async with port.client() as first:
        running = asyncio.create_task(sh(first, "sleep 951"))
        watch = first.processes()
        while not await asyncio.wait_for(anext(watch), 10):
            pass
    with pytest.raises(GuestGone):
        await running
    async with port.client() as second:
        watch = second.processes()
        while await asyncio.wait_for(anext(watch), 10):
            pass
