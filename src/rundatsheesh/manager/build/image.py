"""Guest images in the cache: found by their recipe's hash, built once, complete or absent.

IMAGE_CACHE/
├── set-up.lock           held by whoever changes the cache
├── images/<hash>/        one image; it appears by a rename, when it is complete
│   ├── root/             the guest's root directory, owned by root, read-only by convention
│   ├── manifest.json     what it was made of, see Manifest
│   ├── contents.txt      one line per file, see files.describe
│   └── vmlinux, ...      what virtual machines boot from, see host/bootfiles.py; where this host can make it
├── images/.new-*         an image that is being built
└── bin/                  runsc, see host/tools.py
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rundatsheesh.manager.build import files, kernel, runtimes, tree
from rundatsheesh.manager.build.recipe import RECIPE, guest_architecture, recipe_hash
from rundatsheesh.manager.errors import HostError
from rundatsheesh.manager.host import process

REMOVE_TIMEOUT = 300.0  # seconds
NEW_PREFIX = ".new-"
Report = Callable[[str], None]  # told what is being done now, a few words


@dataclass(frozen=True, slots=True)
class Manifest:
    recipe: str  # the recipe's hash
    suite: str
    architecture: str
    contents_sha256: str  # of contents.txt: equal for equal trees
    size_bytes: int  # of all files
    wheels: dict[str, str]  # file name → SHA-256
    packages: dict[str, str]  # Debian package → version


@dataclass(frozen=True, slots=True)
class Image:
    """A complete image. `id` is its recipe's hash."""

    id: str
    directory: Path
    manifest: Manifest

    @property
    def root(self) -> Path:
        return self.directory / "root"


@dataclass(frozen=True, slots=True)
class Build:
    """What a build step gets: the directory that becomes the image, the environment for downloads, a listener."""

    recipe: str  # hash of the recipe that is being followed
    directory: Path
    environment: Mapping[str, str]
    report: Report

    @property
    def root(self) -> Path:
        return self.directory / "root"


async def _make_root(build: Build) -> None:
    build.report("Debian packages, Deno and Node.js")
    scratch = build.directory / "wheels"
    async with asyncio.TaskGroup() as tasks:
        wheels = tasks.create_task(runtimes.download(scratch, build.environment))
        tasks.create_task(tree.unpack_packages(build.root, build.environment))
    build.report("unpacking Deno and Node.js")
    await asyncio.to_thread(_finish_root, build.root, wheels.result())
    build.report("compiling the guest's Python")
    await tree.compile_python(build.root)
    await tree.archive_locales(build.root)
    build.report("describing the files")
    await asyncio.to_thread(_write_manifest, build, wheels.result())
    await asyncio.to_thread(shutil.rmtree, scratch)


# What an image consists of, in the order in which it is made. Each step adds its files to `build.directory`.
STEPS: tuple[Callable[[Build], Awaitable[None]], ...] = (_make_root,)


@functools.cache
def current_recipe() -> str:
    """The recipe of this process. An upgrade of the files on disk does not part a running server from its image."""
    return recipe_hash()


def find_image(cache: Path, image_id: str | None = None) -> Image | None:
    """The image of this recipe, or of the id given; None when it was not built here."""
    directory = cache / "images" / (image_id or current_recipe())
    return _read(directory) if (directory / "manifest.json").is_file() else None


def list_images(cache: Path) -> list[Image]:
    """All complete images, those of older recipes too."""
    return [_read(path.parent) for path in sorted((cache / "images").glob("[0-9a-f]*/manifest.json"))]


async def ensure_image(cache: Path, environment: Mapping[str, str], report: Report) -> Image:
    """Find the image of this recipe or build it. The caller holds the cache's lock."""
    found = find_image(cache)
    if found is not None:
        return found
    images = cache / "images"
    await asyncio.to_thread(files.make_directory, images)
    for leftover in await asyncio.to_thread(lambda: list(images.glob(f"{NEW_PREFIX}*"))):
        await _remove_tree(leftover)
    image = await build_image(images, environment, report)
    final = images / image.id
    await asyncio.to_thread(os.sync)  # a manifest must not survive a power failure that its files did not
    image.directory.rename(final)
    return _read(final)


def wants_boot_files(image: Image) -> bool:
    """Whether `ensure_boot_files` would make them."""
    return not kernel.has_vm_files(image.directory) and kernel.unsupported_because() is None


async def ensure_boot_files(image: Image, environment: Mapping[str, str], report: Report) -> None:
    """Find or make what virtual machines boot from, beside the image's root directory. Only the qemu engine needs it,
    so a host that cannot make it is told and goes on without. The caller holds the cache's lock."""
    if kernel.has_vm_files(image.directory):
        return
    if (reason := kernel.unsupported_because()) is not None:
        report(f"no boot files for virtual machines: {reason}")
        return
    report("Debian's kernel, and the image as one file, for virtual machines")
    await kernel.build_vm_files(image.root, image.directory, environment)


async def build_image(where: Path, environment: Mapping[str, str], report: Report) -> Image:
    """Build this recipe's image in a new directory beneath `where`. On any failure nothing of it is left."""
    if os.geteuid() != 0:
        raise HostError("only root can build a guest image, whose files belong to root")
    recipe = current_recipe()
    directory = await asyncio.to_thread(_new_directory, where)
    try:
        build = Build(recipe, directory, environment, report)
        for step in STEPS:
            await step(build)
        return _read(directory)
    except BaseException:
        # Finished even when we are cancelled: a second cancellation leaves the rest to the next set-up.
        await asyncio.shield(_remove_tree(directory))
        raise


def changed_files(image: Image) -> list[str]:
    """Lines of contents.txt that the image's files no longer agree with: `-` as built, `+` as found. Empty: intact."""
    return compare(_contents(image), files.describe(image.root))


def compare(before: str, after: str) -> list[str]:
    """The lines that differ between two descriptions, `-` for the first and `+` for the second, sorted by path."""
    old, new = set(before.splitlines()), set(after.splitlines())
    lines = [f"- {line}" for line in old - new] + [f"+ {line}" for line in new - old]
    return sorted(lines, key=lambda line: (line.split(" ", 4)[4], line))


def compare_images(first: Image, second: Image) -> list[str]:
    return compare(_contents(first), _contents(second))


def _new_directory(where: Path) -> Path:
    directory = Path(tempfile.mkdtemp(prefix=NEW_PREFIX, dir=where))
    directory.chmod(0o755)
    return directory


def _finish_root(root: Path, wheels: tuple[Path, ...]) -> None:
    runtimes.install(wheels, root)
    tree.remove_leftovers(root)
    tree.write_files(root)
    tree.add_user(root)
    tree.drop_privileges(root)


def _write_manifest(build: Build, wheels: tuple[Path, ...]) -> None:
    """Level the time stamps, then describe what is there. Last of all: nothing may change afterwards."""
    tree.level_times(build.root)
    contents = files.describe(build.root)
    (build.directory / "contents.txt").write_text(contents)
    manifest = Manifest(
        recipe=build.recipe,
        suite=RECIPE.suite,
        architecture=guest_architecture(),
        contents_sha256=hashlib.sha256(contents.encode()).hexdigest(),
        size_bytes=files.size_of(build.root),
        wheels={wheel.name: files.sha256_of(wheel) for wheel in wheels},
        packages=tree.installed_packages(build.root),
    )
    (build.directory / "manifest.json").write_text(json.dumps(asdict(manifest), indent=1) + "\n")


def _read(directory: Path) -> Image:
    facts = json.loads((directory / "manifest.json").read_text())
    manifest = Manifest(**facts)
    return Image(manifest.recipe, directory, manifest)


def _contents(image: Image) -> str:
    return (image.directory / "contents.txt").read_text()


async def _remove_tree(directory: Path) -> None:
    # Never across a mount: a build that was killed may have left one, and what is behind it is the host's.
    await process.run(["rm", "-rf", "--one-file-system", "--", str(directory)], timeout=REMOVE_TIMEOUT)
