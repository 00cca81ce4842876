"""A full storage root is told as what it is; the server lives, and works again when there is space."""

from __future__ import annotations

import os
import secrets
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lives import Lives

SIZE_MB = 480  # above the reserve that the server keeps


@contextmanager
def small_file_system() -> Iterator[Path]:
    """Yields the directory where a file system of SIZE_MB is mounted."""
    directory = Path(tempfile.mkdtemp(prefix="rdsf-"))
    image, mounted = directory / "image", directory / "mounted"
    mounted.mkdir()
    with open(image, "wb") as file:
        file.truncate(SIZE_MB << 20)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True)
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
    with open(path, "wb", buffering=0) as file, suppress(OSError):
        os.posix_fallocate(file.fileno(), 0, max(1, wanted - (4 << 20)))
        while leave_mb == 0:
            file.write(bytes(4096))


def test_a_full_disk_is_told_and_survived() -> None:
    with small_file_system() as mounted:
        lives = Lives(mounted / "root", Path("/run") / f"rdsf-{secrets.token_hex(3)}", ENGINE="gvisor")
        with lives.running():
            vm_id = lives.create()["id"]
            lives.exec(vm_id, "echo kept > file && sync")
            for leave_mb in (64, 0):
                fill(mounted / "filler", leave_mb)
                refused = lives.http.post("/v1/vms", json={"cpu": 1, "memMb": 192, "allowIps": [], "diskSizeMb": 64})
                assert refused.status_code in (503, 507), refused.text
                assert refused.json()["code"] == "storage_full", refused.text
                assert lives.http.get("/health").status_code == 200
                assert lives.get(vm_id)["state"] == "RUNNING"
                assert lives.exec(vm_id, "cat file") == "kept\n"
                (mounted / "filler").unlink()
            created = lives.create()["id"]
            assert lives.exec(created, "echo works") == "works\n"
            assert lives.exec(vm_id, "echo more >> file; cat file") == "kept\nmore\n"
            assert lives.leaks() == []
