"""The guest's root directory, step by step: Debian packages first, then what turns them into the guest of the contract.

Each step takes the root as the one before left it. The outcome depends on the recipe and on the Debian packages alone,
not on the host, the time or the order in which a directory lists its files.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path

from rundatsheesh.manager.build.files import make_directory, walk
from rundatsheesh.manager.build.recipe import (
    DIRECTORIES,
    FILES,
    GROUP_LINE,
    PASSWD_LINE,
    RECIPE,
    REMOVED,
    SOURCE_DATE_EPOCH,
)
from rundatsheesh.manager.errors import HostError
from rundatsheesh.manager.host import process
from rundatsheesh.manager.model import GUEST_UID, WORKSPACE

MMDEBSTRAP_TIMEOUT = 1800.0  # seconds; 30 to 60 are usual, the rest is for slow networks
COMPILE_TIMEOUT = 300.0
SHADOW_DAY = "1"  # "last changed" of every account, in days; packages write the day of the build


async def unpack_packages(root: Path, environment: Mapping[str, str]) -> None:
    """Make `root` and fill it with Debian's packages; signatures are checked by apt."""
    options = [f"--dpkgopt=path-exclude={path}" for path in RECIPE.excluded]
    options += [f"--dpkgopt=path-include={path}" for path in RECIPE.kept]
    argv = [
        "mmdebstrap",
        "--quiet",
        "--mode=root",
        "--variant=minbase",
        "--format=directory",
        f"--include={','.join(RECIPE.packages)}",
        "--dpkgopt=force-unsafe-io",  # the tree is synced once at the end, not file by file
        '--aptopt=Acquire::Languages "none"',
        *options,
        RECIPE.suite,
        str(root),
    ]
    epoch = {"SOURCE_DATE_EPOCH": str(SOURCE_DATE_EPOCH)}
    await process.run(argv, timeout=MMDEBSTRAP_TIMEOUT, env={**environment, **process.BASE_ENV, **epoch})


def remove_leftovers(root: Path) -> None:
    """Delete what the recipe removes. A pattern that matches nothing is fine: packages change."""
    for pattern in REMOVED:
        for path in sorted(root.glob(pattern)):
            if not path.parent.resolve().is_relative_to(root.resolve()):
                raise HostError(f"{path} leads out of the guest's root")
            _remove(path)


def write_files(root: Path) -> None:
    """The recipe's directories and files, owned by root and readable by all."""
    for name, mode in DIRECTORIES.items():
        directory = root / name
        make_directory(directory)
        directory.chmod(mode)
    for name, text in FILES.items():
        file = root / name
        make_directory(file.parent)
        file.unlink(missing_ok=True)  # it may be a link to somewhere else
        file.write_text(text)
        file.chmod(0o644)


def add_user(root: Path) -> None:
    """The guest's user, whose home is the workspace under both of its names."""
    for name, line in (("etc/passwd", PASSWD_LINE), ("etc/group", GROUP_LINE)):
        file = root / name
        file.write_text(file.read_text() + line + "\n")
    shadow = root / "etc/shadow"
    accounts = [line.split(":") for line in shadow.read_text().splitlines()]
    accounts.append(["user", "*", "", "0", "99999", "7", "", "", ""])
    shadow.write_text("".join(":".join([name, "*", SHADOW_DAY, *rest[2:]]) + "\n" for name, *rest in accounts))
    os.chown(root / WORKSPACE.lstrip("/"), GUEST_UID, GUEST_UID)
    (root / "home/user").symlink_to(WORKSPACE)


def drop_privileges(root: Path) -> None:
    """Take setuid, setgid and file capabilities off everything: no program of a guest needs them."""
    for path in walk(root):
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            continue
        if mode & (stat.S_ISUID | stat.S_ISGID):
            path.chmod(stat.S_IMODE(mode) & ~(stat.S_ISUID | stat.S_ISGID))
        if "security.capability" in os.listxattr(path, follow_symlinks=False):
            os.removexattr(path, "security.capability", follow_symlinks=False)


async def compile_python(root: Path) -> None:
    """Compile every module of the guest's Python anew, so that nothing is compiled in a guest, whose root is read-only.

    The byte code is not checked against its source at import: both are in the same read-only image, and the check would
    cost a stat per module.
    """
    libraries = await asyncio.to_thread(_drop_byte_code, root)
    # The caches' own directories follow the umask, which is the caller's.
    argv = ["chroot", str(root), "/bin/sh", "-c", 'umask 022 && exec "$@"', "sh"]
    # -B and -f: what compileall itself imports is compiled like the rest, not cached by the time of its source.
    argv += ["/usr/bin/python3", "-I", "-B", "-m", "compileall", "-f", "-q", "-j1"]
    argv += ["--invalidation-mode", "unchecked-hash", *libraries]
    environment = {**process.BASE_ENV, "PYTHONHASHSEED": "0", "SOURCE_DATE_EPOCH": str(SOURCE_DATE_EPOCH)}
    await process.run(argv, timeout=COMPILE_TIMEOUT, env=environment)


async def archive_locales(root: Path) -> None:
    """Put what programs load at their start for a locale into one file: two opens instead of 26 for each program, a
    quarter of the time that a shell takes to start in gVisor."""
    locales = sorted(str(path.relative_to(root)) for path in (root / "usr/lib/locale").iterdir() if path.is_dir())
    argv = ["chroot", str(root), "/usr/bin/localedef", "--quiet", "--add-to-archive", *(f"/{path}" for path in locales)]
    await process.run(argv, timeout=COMPILE_TIMEOUT)


def level_times(root: Path) -> None:
    """Give every file the same time stamps."""
    stamp = (SOURCE_DATE_EPOCH, SOURCE_DATE_EPOCH)
    for path in walk(root):
        os.utime(path, stamp, follow_symlinks=False)
    os.utime(root, stamp)


def installed_packages(root: Path) -> dict[str, str]:
    """Debian package → version, from the root's own package database."""
    packages: dict[str, str] = {}
    for paragraph in (root / "var/lib/dpkg/status").read_text().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in paragraph.splitlines() if ": " in line and line[0] != " ")
        if "Package" in fields and "Version" in fields:
            packages[fields["Package"]] = fields["Version"]
    return dict(sorted(packages.items()))


def _drop_byte_code(root: Path) -> list[str]:
    """Delete all of the guest's byte code; returns the library directories, as paths inside the guest."""
    libraries = [path for path in sorted(root.glob("usr/lib/python3*")) if path.is_dir()]
    for library in libraries:
        for cache in sorted(library.rglob("__pycache__")):
            shutil.rmtree(cache)
    return [f"/{library.relative_to(root)}" for library in libraries]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
