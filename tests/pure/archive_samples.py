"""Tar archives made byte by byte, so that tests can make those that no tar program writes."""

from __future__ import annotations

import gzip

POSIX, GNU, V7 = b"ustar\x0000", b"ustar  \x00", bytes(8)
END = bytes(1024)


def header(
    name: bytes,
    *,
    kind: bytes = b"0",
    size: int | bytes = 0,
    mode: int | bytes = 0o644,
    mtime: int | bytes = 1_700_000_000,
    magic: bytes = POSIX,
    prefix: bytes = b"",
    link: bytes = b"",
    checksum: bytes | None = None,
    tail: bytes = bytes(12),
) -> bytes:
    """One header block; numbers given as bytes go in as they are."""
    block = bytearray(512)
    block[0 : len(name)] = name
    block[100:108] = mode if isinstance(mode, bytes) else b"%07o\0" % mode
    block[108:124] = b"0001750\0" * 2
    block[124:136] = size if isinstance(size, bytes) else b"%011o\0" % size
    block[136:148] = mtime if isinstance(mtime, bytes) else b"%011o\0" % mtime
    block[148:156] = b" " * 8
    block[156:157] = kind
    block[157 : 157 + len(link)] = link
    block[257:265] = magic
    block[345 : 345 + len(prefix)] = prefix
    block[500:512] = tail
    assert len(block) == 512
    block[148:156] = b"%06o\0 " % sum(block) if checksum is None else checksum
    return bytes(block)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def file(name: bytes, content: bytes = b"hello", **fields: object) -> bytes:
    return header(name, size=len(content), **fields) + padded(content)  # type: ignore[arg-type]


def directory(name: bytes, **fields: object) -> bytes:
    return header(name, kind=b"5", mode=0o755, **fields)  # type: ignore[arg-type]


def record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    while len(b"%d" % length) + len(key) + len(value) + 3 != length:
        length += 1
    return b"%d %s=%s\n" % (length, key, value)


def pax(*records: bytes, kind: bytes = b"x") -> bytes:
    return file(b"pax", b"".join(records), kind=kind)


def gnu_long(name: bytes, kind: bytes = b"L") -> bytes:
    return file(b"././@LongLink", name + b"\0", kind=kind, magic=GNU)


def tgz(*blocks: bytes) -> bytes:
    return gzip.compress(b"".join(blocks) + END, 6)
