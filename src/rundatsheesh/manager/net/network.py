"""The networks of one manager's VMs: links, policy and names, attached and detached as one."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Literal

from rundatsheesh.manager.errors import NetworkError
from rundatsheesh.manager.host.threads import in_thread
from rundatsheesh.manager.model import EgressPolicy, Slot
from rundatsheesh.manager.net import kernel, links
from rundatsheesh.manager.net.conntrack import forget_connections
from rundatsheesh.manager.net.firewall import Firewall
from rundatsheesh.manager.net.resolver import Resolver
from rundatsheesh.manager.net.upstream import Upstream

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Traces:
    """Slots of which the host has a link, a namespace, rules."""

    links: frozenset[Slot]
    namespaces: frozenset[Slot]
    rules: frozenset[Slot]


class Network:
    """One per manager. Calls for different slots run side by side, calls for the same slot one after the other.

    Everything that goes wrong on the host is a NetworkError.
    """

    def __init__(self, block: int, *, dns_server: str = "") -> None:
        """`block` is this manager's own, see blocks.py. `dns_server` is "IP" or "IP:port"; empty for the host's own."""
        self._block = block
        self._firewall = Firewall(block)
        try:
            upstream = Upstream(dns_server)
        except ValueError as error:
            raise NetworkError(f"DNS_SERVER_IP: {error}") from error
        self._resolver = Resolver(upstream, self._open_addresses)
        self._locks: defaultdict[Slot, asyncio.Lock] = defaultdict(asyncio.Lock)  # at most one per slot of the block

    async def open(self) -> None:
        """The table in force, the resolver listening. Idempotent. VMs of an earlier manager keep their network; their
        names resolve again once they are adopted."""
        await self._resolver.open()
        try:
            await self._firewall.open(self._resolver.port)
            await in_thread(_enable_forwarding)
        except BaseException:
            await self._resolver.close()
            raise

    async def close(self) -> None:
        """Stop the resolver. Links and rules of running VMs stay in force; without any VM the table is removed."""
        await self._resolver.close()
        if not any(await in_thread(links.traces, self._block)):
            await self._firewall.close()

    async def attach(self, slot: Slot, policy: EgressPolicy, *, kind: Literal["veth", "tap"] = "veth") -> None:
        """Give the VM its link, with the policy in force before the link is up. On failure nothing is left.

        "veth" makes the namespace `slot.netns` with eth0 in it; "tap" makes a tap named `slot.link` in the root
        namespace that root may open. A leftover of the same slot is replaced.
        """
        async with self._locks[slot]:
            try:
                await self._firewall.put(slot, policy)
                await in_thread(links.create_veth if kind == "veth" else links.create_tap, slot)
            except BaseException:
                await self._undo(slot)
                raise
            self._resolver.put(slot, policy)

    async def set_policy(self, slot: Slot, policy: EgressPolicy) -> None:
        """Replace the policy of an attached VM in one transaction. Connections that it forbids are cut, and what the
        VM's names had opened is closed until they are resolved again."""
        async with self._locks[slot]:
            self._resolver.remove(slot)  # an answer under the old policy must not be given out under the new one
            await self._firewall.put(slot, policy)
            self._resolver.put(slot, policy)

    async def detach(self, slot: Slot, *, unless: Callable[[], Awaitable[bool]] | None = None) -> None:
        """Undo `attach`, from any state, as often as wanted. Returns when link, namespace, connections and rules are
        gone. `unless` is asked when nobody attaches the slot: whether it has an owner by now, and stays as it is."""
        async with self._locks[slot]:
            if unless is None or not await unless():
                await self._detach(slot)

    async def adopt(self, slot: Slot, policy: EgressPolicy, *, look: bool = True) -> None:
        """Take over a VM that an earlier manager attached, or repair one of ours: rules, addresses, names. Raises
        NetworkError when its link is gone. Without `look` the rules are believed to be as they were last seen, which
        saves listing all of them for each of many VMs."""
        async with self._locks[slot]:
            await self._firewall.ensure(slot, policy, look=look)
            await in_thread(links.configure_host_end, slot)
            self._resolver.put(slot, policy)

    async def list_traces(self) -> Traces:
        """Slots of this block of which anything exists on the host."""
        own_links, own_namespaces = await in_thread(links.traces, self._block)
        rules = await self._firewall.links()
        return Traces(*(frozenset(_slots_of(names)) for names in (own_links, own_namespaces, rules)))

    async def _detach(self, slot: Slot) -> None:
        self._resolver.remove(slot)
        await in_thread(links.remove, slot)  # first, so that nothing passes while the rest goes
        await in_thread(forget_connections, slot.guest_ip)
        await self._firewall.remove(slot)

    async def _undo(self, slot: Slot) -> None:
        try:
            await self._detach(slot)
        except NetworkError:
            log.exception("%s could not be undone; the next attempt or the audit will find it", slot.link)

    async def _open_addresses(
        self, slot: Slot, policy: EgressPolicy, addresses: list[IPv4Address], seconds: int
    ) -> bool:
        return await self._firewall.open_addresses(
            slot, addresses, seconds, lambda: self._resolver.policy_of(slot) is policy
        )


def _slots_of(names: Iterable[str]) -> set[Slot]:
    """The slots that have these names; a name that no slot has is not ours."""
    return {slot for name in names if (slot := links.slot_of(name)) is not None}


def _enable_forwarding() -> None:
    try:
        kernel.write_sysctl("ipv4/ip_forward", "1")
    except OSError as error:
        raise NetworkError(f"IPv4 forwarding cannot be enabled: {error}") from error
