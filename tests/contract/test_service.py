"""The systemd unit: what it takes away from the server is nothing that the VMs need."""

from __future__ import annotations

import secrets
import shutil
import subprocess
from pathlib import Path

import pytest

from server_support import Dns, Server

UNIT = Path(__file__).parents[2] / "packaging" / "rundatsheesh.service"


def settings() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text().splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def test_guests_outlive_the_service() -> None:
    unit = settings()
    assert unit["KillMode"] == ["process"]
    separate = ("Private", "Protect", "Inaccessible", "ReadOnlyPaths", "ReadWritePaths", "Bind", "RootDirectory")
    assert not [name for name in unit if name.startswith(separate)], "mounts of its own would die with it"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_understands_it(tmp_path: Path) -> None:
    there = tmp_path / UNIT.name  # with a program that exists
    there.write_text(UNIT.read_text().replace("/opt/rundatsheesh/.venv/bin/rds serve", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", str(there)], capture_output=True, text=True, timeout=60)
    complaints = [line for line in (done.stdout + done.stderr).splitlines() if UNIT.name in line]
    assert complaints == []


def test_the_server_works_with_what_the_unit_leaves_it(directory: Path, dns: Dns, engine: str) -> None:
    assert settings()["NoNewPrivileges"] == ["yes"]
    kept = ",".join("+" + name.removeprefix("CAP_").lower() for name in " ".join(_bounding_set()).split())
    confined = ["setpriv", "--no-new-privs", f"--bounding-set=-all,{kept}", "--"]
    name = secrets.token_hex(3)
    server = Server(directory / name, Path("/run") / f"rdst-{name}", {"DNS_SERVER_IP": dns.address}, through=confined)
    with server.running():
        status = Path(f"/proc/{server.pid}/status").read_text()
        assert "NoNewPrivs:\t1" in status and "CapBnd:\t000001ffffffffff" not in status
        box = server.create(engine, allowIps=["172.16.0.1/32"], outboundInternet=True)
        box.output("echo kept > file && sync file")
        assert box.post("stop").status_code == 204 and box.post("start").status_code == 204
        server.kill()
        server.start()
        assert box.output("cat file; id -u") == "kept\n1000\n"
        assert box.ts("result.set(6 * 7)")["result"] == 42
        box.delete()
        assert server.traces() == []


def _bounding_set() -> list[str]:
    return settings()["CapabilityBoundingSet"]
