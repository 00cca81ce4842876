"""VM records as rows of the database, and back."""

from __future__ import annotations

from datetime import datetime, timedelta
from ipaddress import IPv4Network
from typing import Any

from sqlalchemy import Row

from rundatsheesh.manager.model import (
    EgressPolicy,
    Isolation,
    Lifetime,
    ProvisionMode,
    Slot,
    State,
    VmRecord,
    VmSpec,
)


def deadline(ttl_ms: int | None, since: datetime) -> datetime | None:
    """When a time to live that counts from `since` ends."""
    return None if ttl_ms is None else since + timedelta(milliseconds=ttl_ms)


def spec_columns(spec: VmSpec) -> dict[str, Any]:
    """All that a caller decides. Without the deadline, which counts from a moment: see `deadline`."""
    return {
        "cpu": spec.cpu,
        "mem_mb": spec.mem_mb,
        "disk_mb": spec.disk_mb,
        "outbound": spec.policy.outbound,
        "allow_ips": [str(network) for network in spec.policy.allow_ips],
        "allow_domains": list(spec.policy.allow_domains),
        "engine": spec.engine,
        "image_id": spec.image_id,
        "name": spec.name,
        "labels": dict(spec.labels),
        "ttl_ms": spec.lifetime.ttl_ms,
        "idle_timeout_ms": spec.lifetime.idle_timeout_ms,
    }


def to_row(record: VmRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "node_id": record.node_id,
        "slot": record.slot.number,
        "state": record.state.value,
        "isolation": record.isolation.value,
        "provision_mode": record.provision_mode.value,
        "boot_id": record.boot_id,
        "reason": record.reason,
        "created_at": record.created_at,
        "started_at": record.started_at,
        "expires_at": record.expires_at,
        **spec_columns(record.spec),
    }


def from_row(row: Row[Any]) -> VmRecord:
    policy = EgressPolicy(
        outbound=row.outbound,
        allow_ips=tuple(IPv4Network(network) for network in row.allow_ips),
        allow_domains=tuple(row.allow_domains),
    )
    spec = VmSpec(
        cpu=row.cpu,
        mem_mb=row.mem_mb,
        disk_mb=row.disk_mb,
        policy=policy,
        engine=row.engine,
        image_id=row.image_id,
        name=row.name,
        labels=row.labels,
        lifetime=Lifetime(row.ttl_ms, row.idle_timeout_ms),
    )
    return VmRecord(
        id=row.id,
        node_id=row.node_id,
        slot=Slot(row.slot),
        spec=spec,
        state=State(row.state),
        isolation=Isolation(row.isolation),
        provision_mode=ProvisionMode(row.provision_mode),
        boot_id=row.boot_id,
        reason=row.reason,
        created_at=row.created_at,
        started_at=row.started_at,
        expires_at=row.expires_at,
    )
