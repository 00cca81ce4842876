"""The guest's wire: a veth pair into the VM's namespace, or a tap for an engine that opens one itself.

The host end lies in the root namespace, is named by the slot and has the gateway's address; a /32 route leads to the
guest. Everything here blocks, is idempotent, and raises NetworkError.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from pyroute2 import IPRoute  # type: ignore[import-untyped]
from pyroute2.netlink.exceptions import NetlinkError  # type: ignore[import-untyped]

from rundatsheesh.manager.errors import NetworkError
from rundatsheesh.manager.model import GATEWAY, SLOTS_PER_BLOCK, Slot
from rundatsheesh.manager.net import kernel

GUEST_LINK = "eth0"
GATEWAY_MAC = "02:fd:" + ":".join(f"{octet:02x}" for octet in GATEWAY.packed)  # the same for every guest, so that a
# guest that is restored elsewhere finds its neighbour where its ARP cache says
NUD_PERMANENT = 0x80
LINK_SCOPE = 253
MTU = 1500


def create_veth(slot: Slot) -> None:
    """Namespace, pair, addresses and routes; the host end is up last."""
    with _failures(f"create link {slot.link}"):
        remove(slot)
        kernel.create_namespace(slot.netns)
        with IPRoute() as netlink, open(kernel.NETNS_DIRECTORY / slot.netns, "rb") as namespace:
            peer = {"ifname": GUEST_LINK, "address": slot.guest_mac, "mtu": MTU, "net_ns_fd": namespace.fileno()}
            netlink.link("add", ifname=slot.link, kind="veth", address=GATEWAY_MAC, mtu=MTU, peer=peer)
            kernel.inside_namespace(slot.netns, lambda: _configure_guest_end(slot))
            _configure_host_end(netlink, slot)


def create_tap(slot: Slot, uid: int, gid: int) -> None:
    """A tap in the root namespace that `uid` may open: the guest's own interface is its other end."""
    with _failures(f"create tap {slot.link}"):
        remove(slot)
        kernel.create_tap(slot.link, uid, gid)
        with IPRoute() as netlink:
            netlink.link("set", index=_index(slot.link), address=GATEWAY_MAC, mtu=MTU)
            _configure_host_end(netlink, slot)


def configure_host_end(slot: Slot) -> None:
    """Address, route and state of the host end again."""
    with _failures(f"configure {slot.link}"), IPRoute() as netlink:
        _configure_host_end(netlink, slot)


def configure_guest_end(slot: Slot) -> None:
    """Give eth0 in the VM's namespace its addresses and routes again; nothing to do for a tap."""
    if slot.netns in kernel.namespace_names():
        with _failures(f"configure {GUEST_LINK} of {slot.netns}"):
            kernel.inside_namespace(slot.netns, lambda: _configure_guest_end(slot))


def remove(slot: Slot) -> None:
    """Remove the link and the namespace's name, whatever is there of them."""
    with _failures(f"remove link {slot.link}"):
        # First the link: a namespace frees its end late, and a process that still sits in it must be cut off now.
        if slot.link in names():
            with IPRoute() as netlink, _absent_is_fine():
                netlink.link("del", ifname=slot.link)
        kernel.remove_namespace(slot.netns)


def names() -> set[str]:
    """All interfaces of the calling thread's namespace."""
    return {name for _, name in socket.if_nameindex()}


def present(block: int) -> set[str]:
    """Names of the block for which a link or a namespace exists."""
    return {name for name in names() | kernel.namespace_names() if name.startswith(f"rds{block}-")}


def slot_of(link: str) -> Slot | None:
    """The slot that has this link name; None for a name that no slot has."""
    block, _, number = link.removeprefix("rds").partition("-")
    if not (link.startswith("rds") and block.isdecimal() and number.isdecimal()):
        return None
    slot = Slot(int(block) * SLOTS_PER_BLOCK + int(number))
    return slot if slot.link == link else None


def _configure_host_end(netlink: IPRoute, slot: Slot) -> None:
    index = _index(slot.link)
    kernel.write_sysctl(f"ipv6/conf/{slot.link}/disable_ipv6", "1")
    kernel.write_sysctl(f"ipv4/conf/{slot.link}/forwarding", "1")
    netlink.addr("replace", index=index, address=str(GATEWAY), prefixlen=32)
    netlink.link("set", index=index, state="up")
    netlink.route("replace", dst=f"{slot.guest_ip}/32", oif=index, scope=LINK_SCOPE, prefsrc=str(GATEWAY))
    # The guest's hardware address is known, so that it cannot be asked for nor lied about.
    netlink.neigh("replace", dst=str(slot.guest_ip), lladdr=slot.guest_mac, ifindex=index, state=NUD_PERMANENT)


def _configure_guest_end(slot: Slot) -> None:
    kernel.write_sysctl(f"ipv6/conf/{GUEST_LINK}/disable_ipv6", "1")  # lo keeps ::1, which programs listen on
    with IPRoute() as netlink:
        index = _index(GUEST_LINK)
        netlink.link("set", index=_index("lo"), state="up")
        netlink.addr("replace", index=index, address=str(slot.guest_ip), prefixlen=32)
        netlink.link("set", index=index, state="up")
        netlink.route("replace", dst=f"{GATEWAY}/32", oif=index, scope=LINK_SCOPE)
        netlink.route("replace", dst="default", gateway=str(GATEWAY), oif=index)


def _index(name: str) -> int:
    return socket.if_nametoindex(name)


@contextmanager
def _failures(what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, NetlinkError) as error:
        raise NetworkError(f"cannot {what}: {error}") from error


@contextmanager
def _absent_is_fine() -> Iterator[None]:
    try:
        yield
    except NetlinkError as error:
        if error.code != errno.ENODEV:
            raise
