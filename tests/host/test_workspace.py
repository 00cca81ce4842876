"""Real disks on real loop devices; nothing of them is left."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from rundatsheesh.manager.disk import workspace
from rundatsheesh.manager.errors import HostError, StorageFull
from rundatsheesh.manager.host import loops, mounts
from rundatsheesh.manager.host.mounts import Flag

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")

SIZE_MB = 64


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    assert [m.target for m in mounts.list_mounts() if m.target.is_relative_to(tmp_path)] == []
    held = [loops.backing_file(int(node.name[4:])) for node in Path("/sys/block").glob("loop*")]
    assert [file for file in held if file is not None and file.is_relative_to(tmp_path)] == []


def allocated_kb(path: Path) -> int:
    return path.stat().st_blocks // 2


async def test_a_new_disk_is_sparse_clean_and_the_guests(place: Path) -> None:
    disk, point = place / "disk.img", place / "mounted"
    await workspace.create(disk, 10240)
    assert disk.stat().st_size == 10240 << 20
    assert disk.stat().st_mode & 0o777 == 0o600
    assert allocated_kb(disk) < 4096
    checked = subprocess.run(["e2fsck", "-f", "-n", disk], capture_output=True)
    assert checked.returncode == 0, checked.stdout
    told = subprocess.run(["dumpe2fs", "-h", disk], capture_output=True, text=True, check=True).stdout
    assert "Reserved block count:     0\n" in told
    await workspace.mount(disk, point)
    try:
        assert list(point.iterdir()) == []
        assert (point.stat().st_uid, point.stat().st_gid) == (1000, 1000)
    finally:
        await workspace.unmount(point)
    assert not point.exists()


async def test_a_copy_is_the_same_disk_as_sparse_and_the_original_unchanged(place: Path) -> None:
    original = await workspace.create_in_memory(1024)
    before = os.pread(original, 1 << 20, 0)
    disk = place / "workspace.img"
    await workspace.create_copy(disk, original)
    assert disk.stat().st_size == 1024 << 20
    assert allocated_kb(disk) < 1024
    subprocess.run(["e2fsck", "-f", "-n", str(disk)], check=True, capture_output=True)
    await workspace.mount(disk, place / "workspace")
    assert list((place / "workspace").iterdir()) == []
    await workspace.unmount(place / "workspace")
    copy = workspace.copy_in_memory(original)
    assert (os.pread(copy, 1 << 20, 0), os.pread(original, 1 << 20, 0)) == (before, before)
    os.close(copy)
    os.close(original)


@pytest.mark.parametrize(("left", "found"), [(0o000, 0o700), (0o555, 0o755), (0o1777, 0o1777), (0o700, 0o700)])
async def test_its_owner_can_enter_a_disk_whatever_mode_its_root_was_left_with(
    place: Path, left: int, found: int
) -> None:
    disk, point = place / "disk.img", place / "mounted"
    await workspace.create(disk, SIZE_MB)
    await workspace.mount(disk, point)
    point.chmod(left)
    await workspace.unmount(point)
    await workspace.mount(disk, point)
    try:
        assert point.stat().st_mode & 0o7777 == found
    finally:
        await workspace.unmount(point)


async def test_creating_mounting_and_unmounting_may_be_repeated(place: Path) -> None:
    disk, point = place / "disk.img", place / "mounted"
    await workspace.create(disk, SIZE_MB)
    await workspace.mount(disk, point)
    await workspace.mount(disk, point)
    assert sum(m.target == point for m in mounts.list_mounts()) == 1
    (point / "file").write_text("kept")
    await workspace.create(disk, SIZE_MB)
    await workspace.unmount(point)
    await workspace.unmount(point)
    await workspace.mount(disk, point)
    assert (point / "file").read_text() == "kept"
    await workspace.unmount(point)


async def test_neither_devices_nor_setuid_work_there(place: Path) -> None:
    disk, point = place / "disk.img", place / "mounted"
    await workspace.create(disk, SIZE_MB)
    await workspace.mount(disk, point)
    try:
        assert os.statvfs(point).f_flag & (os.ST_NOSUID | os.ST_NODEV) == os.ST_NOSUID | os.ST_NODEV
    finally:
        await workspace.unmount(point)


async def test_a_full_disk_is_full_alone_and_deleted_files_return_their_space(place: Path) -> None:
    disk, point = place / "disk.img", place / "mounted"
    await workspace.create(disk, SIZE_MB)
    await workspace.mount(disk, point)
    try:
        with pytest.raises(OSError) as caught, open(point / "big", "wb", buffering=0) as file:
            for _ in range(SIZE_MB + 1):
                file.write(os.urandom(1 << 20))
        assert caught.value.errno == errno.ENOSPC
        subprocess.run(["sync", "-f", point], check=True)
        full = allocated_kb(disk)
        assert full > 40 << 10
        (point / "big").unlink()
        subprocess.run(["sync", "-f", point], check=True)
        await workspace.unmount(point)
        assert allocated_kb(disk) < full // 4
    finally:
        await workspace.unmount(point)


async def test_many_at_once(place: Path) -> None:
    """More than the eight loop devices that a kernel starts with."""
    count = 24

    async def one(number: int) -> None:
        disk, point = place / f"{number}.img", place / f"{number}"
        await workspace.create(disk, SIZE_MB)
        await workspace.mount(disk, point)
        (point / "number").write_text(str(number))

    async with asyncio.TaskGroup() as tasks:
        for number in range(count):
            tasks.create_task(one(number))
    assert [int((place / f"{n}/number").read_text()) for n in range(count)] == list(range(count))
    async with asyncio.TaskGroup() as tasks:
        for number in range(count):
            tasks.create_task(workspace.unmount(place / f"{number}"))


async def test_another_mount_in_its_place_is_refused(place: Path) -> None:
    first, second, point = place / "1.img", place / "2.img", place / "mounted"
    await workspace.create(first, SIZE_MB)
    await workspace.create(second, SIZE_MB)
    await workspace.mount(first, point)
    with pytest.raises(HostError, match="taken by another mount"):
        await workspace.mount(second, point)
    await workspace.unmount(point)


async def test_what_an_interrupted_creation_left_does_not_matter(place: Path) -> None:
    disk = place / "disk.img"
    (place / "disk.img.new").write_bytes(b"half a disk")
    await workspace.create(disk, SIZE_MB)
    assert sorted(path.name for path in place.iterdir()) == ["disk.img"]


async def test_a_full_host_is_told_as_such_and_nothing_is_left(place: Path) -> None:
    small = place / "small"
    small.mkdir()
    mounts.mount("test", small, "tmpfs", Flag.NONE, "size=1m")
    try:
        with pytest.raises(StorageFull):
            await workspace.create(small / "disk.img", SIZE_MB)
        assert list(small.iterdir()) == []
    finally:
        mounts.unmount(small)


async def test_a_disk_that_is_none_is_refused_and_nothing_is_left(place: Path) -> None:
    (place / "disk.img").write_bytes(bytes(8 << 20))
    with pytest.raises(HostError, match=r"disk\.img"):
        await workspace.mount(place / "disk.img", place / "mounted")
    (place / "link.img").symlink_to(place / "disk.img")
    with pytest.raises(HostError):
        await workspace.mount(place / "link.img", place / "mounted")
    await workspace.unmount(place / "mounted")


async def test_a_user_of_the_mount_keeps_it_and_is_waited_for(place: Path) -> None:
    disk, point = place / "disk.img", place / "mounted"
    await workspace.create(disk, SIZE_MB)
    await workspace.mount(disk, point)
    with open(point / "file", "w") as file:
        unmounting = asyncio.create_task(workspace.unmount(point))
        done, _ = await asyncio.wait([unmounting], timeout=0.1)
        assert not done
        file.write("last words")
    await unmounting
    await workspace.mount(disk, point)
    assert (point / "file").read_text() == "last words"
    await workspace.unmount(point)
