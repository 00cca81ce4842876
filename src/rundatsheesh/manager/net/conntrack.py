"""Forget the connections of one guest, so that the next guest with its address inherits none.

ctnetlink spoken directly: the kernel lists only what has the address as its original source (Linux 5.8; an older one
lists everything, so the address is compared here too), and each entry is deleted by its own tuple and id.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address

from rundatsheesh.manager.errors import NetworkError

CT_GET, CT_DELETE = 0x101, 0x102  # IPCTNL_MSG_CT_* of NFNL_SUBSYS_CTNETLINK
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 1, 4, 0x300
NLMSG_ERROR, NLMSG_DONE = 2, 3
CTA_TUPLE_ORIG, CTA_ID, CTA_ZONE, CTA_FILTER = 1, 12, 18, 25
CTA_TUPLE_IP, CTA_IP_V4_SRC, CTA_FILTER_ORIG_FLAGS, FILTER_BY_SOURCE = 1, 1, 1, 1
NESTED = 0x8000
NETLINK_NETFILTER = 12
NETLINK_HEADER = struct.Struct("=IHHII")
NFGEN_HEADER = struct.pack("=BBH", socket.AF_INET, 0, 0)
ATTRIBUTE = struct.Struct("=HH")
RECEIVE_BYTES = 1 << 16
TIMEOUT = 5.0  # seconds without a reply


def forget_connections(source: IPv4Address) -> int:
    """Delete every tracked connection that began at `source`; returns how many. Blocks; raises NetworkError."""
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as netlink:
            netlink.settimeout(TIMEOUT)
            netlink.bind((0, 0))
            found = [attributes for attributes in _dump(netlink, source) if _source(attributes) == source]
            return sum(_delete(netlink, attributes) for attributes in found)
    except OSError as error:
        raise NetworkError(f"connections of {source} cannot be forgotten: {error}") from error


def _dump(netlink: socket.socket, source: IPv4Address) -> Iterator[dict[int, bytes]]:
    wanted = _attribute(
        CTA_TUPLE_ORIG | NESTED, _attribute(CTA_TUPLE_IP | NESTED, _attribute(CTA_IP_V4_SRC, source.packed))
    )
    by_source = _attribute(CTA_FILTER | NESTED, _attribute(CTA_FILTER_ORIG_FLAGS, struct.pack("=I", FILTER_BY_SOURCE)))
    _send(netlink, CT_GET, NLM_F_REQUEST | NLM_F_DUMP, wanted + by_source)
    while True:
        for kind, payload in _messages(netlink.recv(RECEIVE_BYTES)):
            if kind == NLMSG_DONE:
                return
            if kind == NLMSG_ERROR:
                _raise(payload)
            yield dict(_attributes(payload[len(NFGEN_HEADER) :]))


def _delete(netlink: socket.socket, attributes: dict[int, bytes]) -> bool:
    """False when the entry ended by itself meanwhile."""
    body = _attribute(CTA_TUPLE_ORIG | NESTED, attributes[CTA_TUPLE_ORIG])
    body += b"".join(_attribute(kind, attributes[kind]) for kind in (CTA_ID, CTA_ZONE) if kind in attributes)
    _send(netlink, CT_DELETE, NLM_F_REQUEST | NLM_F_ACK, body)
    ((_, payload),) = _messages(netlink.recv(RECEIVE_BYTES))
    try:
        _raise(payload)
    except FileNotFoundError:
        return False
    return True


def _source(attributes: dict[int, bytes]) -> IPv4Address | None:
    addresses = dict(_attributes(dict(_attributes(attributes[CTA_TUPLE_ORIG]))[CTA_TUPLE_IP]))
    return IPv4Address(addresses[CTA_IP_V4_SRC]) if CTA_IP_V4_SRC in addresses else None


def _send(netlink: socket.socket, kind: int, flags: int, body: bytes) -> None:
    length = NETLINK_HEADER.size + len(NFGEN_HEADER) + len(body)
    netlink.send(NETLINK_HEADER.pack(length, kind, flags, 1, 0) + NFGEN_HEADER + body)


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    while data:
        length, kind, _, _, _ = NETLINK_HEADER.unpack_from(data)
        yield kind, data[NETLINK_HEADER.size : length]
        data = data[_aligned(length) :]


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while data:
        length, kind = ATTRIBUTE.unpack_from(data)
        yield kind & ~NESTED, data[ATTRIBUTE.size : length]
        data = data[_aligned(length) :]


def _attribute(kind: int, value: bytes) -> bytes:
    length = ATTRIBUTE.size + len(value)
    return ATTRIBUTE.pack(length, kind) + value + b"\0" * (_aligned(length) - length)


def _aligned(length: int) -> int:
    return (length + 3) & ~3


def _raise(payload: bytes) -> None:
    """Raise what an NLMSG_ERROR says; an acknowledgement says nothing."""
    number = -struct.unpack_from("=i", payload)[0]
    if number:
        raise OSError(number, os.strerror(number))
