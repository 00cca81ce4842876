"""What an nftables table holds for each VM, as read from the kernel and kept in step with every change."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from rundatsheesh.manager.net.policy import ADDRESS_SETS, Element, TimedElement

TIMED_SETS = ("resolved", "opened")


@dataclass(frozen=True, slots=True)
class Lease:
    """An address that a name opened. Both ends are monotonic seconds."""

    resolved: float  # until then new connections may be made
    opened: float  # until then a connection that was made may go on


@dataclass(slots=True)
class VmRules:
    """All elements of one link."""

    static: frozenset[Element] = frozenset()
    leases: dict[IPv4Address, Lease] = field(default_factory=dict)

    def drop_expired(self, now: float) -> None:
        self.leases = {address: lease for address, lease in self.leases.items() if lease.opened > now}


def lease_elements(link: str, addresses: Iterable[IPv4Address]) -> Iterator[Element]:
    for address in addresses:
        for name in TIMED_SETS:
            yield Element(name, link, IPv4Network(address))


def timed_elements(link: str, leases: dict[IPv4Address, Lease], now: float) -> Iterator[TimedElement]:
    """The leases as elements that expire when they do; what has less than a second left is left out."""
    for address, lease in leases.items():
        network = IPv4Network(address)
        for name, end in (("resolved", lease.resolved), ("opened", lease.opened)):
            if end - now >= 1:
                yield TimedElement(Element(name, link, network), round(end - now))


def read_listing(listing: bytes, now: float) -> dict[str, VmRules]:
    """Parse `nft --json list table`. Links that hold no element are absent."""
    vms: dict[str, VmRules] = {}
    for name in ADDRESS_SETS:
        for key, seconds in _concatenations(_elements(listing, name)):
            link, network = key[0], _network(key[1])
            vm = vms.setdefault(link, VmRules())
            if name in TIMED_SETS:
                _extend(vm.leases, network.network_address, name, now + seconds)
            else:
                vm.static |= {Element(name, link, network)}
    return vms


def _elements(listing: bytes, name: str) -> Iterator[Any]:
    for entry in json.loads(listing)["nftables"]:
        if entry.get("set", {}).get("name") == name:
            yield from entry["set"].get("elem", [])


def _concatenations(elements: Iterable[Any]) -> Iterator[tuple[list[Any], float]]:
    """Pairs of a concatenated key and the seconds that it has left."""
    for element in elements:
        if "elem" in element:
            yield element["elem"]["val"]["concat"], float(element["elem"].get("expires", 0))
        else:
            yield element["concat"], 0.0


def _network(value: Any) -> IPv4Network:
    if isinstance(value, dict):
        return IPv4Network((value["prefix"]["addr"], value["prefix"]["len"]))
    return IPv4Network(value)


def _extend(leases: dict[IPv4Address, Lease], address: IPv4Address, name: str, end: float) -> None:
    known = leases.get(address, Lease(0.0, 0.0))
    leases[address] = Lease(end, known.opened) if name == "resolved" else Lease(known.resolved, end)
