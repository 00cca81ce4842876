"""The manager's nftables table: one transaction per change, and what is in force is known at all times."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from ipaddress import IPv4Address

from rundatsheesh.manager.errors import NetworkError
from rundatsheesh.manager.host.process import ProcessError, run
from rundatsheesh.manager.model import EgressPolicy, Slot
from rundatsheesh.manager.net import policy as rules
from rundatsheesh.manager.net.mirror import Lease, VmRules, lease_elements, read_listing, timed_elements
from rundatsheesh.manager.net.policy import Element

TIMEOUT = 20.0  # seconds; a transaction takes 5 ms, one that deletes 20
LIST_LIMIT = 64 << 20  # bytes; the fullest table (700 VMs of 64 entries) lists as about 10 MB

LEASE_GRACE = 5  # seconds that an address stays open longer than asked: rounding, and the answer's way to the guest
OPENED_SECONDS = 24 * 3600  # how long a connection may outlive the answer that allowed it


class Firewall:
    """One table. A change is all in force when its call returns, and not at all when the call raises NetworkError.

    The table is mirrored here, so that a change need not list it first. Where the mirror may be wrong (somebody else
    changed the table, a transaction was cancelled) it is read again.
    """

    def __init__(self, block: int) -> None:
        self._block = block
        self._table = rules.table_of(block)
        self._lock = asyncio.Lock()
        self._vms: dict[str, VmRules] = {}  # by link
        self._exists = False
        self._sure = False  # whether the mirror is right, as far as our own hand goes
        self._resolver_port = 0

    async def open(self, resolver_port: int) -> None:
        """Put this version's table in force, with every VM that an earlier manager left in it. No packet sees a gap."""
        async with self._lock:
            self._resolver_port = resolver_port
            await self._read()
            await self._apply(self._whole_table())

    async def close(self) -> None:
        """Remove the table when no VM is in it."""
        async with self._lock:
            await self._read()
            if self._exists and not self._vms:
                await self._apply(rules.remove_table_text(self._block))
                self._exists = False

    async def put(self, slot: Slot, policy: EgressPolicy) -> None:
        """Make `policy` the VM's whole policy. What its names had opened is closed."""
        wanted = rules.elements_of(slot, policy)
        async with self._lock:
            await self._change(lambda: self._replacement(slot, wanted))
            self._vms[slot.link] = VmRules(wanted)

    async def ensure(self, slot: Slot, policy: EgressPolicy, *, look: bool = True) -> None:
        """Repair: afterwards the table exists and holds `policy` for this VM. What its names opened stays open.
        `look` is whether somebody else may have changed the table since it was read."""
        wanted = rules.elements_of(slot, policy)
        async with self._lock:
            await (self._read() if look else self._read_if_unsure())
            if not self._exists:
                await self._apply(self._whole_table())
            if self._of(slot).static != wanted:
                await self._change(lambda: self._replacement(slot, wanted))
                self._vms[slot.link] = VmRules(wanted)

    async def remove(self, slot: Slot) -> None:
        """Forget the VM. Idempotent."""
        async with self._lock:
            await self._read_if_unsure()
            if self._exists:
                forget = rules.forget_counters_text(self._table, slot.link)
                await self._change(lambda: self._replacement(slot, frozenset()) + forget)
            self._vms.pop(slot.link, None)

    async def open_addresses(
        self, slot: Slot, addresses: Collection[IPv4Address], seconds: int, still_wanted: Callable[[], bool]
    ) -> bool:
        """Open what a name resolved to for at least `seconds`; never shortens what is open already.

        `still_wanted` is asked when no other change can come between. Returns False, with nothing opened, when it says
        so, when the VM is gone, or when its names hold too many addresses open.
        """
        async with self._lock:
            await self._read_if_unsure()
            if slot.link not in self._vms or not still_wanted():
                return False
            now = time.monotonic()
            known = self._of(slot)
            known.drop_expired(now)
            lease = Lease(now + seconds + LEASE_GRACE, now + OPENED_SECONDS)
            short = {
                address: lease
                for address in addresses
                if address not in known.leases or known.leases[address].resolved < now + seconds
            }
            over = len(known.leases.keys() | short.keys()) > rules.LEASES_PER_VM
            evicted = {a for a, old in known.leases.items() if over and old.resolved <= now and a not in short}
            if len(known.leases.keys() | short.keys()) - len(evicted) > rules.LEASES_PER_VM:
                return False
            await self._change(lambda: self._renewal(slot, short, evicted, now))
            leases = self._of(slot).leases
            leases.update(short)
            for address in evicted:
                leases.pop(address, None)
            return True

    async def links(self) -> set[str]:
        """Every link that the table holds rules for."""
        async with self._lock:
            await self._read()
            return set(self._vms)

    def _of(self, slot: Slot) -> VmRules:
        return self._vms.get(slot.link, VmRules())

    def _replacement(self, slot: Slot, wanted: frozenset[Element]) -> str:
        known = self._of(slot)
        return (
            rules.delete_text(self._table, known.static - wanted)
            + rules.forget_text(self._table, lease_elements(slot.link, known.leases))
            + rules.add_text(self._table, wanted - known.static)
        )

    def _renewal(self, slot: Slot, leases: dict[IPv4Address, Lease], evicted: set[IPv4Address], now: float) -> str:
        # Adding an element that exists leaves its timeout as it is, so it is deleted first.
        known = evicted | (leases.keys() & self._of(slot).leases.keys())
        return rules.forget_text(self._table, lease_elements(slot.link, known)) + rules.add_timed_text(
            self._table, timed_elements(slot.link, leases, now)
        )

    def _whole_table(self) -> str:
        now = time.monotonic()
        return (
            rules.remove_table_text(self._block)
            + rules.table_text(self._block, self._resolver_port)
            + rules.add_text(self._table, (element for vm in self._vms.values() for element in vm.static))
            + rules.add_timed_text(
                self._table, (e for link, vm in self._vms.items() for e in timed_elements(link, vm.leases, now))
            )
        )

    async def _change(self, make: Callable[[], str]) -> None:
        """Apply what `make` derives from the mirror; where that fails, once more from what is really there."""
        await self._read_if_unsure()
        try:
            await self._apply(make())
        except NetworkError:
            await self._read()
            await self._apply(("" if self._exists else self._whole_table()) + make())

    async def _apply(self, text: str) -> None:
        if not text:
            return
        sure, self._sure = self._sure, False  # until it is known whether the kernel has taken it
        try:
            await run(["nft", "-f", "-"], input=text.encode(), timeout=TIMEOUT)
        except ProcessError as error:
            raise NetworkError(f"nftables refused a transaction: {error.message}") from error
        self._sure, self._exists = sure, True

    async def _read_if_unsure(self) -> None:
        if not self._sure:
            await self._read()

    async def _read(self) -> None:
        listing = await self._list(f"table {self._table}")
        self._exists = listing is not None
        self._vms = {} if listing is None else read_listing(listing, time.monotonic())
        self._sure = True

    async def _list(self, what: str) -> bytes | None:
        """JSON; None when there is no such thing."""
        try:
            done = await run(["nft", "--json", "list", *what.split()], timeout=TIMEOUT, limit=LIST_LIMIT)
        except ProcessError as error:
            if "No such file or directory" in error.output:
                return None
            raise NetworkError(f"the nftables rules cannot be read: {error.message}") from error
        return done.stdout
