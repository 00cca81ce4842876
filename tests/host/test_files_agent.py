"""Uploads and downloads through a real agent: the host's check, the channel, the process that works as the user."""

from __future__ import annotations

import asyncio
import gzip
import io
import os
import tarfile
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from agent_support import RunningAgent, agent_on, engines, sh

from rundatsheesh.manager.disk.archive import UploadLimits, check_upload
from rundatsheesh.manager.errors import InvalidInput, NotFound, RdsError
from rundatsheesh.manager.guest import Guest

LIMITS = UploadLimits(compressed=1 << 30, content=1 << 40)


@pytest.fixture(params=engines())
def agent(request: pytest.FixtureRequest) -> Iterator[RunningAgent]:
    with tempfile.TemporaryDirectory(prefix="rds-agent-") as directory:
        Path(directory).chmod(0o755)  # the guest's user comes through it
        with agent_on(request.param, Path(directory)) as running:
            yield running


def packed(members: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz", compresslevel=1) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), 0o640
            tar.addfile(info, io.BytesIO(content))
    return made.getvalue()


async def upload(guest: Guest, archive: bytes, dest: str = "/workspace") -> None:
    async def body() -> AsyncIterator[bytes]:
        yield archive

    with tempfile.TemporaryFile() as spool:
        checked = await check_upload(body(), spool, LIMITS)
        await guest.upload(dest, checked.manifest, checked.canonical_chunks())


async def download(guest: Guest, path: str) -> bytes:
    return b"".join([chunk async for chunk in (await guest.download(path)).chunks])


async def test_there_and_back(agent: RunningAgent) -> None:
    content = {"a/b.bin": os.urandom(700_001), "empty": b"", "d/" * 30 + "f": b"deep", "grüße \x7f": b"name"}
    async with agent.guest() as guest:
        await upload(guest, packed(content), "/home/user/project")
        listed = await sh(guest, "stat -c '%u:%g %a %n' /workspace/project/a /workspace/project/empty")
        assert listed.stdout == "1000:1000 755 /workspace/project/a\n1000:1000 640 /workspace/project/empty\n"
        with tarfile.open(fileobj=io.BytesIO(await download(guest, "/workspace/project"))) as tar:
            got = {m.name[2:]: file.read() for m in tar if (file := tar.extractfile(m)) is not None}
        assert got == content
        await upload(guest, gzip.compress(await download(guest, "/workspace/project")), "/workspace/again")
        assert (await sh(guest, "diff -r project again && ls -A | sort")).stdout == "again\nproject\n"


async def test_many_small_and_one_large(agent: RunningAgent) -> None:
    async with agent.guest() as guest:
        await upload(guest, packed({f"d{i % 20}/f{i}": b"%d" % i for i in range(1000)}), "/workspace/many")
        assert (await sh(guest, "find many -type f | wc -l; cat many/d19/f999")).stdout == "1000\n999"
        with tarfile.open(fileobj=io.BytesIO(await download(guest, "/workspace/many"))) as tar:
            assert sum(member.isreg() for member in tar) == 1000
        large = os.urandom(1 << 20) * 48
        await upload(guest, packed({"large": large}))
        assert large in await download(guest, "/workspace/large")


async def test_refusals_are_typed_and_write_nothing(agent: RunningAgent) -> None:
    async with agent.guest() as guest:
        await sh(guest, "ln -s /tmp out; echo 1 > file; mkfifo fifo")
        before = (await sh(guest, "ls -lA --time-style=full-iso . /tmp")).stdout
        for dest in ("/etc", "/workspace/../tmp", "/workspace/out", "/workspace/out/x"):
            with pytest.raises(InvalidInput) as refused:
                await upload(guest, packed({"first": b"1"}), dest)
            assert refused.value.code == "path_outside_workspace"
        with pytest.raises(InvalidInput) as refused:
            await upload(guest, packed({"first": b"1", "out/x": b"2"}))
        assert refused.value.code == "path_outside_workspace"
        with pytest.raises(RdsError) as conflict:
            await upload(guest, packed({"first": b"1", "file/x": b"2"}))
        assert "not a directory" in conflict.value.message
        for path, kind in {
            "/workspace/none": NotFound,
            "/etc/passwd": InvalidInput,
            "/workspace/out": InvalidInput,
        }.items():
            with pytest.raises(kind):
                await download(guest, path)
        assert (await sh(guest, "ls -lA --time-style=full-iso . /tmp")).stdout == before


async def test_a_transfer_that_is_killed_or_cancelled_is_over(agent: RunningAgent) -> None:
    async with agent.guest() as guest:
        await sh(guest, "truncate -s 3G huge")
        files = await guest.download("/workspace/huge")
        chunks = aiter(files.chunks)
        assert await anext(chunks)
        await sh(guest, "kill -9 -1")  # the user may: the process that reads for it is its own
        with pytest.raises(RdsError):
            async for _ in chunks:
                pass
        waiting = asyncio.create_task(download(guest, "/workspace/huge"))
        await asyncio.sleep(0.3)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert (await sh(guest, "echo alive")).stdout == "alive\n"
        count = "for p in /proc/[0-9]*; do stat -c %u $p; done 2>/dev/null | grep -c 1000"
        deadline = time.monotonic() + 10
        while int((await sh(guest, count)).stdout) > 4:  # this command's own; a program that is just started, at most
            assert time.monotonic() < deadline, "a transfer goes on"
