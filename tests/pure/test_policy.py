"""What a policy opens, which names it lets resolve, and the text that puts it in force."""

from __future__ import annotations

import itertools
from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rundatsheesh.manager.model import EgressPolicy, Slot
from rundatsheesh.manager.net.policy import (
    EVERYWHERE,
    METADATA_ADDRESSES,
    SPECIAL_RANGES,
    DnsVerdict,
    Element,
    Labels,
    Opening,
    TimedElement,
    add_text,
    add_timed_text,
    delete_text,
    elements_of,
    forget_text,
    judge_name,
    may_open,
    table_text,
)

SLOT = Slot(3 * 1024 + 7)
TABLE = "inet rundatsheesh_3"

networks = st.builds(
    lambda address, length: IPv4Network((address, length), strict=False),
    st.integers(0, 2**32 - 1),
    st.integers(0, 32),
)


def policy(*allow_ips: str, domains: tuple[str, ...] = (), outbound: bool = True) -> EgressPolicy:
    return EgressPolicy(outbound, tuple(IPv4Network(text) for text in allow_ips), domains)


def labels(name: str) -> Labels:
    return tuple(name.encode().split(b"."))


def test_no_outbound_opens_nothing_whatever_the_lists_say() -> None:
    assert Opening.of(policy("0.0.0.0/0", "172.16.0.1/32", outbound=False)) == Opening()


def test_entries_inside_special_ranges_open_as_written() -> None:
    opening = Opening.of(policy("172.16.0.1/32", "10.0.0.0/8", "192.168.4.0/24", "224.0.0.0/3"))
    assert opening.narrow == {IPv4Network(n) for n in ("172.16.0.1/32", "10.0.0.0/8", "192.168.4.0/24", "224.0.0.0/3")}
    assert opening.wide == opening.exact == frozenset()


def test_entries_that_reach_beyond_a_special_range_are_wide() -> None:
    opening = Opening.of(policy("0.0.0.0/0", "172.0.0.0/8", "8.0.0.0/5"))
    assert (opening.narrow, opening.wide) == (frozenset(), {EVERYWHERE})


def test_documentation_ranges_are_public() -> None:
    entries = ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "198.18.0.0/15")
    assert Opening.of(policy(*entries)).wide == {IPv4Network(entry) for entry in entries}


def test_single_addresses_are_also_exact_even_when_a_wider_entry_swallows_them() -> None:
    opening = Opening.of(policy("0.0.0.0/0", "198.51.100.7/32", "10.0.0.1/32"))
    assert opening.exact == {IPv4Network("198.51.100.7/32")}
    assert opening.wide == {EVERYWHERE}


def test_halves_of_the_internet_are_the_public_internet() -> None:
    assert Opening.of(policy("0.0.0.0/1", "128.0.0.0/1")).is_public_internet
    assert not Opening.of(policy("0.0.0.0/1", "128.0.0.0/2")).is_public_internet


@given(st.lists(networks, max_size=12))
def test_opening_covers_exactly_the_entries_without_overlaps(entries: list[IPv4Network]) -> None:
    opening = Opening.of(EgressPolicy(True, tuple(entries), ()))
    for opened in (opening.narrow, opening.wide):
        ordered = sorted(opened)
        assert all(not a.overlaps(b) for a, b in itertools.pairwise(ordered))
    for entry in entries:
        inside = any(entry.subnet_of(special) for special in SPECIAL_RANGES)
        assert any(entry.subnet_of(opened) for opened in (opening.narrow if inside else opening.wide))
    assert all(any(opened.subnet_of(special) for special in SPECIAL_RANGES) for opened in opening.narrow)


@pytest.mark.parametrize("address", [*METADATA_ADDRESSES, *map(IPv4Address, ("10.1.2.3", "127.0.0.1", "172.16.0.1"))])
def test_names_never_open_metadata_or_special_addresses(address: IPv4Address) -> None:
    assert not may_open(address)


def test_names_may_open_public_addresses() -> None:
    assert may_open(IPv4Address("203.0.113.9"))


@pytest.mark.parametrize(
    ("domain", "name", "allowed"),
    [
        ("example.com", "example.com", True),
        ("example.com", "www.example.com", False),
        ("example.com", "badexample.com", False),
        ("*.example.com", "www.example.com", True),
        ("*.example.com", "a.b.example.com", True),
        ("*.example.com", "example.com", False),
        ("*.example.com", "badexample.com", False),
        ("*.example.com", "example.com.evil.net", False),
        ("*.com", "com", False),
        ("_dmarc.example.com", "_dmarc.example.com", True),
    ],
)
def test_domains(domain: str, name: str, allowed: bool) -> None:
    expected = DnsVerdict.FORWARD_AND_OPEN if allowed else DnsVerdict.REFUSE
    assert judge_name(policy(domains=(domain,)), labels(name)) is expected


def test_label_with_a_dot_in_it_is_one_label() -> None:
    rule = policy(domains=("*.example.com", "www.example.org"))
    assert judge_name(rule, (b"x.example", b"com")) is DnsVerdict.REFUSE
    assert judge_name(rule, (b"www.example", b"org")) is DnsVerdict.REFUSE
    assert judge_name(rule, (b"a.b", b"example", b"com")) is DnsVerdict.FORWARD_AND_OPEN


def test_root_name_matches_nothing() -> None:
    assert judge_name(policy(domains=("*.example.com",)), ()) is DnsVerdict.REFUSE


def test_names_resolve_freely_only_with_the_public_internet() -> None:
    assert judge_name(policy("0.0.0.0/0"), labels("any.thing")) is DnsVerdict.FORWARD
    assert judge_name(policy("1.1.1.1/32"), labels("any.thing")) is DnsVerdict.REFUSE
    assert judge_name(policy("0.0.0.0/0", outbound=False), labels("any.thing")) is DnsVerdict.REFUSE
    assert judge_name(policy(domains=("a.b",), outbound=False), labels("a.b")) is DnsVerdict.REFUSE


def test_elements_name_the_link_and_nothing_else_of_the_vm() -> None:
    assert elements_of(SLOT, policy("10.0.0.0/8", "1.2.3.4/32")) == {
        Element("guests", "rds3-7", IPv4Network("172.16.12.7/32")),
        Element("narrow", "rds3-7", IPv4Network("10.0.0.0/8")),
        Element("wide", "rds3-7", IPv4Network("1.2.3.4/32")),
        Element("exact", "rds3-7", IPv4Network("1.2.3.4/32")),
    }


def test_texts_of_elements() -> None:
    narrow = Element("narrow", "rds3-7", IPv4Network("10.0.0.0/8"))
    resolved = Element("resolved", "rds3-7", IPv4Network("1.2.3.4/32"))
    assert add_text(TABLE, [narrow]) == f'add element {TABLE} narrow {{ "rds3-7" . 10.0.0.0/8 }}\n'
    assert delete_text(TABLE, [narrow]) == f'delete element {TABLE} narrow {{ "rds3-7" . 10.0.0.0/8 }}\n'
    assert add_timed_text(TABLE, [TimedElement(resolved, 30)]) == (
        f'add element {TABLE} resolved {{ "rds3-7" . 1.2.3.4 timeout 30s }}\n'
    )
    assert forget_text(TABLE, [resolved]).splitlines() == [
        f'{verb} element {TABLE} resolved {{ "rds3-7" . 1.2.3.4 }}' for verb in ("add", "delete")
    ]
    assert add_text(TABLE, []) == ""


def test_table_is_about_the_links_of_its_own_block_only() -> None:
    text = table_text(3, 5353)
    assert text.startswith(f"table {TABLE} {{")
    assert '"rds3-*"' in text
    assert "172.16.12.0/22" in text  # the 1024 addresses of block 3
    assert "172.16.0.0/22" in table_text(0, 5353)
