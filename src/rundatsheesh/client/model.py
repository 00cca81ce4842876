"""What the server answers, as frozen values. Fields that a newer server adds are ignored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from typing import Any

Json = Mapping[str, Any]


class Unchanged(Enum):
    """What `update` leaves as it is; None clears instead."""

    UNCHANGED = "unchanged"


UNCHANGED = Unchanged.UNCHANGED


@dataclass(frozen=True, slots=True)
class VmInfo:
    """A VM as it was when asked for."""

    id: str
    state: str
    cpu: int
    mem_mb: int
    guest_ip: str | None
    engine: str
    isolation: str
    provision_mode: str
    image_id: str | None
    allow_ips: tuple[str, ...]
    allow_domains: tuple[str, ...]
    outbound_internet: bool
    labels: Mapping[str, str]
    created_at: datetime
    started_at: datetime | None
    boot_id: str | None
    name: str | None
    reason: str | None
    ttl_ms: int | None = None
    expires_at: datetime | None = None
    remaining_ms: int | None = None  # until expires_at, as of the answer
    idle_timeout_ms: int | None = None
    idle_remaining_ms: int | None = None

    @classmethod
    def parse(cls, body: Json) -> VmInfo:
        return cls(
            id=body["id"],
            state=body["state"],
            cpu=body["cpu"],
            mem_mb=body["memMb"],
            guest_ip=body.get("guestIp"),
            engine=body["engine"],
            isolation=body["isolation"],
            provision_mode=body["provisionMode"],
            image_id=body.get("imageId"),
            allow_ips=tuple(body.get("allowIps") or ()),
            allow_domains=tuple(body.get("allowDomains") or ()),
            outbound_internet=body.get("outboundInternet", False),
            labels=dict(body.get("labels") or {}),
            created_at=datetime.fromisoformat(body["createdAt"]),
            started_at=_time(body, "startedAt"),
            boot_id=body.get("bootId"),
            name=body.get("name"),
            reason=body.get("reason"),
            ttl_ms=body.get("ttlMs"),
            expires_at=_time(body, "expiresAt"),
            remaining_ms=body.get("remainingMs"),
            idle_timeout_ms=body.get("idleTimeoutMs"),
            idle_remaining_ms=body.get("idleRemainingMs"),
        )


@dataclass(frozen=True, slots=True)
class ExecResult:
    """How a command ended. A non-zero exit code is a result, not an error; a timeout has exit code 124."""

    exit_code: int
    stdout: str
    stderr: str
    duration_ms: int
    timed_out: bool
    truncated: bool

    @property
    def ok(self) -> bool:
        return self.exit_code == 0

    @classmethod
    def parse(cls, body: Json) -> ExecResult:
        return cls(**_outcome(body))


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a script ended. `result` is what it set, and `has_result` tells a `null` from nothing set."""

    exit_code: int
    stdout: str
    stderr: str
    duration_ms: int
    timed_out: bool
    truncated: bool
    has_result: bool
    result: Any
    error: Any

    @property
    def ok(self) -> bool:
        return self.exit_code == 0

    @classmethod
    def parse(cls, body: Json) -> RunResult:
        return cls(**_outcome(body), has_result="result" in body, result=body.get("result"), error=body.get("error"))


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """A further API key. `secret` is there only in the answer that made it."""

    id: str
    name: str
    scopes: tuple[str, ...]
    allow_ips: tuple[str, ...] | None
    limits: Mapping[str, int | None]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None
    secret: str | None

    @classmethod
    def parse(cls, body: Json) -> KeyInfo:
        allow_ips = body.get("allowIps")
        return cls(
            id=body["id"],
            name=body["name"],
            scopes=tuple(body.get("scopes") or ()),
            allow_ips=None if allow_ips is None else tuple(allow_ips),
            limits=dict(body.get("limits") or {}),
            created_at=datetime.fromisoformat(body["createdAt"]),
            expires_at=_time(body, "expiresAt"),
            revoked_at=_time(body, "revokedAt"),
            last_used_at=_time(body, "lastUsedAt"),
            secret=body.get("secret"),
        )


def _time(body: Json, name: str) -> datetime | None:
    return datetime.fromisoformat(body[name]) if body.get(name) else None


def _outcome(body: Json) -> dict[str, Any]:
    return {
        "exit_code": body["exitCode"],
        "stdout": body["stdout"],
        "stderr": body["stderr"],
        "duration_ms": body["durationMs"],
        "timed_out": body["timedOut"],
        "truncated": body["truncated"],
    }


def create_body(
    *,
    cpu: int,
    mem_mb: int,
    allow_ips: Sequence[str],
    outbound_internet: bool,
    allow_domains: Sequence[str],
    engine: str | None,
    image_id: str | None,
    snapshot_id: str | None,
    disk_size_mb: int | None,
    name: str | None,
    labels: Mapping[str, str] | None,
    ttl_ms: int | None,
    idle_timeout_ms: int | None,
) -> dict[str, Any]:
    optional = {
        "engine": engine,
        "imageId": image_id,
        "snapshotId": snapshot_id,
        "diskSizeMb": disk_size_mb,
        "name": name,
        "labels": dict(labels) if labels else None,
        "ttlMs": ttl_ms,
        "idleTimeoutMs": idle_timeout_ms,
    }
    required = {
        "cpu": cpu,
        "memMb": mem_mb,
        "allowIps": list(allow_ips),
        "outboundInternet": outbound_internet,
        "allowDomains": list(allow_domains),
    }
    return required | {key: value for key, value in optional.items() if value is not None}


def once(key: str | None) -> dict[str, str]:
    """The headers of a creation that happens once."""
    return {} if key is None else {"idempotency-key": key}


def update_body(ttl_ms: int | Unchanged | None, idle_timeout_ms: int | Unchanged | None) -> dict[str, Any]:
    body = {"ttlMs": ttl_ms, "idleTimeoutMs": idle_timeout_ms}
    return {key: value for key, value in body.items() if not isinstance(value, Unchanged)}


def key_body(
    name: str,
    scopes: Sequence[str] | None,
    allow_ips: Sequence[str] | None,
    expires_at: datetime | None,
    limits: Mapping[str, int | None],
) -> dict[str, Any]:
    body = {
        "name": name,
        "scopes": None if scopes is None else list(scopes),
        "allowIps": None if allow_ips is None else list(allow_ips),
        "expiresAt": None if expires_at is None else expires_at.astimezone(UTC).isoformat(),
        "limits": {key: value for key, value in limits.items() if value is not None} or None,
    }
    return {key: value for key, value in body.items() if value is not None}


def exec_body(cmd: str, cwd: str | None, env: Mapping[str, str] | None, timeout_ms: int | None) -> dict[str, Any]:
    body = {"cmd": cmd, "cwd": cwd, "env": dict(env) if env else None, "timeoutMs": timeout_ms}
    return {key: value for key, value in body.items() if value is not None}


def run_body(
    flags_field: str,
    *,
    code: str | None,
    path: str | None,
    args: Sequence[str],
    env: Mapping[str, str] | None,
    flags: Sequence[str],
    timeout_ms: int | None,
) -> dict[str, Any]:
    """`flags_field` is what the call names the interpreter's flags: denoFlags or nodeFlags."""
    body = {
        "code": code,
        "path": path,
        "args": list(args) or None,
        "env": [f"{key}={value}" for key, value in env.items()] if env else None,
        flags_field: list(flags) or None,
        "timeoutMs": timeout_ms,
    }
    return {key: value for key, value in body.items() if value is not None}
