"""The examples of the pages, run in their order in one shell against a live server."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from server_support import Server

PAGES = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WITH_EXAMPLES = [page.stem for page in sorted(PAGES.glob("*.md")) if BLOCK.search(page.read_text())]


def script(page: str) -> str:
    """All blocks of a page; each says which it is, and the first that fails ends it."""
    blocks = BLOCK.findall((PAGES / f"{page}.md").read_text())
    numbered = [f"echo '--- block {number}' >&2\n{block}" for number, block in enumerate(blocks, 1)]
    return "set -euo pipefail\n" + "\n".join(numbered)


@pytest.mark.parametrize("page", WITH_EXAMPLES)
def test_examples_run(server: Server, tmp_path: Path, page: str) -> None:
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "RDS_URL": server.url, "TMPDIR": str(tmp_path)}
    command = ["bash", "-c", script(page)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert server.http.get("/v1/vms").json() == [], "an example deletes what it makes"


def test_there_are_examples() -> None:
    assert {"api", "quickstart"} <= set(WITH_EXAMPLES)
