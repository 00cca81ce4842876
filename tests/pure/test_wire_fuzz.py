"""Each end against a peer that lies: it raises ProtocolError, or goes on within its limits. Nothing else."""

from __future__ import annotations

import struct

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_wire import NONCE, joined, opened

from rundatsheesh.agent import wire


def frame(kind: int, call: int, payload: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack(">BII", kind, call, len(payload) if length is None else length) + payload


# Frames that are nearly right: ids that exist and ids that do not, lengths that fit and lengths that do not.
_FRAMES = st.builds(
    frame,
    kind=st.integers(0, 12) | st.integers(0, 255),
    call=st.integers(0, 4) | st.integers(0, 0xFFFFFFFF),
    payload=st.binary(max_size=40) | st.integers(0, wire.MAX_PAYLOAD).map(bytes),
    length=st.none() | st.none() | st.integers(0, 0xFFFFFFFF),
)
_STREAMS = st.lists(_FRAMES | st.binary(max_size=30), max_size=30)


def survives(end: wire.HostEnd | wire.GuestEnd, pieces: list[bytes]) -> None:
    try:
        for piece in pieces:
            end.receive(piece)
            assert len(end._buffer) <= wire.MAX_PAYLOAD + 64 + len(piece)
            assert end.open_calls <= wire.MAX_CALLS
    except wire.ProtocolError:
        pass


@settings(max_examples=400)
@given(_STREAMS)
@example([frame(wire.DATA, 1, b"", 0xFFFFFFFF)])
def test_the_host_survives_a_lying_guest(pieces: list[bytes]) -> None:
    host, _, _ = opened()
    host.request(b"{}")
    survives(host, pieces)


@settings(max_examples=400)
@given(_STREAMS)
def test_the_guest_survives_a_lying_host(pieces: list[bytes]) -> None:
    _, guest, _ = opened()
    survives(guest, pieces)


@given(_STREAMS)
def test_nothing_but_the_nonce_greets(pieces: list[bytes]) -> None:
    host = wire.HostEnd(NONCE)
    survives(host, pieces)
    assert not host._greeted


def sent_data(size: int) -> bytes:
    return frame(wire.DATA, 1, b"\x01" + bytes(size))


@pytest.mark.parametrize(
    "lie",
    [
        frame(wire.DATA, 1, b"", wire.MAX_PAYLOAD + 1),
        frame(wire.REPLY, 1, b"", 1 << 31),
        frame(wire.DATA, 2, b"\x01x"),
        frame(wire.REPLY, 0, b"{}"),
        frame(wire.REPLY, 7, b"{}"),
        frame(wire.REPLY, 1, b"{}") * 2,
        frame(wire.REPLY, 1, b"{}") + frame(wire.DATA, 1, b"\x01x"),
        frame(wire.REPLY, 1, b"{}") + frame(wire.WINDOW_MORE, 1, b"\0\0\0\1"),
        frame(wire.END, 1) + frame(wire.DATA, 1, b"\x01x"),
        frame(wire.END, 1) * 2,
        frame(wire.DATA, 1, b"\x01"),
        frame(wire.DATA, 1, b""),
        5 * sent_data(wire.MAX_CHUNK),
        frame(wire.WINDOW_MORE, 1, b"\0\0\0\1"),
        frame(wire.WINDOW_MORE, 1, b"\0\0"),
        frame(wire.WINDOW_MORE, 1, b"\xff\xff\xff\xff"),
        frame(wire.REQUEST, 1, b"{}"),
        frame(wire.CANCEL, 1),
        frame(wire.SYNC, 0, wire.MAGIC + NONCE),
        frame(wire.HELLO, 0, b"{}"),
        frame(99, 1),
        b"garbage!!!",
    ],
)
def test_lies_that_the_host_knows(lie: bytes) -> None:
    host, _, call = opened()
    assert call == 1
    with pytest.raises(wire.ProtocolError):
        host.receive(lie)


@pytest.mark.parametrize(
    "lie",
    [
        frame(wire.REQUEST, 1, b"{}"),
        frame(wire.REQUEST, 5, b"{}") + frame(wire.REQUEST, 4, b"{}"),
        frame(wire.REQUEST, 0, b"{}"),
        frame(wire.DATA, 9, b"\x01x"),
        frame(wire.CANCEL, 9),
        frame(wire.REQUEST_PART, 2, b"x") + frame(wire.REQUEST, 3, b"x"),
        frame(wire.REQUEST_PART, 2, b"x") + frame(wire.CANCEL, 1),
        frame(wire.REQUEST_PART, 2, bytes(wire.MAX_PAYLOAD)) * (wire.MAX_REQUEST // wire.MAX_PAYLOAD + 1),
        b"".join(frame(wire.REQUEST, n, b"{}") for n in range(2, wire.MAX_CALLS + 2)),
        frame(wire.SYNC, 0, wire.MAGIC),
        frame(wire.SYNC, 1, wire.MAGIC + NONCE),
        frame(wire.SYNC, 0, NONCE + wire.MAGIC),
        frame(wire.REPLY, 1, b"{}"),
        frame(wire.REQUEST, 2, b"", wire.MAX_PAYLOAD + 1),
        5 * sent_data(wire.MAX_CHUNK),
    ],
)
def test_lies_that_the_guest_knows(lie: bytes) -> None:
    _, guest, _ = opened()
    with pytest.raises(wire.ProtocolError):
        guest.receive(lie)


def test_a_stream_must_begin_with_a_greeting() -> None:
    with pytest.raises(wire.ProtocolError):
        wire.GuestEnd(hunting=False).receive(frame(wire.REQUEST, 1, b"{}"))


def test_stale_bytes_have_an_end() -> None:
    host = wire.HostEnd(NONCE)
    with pytest.raises(wire.ProtocolError):
        for _ in range(wire.MAX_STALE // wire.MAX_PAYLOAD + 2):
            host.receive(bytes(wire.MAX_PAYLOAD))


def test_zeros_between_frames_cost_no_more_than_themselves() -> None:
    """With a copy of the rest for each of them, this would take minutes."""
    host, _, _ = opened()
    data = (b"\0" + frame(wire.DATA, 1, b"\x01x")) * wire.WINDOW
    assert len(host.receive(data)) == wire.WINDOW


def test_a_greeting_has_a_size() -> None:
    host = wire.HostEnd(NONCE)
    with pytest.raises(wire.ProtocolError):
        host.receive(wire.MAGIC + NONCE + b"\xff\xff\xff\xff")


def test_a_second_greeting_voids_the_calls() -> None:
    _, guest = joined()
    guest.receive(frame(wire.REQUEST, 8, b"{}"))
    guest.receive(wire.HostEnd(bytes(16)).greeting())
    assert guest.open_calls == 0
    assert [event.call for event in guest.receive(frame(wire.REQUEST, 1, b"{}"))] == [1]
