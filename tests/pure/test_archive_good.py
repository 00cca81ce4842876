"""Archives as real programs write them pass, and the canonical stream carries exactly what is in them."""

from __future__ import annotations

import asyncio
import gzip
import io
import os
import struct
import subprocess
import tarfile
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from archive_samples import END, V7, directory, file, gnu_long, header, padded, pax, record, tgz
from hypothesis import given, settings
from hypothesis import strategies as st

from rundatsheesh.manager.disk import archive
from rundatsheesh.manager.disk.archive import CheckedUpload, UploadLimits, check_upload
from rundatsheesh.manager.errors import InvalidInput, StorageFull

LIMITS = UploadLimits(compressed=64 << 20, content=256 << 20)
Content = dict[bytes, tuple[int, int, bytes | None]]  # path → mode, mtime in ns, content (None: a directory)


async def check(data: bytes, step: int = 65536) -> CheckedUpload:
    async def body() -> AsyncIterator[bytes]:
        for start in range(0, len(data), step):
            yield data[start : start + step]

    return await check_upload(body(), io.BytesIO(), LIMITS)


async def unpack(upload: CheckedUpload) -> Content:
    chunks = [chunk async for chunk in upload.canonical_chunks()]
    assert all(0 < len(chunk) <= archive.CHUNK for chunk in chunks)
    stream = b"".join(chunks)
    assert len(stream) == upload.manifest.stream_bytes
    content: Content = {}
    position, start = 0, upload.manifest.table_bytes
    for _ in range(upload.manifest.entries):
        kind, mode, length, size, mtime = struct.unpack_from(">cHHQq", stream, position)
        position += struct.calcsize(">cHHQq") + length
        path = stream[position - length : position]
        content[path] = (mode, mtime, stream[start : start + size] if kind == b"f" else None)
        start += size
    assert (position, start) == (upload.manifest.table_bytes, len(stream))
    return content


def make_tree(root: Path) -> None:
    (root / "empty dir").mkdir()
    (root / "a/b/c").mkdir(parents=True)
    (root / "a/b/c/deep.bin").write_bytes(os.urandom(3 * 512))
    (root / "a/empty").touch()
    (root / "one-byte").write_bytes(b"1")
    (root / "big.bin").write_bytes(os.urandom(1_000_003))
    (root / "script.sh").write_text("#!/bin/sh\n")
    (root / "script.sh").chmod(0o4755)
    os.utime(root / "one-byte", ns=(0, 1_600_000_000_000_000_000))


def add_odd_names(root: Path) -> None:
    (root / ("long-" + "n" * 200)).write_text("long")
    (root / ("d" * 120) / ("e" * 120)).mkdir(parents=True)
    (root / ("d" * 120) / ("e" * 120) / "file").write_text("deep")
    (root / "grüße 日本 \n tab\t").write_text("unicode")
    Path(os.fsdecode(os.fsencode(root) + b"/latin-\xe9")).write_text("not utf-8")
    (root / "-rf").write_text("option")
    (root / "back\\slash").write_text("backslash")


def read_tree(root: Path, *, nanoseconds: bool) -> Content:
    found: Content = {}
    for path in root.rglob("*"):
        status = path.lstat()
        mtime = status.st_mtime_ns if nanoseconds else int(status.st_mtime) * 10**9
        content = None if path.is_dir() else path.read_bytes()
        found[os.fsencode(path.relative_to(root))] = (status.st_mode & 0o777, mtime, content)
    return found


@pytest.mark.parametrize("form", ["v7", "ustar", "gnu", "oldgnu", "posix"])
async def test_gnu_tar(form: str, tmp_path: Path) -> None:
    make_tree(tmp_path)
    if form in ("gnu", "oldgnu", "posix"):
        add_odd_names(tmp_path)
    made = subprocess.run(
        ["tar", f"--format={form}", "-czf", "-", "-C", tmp_path, "."], check=True, capture_output=True
    ).stdout
    upload = await check(made)
    assert await unpack(upload) == read_tree(tmp_path, nanoseconds=form == "posix")


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
async def test_python_tarfile(form: int, tmp_path: Path) -> None:
    make_tree(tmp_path)
    if form != tarfile.USTAR_FORMAT:
        add_odd_names(tmp_path)
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz", format=form) as tar:
        tar.add(tmp_path, arcname=".")
    got = await unpack(await check(made.getvalue()))
    want = read_tree(tmp_path, nanoseconds=False)
    # pax times are floating point in tarfile: exact to a microsecond
    assert {path: (mode, mtime // 10**9 * 10**9, data) for path, (mode, mtime, data) in got.items()} == want


async def test_git_archive_and_names_without_dot(tmp_path: Path) -> None:
    comment = pax(record(b"comment", b"0" * 40), kind=b"g")
    upload = await check(tgz(comment, directory(b"project/"), file(b"project/readme")))
    assert set(await unpack(upload)) == {b"project", b"project/readme"}


async def test_apple_style_records_are_read_past() -> None:
    extras = [record(b"LIBARCHIVE.xattr.com.apple.quarantine", b"abc"), record(b"SCHILY.dev", b"16777220")]
    upload = await check(tgz(pax(record(b"mtime", b"1700000000.123456789"), *extras), file(b"a")))
    assert await unpack(upload) == {b"a": (0o644, 1_700_000_000_123_456_789, b"hello")}


async def test_an_empty_archive_holds_nothing() -> None:
    for blocks in ((), (directory(b"./"),), (directory(b"."),), (bytes(9216),)):
        upload = await check(tgz(*blocks))
        assert (upload.manifest.entries, await unpack(upload)) == (0, {})


async def test_forms_of_the_old_and_the_odd() -> None:
    upload = await check(
        tgz(
            header(b"dir/", kind=b"\0", magic=V7),
            file(b"dir/v7", kind=b"\0", magic=V7),
            file(b"contiguous", kind=b"7"),
            file(b"x//y/./z"),
            file(b"name", prefix=b"pre/fix"),
            header(b"blank-numbers", size=bytes(12), mode=bytes(8), mtime=b" " * 12),
            header(b"spaces", size=b"          5 ") + padded(b"12345"),
            header(b"base256", size=b"\x80" + (5).to_bytes(11, "big")) + padded(b"12345"),
            header(b"before-1970", mtime=b"\xff" * 12),
            pax(record(b"mtime", b"-5.5"), record(b"size", b"5")) + file(b"pax-same-size"),
            gnu_long(b"l" * 200) + file(b"l" * 100),
            header(b"suid", mode=0o7777),
        )
    )
    content = await unpack(upload)
    assert set(content) == {
        *(b"dir", b"dir/v7", b"contiguous", b"x/y/z", b"pre/fix/name", b"blank-numbers", b"spaces", b"base256"),
        *(b"before-1970", b"pax-same-size", b"l" * 200, b"suid"),
    }
    assert content[b"base256"][2] == content[b"spaces"][2] == b"12345"
    assert content[b"before-1970"][1] == content[b"pax-same-size"][1] == 0
    assert content[b"suid"][0] == 0o777


async def test_many_members_are_one_stream() -> None:
    plain = file(b"a", os.urandom(5000)) + file(b"b") + END
    pieces = [gzip.compress(plain[i : i + 700]) for i in range(0, len(plain), 700)]
    assert set(await unpack(await check(b"".join(pieces), step=100))) == {b"a", b"b"}


names = st.lists(
    st.binary(min_size=1, max_size=60).filter(lambda part: not set(part) & set(b"/\0") and part not in (b".", b"..")),
    min_size=1,
    max_size=6,
).map(b"/".join)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        names, st.tuples(st.integers(0, 0o777), st.none() | st.binary(max_size=1500)), min_size=1, max_size=8
    ),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    st.integers(1, 2000),
)
async def test_whatever_is_packed_arrives(tree: dict[bytes, tuple[int, bytes | None]], form: int, step: int) -> None:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz", format=form, compresslevel=1) as tar:
        for path, (mode, content) in tree.items():
            info = tarfile.TarInfo(path.decode("utf-8", "surrogateescape"))
            info.mode, info.size = mode, len(content or b"")
            info.type = tarfile.REGTYPE if content is not None else tarfile.DIRTYPE
            tar.addfile(info, io.BytesIO(content or b""))
    files = {path for path, (_, content) in tree.items() if content is not None}
    clashes = any(other.startswith(path + b"/") for path in files for other in tree)
    try:
        got = await unpack(await check(made.getvalue(), step))
    except InvalidInput as refused:
        assert clashes and refused.details["reason"] == "duplicate"
    else:
        assert not clashes
        assert got == {path: (mode, 0, content) for path, (mode, content) in tree.items()}


async def test_the_event_loop_stays_free_and_memory_small(tmp_path: Path) -> None:
    """32 MiB in, with other tasks served meanwhile."""
    size = 32 << 20
    data = b"".join(
        [gzip.compress(header(b"big", size=size), 1), gzip.compress(os.urandom(1 << 20), 1) * 32, gzip.compress(END)]
    )
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    task = asyncio.create_task(other())
    started = time.monotonic()
    upload = await check(data)
    total = 0
    async for chunk in upload.canonical_chunks():
        total += len(chunk)
    took = time.monotonic() - started
    task.cancel()
    assert total == upload.manifest.stream_bytes == size + upload.manifest.table_bytes
    assert turns > 100 and took < 30


class SlowSpool(io.BytesIO):
    def __init__(self) -> None:
        super().__init__()
        self.entered, self.go, self.busy = threading.Event(), threading.Event(), False

    def write(self, data: Any) -> int:
        self.busy = True
        self.entered.set()
        assert self.go.wait(10)
        self.busy = False
        return super().write(data)


async def test_cancellation_waits_for_the_thread_on_the_spool() -> None:
    """Whoever cancels may close the spool: nothing writes to it any more."""
    spool = SlowSpool()

    async def body() -> AsyncIterator[bytes]:
        yield gzip.compress(header(b"big", size=8 << 20) + os.urandom(8 << 20), 0)
        await asyncio.Event().wait()

    task = asyncio.create_task(check_upload(body(), spool, LIMITS))
    await asyncio.to_thread(spool.entered.wait)
    task.cancel()
    for _ in range(5):
        await asyncio.sleep(0)
    assert spool.busy and not task.done()
    spool.go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not spool.busy


async def test_a_full_host_disk_is_told_as_such() -> None:
    with open("/dev/full", "r+b", buffering=0) as spool, pytest.raises(StorageFull):
        await check_upload(_once(tgz(file(b"a"))), spool, LIMITS)


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data
