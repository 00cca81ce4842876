"""Directories to tar.gz streams and back, in constant memory.

What a VM sends is written by untrusted code: `unpack` writes beneath its target only, follows no link, and makes no
link that leads out of the target.
"""

from __future__ import annotations

import os
import shutil
import stat
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from rundatsheesh.client.errors import ArchiveError

CHUNK = 1 << 18
GZIP = 16 + zlib.MAX_WBITS  # tells zlib to write gzip's header and trailer
LEVEL = 3
MAX_UNPACKED = 16 << 30  # bytes


def pack(source: Path) -> Iterator[bytes]:
    """A directory's content, or one file under its own name, as a tar.gz. Raises ArchiveError for links and devices."""
    compressor = zlib.compressobj(LEVEL, zlib.DEFLATED, GZIP)
    for block in _tar(source):
        if data := compressor.compress(block):
            yield data
    yield compressor.flush()


@dataclass(frozen=True, slots=True)
class Unpacked:
    files: int
    skipped: tuple[str, ...]  # links that lead out of the target, devices and the like


def unpack(stream: IO[bytes], target: Path, *, max_bytes: int = MAX_UNPACKED) -> Unpacked:
    """Write a tar.gz beneath `target`, which is made when missing; existing files of the same names are replaced.

    Raises ArchiveError for an archive that is damaged, names files outside itself or holds more than `max_bytes`.
    """
    target.mkdir(parents=True, exist_ok=True)
    return _Unpacking(target.resolve(), max_bytes).run(stream)


class _Unpacking:
    def __init__(self, target: Path, max_bytes: int) -> None:
        self._target = target
        self._budget = max_bytes
        self._files = 0
        self._links: list[tuple[PurePosixPath, str]] = []
        self._skipped: list[str] = []

    def run(self, stream: IO[bytes]) -> Unpacked:
        try:
            with tarfile.open(fileobj=stream, mode="r|gz") as tar:
                for member in tar:
                    self._take(tar, member)
        except (tarfile.TarError, zlib.error, EOFError) as error:
            raise ArchiveError(f"the archive is damaged: {error}") from error
        for name, link_target in self._links:  # last, so that nothing was ever written through one
            self._link(name, link_target)
        return Unpacked(self._files, tuple(self._skipped))

    def _take(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        name = PurePosixPath(member.name)
        if name.is_absolute() or ".." in name.parts:
            raise ArchiveError(f"the archive names a file outside itself: {member.name!r}")
        if not name.parts:
            return
        if member.isdir():
            self._directory(name)
        elif member.isreg():
            self._file(name, tar.extractfile(member), member)
        elif member.islnk():
            self._hard_link(name, PurePosixPath(member.linkname))
        elif member.issym():
            self._links.append((name, member.linkname))
        else:
            self._skipped.append(member.name)

    def _directory(self, name: PurePosixPath) -> Path:
        """The real directory of that name, made where it is missing; never reached through a link."""
        directory = self._target
        for part in name.parts:
            directory = directory / part
            try:
                directory.mkdir()
            except FileExistsError:
                if not stat.S_ISDIR(directory.lstat().st_mode):
                    raise ArchiveError(f"{directory} is in the way: not a directory") from None
        return directory

    def _file(self, name: PurePosixPath, content: IO[bytes] | None, member: tarfile.TarInfo) -> None:
        self._budget -= member.size
        if self._budget < 0:
            raise ArchiveError("the archive holds more than it may")
        assert content is not None  # tarfile returns None for what is no regular file only
        mode = 0o755 if member.mode & 0o100 else 0o644
        path = self._free(name)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        with open(descriptor, "wb") as file:
            shutil.copyfileobj(content, file, CHUNK)
        self._files += 1

    def _hard_link(self, name: PurePosixPath, first: PurePosixPath) -> None:
        if first.is_absolute() or ".." in first.parts or not first.parts:
            self._skipped.append(str(name))
            return
        existing = self._directory(first.parent) / first.name
        if not existing.is_file() or existing.is_symlink():
            self._skipped.append(str(name))
            return
        os.link(existing, self._free(name), follow_symlinks=False)
        self._files += 1

    def _link(self, name: PurePosixPath, target: str) -> None:
        """Only `../`s that stay inside, then a path down: such a link cannot leave, whatever the others are."""
        parts = PurePosixPath(target).parts
        ups = next((i for i, part in enumerate(parts) if part != ".."), len(parts))
        if PurePosixPath(target).is_absolute() or ups >= len(name.parts) or ".." in parts[ups:]:
            self._skipped.append(str(name))
            return
        self._free(name).symlink_to(target)
        self._files += 1

    def _free(self, name: PurePosixPath) -> Path:
        """The path of a new file: its directory exists and nothing has its name."""
        path = self._directory(name.parent) / name.name
        try:
            path.unlink(missing_ok=True)
        except OSError as error:  # a directory, whose errno depends on the system
            raise ArchiveError(f"{path} is in the way: {error.strerror}") from error
        return path


def _tar(source: Path) -> Iterator[bytes]:
    """An uncompressed tar in pieces, each at most CHUNK long or one header."""
    if source.is_file():
        yield from _member(source, source.name)
    else:
        for directory, names, files in os.walk(source):
            names.sort()
            for name in sorted([*names, *files]):
                path = Path(directory) / name
                yield from _member(path, path.relative_to(source).as_posix())
    yield bytes(2 * tarfile.BLOCKSIZE)


def _member(path: Path, name: str) -> Iterator[bytes]:
    facts = path.lstat()
    info = tarfile.TarInfo(name)
    info.mode, info.mtime = stat.S_IMODE(facts.st_mode) & 0o777, int(facts.st_mtime)
    if stat.S_ISDIR(facts.st_mode):
        info.type = tarfile.DIRTYPE
        yield info.tobuf(tarfile.PAX_FORMAT)
    elif stat.S_ISREG(facts.st_mode):
        with path.open("rb") as file:
            info.size = os.fstat(file.fileno()).st_size
            yield info.tobuf(tarfile.PAX_FORMAT)
            yield from _content(file, info.size, path)
            yield bytes(-info.size % tarfile.BLOCKSIZE)
    else:
        raise ArchiveError(f"{path} is a link, device or socket; only files and directories can be uploaded")


def _content(file: IO[bytes], size: int, path: Path) -> Iterator[bytes]:
    while size:
        data = file.read(min(size, CHUNK))
        if not data:
            raise ArchiveError(f"{path} became shorter while it was read")
        size -= len(data)
        yield data
