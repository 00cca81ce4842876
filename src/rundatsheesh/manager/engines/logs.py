"""The logs of one guest's engine and console.

While the guest runs they lie in its runtime directory, a small tmpfs, so that the kernel bounds what a guest can make
them grow to, whether a manager runs or not. STORAGE_ROOT holds a link to them meanwhile, and their tail afterwards.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from rundatsheesh.manager.host.space import NO_ROOM

log = logging.getLogger(__name__)

KEEP_BYTES = 256 << 10  # of a log, after the guest has ended
TRIM_BYTES = 512 << 10  # a running guest's log that has this many is cut to its last KEEP_BYTES
TRIM_INTERVAL = 10.0  # seconds between two looks at the size of a running guest's logs
CARRY_BYTES = 64 << 10  # of the runs before, with which a log begins


def open_log(kept: Path, live: Path) -> None:
    """Let the log of this run begin with the tail of the earlier ones, and be found where logs are looked for.

    For root alone: a guest's user can open what his agent has open, if the mode of the file lets him.
    """
    live.touch(mode=0o600)
    live.chmod(0o600)
    live.write_bytes(read_tail(kept, CARRY_BYTES))
    new = kept.with_name(kept.name + ".new")
    new.unlink(missing_ok=True)
    new.symlink_to(live)
    new.replace(kept)


def settle_log(kept: Path, live: Path) -> None:
    """Replace the link by the log's tail, where there is a link. On a full disk the log ends with its guest: nothing
    that is to be taken away may wait for room. Idempotent."""
    if not kept.is_symlink():
        return
    new = kept.with_name(kept.name + ".new")
    new.unlink(missing_ok=True)
    try:
        new.write_bytes(read_tail(live, KEEP_BYTES))
        new.replace(kept)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        log.warning("no room for %s", kept)
        new.unlink(missing_ok=True)
        kept.unlink()


def note(kept: Path, text: str) -> bool:
    """Append a line of the manager's own, with the time. False where it could not be written: a guest may have filled
    the file system that its logs are in, and a log is no reason to fail for."""
    at = datetime.now(UTC).isoformat(timespec="milliseconds").removesuffix("+00:00")
    line = f"{at}Z manager: {text}\n".encode()
    live = kept.readlink() if kept.is_symlink() else kept
    # The runtime directory is also the engine's: whatever a program that broke out of its guest puts in the log's
    # place is neither followed nor waited for.
    flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        if live is not kept and not live.exists():
            settle_log(kept, live)  # the host was started anew, and the guest's file system is gone
            live = kept
        if live is kept:
            trim_log(kept)
            flags |= os.O_CREAT
        with open(live, "ab", 0, opener=lambda path, _: os.open(path, flags, 0o600)) as file:
            return file.write(line) == len(line)
    except OSError:
        return False


def trim_log(live: Path) -> None:
    """Make room in the log of a running guest, where there is one. Writers append, so they go on at the new end."""
    with suppress(FileNotFoundError):  # the guest may be taken away meanwhile
        if live.stat().st_size > TRIM_BYTES:
            tail = read_tail(live, KEEP_BYTES)
            with open(live, "r+b") as file:
                file.truncate(0)
            with open(live, "ab") as file:
                file.write(tail)


def read_tail(path: Path, size: int) -> bytes:
    """The last bytes of a file; empty when there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(-min(size, os.fstat(file.fileno()).st_size), os.SEEK_END)
            return file.read(size)
    except FileNotFoundError:
        return b""
