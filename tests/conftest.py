"""What every kind of test shares: which engine is tested, and one real server for all that speak HTTP."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

from server_support import ENGINES, Dns, Server, new_server

FULL = "gvisor"  # the engine that runs everything unless --engine says otherwise


# Machines that run tests are busy: how long an example takes says nothing about the code.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--engine", choices=ENGINES, help="run the contract on this engine only, and all of it")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "every_engine: runs on each engine even when no --engine is given")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _ORDER.get(item.path.parent.name, 0))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Whoever reads of a failure also reads what the server said."""
    report = yield
    if report.failed:
        used = [getattr(value, "server", value) for value in getattr(item, "funcargs", {}).values()]
        logs = {server.log: server.last_words(6000) for server in used if isinstance(server, Server)}
        report.sections += [(f"Server log {log.name}", words) for log, words in logs.items()]
    return report


@pytest.hookimpl(optionalhook=True)  # of the plugin that runs several at once
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return Groups(config, log)


class Groups(LoadScopeScheduling):
    """Who shares something runs one after the other; the longest groups begin."""

    def _split_scope(self, nodeid: str) -> str:
        return _group(Path(nodeid.split("::")[0]))


_ON_THEIR_OWN = ("test_hostile", "test_restart", "test_service", "test_tls", "test_settings", "test_pool")
_ORDER = {"contract": -3, "docs": -2, "vm": -1}  # the others follow in the order in which they were found


def _group(path: Path) -> str:
    kind, name = path.parent.name, path.stem
    if kind in ("contract", "docs") and name not in _ON_THEIR_OWN:
        return "http"  # one server, and what it keeps ready to make VMs from
    if kind == "host" and name.startswith(("test_agent_", "test_files_", "test_scripts_")):
        return "user"  # natively they are the same user of the host, whose processes are limited
    if name.startswith("test_net_"):
        return "net"
    return f"{kind}/{name}"


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
