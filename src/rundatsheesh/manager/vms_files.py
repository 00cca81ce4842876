"""Who moves the files of an upload or a download: a worker on this host where that has the workspace mounted, and the
guest's agent everywhere else. Both are talked to in the same way."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from rundatsheesh.manager.disk.worker import Worker, Workers, WorkPlace
from rundatsheesh.manager.errors import GuestError, GuestMisbehaved, RdsError
from rundatsheesh.manager.guest import Guest, GuestGone
from rundatsheesh.manager.vms_running import PING_TIMEOUT, RunningVm

GREETING_TIMEOUT = 20.0  # seconds; a worker confines itself within a millisecond, or 20 where it joins many groups

log = logging.getLogger(__name__)


class Mover:
    """Becomes ready while its user is still busy with other things."""

    def __init__(self, workers: Workers | None, place: WorkPlace | None, guest: Guest) -> None:
        self._guest = guest
        self._worker: Worker | None = None
        self._outside: Guest | None = None
        self._opening: asyncio.Task[None] | None = None
        if workers is not None and place is not None:
            self._opening = asyncio.create_task(self._open(workers, place))

    @property
    def is_outside(self) -> bool:
        """Whether it is a worker that does the work."""
        return self._outside is not None

    async def ready(self) -> Guest:
        """Who is to be asked for the transfer."""
        if self._opening is not None:
            await asyncio.shield(self._opening)
        return self._outside or self._guest

    async def close(self) -> None:
        """Return when nobody works any more."""
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.gather(self._opening, return_exceptions=True)
        if self._worker is not None:
            await self._worker.end()
        if self._outside is not None:
            await self._outside.close()

    async def _open(self, workers: Workers, place: WorkPlace) -> None:
        """What hinders a worker does not hinder the transfer: the guest does the same, behind the same wall as ever."""
        try:
            self._worker = await workers.open(place)
            self._outside = await Guest.connect(self._worker.stream, timeout=GREETING_TIMEOUT)
        except RdsError as error:
            log.warning("a transfer goes through the guest: %s", error)


@asynccontextmanager
async def file_mover(workers: Workers | None, vm: RunningVm, guest: Guest) -> AsyncIterator[Mover]:
    """A mover for one transfer; `guest` stays awake meanwhile. Nothing of it is left afterwards. Where a worker is
    killed, this raises what ended the VM, or GuestError where it lives."""
    mover = Mover(workers, vm.workplace, guest)
    try:
        yield mover
    except (GuestGone, GuestMisbehaved) as error:
        if not mover.is_outside:
            raise
        await guest.ping(PING_TIMEOUT)
        raise GuestError("the transfer was killed on the host") from error
    finally:
        # To its end even when the caller hangs up.
        await asyncio.shield(asyncio.ensure_future(mover.close()))
