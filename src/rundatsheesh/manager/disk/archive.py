"""Uploads: a caller's tar.gz is checked while it arrives, and handed to the guest in a form that needs no parsing.

The compressed bytes are spooled to a file on the host while they are decompressed and checked; nothing reaches the
guest before the whole archive has passed. Then the spool is read again and sent as the *canonical stream*:

    table     one record per entry: struct RECORD (kind `d` or `f`, mode, length of path, size, mtime in ns), the path
    content   the bytes of the files, in the order of the table, with nothing between

The guest's `agent/files.py` is the other end. It never sees the caller's tar, so no two parsers can disagree about it.
"""

from __future__ import annotations

import asyncio
import struct
from array import array
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import BinaryIO, TypeAlias

from isal import igzip_lib

from rundatsheesh.manager.disk.tar_reader import TarEntry, TarReader, refusal
from rundatsheesh.manager.errors import InvalidInput, StorageFull, TooLarge
from rundatsheesh.manager.model import UploadManifest

RECORD = struct.Struct(">cHHQq")
# Where each file's content starts in the unpacked stream, and its size, one after the other.
Places: TypeAlias = "array[int]"
CHUNK = 256 << 10  # bytes of one piece of the canonical stream at most
_BATCH = 256 << 10  # compressed bytes of one step in a thread: large enough that the hop to it costs nothing

MAX_ENTRIES = 65_536
# Files, directories and the directories that names imply; each becomes an inode, and a node in memory here.
MAX_NODES = 2 * MAX_ENTRIES
MAX_TABLE_BYTES = 16 << 20
# A member of 20 bytes decompresses to nothing; block compressors write one member per 64 KiB.
MAX_GZIP_MEMBERS = 262_144
GZIP_MAGIC = b"\x1f\x8b"
# Deflate cannot exceed 1032:1. Real files stay far below 200:1, small ones may be anything.
BOMB_RATIO = 200
BOMB_FLOOR = 128 << 20
# Headers and padding of the largest table, and the padding behind the end of the archive.
_TAR_OVERHEAD = MAX_ENTRIES * 4096

# The type stubs declare the exception class as an instance.
_GzipError: type[Exception] = igzip_lib.IsalError  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class UploadLimits:
    """Bytes. `content` is what the workspace can hold at all."""

    compressed: int
    content: int


@dataclass(frozen=True, slots=True)
class CheckedUpload:
    """An archive that may be written to a guest. Valid as long as its spool is open."""

    manifest: UploadManifest
    _table: bytes
    _places: Places
    _spool: BinaryIO

    async def canonical_chunks(self) -> AsyncIterator[bytes]:
        """The canonical stream: `manifest.stream_bytes` bytes in pieces of at most CHUNK. One reader at a time."""
        for start in range(0, len(self._table), CHUNK):
            yield self._table[start : start + CHUNK]
        content = _content(self._spool, self._places)
        while piece := await asyncio.to_thread(next, content, b""):
            yield piece


async def check_upload(body: AsyncIterable[bytes], spool: BinaryIO, limits: UploadLimits) -> CheckedUpload:
    """Read `body` to its end into `spool` (an empty, buffered file open for both; the caller closes it).

    Raises InvalidInput (`archive_invalid`, `details["reason"]` says which rule) for an archive that is not taken,
    TooLarge (`upload_too_large`) as soon as more than `limits.compressed` bytes came, StorageFull when the spool
    cannot grow. Memory is bounded whatever the archive; decompression happens in a thread.
    """
    check = _Check(limits)
    steps = _Steps()
    batch: list[bytes] = []
    size = 0
    try:
        async for chunk in body:
            check.count_compressed(len(chunk))
            batch.append(chunk)
            size += len(chunk)
            if size >= _BATCH:
                await steps.start(partial(_take_batch, check, spool, batch))
                batch, size = [], 0
        await steps.start(partial(_take_batch, check, spool, batch))
        await steps.join()
    finally:
        await steps.settle()
    return CheckedUpload(*check.finish(), spool)


def _take_batch(check: _Check, spool: BinaryIO, batch: list[bytes]) -> None:
    try:
        for chunk in batch:
            spool.write(chunk)
        spool.flush()
    except OSError as error:
        raise StorageFull(f"the host cannot keep the upload while it is checked: {error.strerror}") from error
    for chunk in batch:
        check.feed(chunk)


class _Steps:
    """Work in a thread, one step at a time, while the caller prepares the next."""

    def __init__(self) -> None:
        self._running: asyncio.Future[None] | None = None

    async def start(self, work: Callable[[], None]) -> None:
        """Begin `work` once the step before it is done; raises what that step raised."""
        await self.join()
        self._running = asyncio.get_running_loop().run_in_executor(None, work)

    async def join(self) -> None:
        if self._running:
            await asyncio.shield(self._running)
            self._running = None

    async def settle(self) -> None:
        """Wait for the thread whatever becomes of its work, so that nobody closes the spool under it."""
        if self._running:
            await asyncio.wait([self._running])
            self._running.exception()  # seen, whether or not `join` raised it


class _Check:
    """The whole check, fed with compressed bytes in order."""

    def __init__(self, limits: UploadLimits) -> None:
        self._limits = limits
        self._gzip = GzipReader()
        self._tar = TarReader()
        self._tree = _Tree()
        self._table = bytearray()
        self._places = array("Q")
        self._entries = 0
        self._received = 0
        self._compressed = 0
        self._unpacked = 0
        self._content = 0

    def count_compressed(self, size: int) -> None:
        self._received += size
        if self._received > self._limits.compressed:
            raise TooLarge(f"the upload is larger than {self._limits.compressed} bytes", code="upload_too_large")

    def feed(self, compressed: bytes) -> None:
        self._compressed += len(compressed)
        for piece in self._gzip.feed(compressed):
            self._unpacked += len(piece)
            self._refuse_bomb()
            for entry in self._tar.feed(piece):
                self._take(entry)

    def finish(self) -> tuple[UploadManifest, bytes, Places]:
        self._gzip.close()
        self._tar.close()
        manifest = UploadManifest(self._entries, table_bytes=len(self._table), content_bytes=self._content)
        return manifest, bytes(self._table), self._places

    def _refuse_bomb(self) -> None:
        if self._unpacked > max(BOMB_FLOOR, BOMB_RATIO * self._compressed):
            raise refusal("bomb", f"it expands to more than {BOMB_RATIO} times its size")
        if self._unpacked > self._limits.content + _TAR_OVERHEAD:
            raise self._too_big()

    def _take(self, entry: TarEntry) -> None:
        self._content += entry.size
        if self._content > self._limits.content:
            raise self._too_big()
        if not entry.path:
            return  # the root itself: the destination exists or is made, and keeps its mode
        self._entries += 1
        self._tree.add(entry.path, entry.is_dir)
        if entry.size:
            self._places.extend((entry.start, entry.size))
        kind = b"d" if entry.is_dir else b"f"
        self._table += RECORD.pack(kind, entry.mode, len(entry.path), entry.size, entry.mtime_ns) + entry.path
        if self._entries > MAX_ENTRIES or len(self._table) > MAX_TABLE_BYTES:
            raise refusal("too_many_entries", f"it holds more than {MAX_ENTRIES} entries, or very long names")

    def _too_big(self) -> InvalidInput:
        return refusal("too_big_unpacked", f"it unpacks to more than the workspace's {self._limits.content} bytes")


@dataclass(slots=True)
class _Tree:
    """Every name of the archive, to see whether a file stands where another entry needs a directory, or twice.

    Nodes are kept flat, (number of the parent, last part of the name) → number; a file's number is negative.
    """

    _nodes: dict[tuple[int, bytes], int] = field(default_factory=dict)
    _last: tuple[bytes, int] = (b"", 0)  # the directory of the entry before, which most often is the next one's too

    def add(self, path: bytes, is_dir: bool) -> None:
        directory, _, name = path.rpartition(b"/")
        if directory != self._last[0]:
            self._last = directory, self._directory(directory, path)
        parent = self._last[1]
        if not is_dir and (parent, name) in self._nodes:
            raise refusal("duplicate", "the name stands twice in the archive", path)
        self._node(parent, name, path, is_dir=is_dir)

    def _directory(self, directory: bytes, path: bytes) -> int:
        parent = 0
        for part in directory.split(b"/") if directory else ():
            parent = self._node(parent, part, path, is_dir=True)
        return parent

    def _node(self, parent: int, name: bytes, path: bytes, *, is_dir: bool) -> int:
        number = self._nodes.get((parent, name))
        if number is None:
            number = (len(self._nodes) + 1) * (1 if is_dir else -1)
            if len(self._nodes) >= MAX_NODES:
                raise refusal("too_many_entries", f"it needs more than {MAX_NODES} files and directories")
            self._nodes[parent, name] = number
        elif number < 0:
            raise refusal("duplicate", "another entry of the archive is a file where this one needs a directory", path)
        return number


class GzipReader:
    """An incremental gzip reader that takes several members, and nothing between or behind them."""

    def __init__(self) -> None:
        self._member: igzip_lib.IgzipDecompressor | None = None
        self._members = 0
        self._begin = b""  # of the member that is read now, as much as GZIP_MAGIC has

    def feed(self, compressed: bytes) -> Iterator[bytes]:
        """Yield what the bytes decompress to, in pieces of at most CHUNK; checks each member's checksum."""
        while compressed:
            if self._member is None:
                self._member = self._next_member()
            self._begin += compressed[: len(GZIP_MAGIC) - len(self._begin)]
            yield from self._inflate(self._member, compressed)
            compressed = b""
            if self._member.eof:
                compressed = self._member.unused_data
                self._member = None

    def close(self) -> None:
        if self._members == 0:
            raise refusal("truncated", "it is empty")
        if self._member is None:
            return
        if not GZIP_MAGIC.startswith(self._begin):
            raise refusal("not_gzip", self._not_gzip())
        follows = "" if self._members == 1 else ", or something else follows the archive"
        raise refusal("truncated", f"the gzip stream is cut off{follows}")

    def _not_gzip(self) -> str:
        return "it is not gzip" if self._members == 1 else "something that is not gzip follows the archive"

    def _next_member(self) -> igzip_lib.IgzipDecompressor:
        self._members += 1
        self._begin = b""
        if self._members > MAX_GZIP_MEMBERS:
            raise refusal("bomb", "it consists of too many gzip members")
        return igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)

    def _inflate(self, member: igzip_lib.IgzipDecompressor, compressed: bytes) -> Iterator[bytes]:
        while True:
            try:
                piece = member.decompress(compressed, CHUNK)
            except _GzipError as error:
                raise refusal("not_gzip", f"{self._not_gzip()}, or it is damaged ({error})") from error
            if piece:
                yield piece
            if member.eof or member.needs_input:
                return
            compressed = b""


def _content(spool: BinaryIO, places: Places) -> Iterator[bytes]:
    """The files' bytes, from a spool that passed the check, without a second look at its headers. One piece per step,
    so that a step is short."""
    spool.seek(0)
    gzip = GzipReader()
    cut = _Cut(places)
    while compressed := spool.read(CHUNK):
        for piece in gzip.feed(compressed):
            if content := cut.feed(piece):
                yield content


class _Cut:
    """Takes the contents out of an unpacked stream."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self._next = 0  # in `places`
        self._fed = 0

    def feed(self, piece: bytes) -> bytes:
        begin, self._fed = self._fed, self._fed + len(piece)
        found = []
        while self._next < len(self._places) and (start := self._places[self._next]) < self._fed:
            end = start + self._places[self._next + 1]
            found.append(piece[max(0, start - begin) : end - begin])
            if end > self._fed:
                break  # it goes on in the next piece
            self._next += 2
        return b"".join(found)
