"""Names under the policy: who may resolve what, and what an answer opens, for how long."""

from __future__ import annotations

import asyncio
import re
import socket
import struct
from pathlib import Path

import dns.flags
import dns.message
import dns.rcode
import pytest
from net_lab import (
    BLOCK,
    GATEWAY,
    OTHER_BLOCK,
    PORT,
    UPLINK,
    FakeDns,
    Lab,
    addresses_of,
    lab,
    network,
    policy,
    shell,
    slot,
)

from rundatsheesh.manager.model import Slot
from rundatsheesh.manager.net import Network
from rundatsheesh.manager.net import policy as rules

EVERYTHING = policy("0.0.0.0/0")
REFUSED = "ConnectionRefusedError"
NAMED = policy(domains=("one.example", "*.two.example"))


def zone() -> FakeDns:
    return FakeDns(
        {
            "one.example": (60, ["203.0.113.5"]),
            "a.two.example": (5, ["203.0.113.6"]),
            "two.example": (60, ["203.0.113.6"]),
            "rebind.two.example": (60, ["10.77.0.2", "169.254.169.254", GATEWAY, UPLINK]),
            "mixed.two.example": (60, ["10.77.0.2", "203.0.113.5"]),
            "forever.two.example": (1_000_000, ["203.0.113.5"]),
            "many.two.example": (60, [f"203.0.113.{i}" for i in range(5, 105)]),
            "elsewhere.example": (60, ["203.0.113.5"]),
        }
    )


def timeouts(name: str, guest: Slot) -> dict[str, int]:
    """Seconds for which each address of the guest's was opened, as the kernel has it."""
    listing = shell(f"nft list set inet rundatsheesh_{guest.block} {name}")
    found = re.findall(rf'"{guest.link}" \. (\S+) timeout (\S+)', listing)
    return {address: seconds_of(duration) for address, duration in found}


def seconds_of(duration: str) -> int:
    units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    return sum(int(count) * units[unit] for count, unit in re.findall(r"(\d+)([dhms])(?!s)", duration))


async def test_policy_decides_who_resolves_what() -> None:
    closed = policy("0.0.0.0/0", domains=("one.example",), outbound=False)
    guests = ((slot(0), EVERYTHING), (slot(1), NAMED), (slot(2), closed), (slot(3), policy("203.0.113.0/24")))
    async with lab() as it, zone().running() as upstream, network(BLOCK, *guests, dns_port=upstream.port):
        for tcp in (False, True):
            assert addresses_of(await it.resolve(slot(0), "elsewhere.example", tcp=tcp)) == ["203.0.113.5"]
            assert addresses_of(await it.resolve(slot(1), "one.example", tcp=tcp)) == ["203.0.113.5"]
            assert addresses_of(await it.resolve(slot(1), "A.Two.Example", tcp=tcp)) == ["203.0.113.6"]
        upstream.asked.clear()
        for tcp in (False, True):
            for guest, name in ((slot(1), "two.example"), (slot(1), "elsewhere.example"), (slot(1), "x.one.example")):
                assert (await it.resolve(guest, name, tcp=tcp)).rcode() == dns.rcode.REFUSED
            for guest in (slot(2), slot(3)):
                assert (await it.resolve(guest, "one.example", tcp=tcp)).rcode() == dns.rcode.REFUSED
        assert upstream.asked == []  # what is refused goes nowhere


async def test_absent_name_is_told_as_such() -> None:
    async with (
        lab() as it,
        zone().running() as upstream,
        network(BLOCK, (slot(0), EVERYTHING), (slot(1), NAMED), dns_port=upstream.port),
    ):
        for guest in (slot(0), slot(1)):
            assert (await it.resolve(guest, "no.two.example")).rcode() == dns.rcode.NXDOMAIN


async def test_ipv6_addresses_are_empty_and_not_asked_for() -> None:
    async with (
        lab() as it,
        zone().running() as upstream,
        network(BLOCK, (slot(0), EVERYTHING), (slot(1), NAMED), dns_port=upstream.port),
    ):
        for guest in (slot(0), slot(1)):
            reply = await it.resolve(guest, "one.example", "AAAA")
            assert (reply.rcode(), reply.answer) == (dns.rcode.NOERROR, [])
        assert upstream.asked == []


async def test_answer_opens_its_addresses_and_only_them() -> None:
    guest = slot(0)
    async with lab() as it, zone().running() as upstream, network(BLOCK, (guest, NAMED), dns_port=upstream.port):
        assert await it.tcp(guest, "203.0.113.5") == REFUSED
        await it.resolve(guest, "one.example")
        assert await it.tcp(guest, "203.0.113.5") == UPLINK
        assert await it.udp(guest, "203.0.113.5") == f"{UPLINK} hello"
        assert await it.tcp(guest, "203.0.113.6") == REFUSED


async def test_rule_outlives_the_answer_and_answers_are_bounded() -> None:
    guest = slot(0)
    async with lab() as it, zone().running() as upstream, network(BLOCK, (guest, NAMED), dns_port=upstream.port):
        short = await it.resolve(guest, "a.two.example")
        assert short.answer[0].ttl == 5
        assert timeouts("resolved", guest) == {"203.0.113.6": 35}
        long = await it.resolve(guest, "forever.two.example")
        assert long.answer[0].ttl == 3600
        assert timeouts("resolved", guest)["203.0.113.5"] == 3605
        await it.resolve(guest, "one.example")  # the same address with a shorter life
        assert timeouts("resolved", guest)["203.0.113.5"] == 3605


async def test_life_is_renewed_by_a_later_answer() -> None:
    guest = slot(0)
    async with lab() as it, zone().running() as upstream, network(BLOCK, (guest, NAMED), dns_port=upstream.port):
        await it.resolve(guest, "one.example")
        assert timeouts("resolved", guest) == {"203.0.113.5": 65}
        upstream.zone["one.example"] = (120, ["203.0.113.5"])
        await it.resolve(guest, "one.example")
        assert timeouts("resolved", guest) == {"203.0.113.5": 125}
        assert await it.tcp(guest, "203.0.113.5") == UPLINK


async def test_expired_answer_closes_to_new_connections_but_does_not_cut_old_ones() -> None:
    guest = slot(0)
    async with lab() as it, zone().running() as upstream, network(BLOCK, (guest, NAMED), dns_port=upstream.port):
        await it.resolve(guest, "one.example")
        connection = await it.inside(guest, lambda: socket.create_connection(("203.0.113.5", PORT), timeout=2))
        with connection:
            connection.recv(100)
            shell(f'nft delete element inet rundatsheesh_{BLOCK} resolved {{ "{guest.link}" . 203.0.113.5 }}')
            assert await it.tcp(guest, "203.0.113.5") == REFUSED
            connection.sendall(b"still here")
            assert connection.recv(100) == b"still here"


async def test_names_that_point_inside_open_nothing() -> None:
    guest = slot(0)
    async with lab() as it, zone().running() as upstream, network(BLOCK, (guest, NAMED), dns_port=upstream.port):
        assert len(addresses_of(await it.resolve(guest, "rebind.two.example"))) == 4
        for address in ("10.77.0.2", "169.254.169.254", GATEWAY, UPLINK):
            assert await it.tcp(guest, address) == REFUSED, address
        await it.resolve(guest, "mixed.two.example")
        assert await it.tcp(guest, "10.77.0.2") == REFUSED
        assert await it.tcp(guest, "203.0.113.5") == UPLINK


async def test_answers_open_for_the_vm_that_asked_only() -> None:
    one, two = slot(0), slot(1)
    async with (
        lab() as it,
        zone().running() as upstream,
        network(BLOCK, (one, NAMED), (two, NAMED), dns_port=upstream.port),
    ):
        await it.resolve(one, "one.example")
        assert await it.tcp(two, "203.0.113.5") == REFUSED


async def test_new_policy_closes_what_names_opened() -> None:
    guest = slot(0)
    async with (
        lab() as it,
        zone().running() as upstream,
        network(BLOCK, (guest, NAMED), dns_port=upstream.port) as net,
    ):
        await it.resolve(guest, "one.example")
        connection = await it.inside(guest, lambda: socket.create_connection(("203.0.113.5", PORT), timeout=2))
        with connection:
            connection.recv(100)
            await net.set_policy(guest, policy(domains=("*.two.example",)))
            with pytest.raises(ConnectionResetError):
                connection.sendall(b"x")
                connection.recv(100)
        assert await it.tcp(guest, "203.0.113.5") == REFUSED
        assert (await it.resolve(guest, "one.example")).rcode() == dns.rcode.REFUSED


async def test_answer_that_arrives_after_a_change_of_policy_opens_nothing() -> None:
    guest = slot(0)
    upstream = zone()
    upstream.hold = asyncio.Event()
    async with lab() as it, upstream.running(), network(BLOCK, (guest, NAMED), dns_port=upstream.port) as net:
        question = asyncio.create_task(it.resolve(guest, "one.example"))
        async with asyncio.timeout(30):
            while not upstream.asked:
                await asyncio.sleep(0.005)
        await net.set_policy(guest, policy(domains=("*.two.example",)))
        upstream.hold.set()
        assert (await question).rcode() == dns.rcode.SERVFAIL
        assert timeouts("resolved", guest) == {}


async def test_long_answers_are_truncated_and_whole_over_tcp() -> None:
    guests = ((slot(0), EVERYTHING), (slot(1), NAMED))
    async with lab() as it, zone().running() as upstream, network(BLOCK, *guests, dns_port=upstream.port):
        for guest, _ in guests:
            assert (await it.resolve(guest, "many.two.example")).flags & dns.flags.TC
            assert len(addresses_of(await it.resolve(guest, "many.two.example", tcp=True))) == 100
        assert await it.tcp(slot(1), "203.0.113.6") == UPLINK


async def test_too_many_open_addresses_are_a_failure_of_that_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "LEASES_PER_VM", 50)
    guest = slot(0)
    async with lab() as it, zone().running() as upstream, network(BLOCK, (guest, NAMED), dns_port=upstream.port):
        assert (await it.resolve(guest, "many.two.example", tcp=True)).rcode() == dns.rcode.SERVFAIL
        assert timeouts("resolved", guest) == {}
        assert addresses_of(await it.resolve(guest, "one.example")) == ["203.0.113.5"]


async def test_unreachable_upstream_is_a_failure_soon() -> None:
    async with lab() as it, network(BLOCK, (slot(0), EVERYTHING), (slot(1), NAMED), dns_port=9):
        for guest in (slot(0), slot(1)):
            async with asyncio.timeout(7):
                assert (await it.resolve(guest, "one.example")).rcode() == dns.rcode.SERVFAIL


async def test_hosts_own_name_servers_are_used_unless_one_is_set(tmp_path: Path) -> None:
    guest = slot(0)
    async with lab() as it:
        net = Network(BLOCK)
        net._resolver._upstream._resolv_conf = tmp_path / "resolv.conf"
        (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\n")
        await net.open()
        await net.attach(guest, EVERYTHING)
        shell("nft add table ip lab; nft add chain ip lab out '{ type nat hook output priority -100; }'")
        async with zone().running() as upstream:
            shell(f"nft add rule ip lab out ip daddr 127.0.0.1 udp dport 53 redirect to :{upstream.port}")
            assert addresses_of(await it.resolve(guest, "one.example")) == ["203.0.113.5"]
        shell("nft delete table ip lab")
        await net.detach(guest)
        await net.close()


async def test_hostile_bytes_do_not_stop_the_resolver() -> None:
    guest = slot(0)
    async with lab() as it, zone().running() as upstream, network(BLOCK, (guest, NAMED), dns_port=upstream.port):
        await it.inside(guest, _send_garbage)
        assert addresses_of(await it.resolve(guest, "one.example")) == ["203.0.113.5"]
        assert addresses_of(await it.resolve(guest, "one.example", tcp=True)) == ["203.0.113.5"]


def _send_garbage() -> None:
    header = struct.pack("!HHHHHH", 1, 0x100, 1, 0, 0, 0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        for data in (b"", b"x", b"\xff" * 512, header, header + b"\xc0\x0c\x00\x01\x00\x01", b"\0" * 1400):
            made.sendto(data, (GATEWAY, 53))
    for data in (b"\xff\xff", b"\0\0", b"\0\x0c" + header, b"\0"):
        with socket.create_connection((GATEWAY, 53), timeout=2) as stream:
            stream.sendall(data)


async def test_flood_of_one_vm_leaves_the_resolver_to_others() -> None:
    noisy, quiet = slot(0), slot(1)
    upstream = zone()
    async with (
        lab() as it,
        upstream.running(),
        network(BLOCK, (noisy, EVERYTHING), (quiet, EVERYTHING), dns_port=upstream.port),
    ):
        upstream.hold = asyncio.Event()
        await it.inside(noisy, lambda: _flood("one.example", 1000))
        question = asyncio.create_task(it.resolve(quiet, "elsewhere.example"))
        async with asyncio.timeout(30):
            while "elsewhere.example A" not in upstream.asked:
                await asyncio.sleep(0.005)
        upstream.hold.set()
        assert addresses_of(await question) == ["203.0.113.5"]
        assert upstream.asked.count("one.example A") <= 32 * 2  # in flight at most, each asked twice at most


def _flood(name: str, count: int) -> None:
    query = dns.message.make_query(name, "A")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        for ident in range(count):
            query.id = ident
            made.sendto(query.to_wire(), (GATEWAY, 53))


async def test_other_resolvers_are_traffic_like_any_other() -> None:
    """No other port 53 is redirected: it is open or refused as the address is."""
    async with lab() as it, network(BLOCK, (slot(0), NAMED), (slot(1), policy("203.0.113.5/32"))):
        await it.in_world(lambda: it.servers.listen("203.0.113.5", 53))
        assert await it.tcp(slot(0), "203.0.113.5", 53) == REFUSED
        assert await it.tcp(slot(1), "203.0.113.5", 53) == UPLINK


async def test_resolver_of_another_manager_does_not_answer() -> None:
    one, other = slot(0), slot(0, OTHER_BLOCK)
    async with (
        lab() as it,
        zone().running() as upstream,
        network(BLOCK, (one, policy("172.16.0.1/32", "0.0.0.0/0")), dns_port=upstream.port),
        network(OTHER_BLOCK, (other, EVERYTHING), dns_port=upstream.port) as theirs,
    ):
        assert addresses_of(await it.resolve(other, "one.example")) == ["203.0.113.5"]
        assert addresses_of(await it.resolve(one, "one.example")) == ["203.0.113.5"]
        assert await _silent(it, one, theirs._resolver.port)


async def _silent(it: Lab, guest: Slot, port: int) -> bool:
    with await it.inside(guest, lambda: socket.create_connection((GATEWAY, port), timeout=2)) as stream:
        wire = dns.message.make_query("one.example", "A").to_wire()
        stream.sendall(len(wire).to_bytes(2, "big") + wire)
        try:
            return await asyncio.to_thread(stream.recv, 10) == b""
        except ConnectionResetError:
            return True
