"""Blocks of slots: each manager on a host owns one, so that no two share an address, a link or a rule."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rundatsheesh.manager.errors import NetworkError, Unavailable
from rundatsheesh.manager.model import GUEST_NETWORK, SLOTS_PER_BLOCK
from rundatsheesh.manager.net import links

# The same for every manager on the host, whatever its RUNTIME_DIR: links are the host's.
HOST_DIRECTORY = Path("/run/rundatsheesh")
BLOCKS = GUEST_NETWORK.num_addresses // SLOTS_PER_BLOCK
NODE_FILE = "node.json"  # in a storage root: whose it is


@dataclass(frozen=True, slots=True)
class _Claim:
    node_id: str
    storage_root: str

    def holds(self) -> bool:
        """Whether the node may still come back: its storage is there and still its own."""
        try:
            return self.node_id in (Path(self.storage_root) / NODE_FILE).read_text()
        except (FileNotFoundError, NotADirectoryError):
            return False


def claim_block(
    node_id: str, storage_root: Path, preferred: int | None = None, *, host_directory: Path = HOST_DIRECTORY
) -> int:
    """The block of this node: the one it has already, else `preferred` where that is free, else the lowest free one.

    A block is free when nobody claims it or the claimant's storage is gone, and no link of it is left. Claims last
    until the host reboots. Blocks; raises Unavailable when all are taken, NetworkError when claims cannot be kept.
    """
    claim = _Claim(node_id, str(storage_root.resolve()))
    directory = host_directory / "blocks"
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o755)
        with _locked(directory / "lock"):
            block = _choose(claim, {number: _read(directory / str(number)) for number in range(BLOCKS)}, preferred)
            _write(directory / str(block), claim)
    except OSError as error:
        raise NetworkError(f"no block of slots can be claimed in {directory}: {error}") from error
    return block


def is_claimed(node_id: str, block: int, *, host_directory: Path = HOST_DIRECTORY) -> bool:
    """Whether the block is still this node's. When the node's storage was taken away under a manager that runs, another
    one may have it by now. A claim that was lost is nobody else's."""
    claim = _read(host_directory / "blocks" / str(block))
    return claim is None or claim.node_id == node_id


def _choose(claim: _Claim, claims: dict[int, _Claim | None], preferred: int | None) -> int:
    own = [number for number, other in claims.items() if other and other.node_id == claim.node_id]
    if own:
        return own[0]
    names = links.names()
    for number in _order(preferred):
        has_links = any(name.startswith(f"rds{number}-") for name in names)
        if _is_free(claims[number], has_links, is_preferred=number == preferred):
            return number
    raise Unavailable(f"all {BLOCKS} blocks of VM slots on this host are taken")


def _is_free(other: _Claim | None, has_links: bool, *, is_preferred: bool) -> bool:
    if other is None:
        # Links without a claim belong to the node that remembers the block: it was the claims that were lost.
        return is_preferred or not has_links
    return not has_links and not other.holds()


def _order(preferred: int | None) -> Iterable[int]:
    return range(BLOCKS) if preferred is None else (preferred, *range(BLOCKS))


def _read(path: Path) -> _Claim | None:
    """None where there is no claim, or one that was torn by a crash."""
    try:
        return _Claim(**json.loads(path.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _write(path: Path, claim: _Claim) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(asdict(claim)))
    fresh.replace(path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
        yield
