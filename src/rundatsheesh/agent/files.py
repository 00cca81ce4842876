"""Files into and out of the workspace. Both ends work as the user, so the kernel refuses what the user may not do.

What comes in was checked by the host and is no archive any more: a table of records (kind `d` or `f`, mode, length of
path, size, mtime in ns; the path), then the content of the files in the order of the table. What goes out is a tar.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import struct

from .incoming import BLOCK, PipeReader, SlotReader
from .job import FULL, CallFailed
from .paths import CHANGED, WORKSPACE, canonical
from .tar import download

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .incoming import Reader

__all__ = ["download", "upload"]

RECORD = struct.Struct(">cHHQq")
PATH_MAX = 4096  # of the kernel, with the NUL at its end
_A_DIRECTORY = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECT_FROM = 1 << 20  # bytes from which a file is worth a path of its own to the disk


class Entry:
    __slots__ = ("is_dir", "mode", "mtime_ns", "path", "replaces", "size")

    def __init__(self, is_dir: bool, mode: int, size: int, mtime_ns: int, path: bytes) -> None:
        self.is_dir = is_dir
        self.mode = mode
        self.size = size
        self.mtime_ns = mtime_ns
        self.path = path
        self.replaces = False  # something that is no directory has the name now


def upload(params: dict[str, Any], source: int) -> None:
    """Write what comes from `source` below params["dest"], which is made where it is missing.

    Raises CallFailed path_outside_workspace, path_conflict, path_too_long or workspace_full before anything is
    written; path_unwritable, path_conflict, workspace_full, upload_incomplete or OSError later: what was written stays.
    """
    receive(params, SlotReader(params["ring"]) if "ring" in params else PipeReader(source))


def receive(params: dict[str, Any], reader: Reader) -> None:
    """`upload` of what `reader` gives."""
    entries = parse_table(reader.exactly(params["table_bytes"]))
    try:
        Upload(os.fsencode(params["dest"]), entries).write(reader)
    except PermissionError as error:
        raise CallFailed("path_unwritable", f"the user may not write {_show(_name_of(error))}") from None
    except OSError as error:
        if error.errno in FULL:
            raise CallFailed("workspace_full", "the workspace became full during the upload") from None
        if error.errno in CHANGED:
            raise CallFailed("path_conflict", f"{_show(_name_of(error))} was changed during the upload") from None
        raise


def parse_table(table: bytes) -> list[Entry]:
    entries = []
    position = 0
    while position < len(table):
        kind, mode, length, size, mtime_ns = RECORD.unpack_from(table, position)
        position += RECORD.size + length
        entries.append(Entry(kind == b"d", mode & 0o777, size, mtime_ns, table[position - length : position]))
    return entries


class Upload:
    """One upload: first everything is looked at, then everything is written."""

    def __init__(self, dest: bytes, entries: list[Entry]) -> None:
        self._root = os.path.realpath(os.fsencode(WORKSPACE))
        self._dest = self._resolve_dest(dest)
        self._entries = entries
        # Directory of the archive → its real path, and whether it has to be made. The empty name is dest.
        self._directories: dict[bytes, tuple[bytes, bool]] = {}
        self._entered: tuple[bytes, int] | None = None  # the directory being worked in, and its descriptor
        self._made: dict[bytes, bytes] = {}  # those that we made, parents first, and their real paths
        # Unlike any name in use, so that a file of the user is never taken for our temporary one.
        self._temporary = b".rds-upload-" + os.urandom(8).hex().encode()

    def write(self, reader: Reader) -> None:
        self._look()
        os.umask(0)
        self._make_directory(b"")
        for entry in self._entries:
            if entry.is_dir:
                self._make_directory(entry.path)
            else:
                self._write_file(entry, reader)
        self._finish_directories()

    def _finish_directories(self) -> None:
        """Last, since writing changes a directory's time, and may need what its mode denies."""
        named = {entry.path: entry for entry in self._entries if entry.is_dir}
        for name, path in reversed(self._made.items()):
            entry = named.get(name)
            if entry is not None:
                above, last = os.path.split(path)
                fd = os.open(last, os.O_RDONLY | _A_DIRECTORY, dir_fd=self._enter(above))
                try:
                    os.fchmod(fd, entry.mode)
                    os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
                finally:
                    os.close(fd)

    def _resolve_dest(self, dest: bytes) -> bytes:
        """Step by step, for no part of the way may leave the workspace, even where the rest leads back."""
        real, above = self._root, os.fsencode(WORKSPACE)
        way = os.path.relpath(os.path.join(above, os.fsencode(canonical(os.fsdecode(dest)))), above)
        for name in way.split(b"/"):
            real = os.path.realpath(os.path.join(real, name))
            if not self._is_inside(real):
                raise CallFailed("path_outside_workspace", f"{_show(dest)} is outside {WORKSPACE}")
        return real

    def _is_inside(self, real: bytes) -> bool:
        return real == self._root or real.startswith(self._root + b"/")

    # --- looking: nothing is changed ---

    def _look(self) -> None:
        self._look_at_dest()
        needed = 0
        for entry in self._entries:
            if entry.is_dir:
                self._look_at_directory(entry.path)
            else:
                self._look_at_file(entry)
                needed += -(-entry.size // BLOCK) * BLOCK
        missing = sum(missing for _, missing in self._directories.values())
        self._check_space(needed + missing * BLOCK, missing + len(self._entries))

    def _look_at_dest(self) -> None:
        place = self._dest
        while (found := _lstat(place)) is None:
            place = os.path.dirname(place)
        if not stat.S_ISDIR(found.st_mode):
            raise CallFailed("path_conflict", f"{_show(place)} exists and is not a directory")
        self._directories[b""] = (self._dest, place != self._dest)

    def _look_at_directory(self, name: bytes) -> tuple[bytes, bool]:
        unknown = []
        while (known := self._directories.get(name)) is None:
            unknown.append(name)
            name = name.rpartition(b"/")[0]
        for name in reversed(unknown):
            above, missing = known
            known = self._directories[name] = self._look_below(above, name.rpartition(b"/")[2], missing, name)
        return known

    def _look_below(self, above: bytes, last: bytes, missing: bool, name: bytes) -> tuple[bytes, bool]:
        path = above + b"/" + last
        _check_length(path, name)
        found = None if missing else _lstat(path)
        if found is None:
            return path, True
        if stat.S_ISLNK(found.st_mode):
            path = os.path.realpath(path)
            if not self._is_inside(path):
                raise CallFailed("path_outside_workspace", f"{_show(name)} is a link that leaves {WORKSPACE}")
            found = _lstat(path)
        if found is None or not stat.S_ISDIR(found.st_mode):
            raise CallFailed("path_conflict", f"{_show(name)} exists and is not a directory")
        return path, False

    def _look_at_file(self, entry: Entry) -> None:
        parent, _, last = entry.path.rpartition(b"/")
        above, missing = self._look_at_directory(parent)
        path = above + b"/" + last
        _check_length(path, entry.path)
        found = None if missing else _lstat(path)
        if found is not None and stat.S_ISDIR(found.st_mode):
            raise CallFailed("path_conflict", f"{_show(entry.path)} exists and is a directory")
        entry.replaces = found is not None

    def _check_space(self, needed: int, inodes: int) -> None:
        space = os.statvfs(self._root)
        available = space.f_bavail * space.f_frsize
        if needed > available:
            raise CallFailed("workspace_full", f"the upload needs {needed} bytes, the workspace has {available}")
        if space.f_files and inodes > space.f_favail:
            raise CallFailed("workspace_full", f"the workspace has room for {space.f_favail} more files")

    # --- writing ---

    def _make_directory(self, name: bytes) -> bytes:
        """Its real path. One that exists keeps its mode and time."""
        path, missing = self._directories[name]
        if not missing:
            return path
        if not name:
            self._make_dest(path)
            return path
        for above in self._missing_above(name):
            real = self._directories[above][0]
            self._make(real)
            self._directories[above] = (real, False)
            self._made[above] = real
        return path

    def _make_dest(self, path: bytes) -> None:
        missing = [path]
        while _lstat(os.path.dirname(missing[-1])) is None:
            missing.append(os.path.dirname(missing[-1]))
        for real in reversed(missing):
            self._make(real)
        self._directories[b""] = (path, False)

    def _make(self, real: bytes) -> None:
        above, last = os.path.split(real)
        with contextlib.suppress(FileExistsError):  # it has come since we looked; what it is shows when it is entered
            os.mkdir(last, 0o755, dir_fd=self._enter(above))

    def _enter(self, real: bytes) -> int:
        """A descriptor of the directory, to work in: what is at its path may be something else at the next moment.
        It is ours until the next call. Raises CallFailed where the path leads out of the workspace by now."""
        if self._entered is None or self._entered[0] != real:
            fd = os.open(real, os.O_PATH | _A_DIRECTORY)
            if self._entered is not None:
                os.close(self._entered[1])
            self._entered = real, fd
            if not self._is_inside(_place_of(fd, real)):
                self._entered = None
                os.close(fd)
                raise CallFailed("path_outside_workspace", f"{_show(real)} has become a link that leaves {WORKSPACE}")
        return self._entered[1]

    def _missing_above(self, name: bytes) -> list[bytes]:
        """The name and those above it that have to be made, topmost first."""
        names = []
        while self._directories[name][1]:
            names.append(name)
            name = name.rpartition(b"/")[0]
        return names[::-1]

    def _write_file(self, entry: Entry, reader: Reader) -> None:
        parent, _, last = entry.path.rpartition(b"/")
        place = self._enter(self._make_directory(parent))
        if not entry.replaces:
            try:
                _write_new(place, last, entry, reader)
                return
            except FileExistsError:  # it has come since we looked
                pass
        # Who has the old one open keeps it, nobody sees half of the new one, and no link is followed.
        try:
            _write_new(place, self._temporary, entry, reader)
            os.rename(self._temporary, last, src_dir_fd=place, dst_dir_fd=place)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._temporary, dir_fd=place)
            raise


def _write_new(place: int, name: bytes, entry: Entry, reader: Reader) -> None:
    """FileExistsError when the name is taken, before anything is read. `place` is the directory's descriptor."""
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, entry.mode, dir_fd=place)
    try:
        left = entry.size - (
            _write_direct(fd, entry.size, reader) if reader.past_cache and entry.size >= _DIRECT_FROM else 0
        )
        while left:
            piece = reader.some(left)
            left -= len(piece)
            while piece:
                piece = piece[os.write(fd, piece) :]
        os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
    finally:
        os.close(fd)


def _write_direct(fd: int, size: int, reader: Reader) -> int:
    """Write the whole blocks of a large file past the kernel's cache; the number of bytes written, 0 where the file
    system does not offer it. An emulated CPU takes ten times longer to fill the cache than the disk to write."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
    except OSError:
        return 0
    whole = size - size % BLOCK
    written = 0
    while written < whole:
        piece = reader.blocks(whole - written)
        _write_blocks(fd, piece, flags)
        written += len(piece)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags)
    return written


def _write_blocks(fd: int, piece: memoryview, flags: int) -> None:
    done = os.write(fd, piece)
    if done < len(piece):  # a nearly full disk: the rest is no longer aligned, so it goes the usual way
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
    while done < len(piece):
        done += os.write(fd, piece[done:])


def _place_of(directory: int, known_as: bytes) -> bytes:
    """Where it is now. Asked of the kernel without /proc, which is not everywhere that this runs."""
    try:
        os.fchdir(directory)
        return os.getcwdb()
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), known_as) from None


def _lstat(path: bytes) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None


def _check_length(path: bytes, name: bytes) -> None:
    if len(path) >= PATH_MAX:
        raise CallFailed("path_too_long", f"{_show(name)} would have a path of more than {PATH_MAX - 1} bytes")


def _name_of(error: OSError) -> bytes:
    return os.fsencode(error.filename or "a file")


def _show(name: bytes) -> str:
    """A name of the user's choice as a bounded piece of one line."""
    text = ascii(os.fsdecode(name[:200]))
    return text if len(name) <= 200 else text + "…"
