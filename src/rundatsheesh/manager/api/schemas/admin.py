"""Logins, API keys, overview, activity, health."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rundatsheesh.manager.api.schemas.base import Body, Line, Query, QueryInt, Text, Timestamp, View
from rundatsheesh.manager.model import LeakKind

MAX_LIMIT = 1_000_000_000


class LoginBody(Body):
    email: Annotated[Text, Field(max_length=320)] = Field(examples=["admin@localhost"])
    password: Annotated[Text, Field(max_length=1024)] = Field(examples=["admin"])


class LoginView(View):
    email: str


class OkView(View):
    ok: Literal[True]


ScopeName = Literal["vm:read", "vm:write", "exec", "files", "admin"]


class KeyLimitsBody(Body):
    """What the key may use at once; what is not named is not limited."""

    max_vms: Annotated[int, Field(ge=0, le=MAX_LIMIT)] | None = None
    max_cpu: Annotated[int, Field(ge=0, le=MAX_LIMIT)] | None = Field(None, description="vCPUs of its VMs together.")
    max_mem_mb: Annotated[int, Field(ge=0, le=MAX_LIMIT)] | None = Field(None, description="Memory, together, MiB.")
    calls_per_minute: Annotated[int, Field(ge=1, le=MAX_LIMIT)] | None = None


class CreateApiKeyBody(Body):
    name: Annotated[Line, Field(min_length=1, max_length=128)] = Field(examples=["ci"])
    expires_at: Annotated[Text, Field(max_length=64)] | None = Field(
        None, description="RFC 3339, in the future; never unless given.", examples=["2099-01-01T00:00:00Z"]
    )
    scopes: list[ScopeName] | None = Field(
        None, min_length=1, max_length=5, description="What it may do; everything but `admin` unless given."
    )
    allow_ips: list[Annotated[Text, Field(max_length=64)]] | None = Field(
        None, max_length=64, description="Where VMs that it creates may reach at most; anywhere unless given."
    )
    limits: KeyLimitsBody = KeyLimitsBody()


class KeyLimitsView(View):
    max_vms: int | None
    max_cpu: int | None
    max_mem_mb: int | None
    calls_per_minute: int | None


class ApiKeyView(View):
    id: str
    name: str
    created_at: Timestamp
    expires_at: Timestamp | None
    revoked_at: Timestamp | None
    last_used_at: Timestamp | None = Field(description="To the minute.")
    scopes: list[ScopeName]
    allow_ips: list[str] | None = Field(description="null: anywhere.")
    limits: KeyLimitsView


class NewApiKeyView(ApiKeyView):
    secret: str = Field(description="The key itself. Shown this once.")


class VmCounts(View):
    total: int
    limit: int
    by_state: dict[str, int]


class CpuUse(View):
    allocated: int
    host: int
    load: float = Field(description="Average of the last minute.")


class MemoryUse(View):
    allocated_mb: int
    host_mb: int
    available_mb: int


class DiskUse(View):
    total_bytes: int
    free_bytes: int


class OverviewView(View):
    vms: VmCounts
    cpu: CpuUse
    memory: MemoryUse
    disk: DiskUse


class ActivityQuery(Query):
    limit: QueryInt = Field(100, ge=1, le=1000, description="Entries at most, the newest.")


class ActivityEntryView(View):
    id: int
    at: Timestamp
    kind: str = Field(examples=["vm.create"])
    vm_id: str | None
    reason: str | None
    who: str
    request_id: str


class ActivityView(View):
    entries: list[ActivityEntryView]
    has_more: bool


class LeakView(View):
    kind: Annotated[LeakKind, Field(strict=False)]
    name: str = Field(description="What the host calls it: pid, path, link.", examples=["rds0-300"])
    vm_id: str | None = Field(description="Whose it is or was, where that can be told.")


class LeaksView(View):
    leaks: list[LeakView] = Field(description="Differences between records and host; empty when all is well.")


class HealingView(View):
    healed: list[LeakView]
    remaining: list[LeakView] = Field(description="What could not be healed; the log says why.")


class HealthView(View):
    status: Literal["ok"]


class ReadyView(View):
    status: Literal["ready"]
