"""The cpio archive that Linux unpacks as its initial root file system ("newc", see the kernel's buffer-format.rst)."""

from __future__ import annotations

import stat
from collections.abc import Iterable
from dataclasses import dataclass

MAGIC = b"070701"
TRAILER = "TRAILER!!!"
ALIGNMENT = 4


@dataclass(frozen=True, slots=True)
class Entry:
    """One file, directory or device, owned by root. `mode` holds the type and the permissions."""

    path: str  # relative, "/"-separated
    mode: int
    content: bytes = b""
    device: tuple[int, int] = (0, 0)  # major, minor


def directory(path: str, permissions: int = 0o755) -> Entry:
    return Entry(path, stat.S_IFDIR | permissions)


def file(path: str, content: bytes, permissions: int = 0o644) -> Entry:
    return Entry(path, stat.S_IFREG | permissions, content)


def archive(entries: Iterable[Entry]) -> bytes:
    """The entries in the order given; parents must precede what is in them.

    The same entries make the same bytes. Several archives may follow one another: the kernel unpacks them in turn.
    """
    out = bytearray()
    for number, entry in enumerate([*entries, Entry(TRAILER, 0)], start=1):
        _append(out, entry, 0 if entry.path == TRAILER else number)
    return bytes(out)


def _append(out: bytearray, entry: Entry, inode: int) -> None:
    name = entry.path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    # inode, mode, uid, gid, links, mtime, size, device of the file system, device of the file, name's length, checksum
    fields = (inode, entry.mode, 0, 0, links, 0, len(entry.content), 0, 0, *entry.device, len(name), 0)
    out += MAGIC + b"".join(b"%08X" % value for value in fields) + name
    _pad(out)
    out += entry.content
    _pad(out)


def _pad(out: bytearray) -> None:
    out += bytes(-len(out) % ALIGNMENT)
