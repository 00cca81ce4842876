"""A PostgreSQL of the tests' own: from Debian's package, on a socket in a temporary directory, gone afterwards."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

INSTALLED = Path("/usr/lib/postgresql")  # /<version>/bin
ACCOUNT = "postgres"  # the package's; the server refuses to run as root


def programs() -> Path | None:
    """Where the newest installed server's programs are."""
    found = sorted(INSTALLED.glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return found[-1].parent if found else None


@contextmanager
def postgres() -> Iterator[str]:
    """The URL of an empty database. No TCP port is opened."""
    bin_ = programs()
    assert bin_ is not None, "apt-get install postgresql"
    directory = Path(tempfile.mkdtemp(prefix="rds-pg-"))
    data = directory / "data"
    as_account = ["setpriv", f"--reuid={ACCOUNT}", f"--regid={ACCOUNT}", "--clear-groups"] if os.geteuid() == 0 else []

    def run(*command: str) -> None:
        done = subprocess.run(
            [*as_account, *command], cwd=directory, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=120
        )
        assert done.returncode == 0, done.stderr.decode()

    try:
        if as_account:
            shutil.chown(directory, ACCOUNT, ACCOUNT)
        run(str(bin_ / "initdb"), "-D", str(data), "-A", "trust", "-U", "rds", "-N", "-E", "UTF8", "--locale=C")
        options = f"-c listen_addresses= -c unix_socket_directories={directory} -c fsync=off"
        log = str(directory / "log")
        run(str(bin_ / "pg_ctl"), "-D", str(data), "-w", "-t", "60", "-l", log, "-o", options, "start")
        try:
            yield f"postgresql://rds@/postgres?host={directory}"
        finally:
            run(str(bin_ / "pg_ctl"), "-D", str(data), "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(directory)
