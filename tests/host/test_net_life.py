"""Attach, detach, failure and restart: what is there afterwards, and that nothing is left."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from net_lab import (
    BLOCK,
    GATEWAY,
    OTHER_BLOCK,
    PORT,
    UPLINK,
    WORLD,
    FakeDns,
    addresses_of,
    lab,
    left_behind,
    network,
    policy,
    present,
    shell,
    slot,
)

from rundatsheesh.manager.errors import NetworkError
from rundatsheesh.manager.net import Network, kernel, links
from rundatsheesh.manager.net import policy as rules

EVERYTHING = policy("0.0.0.0/0")
REFUSED = "ConnectionRefusedError"


def drop_table(block: int = BLOCK) -> None:
    shell(f"nft delete table inet rundatsheesh_{block}")


async def test_guest_end_is_as_promised() -> None:
    guest = slot(0)
    async with lab() as it, network(BLOCK, (guest, EVERYTHING)):
        found = await it.inside(guest, lambda: shell("ip -4 -o addr show dev eth0; ip -4 route"))
        assert f"{guest.guest_ip}/32" in found
        assert f"default via {GATEWAY} dev eth0" in found
        assert guest.guest_mac in await it.inside(guest, lambda: shell("ip link show dev eth0"))
        assert await it.tcp(guest, WORLD) == UPLINK


async def test_forwarding_is_switched_on() -> None:
    async with lab() as it:
        shell("echo 0 > /proc/sys/net/ipv4/ip_forward")
        async with network(BLOCK, (slot(0), EVERYTHING)):
            assert await it.tcp(slot(0), WORLD) == UPLINK


async def test_strict_reverse_path_filter_does_not_matter() -> None:
    async with lab() as it:
        shell("echo 1 > /proc/sys/net/ipv4/conf/all/rp_filter; echo 1 > /proc/sys/net/ipv4/conf/default/rp_filter")
        async with network(BLOCK, (slot(0), policy("0.0.0.0/0", "172.16.0.1/32"))):
            assert await it.tcp(slot(0), WORLD) == UPLINK
            assert await it.tcp(slot(0), GATEWAY) == str(slot(0).guest_ip)


async def test_policy_is_in_force_before_the_link_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    create, run = links.create_veth, rules.add_text
    monkeypatch.setattr(links, "create_veth", lambda guest: (order.append(shell("nft list ruleset")), create(guest)))
    monkeypatch.setattr(rules, "add_text", run)
    async with lab(), network(BLOCK, (slot(0), EVERYTHING)):
        assert f'"{slot(0).link}" . 0.0.0.0/0' in order[0]


async def test_attach_replaces_a_leftover() -> None:
    guest = slot(0)
    async with lab() as it, network(BLOCK, (guest, EVERYTHING)) as net:
        await net.attach(guest, policy("203.0.113.5/32"))
        assert await it.tcp(guest, WORLD) == REFUSED
        assert await it.tcp(guest, "203.0.113.5") == UPLINK
        await net.attach(guest, policy("203.0.113.6/32"), kind="tap")
        assert await present(net) == {guest}


async def test_detach_from_every_partial_state() -> None:
    guest = slot(0)
    async with lab(), network(BLOCK) as net:
        clean = left_behind()
        partial: list[Callable[[], object]] = [
            lambda: None,
            lambda: shell(f"ip link del {guest.link}"),
            lambda: kernel.remove_namespace(guest.netns),
            lambda: shell(f"umount /run/netns/{guest.netns}"),
            lambda: shell(f"ip addr flush dev {guest.link}; ip link set {guest.link} down"),
            lambda: shell(f'nft delete element inet rundatsheesh_{BLOCK} wide {{ "{guest.link}" . 0.0.0.0/0 }}'),
        ]
        for damage in partial:
            await net.attach(guest, EVERYTHING)
            damage()
            for _ in range(2):
                await net.detach(guest)
            assert left_behind() == clean
            assert await present(net) == set()
        await net.attach(guest, EVERYTHING)
        drop_table()
        await net.detach(guest)
        assert await present(net) == set()


async def test_detach_of_what_never_was() -> None:
    async with lab(), network(BLOCK) as net:
        await net.detach(slot(0))


async def test_failing_rules_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with lab(), network(BLOCK) as net:
        clean = left_behind()
        monkeypatch.setattr(
            rules, "elements_of", lambda *_: frozenset([rules.Element("absent", "x", rules.EVERYWHERE)])
        )
        with pytest.raises(NetworkError, match="nftables refused"):
            await net.attach(slot(0), EVERYTHING)
        assert left_behind() == clean
        assert await present(net) == set()


async def test_failing_link_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "no space for a route")

    async with lab(), network(BLOCK) as net:
        clean = left_behind()
        monkeypatch.setattr(links, "_configure_host_end", fail)
        for kind in ("veth", "tap"):
            with pytest.raises(NetworkError, match="no space for a route"):
                await net.attach(slot(0), EVERYTHING, kind=kind)  # type: ignore[arg-type]
            assert left_behind() == clean


async def test_failing_change_of_policy_keeps_the_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = slot(0)
    async with lab() as it, network(BLOCK, (guest, policy("203.0.113.5/32"))) as net:
        with monkeypatch.context() as patched:
            patched.setattr(rules, "add_text", lambda *_: "nonsense\n")
            with pytest.raises(NetworkError):
                await net.set_policy(guest, EVERYTHING)
        assert await it.tcp(guest, "203.0.113.5") == UPLINK
        assert await it.tcp(guest, "203.0.113.6") == REFUSED
        await net.set_policy(guest, EVERYTHING)
        assert await it.tcp(guest, "203.0.113.6") == UPLINK


async def test_cancelled_attach_leaves_nothing() -> None:
    async with lab(), network(BLOCK) as net:
        clean = left_behind()
        for delay in (0, 0.002, 0.005, 0.008, 0.012, 0.016):
            attaching = asyncio.create_task(net.attach(slot(0), EVERYTHING))
            await asyncio.sleep(delay)
            if attaching.cancel():
                with pytest.raises(asyncio.CancelledError):
                    await attaching
            else:
                await net.detach(slot(0))
            assert left_behind() == clean
        await net.attach(slot(0), EVERYTHING)


async def test_many_at_once() -> None:
    guests = [slot(i) for i in range(12)]
    async with lab() as it, network(BLOCK) as net:
        async with asyncio.TaskGroup() as group:
            for guest in guests:
                group.create_task(net.attach(guest, policy("203.0.113.0/24", "172.16.0.1/32")))
        assert await present(net) == set(guests)
        for guest in guests:
            assert await it.tcp(guest, GATEWAY) == str(guest.guest_ip)
        async with asyncio.TaskGroup() as group:
            for guest in guests:
                group.create_task(net.detach(guest))
        assert await present(net) == set()


async def test_calls_for_one_slot_wait_for_each_other() -> None:
    guest = slot(0)
    async with lab(), network(BLOCK) as net:
        await asyncio.gather(*(call for _ in range(4) for call in (net.attach(guest, EVERYTHING), net.detach(guest))))
        assert await present(net) == set()


async def test_manager_may_come_and_go_while_vms_run() -> None:
    guest = slot(0)
    named = policy("203.0.113.6/32", domains=("one.example",))
    upstream = FakeDns({"one.example": (600, ["203.0.113.5"])})
    async with lab() as it, upstream.running():
        first = Network(BLOCK, dns_server=f"127.0.0.1:{upstream.port}")
        await first.open()
        await first.open()
        await first.attach(guest, named)
        await it.resolve(guest, "one.example")
        connection = await it.inside(guest, lambda: socket.create_connection(("203.0.113.5", PORT), timeout=2))
        await first.close()
        assert await it.tcp(guest, "203.0.113.6") == UPLINK  # in force without any manager
        assert await it.tcp(guest, "203.0.113.7") == REFUSED
        async with network(BLOCK, dns_port=upstream.port) as second:
            assert await present(second) == {guest}
            await second.adopt(guest, named)
            with connection:
                connection.recv(100)
                connection.sendall(b"through both")
                assert connection.recv(100) == b"through both"
            assert await it.tcp(guest, "203.0.113.5") == UPLINK  # what the name opened stays open
            assert addresses_of(await it.resolve(guest, "one.example")) == ["203.0.113.5"]


async def test_manager_that_was_killed_is_no_different() -> None:
    """No close: the first one's resolver is simply gone."""
    guest = slot(0)
    async with lab() as it:
        first = Network(BLOCK, dns_server="127.0.0.1:1")
        await first.open()
        await first.attach(guest, EVERYTHING)
        await first._resolver.close()
        async with network(BLOCK) as second:
            await second.adopt(guest, policy("203.0.113.5/32"))  # the record says so
            assert await it.tcp(guest, "203.0.113.6") == REFUSED
            assert await it.tcp(guest, "203.0.113.5") == UPLINK


async def test_adopting_repairs_what_others_destroyed() -> None:
    one, two = slot(0), slot(1)
    async with lab() as it, network(BLOCK, (one, EVERYTHING), (two, EVERYTHING)) as net:
        shell("nft flush ruleset")
        shell(f"ip route flush dev {one.link}; ip addr flush dev {one.link}; ip link set {one.link} down")
        for guest in (one, two):
            await net.adopt(guest, EVERYTHING)
        for guest in (one, two):
            assert await it.tcp(guest, WORLD) == UPLINK
            assert await it.tcp(guest, UPLINK) == REFUSED
        drop_table()
        await net.set_policy(one, policy("203.0.113.5/32"))
        assert await it.tcp(one, "203.0.113.5") == UPLINK
        assert await it.tcp(one, WORLD) == REFUSED


async def test_adopting_a_vm_without_a_link_is_an_error() -> None:
    async with lab(), network(BLOCK) as net:
        with pytest.raises(NetworkError):
            await net.adopt(slot(0), EVERYTHING)


async def test_table_goes_with_the_last_manager_and_only_without_vms() -> None:
    async with lab(), network(OTHER_BLOCK, (slot(0, OTHER_BLOCK), EVERYTHING)):
        async with network(BLOCK):
            assert f"rundatsheesh_{BLOCK}" in shell("nft list tables")
        assert f"rundatsheesh_{BLOCK}" not in shell("nft list tables")
        assert f"rundatsheesh_{OTHER_BLOCK}" in shell("nft list tables")


async def test_managers_side_by_side_do_not_touch_each_other() -> None:
    mine, theirs = slot(0), slot(0, OTHER_BLOCK)
    async with lab() as it, network(OTHER_BLOCK, (theirs, EVERYTHING)):
        async with network(BLOCK, (mine, policy("203.0.113.5/32"))) as net:
            assert await present(net) == {mine}
            assert await it.tcp(theirs, WORLD) == UPLINK
            assert await it.tcp(mine, WORLD) == REFUSED
            await net.detach(mine)
        assert await it.tcp(theirs, WORLD) == UPLINK


async def test_other_peoples_tables_stay() -> None:
    async with lab():
        shell("nft add table inet theirs; nft add chain inet theirs c '{ type filter hook forward priority 5; }'")
        before = shell("nft list table inet theirs")
        async with network(BLOCK, (slot(0), EVERYTHING)):
            assert shell("nft list table inet theirs") == before
        assert shell("nft list table inet theirs") == before
        shell("nft delete table inet theirs")


async def test_names_like_ours_that_no_slot_has_are_left_alone() -> None:
    async with lab(), network(BLOCK) as net:
        shell(f"ip link add rds{BLOCK}-01 type veth peer name rds{BLOCK}-x")
        assert await present(net) == set()
        shell(f"ip link del rds{BLOCK}-01")


@pytest.mark.parametrize(
    "text", ["", "eth0", "rds", "rds3", "rds3-", "rds-3", "rds3-9x", "rds3-01", "rds3-1024", "rds3-٣"]
)
def test_no_slot_has_such_a_link(text: str) -> None:
    assert links.slot_of(text) is None


def test_slot_of_a_link() -> None:
    assert links.slot_of(slot(5).link) == slot(5)


def test_namespace_names_are_taken_away_even_when_mounted_twice() -> None:
    name = f"rdslab-{os.getpid()}"
    kernel.create_namespace(name)
    path = Path("/run/netns") / name
    shell(f"mount --bind {path} {path}")
    kernel.remove_namespace(name)
    kernel.remove_namespace(name)
    assert not path.exists()


async def test_wrong_name_server_is_told() -> None:
    with pytest.raises(NetworkError, match="DNS_SERVER_IP"):
        Network(BLOCK, dns_server="dns.example.com")
