"""What is killed while the clients work: the manager and processes of VMs, at random, with time to work between."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

from ledger import Ledger

from server_support import Server

PAUSE = (6.0, 14.0)  # seconds between two faults
# The manager by SIGKILL; the manager by SIGTERM, as an upgrade does; one process of one VM, of a kind.
FAULTS = {"manager": 3, "upgrade": 1, "sandbox": 3, "guest process": 2, "qemu": 2}
FIRST_CALL_SECONDS = 60.0


class Chaos:
    def __init__(self, server: Server, ledger: Ledger, seed: int) -> None:
        self._server = server
        self._ledger = ledger
        self._luck = random.Random(seed)
        self.starts: list[float] = []  # seconds until it serves
        self.recoveries: list[float] = []  # seconds from the start of a manager to its first answered call into a VM

    def pause(self) -> float:
        return self._luck.uniform(*PAUSE)

    def strike(self) -> None:
        fault = self._luck.choices(list(FAULTS), weights=list(FAULTS.values()))[0]
        if fault in ("manager", "upgrade"):
            self._replace_manager(fault)
        elif self._kill_one(fault):
            self._ledger.count(f"killed: {fault}")

    def _replace_manager(self, fault: str) -> None:
        if fault == "manager":
            self._server.kill()
        elif (status := self._server.stop()) != 0:
            self._ledger.problem(f"the server ended with {status} on SIGTERM")
        self._ledger.count(f"killed: {fault}")
        began = time.monotonic()
        self._server.start()
        self.starts.append(time.monotonic() - began)
        if self._call_into_a_vm(began + FIRST_CALL_SECONDS):
            self.recoveries.append(time.monotonic() - began)

    def _call_into_a_vm(self, deadline: float) -> bool:
        """Whether there was one that runs, and answered."""
        http = self._server.http
        while time.monotonic() < deadline:
            running = [vm for vm in http.get("/v1/vms").json() if vm["state"] == "RUNNING" and vm["engine"] == "gvisor"]
            if not running:
                return False
            for vm in running:
                answer = http.post(f"/v1/vms/{vm['id']}/exec", json={"cmd": "true", "timeoutMs": 30_000})
                if answer.status_code == 200:
                    return True
        self._ledger.problem(f"no VM answers {FIRST_CALL_SECONDS:.0f} s after a restart")
        return False

    def _kill_one(self, kind: str) -> bool:
        victims = [pid for pid in self._members() if _kind(pid) == kind]
        if not victims:
            return False
        try:
            os.kill(self._luck.choice(victims), signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def _members(self) -> list[int]:
        """Processes in the groups of this server's VMs."""
        own = f"rundatsheesh-{self._server.node['id']}"
        root = Path("/sys/fs/cgroup")
        groups = {path for pattern in (f"{own}/*", f"*/{own}/*") for path in root.glob(f"{pattern}/cgroup.procs")}
        return sorted({pid for group in groups for pid in _pids(group)})


def _kind(pid: int) -> str:
    """runsc, its gofer and its kernel are the sandbox; what has its own name is a process of the guest, the agent's
    too, which each have a host process behind them."""
    try:
        program = Path(f"/proc/{pid}/exe").readlink().name
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ""
    if program.startswith("qemu"):
        return "qemu"
    return "sandbox" if b"runsc" in line.split(b"\0")[0] and b"--root" in line else "guest process"


def _pids(group: Path) -> list[int]:
    try:
        return [int(line) for line in group.read_text().split()]
    except OSError:
        return []


def settle(server: Server, seconds: float) -> list[object]:
    """What the audit still says when nothing is on its way any more; the server's own rounds do not count, see
    `healed`."""
    deadline = time.monotonic() + seconds
    while True:
        found: list[object] = server.http.get("/v1/admin/leaks").raise_for_status().json()["leaks"]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.5)


def healed(server: Server, since: int) -> list[str]:
    """What reconciliation has taken away, by the server's log from this position on: leaks that nobody saw."""
    with open(server.log, errors="replace") as log:
        log.seek(since)
        return [line.strip() for line in log if "healed: " in line]
