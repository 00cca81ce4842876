"""One stream to a guest, and the calls on it. Knows the protocol, not what the calls mean.

Everything that arrives is hostile. A call holds what its consumer keeps plus at most wire.WINDOW bytes; the stream
holds one frame. Whatever breaks the protocol ends the stream, and every call on it, with GuestMisbehaved.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from typing import Any

from rundatsheesh.agent import wire
from rundatsheesh.manager.errors import GuestError, GuestMisbehaved, GuestUnresponsive, RdsError, TooLarge, Unavailable

log = logging.getLogger(__name__)

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]

STALL = 60.0  # seconds without any progress after which a transfer is given up
_READ = 1 << 18
_MAX_UNSENT = 64 << 20  # bytes that wait for a guest that does not read; a request is 16 MiB at most
_GRANT_AT = wire.WINDOW // 4  # consumed bytes that are worth a frame of credit


class GuestGone(GuestError):
    """The stream ended. For a command, `partial` is the output (manager.guest.CallResult) that had arrived."""

    code = "guest_gone"
    partial: Any = None


class CallError(Exception):
    """The guest ended the call with an error: its code and its message, neither of them checked."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__("the guest refused the call")
        self.answer = answer


class GuestCall:
    """One open call. Leaving it open is not allowed: await `result`, or `cancel` it."""

    def __init__(self, channel: Channel, number: int, on_data: Callable[[int, bytes], None]) -> None:
        self._channel = channel
        self._number = number
        self._on_data = on_data
        self._unacknowledged = 0
        self._final: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._final.add_done_callback(lambda final: None if final.cancelled() else final.exception())
        self._news = asyncio.Event()
        self._abandoned = False

    @property
    def ended(self) -> bool:
        return self._final.done()

    async def result(self, timeout: float) -> dict[str, Any]:  # noqa: ASYNC109  (says so in its own error)
        """The guest's answer. Raises CallError when it is an error, GuestUnresponsive when there is none in time,
        GuestGone and GuestMisbehaved when the stream ends. After an exception the guest is told to give up."""
        try:
            async with asyncio.timeout(timeout):
                return await asyncio.shield(self._final)
        except TimeoutError:
            raise GuestUnresponsive(f"no answer within {timeout:g} seconds") from None
        finally:
            self.cancel()

    async def send(self, stream: int, data: bytes) -> bool:
        """Send everything as the guest consumes it; False when the guest ended the call instead. Raises
        GuestUnresponsive when it consumes nothing for STALL seconds."""
        view = memoryview(data)
        while view and not self.ended:
            size = min(wire.MAX_CHUNK, self._channel.end.credit(self._number), len(view))
            if size:
                self._channel.write(self._channel.end.data(self._number, stream, view[:size]))
                await self._channel.drain()
                view = view[size:]
            else:
                await self.news()
        return not self.ended

    def finish_sending(self) -> None:
        if not self.ended:
            self._channel.write(self._channel.end.end(self._number))

    def consumed(self, size: int) -> None:
        """Bytes that `on_data` got are no longer held: the guest may send as many more."""
        self._unacknowledged += size
        if self._unacknowledged >= _GRANT_AT and not self._abandoned and not self.ended:
            self._channel.write(self._channel.end.grant(self._number, self._unacknowledged))
            self._unacknowledged = 0

    async def news(self, stall: float | None = STALL) -> None:
        """Return after the next frame of this call, or at its end; raises GuestUnresponsive after `stall` seconds."""
        if self.ended:
            return
        self._news.clear()
        try:
            async with asyncio.timeout(stall):
                await self._news.wait()
        except TimeoutError:
            raise GuestUnresponsive(f"no progress for {stall:g} seconds") from None

    def when_ended(self, callback: Callable[[], None]) -> None:
        """Have it called once the guest has ended the call, or the stream has: nothing of the call is at work then."""
        self._final.add_done_callback(lambda _: callback())

    def cancel(self) -> None:
        """Nobody waits any more. What still arrives is dropped, and nothing more is granted. Idempotent."""
        if not self.ended and not self._abandoned:
            self._abandoned = True
            self._channel.write(self._channel.end.cancel(self._number))

    def condemned(self, reason: str) -> GuestMisbehaved:
        """The error to raise for an answer that cannot be; the channel is closed with it."""
        error = GuestMisbehaved(reason)
        self._channel.condemn(error)
        return error

    # --- for the channel ---

    def take(self, event: wire.Event) -> None:
        if event.kind == wire.REPLY:
            self._final.set_result(wire.decode(event.payload))
        elif event.kind == wire.ERROR:
            self._final.set_exception(CallError(wire.decode(event.payload)))
        elif event.kind == wire.DATA and not self._abandoned:
            self._on_data(event.stream, event.payload)
        self._news.set()

    def fail(self, error: RdsError) -> None:
        if not self._final.done():
            self._final.set_exception(error)
        self._news.set()


class Channel:
    """`open` it, make calls, `close` it. `end` is the protocol's state, for calls only."""

    def __init__(self, stream: Stream) -> None:
        self._reader, self._writer = stream
        self._nonce = secrets.token_bytes(wire.NONCE_BYTES)
        self.end = wire.HostEnd(self._nonce)
        self._calls: dict[int, GuestCall] = {}
        self._failure: RdsError | None = None
        self._ended = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._on_end: Callable[[], None] = lambda: None

    async def open(self, timeout: float) -> dict[str, Any]:  # noqa: ASYNC109
        """Greet the guest, skip what the stream still carries of others; the guest's greeting. On failure the
        stream is closed."""
        try:
            async with asyncio.timeout(timeout):
                hello, events = await self._greet()
        except BaseException as error:
            self._writer.transport.abort()
            if isinstance(error, TimeoutError):
                raise GuestUnresponsive(f"no greeting within {timeout:g} seconds") from None
            if isinstance(error, wire.ProtocolError):
                raise GuestMisbehaved(f"while greeting: {error}") from None
            if isinstance(error, OSError):
                raise GuestGone(f"while greeting: {error}") from None
            raise
        self._task = asyncio.create_task(self._run(events))
        return hello

    async def _greet(self) -> tuple[dict[str, Any], list[wire.Event]]:
        self._writer.write(self.end.greeting())
        await self._writer.drain()
        while True:
            data = await self._reader.read(_READ)
            if not data:
                raise GuestGone("the stream ended while greeting")
            events = self.end.receive(data)
            if events:
                return wire.decode(events[0].payload), events[1:]

    def call(self, request: dict[str, Any], on_data: Callable[[int, bytes], None]) -> GuestCall:
        """Start a call; `on_data` gets (stream number, bytes) as they arrive and must not block."""
        if self._failure is not None:
            raise self._copy_of_failure()
        body = wire.encode(request)
        if len(body) > wire.MAX_REQUEST:
            raise TooLarge(f"the request is larger than {wire.MAX_REQUEST} bytes")
        if self.end.open_calls >= wire.MAX_CALLS:
            raise Unavailable(f"{wire.MAX_CALLS} calls are open in this VM", code="too_many_calls", retry_after=1)
        number, frames = self.end.request(body)
        call = self._calls[number] = GuestCall(self, number, on_data)
        self.write(frames)
        return call

    def write(self, frames: bytes) -> None:
        if self._failure is None and frames:
            self._writer.write(frames)
            if self._writer.transport.get_write_buffer_size() > _MAX_UNSENT:
                self._fail(GuestUnresponsive("the guest does not read"))

    async def drain(self) -> None:
        """Return when the stream takes more; raises GuestUnresponsive when it does not for STALL seconds."""
        if self._failure is not None:
            return
        try:
            async with asyncio.timeout(STALL):
                await self._writer.drain()
        except TimeoutError:
            raise GuestUnresponsive(f"the guest has not read for {STALL:g} seconds") from None
        except OSError:
            return  # reading tells the calls

    def when_ended(self, callback: Callable[[], None]) -> None:
        """Have it called at once when the stream ends, or now where it has."""
        self._on_end = callback
        if self._failure is not None:
            callback()

    def condemn(self, error: GuestMisbehaved) -> None:
        """End the stream and all its calls because of what the guest said."""
        self._fail(error)

    async def wait_closed(self) -> RdsError | None:
        """Why the stream ended, once it has; None when we closed it."""
        await self._ended.wait()
        return self._failure if not isinstance(self._failure, _ClosedByUs) else None

    async def close(self) -> None:
        """End all calls with GuestGone and release the stream. Idempotent."""
        self._fail(_ClosedByUs("the connection was closed"))
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self, events: list[wire.Event]) -> None:
        failure: RdsError
        try:
            while True:
                for event in events:
                    if self._failure is not None:
                        return  # closed, perhaps by what the last event was; the calls have been told
                    self._take(event)
                data = await self._reader.read(_READ)
                if not data:
                    failure = GuestGone("the guest closed the stream")
                    break
                events = self.end.receive(data)
        except wire.ProtocolError as error:
            failure = GuestMisbehaved(str(error))
        except GuestMisbehaved as error:
            failure = error
        except OSError as error:
            failure = GuestGone(f"the stream broke: {error.strerror}")
        except Exception:
            log.exception("cannot make sense of a guest's frame")
            failure = GuestMisbehaved("a frame that nothing can be made of")
        self._fail(failure)

    def _take(self, event: wire.Event) -> None:
        call = self._calls[event.call]
        if event.kind in (wire.REPLY, wire.ERROR):
            del self._calls[event.call]
        try:
            call.take(event)
        except (GuestMisbehaved, wire.ProtocolError) as error:
            call.fail(GuestMisbehaved(str(error)))
            raise

    def _fail(self, failure: RdsError) -> None:
        """End the stream and all calls; the first reason counts."""
        if self._failure is not None:
            return
        self._failure = failure
        self._writer.transport.abort()
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.fail(self._copy_of_failure())
        self._on_end()
        self._ended.set()

    def _copy_of_failure(self) -> RdsError:
        """Each call raises its own exception: tracebacks and partial output do not mix."""
        assert self._failure is not None
        kind = GuestGone if isinstance(self._failure, _ClosedByUs) else type(self._failure)
        return kind(self._failure.message)


class _ClosedByUs(GuestGone):
    pass
