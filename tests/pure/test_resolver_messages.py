"""DNS messages: hostile queries, replies that are no answers, and answers with their lives bounded."""

from __future__ import annotations

import contextlib
import struct
from ipaddress import IPv4Address
from pathlib import Path

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rundatsheesh.manager.net.questions import (
    MAX_TTL,
    BadQueryError,
    matches,
    parse_answer,
    parse_query,
    readdress,
)
from rundatsheesh.manager.net.upstream import Upstream, parse_resolv_conf, parse_server


def query(name: str = "www.example.com", kind: str = "A", **options: object) -> dns.message.QueryMessage:
    return dns.message.make_query(name, kind, **options)  # type: ignore[arg-type]


def answer_to(asked: dns.message.Message, *records: tuple[str, int, str, str]) -> bytes:
    response = dns.message.make_response(asked)
    for name, ttl, kind, data in records:
        response.answer.append(dns.rrset.from_text(name, ttl, "IN", kind, *data.split()))
    return response.to_wire()


def rcode_of(wire: bytes | None) -> int:
    assert wire is not None
    return dns.message.from_wire(wire).rcode()


def refusal_of(wire: bytes) -> bytes | None:
    with pytest.raises(BadQueryError) as caught:
        parse_query(wire)
    return caught.value.reply


def test_plain_question() -> None:
    question = parse_query(query("WWW.Example.COM").to_wire())
    assert question.labels == (b"www", b"example", b"com")
    assert (question.rdtype, question.payload) == (dns.rdatatype.A, 512)


@pytest.mark.parametrize(("offered", "taken"), [(100, 512), (900, 900), (1232, 1232), (65535, 1232)])
def test_payload_is_bounded(offered: int, taken: int) -> None:
    assert parse_query(query(use_edns=0, payload=offered).to_wire()).payload == taken


@given(st.binary(max_size=700))
@example(b"")
@example(b"\x00" * 12)
@example(struct.pack("!HHHHHH", 1, 0x100, 1, 0, 0, 0) + b"\xc0\x0c\x00\x01\x00\x01")  # a name that points at itself
def test_any_bytes_are_a_question_or_refused(wire: bytes) -> None:
    try:
        parse_query(wire)
    except BadQueryError as bad:
        assert bad.reply is None or bad.reply[:2] == wire[:2]


@given(st.data())
def test_damaged_queries_are_a_question_or_refused(data: st.DataObject) -> None:
    wire = bytearray(query(use_edns=0).to_wire())
    for _ in range(data.draw(st.integers(1, 6))):
        wire[data.draw(st.integers(0, len(wire) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(BadQueryError):
        parse_query(bytes(wire)).reply(dns.rcode.REFUSED)


def test_what_is_no_query_gets_no_reply() -> None:
    assert refusal_of(dns.message.make_response(query()).to_wire()) is None
    assert refusal_of(b"x" * 600) is None
    assert refusal_of(b"short") is None


def test_other_operations_are_not_implemented() -> None:
    update = bytearray(query().to_wire())
    update[2] |= 5 << 3
    assert rcode_of(refusal_of(bytes(update))) == dns.rcode.NOTIMP
    for kind in ("AXFR", "IXFR", "TSIG"):
        assert rcode_of(refusal_of(query(kind=kind).to_wire())) == dns.rcode.NOTIMP
    chaos = dns.message.make_query("version.bind", "TXT", "CH")
    assert rcode_of(refusal_of(chaos.to_wire())) == dns.rcode.NOTIMP


@pytest.mark.parametrize("counts", [(0, 0, 0, 0), (2, 0, 0, 0), (1, 1, 0, 0), (1, 0, 1, 0), (1, 0, 0, 2), (65535,) * 4])
def test_wrong_counts_are_format_errors(counts: tuple[int, int, int, int]) -> None:
    wire = query().to_wire()
    damaged = wire[:4] + struct.pack("!HHHH", *counts) + wire[12:]
    assert rcode_of(refusal_of(damaged)) == dns.rcode.FORMERR


def test_reply_without_records_repeats_the_question() -> None:
    asked = query(use_edns=0)
    reply = dns.message.from_wire(parse_query(asked.to_wire()).reply(dns.rcode.REFUSED))
    assert asked.is_response(reply)
    assert reply.flags & dns.flags.RA


def test_upstream_query_carries_nothing_of_the_guests_but_the_question() -> None:
    secret = dns.edns.GenericOption(65001, b"smuggled")
    asked = query(use_edns=0, options=[secret], ednsflags=dns.flags.DO)
    sent = parse_query(asked.to_wire()).to_upstream()
    assert b"smuggled" not in sent.to_wire()
    assert sent.question == asked.question
    assert sent.ednsflags & dns.flags.DO
    assert parse_query(query().to_wire()).to_upstream().edns == -1


def test_only_a_reply_to_the_same_question_and_id_matches() -> None:
    asked = query()
    wire = asked.to_wire()
    good = answer_to(asked, ("www.example.com.", 60, "A", "203.0.113.1"))
    assert matches(wire, good)
    assert not matches(wire, wire)
    assert not matches(wire, bytes([good[0] ^ 1]) + good[1:])
    assert not matches(wire, answer_to(query("other.example.com", id=asked.id)))
    assert not matches(wire, answer_to(query(kind="TXT", id=asked.id)))
    assert not matches(wire, good[:20])
    assert not matches(wire, b"")


@given(st.binary(max_size=100))
def test_any_bytes_match_or_not(reply: bytes) -> None:
    matches(query(id=0).to_wire(), reply)


def test_readdressed_reply_has_the_guests_id() -> None:
    asked = query(id=7)
    question = parse_query(asked.to_wire())
    upstream = question.to_upstream()
    assert dns.message.from_wire(readdress(answer_to(upstream), question)).id == 7


def test_answer_follows_the_chain_and_drops_what_is_beside_it() -> None:
    question = parse_query(query().to_wire())
    reply = answer_to(
        question.to_upstream(),
        ("www.example.com.", 5, "CNAME", "cdn.example.net."),
        ("cdn.example.net.", 90_000, "A", "203.0.113.1 203.0.113.2"),
        ("unasked.example.org.", 60, "A", "203.0.113.66"),
    )
    answer = parse_answer(question, reply)
    assert answer is not None
    assert set(answer.addresses) == {IPv4Address("203.0.113.1"), IPv4Address("203.0.113.2")}
    assert answer.seconds == MAX_TTL
    told = dns.message.from_wire(answer.to_wire(512))
    assert question.query.is_response(told)
    assert {records.ttl for records in told.answer} == {5, MAX_TTL}
    assert "unasked" not in told.to_text()


def test_nothing_resolves_to_nothing() -> None:
    question = parse_query(query().to_wire())
    absent = dns.message.make_response(question.to_upstream())
    absent.set_rcode(dns.rcode.NXDOMAIN)
    answer = parse_answer(question, absent.to_wire())
    assert answer is not None
    assert (answer.addresses, answer.response.rcode()) == ((), dns.rcode.NXDOMAIN)


def test_truncated_reply_stays_truncated() -> None:
    question = parse_query(query().to_wire())
    cut = dns.message.make_response(question.to_upstream())
    cut.flags |= dns.flags.TC
    answer = parse_answer(question, cut.to_wire())
    assert answer is not None
    assert dns.message.from_wire(answer.to_wire(512)).flags & dns.flags.TC


def test_circular_chain_is_malformed() -> None:
    question = parse_query(query("a.example.com").to_wire())
    reply = answer_to(
        question.to_upstream(),
        ("a.example.com.", 5, "CNAME", "b.example.com."),
        ("b.example.com.", 5, "CNAME", "a.example.com."),
    )
    assert parse_answer(question, reply) is None


@given(st.binary(max_size=300))
def test_any_reply_is_an_answer_or_none(tail: bytes) -> None:
    question = parse_query(query().to_wire())
    head = bytearray(answer_to(question.to_upstream(), ("www.example.com.", 60, "A", "203.0.113.1")))
    parse_answer(question, bytes(head[: len(head) - 8]) + tail)


def test_long_answer_is_truncated_for_udp() -> None:
    question = parse_query(query().to_wire())
    addresses = " ".join(f"203.0.113.{i}" for i in range(1, 100))
    answer = parse_answer(question, answer_to(question.to_upstream(), ("www.example.com.", 60, "A", addresses)))
    assert answer is not None
    short = answer.to_wire(512)
    assert len(short) <= 512
    assert dns.message.from_wire(short).flags & dns.flags.TC
    assert not dns.message.from_wire(answer.to_wire(65535)).flags & dns.flags.TC


@pytest.mark.parametrize(
    ("text", "server"),
    [
        ("9.9.9.9", ("9.9.9.9", 53)),
        ("9.9.9.9:5353", ("9.9.9.9", 5353)),
        ("::1", ("::1", 53)),
        ("[::1]:5353", ("::1", 5353)),
    ],
)
def test_configured_server(text: str, server: tuple[str, int]) -> None:
    assert parse_server(text) == server


@pytest.mark.parametrize("text", ["dns.example.com", "9.9.9.9:", "9.9.9.9:0", "9.9.9.9:65536", "9.9.9.9:x", "x:53"])
def test_wrong_server_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Upstream(text)


def test_resolv_conf() -> None:
    text = "# a comment\nsearch x\nnameserver 127.0.0.53\n nameserver fe80::1%eth0 \nnameserver nonsense\nnameserver\n"
    assert parse_resolv_conf(text) == [("127.0.0.53", 53), ("fe80::1%eth0", 53)]
    assert len(parse_resolv_conf("nameserver 1.1.1.1\n" * 5)) == 3


def test_missing_resolv_conf_names_no_server(tmp_path: Path) -> None:
    assert Upstream("", tmp_path / "absent")  # found out at the question, not before
