"""The agent's package with byte code of the guest's own Python, so that no guest compiles it at its start.

IMAGE_CACHE/agents/<hash>/    a copy of the package with __pycache__; complete or absent, and never changed

A guest that runs goes on with the copy that it was started with, whatever becomes of the installed package meanwhile.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from rundatsheesh.manager.build.files import make_directory
from rundatsheesh.manager.build.image import Image
from rundatsheesh.manager.host import process

COMPILE_TIMEOUT = 120.0  # seconds; a fraction of one on an idle host
NEW_PREFIX = ".new-"
CACHE = "__pycache__"

# Run by the guest's Python: sources by their paths in the package on stdin, byte code by its paths on stdout. The code
# is of the kind that is not checked against its source when it is loaded (PEP 552, flags 1).
COMPILE = """
import base64, importlib.util, json, marshal, sys
made = {}
for name, text in json.load(sys.stdin).items():
    source = text.encode()
    code = marshal.dumps(compile(source, "/opt/rds/agent/" + name, "exec", dont_inherit=True))
    head = importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little") + importlib.util.source_hash(source)
    made[importlib.util.cache_from_source(name)] = base64.b64encode(head + code).decode()
json.dump(made, sys.stdout)
"""


def find_agent(cache: Path, image: Image, package: Path) -> Path | None:
    """The copy of this package that was compiled for this image; None when it was not made."""
    directory = _directory(cache, image, _read(package))
    return directory if directory.is_dir() else None


async def ensure_agent(cache: Path, image: Image, package: Path) -> Path:
    """Find the compiled copy or make it. Two that make it at once make the same. Raises HostError or OSError."""
    sources = await asyncio.to_thread(_read, package)
    directory = _directory(cache, image, sources)
    if not directory.is_dir():
        byte_code = await _compile(image.root, sources)
        await asyncio.to_thread(_write, directory, {**sources, **byte_code})
    return directory


async def _compile(root: Path, sources: dict[str, bytes]) -> dict[str, bytes]:
    """Nothing is written to the image: what the guest's Python reads and makes passes through pipes."""
    texts = {name: data.decode() for name, data in sources.items() if name.endswith(".py")}
    argv = ["chroot", str(root), "/usr/bin/python3", "-I", "-S", "-B", "-c", COMPILE]
    environment = {**process.BASE_ENV, "PYTHONHASHSEED": "0"}
    done = await process.run(
        argv, timeout=COMPILE_TIMEOUT, input=json.dumps(texts).encode(), limit=8 << 20, env=environment
    )
    return {name: base64.b64decode(text) for name, text in json.loads(done.stdout).items()}


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
    digest = hashlib.sha256(f"{image.id}\n{COMPILE}\n".encode())
    for name, data in sources.items():
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    return cache / "agents" / digest.hexdigest()[:16]
