"""A server without virtual machines: the real API and the real store over a lifecycle that lives in memory."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx

from rundatsheesh.manager.api import Readiness, Services, create_api
from rundatsheesh.manager.errors import Conflict, NotFound, RdsError
from rundatsheesh.manager.model import (
    Caller,
    CreateVm,
    EgressPolicy,
    ExecCall,
    ExecLogEntry,
    ExecLogPage,
    Healing,
    Isolation,
    Leak,
    LifetimeChange,
    LogView,
    ProvisionMode,
    ScriptCall,
    Slot,
    State,
    Unchanged,
    VmRecord,
    VmSpec,
    new_vm_id,
    now,
)
from rundatsheesh.manager.overview import collect_overview
from rundatsheesh.manager.settings import Settings
from rundatsheesh.manager.store import Store
from rundatsheesh.manager.store.rows import deadline
from rundatsheesh.manager.vms_once import Creations

KEY = {"X-API-Key": "dev-key"}
LOGIN = {"email": "admin@localhost", "password": "admin"}


@dataclass(frozen=True)
class Outcome:
    exit_code: int = 0
    stdout: str = ""
    stderr: str = ""
    duration_ms: int = 1
    timed_out: bool = False
    truncated: bool = False
    has_result: bool = False
    result: Any = None
    error: Any = None


@dataclass
class FakeVms:
    """Keeps records, remembers what it was asked, answers what the test has set."""

    records: dict[str, VmRecord] = field(default_factory=dict)
    asked: list[Any] = field(default_factory=list)
    callers: list[Caller] = field(default_factory=list)
    outcome: Outcome = field(default_factory=Outcome)
    fails_with: BaseException | None = None
    uploaded: bytes = b""
    download_chunks: list[bytes] = field(default_factory=lambda: [gzip.compress(b"hello")])
    download_fails_after: int | None = None
    download_closed: bool = False
    hang: asyncio.Event | None = None  # set: calls wait for it
    began: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: int = 0
    leaks: list[Leak] = field(default_factory=list)
    creations: Creations | None = None

    async def audit(self) -> list[Leak]:
        return self.leaks

    async def reconcile(self) -> Healing:
        healed, self.leaks = tuple(self.leaks), []
        return Healing(healed, ())

    async def _note(self, asked: Any, caller: Caller) -> None:
        self.asked.append(asked)
        self.callers.append(caller)
        if self.fails_with is not None:
            raise self.fails_with
        if self.hang is not None:
            self.began.set()
            try:
                await self.hang.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise

    async def create(self, request: CreateVm, caller: Caller) -> VmRecord:
        assert self.creations is not None
        return await self.creations.create(caller, lambda: self._create(request, caller))

    async def _create(self, request: CreateVm, caller: Caller) -> VmRecord:
        await self._note(request, caller)
        spec = VmSpec(
            cpu=request.cpu,
            mem_mb=request.mem_mb,
            disk_mb=request.disk_mb or 1024,
            policy=EgressPolicy(request.outbound, request.allow_ips, request.allow_domains),
            engine=request.engine or "gvisor",
            image_id=request.image_id or "default",
            name=request.name,
            labels=dict(request.labels),
            lifetime=request.lifetime,
        )
        record = VmRecord(
            id=new_vm_id(),
            node_id="node",
            slot=Slot(300 + len(self.records) % 400),
            spec=spec,
            state=State.RUNNING,
            isolation=Isolation.APPLICATION_KERNEL,
            provision_mode=ProvisionMode.BOOT,
            boot_id="boot",
            reason=None,
            created_at=now(),
            started_at=now(),
            expires_at=deadline(request.lifetime.ttl_ms, now()),
        )
        self.records[record.id] = record
        return record

    async def get(self, vm_id: str) -> VmRecord:
        if vm_id not in self.records:
            raise NotFound(f"no VM {vm_id}", code="vm_not_found")
        return self.records[vm_id]

    async def list(self, *, state: State | None, labels: Mapping[str, str]) -> list[VmRecord]:
        return [
            r
            for r in self.records.values()
            if (state is None or r.state is state) and labels.items() <= r.spec.labels.items()
        ]

    async def _move(self, vm_id: str, from_: State, to: State) -> None:
        record = await self.get(vm_id)
        if record.state is not from_:
            raise Conflict(f"VM is {record.state}", details={"state": record.state.value})
        self.records[vm_id] = replace(record, state=to)

    async def change_lifetime(self, vm_id: str, change: LifetimeChange, caller: Caller) -> VmRecord:
        await self._note(change, caller)
        record = await self.get(vm_id)
        lifetime, expires_at = record.spec.lifetime, record.expires_at
        if not isinstance(change.ttl_ms, Unchanged):
            lifetime = replace(lifetime, ttl_ms=change.ttl_ms)
            expires_at = deadline(change.ttl_ms, now())
        if not isinstance(change.idle_timeout_ms, Unchanged):
            lifetime = replace(lifetime, idle_timeout_ms=change.idle_timeout_ms)
        changed = replace(record, spec=replace(record.spec, lifetime=lifetime), expires_at=expires_at)
        self.records[vm_id] = changed
        return changed

    async def start(self, vm_id: str, caller: Caller) -> None:
        await self._move(vm_id, State.STOPPED, State.RUNNING)

    async def stop(self, vm_id: str, caller: Caller) -> None:
        await self._move(vm_id, State.RUNNING, State.STOPPED)

    async def destroy(self, vm_id: str, caller: Caller) -> None:
        await self.get(vm_id)
        await self._note(vm_id, caller)
        del self.records[vm_id]

    async def _running(self, vm_id: str) -> None:
        record = await self.get(vm_id)
        if record.state is not State.RUNNING:
            raise Conflict("VM is not running", details={"state": record.state.value})

    async def exec(self, vm_id: str, call: ExecCall, caller: Caller) -> Outcome:
        await self._running(vm_id)
        await self._note(call, caller)
        return self.outcome

    async def run_script(self, vm_id: str, call: ScriptCall, caller: Caller) -> Outcome:
        await self._running(vm_id)
        await self._note(call, caller)
        return self.outcome

    async def upload(self, vm_id: str, dest: str, body: AsyncIterator[bytes], caller: Caller) -> None:
        await self._running(vm_id)
        received = b"".join([chunk async for chunk in body])
        await self._note(dest, caller)
        self.uploaded = received

    async def download(self, vm_id: str, path: str, caller: Caller) -> AsyncIterator[bytes]:
        await self._running(vm_id)
        await self._note(path, caller)
        return self._chunks()

    async def _chunks(self) -> AsyncIterator[bytes]:
        try:
            for number, chunk in enumerate(self.download_chunks):
                if number == self.download_fails_after:
                    raise RdsError("broken in the middle")
                yield chunk
        finally:
            self.download_closed = True

    async def logs(self, vm_id: str, type_: str, tail: int) -> LogView:
        await self.get(vm_id)
        return LogView(type_, ("one", "two")[-tail:], truncated=tail < 2, updated_at=now())

    async def exec_logs(self, vm_id: str, limit: int, type_: str | None) -> ExecLogPage:
        await self.get(vm_id)
        entry = ExecLogEntry(
            id="call-1",
            vm_id=vm_id,
            type="exec",
            input="true",
            input_truncated=False,
            exit_code=0,
            duration_ms=3,
            started_at=now(),
            finished_at=now(),
            bytes_in=4,
            bytes_out=0,
            timed_out=False,
            error=None,
            request_id="req-1",
            who="key:main",
        )
        return ExecLogPage((entry,), has_more=False)


@dataclass
class Server:
    client: httpx.AsyncClient  # without credentials
    vms: FakeVms
    store: Store
    app: Callable[..., Any]
    readiness: list[Readiness]

    async def vm(self) -> str:
        """The id of a new VM."""
        answer = await self.client.post(
            "/v1/vms", headers=KEY, json={"cpu": 1, "memMb": 256, "allowIps": [], "labels": {"a": "b"}}
        )
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    async def log_in(self) -> None:
        """The client carries the session's cookie from now on."""
        answer = await self.client.post("/auth/login", json=LOGIN)
        assert answer.status_code == 200, answer.text


def make_settings(directory: Path, **values: Any) -> Settings:
    values.setdefault("max_cpu", 4)
    return Settings(_env_file=None, storage_root=directory, **values)


async def open_store(path: Path) -> Store:
    """A store in a new file, or in an existing one. The schema is made once and copied: migrating takes 0.2 s."""
    if not path.exists():
        path.write_bytes(await _empty_database(path.with_suffix(".template")))
    return await Store.open(f"sqlite:///{path}")


async def _empty_database(path: Path) -> bytes:
    if not _EMPTY:
        await (await Store.open(f"sqlite:///{path}")).close()
        _EMPTY.append(path.read_bytes())
    return _EMPTY[0]


_EMPTY: list[bytes] = []


@asynccontextmanager
async def serve(directory: Path, **settings: Any) -> AsyncIterator[Server]:
    store = await open_store(directory / "api.db")
    vms, readiness = FakeVms(), [Readiness(True)]
    vms.creations = Creations(store.idempotency, "node", vms.get)
    parsed = make_settings(directory, **settings)
    app = create_api(
        Services(
            settings=parsed,
            vms=vms,
            credentials=store.credentials,
            history=store.history,
            overview=lambda: collect_overview(vms.records.values(), storage_root=directory, max_vms=parsed.max_vms),
            readiness=lambda: readiness[0],
            audit=vms.audit,
            reconcile=vms.reconcile,
        )
    )
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:3000") as client:
            yield Server(client, vms, store, app, readiness)
    finally:
        await store.close()


class Wire:
    """One request spoken in ASGI, by a client that can go away, and that reads only while `reading` is set.

    A body of None never arrives.
    """

    def __init__(self, app: Callable[..., Any], method: str, target: str, body: bytes | None = b"") -> None:
        path, _, query = target.partition("?")
        self.sent: list[Mapping[str, Any]] = []  # what the server sent
        self.reading = asyncio.Event()
        self.reading.set()
        self.first_chunk = asyncio.Event()
        self._gone = asyncio.Event()
        self._body = [] if body is None else [body]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(b"host", b"localhost"), (b"x-api-key", b"dev-key"), (b"content-type", b"application/gzip")],
            "client": ("127.0.0.1", 5),
            "server": ("127.0.0.1", 3000),
        }
        self.done = asyncio.ensure_future(app(scope, self._receive, self._send))

    @property
    def status(self) -> int | None:
        return next((message["status"] for message in self.sent if "status" in message), None)

    def go_away(self) -> None:
        self._gone.set()

    async def _receive(self) -> Mapping[str, Any]:
        if self._body:
            return {"type": "http.request", "body": self._body.pop(), "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Mapping[str, Any]) -> None:
        self.sent.append(message)
        if message["type"] == "http.response.body":
            self.first_chunk.set()
            await self.reading.wait()
