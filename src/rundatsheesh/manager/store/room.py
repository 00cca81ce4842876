"""Room that a SQLite database has for itself, on a disk that guests can fill.

Only what takes something away makes room again, and it is a transaction too. So two things are held ahead:

- The blocks of the write-ahead log. SQLite overwrites it from its beginning and never makes it smaller while it is
  open, so a transaction needs no more of the disk, and no guest can take what it needs.
- A ballast: a file that means nothing. It is given up when those blocks are used up, because the database has to grow
  before they can be used again; its last part only at a start, for the files that SQLite makes anew then.

Where a file system writes to new places what it overwrites (btrfs, ZFS), the ballast is all there is.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from rundatsheesh.manager.host.space import free_bytes, hold

log = logging.getLogger(__name__)

MIB = 1 << 20
# After 4 MiB SQLite writes the log back and begins anew; the largest transaction, the end of a VM with a long history,
# takes 10 MiB, most others 20 KiB. With 1 MiB more, the log's index (-shm) would need a second block of its own.
LOG_BYTES = 15 * MIB
BALLAST_BYTES = 16 * MIB
START_BYTES = 2 * MIB  # of the ballast
# With less than this, nothing is added any more. More than one transaction adds, and than a start takes.
SHORT_BYTES = 4 * MIB


@dataclass(frozen=True, slots=True)
class Room:
    """Of one database, by its path. Nothing here opens that file: to close it would drop SQLite's locks on it."""

    database: Path

    @property
    def ballast(self) -> Path:
        return self.database.with_name(self.database.name + "-ballast")

    @property
    def is_short(self) -> bool:
        """Whether what is left is for those that take something away."""
        return free_bytes(self.database.parent) < SHORT_BYTES

    def keep(self) -> None:
        """Hold again what is not held, as far as there is room. SQLite has the database open, and nobody writes."""
        try:
            kept = [hold(self.database.with_name(self.database.name + "-wal"), LOG_BYTES)]
            kept.append(hold(self.ballast, BALLAST_BYTES))
        except OSError as error:
            log.warning("the database has no room of its own: %s", error)
            return
        if not all(kept):
            log.warning("the disk of the server's database is full: %s", self.database.parent)

    def make_way(self) -> None:
        """Before SQLite opens the database."""
        if self.is_short:
            self._shrink(0)

    def give_up(self) -> None:
        """All of the ballast but the part that is for a start."""
        self._shrink(START_BYTES)

    def _shrink(self, left: int) -> None:
        if not self.ballast.exists() or self.ballast.stat().st_size <= left:
            return
        log.warning("the disk of the server's database is full; its ballast is given up: %s", self.ballast)
        os.truncate(self.ballast, left)
