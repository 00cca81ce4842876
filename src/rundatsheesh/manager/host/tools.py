"""The programs that the server needs from its host: which Debian package brings each, and where runsc comes from.

IMAGE_CACHE/bin/
├── runsc                 link to the runsc in use: the copy beside it, or the host's own when that is new enough
└── runsc-<version>       a copy out of Debian's package
"""

from __future__ import annotations

import asyncio
import os
import platform
import re
import shutil
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rundatsheesh.manager.errors import HostError
from rundatsheesh.manager.host import process

# Older builds lack statx, so that ls fails inside, and kill their sandbox at a checkpoint.
MIN_RUNSC = (20240729, 0)
RUNSC_SUITE = "trixie"
RUNSC_MEMBER = "./usr/bin/runsc"

APT_TIMEOUT = 1800.0  # seconds; minutes on a slow network
EXTRACT_TIMEOUT = 600.0
VERSION_TIMEOUT = 10.0
QUICK_TIMEOUT = 30.0

DEBIAN_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
REFUSED_LIST = "unavailable-packages"  # in the cache: optional packages that this host's distribution does not have


@dataclass(frozen=True, slots=True)
class Tool:
    program: str
    package: str  # Debian's name of what brings it
    purpose: str


_QEMU = {"x86_64": ("qemu-system-x86_64", "qemu-system-x86"), "aarch64": ("qemu-system-aarch64", "qemu-system-arm")}

REQUIRED = (
    Tool("mmdebstrap", "mmdebstrap", "builds the guest image"),
    Tool("nft", "nftables", "enforces the egress policy"),
    Tool("ip", "iproute2", "network namespaces and links"),
    Tool("mkfs.ext4", "e2fsprogs", "makes the VMs' disks"),
    Tool("nsenter", "util-linux", "starts sandboxes in their namespace"),
    Tool("unshare", "util-linux", "starts sandboxes in their namespace"),
    Tool("mount", "mount", "mounts the VMs' disks"),
    Tool("losetup", "mount", "mounts the VMs' disks"),
)
OPTIONAL = (
    *(
        Tool(program, package, "runs VMs with the qemu engine")
        for machine, (program, package) in _QEMU.items()
        if machine == platform.machine()
    ),
    Tool("mkfs.erofs", "erofs-utils", "packs the guest image for the qemu engine"),
    Tool("zstd", "zstd", "unpacks the kernel for the qemu engine"),
)


def find_tool(program: str) -> Path | None:
    """The program in the server's search path, which has the sbin directories whoever asks."""
    found = shutil.which(program, path=process.SEARCH_PATH)
    return Path(found) if found else None


def find_runsc(image_cache: Path) -> Path | None:
    """The runsc that set-up chose; None before that. Starts no process, so that it may be asked often."""
    link = image_cache / "bin" / "runsc"
    return link if os.access(link, os.X_OK) else None


def missing_packages(image_cache: Path) -> tuple[list[str], list[str]]:
    """Debian packages to install: required ones, and optional ones that nobody found to be unavailable."""
    required = {tool.package for tool in REQUIRED if find_tool(tool.program) is None}
    if not DEBIAN_KEYRING.exists():
        required.add("debian-archive-keyring")  # Ubuntu has it only on demand
    refused = image_cache / REFUSED_LIST
    unavailable = refused.read_text().split() if refused.exists() else []
    optional = {tool.package for tool in OPTIONAL if find_tool(tool.program) is None}
    return sorted(required), sorted(optional - set(unavailable))


async def install_packages(image_cache: Path, environment: Mapping[str, str]) -> list[str]:
    """Install what is missing, without recommended extras; returns the names of what was installed.

    Raises HostError where a required package cannot be had. An optional package that the distribution lacks is noted
    in the cache and not asked for again.
    """
    required, optional = missing_packages(image_cache)
    if find_tool("apt-get") is None:
        raise HostError(
            "this is not a Debian or Ubuntu host, so nothing can be installed by name",
            hint=f"install what these Debian packages bring, then try again: {' '.join([*required, *optional])}",
        )
    await _apt(["update"], environment)
    available = [name for name in optional if await _is_available(name)]
    wanted = [*required, *available]
    if wanted:
        await _apt(["install", "--yes", "--no-install-recommends", *wanted], environment)
    await asyncio.to_thread(_note_unavailable, image_cache, sorted(set(optional) - set(available)))
    still_missing, _ = missing_packages(image_cache)
    if still_missing:
        raise HostError(f"installed, yet still missing: {' '.join(still_missing)}")
    return wanted


async def runsc_version(program: Path) -> tuple[int, int]:
    """Date and patch number of a runsc build; (0, 0) when it does not say."""
    completed = await process.run([str(program), "--version"], timeout=VERSION_TIMEOUT)
    return parse_runsc_version(completed.stdout.decode(errors="replace"))


def parse_runsc_version(text: str) -> tuple[int, int]:
    """`runsc version 0.0~20240729.0` (Debian) and `runsc version release-20240729.0` (upstream) are the same build."""
    found = re.search(r"\b(?:release-|0\.0~)?(20\d{6})\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


async def ensure_runsc(image_cache: Path, environment: Mapping[str, str]) -> Path:
    """Choose a runsc, the host's own when it is new enough, else Debian's; the caller holds the cache's lock."""
    found = find_runsc(image_cache)
    if found is not None:
        return found
    directory = image_cache / "bin"
    await asyncio.to_thread(lambda: directory.mkdir(parents=True, exist_ok=True))
    own = find_tool("runsc")
    if own is None or await runsc_version(own) < MIN_RUNSC:
        own = await _extract_runsc(directory, environment)
    return await asyncio.to_thread(_link, directory / "runsc", own)


async def _extract_runsc(directory: Path, environment: Mapping[str, str]) -> Path:
    """Take runsc out of Debian's package, whose signature apt checks; nothing is installed on the host."""
    with tempfile.TemporaryDirectory(prefix=".new-", dir=directory) as scratch:
        archive = Path(scratch) / "runsc.tar"
        argv = [
            "mmdebstrap",
            "--quiet",
            "--mode=root",
            "--variant=extract",
            "--include=runsc",
            RUNSC_SUITE,
            str(archive),
        ]
        await process.run(argv, timeout=EXTRACT_TIMEOUT, env={**environment, **process.BASE_ENV})
        program = Path(scratch) / "runsc"
        await asyncio.to_thread(_unpack_member, archive, RUNSC_MEMBER, program)
        version = await runsc_version(program)
        if version < MIN_RUNSC:
            raise HostError(f"Debian's runsc is of {version[0]}, {MIN_RUNSC[0]} or newer is needed")
        return program.rename(directory / f"runsc-{version[0]}.{version[1]}")


async def _apt(arguments: list[str], environment: Mapping[str, str]) -> None:
    """Run apt-get to its end even when we are cancelled: a package manager that is killed leaves a broken host."""
    argv = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=600", "-o", "Dpkg::Use-Pty=0", *arguments]
    env = {**environment, **process.BASE_ENV, "DEBIAN_FRONTEND": "noninteractive"}
    running = asyncio.create_task(process.run(argv, timeout=APT_TIMEOUT, env=env))
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise


async def _is_available(package: str) -> bool:
    completed = await process.run(
        ["apt-cache", "show", "--no-all-versions", package], timeout=QUICK_TIMEOUT, check=False
    )
    return completed.returncode == 0 and bool(completed.stdout)


def _note_unavailable(image_cache: Path, packages: list[str]) -> None:
    if packages:
        image_cache.mkdir(parents=True, exist_ok=True)
        with (image_cache / REFUSED_LIST).open("a") as file:
            file.write("".join(f"{name}\n" for name in packages))


def _unpack_member(archive: Path, member: str, target: Path) -> None:
    with tarfile.open(archive) as tar:
        source = tar.extractfile(member)
        if source is None:
            raise HostError(f"Debian's package has no {member}")
        with target.open("wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
    target.chmod(0o755)


def _link(link: Path, target: Path) -> Path:
    """Point `link` at `target`, by a relative name within one directory, replacing what was there in one step."""
    new = link.with_name(".new-link")
    new.unlink(missing_ok=True)
    new.symlink_to(target.name if target.parent == link.parent else target)
    return new.replace(link)
