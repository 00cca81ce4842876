"""Write a tar of a living tree: names of any bytes, constant memory, sizes that stay what the header said.

The format is GNU's, since its long names are bytes, where pax wants UTF-8.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from .job import CallFailed
from .paths import CHANGED, canonical, inside_workspace
from .slots import SECTOR, Ring

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, TypeVar

    T = TypeVar("T")

_BLOCK = 512
_NAME = 100  # bytes of a name, or of a link's target, that the header holds
_BUFFER = 1 << 18
_DIRECT_FROM = 1 << 18  # bytes from which a file is worth reading past the kernel's cache
_STEP = 3840  # bytes of a path that one open() takes; the kernel's limit is 4095
_MAX_OCTAL = 0o77777777777
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


def download(params: dict[str, Any], sink: int) -> None:
    """Write the tar of params["path"] to `sink`: the content of a directory, its names beginning with `./`, or one
    file under its own name. Raises CallFailed path_not_found, path_outside_workspace, invalid_input, path_unreadable.

    Files, directories and symbolic links; other things are left out, and so is what vanishes meanwhile.
    """
    send(params, SlotWriter(params["ring"]) if "ring" in params else PipeWriter(sink))


def send(params: dict[str, Any], writer: Writer) -> None:
    """`download`, into `writer`."""
    path = params["path"]
    real = os.fsencode(inside_workspace(path))
    try:
        found = os.lstat(real)
        if stat.S_ISDIR(found.st_mode):
            _add_tree(writer, os.open(real, _OPEN | os.O_DIRECTORY), found)
        elif stat.S_ISREG(found.st_mode):
            name = os.path.basename(os.fsencode(canonical(path))) or os.path.basename(real)
            _add_file(writer, name, _open_file(os.fsdecode(real)))
        else:
            raise CallFailed("invalid_input", f"{path!a} is neither a file nor a directory")
    except PermissionError:
        raise _unreadable(os.fsencode(path)) from None
    except OSError as error:
        if error.errno in CHANGED:
            raise CallFailed("path_conflict", f"{path!a} was changed during the download") from None
        raise
    writer.finish()


class Writer:
    """Headers, contents and their padding, each a multiple of _BLOCK."""

    def add(self, kind: bytes, name: bytes, found: os.stat_result, size: int = 0, target: bytes = b"") -> None:
        """A header; `size` bytes of content have to follow."""
        for letter, text in ((b"K", target), (b"L", name)):
            if len(text) > _NAME:
                self._put(_header(letter, b"././@LongLink", 0o644, (0, 0), len(text) + 1, 0) + _padded(text + b"\0"))
        mtime = max(0, int(found.st_mtime))
        mode = stat.S_IMODE(found.st_mode) & 0o777
        self._put(_header(kind, name[:_NAME], mode, (found.st_uid, found.st_gid), size, mtime, target[:_NAME]))

    def copy(self, fd: int, size: int) -> None:
        """`size` bytes of `fd`, zeros where it is shorter now, and the padding."""
        left = size - self._copy(fd, size)
        self._zeros(left + -size % _BLOCK)

    def finish(self) -> None:
        self._zeros(2 * _BLOCK)
        self._flush()

    def _zeros(self, size: int) -> None:
        while size > _BUFFER:
            self._put(bytes(_BUFFER))
            size -= _BUFFER
        self._put(bytes(size))

    def _copy(self, fd: int, size: int) -> int:
        """`size` bytes of `fd`, or what it has; the number."""
        raise NotImplementedError

    def _put(self, data: bytes | memoryview) -> None:
        raise NotImplementedError

    def _flush(self) -> None:
        raise NotImplementedError


class PipeWriter(Writer):
    def __init__(self, sink: int) -> None:
        self._sink = sink
        self._pending = bytearray()
        self._buffer = bytearray(_BUFFER)

    def _copy(self, fd: int, size: int) -> int:
        left = size
        while left and (got := os.readv(fd, [memoryview(self._buffer)[: min(left, _BUFFER)]])):
            self._put(memoryview(self._buffer)[:got])
            left -= got
        return size - left

    def _put(self, data: bytes | memoryview) -> None:
        """Small pieces are sent together, large ones at once and uncopied."""
        if len(data) >= _BUFFER // 4:
            self._flush()
            self._send(memoryview(data))
            return
        self._pending += data
        if len(self._pending) >= _BUFFER // 4:
            self._flush()

    def _flush(self) -> None:
        self._send(memoryview(bytes(self._pending)))
        self._pending.clear()

    def _send(self, view: memoryview) -> None:
        while view:
            view = view[os.write(self._sink, view) :]


class SlotWriter(Writer):
    def __init__(self, place: dict[str, Any]) -> None:
        self._ring = Ring(place)
        self._used = 0  # of the ring's buffer

    def _copy(self, fd: int, size: int) -> int:
        left = size
        direct = size >= _DIRECT_FROM and _set_direct(fd, True)
        while left:
            try:
                got = os.readv(fd, [self._room(left + -left % SECTOR if direct else left)])
            except OSError as error:
                if not direct or error.errno != errno.EINVAL:
                    raise
                direct = _set_direct(fd, False)  # the disk asks for more than SECTOR
                continue
            if got == 0:
                break
            got = min(got, left)
            self._advance(got)
            left -= got
            if direct and got % SECTOR:
                break  # it ends here now
        return size - left

    def _put(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            room = self._room(len(view))
            room[:] = view[: len(room)]
            view = view[len(room) :]
            self._advance(len(room))

    def _room(self, size: int) -> memoryview:
        return self._ring.buffer[self._used : self._used + size]

    def _advance(self, size: int) -> None:
        self._used += size
        if self._used == self._ring.slot_bytes:
            self._flush()

    def _flush(self) -> None:
        if self._used:
            self._ring.send(self._used)
            self._used = 0


def _set_direct(fd: int, direct: bool) -> bool:
    """Have a file read past the kernel's cache, which an emulated CPU fills slowly; whether that is so now."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | (os.O_DIRECT if direct else 0))
    except OSError:
        return False
    return direct


def _add_tree(writer: Writer, root: int, found: os.stat_result) -> None:
    """Depth first; of each directory first what is no directory. Memory grows with directories, not with files."""
    writer.add(b"5", b"./", found)
    waiting = [b"."]
    while waiting:
        name = waiting.pop()
        directory = _open_directory(root, name)
        if directory is None:
            continue
        try:
            below = []
            for entry in _entries(directory, name):
                path = name + b"/" + os.fsencode(entry.name)
                # By what the listing says: to ask for a file's status by name costs as much as to open it.
                if entry.is_file(follow_symlinks=False):
                    fd = _unless_changed(_open_file, directory, entry.name, stat.S_IFREG)
                    if fd is not None:
                        _add_file(writer, path, fd)
                elif (status := _status(entry, name)) is not None and stat.S_ISDIR(status.st_mode):
                    writer.add(b"5", path + b"/", status)
                    below.append(path)
                elif status is not None:
                    _add_other(writer, path, directory, entry.name, status)
            waiting.extend(reversed(below))
        finally:
            os.close(directory)


def _entries(directory: int, name: bytes) -> Iterator[os.DirEntry[str]]:
    try:
        listing = os.scandir(directory)
    except PermissionError:
        raise _unreadable(name) from None
    with listing:
        yield from listing


def _status(entry: os.DirEntry[str], name: bytes) -> os.stat_result | None:
    """None when it has vanished."""
    try:
        return entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None
    except PermissionError:
        raise _unreadable(name) from None


def _add_other(writer: Writer, path: bytes, directory: int, entry: str, status: os.stat_result) -> None:
    if stat.S_ISLNK(status.st_mode):
        target = _unless_changed(os.readlink, directory, entry, stat.S_IFLNK)
        if target is not None:
            writer.add(b"2", path, status, target=os.fsencode(target))


def _open_file(entry: str, *, dir_fd: int | None = None) -> int:
    return os.open(entry, _OPEN | os.O_NONBLOCK, dir_fd=dir_fd)  # O_NONBLOCK, should it have become a fifo


def _unless_changed(access: Callable[..., T], directory: int, entry: str, kind: int) -> T | None:
    """What `access` gives; None when the entry is no longer of that kind, or has vanished."""
    try:
        return access(entry, dir_fd=directory)
    except PermissionError:
        raise _unreadable(os.fsencode(entry)) from None
    except OSError:
        if _is(directory, entry, kind):
            raise
        return None


def _is(directory: int, entry: str, kind: int) -> bool:
    try:
        return stat.S_IFMT(os.stat(entry, dir_fd=directory, follow_symlinks=False).st_mode) == kind
    except FileNotFoundError:
        return False


def _add_file(writer: Writer, name: bytes, fd: int) -> None:
    try:
        found = os.fstat(fd)
        if stat.S_ISREG(found.st_mode):
            writer.add(b"0", name, found, found.st_size)
            writer.copy(fd, found.st_size)
    finally:
        os.close(fd)


def _open_directory(root: int, name: bytes) -> int | None:
    """The directory, reached in steps when its path is longer than the kernel takes; None when it has vanished."""
    fd = os.dup(root)
    try:
        for step in _steps(name):
            below = os.open(step, _OPEN | os.O_DIRECTORY, dir_fd=fd)
            os.close(fd)
            fd = below
    except PermissionError:
        os.close(fd)
        raise _unreadable(name) from None
    except (FileNotFoundError, NotADirectoryError):
        os.close(fd)
        return None
    return fd


def _steps(name: bytes) -> list[bytes]:
    steps = [b""]
    for part in name.split(b"/"):
        if len(steps[-1]) + len(part) > _STEP:
            steps.append(b"")
        steps[-1] += (b"/" if steps[-1] else b"") + part
    return steps


def _header(
    kind: bytes, name: bytes, mode: int, owner: tuple[int, int], size: int, mtime: int, target: bytes = b""
) -> bytes:
    fields = [
        name.ljust(_NAME, b"\0"),
        b"%07o\0%07o\0%07o\0" % (mode, owner[0] & 0o7777777, owner[1] & 0o7777777),
        _number(size),
        _number(mtime),
        b" " * 8,
        kind,
        target.ljust(_NAME, b"\0"),
        b"ustar  \0",
    ]
    block = b"".join(fields).ljust(_BLOCK, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def _number(value: int) -> bytes:
    return b"%011o\0" % value if value <= _MAX_OCTAL else b"\x80" + value.to_bytes(11, "big")


def _padded(text: bytes) -> bytes:
    return text + bytes(-len(text) % _BLOCK)


def _unreadable(name: bytes) -> CallFailed:
    return CallFailed("path_unreadable", f"{os.fsdecode(name[:200])!a} cannot be read by the user")
