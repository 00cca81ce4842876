"""What a policy means: pure functions from EgressPolicy to what is opened, to DNS verdicts and to nftables text.

One table per manager holds rules that never change while it runs; all that differs between VMs is elements of the
table's sets, keyed by the link. So a change of one VM is a handful of elements in one transaction, its cost does not
grow with the number of VMs, and a link that has no elements reaches nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Address, IPv4Network, collapse_addresses
from typing import NamedTuple

from rundatsheesh.manager.model import GATEWAY, GUEST_NETWORK, SLOTS_PER_BLOCK, EgressPolicy, Slot
from rundatsheesh.manager.net.ruleset import TABLE

EVERYWHERE = IPv4Network("0.0.0.0/0")

# Ranges that are never the public internet. Documentation and benchmark ranges (192.0.2.0/24, 198.18.0.0/15...) are
# not among them: nothing is reached there that a private network would have to fear for.
SPECIAL_RANGES = tuple(
    collapse_addresses(
        IPv4Network(text)
        for text in (
            "0.0.0.0/8",
            "10.0.0.0/8",
            "100.64.0.0/10",
            "127.0.0.0/8",
            "169.254.0.0/16",
            "172.16.0.0/12",
            "192.0.0.0/24",
            "192.168.0.0/16",
            "224.0.0.0/4",
            "240.0.0.0/4",
        )
    )
)

# Where clouds hand out credentials and user data. Closed even to a policy that names them.
METADATA_ADDRESSES = tuple(
    IPv4Address(text)
    for text in (
        "169.254.169.254",  # AWS, Azure, Google, OpenStack, DigitalOcean, Hetzner, Oracle
        "169.254.169.253",  # AWS resolver
        "169.254.170.2",  # AWS container credentials
        "169.254.170.23",  # AWS pod identity
        "169.254.42.42",  # Scaleway
        "169.254.0.23",  # Tencent
        "100.100.100.200",  # Alibaba
        "100.96.0.96",  # Volcengine
        "168.63.129.16",  # Azure platform
        "192.0.0.192",  # Oracle classic
    )
)

LEASES_PER_VM = 1024  # addresses that the names of one VM may hold open at once
FLOWS_PER_VM = 2048  # new connections over this are refused: conntrack's table is shared by the whole host
DNS_RATE = 100  # packets to the resolver per second and VM; the resolver's process is shared by all VMs
DNS_BURST = 200

Labels = tuple[bytes, ...]  # of a domain name: lower case, without the root


class Element(NamedTuple):
    """One element of one set: what `link` may be or reach."""

    set: str
    link: str
    network: IPv4Network

    def __str__(self) -> str:
        network = self.network
        return f'"{self.link}" . {network.network_address if network.prefixlen == 32 else network}'


class TimedElement(NamedTuple):
    element: Element
    seconds: int  # until the kernel removes it


@dataclass(frozen=True, slots=True)
class Opening:
    """The addresses that a policy opens by itself; what its domains resolve to comes on top."""

    narrow: frozenset[IPv4Network] = frozenset()  # lie inside special ranges: opened as written, the host's included
    wide: frozenset[IPv4Network] = frozenset()  # opened except for special ranges and the host's own addresses
    exact: frozenset[IPv4Network] = frozenset()  # /32 of `wide`, which open that address on the host too

    @classmethod
    def of(cls, policy: EgressPolicy) -> Opening:
        if not policy.outbound:
            return cls()
        narrow = [network for network in policy.allow_ips if is_special(network)]
        wide = [network for network in policy.allow_ips if not is_special(network)]
        return cls(
            narrow=frozenset(collapse_addresses(narrow)),
            wide=frozenset(collapse_addresses(wide)),
            exact=frozenset(network for network in wide if network.prefixlen == 32),
        )

    @property
    def is_public_internet(self) -> bool:
        return EVERYWHERE in self.wide


class DnsVerdict(Enum):
    """What the resolver does with a question."""

    REFUSE = "refuse"  # answered on the host, forwarded nowhere
    FORWARD = "forward"
    FORWARD_AND_OPEN = "forward and open"  # the addresses of the answer are opened before it is handed out


def is_special(network: IPv4Network) -> bool:
    return any(network.subnet_of(special) for special in SPECIAL_RANGES)


def may_open(address: IPv4Address) -> bool:
    """Whether a name may open this address. Those of the host itself are refused where its packets arrive."""
    return address not in METADATA_ADDRESSES and not is_special(IPv4Network(address))


def judge_name(policy: EgressPolicy, name: Labels) -> DnsVerdict:
    if not policy.outbound:
        return DnsVerdict.REFUSE
    if Opening.of(policy).is_public_internet:
        return DnsVerdict.FORWARD
    if any(domain_matches(domain, name) for domain in policy.allow_domains):
        return DnsVerdict.FORWARD_AND_OPEN
    return DnsVerdict.REFUSE


def domain_matches(domain: str, name: Labels) -> bool:
    """Compared label by label, because a label may contain a dot: `x\\.example.com` is no subdomain of example.com."""
    labels = tuple(domain.encode().split(b"."))
    if labels[0] != b"*":
        return name == labels
    parent = labels[1:]
    return len(name) > len(parent) and name[-len(parent) :] == parent


def elements_of(slot: Slot, policy: EgressPolicy) -> frozenset[Element]:
    """All that the table says about one VM."""
    opening = Opening.of(policy)
    return frozenset(
        [
            Element("guests", slot.link, IPv4Network(slot.guest_ip)),
            *(Element("narrow", slot.link, network) for network in opening.narrow),
            *(Element("wide", slot.link, network) for network in opening.wide),
            *(Element("exact", slot.link, network) for network in opening.exact),
        ]
    )


def add_text(table: str, elements: Iterable[Element]) -> str:
    return _element_lines("add", table, ((element, str(element)) for element in elements))


def add_timed_text(table: str, elements: Iterable[TimedElement]) -> str:
    return _element_lines("add", table, ((e.element, f"{e.element} timeout {e.seconds}s") for e in elements))


def delete_text(table: str, elements: Iterable[Element]) -> str:
    return _element_lines("delete", table, ((element, str(element)) for element in elements))


def forget_text(table: str, elements: Iterable[Element]) -> str:
    """Deletes elements that may have expired: nftables refuses to delete what is not there."""
    elements = tuple(elements)
    return add_text(table, elements) + delete_text(table, elements)


def forget_counters_text(table: str, link: str) -> str:
    lines = [f'{verb} element {table} {name} {{ "{link}" }}\n' for name in METERS for verb in ("add", "delete")]
    return "".join(lines)


def _element_lines(verb: str, table: str, elements: Iterable[tuple[Element, str]]) -> str:
    by_set: dict[str, list[str]] = {}
    for element, text in elements:
        by_set.setdefault(element.set, []).append(text)
    return "".join(
        f"{verb} element {table} {name} {{ {', '.join(sorted(by_set[name]))} }}\n" for name in sorted(by_set)
    )


_LEASES = SLOTS_PER_BLOCK * LEASES_PER_VM
ADDRESS_SETS: Mapping[str, str] = {
    "guests": "",  # the address that each link must use as its source
    "narrow": "flags interval;",
    "wide": "flags interval;",
    "exact": "",
    "resolved": f"flags timeout; size {_LEASES};",  # what names resolve to, while the answer lives
    "opened": f"flags timeout; size {_LEASES};",  # once resolved: a connection may outlive the answer that began it
}
REFUSALS = "refusals"
METERS = (REFUSALS, "dns_rate", "flows")  # per link, filled by the rules themselves


def table_of(block: int) -> str:
    return f"inet rundatsheesh_{block}"


def remove_table_text(block: int) -> str:
    """Removes the table whether it exists or not."""
    return f"add table {table_of(block)}\ndelete table {table_of(block)}\n"


def table_text(block: int, resolver_port: int) -> str:
    """The table of one manager with no VM in it.

    Every packet of a guest is judged, not only the first of a connection, so that a narrowed policy holds at once.
    Refusals answer: a TCP reset or an ICMP error reaches the guest immediately. UDP is refused as by a closed port,
    because gVisor's network stack tells its programs of no other ICMP error.
    """
    addresses = GUEST_NETWORK.network_address + block * SLOTS_PER_BLOCK
    sets = "".join(
        f"  set {name} {{ type ifname . ipv4_addr; {flags} }}\n" for name, flags in ADDRESS_SETS.items()
    ) + "".join(f"  set {name} {{ type ifname; size {SLOTS_PER_BLOCK}; flags dynamic; }}\n" for name in METERS)
    return TABLE.substitute(
        table=table_of(block),
        sets=sets,
        metadata=_join(METADATA_ADDRESSES),
        special=_join(SPECIAL_RANGES),
        links=f'"rds{block}-*"',
        gateway=GATEWAY,
        resolver_port=resolver_port,
        addresses=f"{addresses}/{32 - (SLOTS_PER_BLOCK - 1).bit_length()}",
        dns_rate=DNS_RATE,
        dns_burst=DNS_BURST,
        flows_per_vm=FLOWS_PER_VM,
    )


def _join(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))
