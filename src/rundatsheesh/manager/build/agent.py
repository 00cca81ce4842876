"""The agent's package with its modules packed by the guest's own Python, so that no guest looks for each of them and
compiles it at its start.

IMAGE_CACHE/agents/<hash>/    a copy of the package with its pack, `modules`; complete or absent, and never changed

A guest that runs goes on with the copy that it was started with, whatever becomes of the installed package meanwhile.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from rundatsheesh.manager.build.files import make_directory
from rundatsheesh.manager.build.image import Image
from rundatsheesh.manager.host import process

PACK_TIMEOUT = 120.0  # seconds; one on an idle host
MOST = 8 << 20  # bytes of a pack; it has one million
NEW_PREFIX = ".new-"
CACHE = "__pycache__"
PACK = "modules"
PACKER = Path(__file__).with_name("pack.py")


def find_agent(cache: Path, image: Image, package: Path) -> Path | None:
    """The copy of this package that was packed for this image; None when it was not made."""
    directory = _directory(cache, image, _read(package))
    return directory if directory.is_dir() else None


async def ensure_agent(cache: Path, image: Image, package: Path) -> Path:
    """Find the packed copy or make it. Two that make it at once make the same. Raises HostError or OSError."""
    sources = await asyncio.to_thread(_read, package)
    directory = _directory(cache, image, sources)
    if not directory.is_dir():
        packed = await _pack(image.root, sources)
        await asyncio.to_thread(_write, directory, {**sources, PACK: packed})
    return directory


async def _pack(root: Path, sources: dict[str, bytes]) -> bytes:
    """Nothing is written to the image: what the guest's Python reads and makes passes through pipes."""
    texts = {name: data.decode() for name, data in sources.items() if name.endswith(".py") and name != "__main__.py"}
    argv = ["chroot", str(root), "/usr/bin/python3", "-I", "-S", "-B", "-c", PACKER.read_text()]
    environment = {**process.BASE_ENV, "PYTHONHASHSEED": "0"}
    done = await process.run(argv, timeout=PACK_TIMEOUT, input=json.dumps(texts).encode(), limit=MOST, env=environment)
    return done.stdout


def _write(directory: Path, files: dict[str, bytes]) -> None:
    make_directory(directory.parent)
    new = Path(tempfile.mkdtemp(prefix=NEW_PREFIX, dir=directory.parent))
    try:
        new.chmod(0o755)
        for name, data in files.items():
            make_directory((new / name).parent)
            (new / name).write_bytes(data)
            (new / name).chmod(0o644)
        os.sync()  # the directory must not survive a power failure that its files did not
        _rename(new, directory)
    finally:
        if new.exists():  # after a failure, or when somebody was faster
            shutil.rmtree(new)


def _rename(new: Path, directory: Path) -> None:
    try:
        new.rename(directory)
    except OSError:
        if not directory.is_dir():
            raise


def _read(package: Path) -> dict[str, bytes]:
    """The package's files by their paths in it, without byte code of the Python that we run on."""
    files = sorted(path for path in package.rglob("*") if path.is_file() and CACHE not in path.parts)
    return {str(path.relative_to(package)): path.read_bytes() for path in files}


def _directory(cache: Path, image: Image, sources: dict[str, bytes]) -> Path:
    digest = hashlib.sha256(f"{image.id}\n{PACKER.read_text()}\n".encode())
    for name, data in sources.items():
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    return cache / "agents" / digest.hexdigest()[:16]
