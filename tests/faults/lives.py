"""A server that is killed and comes back at once, and that kills itself at a chosen step.

The test talks to one process that has loaded the whole manager; each life of the server is a fork of it, so a new life
begins within milliseconds. What is killed is real (`app.serve` with everything it starts), and dies by SIGKILL.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

KEY = {"X-API-Key": "dev-key"}
START_SECONDS = 60.0
NEVER = 1 << 30


class Lives:
    """Enter `running`; the server is then in its first life."""

    def __init__(self, storage: Path, runtime: Path, **settings: str) -> None:
        self.storage = storage
        self.runtime = runtime
        self.log = storage.with_suffix(".log")
        self._settings = settings
        self._parent: subprocess.Popen[str] | None = None
        self.pid = 0
        self.http = httpx.Client(headers=KEY, timeout=300)

    @contextmanager
    def running(self) -> Iterator[Lives]:
        with open(self.log, "a") as log:
            self._parent = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("server.py"))],
                env=self._environment(),
                cwd=self.storage.parent,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        try:
            self.live()
            try:
                yield self
            finally:
                if not self.pid:
                    self.live()
                self.delete_all()
                leaks = self.leaks()
            assert leaks == []
        finally:
            self.end(signal.SIGTERM)
            self._parent.stdin.close()  # type: ignore[union-attr]
            self._parent.wait(60)
            self._parent.stdout.close()  # type: ignore[union-attr]
            self.http.close()
            shutil.rmtree(self.runtime, ignore_errors=True)

    def _environment(self) -> dict[str, str]:
        inherited = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        return {
            "HOME": "/root",
            "STORAGE_ROOT": str(self.storage),
            "RUNTIME_DIR": str(self.runtime),
            "PORT": "0",
            "ENABLE_WARM_POOL": "false",
            **inherited,
            **self._settings,
        }

    def live(self, *, ready: bool = True) -> float:
        """Begin a life; seconds until it answers a request. `ready`: and can create VMs."""
        began = time.monotonic()
        self._tell("live")
        answer = self._hear()
        self.pid = answer["pid"]
        self.http.base_url = httpx.URL(self._hear()["url"])
        assert self.http.get("/health/ready" if ready else "/health").status_code == 200
        return time.monotonic() - began

    def end(self, how: signal.Signals) -> int:
        """End this life; returns how it ended, negative for a signal."""
        if self.pid:
            os.kill(self.pid, how)
        return self.ended()

    def ended(self) -> int:
        """Wait for this life to end."""
        if not self.pid:
            return 0
        self._tell("bury")
        self.pid = 0
        return int(self._hear()["status"])

    def arm(self, step: int = NEVER) -> None:
        """From now on steps are counted; the server dies at this one (0 is the first)."""
        (self.storage / "steps").unlink(missing_ok=True)
        (self.storage / "arm").write_text(str(step))
        os.kill(self.pid, signal.SIGUSR1)
        heard = self._hear()
        assert heard == {"armed": step}, heard

    def steps(self) -> list[str]:
        """What was counted since the server was armed."""
        path = self.storage / "steps"
        return path.read_text().splitlines() if path.exists() else []

    def create(self, **fields: Any) -> dict[str, Any]:
        answer = self.http.post("/v1/vms", json={"cpu": 1, "memMb": 192, "allowIps": [], "diskSizeMb": 64, **fields})
        assert answer.status_code == 201, answer.text
        created: dict[str, Any] = answer.json()
        return created

    def get(self, vm_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.http.get(f"/v1/vms/{vm_id}").raise_for_status().json()
        return found

    def exec(self, vm_id: str, cmd: str) -> str:
        """stdout of a command that succeeds."""
        answer = self.http.post(f"/v1/vms/{vm_id}/exec", json={"cmd": cmd, "timeoutMs": 60_000})
        assert answer.status_code == 200, answer.text
        assert answer.json()["exitCode"] == 0, answer.text
        return str(answer.json()["stdout"])

    def vms(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.http.get("/v1/vms").raise_for_status().json()
        return found

    def delete_all(self) -> None:
        for vm in self.vms():
            self.http.delete(f"/v1/vms/{vm['id']}").raise_for_status()

    def leaks(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.http.get("/v1/admin/leaks").raise_for_status().json()["leaks"]
        return found

    def reconcile(self) -> dict[str, Any]:
        done: dict[str, Any] = self.http.post("/v1/admin/reconcile").raise_for_status().json()
        return done

    def doctor(self) -> tuple[int, set[tuple[str, str | None]]]:
        """What `rds doctor --leaks` says: its exit status; kind and VM of each leak."""
        argv = [sys.executable, "-m", "rundatsheesh.cli", "doctor", "--leaks", "--json"]
        done = subprocess.run(argv, env=self._environment(), capture_output=True, text=True, timeout=60)
        assert done.returncode in (0, 1), done.stderr
        return done.returncode, {(leak["kind"], leak["vmId"]) for leak in json.loads(done.stdout)}

    def _tell(self, word: str) -> None:
        assert self._parent is not None and self._parent.stdin is not None
        self._parent.stdin.write(word + "\n")
        self._parent.stdin.flush()

    def _hear(self) -> dict[str, Any]:
        assert self._parent is not None and self._parent.stdout is not None
        ready, _, _ = select.select([self._parent.stdout], [], [], START_SECONDS)
        line = os.read(self._parent.stdout.fileno(), 0) if not ready else self._read_line()
        assert line, f"no answer; the server's log ends with\n{self.log.read_text()[-3000:]}"
        heard: dict[str, Any] = json.loads(line)
        return heard

    def _read_line(self) -> bytes:
        """Without a buffer of ours, which `select` could not see into."""
        assert self._parent is not None and self._parent.stdout is not None
        line = b""
        while not line.endswith(b"\n"):
            byte = os.read(self._parent.stdout.fileno(), 1)
            if not byte:
                break
            line += byte
        return line
