"""The manager's values as JSON. Keys as in the schemas; a test compares both."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

from starlette.responses import Response

from rundatsheesh.manager.api.services import CallOutcome
from rundatsheesh.manager.errors import GuestMisbehaved
from rundatsheesh.manager.model import (
    ActivityEntry,
    ApiKey,
    ExecLogEntry,
    Healing,
    Leak,
    LogView,
    Overview,
    State,
    VmRecord,
    now,
)

Json = dict[str, Any]


def answer(value: object, status: int = 200) -> Response:
    return Response(json.dumps(value), status, media_type="application/json")


def nothing() -> Response:
    return Response(status_code=204)


def timestamp(time: datetime | None) -> str | None:
    """RFC 3339, UTC, milliseconds."""
    if time is None:
        return None
    return time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def vm(record: VmRecord) -> Json:
    spec = record.spec
    view: Json = {
        "id": record.id,
        "name": spec.name,
        "state": record.state.value,
        "cpu": spec.cpu,
        "memMb": spec.mem_mb,
        "guestIp": str(record.slot.guest_ip),
        "allowIps": [str(network) for network in spec.policy.allow_ips],
        "outboundInternet": spec.policy.outbound,
        "engine": spec.engine,
        "isolation": record.isolation.value,
        "provisionMode": record.provision_mode.value,
        "imageId": spec.image_id,
        "labels": dict(spec.labels),
        "allowDomains": list(spec.policy.allow_domains),
        "createdAt": timestamp(record.created_at),
        "startedAt": timestamp(record.started_at),
        "bootId": record.boot_id,
        "reason": record.reason,
    }
    for optional in ("name", "reason"):
        if view[optional] is None:
            del view[optional]
    return view | _lifetime(record)


def _lifetime(record: VmRecord) -> Json:
    """Only what is set."""
    view: Json = {}
    at, lifetime = now(), record.spec.lifetime
    if record.expires_at is not None:
        view |= {"ttlMs": lifetime.ttl_ms, "expiresAt": timestamp(record.expires_at)}
        view["remainingMs"] = _milliseconds(record.expires_at - at)
    if lifetime.idle_timeout_ms is not None:
        view["idleTimeoutMs"] = lifetime.idle_timeout_ms
        if record.state is State.RUNNING:
            idle = timedelta(0) if record.idle_since is None else at - record.idle_since
            view["idleRemainingMs"] = _milliseconds(timedelta(milliseconds=lifetime.idle_timeout_ms) - idle)
    return view


def _milliseconds(time: timedelta) -> int:
    return max(0, time // timedelta(milliseconds=1))


def outcome(call: CallOutcome) -> Json:
    return {
        "exitCode": call.exit_code,
        "stdout": call.stdout,
        "stderr": call.stderr,
        "durationMs": call.duration_ms,
        "timedOut": call.timed_out,
        "truncated": call.truncated,
    }


def script_answer(call: CallOutcome) -> Response:
    """`result` and `error` come from the guest: what cannot be JSON is the guest's fault, not ours."""
    view = outcome(call)
    if call.has_result:
        view["result"] = call.result
    if call.error is not None:
        view["error"] = call.error
    try:
        text = json.dumps(view, allow_nan=False)
    except (ValueError, TypeError, RecursionError):
        raise GuestMisbehaved("the script's result is not JSON") from None
    return Response(text, media_type="application/json")


def logs(view: LogView) -> Json:
    return {
        "type": view.type,
        "lines": list(view.lines),
        "truncated": view.truncated,
        "updatedAt": timestamp(view.updated_at),
    }


def exec_log_entry(entry: ExecLogEntry) -> Json:
    return {
        "id": entry.id,
        "type": entry.type,
        "input": entry.input,
        "inputTruncated": entry.input_truncated,
        "exitCode": entry.exit_code,
        "durationMs": entry.duration_ms,
        "startedAt": timestamp(entry.started_at),
        "finishedAt": timestamp(entry.finished_at),
        "bytesIn": entry.bytes_in,
        "bytesOut": entry.bytes_out,
        "timedOut": entry.timed_out,
        "error": entry.error,
        "requestId": entry.request_id,
        "who": entry.who,
    }


def api_key(key: ApiKey) -> Json:
    egress, limits = key.rights.egress, key.rights.limits
    return {
        "id": key.id,
        "name": key.name,
        "createdAt": timestamp(key.created_at),
        "expiresAt": timestamp(key.expires_at),
        "revokedAt": timestamp(key.revoked_at),
        "lastUsedAt": timestamp(key.last_used_at),
        "scopes": sorted(key.rights.scopes),
        "allowIps": None if egress is None else [str(network) for network in egress],
        "limits": {
            "maxVms": limits.vms,
            "maxCpu": limits.cpu,
            "maxMemMb": limits.mem_mb,
            "callsPerMinute": limits.calls_per_minute,
        },
    }


def activity_entry(entry: ActivityEntry) -> Json:
    return {
        "id": entry.id,
        "at": timestamp(entry.at),
        "kind": entry.kind,
        "vmId": entry.vm_id,
        "reason": entry.reason,
        "who": entry.who,
        "requestId": entry.request_id,
    }


def overview(facts: Overview) -> Json:
    by_state = {state.value: count for state, count in facts.vms_by_state.items()}
    return {
        "vms": {"total": sum(by_state.values()), "limit": facts.max_vms, "byState": by_state},
        "cpu": {"allocated": facts.cpu_allocated, "host": facts.cpu_host, "load": facts.load_1m},
        "memory": {
            "allocatedMb": facts.mem_allocated_mb,
            "hostMb": facts.mem_host_mb,
            "availableMb": facts.mem_available_mb,
        },
        "disk": {"totalBytes": facts.disk_total, "freeBytes": facts.disk_free},
    }


def leak(found: Leak) -> Json:
    return {"kind": found.kind.value, "name": found.name, "vmId": found.vm_id}


def healing(done: Healing) -> Json:
    return {"healed": [leak(one) for one in done.healed], "remaining": [leak(one) for one in done.remaining]}
