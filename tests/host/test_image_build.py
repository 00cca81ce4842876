"""Building and caching, with the slow parts replaced at their seam: what remains after success, failure and kill."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from rundatsheesh.manager.build import image
from rundatsheesh.manager.build.image import Build, Manifest
from rundatsheesh.manager.build.recipe import recipe_hash
from rundatsheesh.manager.errors import HostError


def quiet(_: str) -> None:
    """Nobody listens."""


@pytest.fixture
def built_with(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces the steps by one that writes a tree of one file; the list says how often it ran."""
    runs: list[str] = []

    async def step(build: Build) -> None:
        runs.append(build.recipe)
        build.root.mkdir()
        (build.root / "file").write_text("content")
        (build.directory / "contents.txt").write_text(image.files.describe(build.root))
        manifest = Manifest(build.recipe, "suite", "arch", "0", 7, {}, {})
        (build.directory / "manifest.json").write_text(image.json.dumps(image.asdict(manifest)))

    monkeypatch.setattr(image, "STEPS", (step,))
    return runs


async def test_it_is_built_once(tmp_path: Path, built_with: list[str]) -> None:
    first = await image.ensure_image(tmp_path, {}, quiet)
    second = await image.ensure_image(tmp_path, {}, quiet)
    assert first == second and first.id == recipe_hash() and built_with == [recipe_hash()]
    assert first.directory == tmp_path / "images" / first.id
    assert image.changed_files(first) == []
    (first.root / "file").write_text("other")
    assert len(image.changed_files(first)) == 2


async def test_a_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def step(build: Build) -> None:
        (build.directory / "half").write_text("done")
        raise HostError("the network is down")

    monkeypatch.setattr(image, "STEPS", (step,))
    with pytest.raises(HostError, match="network is down"):
        await image.ensure_image(tmp_path, {}, quiet)
    assert list((tmp_path / "images").iterdir()) == []


async def test_a_cancelled_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = asyncio.Event()

    async def step(build: Build) -> None:
        (build.directory / "half").write_text("done")
        started.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(image, "STEPS", (step,))
    task = asyncio.create_task(image.ensure_image(tmp_path, {}, quiet))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert list((tmp_path / "images").iterdir()) == []


async def test_what_a_killed_build_left_is_removed(tmp_path: Path, built_with: list[str]) -> None:
    leftover = tmp_path / "images" / f"{image.NEW_PREFIX}dead"
    (leftover / "root").mkdir(parents=True)
    (leftover / "manifest.json").write_text("{}")
    await image.ensure_image(tmp_path, {}, quiet)
    assert [path.name for path in (tmp_path / "images").iterdir()] == built_with
