"""The protocol between host and guest: bytes in, events out. No I/O, no clock; both ends use this file.

A frame is type u8, call u32, length u32 (big-endian), then `length` bytes. The host starts calls, each with a higher
id than the one before; the guest ends each with exactly one REPLY or ERROR. In between both directions carry DATA
(a stream number, then bytes) under a credit of WINDOW bytes per call and direction, which the receiver renews as it
consumes, so that a slow reader stops its writer and nobody else. END closes the sender's direction. Frames of the host
that cross a call's end are ignored by the guest; everything else that is out of order is a ProtocolError, after which
the stream is useless.

A stream may carry bytes of an earlier user. The host therefore opens with PADDING, which completes whatever frame was
torn (a zero byte between frames means nothing), then SYNC with a nonce; the guest forgets all calls and answers HELLO
with the same nonce, and the host skips everything before that.
"""

from __future__ import annotations

import json
import re
from struct import Struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

PROTOCOL = 1

SYNC, HELLO, REQUEST_PART, REQUEST, REPLY, ERROR, DATA, WINDOW_MORE, END, CANCEL = range(1, 11)

STDOUT, STDERR, RESULT, SCRIPT_ERROR, FILE, SLOT = range(1, 7)  # stream numbers of DATA

MAX_PAYLOAD = 1 << 16
MAX_CHUNK = MAX_PAYLOAD - 1  # of DATA, whose first byte is the stream
MAX_REQUEST = 16 << 20  # a request may come in parts
MAX_CALLS = 256
MAX_STALE = 8 << 20  # bytes of an earlier user that the host skips at most
WINDOW = 256 << 10

MAGIC = b"\x00rds-agent-sync\xff"
NONCE_BYTES = 16
PADDING = bytes(MAX_PAYLOAD)

_HEADER = Struct(">BII")
_U32 = Struct(">I")
_MAX_CALL_ID = 0xFFFFFFFF
_CONTENT = re.compile(rb"[^\0]")  # found without a copy: a peer may put a zero between any two frames
_SYNC_PAYLOAD = len(MAGIC) + NONCE_BYTES
# What each end may receive, and how much payload at most.
_FROM_HOST = {
    SYNC: _SYNC_PAYLOAD,
    REQUEST_PART: MAX_PAYLOAD,
    REQUEST: MAX_PAYLOAD,
    DATA: MAX_PAYLOAD,
    WINDOW_MORE: 4,
    END: 0,
    CANCEL: 0,
}
_FROM_GUEST = {REPLY: MAX_PAYLOAD, ERROR: MAX_PAYLOAD, DATA: MAX_PAYLOAD, WINDOW_MORE: 4, END: 0}


class ProtocolError(Exception):
    """The peer broke the protocol. The message is made of our words and numbers only, never of the peer's bytes."""


class Event:
    """A frame that concerns the caller. `payload` is the body, for DATA without the stream number."""

    __slots__ = ("call", "kind", "payload", "stream")

    def __init__(self, kind: int, call: int, payload: bytes, stream: int = 0) -> None:
        self.kind = kind
        self.call = call
        self.payload = payload
        self.stream = stream

    def __repr__(self) -> str:
        return f"Event(kind={self.kind}, call={self.call}, stream={self.stream}, {len(self.payload)} bytes)"


class _Call:
    __slots__ = ("in_credit", "in_ended", "out_credit", "out_ended")

    def __init__(self) -> None:
        self.out_credit = WINDOW
        self.in_credit = WINDOW
        self.out_ended = False
        self.in_ended = False


class _End:
    """What both ends have in common: the open calls and the bytes not yet understood."""

    _limits: dict[int, int]

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._calls: dict[int, _Call] = {}
        self._last_call = 0

    @property
    def open_calls(self) -> int:
        return len(self._calls)

    def credit(self, call: int) -> int:
        """Bytes of data that may be sent on the call now; 0 once it has ended."""
        state = self._calls.get(call)
        return 0 if state is None or state.out_ended else state.out_credit

    def data(self, call: int, stream: int, chunk: bytes | memoryview) -> bytes:
        """A frame with 1 to MAX_CHUNK bytes, within the credit; ValueError otherwise."""
        state = self._calls[call]
        size = len(chunk)
        if state.out_ended or not 0 < size <= min(MAX_CHUNK, state.out_credit):
            raise ValueError("data after the end, empty, over the frame or over the credit")
        state.out_credit -= size
        return b"".join((_HEADER.pack(DATA, call, size + 1), bytes((stream,)), chunk))

    def end(self, call: int) -> bytes:
        """Nothing more follows in our direction."""
        self._calls[call].out_ended = True
        return _HEADER.pack(END, call, 0)

    def grant(self, call: int, size: int) -> bytes:
        """Renew the peer's credit by `size` consumed bytes. Empty for a call that is over."""
        state = self._calls.get(call)
        if state is None or state.in_ended or size == 0:
            return b""
        state.in_credit += size
        if state.in_credit > WINDOW:
            raise ValueError("granted more than was consumed")
        return _frame(WINDOW_MORE, call, _U32.pack(size))

    def _frames(self) -> list[Event]:
        """The events of all frames that are complete; keeps the rest."""
        events: list[Event] = []
        buffer = self._buffer
        position = 0
        while True:
            content = _CONTENT.search(buffer, position)
            position = content.start() if content else len(buffer)
            if len(buffer) - position < _HEADER.size:
                break
            kind, call, length = _HEADER.unpack_from(buffer, position)
            if length > self._limits.get(kind, -1):
                raise ProtocolError(f"type {kind} with {length} bytes")
            body = position + _HEADER.size
            if len(buffer) - body < length:
                break
            position = body + length
            event = self._on_frame(kind, call, bytes(memoryview(buffer)[body:position]))
            if event is not None:
                events.append(event)
        del buffer[:position]
        return events

    def _on_frame(self, kind: int, call: int, payload: bytes) -> Event | None:
        raise NotImplementedError

    def _on_call_frame(self, state: _Call, kind: int, call: int, payload: bytes) -> Event:
        """DATA, WINDOW_MORE or END of an open call."""
        if kind == DATA:
            size = len(payload) - 1
            if state.in_ended or not 0 < size <= state.in_credit:
                raise ProtocolError(f"{size} bytes of data after the end or over the credit")
            state.in_credit -= size
            return Event(DATA, call, payload[1:], payload[0])
        if kind == WINDOW_MORE:
            if len(payload) != _U32.size:
                raise ProtocolError("a torn credit")
            (size,) = _U32.unpack(payload)
            if not 0 < size <= WINDOW - state.out_credit:
                raise ProtocolError(f"a credit of {size} bytes that were never sent")
            state.out_credit += size
            return Event(kind, call, b"")
        if state.in_ended:
            raise ProtocolError("a second end")
        state.in_ended = True
        return Event(kind, call, b"")


class HostEnd(_End):
    """The host's end. `greeting()` goes first; `receive` gives a HELLO event first, then those of calls."""

    _limits = _FROM_GUEST

    def __init__(self, nonce: bytes) -> None:
        super().__init__()
        self._nonce = nonce
        self._greeted = False
        self._stale = 0

    def greeting(self) -> bytes:
        return PADDING + _frame(SYNC, 0, MAGIC + self._nonce)

    def receive(self, data: bytes) -> list[Event]:
        """Take bytes of the guest; ProtocolError when they are not of this protocol."""
        self._buffer += data
        if self._greeted:
            return self._frames()
        hello = self._find_hello()
        if hello is None:
            return []
        self._greeted = True
        return [hello, *self._frames()]

    def request(self, body: bytes) -> tuple[int, bytes]:
        """Open a call: its id and the frames to send. ValueError when `body` or the number of calls is over the limit.

        The frames must not be interleaved with others.
        """
        if len(body) > MAX_REQUEST or len(self._calls) >= MAX_CALLS or self._last_call >= _MAX_CALL_ID:
            raise ValueError("the request is too large, or too many calls are open")
        self._last_call += 1
        call = self._last_call
        self._calls[call] = _Call()
        last = max(0, len(body) - 1) // MAX_PAYLOAD * MAX_PAYLOAD
        parts = [_frame(REQUEST_PART, call, body[at : at + MAX_PAYLOAD]) for at in range(0, last, MAX_PAYLOAD)]
        return call, b"".join([*parts, _frame(REQUEST, call, body[last:])])

    def cancel(self, call: int) -> bytes:
        """Ask the guest to give up; the call stays open until it answers. Empty for a call that is over."""
        return _HEADER.pack(CANCEL, call, 0) if call in self._calls else b""

    def _find_hello(self) -> Event | None:
        mark = MAGIC + self._nonce
        at = self._buffer.find(mark)
        if at < 0:
            skipped = max(0, len(self._buffer) - len(mark) + 1)
            self._skip(skipped)
            return None
        start = at + len(mark)
        if len(self._buffer) < start + _U32.size:
            return None
        (length,) = _U32.unpack_from(self._buffer, start)
        if length > MAX_PAYLOAD:
            raise ProtocolError(f"a greeting of {length} bytes")
        body = start + _U32.size
        if len(self._buffer) < body + length:
            return None
        event = Event(HELLO, 0, bytes(memoryview(self._buffer)[body : body + length]))
        del self._buffer[: body + length]
        return event

    def _skip(self, size: int) -> None:
        del self._buffer[:size]
        self._stale += size
        if self._stale > MAX_STALE:
            raise ProtocolError(f"no greeting within {MAX_STALE} bytes")

    def _on_frame(self, kind: int, call: int, payload: bytes) -> Event:
        state = self._calls.get(call)
        if state is None:
            raise ProtocolError(f"type {kind} for call {call}, which is not open")
        if kind in (REPLY, ERROR):
            del self._calls[call]
            return Event(kind, call, payload)
        return self._on_call_frame(state, kind, call, payload)


class GuestEnd(_End):
    """The guest's end. A SYNC event means: all earlier calls are void, answer with `hello`.

    With `hunting` the stream starts, or after an error restarts, with bytes of unknown origin.
    """

    _limits = _FROM_HOST

    def __init__(self, *, hunting: bool) -> None:
        super().__init__()
        self._hunting = hunting
        self._synchronised = False
        self._request_call = 0
        self._request = bytearray()

    def receive(self, data: bytes | memoryview) -> list[Event]:
        """Take bytes of the host; ProtocolError when they are not of this protocol."""
        self._buffer += data
        if self._hunting and not self._found_sync():
            return []
        return self._frames()

    def hello(self, nonce: bytes, body: bytes) -> bytes:
        return b"".join((MAGIC, nonce, _U32.pack(len(body)), body))

    def reply(self, call: int, body: bytes) -> bytes:
        """End the call well. Nothing may follow on it."""
        return self._final(REPLY, call, body)

    def error(self, call: int, body: bytes) -> bytes:
        """End the call badly. Nothing may follow on it."""
        return self._final(ERROR, call, body)

    def is_open(self, call: int) -> bool:
        return call in self._calls

    def _final(self, kind: int, call: int, body: bytes) -> bytes:
        if len(body) > MAX_PAYLOAD:
            raise ValueError("the answer does not fit into a frame")
        del self._calls[call]
        return _frame(kind, call, body)

    def _found_sync(self) -> bool:
        """Drop what precedes the first SYNC frame."""
        mark = _HEADER.pack(SYNC, 0, _SYNC_PAYLOAD) + MAGIC
        at = self._buffer.find(mark)
        if at < 0:
            del self._buffer[: max(0, len(self._buffer) - len(mark) + 1)]
            return False
        del self._buffer[:at]
        self._hunting = False
        return True

    def _on_frame(self, kind: int, call: int, payload: bytes) -> Event | None:
        if kind == SYNC:
            return self._on_sync(call, payload)
        if not self._synchronised:
            raise ProtocolError("the stream does not start with a greeting")
        if self._request_call not in (0, call) or (self._request_call and kind not in (REQUEST_PART, REQUEST)):
            raise ProtocolError("a frame within the parts of a request")
        if kind in (REQUEST_PART, REQUEST):
            return self._on_request(kind, call, payload)
        state = self._calls.get(call)
        if state is not None:
            return Event(kind, call, b"") if kind == CANCEL else self._on_call_frame(state, kind, call, payload)
        if not 0 < call <= self._last_call:
            raise ProtocolError(f"type {kind} for call {call}, which was never opened")
        return None  # it crossed our answer

    def _on_sync(self, call: int, payload: bytes) -> Event:
        if call != 0 or len(payload) != _SYNC_PAYLOAD or not payload.startswith(MAGIC):
            raise ProtocolError("a torn greeting")
        self._calls.clear()
        self._last_call = 0
        self._request_call = 0
        self._request.clear()
        self._synchronised = True
        return Event(SYNC, 0, payload[len(MAGIC) :])

    def _on_request(self, kind: int, call: int, payload: bytes) -> Event | None:
        if call <= self._last_call:
            raise ProtocolError(f"call {call} opened twice or out of order")
        if len(self._request) + len(payload) > MAX_REQUEST:
            raise ProtocolError(f"a request of more than {MAX_REQUEST} bytes")
        self._request += payload
        if kind == REQUEST_PART:
            self._request_call = call
            return None
        if len(self._calls) >= MAX_CALLS:
            raise ProtocolError(f"more than {MAX_CALLS} calls")
        body = bytes(self._request)
        self._request_call = 0
        self._request = bytearray()
        self._last_call = call
        self._calls[call] = _Call()
        return Event(REQUEST, call, body)


def encode(value: dict[str, Any]) -> bytes:
    """JSON in ASCII: strings with lone surrogates (file names that are not UTF-8) survive the journey."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


def decode(payload: bytes) -> dict[str, Any]:
    """A JSON object of finite numbers; ProtocolError for anything else."""
    try:
        value = json.loads(payload.decode("utf-8"), parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError):
        raise ProtocolError("a message that is not JSON") from None
    if not isinstance(value, dict):
        raise ProtocolError("a message that is not an object")
    return value


def _refuse(constant: str) -> NoReturn:
    raise ValueError("not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if number - number != 0:  # infinite
        raise ValueError("a number out of range")
    return number


def _frame(kind: int, call: int, payload: bytes) -> bytes:
    return _HEADER.pack(kind, call, len(payload)) + payload
