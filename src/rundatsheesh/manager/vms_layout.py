"""Where this manager's things lie on the host, and who it is: derived from settings, remembered in STORAGE_ROOT."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rundatsheesh.manager.engines.base import VmFiles
from rundatsheesh.manager.errors import HostError
from rundatsheesh.manager.net import claim_block

NODE_FILE = "node.json"
LOCK_FILE = "manager.lock"
# A `struct flock` for all of the file. A lock of this kind belongs to the open file, as flock's does, so no copy of its
# descriptor that is closed elsewhere gives it up; and it can be asked about without being taken.
_FLOCK = "hhqqi"
_WHOLE_FILE = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Node:
    """This manager among all that may share a database or a host."""

    id: str
    block: int  # of network slots, see net/blocks.py


@dataclass(frozen=True, slots=True)
class Layout:
    storage_root: Path
    runtime_dir: Path

    @property
    def vms(self) -> Path:
        return self.storage_root / "vms"

    @property
    def spool(self) -> Path:
        """Uploads that are being checked; nothing in it outlives its manager."""
        return self.storage_root / "spool"

    def prepare(self) -> None:
        """Make the directories. Only root may look into them: they hold what the VMs hold."""
        for directory in (self.storage_root, self.vms, self.spool, self.runtime_dir):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for left in self.spool.iterdir():
            left.unlink()

    def files(self, node_id: str, vm_id: str) -> VmFiles:
        directory = self.vms / vm_id
        return VmFiles(
            directory=directory,
            disk=directory / "workspace.img",
            workspace=directory / "workspace",
            runtime=self.runtime_dir / node_id / vm_id,
            engine_log=directory / "engine.log",
            console_log=directory / "console.log",
        )


@contextmanager
def sole_manager(storage_root: Path) -> Iterator[None]:
    """Hold the storage root for this process; raises HostError where another manager has it."""
    with open(storage_root / LOCK_FILE, "w") as lock:
        try:
            fcntl.fcntl(lock, fcntl.F_OFD_SETLK, _WHOLE_FILE)
        except (BlockingIOError, PermissionError):
            hint = "stop it first, or give this one a STORAGE_ROOT of its own"
            raise HostError(f"another server already manages {storage_root}", hint=hint) from None
        yield


def is_managed(storage_root: Path) -> bool:
    """Whether a manager runs on this storage root. Takes nothing: one that starts meanwhile is not kept from it."""
    try:
        with open(storage_root / LOCK_FILE) as lock:
            answer = fcntl.fcntl(lock, fcntl.F_OFD_GETLK, _WHOLE_FILE)
    except FileNotFoundError:
        return False
    kind, *_ = struct.unpack(_FLOCK, answer)
    return bool(kind != fcntl.F_UNLCK)


def find_node(storage_root: Path) -> Node | None:
    """The identity kept in the storage root, without claiming anything; None where no manager has run yet."""
    known = _read(storage_root / NODE_FILE)
    return known if known is not None and known.block >= 0 else None


def load_node(storage_root: Path) -> Node:
    """The identity kept in the storage root, made at the first start; its block of slots is claimed on this host."""
    path = storage_root / NODE_FILE
    known = _read(path)
    node_id = known.id if known else "n" + secrets.token_hex(4)
    if known is None:
        _write(path, Node(node_id, -1))  # a claim is believed while the storage root says the same
    node = Node(node_id, claim_block(node_id, storage_root, known.block if known and known.block >= 0 else None))
    if node != known:
        _write(path, node)
    return node


def _read(path: Path) -> Node | None:
    try:
        return Node(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise HostError(
            f"{path} is damaged: {error}", hint="restore it; VMs are found again by what it says"
        ) from error


def _write(path: Path, node: Node) -> None:
    new = path.with_suffix(".new")
    with open(new, "w") as file:
        json.dump(asdict(node), file)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
