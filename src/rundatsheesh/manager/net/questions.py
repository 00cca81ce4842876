"""DNS messages of guests, which are hostile, and the replies to them. Bytes in, bytes out; no input or output."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address

import dns.exception
import dns.flags
import dns.message
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset

from rundatsheesh.manager.net.policy import Labels

MAX_QUERY_BYTES = 512  # a name of 255 bytes, its type and an OPT record with a cookie leave room to spare
MAX_PARSED_REPLY_BYTES = 16 << 10  # of an upstream reply that is taken apart: a record costs the resolver's loop 10 us
UDP_PAYLOAD = 1232  # bytes of a reply that arrive unfragmented everywhere
MAX_TTL = 3600  # seconds that a guest may keep an answer which opened addresses
HEADER = struct.Struct("!HHHHHH")
META_TYPES = range(128, 255)  # transfers, TKEY, TSIG...: not questions about a name. 255 (ANY) is one.


class BadQueryError(Exception):
    """Not a query that can be answered. `reply` is None where even an error would be an answer to nonsense."""

    def __init__(self, reply: bytes | None) -> None:
        super().__init__()
        self.reply = reply


@dataclass(frozen=True, slots=True)
class Question:
    """One well-formed question of class IN."""

    query: dns.message.QueryMessage
    labels: Labels
    rdtype: dns.rdatatype.RdataType
    payload: int  # bytes of a UDP reply that the guest takes

    def reply(self, rcode: dns.rcode.Rcode) -> bytes:
        """A reply without records. With NOERROR it says that the name has none of this type."""
        return _response(self.query, rcode).to_wire()

    def to_upstream(self) -> dns.message.QueryMessage:
        """The same question in a query that carries nothing else of the guest's."""
        has_edns = self.query.edns >= 0
        return dns.message.make_query(
            self.query.question[0].name,
            self.rdtype,
            use_edns=0 if has_edns else False,
            payload=self.payload if has_edns else None,
            want_dnssec=has_edns and bool(self.query.ednsflags & dns.flags.DO),
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """An upstream reply that is handed out with its lives bounded."""

    response: dns.message.Message
    addresses: tuple[IPv4Address, ...]  # that the name resolves to
    seconds: int  # that the guest may believe so

    def to_wire(self, max_bytes: int) -> bytes:
        """Truncated, and marked so, where it is longer."""
        return self.response.to_wire(max_size=max_bytes, prefer_truncation=True)


def parse_query(wire: bytes) -> Question:
    """Raises BadQueryError, and nothing else, for anything but one question in a plain query."""
    if not HEADER.size <= len(wire) <= MAX_QUERY_BYTES:
        raise BadQueryError(None)
    ident, flags, questions, answers, authorities, additionals = HEADER.unpack_from(wire)
    if flags & dns.flags.QR:
        raise BadQueryError(None)
    if dns.opcode.from_flags(flags) != dns.opcode.QUERY:
        raise BadQueryError(_bare_reply(ident, flags, dns.rcode.NOTIMP))
    if (questions, answers, authorities) != (1, 0, 0) or additionals > 1:
        raise BadQueryError(_bare_reply(ident, flags, dns.rcode.FORMERR))
    try:
        query = dns.message.from_wire(wire)
        asked = query.question[0]
        labels = tuple(label.lower() for label in asked.name.labels[:-1])
    except Exception as error:  # a parser of hostile bytes: whatever it trips over, the guest's query is at fault
        raise BadQueryError(_bare_reply(ident, flags, dns.rcode.FORMERR)) from error
    if not isinstance(query, dns.message.QueryMessage):
        raise BadQueryError(_bare_reply(ident, flags, dns.rcode.FORMERR))
    if asked.rdclass != dns.rdataclass.IN or asked.rdtype in META_TYPES:
        raise BadQueryError(_response(query, dns.rcode.NOTIMP).to_wire())
    payload = min(max(query.payload, 512), UDP_PAYLOAD)
    return Question(query, labels, asked.rdtype, payload)


def matches(query: bytes, reply: bytes) -> bool:
    """Whether `reply` answers our own `query`: same id, same question, a reply."""
    if len(reply) < HEADER.size or reply[:2] != query[:2] or not reply[2] & 0x80:
        return False
    end = _question_end(query)
    return reply[4:6] == query[4:6] and reply[HEADER.size : end].lower() == query[HEADER.size : end].lower()


def readdress(reply: bytes, question: Question) -> bytes:
    """The upstream's reply as the reply to the guest's query."""
    return struct.pack("!H", question.query.id) + reply[2:]


def parse_answer(question: Question, reply: bytes) -> Answer | None:
    """Take an upstream reply apart: the chain from the name to its records, and nothing beside it. None when it is
    malformed or too large."""
    if len(reply) > MAX_PARSED_REPLY_BYTES:
        return None
    try:
        upstream = dns.message.from_wire(reply)
        response = _response(question.query, upstream.rcode())
        response.flags |= upstream.flags & dns.flags.TC
        response.answer, addresses = _chain(question, upstream)
        response.authority = upstream.authority
        for records in response.answer + response.authority:
            records.ttl = min(records.ttl, MAX_TTL)
    except Exception:  # written by whoever runs the name's zone
        return None
    return Answer(response, addresses, max((records.ttl for records in response.answer), default=0))


def _chain(question: Question, upstream: dns.message.Message) -> tuple[list[dns.rrset.RRset], tuple[IPv4Address, ...]]:
    if question.rdtype == dns.rdatatype.ANY or not isinstance(upstream, dns.message.QueryMessage):
        return list(upstream.answer), ()
    chain = upstream.resolve_chaining()
    records = [*chain.cnames, *([chain.answer] if chain.answer else [])]
    if chain.answer is None or question.rdtype != dns.rdatatype.A:
        return records, ()
    return records, tuple(IPv4Address(record.address) for record in chain.answer)


def _response(query: dns.message.QueryMessage, rcode: dns.rcode.Rcode) -> dns.message.Message:
    response = dns.message.make_response(query, recursion_available=True, our_payload=UDP_PAYLOAD)
    response.set_rcode(rcode)
    return response


def _bare_reply(ident: int, flags: int, rcode: int) -> bytes:
    kept = flags & (dns.flags.RD | 0x7800)  # and the opcode
    return HEADER.pack(ident, dns.flags.QR | dns.flags.RA | kept | rcode, 0, 0, 0, 0)


def _question_end(query: bytes) -> int:
    """Offset behind the question of a query that we wrote."""
    offset = HEADER.size
    while query[offset]:
        offset += 1 + query[offset]
    return offset + 5
