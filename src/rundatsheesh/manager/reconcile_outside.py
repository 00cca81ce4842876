"""The leak audit from outside of a manager: beside one that runs, or where none does. It takes no lock and changes
nothing."""

from __future__ import annotations

import os
from collections.abc import Collection

from rundatsheesh.manager.errors import HostError
from rundatsheesh.manager.model import Leak, State, VmRecord
from rundatsheesh.manager.net import Network
from rundatsheesh.manager.settings import Settings
from rundatsheesh.manager.store import Store
from rundatsheesh.manager.vms_audit import AT_REST, Attended, Site, audit
from rundatsheesh.manager.vms_layout import Layout, find_node, is_managed

# A manager that runs may be in the middle of anything, which nobody can see from here; what is there after this many
# seconds all the same, and was there before, is not on its way.
APART = 3.0
_SETTLED = AT_REST | {State.RUNNING, State.PAUSED}


async def audit_from_outside(settings: Settings) -> list[Leak]:
    """What `GET /v1/admin/leaks` would say, for the server of these settings. Raises HostError or NetworkError for what
    cannot be looked at."""
    if os.geteuid() != 0:
        raise HostError("not root, so not all of the host can be looked at", hint="use sudo")
    node = find_node(settings.storage_root)
    store = await Store.open_existing(settings.effective_database_url) if node is not None else None
    if node is None or store is None:
        return []  # no server ever ran here, so nothing bears its name
    try:
        site = Site(node, Layout(settings.storage_root, settings.runtime_dir), Network(node.block))
        if is_managed(settings.storage_root):
            return await audit(site, store, _beside_a_manager, apart=APART)
        return await audit(site, store, _without_a_manager)
    finally:
        await store.close()


def _beside_a_manager(records: Collection[VmRecord]) -> Attended:
    """It is connected to what runs, and works on what is on its way from one state to another."""
    ids = {record.id for record in records}
    return Attended(ids, {record.id for record in records if record.state not in _SETTLED})


def _without_a_manager(records: Collection[VmRecord]) -> Attended:
    """VMs outlive it, and nobody works on any of them."""
    return Attended({record.id for record in records}, frozenset())
