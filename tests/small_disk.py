"""A file system that is small enough to be filled."""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

BLOCK = 4096


@contextmanager
def small_file_system(size_mb: int) -> Iterator[Path]:
    """Yields the directory where a file system of this size is mounted."""
    directory = Path(tempfile.mkdtemp(prefix="rdsf-"))
    image, mounted = directory / "image", directory / "mounted"
    mounted.mkdir()
    with open(image, "wb") as file:
        file.truncate(size_mb << 20)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", "-b", str(BLOCK), str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(mounted)], check=True)
    try:
        yield mounted
    finally:
        subprocess.run(["umount", str(mounted)], check=True)
        image.unlink()
        mounted.rmdir()
        directory.rmdir()


def fill(path: Path, leave_mb: int = 0) -> None:
    """Take all space but so much."""
    free = os.statvfs(path.parent)
    wanted = free.f_bavail * free.f_frsize - (leave_mb << 20)
    with open(path, "ab", buffering=0) as file, suppress(OSError):
        os.posix_fallocate(file.fileno(), file.tell(), max(1, wanted - (4 << 20)))
        while leave_mb == 0:
            file.write(bytes(BLOCK))


@contextmanager
def filling(path: Path) -> Iterator[None]:
    """Whatever becomes free meanwhile is taken at once, as by guests that write and write."""
    ending = threading.Event()

    def run() -> None:
        while not ending.is_set():
            fill(path)
            ending.wait(0.002)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()
