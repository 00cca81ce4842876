"""What is read back from nftables, in the words of its JSON."""

from __future__ import annotations

import json
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from rundatsheesh.manager.net.mirror import Lease, VmRules, read_listing, timed_elements
from rundatsheesh.manager.net.policy import Element


def listing(**sets: list[Any]) -> bytes:
    found = [{"set": {"family": "inet", "name": name, "elem": elements}} for name, elements in sets.items()]
    return json.dumps({"nftables": [{"metainfo": {}}, {"table": {"name": "t"}}, *found]}).encode()


def timed(link: str, address: str, expires: int) -> dict[str, Any]:
    return {"elem": {"val": {"concat": [link, address]}, "timeout": 60, "expires": expires}}


def test_empty_table() -> None:
    assert read_listing(listing(guests=[]), 0) == {}
    assert read_listing(b'{"nftables": [{"set": {"name": "guests"}}]}', 0) == {}


def test_elements_of_every_kind() -> None:
    found = read_listing(
        listing(
            guests=[{"concat": ["rds3-7", "172.16.12.7"]}],
            narrow=[{"concat": ["rds3-7", {"prefix": {"addr": "10.0.0.0", "len": 8}}]}],
            resolved=[timed("rds3-7", "1.2.3.4", 20)],
            opened=[timed("rds3-7", "1.2.3.4", 500), timed("rds3-7", "1.2.3.5", 40)],
            special=[{"prefix": {"addr": "0.0.0.0", "len": 8}}],
        ),
        now=1000,
    )
    assert found == {
        "rds3-7": VmRules(
            frozenset(
                {
                    Element("guests", "rds3-7", IPv4Network("172.16.12.7/32")),
                    Element("narrow", "rds3-7", IPv4Network("10.0.0.0/8")),
                }
            ),
            {IPv4Address("1.2.3.4"): Lease(1020, 1500), IPv4Address("1.2.3.5"): Lease(0, 1040)},
        )
    }


def test_leases_become_elements_that_expire_when_they_do() -> None:
    leases = {IPv4Address("1.2.3.4"): Lease(1019.9, 1500), IPv4Address("1.2.3.5"): Lease(0, 1000.5)}
    found = [(str(e.element), e.element.set, e.seconds) for e in timed_elements("l", leases, 1000)]
    assert found == [('"l" . 1.2.3.4', "resolved", 20), ('"l" . 1.2.3.4', "opened", 500)]


def test_expired_leases_are_dropped() -> None:
    rules = VmRules(leases={IPv4Address("1.2.3.4"): Lease(0, 10), IPv4Address("1.2.3.5"): Lease(0, 20)})
    rules.drop_expired(15)
    assert set(rules.leases) == {IPv4Address("1.2.3.5")}
