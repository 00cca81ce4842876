"""Uploads, downloads and scripts through the whole channel."""

from __future__ import annotations

import asyncio
import io
import os
import tarfile
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
from agent_support import RunningAgent, agent_on, engines, script, sh

from rundatsheesh.manager.disk.archive import UploadLimits, check_upload
from rundatsheesh.manager.errors import GuestError, InvalidInput, NotFound
from rundatsheesh.manager.guest import Guest
from rundatsheesh.manager.model import UploadManifest

LIMITS = UploadLimits(compressed=1 << 30, content=1 << 40)


@pytest.fixture(scope="module", params=engines())
def agent(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    with agent_on(request.param, tmp_path_factory.mktemp("agent")) as running:
        yield running


@pytest_asyncio.fixture
async def guest(agent: RunningAgent) -> AsyncIterator[Guest]:
    async with agent.guest() as connected:
        yield connected


def archive(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            entry.mode = 0o640
            tar.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


async def upload(guest: Guest, dest: str, files: dict[str, bytes]) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield archive(files)

    checked = await check_upload(body(), io.BytesIO(), LIMITS)
    await guest.upload(dest, checked.manifest, checked.canonical_chunks())


async def download(guest: Guest, path: str) -> dict[str, bytes]:
    received = await guest.download(path)
    packed = b"".join([chunk async for chunk in received.chunks])
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        return {e.name.removeprefix("./"): tar.extractfile(e).read() for e in tar if e.isfile()}  # type: ignore[union-attr]


async def test_files_go_in_and_come_out(agent: RunningAgent, guest: Guest) -> None:
    files = {"a": b"", "d/b": os.urandom(3_000_000), "d/ü/c": b"text"}
    await upload(guest, "/home/user/project", files)
    assert await download(guest, "/workspace/project") == files
    found = (agent.workspace / "project/d/b").stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (1000, 1000, 0o640)
    assert await download(guest, "/workspace/project/a") == {"a": b""}


async def test_wrong_places(guest: Guest) -> None:
    await sh(guest, "ln -sfn /etc out; : > file")
    for path in ("/etc", "/workspace/out", "/workspace/../etc"):
        with pytest.raises(InvalidInput):
            await guest.download(path)
        with pytest.raises(InvalidInput):
            await upload(guest, path, {"a": b"x"})
    with pytest.raises(NotFound):
        await guest.download("/workspace/none")
    with pytest.raises(InvalidInput):
        await upload(guest, "/workspace/file", {"a": bytes(5_000_000)})


async def test_what_the_user_may_not_read_ends_in_an_error(guest: Guest) -> None:
    await sh(guest, "mkdir -p locked && : > locked/secret && chmod 0 locked/secret")
    with pytest.raises((GuestError, InvalidInput)):
        await download(guest, "/workspace/locked")
    await sh(guest, "chmod 700 locked/secret; rm -r locked")


async def test_an_upload_that_breaks_off_leaves_the_agent_well(guest: Guest) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield bytes(1000)
        raise InvalidInput("broken")

    with pytest.raises(InvalidInput):
        await guest.upload("/workspace", UploadManifest(1, 5000, 5000), broken())
    with pytest.raises((GuestError, InvalidInput)):
        await guest.upload("/workspace", UploadManifest(1, 5000, 5000), _one(bytes(10)))
    assert (await sh(guest, "echo well")).stdout == "well\n"


async def _one(chunk: bytes) -> AsyncIterator[bytes]:
    yield chunk


async def test_a_transfer_killed_by_the_user_is_an_error(guest: Guest) -> None:
    started = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        yield b""
        started.set()
        await sh(guest, "sleep 0.2; kill -9 -1")
        while True:
            yield bytes(100_000)

    with pytest.raises(GuestError):
        await guest.upload("/workspace", UploadManifest(1, 1 << 40, 1), endless())
    assert started.is_set()


async def test_a_download_that_is_left_ends_its_process(guest: Guest) -> None:
    await sh(guest, "head -c 20000000 /dev/zero > big")
    watch = guest.processes()
    assert await anext(watch) == 0
    received = await guest.download("/workspace/big")
    chunks = received.chunks
    await anext(chunks)
    await chunks.aclose()  # type: ignore[attr-defined]
    while await asyncio.wait_for(anext(watch), 10):
        pass
    await watch.aclose()  # type: ignore[attr-defined]
    await sh(guest, "rm big")


@pytest.mark.parametrize("language", ["ts", "js"])
async def test_scripts(guest: Guest, language: str) -> None:
    code = "console.log('out'); console.error('err'); result.set({a: [1, null], b: 'ü'})"
    seen = await script(guest, code, language=language)
    assert (seen.stdout, seen.stderr, seen.exit_code) == ("out\n", "err\n", 0)
    assert (seen.has_result, seen.result, seen.error) == (True, {"a": [1, None], "b": "ü"}, None)
    failed = await script(guest, "result.error(new TypeError('no'))", language=language)
    assert failed.exit_code != 0 and not failed.has_result
    assert (failed.error["name"], failed.error["message"]) == ("TypeError", "no")
    assert (await script(guest, "setInterval(() => 0, 10)", language=language, timeout_ms=1500)).exit_code == 124


async def test_scripts_by_path(guest: Guest) -> None:
    await sh(guest, "mkdir -p s && echo 'export const x = 41' > s/x.mjs")
    await sh(guest, "echo 'import {x} from \"./x.mjs\"; result.set(x + 1)' > s/main.mjs")
    seen = await script(guest, None, path="/home/user/s/main.mjs", language="ts")  # type: ignore[arg-type]
    assert seen.result == 42, seen
    with pytest.raises(NotFound):
        await script(guest, None, path="/workspace/none.mjs")  # type: ignore[arg-type]


async def test_the_agent_had_nothing_to_complain_about(agent: RunningAgent) -> None:
    assert agent.log() == ""
