"""eth0 of a virtual machine: one address, the gateway on the link, everything else through it.

By netlink. What a clone does for the first time costs it the translation of every instruction on the
way, so the way is kept short: taking the link down and up, and old ioctls that give an address a route to its whole
class first, took it four times as long. So the link is up before a template is taken, without an address.
"""

from __future__ import annotations

import os
import socket

_INTERFACE = "eth0"
_NEW_LINK, _NEW_ADDRESS, _NEW_ROUTE = 16, 20, 24
_REQUEST, _ACK, _CREATE, _REPLACE = 1, 4, 0x400, 0x100
_IFF_UP = 1
_IFLA_ADDRESS = 1
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTA_DST, _RTA_OIF, _RTA_GATEWAY = 1, 4, 5
_TABLE_MAIN, _STATIC, _UNICAST, _UNIVERSE, _LINK = 254, 4, 1, 0, 253
_RECEIVE = 1 << 14


def bring_up() -> None:
    """Raises OSError where there is no such interface."""
    _ask([(_NEW_LINK, _link_header(_IFF_UP))])


def configure(address: str, mac: str, gateway: str) -> None:
    """Once per boot and once per clone. Raises OSError."""
    own, through = socket.inet_aton(address), socket.inet_aton(gateway)
    index = _index()
    addresses = _attribute(_IFA_LOCAL, own) + _attribute(_IFA_ADDRESS, own)
    device = _attribute(_RTA_OIF, index)
    _ask(
        [
            (_NEW_LINK, _link_header(_IFF_UP) + _attribute(_IFLA_ADDRESS, bytes.fromhex(mac.replace(":", "")))),
            (_NEW_ADDRESS, bytes((socket.AF_INET, 32, 0, _UNIVERSE)) + index + addresses),
            (_NEW_ROUTE, _route_header(32, _LINK) + _attribute(_RTA_DST, through) + device),
            (_NEW_ROUTE, _route_header(0, _UNIVERSE) + _attribute(_RTA_GATEWAY, through) + device),
        ]
    )


def _ask(requests: list[tuple[int, bytes]]) -> None:
    """One after the other."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as netlink:
        netlink.bind((0, 0))
        for kind, body in requests:
            netlink.send(_message(kind, body))
            # The only answer to a request of this kind: its end, with 0 or a negative error number.
            code = int.from_bytes(netlink.recv(_RECEIVE)[16:20], "little", signed=True)
            if code:
                raise OSError(-code, os.strerror(-code))


def _message(kind: int, body: bytes) -> bytes:
    """struct nlmsghdr and what it is the header of, which is a multiple of four long. A link is changed, others come to
    be or take another's place."""
    flags = _REQUEST | _ACK | (0 if kind == _NEW_LINK else _CREATE | _REPLACE)
    head = (16 + len(body)).to_bytes(4, "little") + kind.to_bytes(2, "little") + flags.to_bytes(2, "little")
    return head + bytes(8) + body


def _attribute(kind: int, value: bytes) -> bytes:
    length = 4 + len(value)
    return length.to_bytes(2, "little") + kind.to_bytes(2, "little") + value + bytes(-length % 4)


def _link_header(flags: int) -> bytes:
    """struct ifinfomsg: these flags are set, no others are changed."""
    return bytes(4) + _index() + 2 * flags.to_bytes(4, "little")


def _route_header(prefix: int, scope: int) -> bytes:
    """struct rtmsg."""
    return bytes((socket.AF_INET, prefix, 0, 0, _TABLE_MAIN, _STATIC, scope, _UNICAST)) + bytes(4)


def _index() -> bytes:
    return socket.if_nametoindex(_INTERFACE).to_bytes(4, "little")
