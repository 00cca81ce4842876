"""The descriptors of one program: its input, its two outputs, and its channel where it has one."""

from __future__ import annotations

import os

from . import wire
from .job import USER


class Streams:
    """`ours` are what to read from, each with its stream of the wire; RESULT is the channel. `theirs` are the program's
    0, 1, 2 and CHANNEL_FD, until they are handed over."""

    def __init__(self, stdin: bytes | None, *, channel: bool) -> None:
        """`stdin` is all that the program will read; None is for later, see `write_stdin`."""
        self.ours: dict[int, int] = {}
        self.theirs = [_file() if stdin is None else _stdin(stdin)]
        self._stdin = self.theirs[0]
        try:
            for stream in (wire.STDOUT, wire.STDERR, *([wire.RESULT] if channel else [])):
                self._open(stream)
        except BaseException:
            self.close()
            raise

    def hand_over(self, *, all_but_stdin: bool = False) -> None:
        """The program has them now; let go of our copies."""
        given = self.theirs[1:] if all_but_stdin else self.theirs
        self.theirs = self.theirs[: len(self.theirs) - len(given)]
        for fd in given:
            os.close(fd)

    def write_stdin(self, data: bytes) -> None:
        """Give the program its input; it is still ours, too."""
        _fill(self._stdin, data)

    def has_been_read(self) -> bool:
        """Whether the program has begun with its input, whose position it shares with us until that is handed over."""
        return os.lseek(self._stdin, 0, os.SEEK_CUR) > 0

    def close(self) -> None:
        for fd in (*self.ours, *self.theirs):
            os.close(fd)
        self.ours, self.theirs = {}, []

    def _open(self, stream: int) -> None:
        reading, writing = os.pipe2(os.O_CLOEXEC)
        self.ours[reading] = stream
        self.theirs.append(writing)
        os.fchown(writing, USER, USER)  # a program may open it anew, as /dev/stdout or by its name in /proc
        os.set_blocking(reading, False)


def _stdin(data: bytes) -> int:
    if not data:
        return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    fd = _file()
    _fill(fd, data)
    return fd


def _file() -> int:
    """A file that nobody else can open: gVisor lets everybody reach our descriptors through /proc, where only the mode
    of the file counts."""
    fd = os.memfd_create("stdin")
    os.fchmod(fd, 0)
    return fd


def _fill(fd: int, data: bytes) -> None:
    """The program shares the position with us: it begins at the beginning."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
