"""The doctor on this very host, and its reading of hosts that are otherwise."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from rundatsheesh.cli import main
from rundatsheesh.commands import checks
from rundatsheesh.manager.engines.base import Availability
from rundatsheesh.manager.errors import HostError
from rundatsheesh.manager.host import doctor
from rundatsheesh.manager.host.doctor import Check, Finding, Level
from rundatsheesh.manager.settings import Settings

UNIFIED = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"


async def test_this_host_runs_vms() -> None:
    results = await doctor.examine(checks.all_checks(Settings()))
    assert [result for result in results if result.finding.level is Level.FAIL] == []
    assert all(result.finding.hint for result in results if result.finding.level is not Level.OK)


async def test_looking_leaves_nothing() -> None:
    def traces() -> set[str]:
        return {f"link {path.name}" for path in Path("/sys/class/net").iterdir()} | {
            f"mount {line.split()[4]}"
            for line in Path("/proc/self/mountinfo").read_text().splitlines()
            if "rds" in line
        }

    before = traces()
    await doctor.examine(checks.all_checks(Settings()))
    assert not {trace for trace in traces() - before if "rds-" in trace}


def test_the_command_speaks_json() -> None:
    result = CliRunner().invoke(main, ["doctor", "--json"])
    facts = json.loads(result.stdout)
    assert {"user", "nftables", "cgroups", "guest image", "engine gvisor", "engines"} <= {
        fact["name"] for fact in facts
    }
    assert set(facts[0]) == {"name", "level", "fact", "hint"}
    assert result.exit_code == (1 if any(fact["level"] == "fail" for fact in facts) else 0)


async def test_a_check_that_breaks_is_a_failed_check() -> None:
    async def broken() -> Finding:
        raise HostError("out of order")

    results = await doctor.examine([Check("one", broken), Check("two", doctor.in_thread(lambda: doctor.ok("fine")))])
    assert [result.finding.level for result in results] == [Level.FAIL, Level.OK]
    assert "out of order" in results[0].finding.fact


async def test_a_check_that_hangs_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hangs() -> Finding:
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    monkeypatch.setattr(doctor, "CHECK_TIMEOUT", 0.05)
    results = await doctor.examine([Check("one", hangs)])
    assert results[0].finding.level is Level.FAIL and "no answer" in results[0].finding.fact


async def test_without_image_and_engine_the_server_would_not_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("IMAGE_CACHE", str(tmp_path))
    no = Availability(False, "not here", "get it")
    monkeypatch.setattr(checks, "engines_of", lambda _: {"gvisor": lambda: no})
    results = {r.name: r.finding for r in await doctor.examine(checks.all_checks(Settings()))}
    assert results["engine gvisor"] == doctor.warn("not here", "get it")
    assert results["guest image"].level is results["engines"].level is Level.FAIL
    assert results["guest image"].hint == doctor.SET_UP


@pytest.mark.parametrize(
    ("rules", "level"),
    [
        (
            b"table ip filter {\n chain FORWARD {\n  type filter hook forward priority filter; policy drop;\n }\n}",
            "warn",
        ),
        (
            b"table ip filter {\n chain FORWARD {\n  type filter hook forward priority filter; policy accept;\n }\n}",
            "ok",
        ),
        (
            b"table inet rundatsheesh_0 {\n chain f {\n  type filter hook forward priority filter; policy drop;\n }\n}",
            "ok",
        ),
        (b"", "ok"),
    ],
)
async def test_firewalls_that_drop_what_is_forwarded_are_told(
    monkeypatch: pytest.MonkeyPatch, rules: bytes, level: str
) -> None:
    async def listed(argv: list[str], **_: object) -> doctor.process.Completed:
        return doctor.process.Completed(tuple(argv), 0, rules, b"")

    monkeypatch.setattr(doctor.process, "run", listed)
    check = next(c for c in checks.all_checks(Settings()) if c.name == "other firewalls")
    assert (await check.look()).level == level


async def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.MIN_DISK_MB, "STORAGE_ROOT", 1 << 40)
    host = doctor.host_checks(storage_root=tmp_path / "not/yet/made", image_cache=tmp_path)
    finding = await next(check for check in host if check.name == "storage").look()
    assert finding.level is Level.WARN and finding.hint is not None and "STORAGE_ROOT" in finding.hint
    assert not (tmp_path / "not").exists()
