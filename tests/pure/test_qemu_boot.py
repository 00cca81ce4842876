"""What a virtual machine boots from: the initrd, the kernel inside Debian's, the frequency of its clock."""

from __future__ import annotations

import os
import platform
import shutil
import stat
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rundatsheesh.manager.build import initrd, kernel
from rundatsheesh.manager.engines.qemu_boot import Agent
from rundatsheesh.manager.errors import HostError
from rundatsheesh.manager.host import cpio, tsc
from rundatsheesh.manager.host.bootfiles import BootFiles

names = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="/"), min_size=1, max_size=40)


def unpack(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """Mode and content by path, of all archives that follow one another, as the kernel reads them."""
    found: dict[str, tuple[int, bytes]] = {}
    at = 0
    while at < len(archive):
        if archive[at] == 0:
            at += 4
            continue
        assert archive[at : at + 6] == b"070701" and at % 4 == 0
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = archive[at + 110 : at + 110 + name_size - 1].decode()
        start = (at + 110 + name_size + 3) // 4 * 4
        if name != "TRAILER!!!":
            found[name] = mode, archive[start : start + size]
        at = (start + size + 3) // 4 * 4
    return found


@given(st.dictionaries(names, st.tuples(st.booleans(), st.binary(max_size=99)), max_size=9))
def test_an_archive_holds_what_was_put_in(content: dict[str, tuple[bool, bytes]]) -> None:
    entries = [cpio.directory(name) if is_dir else cpio.file(name, data) for name, (is_dir, data) in content.items()]
    assert unpack(cpio.archive(entries)) == {
        name: (stat.S_IFDIR | 0o755, b"") if is_dir else (stat.S_IFREG | 0o644, data)
        for name, (is_dir, data) in content.items()
    }


@pytest.mark.skipif(shutil.which("cpio") is None, reason="cpio is not installed")
def test_others_can_read_the_archive(tmp_path: Path) -> None:
    archive = cpio.archive([cpio.directory("a"), cpio.file("a/b", b"content", 0o600)])
    subprocess.run(["cpio", "-id", "--quiet"], input=archive, cwd=tmp_path, check=True)
    assert (tmp_path / "a/b").read_bytes() == b"content"


def test_the_initrd_is_the_images_and_the_agents(tmp_path: Path) -> None:
    package = tmp_path / "agent"
    (package / "preload").mkdir(parents=True)
    (package / "__pycache__").mkdir()
    (package / "__pycache__/x.cpython-311.pyc").write_bytes(b"\xa7\r\r\n" + bytes(12) + b"of this host")
    (package / "__main__.py").write_text("print()")
    (package / "preload/a.mjs").write_text("a")
    boot_files = BootFiles(tmp_path)
    boot_files.initrd.write_bytes(initrd.base_initrd(b"busybox", {"virtio_blk": b"module"}))
    agent = Agent(package)
    descriptor = agent.initrd(boot_files)
    with open(descriptor, "rb") as file:
        file.seek(0)
        found = unpack(file.read())
    assert found["init"][0] == stat.S_IFREG | 0o755
    assert found["agent/__main__.py"][1] == b"print()"
    assert found["agent/preload/a.mjs"][1] == b"a"
    assert not [name for name in found if "__pycache__" in name]
    assert Agent(package).digest == agent.digest
    (package / "preload/a.mjs").write_text("b")
    assert Agent(package).digest != agent.digest


def test_init_is_a_script_that_shells_accept() -> None:
    script = initrd.init_script(("virtio_mmio", "virtio_blk"))
    subprocess.run(["sh", "-n"], input=script.encode(), check=True)
    assert script.index("insmod /modules/virtio_mmio.ko") < script.index("insmod /modules/virtio_blk.ko")
    assert script.rstrip().endswith("--engine qemu --port /dev/vport0p1")


def test_the_kernel_inside_debians_is_found() -> None:
    payload = kernel.ZSTD_MAGIC + os.urandom(100)
    image = bytearray(2048)
    image[0x1F1] = 1
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", image, 0x248, 64, len(payload) + 4)
    image[1024 + 64 :] = payload + struct.pack("<I", 12345)
    assert kernel.kernel_payload(bytes(image)) == payload


@given(st.binary(max_size=2048), st.booleans())
def test_anything_else_is_refused(content: bytes, magic: bool) -> None:
    image = bytearray(content)
    if magic and len(image) > 0x206:
        image[0x202:0x206] = b"HdrS"
    with pytest.raises(HostError):
        kernel.kernel_payload(bytes(image))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="no time stamp counter")
def test_the_clocks_frequency_is_measured_well() -> None:
    first, second = tsc.frequency_khz.__wrapped__(), tsc.frequency_khz.__wrapped__()
    assert 100_000 < first < 20_000_000
    assert abs(first - second) / first < 1e-3
