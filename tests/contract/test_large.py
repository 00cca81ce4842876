"""A gigabyte in and out again: streamed, not held."""

from __future__ import annotations

import hashlib
import os
import tarfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from server_support import Box, Server

SIZE = 1 << 30
PIECE = 1 << 20
GROWTH = 50 << 20
PATTERN = os.urandom(PIECE + 4096)


def pieces() -> Iterator[bytes]:
    """Bytes that do not compress: each piece is the pattern from another place on."""
    for number in range(SIZE // PIECE):
        start = number * 4
        yield PATTERN[start : start + PIECE]


def archive() -> Iterator[bytes]:
    """A tar.gz of one file, made as it is read."""
    member = tarfile.TarInfo("large")
    member.size = SIZE
    packer = zlib.compressobj(0, wbits=31)
    yield packer.compress(member.tobuf())
    for piece in pieces():
        yield packer.compress(piece)
    yield packer.compress(bytes(1024)) + packer.flush()


def memory(pid: int, field: str = "VmRSS") -> int:
    """Bytes of resident memory; VmHWM is the most since `forget_peak`."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) << 10


def forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def test_a_gigabyte_up_and_down(server: Server) -> None:
    box = server.create("gvisor", diskSizeMb=1200)
    try:
        box.output("true")
        forget_peak(server.pid)
        before, begun = memory(server.pid), time.monotonic()
        assert box.upload(archive(), "/workspace/in").status_code == 204
        uploaded = time.monotonic()
        expected = hashlib.sha256()
        for piece in pieces():
            expected.update(piece)
        received, size = digest_of_download(box)
        print(f"1 GiB up in {uploaded - begun:.1f} s, down in {time.monotonic() - uploaded:.1f} s")
        assert size == SIZE and received == expected.hexdigest()
        grown = memory(server.pid, "VmHWM") - before
        print(f"the server grew by {grown >> 20} MiB")
        assert grown < GROWTH, f"the server grew by {grown >> 20} MiB"
        assert not list((server.storage / "spool").iterdir())
    finally:
        box.delete()


def digest_of_download(box: Box) -> tuple[str, int]:
    """SHA-256 and size of the one file, without keeping it."""
    digest, size = hashlib.sha256(), 0
    download = box.server.http.stream("GET", f"{box.path}/files/download", params={"path": "/workspace/in/large"})
    with download as answer, tarfile.open(fileobj=Reader(answer.iter_raw(PIECE)), mode="r|gz") as tar:
        content = tar.extractfile(tar.next())
        while piece := content.read(PIECE):
            digest.update(piece)
            size += len(piece)
    return digest.hexdigest(), size


class Reader:
    """An iterator of bytes as a file."""

    def __init__(self, source: Iterator[bytes]) -> None:
        self._source = source
        self._left = b""

    def read(self, size: int) -> bytes:
        while len(self._left) < size and (piece := next(self._source, b"")):
            self._left += piece
        taken, self._left = self._left[:size], self._left[size:]
        return taken
