"""What the API needs from the rest of the manager. Handlers program against these, tests put fakes behind them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from rundatsheesh.manager.model import (
    ActivityEntry,
    ApiKey,
    Caller,
    CreateVm,
    ExecCall,
    ExecLogPage,
    Healing,
    Leak,
    LifetimeChange,
    LogView,
    Overview,
    Rights,
    ScriptCall,
    Session,
    State,
    VmRecord,
)
from rundatsheesh.manager.settings import Settings


class CallOutcome(Protocol):
    """How a command or script ended. `result` counts only when `has_result`; `error` is None when there was none."""

    @property
    def exit_code(self) -> int: ...
    @property
    def stdout(self) -> str: ...
    @property
    def stderr(self) -> str: ...
    @property
    def duration_ms(self) -> int: ...
    @property
    def timed_out(self) -> bool: ...
    @property
    def truncated(self) -> bool: ...
    @property
    def has_result(self) -> bool: ...
    @property
    def result(self) -> Any: ...
    @property
    def error(self) -> Any: ...


class VmService(Protocol):
    """The lifecycle. Every method raises RdsError; cancelling `create`, a call or a transfer undoes or kills it."""

    async def create(self, request: CreateVm, caller: Caller) -> VmRecord: ...

    async def get(self, vm_id: str) -> VmRecord: ...

    async def list(self, *, state: State | None, labels: Mapping[str, str]) -> list[VmRecord]: ...

    async def change_lifetime(self, vm_id: str, change: LifetimeChange, caller: Caller) -> VmRecord: ...

    async def start(self, vm_id: str, caller: Caller) -> None: ...

    async def stop(self, vm_id: str, caller: Caller) -> None: ...

    async def destroy(self, vm_id: str, caller: Caller) -> None: ...

    async def exec(self, vm_id: str, call: ExecCall, caller: Caller) -> CallOutcome: ...

    async def run_script(self, vm_id: str, call: ScriptCall, caller: Caller) -> CallOutcome: ...

    async def upload(self, vm_id: str, dest: str, body: AsyncIterator[bytes], caller: Caller) -> None:
        """`body` is the tar.gz as received; it raises TooLarge past MAX_UPLOAD_BYTES."""

    async def download(self, vm_id: str, path: str, caller: Caller) -> AsyncIterator[bytes]:
        """gzip bytes. The first chunk is already there, so what can be refused is refused before this returns.
        The iterator is an async generator, or has `aclose`: closing it ends the transfer."""

    async def logs(self, vm_id: str, type_: str, tail: int) -> LogView: ...

    async def exec_logs(self, vm_id: str, limit: int, type_: str | None) -> ExecLogPage: ...


class CredentialService(Protocol):
    async def create_session(self, email: str) -> tuple[str, Session]: ...

    async def find_session(self, token: str) -> Session | None: ...

    async def revoke_session(self, token: str) -> None: ...

    async def create_api_key(self, name: str, expires_at: datetime | None, rights: Rights) -> tuple[ApiKey, str]: ...

    async def list_api_keys(self) -> list[ApiKey]: ...

    async def find_api_key(self, secret: str) -> ApiKey | None: ...

    async def revoke_api_key(self, key_id: str) -> ApiKey: ...

    async def mark_used(self, used: Mapping[str, datetime]) -> None: ...


class ActivityService(Protocol):
    async def record_activity(
        self, kind: str, *, caller: Caller, vm_id: str | None = None, reason: str | None = None
    ) -> None: ...

    async def activity(self, limit: int) -> list[ActivityEntry]: ...


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether VMs can be created now; `reason` is a sentence for the operator, without internals."""

    ready: bool
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Services:
    settings: Settings
    vms: VmService
    credentials: CredentialService
    history: ActivityService
    overview: Callable[[], Awaitable[Overview]]
    readiness: Callable[[], Readiness]
    audit: Callable[[], Awaitable[list[Leak]]]
    reconcile: Callable[[], Awaitable[Healing]]
