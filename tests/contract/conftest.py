"""VMs of the engine under test, and the proof after each file of tests that nothing of them is left."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from server_support import Box, Server, eventually, scale

sys.path.append(str(Path(__file__).parents[1] / "pure"))  # archive_samples is written once, for both

NewVm = Callable[..., Box]


@pytest.fixture(scope="module", autouse=True)
def leftovers(server: Server) -> Iterator[None]:
    """After each file of tests: no process, namespace, link, rule, mount, loop device, cgroup or file of any VM."""
    yield
    eventually(lambda: not server.http.get("/v1/vms").json(), scale(5), "all VMs deleted")
    left = server.traces()
    assert left == [], left


@pytest.fixture
def vm(server: Server, engine: str) -> Iterator[NewVm]:
    """Makes VMs that are deleted after the test."""
    with ExitStack() as stack:

        def create(**fields: Any) -> Box:
            made = server.create(engine, **fields)
            stack.callback(made.delete)
            return made

        yield create


@pytest.fixture(scope="module")
def box(server: Server, engine: str) -> Iterator[Box]:
    """One VM without network for all tests of a file that leave it as they found it."""
    made = server.create(engine)
    yield made
    made.delete()
