"""Requests about interfaces, addresses, routes and neighbours, in the namespace of the given socket. All raise OSError;
`replace_*` may be repeated."""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from dataclasses import dataclass
from ipaddress import IPv4Address

from rundatsheesh.manager.net.netlink import CREATE, EXCLUSIVE, REPLACE, ROUTE, Netlink, attribute, nested, number

NEW_LINK, DELETE_LINK, GET_LINK, NEW_ADDRESS, NEW_ROUTE, NEW_NEIGHBOUR = 16, 17, 18, 20, 24, 28
LINK_EVENTS = 1  # multicast group
LINK_HEADER = struct.Struct("=BxHiII")  # ifinfomsg
IFF_UP, IFF_RUNNING = 0x1, 0x40
RUNNING_SECONDS = 30.0
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_LINKINFO, IFLA_NET_NS_FD = 1, 3, 4, 18, 28
IFLA_INFO_KIND, IFLA_INFO_DATA, VETH_INFO_PEER = 1, 2, 1
IFA_ADDRESS, IFA_LOCAL = 1, 2
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PREFSRC = 1, 4, 5, 7
TABLE_MAIN, PROTOCOL_STATIC, TYPE_UNICAST, SCOPE_UNIVERSE, SCOPE_LINK = 254, 4, 1, 0, 253
NDA_DST, NDA_LLADDR, NUD_PERMANENT = 1, 2, 0x80


@dataclass(frozen=True, slots=True)
class Interface:
    """What an interface is created with. `mac` is colon-separated hexadecimal."""

    name: str
    mac: str
    mtu: int


def create_veth(netlink: Netlink, host: Interface, guest: Interface, guest_namespace: int) -> None:
    """A pair, both ends down; the guest's end is made in the namespace that the descriptor names."""
    peer = _link_header() + _described(guest) + attribute(IFLA_NET_NS_FD, number(guest_namespace))
    data = nested(IFLA_INFO_DATA, [nested(VETH_INFO_PEER, [peer])])
    info = nested(IFLA_LINKINFO, [attribute(IFLA_INFO_KIND, b"veth"), data])
    netlink.request(NEW_LINK, _link_header() + _described(host) + info, CREATE | EXCLUSIVE)


def describe_link(netlink: Netlink, index: int, mac: str, mtu: int) -> None:
    """Set hardware address and MTU of an interface that is down."""
    body = _link_header(index) + attribute(IFLA_ADDRESS, _octets(mac)) + attribute(IFLA_MTU, number(mtu))
    netlink.request(NEW_LINK, body)


def bring_up(netlink: Netlink, index: int) -> None:
    netlink.request(NEW_LINK, _link_header(index, IFF_UP, IFF_UP))


def link_events() -> Netlink:
    """For `wait_until_running`; to be opened before what it waits for."""
    return Netlink(ROUTE, LINK_EVENTS)


def wait_until_running(events: Netlink, index: int) -> None:
    """Until the kernel has noticed that the other end is up, which it does in the background: before, the interface
    drops what is sent, and the first connection of a guest would wait a second for its retransmission."""
    deadline = time.monotonic() + RUNNING_SECONDS
    events.send(GET_LINK, _link_header(index))
    while time.monotonic() < deadline:
        try:
            for kind, payload in events.messages():
                if kind == NEW_LINK and _is_running(payload, index):
                    return
        except OSError as error:
            if error.errno != errno.ENOBUFS:  # events were lost; the state is asked for again
                raise
            events.send(GET_LINK, _link_header(index))
    raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))


def delete_link(netlink: Netlink, name: str) -> None:
    netlink.request(DELETE_LINK, _link_header() + attribute(IFLA_IFNAME, name.encode() + b"\0"))


def replace_address(netlink: Netlink, index: int, address: IPv4Address) -> None:
    """The address with a prefix of 32 bits."""
    header = struct.pack("=BBBBI", socket.AF_INET, 32, 0, SCOPE_UNIVERSE, index)
    body = attribute(IFA_LOCAL, address.packed) + attribute(IFA_ADDRESS, address.packed)
    netlink.request(NEW_ADDRESS, header + body, CREATE | REPLACE)


def replace_link_route(netlink: Netlink, index: int, to: IPv4Address, source: IPv4Address | None = None) -> None:
    """`to` is on the wire; `source` is the address that we call it from."""
    body = attribute(RTA_DST, to.packed) + (attribute(RTA_PREFSRC, source.packed) if source else b"")
    _replace_route(netlink, index, 32, SCOPE_LINK, body)


def replace_default_route(netlink: Netlink, index: int, gateway: IPv4Address) -> None:
    _replace_route(netlink, index, 0, SCOPE_UNIVERSE, attribute(RTA_GATEWAY, gateway.packed))


def replace_neighbour(netlink: Netlink, index: int, address: IPv4Address, mac: str) -> None:
    """The hardware address of a neighbour, for good."""
    header = struct.pack("=BxHiHBB", socket.AF_INET, 0, index, NUD_PERMANENT, 0, 0)
    body = attribute(NDA_DST, address.packed) + attribute(NDA_LLADDR, _octets(mac))
    netlink.request(NEW_NEIGHBOUR, header + body, CREATE | REPLACE)


def _replace_route(netlink: Netlink, index: int, prefix: int, scope: int, body: bytes) -> None:
    header = struct.pack(
        "=BBBBBBBBI", socket.AF_INET, prefix, 0, 0, TABLE_MAIN, PROTOCOL_STATIC, scope, TYPE_UNICAST, 0
    )
    netlink.request(NEW_ROUTE, header + body + attribute(RTA_OIF, number(index)), CREATE | REPLACE)


def _link_header(index: int = 0, flags: int = 0, change: int = 0) -> bytes:
    return LINK_HEADER.pack(socket.AF_UNSPEC, 0, index, flags, change)


def _is_running(payload: bytes, index: int) -> bool:
    _, _, found, flags, _ = LINK_HEADER.unpack_from(payload)
    return found == index and bool(flags & IFF_RUNNING)


def _described(interface: Interface) -> bytes:
    return (
        attribute(IFLA_IFNAME, interface.name.encode() + b"\0")
        + attribute(IFLA_ADDRESS, _octets(interface.mac))
        + attribute(IFLA_MTU, number(interface.mtu))
    )


def _octets(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))
