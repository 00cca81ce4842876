"""The files with which a virtual machine boots: Debian's kernel, a minimal initrd, and the guest's root as one file.

host/bootfiles.py names them. They depend on the image alone, and are made once per image.
"""

from __future__ import annotations

import asyncio
import hashlib
import lzma
import shutil
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path

from rundatsheesh.manager.build.initrd import base_initrd
from rundatsheesh.manager.build.recipe import RECIPE, SOURCE_DATE_EPOCH, guest_architecture
from rundatsheesh.manager.errors import HostError
from rundatsheesh.manager.host import process, tools
from rundatsheesh.manager.host.bootfiles import BootFiles

PACKAGES = {"x86_64": ("linux-image-cloud-amd64", "busybox-static")}
UNPACK_TIMEOUT = 600.0  # seconds; 9 are usual
EROFS_TIMEOUT = 300.0
EROFS_UUID = "5f3759df-0000-4000-8000-000000000000"  # any constant, so that the same tree makes the same file

# In the order of their dependences. virtio, its ring, virtio_console, virtio_pci and ext4 are built in.
MODULES = (
    "virtio_mmio",
    "virtio_blk",
    "virtio-rng",
    "libcrc32c",
    "netfs",
    "erofs",
    "failover",
    "net_failover",
    "virtio_net",
)

TOOLS = ("zstd", "mkfs.erofs")
STAMP = "boot-recipe"  # which sources made the boot files; written last
SOURCES = ("kernel.py", "initrd.py")

BOOT_MAGIC = b"HdrS"  # at 0x202 of a bzImage, see the kernel's boot.rst
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
ELF_MAGIC = b"\x7fELF"
SECTOR = 512


def unsupported_because() -> str | None:
    """Why this host can make no boot files; None when it can."""
    if guest_architecture() not in PACKAGES:
        return f"virtual machines are not supported on {guest_architecture()}"
    missing = [program for program in TOOLS if tools.find_tool(program) is None]
    return f"{', '.join(missing)} not installed" if missing else None


def has_vm_files(out: Path) -> bool:
    """Whether the boot files in `out` are there and of this recipe."""
    stamp = out / STAMP
    return BootFiles(out).complete() and stamp.is_file() and stamp.read_text() == _recipe_hash()


async def build_vm_files(root: Path, out: Path, environment: Mapping[str, str]) -> None:
    """Make the boot files in `out` from the finished guest `root`.

    Takes ten seconds and the network; `environment` is for the download. A file that appears is complete, so machines
    that boot from the ones before are not disturbed. Raises HostError where this host cannot, ProcessError when a tool
    fails.
    """
    if (reason := unsupported_because()) is not None:
        raise HostError(reason)
    boot_files = BootFiles(out)
    with tempfile.TemporaryDirectory(prefix=".kernel-", dir=out) as scratch:
        tree = Path(scratch, "tree")
        await _unpack_packages(tree, environment)
        await make_kernel(_only(tree, "boot/vmlinuz-*"), boot_files.kernel)
        initrd = await asyncio.to_thread(_make_initrd, tree)
        await asyncio.to_thread(_write, boot_files.initrd, initrd)
    await make_root(root, boot_files.root)
    await asyncio.to_thread(_write, out / STAMP, _recipe_hash().encode())


async def make_kernel(bzimage: Path, vmlinux: Path) -> None:
    """Unpack the ELF file inside a kernel as Debian ships it."""
    packed = vmlinux.with_name(vmlinux.name + ".zst")
    unpacked = vmlinux.with_name(vmlinux.name + ".new")
    try:
        await asyncio.to_thread(lambda: packed.write_bytes(kernel_payload(bzimage.read_bytes())))
        await process.run(["zstd", "-d", "-q", "-f", str(packed), "-o", str(unpacked)], timeout=60)
        await asyncio.to_thread(_check_elf, unpacked)
        unpacked.rename(vmlinux)
    finally:
        packed.unlink(missing_ok=True)
        unpacked.unlink(missing_ok=True)


def kernel_payload(bzimage: bytes) -> bytes:
    """The zstd frame that a bzImage carries; HostError for anything else."""
    if len(bzimage) < 0x260 or bzimage[0x202:0x206] != BOOT_MAGIC:
        raise HostError("the kernel is not a bzImage")
    setup_sectors = bzimage[0x1F1] or 4  # 0 means 4, says the boot protocol
    offset, length = struct.unpack_from("<II", bzimage, 0x248)
    start = (1 + setup_sectors) * SECTOR + offset
    payload = bzimage[start : start + length]
    if len(payload) != length or not payload.startswith(ZSTD_MAGIC):
        raise HostError("the kernel is not compressed with zstd")
    return payload[:-4]  # the unpacked size, which the kernel's build appends


async def make_root(root: Path, erofs: Path) -> None:
    """One read-only file with the same content as the directory `root`."""
    unfinished = erofs.with_name(erofs.name + ".new")
    argv = [
        "mkfs.erofs",
        "--quiet",
        "-x-1",  # no extended attributes: the root has none that mean anything
        f"-T{SOURCE_DATE_EPOCH}",
        "--preserve-mtime",
        f"-U{EROFS_UUID}",
        str(unfinished),
        str(root),
    ]
    try:
        await process.run(argv, timeout=EROFS_TIMEOUT)
        unfinished.rename(erofs)
    finally:
        unfinished.unlink(missing_ok=True)


async def _unpack_packages(tree: Path, environment: Mapping[str, str]) -> None:
    argv = [
        "mmdebstrap",
        "--quiet",
        "--mode=root",
        "--variant=extract",
        "--format=directory",
        f"--include={','.join(PACKAGES[guest_architecture()])}",
        '--aptopt=Acquire::Languages "none"',
        RECIPE.suite,
        str(tree),
    ]
    await process.run(argv, timeout=UNPACK_TIMEOUT, env={**environment, **process.BASE_ENV})


def _make_initrd(tree: Path) -> bytes:
    modules = {
        name: lzma.decompress(_only(tree, f"usr/lib/modules/*/kernel/**/{name}.ko.xz").read_bytes()) for name in MODULES
    }
    return base_initrd(_only(tree, "usr/bin/busybox").read_bytes(), modules)


def _recipe_hash() -> str:
    content = b"".join(Path(__file__).with_name(name).read_bytes() for name in SOURCES)
    return hashlib.sha256(content).hexdigest()[:16]


def _only(tree: Path, pattern: str) -> Path:
    found = list(tree.glob(pattern))
    if len(found) != 1:
        raise HostError(f"the kernel's packages hold {len(found)} files {pattern}, not one")
    return found[0]


def _check_elf(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(4) != ELF_MAGIC:
            raise HostError("the unpacked kernel is not an ELF file")


def _write(path: Path, content: bytes) -> None:
    unfinished = path.with_name(path.name + ".new")
    unfinished.write_bytes(content)
    shutil.move(unfinished, path)
