"""A real sandbox with the real agent in it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from gvisor_support import IMAGE_CACHE, Lab, OneImage, open_lab

import rundatsheesh.agent
from rundatsheesh.manager.engines.gvisor import GVisor, GVisorConfig
from rundatsheesh.manager.guest import CallResult, ExecRequest, Guest

AGENT = Path(rundatsheesh.agent.__file__).parent
MAX_OUTPUT = 1 << 16


@pytest.fixture
async def agent_lab(tmp_path: Path, guest_root: Path) -> AsyncIterator[Lab]:
    async with open_lab(tmp_path, guest_root) as opened:
        opened.engine = GVisor(GVisorConfig(IMAGE_CACHE, OneImage(guest_root), AGENT))
        yield opened


@pytest.fixture
async def guest(agent_lab: Lab) -> AsyncIterator[Guest]:
    machine = await agent_lab.start()
    connected = await Guest.connect(await machine.connect(), timeout=30)
    yield connected
    await connected.close()


async def sh(guest: Guest, command: str) -> CallResult:
    return await guest.exec(ExecRequest(cmd=command, timeout_ms=60_000, max_output=MAX_OUTPUT))
