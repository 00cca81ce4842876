"""What every kind of test shares: which engine is tested, and one real server for all that speak HTTP."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from server_support import ENGINES, Dns, Server, new_server

FULL = "gvisor"  # the engine that runs everything unless --engine says otherwise


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--engine", choices=ENGINES, help="run the contract on this engine only, and all of it")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "every_engine: runs on each engine even when no --engine is given")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`engine` is a parameter of whatever uses it: the chosen one, or the full one and a chosen few on the others."""
    speaks_http = metafunc.definition.path.parent.name in ("contract", "docs")
    if not speaks_http or "engine" not in metafunc.fixturenames:
        return
    chosen = metafunc.config.getoption("--engine")
    everywhere = metafunc.definition.get_closest_marker("every_engine") is not None
    metafunc.parametrize("engine", [chosen] if chosen else ENGINES if everywhere else [FULL], scope="module")


@pytest.fixture(scope="session")
def dns() -> Iterator[Dns]:
    """The name server that the tests' servers ask: no question leaves this machine."""
    with Dns() as running:
        yield running


@pytest.fixture(scope="session")
def directory() -> Iterator[Path]:
    """Short, because socket paths end at 107 bytes."""
    made = Path(tempfile.mkdtemp(prefix="rdst-"))
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="session")
def server(directory: Path, dns: Dns) -> Iterator[Server]:
    """A server with the development secrets and no warm VMs; ends with the session and then leaves nothing."""
    with new_server(directory, dns).running() as started:
        yield started
