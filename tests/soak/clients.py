"""One client at work: it creates, calls, stops, starts and deletes VMs of its own, and writes down what was answered.

The server may be gone at any moment. A creation is then repeated with the same key and a deletion until it is answered;
a write that was not answered is not counted on.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import secrets
import tarfile
import threading
import time

import httpx
from ledger import Ledger, Machine

KEY = {"X-API-Key": "dev-key"}
MEMORY_MB = {"gvisor": 192, "qemu": 256}
MOST_FILES = 60  # of one VM: its disk is small, and each look reads all of them
BACK_SECONDS = 120.0  # for a server that was killed to answer again
# What a call may be answered while VMs and server are being killed. Anything else is a fault of the server.
EXPECTED = {200, 201, 204, 409, 429, 502, 503, 504}
BOOT_FAILED = ("engine_error", "internal_error")
ACTIONS = {
    "create": 2,
    "write": 6,
    "upload": 4,
    "script": 2,
    "look": 3,
    "download": 2,
    "list": 1,
    "stop": 1,
    "start": 3,
    "delete": 1,
}


class CutOff(Exception):
    """The server went away during the request: nobody knows whether it had its effect."""


class Client:
    """Works until `stopping`. `most` is how many VMs it has at once."""

    def __init__(self, url: str, ledger: Ledger, engine: str, seed: int, stopping: threading.Event, most: int) -> None:
        self.name = f"{engine} client {seed}"
        self._http = httpx.Client(base_url=url, headers=KEY, timeout=180)
        self.ledger = ledger
        self._engine = engine
        self._luck = random.Random(seed)
        self._stopping = stopping
        self._most = most
        self._mine: list[Machine] = []
        self._doomed: list[str] = []

    def run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._act(self._luck.choices(list(ACTIONS), weights=list(ACTIONS.values()))[0])
            self._finish_deletions()
        except Exception as error:
            self.ledger.problem(f"{self.name} broke off: {error!r}")
        finally:
            self._http.close()

    def _act(self, action: str) -> None:
        if not self._mine:
            action = "create"
        try:
            self._finish_deletions()
            getattr(self, f"_{action}")()
        except CutOff:
            self.ledger.count("cut off")

    def _request(self, action: str, method: str, path: str, **options: object) -> httpx.Response:
        """An answer that may be expected, whatever it says. Raises CutOff, once the server is back."""
        try:
            answer = self._http.request(method, path, **options)  # type: ignore[arg-type]
        except httpx.HTTPError as error:
            self._wait_until_back()
            raise CutOff from error
        self.ledger.count(f"{action}: {answer.status_code}")
        if answer.status_code == 500 and answer.json()["code"] in BOOT_FAILED and action in ("create", "start"):
            self.ledger.count("boots that failed")  # no more than machines were killed, see `soak.prove`
        elif answer.status_code not in EXPECTED:
            self.ledger.problem(f"{action} {path}: {answer.status_code} {answer.text[:300]}")
        return answer

    def _wait_until_back(self) -> None:
        deadline = time.monotonic() + BACK_SECONDS
        while time.monotonic() < deadline:
            try:
                self._http.get("/health", timeout=10)
                return
            except httpx.HTTPError:
                time.sleep(0.1)
        raise TimeoutError("the server does not come back")

    def _pick(self) -> Machine:
        return self._luck.choice(self._mine)

    # --- what clients do ---

    def _create(self) -> None:
        if len(self._mine) >= self._most:
            return
        body = {"cpu": 1, "memMb": MEMORY_MB[self._engine], "allowIps": [], "diskSizeMb": 64, "engine": self._engine}
        key = {"Idempotency-Key": secrets.token_hex(16)}
        while True:  # until it is known whether there is one
            try:
                answer = self._request("create", "POST", "/v1/vms", json=body, headers=key)
                break
            except CutOff:
                self.ledger.count("creation repeated")
        if answer.status_code == 201:
            machine = Machine(answer.json()["id"], self._engine)
            self.ledger.created(machine)
            self._mine.append(machine)

    def _write(self) -> None:
        machine, name = self._pick(), secrets.token_hex(6)
        if len(machine.files) >= MOST_FILES:
            return
        size = self._luck.choice((10, 5000, 70_000))
        command = f"head -c {size} /dev/urandom > {name} && sync {name} && sha256sum {name}"
        outcome = self.exec("write", machine, command)
        if outcome is not None:
            self.ledger.wrote(machine, {name: outcome.split()[0]})

    def _upload(self) -> None:
        machine = self._pick()
        if len(machine.files) >= MOST_FILES:
            return
        files = {f"up-{secrets.token_hex(6)}": os.urandom(self._luck.choice((1, 9000, 150_000))) for _ in range(2)}
        answer = self._request(
            "upload",
            "POST",
            f"/v1/vms/{machine.id}/files/upload?dest=/workspace",
            content=_packed(files),
            headers={"content-type": "application/gzip"},
        )
        if answer.status_code == 204:
            self.ledger.wrote(machine, {name: _digest(content) for name, content in files.items()})

    def _script(self) -> None:
        machine, name, text = self._pick(), f"ts-{secrets.token_hex(6)}", secrets.token_hex(500)
        if len(machine.files) >= MOST_FILES:
            return
        code = f"""
            const file = await Deno.open("/workspace/{name}", {{ write: true, create: true }});
            await file.write(new TextEncoder().encode("{text}"));
            await file.sync();
            result.set("{name}");
        """
        path = f"/v1/vms/{machine.id}/run-ts"
        answer = self._request("run-ts", "POST", path, json={"code": code, "timeoutMs": 60_000})
        if answer.status_code == 200 and answer.json()["exitCode"] == 0:
            if answer.json().get("result") != name:
                self.ledger.problem(f"{machine.id}: a script's result is {answer.text[:200]}")
            self.ledger.wrote(machine, {name: _digest(text.encode())})

    def _look(self) -> None:
        look(self, self._pick(), "while it works")

    def _download(self) -> None:
        machine = self._pick()
        expected = self.ledger.known_files(machine)
        answer = self._request("download", "GET", f"/v1/vms/{machine.id}/files/download?path=/workspace")
        if answer.status_code == 200:
            found = {name: _digest(content) for name, content in _unpacked(answer.content).items()}
            self.ledger.compare(machine, expected, found, "downloaded")

    def _list(self) -> None:
        deleted = self.ledger.snapshot_of_deleted()
        answer = self._request("list", "GET", "/v1/vms")
        seen = {vm["id"]: vm["state"] for vm in answer.json()} if answer.status_code == 200 else {}
        self.ledger.check_list(set(seen) & deleted, complete=False)
        for machine in self._mine:
            if answer.status_code == 200 and machine.id not in seen:
                self.ledger.problem(f"{machine.id} is lost: it is not listed")

    def _stop(self) -> None:
        self._request("stop", "POST", f"/v1/vms/{self._pick().id}/stop")

    def _start(self) -> None:
        machine = self._pick()
        answer = self._request("look at", "GET", f"/v1/vms/{machine.id}")
        if answer.status_code == 200 and answer.json()["state"] in ("STOPPED", "ERROR"):
            self.ledger.count(f"reason: {answer.json().get('reason')}")
            self._request("start", "POST", f"/v1/vms/{machine.id}/start")

    def _delete(self) -> None:
        machine = self._mine.pop(self._luck.randrange(len(self._mine)))
        self.ledger.doom(machine)
        self._doomed.append(machine.id)
        self._finish_deletions()

    def _finish_deletions(self) -> None:
        while self._doomed:
            vm_id = self._doomed[0]
            try:
                answer = self._http.delete(f"/v1/vms/{vm_id}")
            except httpx.HTTPError:
                self.ledger.count("deletion repeated")
                self._wait_until_back()
                continue
            self.ledger.count(f"delete: {answer.status_code}")
            if answer.status_code in (204, 404):
                self.ledger.deleted(self._doomed.pop(0))
            elif answer.status_code not in (409, 503):
                self.ledger.problem(f"delete {vm_id}: {answer.status_code} {answer.text[:300]}")
                self._doomed.pop(0)

    def exec(self, action: str, machine: Machine, command: str) -> str | None:
        """stdout of a command that succeeded."""
        path = f"/v1/vms/{machine.id}/exec"
        answer = self._request(action, "POST", path, json={"cmd": command, "timeoutMs": 60_000})
        if answer.status_code != 200 or answer.json()["exitCode"] != 0:
            return None
        return str(answer.json()["stdout"])


def look(client: Client, machine: Machine, where: str) -> bool:
    """Compare the VM's files with the ledger; whether it could be looked at."""
    expected = client.ledger.known_files(machine)
    listing = client.exec("look", machine, "find . -maxdepth 1 -type f -exec sha256sum {} +")
    if listing is None:
        return False
    found = {name.removeprefix("./"): digest for digest, name in (line.split() for line in listing.splitlines())}
    client.ledger.compare(machine, expected, found, where)
    return True


def _packed(files: dict[str, bytes]) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return target.getvalue()


def _unpacked(archive: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        opened = ((member.name.removeprefix("./"), tar.extractfile(member)) for member in tar)
        return {name: file.read() for name, file in opened if file is not None}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
