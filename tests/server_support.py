"""A real server as a process of its own, VMs behind its HTTP, and a look at what either leaves on the host."""

from __future__ import annotations

import io
import json
import os
import secrets
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
import httpx

ENGINES = ["gvisor", "qemu"]
KEY = {"X-API-Key": "dev-key"}
START_SECONDS = 30.0
STOP_SECONDS = 30.0
_SLOWNESS = {"gvisor": 1.0, "qemu": 25.0}  # against an idle host; QEMU emulates the CPU here
_MOST_LOAD = 8.0
_CALM_LOAD = 3.0  # what a host that is idle now may come to meanwhile
_PRESSURE = Path("/proc/pressure/cpu")


def scale(seconds: float, engine: str = "gvisor") -> float:
    """A deadline that holds on an idle host, for this engine and for how busy this host is now or may become."""
    return seconds * _SLOWNESS[engine] * max(_CALM_LOAD, _load())


def promised(seconds: float, engine: str = "gvisor") -> float:
    """The longest that something may have taken which is over now, and takes so long on an idle host at most. To be
    asked for afterwards: on a host that was idle all the time it is no more than that."""
    return seconds * _SLOWNESS[engine] * _load()


def _load() -> float:
    """How many times as long things take now. The load average tells of a burst half a minute late; the share of the
    last ten seconds in which somebody waited for a CPU, where the kernel tells it, does at once."""
    average = os.getloadavg()[0] / (os.cpu_count() or 1)
    try:
        waited = float(_PRESSURE.read_text().split("avg10=")[1].split()[0]) / 100
        burst = 1 + (_MOST_LOAD - 1) * waited
    except (OSError, IndexError):
        burst = _CALM_LOAD
    return min(_MOST_LOAD, max(1.0, average, burst))


class Server:
    """`rds serve` with a storage root and a runtime directory of its own, on a free port of loopback."""

    def __init__(
        self, storage: Path, runtime: Path, settings: Mapping[str, str], *, through: Sequence[str] = (), tls: str = ""
    ) -> None:
        """`through` is a program that starts it, with arguments; `tls` a file with the certificate to trust."""
        self._through = through
        self._tls = tls
        self.storage = storage
        self.runtime = runtime
        self.settings = settings
        self.log = storage.with_suffix(".log")
        self.url = ""
        self._process: subprocess.Popen[str] | None = None
        self._client: httpx.Client | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def http(self) -> httpx.Client:
        """With the key; each status is an answer, none an exception."""
        assert self._client is not None
        return self._client

    @property
    def node(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.storage / "node.json").read_text())
        return found

    def environment(self) -> dict[str, str]:
        own = {
            "STORAGE_ROOT": str(self.storage),
            "RUNTIME_DIR": str(self.runtime),
            "PORT": "0",
            "HOST": "127.0.0.1",
            "ENABLE_WARM_POOL": "false",
        }
        inherited = {name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPATH") if name in os.environ}
        return {**inherited, **own, **self.settings}

    def start(self) -> None:
        """Returns when it serves."""
        with open(self.log, "a") as log:
            self._process = subprocess.Popen(
                [*self._through, sys.executable, "-m", "rundatsheesh.cli", "serve"],
                env=self.environment(),
                cwd=self.storage.parent,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.url = self._announced().replace("localhost", "127.0.0.1")
        trusted = ssl.create_default_context(cafile=self._tls) if self._tls else True
        self._client = httpx.Client(base_url=self.url, headers=KEY, timeout=600, verify=trusted)

    def _announced(self) -> str:
        assert self._process is not None and self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], scale(START_SECONDS))
        line = self._process.stdout.readline() if ready else ""
        if "serving on " not in line:
            self._end(signal.SIGKILL)
            raise AssertionError(f"the server does not start: {line}\n{self.last_words(4000)}")
        return line.split("serving on ")[1].strip()

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        return self._end(signal.SIGTERM)

    def kill(self) -> None:
        """The crash: SIGKILL."""
        self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> int:
        assert self._process is not None and self._process.stdout is not None
        self._process.send_signal(how)
        status = self._process.wait(scale(STOP_SECONDS))
        self._process.stdout.close()
        if self._client is not None:
            self._client.close()
        return status

    @contextmanager
    def running(self) -> Iterator[Server]:
        """Ends with every VM deleted and SIGTERM; the storage root is gone afterwards, as `traces` can see."""
        self.start()
        try:
            try:
                yield self
            finally:
                if not self.is_running:  # a test that killed it broke off: its VMs live on
                    self.start()
                for vm in self.http.get("/v1/vms").json():
                    self.http.delete(f"/v1/vms/{vm['id']}").raise_for_status()
        finally:
            status = self.stop()
            left = self.traces()
            tail = self.last_words(2000)
            shutil.rmtree(self.storage)
            shutil.rmtree(self.runtime)
        assert status == 0, f"the server ended with {status}: {tail}"
        assert left == [], left

    def create(self, engine: str, **fields: Any) -> Box:
        """A VM that answers; one vCPU, 256 MiB, without network unless `fields` say otherwise."""
        body = {"cpu": 1, "memMb": 256, "allowIps": [], "engine": engine, **fields}
        answer = self.http.post("/v1/vms", json=body)
        assert answer.status_code == 201, f"{answer.text}\n{self.last_words(3000)}"
        return Box(self, answer.json())

    def last_words(self, count: int) -> str:
        """The end of its log, in characters."""
        return self.log.read_text()[-count:] if self.log.exists() else ""

    def traces(self) -> list[str]:
        """All that exists on the host in this server's name, besides itself and its records."""
        node, block = f"rundatsheesh-{self.node['id']}", self.node["block"]
        return [
            *_processes_of(node, self.pid),
            *(f"link {name}" for _, name in socket.if_nameindex() if name.startswith(f"rds{block}-")),
            *(f"namespace {path.name}" for path in Path("/run/netns").glob(f"rds{block}-*")),
            *(f"mount {path}" for path in _mounts() if path.is_relative_to(self.storage)),
            *(f"mount {path}" for path in _mounts() if path.is_relative_to(self.runtime)),
            *(f"loop device {path}" for path in _loops() if path.is_relative_to(self.storage)),
            *(f"cgroup {path}" for path in Path("/sys/fs/cgroup").glob(f"{node}/*/")),
            *(f"cgroup {path}" for path in Path("/sys/fs/cgroup").glob(f"*/{node}/*/")),
            *(f"file {path}" for name in ("vms", "spool") for path in (self.storage / name).glob("*")),
            *(f"file {path}" for path in self.runtime.glob("*/*")),
            *_rules(block, self.is_running),
        ]


def new_server(directory: Path, names: Dns, **settings: str) -> Server:
    """One that asks `names`; not started yet."""
    name = secrets.token_hex(3)
    return Server(directory / name, Path("/run") / f"rdst-{name}", {"DNS_SERVER_IP": names.address, **settings})


@dataclass
class Box:
    """One VM, through HTTP only."""

    server: Server
    seen: dict[str, Any]  # the VM object as it was answered last

    @property
    def id(self) -> str:
        return str(self.seen["id"])

    @property
    def engine(self) -> str:
        return str(self.seen["engine"])

    @property
    def ip(self) -> str:
        return str(self.seen["guestIp"])

    @property
    def path(self) -> str:
        return f"/v1/vms/{self.id}"

    def scale(self, seconds: float) -> float:
        return scale(seconds, self.engine)

    def promised(self, seconds: float) -> float:
        return promised(seconds, self.engine)

    def look(self) -> dict[str, Any]:
        self.seen = self.server.http.get(self.path).raise_for_status().json()
        return self.seen

    def post(self, verb: str, body: Any = None, **more: Any) -> httpx.Response:
        return self.server.http.post(f"{self.path}/{verb}", json=body, **more)

    def call(self, verb: str, **body: Any) -> dict[str, Any]:
        answer = self.post(verb, body)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def exec(self, cmd: str, **more: Any) -> dict[str, Any]:
        return self.call("exec", cmd=cmd, **more)

    def ts(self, code: str, **more: Any) -> dict[str, Any]:
        return self.call("run-ts", code=code, **more)

    def js(self, code: str, **more: Any) -> dict[str, Any]:
        return self.call("run-js", code=code, **more)

    def output(self, cmd: str, **more: Any) -> str:
        """stdout of a command that succeeds."""
        done = self.exec(cmd, **more)
        assert done["exitCode"] == 0, done
        return str(done["stdout"])

    def upload(self, archive: Any, dest: str = "/workspace", kind: str = "application/gzip") -> httpx.Response:
        return self.server.http.post(
            f"{self.path}/files/upload", params={"dest": dest}, content=archive, headers={"content-type": kind}
        )

    def download(self, path: str) -> httpx.Response:
        return self.server.http.get(f"{self.path}/files/download", params={"path": path})

    def fetch(self, path: str) -> dict[str, bytes | None]:
        """What a download holds: name → content, None for a directory."""
        answer = self.download(path)
        assert answer.status_code == 200, answer.text
        with tarfile.open(fileobj=io.BytesIO(answer.content), mode="r:gz") as tar:
            opened = {member.name: tar.extractfile(member) for member in tar}
            return {name: file.read() if file else None for name, file in opened.items()}

    def engine_log(self) -> str:
        """What the engine and the server said of it, with newlines between."""
        return "\n".join(self.server.http.get(f"{self.path}/logs").raise_for_status().json()["lines"])

    def delete(self) -> None:
        answer = self.server.http.delete(self.path)
        assert answer.status_code in (204, 404), answer.text


def tgz(files: Mapping[str, bytes], mode: int = 0o644) -> bytes:
    """An archive of these files."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), mode
            tar.addfile(member, io.BytesIO(content))
    return target.getvalue()


def _processes_of(node: str, manager: int) -> Iterator[str]:
    """In a cgroup of the node, or a child of its manager, but for the helper for file work, which is no VM's. What has
    ended and waits for the host's init is gone."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            groups = (entry / "cgroup").read_text()
            status = dict(line.split(":\t", 1) for line in (entry / "status").read_text().splitlines())
        except (FileNotFoundError, ProcessLookupError):
            continue
        is_child = int(status["PPid"]) == manager and status["Name"].strip() != "unshare"
        has_ended = status["State"][0] in "ZX"
        if is_child or (node in groups and not has_ended):
            yield f"process {entry.name} {status['Name']}, {status['State']}, child: {is_child}"


def _mounts() -> list[Path]:
    return [Path(line.split()[4]) for line in Path("/proc/self/mountinfo").read_text().splitlines()]


def _loops() -> Iterator[Path]:
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            yield Path(backing.read_text().strip().removesuffix(" (deleted)"))
        except (FileNotFoundError, OSError):
            continue  # detached while we looked


def _rules(block: int, alive: bool) -> list[str]:
    """The table of a server that runs stays, without VMs in it; without a server it is gone."""
    table = f"rundatsheesh_{block}"
    listing = subprocess.run(["nft", "list", "table", "inet", table], capture_output=True, text=True).stdout
    if not alive:
        return [f"table {table}"] if listing else []
    return [f"rule {line.strip()}" for line in listing.splitlines() if f'"rds{block}-' in line and "*" not in line]


@dataclass
class Dns:
    """A name server on a loopback address of its own: a zone of A records, and a list of all that it was asked."""

    zone: dict[str, tuple[int, list[str]]] = field(default_factory=dict)  # name → TTL, addresses
    asked: list[str] = field(default_factory=list)

    def __enter__(self) -> Dns:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.53", 0))
        self._thread = threading.Thread(target=self._serve, name="test name server")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as waker:
            waker.sendto(b"", self._socket.getsockname())
        self._thread.join()
        self._socket.close()

    @property
    def address(self) -> str:
        host, port = self._socket.getsockname()
        return f"{host}:{port}"

    def _serve(self) -> None:
        while True:
            wire, client = self._socket.recvfrom(4096)
            if not wire:
                return
            self._socket.sendto(self._answer(dns.message.from_wire(wire)), client)

    def _answer(self, query: dns.message.Message) -> bytes:
        asked = query.question[0]
        name = asked.name.to_text(omit_final_dot=True).lower()
        self.asked.append(name)
        response = dns.message.make_response(query)
        ttl, addresses = self.zone.get(name, (0, []))
        if name not in self.zone:
            response.set_rcode(dns.rcode.NXDOMAIN)
        elif asked.rdtype == dns.rdatatype.A:
            response.answer.append(dns.rrset.from_text(asked.name, ttl, "IN", "A", *addresses))
        return response.to_wire()


def eventually(condition: Any, seconds: float, what: str) -> None:
    """Wait until `condition()` is true; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.05)
