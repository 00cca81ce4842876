"""The agent with byte code of the guest's Python: made once, by pipes alone, and what guests then run."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import rundatsheesh.agent
from rundatsheesh.manager.build.agent import ensure_agent, find_agent
from rundatsheesh.manager.build.image import Image, list_images

AGENT = Path(rundatsheesh.agent.__file__).parent
IMAGE_CACHE = Path("/var/cache/rundatsheesh")

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root may change its root directory")


@pytest.fixture
def image() -> Image:
    found = list_images(IMAGE_CACHE)
    if not found:
        pytest.skip("no guest image on this host: run `rds setup`")
    return found[-1]


async def test_it_is_made_once(tmp_path: Path, image: Image) -> None:
    before = sorted((image.root / "root").rglob("*")), (image.root / "tmp").stat().st_mtime_ns
    assert find_agent(tmp_path, image, AGENT) is None
    made = await ensure_agent(tmp_path, image, AGENT)
    inode = made.stat().st_ino
    assert find_agent(tmp_path, image, AGENT) == await ensure_agent(tmp_path, image, AGENT) == made
    assert made.stat().st_ino == inode
    assert list(made.parent.iterdir()) == [made]
    assert before == (sorted((image.root / "root").rglob("*")), (image.root / "tmp").stat().st_mtime_ns)


async def test_every_module_has_byte_code_that_the_guest_takes(tmp_path: Path, image: Image) -> None:
    made = await ensure_agent(tmp_path, image, AGENT)
    sources = {path.relative_to(AGENT) for path in AGENT.rglob("*.py")}
    assert {path.relative_to(made) for path in made.rglob("*.py")} == sources
    assert {path.relative_to(AGENT) for path in AGENT.rglob("*.js")} == {
        path.relative_to(made) for path in made.rglob("*.js")
    }
    caches = {(path.parent.parent / path.name.split(".")[0]).relative_to(made) for path in made.rglob("*.pyc")}
    assert caches == {path.with_suffix("") for path in sources}
    # Its own sources are never looked at: with others, the guest's Python does what the byte code says.
    scratch = tmp_path / "agent"
    shutil.copytree(made, scratch)
    (scratch / "libc.py").write_text("raise SystemExit('compiled')")
    code = f"import sys; sys.path[0:0] = [{str(tmp_path)!r}]; import agent.libc; print(agent.libc.POWER_OFF)"
    mount = f"mount --bind {tmp_path} {image.root}/tmp && exec chroot {image.root} /usr/bin/python3 -I -S -B -c"
    argv = ["unshare", "--mount", "sh", "-c", f'{mount} "$1"', "sh", code.replace(str(tmp_path), "/tmp")]
    assert subprocess.run(argv, check=True, capture_output=True, text=True).stdout == f"{0x4321FEDC}\n"


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
