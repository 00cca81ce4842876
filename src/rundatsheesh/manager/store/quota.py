"""How many VMs there may be: on a server, and of one caller."""

from __future__ import annotations

from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from rundatsheesh.manager.errors import LimitReached
from rundatsheesh.manager.model import Caller, Limits, State, VmSpec
from rundatsheesh.manager.store import schema

QUOTA_RETRY_AFTER_S = 5.0


async def hold_counts(db: AsyncConnection, node_id: str, caller: Caller | None) -> None:
    """Nobody else counts the same VMs until the transaction ends. SQLite has one writer at a time anyway."""
    if db.dialect.name == "sqlite":
        return
    held = [f"node {node_id}"]
    if caller is not None and caller.limits != Limits():
        held.append(f"caller {caller.who}")
    for name in held:  # in this order everywhere, so that no two wait for each other
        await db.execute(text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))"), {"name": name})


async def check_server_limit(db: AsyncConnection, node_id: str, most: int, *, warm: bool) -> None:
    """Warm VMs and callers' VMs are counted apart. Raises LimitReached."""
    is_warm = schema.vms.c.state == State.WARM.value
    counted = (schema.vms.c.node_id == node_id, is_warm if warm else ~is_warm)
    count = await db.scalar(select(func.count()).select_from(schema.vms).where(*counted))
    if (count or 0) >= most:
        raise LimitReached(
            f"this server already has {most} VMs (MAX_VMS)",
            hint="delete a VM that is no longer needed",
            details={"limit": most},
            retry_after=QUOTA_RETRY_AFTER_S,
        )


async def check_key_limits(db: AsyncConnection, caller: Caller, spec: VmSpec) -> None:
    """Whether one more VM like `spec` is within the caller's limits. A stopped VM counts: it may be started again."""
    limits, table = caller.limits, schema.vms
    if (limits.vms, limits.cpu, limits.mem_mb) == (None, None, None):
        return
    sums = select(func.count(), func.sum(table.c.cpu), func.sum(table.c.mem_mb))
    mine = (table.c.created_by == caller.who, table.c.state != State.WARM.value)
    vms, cpu, mem_mb = (await db.execute(sums.where(*mine))).one()
    _check("maxVms", "VMs", limits.vms, vms, 1)
    _check("maxCpu", "vCPUs", limits.cpu, cpu or 0, spec.cpu)
    _check("maxMemMb", "MiB of memory", limits.mem_mb, mem_mb or 0, spec.mem_mb)


def _check(quota: str, what: str, most: int | None, used: int, more: int) -> None:
    if most is not None and used + more > most:
        raise LimitReached(
            f"the VMs of this API key may have {most} {what} together",
            hint="delete a VM that is no longer needed",
            details={"quota": quota, "limit": most, "used": int(used), "wanted": more},
            retry_after=QUOTA_RETRY_AFTER_S,
        )
