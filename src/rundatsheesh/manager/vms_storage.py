"""What a full disk of the host has done, put right where that can be done.

A workspace is a sparse file: its guest is not told that the host has no room for what it writes, and its file system
refuses all further writes once the host has refused one of its own. That lasts for as long as it is mounted, however
much room there is by then. So its VM is stopped and says why; its next start mounts the disk anew.
"""

from __future__ import annotations

import logging

from rundatsheesh.manager.disk import workspace
from rundatsheesh.manager.errors import RdsError, StorageFull
from rundatsheesh.manager.host.threads import in_thread
from rundatsheesh.manager.model import State
from rundatsheesh.manager.store import Store
from rundatsheesh.manager.vms import MANAGER, Vms
from rundatsheesh.manager.vms_host import VmHost
from rundatsheesh.manager.vms_running import RunningVm

log = logging.getLogger(__name__)

# Why a VM was stopped. The second where the host has room: its disk failed, or was full and is not any more.
DISK_FULL, DISK_FAILED = "disk_full", "disk_failed"


class VmStorage:
    def __init__(self, store: Store, host: VmHost, vms: Vms) -> None:
        self._store = store
        self._host = host
        self._vms = vms

    async def look(self) -> None:
        """Stop VMs whose workspace takes no more writes, where the host can see that; then let the database hold its
        room again. Raises OSError."""
        failed = set(await in_thread(workspace.list_failed, self._host.layout.vms))
        for vm in list(self._vms.running_vms.values()):
            if vm.record.state is State.RUNNING and self._host.files(vm.record).workspace in failed:
                await self._stop(vm)
        await self._store.keep_room()

    async def _stop(self, vm: RunningVm) -> None:
        reason = DISK_FAILED if self._has_room() else DISK_FULL
        log.warning("%s is stopped: nothing can be written to its workspace any more (%s)", vm.record.id, reason)
        try:
            await self._vms.to_its_end(self._vms.stop_held(vm.record.id, MANAGER, reason, only=vm))
        except RdsError as error:
            log.warning("%s could not be stopped: %s", vm.record.id, error)

    def _has_room(self) -> bool:
        try:
            self._host.check_room()
        except StorageFull:
            return False
        return True
