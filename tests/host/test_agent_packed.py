"""The agent as the guest's Python packs it: made once, by pipes alone, and what guests then run."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import rundatsheesh.agent
from rundatsheesh.manager.build.agent import PACK, ensure_agent, find_agent
from rundatsheesh.manager.build.image import Image, list_images

AGENT = Path(rundatsheesh.agent.__file__).parent
IMAGE_CACHE = Path("/var/cache/rundatsheesh")
# At the end of the agent's first module: what it finds.
TELL = """
def main(arguments):
    from . import libc, wire
    import socket
    print(arguments, libc.POWER_OFF, libc.__file__, wire.__doc__, type(socket.__loader__).__name__)
"""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root may change its root directory")


@pytest.fixture
def image() -> Image:
    found = list_images(IMAGE_CACHE)
    if not found:
        pytest.skip("no guest image on this host: run `rds setup`")
    return found[-1]


def telling(directory: Path) -> Path:
    package = directory / "package"
    shutil.copytree(AGENT, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "init.py").write_text((AGENT / "init.py").read_text() + TELL)
    return package


def run(image: Image, agent: Path) -> str:
    """What the agent prints that is started as in a guest, but in a directory of the host."""
    mount = f"mount -t tmpfs tmpfs {image.root}/opt/rds && mkdir {image.root}/opt/rds/agent"
    mount += f" && mount --bind {agent} {image.root}/opt/rds/agent && mount --rbind /proc {image.root}/proc"
    python = f"exec chroot {image.root} /usr/bin/python3 -I -S -B /opt/rds/agent/__main__.py --engine gvisor"
    argv = ["unshare", "--mount", "--propagation", "private", "sh", "-c", f"{mount} && {python}"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


async def test_it_is_made_once(tmp_path: Path, image: Image) -> None:
    before = sorted((image.root / "root").rglob("*")), (image.root / "tmp").stat().st_mtime_ns
    assert find_agent(tmp_path, image, AGENT) is None
    made = await ensure_agent(tmp_path, image, AGENT)
    inode = made.stat().st_ino
    assert find_agent(tmp_path, image, AGENT) == await ensure_agent(tmp_path, image, AGENT) == made
    assert made.stat().st_ino == inode
    assert list(made.parent.iterdir()) == [made]
    assert before == (sorted((image.root / "root").rglob("*")), (image.root / "tmp").stat().st_mtime_ns)


async def test_it_is_the_package_and_its_pack(tmp_path: Path, image: Image) -> None:
    made = await ensure_agent(tmp_path, image, AGENT)
    files = {path.relative_to(AGENT) for path in AGENT.rglob("*.*") if path.suffix != ".pyc"}
    assert {path.relative_to(made) for path in made.rglob("*") if path.is_file()} == {*files, Path(PACK)}


async def test_guests_run_what_is_packed(tmp_path: Path, image: Image) -> None:
    """The sources are never looked at: with others, the guest's Python does what the pack says."""
    package = telling(tmp_path)
    made = await ensure_agent(tmp_path, image, package)
    for source in made.glob("*.py"):
        if source.name != "__main__.py":
            source.write_text("raise SystemExit('read from its file')")
    told = run(image, made)
    assert told == f"['--engine', 'gvisor'] {0x4321FEDC} /opt/rds/agent/libc.py None Packed\n"


def test_without_a_pack_it_runs_from_its_files(tmp_path: Path, image: Image) -> None:
    package = telling(tmp_path)
    told = run(image, package)
    assert told.startswith(f"['--engine', 'gvisor'] {0x4321FEDC} /opt/rds/agent/libc.py The ")
    assert told.endswith(" SourceFileLoader\n")


async def test_another_package_is_another_copy(tmp_path: Path, image: Image) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    first = await ensure_agent(tmp_path, image, package)
    (package / "__pycache__").mkdir()
    (package / "__pycache__/x.pyc").write_bytes(b"of the host")
    assert await ensure_agent(tmp_path, image, package) == first
    (package / "__init__.py").write_text("A = 1")
    assert await ensure_agent(tmp_path, image, package) != first
    assert not list((tmp_path / "agents").glob(".new-*"))
