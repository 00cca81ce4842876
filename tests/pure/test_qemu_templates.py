"""Which templates are kept, and that nobody can change one."""

from __future__ import annotations

import asyncio
import mmap
import os

import pytest

from rundatsheesh.manager.engines.qemu_args import Accelerator, Hardware
from rundatsheesh.manager.engines.templates import Key, Template, Templates
from rundatsheesh.manager.host import memfile


def key(mem_mb: int) -> Key:
    return Key(Hardware(1, mem_mb, Accelerator.TCG, 1), ((1, 2, 3, 4),), "digest", (5,), "model")


class Maker:
    def __init__(self) -> None:
        self.made = 0

    async def __call__(self) -> Template:
        self.made += 1
        await asyncio.sleep(0)
        memory = memfile.create("memory", 8192)
        os.pwrite(memory, b"template", 0)
        return Template(memory, _state(), _disk())


async def test_one_is_made_and_all_get_it() -> None:
    templates, make = Templates(), Maker()
    got = await asyncio.gather(*(templates.get(key(512), make) for _ in range(5)))
    assert make.made == 1
    assert len(set(map(id, got))) == 1
    templates.discard(key(512))


async def test_the_least_recently_used_one_goes() -> None:
    templates, make = Templates(limit=2), Maker()
    for mem_mb in (1, 2, 1, 3, 1):
        await templates.get(key(mem_mb), make)
    assert (make.made, len(templates)) == (3, 2)
    await templates.get(key(2), make)
    assert make.made == 4
    for mem_mb in (1, 2, 3):
        templates.discard(key(mem_mb))
    assert len(templates) == 0


async def test_the_next_one_tries_where_making_failed() -> None:
    templates, make = Templates(), Maker()

    async def fail() -> Template:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        await templates.get(key(1), fail)
    await templates.get(key(1), make)
    templates.discard(key(1))
    templates.discard(key(1))
    await templates.get(key(1), make)
    assert make.made == 2
    templates.discard(key(1))


async def test_a_clone_writes_to_its_own_copy_only() -> None:
    template = await Maker()()
    with template.opened() as (memory, state), template.opened() as (_, other):
        with mmap.mmap(memory, 8192, flags=mmap.MAP_PRIVATE) as private:
            private[0:5] = b"clone"
        assert os.pread(memory, 8, 0) == b"template"
        with pytest.raises(OSError):
            os.pwrite(memory, b"x", 0)
        with pytest.raises(OSError):
            mmap.mmap(memory, 8192, flags=mmap.MAP_SHARED)
        with pytest.raises(OSError):
            os.ftruncate(memory, 0)
        assert (os.read(state, 9), os.read(other, 9)) == (b"state", b"state")
        with template.disk() as disk, pytest.raises(OSError):
            os.pwrite(disk, b"x", 0)
        template.close()
        assert os.pread(memory, 8, 0) == b"template"


def _state() -> int:
    descriptor = memfile.create("state")
    os.pwrite(descriptor, b"state", 0)
    return descriptor


def _disk() -> int:
    descriptor = memfile.create("disk")
    os.pwrite(descriptor, b"disk", 0)
    return descriptor
