"""`make soak`: clients at work while manager, sandboxes and agents are killed at random. Afterwards nothing differs.

SOAK_SECONDS bounds it (900). Exits with 1 when the audit, the database or a file disagrees.
"""

from __future__ import annotations

import os
import random
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))

from lives import KEY, Lives

SECONDS = float(os.environ.get("SOAK_SECONDS", "900"))
ENGINES = os.environ.get("SOAK_ENGINES", "gvisor").split(",")
CLIENTS = 8
KILL_EVERY = (4.0, 10.0)  # seconds between two faults
FAULTS = ("manager", "manager", "process", "upgrade")


class Soak:
    def __init__(self, lives: Lives, seed: int) -> None:
        self.lives = lives
        self.url = str(lives.http.base_url)
        self.seed = seed
        self.until = time.monotonic() + SECONDS
        self.files: dict[str, dict[str, str]] = {}  # acknowledged, by VM
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self.slowest = 0.0
        self._lock = threading.Lock()

    def run(self) -> None:
        clients = [threading.Thread(target=self._client, args=(number,)) for number in range(CLIENTS)]
        for client in clients:
            client.start()
        chaos = random.Random(self.seed)
        while time.monotonic() < self.until:
            time.sleep(chaos.uniform(*KILL_EVERY))
            self._fault(chaos)
        for client in clients:
            client.join()
        self._verify()

    def _fault(self, chaos: random.Random) -> None:
        fault = chaos.choice(FAULTS)
        self.counts[f"fault: {fault}"] += 1
        if fault == "process":
            self._kill_a_process(chaos)
            return
        self.lives.end(signal.SIGKILL if fault == "manager" else signal.SIGTERM)
        self.slowest = max(self.slowest, self.lives.live())
        self.url = str(self.lives.http.base_url)

    def _kill_a_process(self, chaos: random.Random) -> None:
        """runsc, its gofer, its kernel, or a process of the guest, of one of the VMs that run."""
        own = f"rundatsheesh-{self._node()}"
        pids = [pid for group in Path("/sys/fs/cgroup").glob(f"*/{own}/*/cgroup.procs") for pid in _pids(group)]
        if pids:
            try:
                os.kill(chaos.choice(pids), signal.SIGKILL)
            except ProcessLookupError:
                return

    def _node(self) -> str:
        import json

        return str(json.loads((self.lives.storage / "node.json").read_text())["id"])

    def _client(self, number: int) -> None:
        luck = random.Random(self.seed * 100 + number)
        mine: list[str] = []
        while time.monotonic() < self.until:
            action = luck.choice(("create", "write", "write", "write", "stop", "start", "start", "delete"))
            try:
                with httpx.Client(base_url=self.url, headers=KEY, timeout=120) as http:
                    self._act(http, action, mine, luck)
            except httpx.HTTPError:
                self.counts["cut off"] += 1
                time.sleep(0.1)

    def _act(self, http: httpx.Client, action: str, mine: list[str], luck: random.Random) -> None:
        if action == "create":
            if len(mine) >= 2:
                return
            body = {"cpu": 1, "memMb": 192, "allowIps": [], "diskSizeMb": 64, "engine": luck.choice(ENGINES)}
            answer = http.post("/v1/vms", json=body)
            if answer.status_code == 201:
                mine.append(answer.json()["id"])
                self.files[mine[-1]] = {}
        elif not mine:
            return
        elif action == "write":
            vm_id, name, text = luck.choice(mine), secrets.token_hex(4), secrets.token_hex(16)
            answer = http.post(f"/v1/vms/{vm_id}/exec", json={"cmd": f"echo {text} > {name} && sync {name}"})
            if answer.status_code == 200 and answer.json()["exitCode"] == 0:
                self.files[vm_id][name] = text
        elif action == "delete":
            vm_id = mine.pop(luck.randrange(len(mine)))
            del self.files[vm_id]
            answer = http.delete(f"/v1/vms/{vm_id}")
        else:
            answer = http.post(f"/v1/vms/{luck.choice(mine)}/{action}")
        self._count(action, answer)

    def _count(self, action: str, answer: httpx.Response) -> None:
        with self._lock:
            self.counts[f"{action} {answer.status_code}"] += 1
            if answer.status_code >= 500 and answer.status_code not in (502, 503, 504):
                self.problems.append(f"{action}: {answer.status_code} {answer.text[:300]}")

    def _verify(self) -> None:
        lives = self.lives
        left: dict[str, Any] = lives.reconcile()
        self.problems += [f"leak: {leak}" for leak in left["remaining"]]
        self.problems += [f"leak after the round: {leak}" for leak in lives.leaks()]
        found = {vm["id"]: vm for vm in lives.vms()}
        for vm_id, files in self.files.items():
            if vm_id not in found:
                self.problems.append(f"{vm_id} is lost")
                continue
            if found[vm_id]["state"] != "RUNNING":
                lives.http.post(f"/v1/vms/{vm_id}/start").raise_for_status()
            told = lives.exec(vm_id, "tail -n +1 * 2>/dev/null || true") if files else ""
            self.problems += [f"{vm_id}: {name} is lost" for name, text in files.items() if text not in told]
            self.counts["files verified"] += len(files)


def _pids(group: Path) -> list[int]:
    try:
        return [int(line) for line in group.read_text().split()]
    except OSError:
        return []


def main() -> int:
    seed = int(os.environ.get("SOAK_SEED", str(secrets.randbelow(10**6))))
    directory = Path(tempfile.mkdtemp(prefix="rdss-"))
    runtime = Path("/run") / directory.name
    lives = Lives(directory / "root", runtime, RATE_LIMIT_PER_MINUTE="0")
    with lives.running():
        soak = Soak(lives, seed)
        soak.run()
    print(f"seed {seed}, {SECONDS:.0f} s, slowest recovery {soak.slowest:.2f} s")
    for what, count in sorted(soak.counts.items()):
        print(f"{count:6}  {what}")
    for problem in soak.problems:
        print(f"PROBLEM {problem}")
    if not soak.problems and "SOAK_KEEP" not in os.environ:
        shutil.rmtree(directory)
    return 1 if soak.problems else 0


if __name__ == "__main__":
    sys.exit(main())
