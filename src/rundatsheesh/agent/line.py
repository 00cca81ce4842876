"""The guest's end of the protocol for a single call, in the very thread that does its work.

For who works outside of a guest (outside.py): there is one call, so nothing has to wait for another.
"""

from __future__ import annotations

from collections import deque

from . import wire
from .incoming import Reader
from .tar import PipeWriter

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import Any

_READ = 1 << 18


class Gone(Exception):
    """The host has closed the stream, or gave the call up."""


class Line:
    """`request` first, then `read` or `write` as often as wanted, then `reply` or `fail`. All raise Gone."""

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream
        self._session = wire.GuestEnd(hunting=False)
        self._events: deque[wire.Event] = deque()
        self._buffer = memoryview(bytearray(_READ))
        self._number = 0

    def request(self, hello: dict[str, Any]) -> dict[str, Any]:
        """Greet the host, and wait for its call."""
        while (event := self._next()).kind == wire.SYNC:
            self._send(self._session.hello(event.payload, wire.encode(hello)))
        self._number = event.call
        return wire.decode(event.payload)

    def read(self) -> bytes:
        """The next bytes from the host; empty after its last."""
        event = self._next()
        while event.kind == wire.WINDOW_MORE:
            event = self._next()
        if event.kind == wire.DATA:
            self._send(self._session.grant(self._number, len(event.payload)))
            return event.payload
        if event.kind == wire.END:
            return b""
        raise Gone

    def write(self, view: memoryview) -> None:
        """Send everything, waiting for credit."""
        while view:
            while not (credit := self._session.credit(self._number)):
                if self._next().kind != wire.WINDOW_MORE:
                    raise Gone
            size = min(credit, wire.MAX_CHUNK, len(view))
            self._send(self._session.data(self._number, wire.FILE, view[:size]))
            view = view[size:]

    def reply(self) -> None:
        """End the call well."""
        self._send(self._session.reply(self._number, wire.encode({})))

    def fail(self, code: str, message: str, details: dict[str, Any]) -> None:
        """End the call with an error that the host can tell by its code."""
        body = wire.encode({"code": code, "message": message[:4000], "details": details})
        self._send(self._session.error(self._number, body))

    def wait_closed(self) -> None:
        """Until the host has closed the stream: what it does not read before we do would be lost."""
        while True:
            self._next()

    def _next(self) -> wire.Event:
        while not self._events:
            try:
                size = self._stream.recv_into(self._buffer)
            except ConnectionResetError:
                size = 0
            if not size:
                raise Gone
            self._events.extend(self._session.receive(self._buffer[:size]))
        return self._events.popleft()

    def _send(self, frame: bytes) -> None:
        try:
            self._stream.sendall(frame)
        except (BrokenPipeError, ConnectionResetError):
            raise Gone from None


class LineReader(Reader):
    """An upload's content. It goes through the kernel's cache, which is the host's own here and as fast as memory."""

    past_cache = False

    def __init__(self, line: Line) -> None:
        super().__init__(0)
        self._line = line

    def _read(self) -> memoryview:
        return memoryview(self._line.read())


class LineWriter(PipeWriter):
    """A download's content."""

    def __init__(self, line: Line) -> None:
        super().__init__(-1)
        self._line = line

    def _send(self, view: memoryview) -> None:
        self._line.write(view)
