"""Forget the connections of one guest, so that the next guest with its address inherits none.

The kernel lists only what has the address as its original source (Linux 5.8; an older one lists everything, so the
address is compared here too), and each entry is deleted by its own tuple and id.
"""

from __future__ import annotations

import socket
import struct
from ipaddress import IPv4Address

from rundatsheesh.manager.errors import NetworkError
from rundatsheesh.manager.net.netlink import NETFILTER, Netlink, attribute, attributes, nested, number

CT_GET, CT_DELETE = 0x101, 0x102  # IPCTNL_MSG_CT_* of NFNL_SUBSYS_CTNETLINK
CTA_TUPLE_ORIG, CTA_ID, CTA_ZONE, CTA_FILTER = 1, 12, 18, 25
CTA_TUPLE_IP, CTA_IP_V4_SRC, CTA_FILTER_ORIG_FLAGS, FILTER_BY_SOURCE = 1, 1, 1, 1
HEADER = struct.pack("=BBH", socket.AF_INET, 0, 0)  # nfgenmsg


def forget_connections(source: IPv4Address) -> int:
    """Delete every tracked connection that began at `source`; returns how many. Blocks; raises NetworkError."""
    try:
        with Netlink(NETFILTER) as netlink:
            listed = [dict(attributes(payload[len(HEADER) :])) for payload in netlink.dump(CT_GET, _began_at(source))]
            return sum(_delete(netlink, entry) for entry in listed if _source(entry) == source)
    except OSError as error:
        raise NetworkError(f"connections of {source} cannot be forgotten: {error}") from error


def _began_at(source: IPv4Address) -> bytes:
    address = nested(CTA_TUPLE_IP, [attribute(CTA_IP_V4_SRC, source.packed)])
    filter_by = attribute(CTA_FILTER_ORIG_FLAGS, number(FILTER_BY_SOURCE))
    return HEADER + nested(CTA_TUPLE_ORIG, [address]) + nested(CTA_FILTER, [filter_by])


def _delete(netlink: Netlink, entry: dict[int, bytes]) -> bool:
    """False when the connection ended by itself meanwhile."""
    rest = [attribute(kind, entry[kind]) for kind in (CTA_ID, CTA_ZONE) if kind in entry]
    try:
        netlink.request(CT_DELETE, HEADER + nested(CTA_TUPLE_ORIG, [entry[CTA_TUPLE_ORIG]]) + b"".join(rest))
    except FileNotFoundError:
        return False
    return True


def _source(entry: dict[int, bytes]) -> IPv4Address | None:
    addresses = dict(attributes(dict(attributes(entry[CTA_TUPLE_ORIG]))[CTA_TUPLE_IP]))
    return IPv4Address(addresses[CTA_IP_V4_SRC]) if CTA_IP_V4_SRC in addresses else None
