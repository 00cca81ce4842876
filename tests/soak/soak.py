"""`make soak`: clients at work on both engines, while manager, sandboxes and virtual machines are killed at random.
Afterwards nothing that was acknowledged is lost, and nothing is left that nobody knows.

SOAK_SECONDS bounds the work (900), SOAK_SEED repeats its choices, SOAK_ENGINES names the engines, SOAK_KEEP=1 keeps the
log. Exits with 1 when something was lost or left, or when nothing was proven.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from chaos import Chaos, healed, settle
from clients import Client, look
from ledger import Ledger

from server_support import Server

SECONDS = float(os.environ.get("SOAK_SECONDS", "900"))
ENGINES = os.environ.get("SOAK_ENGINES", "gvisor,qemu").split(",")
CLIENTS = 8
QEMU_CLIENTS = 2  # of them, with one VM each: where the CPU is emulated, more would leave the others no time
SETTLE_SECONDS = 15.0
START_ATTEMPTS = 3


def main() -> int:
    seed = int(os.environ.get("SOAK_SEED", str(secrets.randbelow(10**6))))
    directory = Path(tempfile.mkdtemp(prefix="rdss-"))
    settings = {"PORT": str(_free_port()), "RATE_LIMIT_PER_MINUTE": "0", "MAX_VMS": "40"}
    server = Server(directory / "root", Path("/run") / directory.name, settings)
    ledger = Ledger()
    print(f"seed {seed}, {SECONDS:.0f} s, log {server.log}", flush=True)
    try:
        with server.running():
            chaos = Chaos(server, ledger, seed)
            work(server, ledger, chaos, seed)
            judge(server, ledger, seed)
    except AssertionError as error:
        ledger.problem(f"at the end: {error}")
    prove(ledger, chaos)
    report(ledger, chaos, seed)
    if not ledger.problems and "SOAK_KEEP" not in os.environ:
        shutil.rmtree(directory)
    return 1 if ledger.problems else 0


def work(server: Server, ledger: Ledger, chaos: Chaos, seed: int) -> None:
    stopping = threading.Event()
    clients = [_client(server.url, ledger, number, seed, stopping) for number in range(CLIENTS)]
    threads = [threading.Thread(target=client.run, name=client.name) for client in clients]
    for thread in threads:
        thread.start()
    until = time.monotonic() + SECONDS
    try:
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, chaos.pause()))
            if time.monotonic() < until:
                chaos.strike()
    finally:
        stopping.set()
        for thread in threads:
            thread.join()


def judge(server: Server, ledger: Ledger, seed: int) -> None:
    """While nobody works and nothing is killed."""
    position = server.log.stat().st_size
    for leak in settle(server, SETTLE_SECONDS):
        ledger.problem(f"left: {leak}")
    for line in healed(server, position):
        ledger.problem(f"left, and healed before we looked: {line}")
    ledger.count("healed while at work", len(healed(server, 0)))
    visitor = Client(server.url, ledger, ENGINES[0], seed, threading.Event(), 0)
    ledger.check_list({vm["id"] for vm in server.http.get("/v1/vms").json()}, complete=True)
    for machine in ledger.alive():
        for _ in range(START_ATTEMPTS):
            if server.http.get(f"/v1/vms/{machine.id}").json().get("state") != "RUNNING":
                server.http.post(f"/v1/vms/{machine.id}/start")
            if look(visitor, machine, "at the end"):
                break
        else:
            ledger.problem(f"{machine.id} ({machine.engine}) cannot be looked at: {server.http.get('/v1/vms').text}")
    for machine in ledger.alive():
        server.http.delete(f"/v1/vms/{machine.id}").raise_for_status()
        ledger.deleted(machine.id)
    ledger.check_list({vm["id"] for vm in server.http.get("/v1/vms").json()}, complete=False)
    for trace in server.traces():
        ledger.problem(f"left on the host: {trace}")
    outside = _doctor(server)
    if outside.returncode != 0:
        ledger.problem(f"rds doctor --leaks: {outside.stdout}{outside.stderr}")


def prove(ledger: Ledger, chaos: Chaos) -> None:
    """A run in which nothing happened has shown nothing."""
    for what in ("files verified", "delete: 204", "killed: manager"):
        if not ledger.counts[what]:
            ledger.problem(f"nothing was proven: no {what}")
    machines = sum(ledger.counts[f"killed: {kind}"] for kind in ("sandbox", "guest process", "qemu"))
    if ledger.counts["boots that failed"] > machines:
        ledger.problem(f"more boots failed than machines were killed: {machines}")
    if not chaos.recoveries:
        ledger.problem("nothing was proven: no VM was there to be adopted")


def report(ledger: Ledger, chaos: Chaos, seed: int) -> None:
    for what, count in sorted(ledger.counts.items()):
        print(f"{count:7}  {what}")
    print(f"seed {seed}, {SECONDS:.0f} s, managers replaced: {len(chaos.starts)}")
    print(f"slowest start until it serves {max(chaos.starts, default=0):.2f} s")
    print(f"slowest recovery, from the start to an answered call into a VM: {max(chaos.recoveries, default=0):.2f} s")
    for problem in ledger.problems:
        print(f"PROBLEM {problem}")


def _client(url: str, ledger: Ledger, number: int, seed: int, stopping: threading.Event) -> Client:
    emulated = "qemu" in ENGINES and (number < QEMU_CLIENTS or ENGINES == ["qemu"])
    engine = "qemu" if emulated else "gvisor"
    return Client(url, ledger, engine, seed * 100 + number, stopping, 1 if emulated else 2)


def _doctor(server: Server) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "rundatsheesh.cli", "doctor", "--leaks"]
    return subprocess.run(argv, env=server.environment(), capture_output=True, text=True, timeout=60)


def _free_port() -> int:
    """Clients find the server again after each of its lives."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
