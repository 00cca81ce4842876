"""A call as its handler sees it, and the connection that carries calls."""

from __future__ import annotations

import os
import threading
from collections import deque

from . import wire
from .loop import IN, OUT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .loop import Loop

_READ = 1 << 18
_PAGE = 4096


class Cancelled(Exception):
    """The host gave the call up, or is gone."""


class Call:
    """Methods may be called from any thread. Those that send do nothing once the host has forgotten the call."""

    def __init__(self, connection: Connection, number: int) -> None:
        self._connection = connection
        self._number = number
        self.lock = connection.lock
        self._changed = threading.Condition(self.lock)
        self._inbox: deque[bytes | None] = deque()
        self._cancelled = False
        self._void = False  # the host no longer knows this call; its number may mean another one
        self._on_cancel: Callable[[], None] | None = None
        self.on_credit: Callable[[], None] | None = None  # for who sends without waiting; called under the lock
        self._forward_to: int | None = None
        self._forwarded = 0  # bytes, since the host was last given credit

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def on_cancel(self, callback: Callable[[], None]) -> None:
        """Have `callback` called when the call is cancelled, at once when it already is. It must neither block nor
        take a lock."""
        with self._changed:
            self._on_cancel = callback
            if self._cancelled:
                callback()

    def try_send(self, stream: int, data: bytes | bytearray) -> int:
        """Send as much as the credit allows without waiting; the number of bytes sent."""
        with self._changed:
            return self._send(stream, data)

    def send_data(self, stream: int, data: bytes | bytearray) -> None:
        """Send everything, waiting for credit; raises Cancelled."""
        view = memoryview(data)
        with self._changed:
            while view:
                sent = self._send(stream, view)
                view = view[sent:]
                if not sent:
                    if self._cancelled:
                        raise Cancelled
                    self._changed.wait()

    def read_data(self) -> bytes | None:
        """The host's next bytes, None after its last; waits for them, raises Cancelled."""
        with self._changed:
            while not self._inbox:
                if self._cancelled:
                    raise Cancelled
                self._changed.wait()
            chunk = self._inbox[0]
            if chunk is not None:
                self._inbox.popleft()
                if not self._void:
                    self._connection.transmit(self._connection.session.grant(self._number, len(chunk)))
            return chunk

    def forward(self, fd: int | None) -> None:
        """Write what the host sends from now on to this descriptor, in which there is always room for it, instead of
        keeping it for `read_data`. None ends that: the descriptor is the caller's own again."""
        with self._changed:
            self._forward_to = fd

    def reply(self, answer: dict[str, Any]) -> None:
        """End the call well."""
        with self._changed:
            if not self._void:
                self._connection.finish(self._number, wire.REPLY, answer)

    def fail(self, code: str, message: str, details: dict[str, Any] | None = None) -> None:
        """End the call with an error that the host can tell by its code."""
        with self._changed:
            if not self._void:
                answer = {"code": code, "message": message[:4000], "details": details or {}}
                self._connection.finish(self._number, wire.ERROR, answer)

    # --- for the connection, which holds the lock ---

    def take(self, event: wire.Event) -> None:
        if event.kind == wire.DATA and self._forward_to is not None:
            self._pass_on(self._forward_to, event.payload)
        elif event.kind == wire.DATA:
            self._inbox.append(event.payload)
        elif event.kind == wire.END:
            self._inbox.append(None)
        elif event.kind == wire.CANCEL:
            self.cancel(void=False)
        elif self.on_credit is not None:
            self.on_credit()
        self._changed.notify_all()

    def cancel(self, *, void: bool) -> None:
        first = not self._cancelled
        self._cancelled = True
        self._void = self._void or void
        if first and self._on_cancel is not None:
            self._on_cancel()
        self._changed.notify_all()

    def _pass_on(self, fd: int, data: bytes) -> None:
        try:
            os.write(fd, data)
        except BrokenPipeError:
            return  # who read it has ended; why, it says itself
        self._forwarded += len(data)
        if self._forwarded >= wire.WINDOW // 4:
            self._connection.transmit(self._connection.session.grant(self._number, self._forwarded))
            self._forwarded = 0

    def _send(self, stream: int, data: bytes | bytearray | memoryview) -> int:
        if self._void:
            raise Cancelled
        session = self._connection.session
        view = memoryview(data)
        sent = 0
        while sent < len(view):
            size = min(wire.MAX_CHUNK, session.credit(self._number), len(view) - sent)
            if size == 0:
                break
            self._connection.transmit(session.data(self._number, stream, view[sent : sent + size]))
            sent += size
        return sent


class Connection:
    """One trusted stream from the host. Lives in the main thread, except for what holds `lock`.

    `dispatch` is called with each new call and its request. What could not be written at once waits in memory: it is
    bounded by the credit of the calls.
    """

    def __init__(
        self, fd: int, loop: Loop, hello: Callable[[], bytes], dispatch: Callable[[Call, bytes], None]
    ) -> None:
        self.lock = threading.RLock()
        self.session = wire.GuestEnd(hunting=False)
        self._fd = fd
        self._loop = loop
        self._hello = hello
        self._dispatch = dispatch
        self._calls: dict[int, Call] = {}
        self._unsent = bytearray()
        self._open = True
        # Read into, again and again: memory that is new for each read has to be mapped and unmapped, which costs an
        # emulated CPU more than the bytes.
        self._buffer = memoryview(bytearray(_READ))
        self._pages = [self._buffer[at : at + _PAGE] for at in range(0, _READ, _PAGE)]
        # Set for a virtio-serial port: it fills one element of a vector per page that it has, and takes eight pages.
        self.piecemeal = False

    def read(self) -> bool:
        """Take what has arrived; False when the stream has ended. Raises wire.ProtocolError."""
        size = self._fill()
        if size is None:
            return False
        data = self._buffer[:size]
        # One hold of the lock: after a SYNC among the events, numbers of old calls mean new ones.
        with self.lock:
            for event in self.session.receive(data):
                self._on_event(event)
        return True

    def _fill(self) -> int | None:
        """The number of bytes that have arrived in the buffer, None when the stream has ended."""
        try:
            return os.readv(self._fd, self._pages if self.piecemeal else [self._buffer]) or None
        except BlockingIOError:
            return 0
        except OSError:
            return None

    def write(self) -> None:
        """Send what had to wait."""
        with self.lock:
            if self._unsent:
                del self._unsent[: self._write(self._unsent)]
            if not self._unsent:
                self._loop.change(self._fd, IN)

    def restart(self, *, hunting: bool) -> None:
        """Give up all calls; the stream's next user starts anew."""
        with self.lock:
            self._unsent.clear()
            self.session = wire.GuestEnd(hunting=hunting)
        self._void_calls()

    def close(self) -> None:
        """Give up all calls and forget the stream; the descriptor stays the caller's."""
        with self.lock:
            self._open = False
        self._void_calls()

    @property
    def flushed(self) -> bool:
        with self.lock:
            return not self._unsent

    def transmit(self, frame: bytes) -> None:
        """Send, now or when there is room. The lock is held."""
        if not self._open or not frame:
            return
        if self._unsent:
            self._unsent += frame
            return
        sent = self._write(frame)
        if sent < len(frame):
            self._unsent += memoryview(frame)[sent:]
            self._loop.change(self._fd, IN | OUT)

    def finish(self, number: int, kind: int, answer: dict[str, Any]) -> None:
        """Answer a call, once. The lock is held."""
        if self._calls.pop(number, None) is not None:
            body = wire.encode(answer)
            if len(body) > wire.MAX_PAYLOAD:
                kind, body = wire.ERROR, wire.encode({"code": "internal", "message": "too long to say", "details": {}})
            self.transmit(self.session.reply(number, body) if kind == wire.REPLY else self.session.error(number, body))

    def _write(self, data: bytes | bytearray) -> int:
        sent = 0
        with memoryview(data) as view:
            while sent < len(view):
                try:
                    sent += os.write(self._fd, view[sent:])
                except BlockingIOError:
                    break
                except OSError:
                    return len(view)  # the stream is broken; reading tells
                if not self.piecemeal:
                    break
        return sent

    def _on_event(self, event: wire.Event) -> None:
        if event.kind == wire.SYNC:
            self._void_calls()
            self.transmit(self.session.hello(event.payload, self._hello()))
        elif event.kind == wire.REQUEST:
            call = self._calls[event.call] = Call(self, event.call)
            self._dispatch(call, event.payload)
        elif event.call in self._calls:
            self._calls[event.call].take(event)

    def _void_calls(self) -> None:
        with self.lock:
            for call in self._calls.values():
                call.cancel(void=True)
            self._calls.clear()
