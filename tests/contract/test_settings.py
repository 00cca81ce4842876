"""What the server is told by its environment, and what it refuses to start with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from server_support import Server

NAMES = [
    "API_KEY",
    "ADMIN_EMAIL",
    "ADMIN_PASSWORD",
    "HOST",
    "PORT",
    "STORAGE_ROOT",
    "DATABASE_URL",
    "ENGINE",
    "MAX_VMS",
    "MAX_CPU",
    "MAX_MEM_MB",
    "MAX_ALLOW_IPS",
    "MAX_EXEC_TIMEOUT_MS",
    "MAX_UPLOAD_BYTES",
    "MAX_OUTPUT_BYTES",
    "DNS_SERVER_IP",
    "ENABLE_WARM_POOL",
    "WARM_POOL_TARGET",
    "WARM_POOL_MAX_VMS",
    "RATE_LIMIT_PER_MINUTE",
]


def rds(server: Server, directory: Path, *arguments: str, **changed: str) -> subprocess.CompletedProcess[str]:
    """The command line with the server's environment, in a directory without a .env file."""
    command = [sys.executable, "-m", "rundatsheesh.cli", *arguments]
    environment = {**server.environment(), **changed}
    return subprocess.run(command, env=environment, cwd=directory, capture_output=True, text=True, timeout=120)


def test_config_prints_every_setting(server: Server, tmp_path: Path) -> None:
    printed = rds(server, tmp_path, "config", "--json", API_KEY="very-secret", MAX_VMS="7")
    rows = {row["name"]: row for row in json.loads(printed.stdout)}
    assert set(NAMES) <= set(rows)
    assert all(row["help"] for row in rows.values())
    assert rows["MAX_VMS"]["value"] == "7" and rows["MAX_VMS"]["default"] == "100"
    assert "very-secret" not in printed.stdout


def test_a_dotenv_file_is_read(server: Server, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("MAX_VMS=9\n")
    rows = json.loads(rds(server, tmp_path, "config", "--json").stdout)
    assert next(row["value"] for row in rows if row["name"] == "MAX_VMS") == "9"


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::"])
def test_other_addresses_need_real_secrets(server: Server, tmp_path: Path, host: str) -> None:
    refused = rds(server, tmp_path, "serve", HOST=host, STORAGE_ROOT=str(tmp_path / "root"))
    assert refused.returncode != 0
    for name in ("API_KEY", "ADMIN_EMAIL", "ADMIN_PASSWORD"):
        assert name in refused.stderr
    assert not (tmp_path / "root").exists(), "nothing is touched"


def test_those_that_are_there_are_not_called_missing(server: Server, tmp_path: Path) -> None:
    refused = rds(server, tmp_path, "serve", HOST="0.0.0.0", API_KEY="k", ADMIN_EMAIL="a@b.example")
    assert refused.returncode != 0
    assert "ADMIN_PASSWORD" in refused.stderr and "API_KEY" not in refused.stderr


def test_what_the_documentation_tells_is_no_secret(server: Server, tmp_path: Path) -> None:
    known = {"API_KEY": "dev-key", "ADMIN_EMAIL": "a@b.example", "ADMIN_PASSWORD": "admin"}
    refused = rds(server, tmp_path, "serve", HOST="0.0.0.0", **known)
    assert refused.returncode != 0
    assert "API_KEY, ADMIN_PASSWORD" in refused.stderr and "ADMIN_EMAIL" not in refused.stderr


@pytest.mark.parametrize(
    ("name", "value"), [("MAX_VMS", "many"), ("PORT", "70000"), ("DNS_SERVER_IP", "nonsense"), ("ENGINE", "bogus")]
)
def test_wrong_values_are_refused_by_name(server: Server, tmp_path: Path, name: str, value: str) -> None:
    changed = {"STORAGE_ROOT": str(tmp_path / "root"), "RUNTIME_DIR": str(tmp_path / "run"), name: value}
    refused = rds(server, tmp_path, "serve", **changed)
    assert refused.returncode != 0
    assert name in refused.stderr and "Traceback" not in refused.stderr


def test_one_server_per_storage_root(server: Server, tmp_path: Path) -> None:
    refused = rds(server, tmp_path, "serve")
    assert refused.returncode == 1
    assert "another server already manages" in refused.stderr


def test_doctor_finds_this_host_fit(server: Server, tmp_path: Path) -> None:
    examined = rds(server, tmp_path, "doctor", "--json")
    assert examined.returncode == 0
    assert any(row["name"].startswith("engine") for row in json.loads(examined.stdout))
