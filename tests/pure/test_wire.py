"""The protocol between two honest ends, however the bytes are cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rundatsheesh.agent import wire

NONCE = bytes(range(16))


def joined() -> tuple[wire.HostEnd, wire.GuestEnd]:
    """Two ends that have greeted."""
    host, guest = wire.HostEnd(NONCE), wire.GuestEnd(hunting=False)
    (sync,) = guest.receive(host.greeting())
    (hello,) = host.receive(guest.hello(sync.payload, b"{}"))
    assert (sync.kind, sync.payload, hello.kind, hello.payload) == (wire.SYNC, NONCE, wire.HELLO, b"{}")
    return host, guest


def opened() -> tuple[wire.HostEnd, wire.GuestEnd, int]:
    host, guest = joined()
    call, frames = host.request(b"{}")
    guest.receive(frames)
    return host, guest, call


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    """The data in pieces of these sizes, the rest in one."""
    pieces = []
    for size in sizes:
        pieces.append(data[:size])
        data = data[size:]
    return [*pieces, data]


@given(stale=st.binary(max_size=3000), sizes=st.lists(st.integers(0, 300), max_size=60))
def test_the_host_skips_what_precedes_the_greeting(stale: bytes, sizes: list[int]) -> None:
    host, guest = wire.HostEnd(NONCE), wire.GuestEnd(hunting=False)
    (sync,) = guest.receive(host.greeting())
    events = [e for piece in cut(stale + guest.hello(sync.payload, b'{"a":1}'), sizes) for e in host.receive(piece)]
    assert [(event.kind, event.payload) for event in events] == [(wire.HELLO, b'{"a":1}')]


@given(stale=st.binary(max_size=3000), sizes=st.lists(st.integers(0, 70_000), max_size=60))
def test_a_hunting_guest_finds_the_greeting(stale: bytes, sizes: list[int]) -> None:
    guest = wire.GuestEnd(hunting=True)
    events = [event for piece in cut(stale + wire.HostEnd(NONCE).greeting(), sizes) for event in guest.receive(piece)]
    assert [(event.kind, event.payload) for event in events] == [(wire.SYNC, NONCE)]


@given(st.data())
def test_a_greeting_is_understood_after_any_torn_frame(data: st.DataObject) -> None:
    host, guest, call = opened()
    _, request = host.request(bytes(data.draw(st.integers(0, 200_000))))
    frames = request + host.data(call, wire.FILE, wire.MAGIC * 9) + host.end(call)
    torn = frames[: data.draw(st.integers(0, len(frames)))]
    events = [*_receive(guest, torn), *_receive(guest, wire.HostEnd(NONCE).greeting())]
    assert events[-1].kind == wire.SYNC
    assert guest.open_calls == 0


def _receive(guest: wire.GuestEnd, data: bytes) -> list[wire.Event]:
    """As the agent does on a device: what makes no sense is skipped up to the next greeting."""
    try:
        return guest.receive(data)
    except wire.ProtocolError:
        hunting = wire.GuestEnd(hunting=True)
        guest.__dict__.update(hunting.__dict__)
        return guest.receive(data)


@given(
    body=st.integers(0, 3 * wire.MAX_PAYLOAD).map(lambda n: b"x" * n),
    sizes=st.lists(st.integers(0, 50_000), max_size=20),
)
def test_requests_of_any_size_arrive_whole(body: bytes, sizes: list[int]) -> None:
    host, guest = joined()
    call, frames = host.request(body)
    events = [event for piece in cut(frames, sizes) for event in guest.receive(piece)]
    assert [(event.kind, event.call, event.payload) for event in events] == [(wire.REQUEST, call, body)]


@given(
    chunks=st.lists(st.tuples(st.sampled_from([wire.STDOUT, wire.STDERR]), st.binary(min_size=1)), max_size=20),
    sizes=st.lists(st.integers(0, 40), max_size=40),
)
def test_data_arrives_in_order(chunks: list[tuple[int, bytes]], sizes: list[int]) -> None:
    host, guest, call = opened()
    sent = b"".join(guest.data(call, stream, chunk) for stream, chunk in chunks) + guest.reply(call, b"{}")
    events = [event for piece in cut(sent, sizes) for event in host.receive(piece)]
    assert [(event.stream, event.payload) for event in events[:-1]] == chunks
    assert (events[-1].kind, host.open_calls, guest.open_calls) == (wire.REPLY, 0, 0)


@given(st.lists(st.integers(1, wire.MAX_CHUNK), min_size=1, max_size=30))
def test_credit_is_never_exceeded_and_never_lost(sizes: list[int]) -> None:
    host, guest, call = opened()
    for size in sizes:
        while guest.credit(call) < size:
            taken = wire.WINDOW - guest.credit(call)
            guest.receive(host.grant(call, taken))
            assert guest.credit(call) == wire.WINDOW
        host.receive(guest.data(call, wire.STDOUT, bytes(size)))
    with pytest.raises(ValueError):
        host.grant(call, wire.WINDOW + 1)


def test_data_over_the_credit_is_not_sent() -> None:
    _, guest, call = opened()
    while guest.credit(call) >= wire.MAX_CHUNK:
        guest.data(call, wire.STDOUT, bytes(wire.MAX_CHUNK))
    with pytest.raises(ValueError):
        guest.data(call, wire.STDOUT, bytes(guest.credit(call) + 1))
    with pytest.raises(ValueError):
        guest.data(call, wire.STDOUT, b"")


def test_calls_are_separate() -> None:
    host, guest = joined()
    calls = []
    for _ in range(wire.MAX_CALLS):
        call, frames = host.request(b"{}")
        guest.receive(frames)
        calls.append(call)
    with pytest.raises(ValueError):
        host.request(b"{}")
    guest.data(calls[0], wire.STDOUT, bytes(1000))
    assert guest.credit(calls[1]) == wire.WINDOW
    host.receive(guest.error(calls[3], b"{}"))
    assert host.request(b"{}")[0] == calls[-1] + 1


def test_what_crosses_the_answer_is_ignored() -> None:
    host, guest, call = opened()
    answer = guest.reply(call, b"{}")
    crossing = host.data(call, wire.FILE, b"late") + host.end(call) + host.cancel(call) + host.grant(call, 0)
    assert guest.receive(crossing) == []
    assert [event.kind for event in host.receive(answer)] == [wire.REPLY]
    assert (host.cancel(call), host.grant(call, 5), host.credit(call)) == (b"", b"", 0)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=20,
    )
)
def test_messages_survive(value: object) -> None:
    assert wire.decode(wire.encode({"value": value})) == {"value": value}


def test_names_that_are_not_utf8_survive() -> None:
    name = b"a\xff".decode(errors="surrogateescape")
    assert wire.decode(wire.encode({"name": name}))["name"].encode(errors="surrogateescape") == b"a\xff"


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{",
        b"\xff{}",
        b"[]",
        b"3",
        b"null",
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":1e999}',
        b'{"a":' + b"9" * 5000 + b"}",
        b'{"a":' + b"[" * 30_000 + b"]" * 30_000 + b"}",
    ],
)
def test_messages_that_are_none(payload: bytes) -> None:
    with pytest.raises(wire.ProtocolError):
        wire.decode(payload)
