"""Records to put into a store."""

from __future__ import annotations

from ipaddress import IPv4Network
from typing import Any

from rundatsheesh.manager.model import Caller, EgressPolicy, Isolation, ProvisionMode, VmRecord, VmSpec
from rundatsheesh.manager.store import Store

CALLER = Caller("req-1", "key:main")
SPEC = VmSpec(
    cpu=2,
    mem_mb=256,
    disk_mb=100,
    policy=EgressPolicy(True, (IPv4Network("10.0.0.0/8"),), ("*.example.com",)),
    engine="gvisor",
    image_id="image",
    labels={"a": "b"},
)


async def reserve(opened: Store, spec: VmSpec = SPEC, **changes: Any) -> VmRecord:
    wanted: dict[str, Any] = {
        "node_id": "node",
        "block": 1,
        "isolation": Isolation.APPLICATION_KERNEL,
        "provision_mode": ProvisionMode.BOOT,
        "max_vms": 100,
        "caller": CALLER,
    }
    return await opened.reserve(spec, **{**wanted, **changes})
