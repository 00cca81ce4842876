"""Mounts and mount namespaces, by direct system calls: a mount takes microseconds where a `mount` process takes
milliseconds, and an error keeps its errno.

Everything here blocks for a moment; callers on the event loop go through `asyncio.to_thread`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path

from rundatsheesh.manager.host import namespaces
from rundatsheesh.manager.host.libc import check, failure, libc
from rundatsheesh.manager.host.namespaces import Kind

_MNT_DETACH = 2
_SYS_OPEN_TREE = 428  # on every architecture; not every C library has a name for it
_AT_FDCWD = -100
_OPEN_TREE_CLONE = 1
UNMOUNT_TIMEOUT = 10.0  # seconds


class Flag(IntFlag):
    """Of mount(2)."""

    NONE = 0
    READ_ONLY = 1
    NOSUID = 2
    NODEV = 4
    NOEXEC = 8
    REMOUNT = 32
    NOATIME = 1024
    BIND = 4096
    RECURSIVE = 16384
    PRIVATE = 1 << 18
    SHARED = 1 << 20


@dataclass(frozen=True, slots=True)
class Mounted:
    """One line of /proc/self/mountinfo."""

    target: Path
    device: tuple[int, int]  # major, minor
    fstype: str
    super_options: frozenset[str]


@dataclass(frozen=True, slots=True)
class Bind:
    """A part of the host's file tree to show inside a private namespace. `target` is relative to the new root and must
    exist there already, as a directory or a file like the source."""

    source: Path
    target: str
    read_only: bool = False
    recursive: bool = False  # with the mounts below it; such a bind cannot be read-only


def mount(source: str, target: Path, fstype: str = "", flags: Flag = Flag.NONE, data: str = "") -> None:
    """mount(2); raises OSError that names the target."""
    result = libc.mount(
        source.encode(), os.fsencode(target), fstype.encode() or None, ctypes.c_ulong(flags), data.encode() or None
    )
    check(result, target)


def clone(target: Path) -> int:
    """A descriptor of a copy of the mount at the target. It is attached nowhere, and goes with its last descriptor
    unless somebody moves it to a place first (open_tree(2), Linux 5.2). Raises OSError."""
    path = ctypes.c_char_p(os.fsencode(target))
    flags = ctypes.c_uint(_OPEN_TREE_CLONE | os.O_CLOEXEC)
    fd: int = libc.syscall(ctypes.c_long(_SYS_OPEN_TREE), ctypes.c_int(_AT_FDCWD), path, flags)
    check(fd, target)
    return fd


def unmount(target: Path, *, lazy: bool = False) -> bool:
    """Unmount the topmost mount at the target; False when nothing is mounted there. Raises OSError(EBUSY) while a
    process uses it, unless it is `lazy`: then that process keeps it."""
    if libc.umount2(os.fsencode(target), _MNT_DETACH if lazy else 0) == 0:
        return True
    error = failure(target)
    if error.errno in (errno.EINVAL, errno.ENOENT):  # not a mount point; no such path
        return False
    raise error


def unmount_all(target: Path) -> None:
    """Unmount everything at the target. Whoever is about to close a file in it keeps it busy for a moment: a reader of
    its logs, or the kernel with the descriptors that a killed process had under way. Nothing announces that they have
    finished. Raises OSError(EBUSY) when it stays busy."""
    deadline = time.monotonic() + UNMOUNT_TIMEOUT
    while True:
        try:
            while unmount(target):
                continue
            return
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.002)


def parse_mountinfo(text: str) -> list[Mounted]:
    """The mounts in a mountinfo file, in mount order."""
    return [_parse_line(line) for line in text.splitlines()]


def list_mounts() -> list[Mounted]:
    return parse_mountinfo(Path("/proc/self/mountinfo").read_text(errors="surrogateescape"))


def find_mount(target: Path) -> Mounted | None:
    """The topmost mount at exactly this path."""
    found = [m for m in list_mounts() if m.target == target]
    return found[-1] if found else None


def private_namespace(root: Path, binds: Sequence[Bind], hidden: Sequence[str] = ()) -> int:
    """Make a mount namespace that holds `root` as its root directory, the binds, and nothing else of the host.

    `hidden` names directories below the new root that appear empty and read-only. Returns a descriptor of the
    namespace (for setns), which lives as long as the descriptor or a process in it. Raises OSError. Because nothing
    else is mounted in it, it keeps no other file system of the host busy.
    """
    return namespaces.in_thread_of_its_own(lambda: _build_namespace(root, binds, hidden))


def _build_namespace(root: Path, binds: Sequence[Bind], hidden: Sequence[str]) -> int:
    # Opened before, because /proc of the new root may hide it. What it leads to is looked up when it is used.
    own = os.open("/proc/thread-self/ns", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _move_into_namespace(root, binds, hidden)
        return os.open("mnt", os.O_RDONLY | os.O_CLOEXEC, dir_fd=own)
    finally:
        os.close(own)


def _move_into_namespace(root: Path, binds: Sequence[Bind], hidden: Sequence[str]) -> None:
    namespaces.enter_new(Kind.MOUNT)
    mount("none", Path("/"), flags=Flag.RECURSIVE | Flag.PRIVATE)
    mount(str(root), root, flags=Flag.BIND)
    for bind in binds:
        target = root / bind.target
        mount(str(bind.source), target, flags=Flag.BIND | (Flag.RECURSIVE if bind.recursive else Flag.NONE))
        if bind.read_only:
            mount("none", target, flags=Flag.REMOUNT | Flag.BIND | Flag.READ_ONLY | Flag.NOSUID | Flag.NODEV)
    for name in hidden:
        mount("none", root / name, "tmpfs", Flag.READ_ONLY | Flag.NOSUID | Flag.NODEV | Flag.NOEXEC, "size=4k")
    # With "." twice the old root is stacked on the new one, from where it is taken off: pivot_root(2), NOTES.
    os.chdir(root)
    check(libc.pivot_root(b".", b"."), root)
    check(libc.umount2(b".", _MNT_DETACH), root)


def _parse_line(line: str) -> Mounted:
    fields = line.split(" ")
    dash = fields.index("-", 6)  # before it stands a variable number of optional fields
    major, minor = fields[2].split(":")
    return Mounted(
        target=Path(_unescape(fields[4])),
        device=(int(major), int(minor)),
        fstype=fields[dash + 1],
        super_options=frozenset(fields[dash + 3].split(",")),
    )


def _unescape(text: str) -> str:
    """Undo the octal escapes of space, tab, newline and backslash."""
    for code in ("\\040", "\\011", "\\012", "\\134"):
        text = text.replace(code, chr(int(code[1:], 8)))
    return text
