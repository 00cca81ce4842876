"""One server for all faults of a module, on storage of its own."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from lives import Lives


@pytest.fixture(scope="module")
def lives() -> Iterator[Lives]:
    if os.geteuid() != 0:
        pytest.skip("servers need root")
    name = secrets.token_hex(3)
    directory = Path(tempfile.mkdtemp(prefix=f"rdsf-{name}-"))
    with Lives(directory / "root", Path("/run") / f"rdsf-{name}", ENGINE="gvisor").running() as started:
        yield started
    shutil.rmtree(directory)
