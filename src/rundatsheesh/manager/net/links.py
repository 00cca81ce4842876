"""The guest's wire: a veth pair into the VM's namespace, or a tap for an engine that opens one itself.

The host end lies in the root namespace, is named by the slot and has the gateway's address; a /32 route leads to the
guest. Everything here blocks, is idempotent, and raises NetworkError.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from rundatsheesh.manager.errors import NetworkError
from rundatsheesh.manager.host import tap
from rundatsheesh.manager.host.namespaces import NETNS_DIRECTORY
from rundatsheesh.manager.model import GATEWAY, SLOTS_PER_BLOCK, Slot
from rundatsheesh.manager.net import kernel, rtnetlink
from rundatsheesh.manager.net.netlink import ROUTE, Netlink
from rundatsheesh.manager.net.rtnetlink import Interface

GUEST_LINK = "eth0"
GATEWAY_MAC = "02:fd:" + ":".join(f"{octet:02x}" for octet in GATEWAY.packed)  # the same for every guest, so that a
# guest that is restored elsewhere finds its neighbour where its ARP cache says
MTU = 1500


def create_veth(slot: Slot) -> None:
    """Namespace, pair, addresses and routes; on return packets flow."""
    with _failures(f"create link {slot.link}"):
        remove(slot)
        kernel.create_namespace(slot.netns)
        with Netlink(ROUTE) as netlink, open(NETNS_DIRECTORY / slot.netns, "rb") as namespace:
            host, guest = Interface(slot.link, GATEWAY_MAC, MTU), Interface(GUEST_LINK, slot.guest_mac, MTU)
            rtnetlink.create_veth(netlink, host, guest, namespace.fileno())
            _configure_host_end(netlink, slot)
            with rtnetlink.link_events() as events:
                kernel.inside_namespace(slot.netns, lambda: _configure_guest_end(slot))
                rtnetlink.wait_until_running(events, _index(slot.link))


def create_tap(slot: Slot) -> None:
    """A tap in the root namespace that root may open: the guest's own interface is its other end."""
    with _failures(f"create tap {slot.link}"):
        remove(slot)
        tap.create(slot.link)
        with Netlink(ROUTE) as netlink:
            rtnetlink.describe_link(netlink, _index(slot.link), GATEWAY_MAC, MTU)
            _configure_host_end(netlink, slot)


def configure_host_end(slot: Slot) -> None:
    """Address, route and state of the host end again."""
    with _failures(f"configure {slot.link}"), Netlink(ROUTE) as netlink:
        _configure_host_end(netlink, slot)


def remove(slot: Slot) -> None:
    """Remove the link and the namespace's name, whatever is there of them."""
    with _failures(f"remove link {slot.link}"):
        # First the link: a namespace frees its end late, and a process that still sits in it must be cut off now.
        if slot.link in names():
            with Netlink(ROUTE) as netlink, _absent_is_fine():
                rtnetlink.delete_link(netlink, slot.link)
        kernel.remove_namespace(slot.netns)


def names() -> set[str]:
    """All interfaces of the calling thread's namespace."""
    return {name for _, name in socket.if_nameindex()}


def traces(block: int) -> tuple[set[str], set[str]]:
    """Names of the block's links, and of its namespaces."""
    prefix = f"rds{block}-"
    own_links = {name for name in names() if name.startswith(prefix)}
    return own_links, {name for name in kernel.namespace_names() if name.startswith(prefix)}


def slot_of(link: str) -> Slot | None:
    """The slot that has this link name; None for a name that no slot has."""
    block, _, number = link.removeprefix("rds").partition("-")
    if not (link.startswith("rds") and block.isdecimal() and number.isdecimal()):
        return None
    slot = Slot(int(block) * SLOTS_PER_BLOCK + int(number))
    return slot if slot.link == link else None


def _configure_host_end(netlink: Netlink, slot: Slot) -> None:
    index = _index(slot.link)
    kernel.write_sysctl(f"ipv6/conf/{slot.link}/disable_ipv6", "1")
    kernel.write_sysctl(f"ipv4/conf/{slot.link}/forwarding", "1")
    rtnetlink.replace_address(netlink, index, GATEWAY)
    # The guest's hardware address is known, so that it cannot be asked for nor lied about.
    rtnetlink.replace_neighbour(netlink, index, slot.guest_ip, slot.guest_mac)
    rtnetlink.bring_up(netlink, index)
    rtnetlink.replace_link_route(netlink, index, slot.guest_ip, source=GATEWAY)


def _configure_guest_end(slot: Slot) -> None:
    kernel.write_sysctl(f"ipv6/conf/{GUEST_LINK}/disable_ipv6", "1")  # lo keeps ::1, which programs listen on
    with Netlink(ROUTE) as netlink:
        index = _index(GUEST_LINK)
        rtnetlink.bring_up(netlink, _index("lo"))
        rtnetlink.replace_address(netlink, index, slot.guest_ip)
        rtnetlink.bring_up(netlink, index)
        rtnetlink.replace_link_route(netlink, index, GATEWAY)
        rtnetlink.replace_default_route(netlink, index, GATEWAY)


def _index(name: str) -> int:
    return socket.if_nametoindex(name)


@contextmanager
def _failures(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise NetworkError(f"cannot {what}: {error}") from error


@contextmanager
def _absent_is_fine() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
