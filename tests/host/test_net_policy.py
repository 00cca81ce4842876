"""The policy as packets meet it: real namespaces, real nftables, real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import struct
from collections.abc import Callable

import pytest
from net_lab import (
    BLOCK,
    GATEWAY,
    OTHER_BLOCK,
    PORT,
    UPLINK,
    WORLD,
    lab,
    network,
    policy,
    present,
    refused_packets,
    shell,
    slot,
    tcp,
    udp,
)

from rundatsheesh.manager.host import tap
from rundatsheesh.manager.model import Slot
from rundatsheesh.manager.net import kernel, links, rtnetlink

EVERYTHING = policy("0.0.0.0/0")
REFUSED = "ConnectionRefusedError"
METADATA = ("169.254.169.254", "169.254.170.2", "100.100.100.200", "168.63.129.16", "192.0.0.192")
PRIVATE = ("10.77.0.2", "192.168.77.2", "100.64.77.2", "169.254.77.2")


async def test_public_internet_is_open_and_nothing_else() -> None:
    async with lab() as it, network(BLOCK, (slot(0), EVERYTHING)):
        for address in (WORLD, "203.0.113.5"):
            assert await it.tcp(slot(0), address) == UPLINK  # masqueraded
            assert await it.udp(slot(0), address) == f"{UPLINK} hello"
            assert await it.ping(slot(0), address) == "reply"
        for address in (*PRIVATE, *METADATA, GATEWAY, UPLINK, "10.77.0.1"):
            assert await it.tcp(slot(0), address) == REFUSED, address


async def test_refusals_are_immediate_for_every_protocol() -> None:
    async with lab() as it, network(BLOCK, (slot(0), policy("203.0.113.6/32"))):
        for address in ("203.0.113.5", GATEWAY):
            assert await it.tcp(slot(0), address) == REFUSED
            assert await it.udp(slot(0), address) == REFUSED
            assert await it.ping(slot(0), address) == "refused"
        assert refused_packets(slot(0)) >= 6


async def test_outbound_false_refuses_everything_whatever_the_lists_say() -> None:
    closed = policy("0.0.0.0/0", "172.16.0.1/32", f"{UPLINK}/32", outbound=False)
    async with lab() as it, network(BLOCK, (slot(0), closed)):
        for address in (WORLD, GATEWAY, UPLINK, *PRIVATE):
            assert await it.tcp(slot(0), address) == REFUSED, address
        assert await it.udp(slot(0), WORLD) == REFUSED


async def test_entries_inside_special_ranges_open_exactly_themselves() -> None:
    async with lab() as it, network(BLOCK, (slot(0), policy("10.77.0.0/24", "172.16.0.1/32"))):
        assert await it.tcp(slot(0), "10.77.0.2") == "10.77.0.1"  # masqueraded
        guest = str(slot(0).guest_ip)
        assert await it.tcp(slot(0), GATEWAY) == guest  # the host's own listener sees the guest itself
        assert await it.udp(slot(0), GATEWAY) == f"{guest} hello"
        assert await it.ping(slot(0), GATEWAY) == "reply"
        assert await it.tcp(slot(0), "10.77.0.1") == guest  # a host address inside the range
        for address in (WORLD, "192.168.77.2", UPLINK, "203.0.113.5"):
            assert await it.tcp(slot(0), address) == REFUSED, address


async def test_public_address_of_the_host_opens_only_by_its_own_entry() -> None:
    guests = ((slot(0), policy(f"{UPLINK}/32")), (slot(1), policy("198.51.100.0/24")), (slot(2), EVERYTHING))
    async with lab() as it, network(BLOCK, *guests):
        assert await it.tcp(slot(0), UPLINK) == str(slot(0).guest_ip)
        assert await it.tcp(slot(0), WORLD) == REFUSED
        assert await it.tcp(slot(1), UPLINK) == REFUSED
        assert await it.tcp(slot(1), WORLD) == UPLINK
        assert await it.tcp(slot(2), UPLINK) == REFUSED


async def test_metadata_is_closed_even_to_a_policy_that_names_it() -> None:
    named = policy("0.0.0.0/0", "169.254.0.0/16", *(f"{address}/32" for address in METADATA))
    async with lab() as it, network(BLOCK, (slot(0), named)):
        for address in METADATA:
            assert await it.tcp(slot(0), address) == REFUSED, address
        assert await it.tcp(slot(0), "169.254.77.2") == UPLINK


async def test_overlapping_entries() -> None:
    entries = policy("0.0.0.0/0", "203.0.113.0/24", "203.0.113.5/32", "10.0.0.0/8", "10.77.0.0/16", "10.77.0.2/32")
    async with lab() as it, network(BLOCK, (slot(0), entries)):
        assert await it.tcp(slot(0), "203.0.113.5") == UPLINK
        assert await it.tcp(slot(0), "10.77.0.2") == "10.77.0.1"


async def test_vms_cannot_reach_each_other_of_whichever_manager() -> None:
    wide = policy("0.0.0.0/0", "172.16.0.0/12")
    one, two, other = slot(0), slot(1), slot(0, OTHER_BLOCK)
    async with lab() as it, network(BLOCK, (one, wide), (two, wide)), network(OTHER_BLOCK, (other, wide)):
        for target in (one, two, other):
            await it.inside(target, lambda: it.servers.listen("0.0.0.0"))
            address = str(target.guest_ip)
            assert await it.tcp(target, address) == address  # it does listen
        for guest, target in ((one, two), (two, one), (one, other), (other, one)):
            assert await it.tcp(guest, str(target.guest_ip)) == REFUSED
            assert await it.udp(guest, str(target.guest_ip)) == REFUSED
        for guest in (one, two, other):
            assert await it.tcp(guest, WORLD) == UPLINK


async def test_nobody_calls_into_a_vm() -> None:
    guest = slot(0)
    address = str(guest.guest_ip)
    async with lab() as it, network(BLOCK, (guest, policy("0.0.0.0/0", "172.16.0.0/12", "10.77.0.0/24"))):
        await it.inside(guest, lambda: it.servers.listen("0.0.0.0"))
        assert await asyncio.to_thread(tcp, address, PORT) == REFUSED
        assert await asyncio.to_thread(udp, address, PORT) != f"{GATEWAY} hello"
        await it.in_world(lambda: shell(f"ip route add {address} via {UPLINK}"))
        assert await it.in_world(lambda: tcp(address, PORT)) == REFUSED
        assert await it.in_world(lambda: udp(address, PORT)) == REFUSED


def _send_raw(source: str, destination: str) -> None:
    """An UDP packet to `destination` with a source of our choice, as a guest's own kernel would never send it."""
    payload = struct.pack("!HHHH", 4000, PORT + 1, 8 + 5, 0) + b"spoof"
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as made:
        addresses = socket.inet_aton(source) + socket.inet_aton(destination)
        header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 1, 0, 64, socket.IPPROTO_UDP, 0)
        made.sendto(header + addresses + payload, (destination, 0))


async def test_spoofed_sources_go_nowhere() -> None:
    open_to_all = policy("0.0.0.0/0", "172.16.0.1/32")
    one, two = slot(0), slot(1)
    async with lab() as it, network(BLOCK, (one, open_to_all), (two, open_to_all)):
        with await it.in_world(_receiver) as world, _receiver(GATEWAY) as host:
            for source in (str(two.guest_ip), "203.0.113.77", GATEWAY, "0.0.0.0", "127.0.0.1"):
                for destination in (WORLD, GATEWAY):
                    await it.inside(one, lambda d=destination, s=source: _send_raw(s, d))
            assert refused_packets(one) >= 8
            await it.inside(one, lambda: _send_raw(str(one.guest_ip), WORLD))  # the honest one arrives, and first
            await it.inside(one, lambda: _send_raw(str(one.guest_ip), GATEWAY))
            assert world.recvfrom(100)[1][0] == UPLINK
            assert host.recvfrom(100)[1][0] == str(one.guest_ip)


def _receiver(address: str = "0.0.0.0") -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    made.settimeout(2)
    made.bind((address, PORT + 1))
    return made


async def test_ipv6_is_not_there() -> None:
    guest = slot(0)
    async with lab() as it, network(BLOCK, (guest, EVERYTHING)):
        assert "inet6" not in await it.inside(guest, lambda: shell("ip -6 addr show dev eth0"))
        assert await it.inside(guest, lambda: shell("ip -6 route show default")) == ""
        assert "inet6" not in shell(f"ip -6 addr show dev {guest.link}")
        assert await it.inside(guest, _connect_ipv6) == "OSError"


def _connect_ipv6() -> str:
    """As a guest that gives itself an address and a neighbour."""
    with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as made:
        try:
            made.connect(("2001:db8::1", PORT))
        except OSError as error:
            return type(error).__name__
    return "connected"


async def test_ipv6_packets_of_a_guest_that_forces_them_go_nowhere() -> None:
    guest = slot(0)
    async with lab() as it, network(BLOCK, (guest, EVERYTHING)):
        shell("ip -6 addr add 2001:db8::1/64 dev wan0 nodad; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding")
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as host:
            host.settimeout(0.3)
            host.bind(("2001:db8::1", PORT + 1))
            await it.inside(guest, lambda: _force_ipv6("02:fd:ac:10:00:01"))
            with pytest.raises(TimeoutError):
                host.recvfrom(100)
        shell("ip -6 addr del 2001:db8::1/64 dev wan0")


def _force_ipv6(gateway_mac: str) -> None:
    shell(
        "echo 0 > /proc/sys/net/ipv6/conf/eth0/disable_ipv6; ip -6 addr add 2001:db8:1::2/64 dev eth0 nodad;"
        f"ip -6 neigh replace fe80::1 lladdr {gateway_mac} dev eth0; ip -6 route add default via fe80::1 dev eth0"
    )
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as made:
        made.sendto(b"hello", ("2001:db8::1", PORT + 1))


async def test_link_without_a_vm_reaches_nothing() -> None:
    """The rules lost, or never made: an interface of our name that the table does not know."""
    guest = slot(0)
    async with lab() as it, network(BLOCK) as net:
        await asyncio.to_thread(links.create_veth, guest)
        with pytest.raises(AssertionError, match="the refusal took"):  # dropped: it is not even a guest
            await it.tcp(guest, GATEWAY)
        assert await present(net) == {guest}


async def test_narrowed_policy_cuts_connections_and_widened_opens() -> None:
    guest = slot(0)
    async with lab() as it, network(BLOCK, (guest, policy("203.0.113.0/24", "172.16.0.1/32"))) as net:
        kept, cut, local = [
            await it.inside(guest, _connected(address)) for address in ("203.0.113.5", "203.0.113.6", GATEWAY)
        ]
        with kept, cut, local:
            assert [_echo(made) for made in (kept, cut, local)] == ["echo"] * 3
            await net.set_policy(guest, policy("203.0.113.5/32"))
            assert [_echo(made) for made in (kept, cut, local)] == [
                "echo",
                "ConnectionResetError",
                "ConnectionResetError",
            ]
        assert await it.tcp(guest, "203.0.113.6") == REFUSED
        await net.set_policy(guest, policy("203.0.113.6/32"))
        assert await it.tcp(guest, "203.0.113.6") == UPLINK
        assert await it.tcp(guest, "203.0.113.5") == REFUSED


def _connected(address: str) -> Callable[[], socket.socket]:
    def connect() -> socket.socket:
        made = socket.create_connection((address, PORT), timeout=2)
        made.recv(100)
        return made

    return connect


def _echo(made: socket.socket) -> str:
    try:
        made.sendall(b"echo")
        return made.recv(100).decode()
    except OSError as error:
        return type(error).__name__


async def test_narrowed_policy_silences_a_peer_that_keeps_sending() -> None:
    guest = slot(0)
    async with lab() as it, network(BLOCK, (guest, policy("203.0.113.5/32"))) as net:
        mine = await it.inside(guest, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        with mine, await it.in_world(lambda: _receiver("203.0.113.5")) as peer:
            mine.settimeout(0.3)
            mine.sendto(b"hello", ("203.0.113.5", PORT + 1))
            _, source = peer.recvfrom(100)
            peer.sendto(b"before", source)
            assert mine.recv(100) == b"before"
            await net.set_policy(guest, policy("203.0.113.6/32"))
            peer.sendto(b"after", source)
            with pytest.raises(TimeoutError):
                mine.recv(100)


async def test_one_vm_cannot_fill_the_hosts_connection_table() -> None:
    guest = slot(0)
    async with lab() as it, network(BLOCK, (guest, EVERYTHING)):
        await it.inside(guest, lambda: _spray(2500))
        assert refused_packets(guest) >= 2500 - 2048
        assert await it.tcp(guest, WORLD) == REFUSED


def _spray(count: int) -> None:
    """Many connectionless flows."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        for port in range(10_000, 10_000 + count):
            with contextlib.suppress(OSError):  # a refusal of an earlier one
                made.sendto(b"x", ("203.0.113.5", port))


async def test_connections_of_a_vm_are_forgotten_with_it() -> None:
    guest: Slot = slot(0)
    async with lab() as it, network(BLOCK, (guest, EVERYTHING)) as net:
        mine = await it.inside(guest, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        with mine, await it.in_world(lambda: _receiver("203.0.113.5")) as peer:
            mine.bind(("0.0.0.0", 5555))
            mine.sendto(b"hello", ("203.0.113.5", PORT + 1))
            _, source = peer.recvfrom(100)
            await net.detach(guest)
            await net.attach(guest, EVERYTHING)
            heir = await it.inside(guest, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            with heir:
                heir.bind(("0.0.0.0", 5555))
                heir.settimeout(0.3)
                peer.sendto(b"for the one before", source)
                with pytest.raises(TimeoutError):
                    heir.recv(100)


async def test_tap_has_the_same_policy() -> None:
    """The guest's side of a tap is a process; here it is this one, speaking Ethernet."""
    guest = slot(0)
    async with lab(), network(BLOCK) as net:
        await net.attach(guest, policy("172.16.0.1/32"), kind="tap")
        assert guest.netns not in kernel.namespace_names()
        assert "user root group root" in shell(f"ip -d link show dev {guest.link}")
        # Not `opened`: /sys shows the machine's own network here.
        with rtnetlink.link_events() as events, tap._opened(guest.link) as wire:
            await asyncio.to_thread(rtnetlink.wait_until_running, events, socket.if_nametoindex(guest.link))
            assert _ping_through(wire, guest, str(guest.guest_ip), GATEWAY) == (0, 0)
            assert _ping_through(wire, guest, str(guest.guest_ip), WORLD) == (3, 13)
            before = refused_packets(guest)
            assert _ping_through(wire, guest, "172.16.0.9", GATEWAY) is None
            assert refused_packets(guest) == before + 1


def _ping_through(wire: int, guest: Slot, source: str, destination: str) -> tuple[int, int] | None:
    """Type and code of the ICMP message that an echo request brings back; None when there is none."""
    icmp = b"\x08\x00\xf7\xfd\x00\x01\x00\x01"
    addresses = socket.inet_aton(source) + socket.inet_aton(destination)
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 28, 1, 0, 64, 1, 0) + addresses
    ip = ip[:10] + struct.pack("!H", 0xFFFF - sum(struct.unpack("!10H", ip)) % 0xFFFF) + ip[12:]
    macs = bytes.fromhex((links.GATEWAY_MAC + guest.guest_mac).replace(":", ""))
    os.write(wire, bytes(10) + macs + b"\x08\x00" + ip + icmp)
    while select.select([wire], [], [], 0.3)[0]:
        frame = os.read(wire, 2048)[10:]
        if frame[12:14] == b"\x08\x00" and frame[23] == 1:
            return frame[34], frame[35]
    return None
