"""The host's end against guests that lie, are silent, or vanish; such a guest is at the other end of a socket pair."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from rundatsheesh.agent import wire
from rundatsheesh.manager.errors import (
    GuestError,
    GuestMisbehaved,
    GuestUnresponsive,
    InvalidInput,
    NotFound,
    RdsError,
    TooLarge,
    Unavailable,
)
from rundatsheesh.manager.guest import CallResult, ExecRequest, Guest, GuestGone
from rundatsheesh.manager.model import UploadManifest

HELLO = {"protocol": wire.PROTOCOL, "agent_version": "1", "boot_id": "b", "engine": "gvisor"}
ANSWER = {"exit_code": 0, "timed_out": False, "duration_ms": 1, "dropped": [0, 0]}
REQUEST = ExecRequest(cmd="x", timeout_ms=1000, max_output=1000)


class FakeGuest:
    """Speaks the protocol only as far as the test wants."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.end = wire.GuestEnd(hunting=False)
        self.requests: asyncio.Queue[tuple[int, dict[str, object]]] = asyncio.Queue()
        self.others: asyncio.Queue[wire.Event] = asyncio.Queue()
        self.hello: bytes | None = wire.encode(HELLO)
        self.left = asyncio.Event()  # the host has closed the stream

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def run(self) -> None:
        while data := await self.reader.read(1 << 16):
            for event in self.end.receive(data):
                if event.kind == wire.SYNC:
                    if self.hello is not None:
                        self.send(self.end.hello(event.payload, self.hello))
                elif event.kind == wire.REQUEST:
                    self.requests.put_nowait((event.call, wire.decode(event.payload)))
                else:
                    self.others.put_nowait(event)
        self.left.set()


@contextlib.asynccontextmanager
async def streams() -> AsyncIterator[tuple[FakeGuest, tuple[asyncio.StreamReader, asyncio.StreamWriter]]]:
    here, there = socket.socketpair()
    fake = FakeGuest(*await asyncio.open_unix_connection(sock=there))
    task = asyncio.create_task(fake.run())
    try:
        yield fake, await asyncio.open_unix_connection(sock=here)
    finally:
        fake.writer.transport.abort()
        await asyncio.gather(task, return_exceptions=True)


@contextlib.asynccontextmanager
async def connected() -> AsyncIterator[tuple[FakeGuest, Guest]]:
    async with streams() as (fake, stream):
        guest = await Guest.connect(stream, timeout=30)
        try:
            yield fake, guest
        finally:
            await guest.close()


async def outcome(
    call: Callable[[Guest], Awaitable[object]], lie: Callable[[FakeGuest, int], None]
) -> tuple[object, RdsError | None]:
    """What the call gives when the guest answers with the lie; and why the channel ended, None while it lives."""
    async with connected() as (fake, guest):
        task = asyncio.ensure_future(call(guest))
        number, _ = await fake.requests.get()
        lie(fake, number)
        try:
            result: object = await asyncio.wait_for(task, 30)
        except RdsError as error:
            result = error
        try:
            return result, await asyncio.wait_for(guest.wait_closed(), 0.1)
        except TimeoutError:
            return result, None


def raw(kind: int, payload: bytes, length: int | None = None) -> Callable[[FakeGuest, int], None]:
    def lie(fake: FakeGuest, number: int) -> None:
        size = len(payload) if length is None else length
        fake.send(bytes((kind,)) + number.to_bytes(4, "big") + size.to_bytes(4, "big") + payload)

    return lie


def answer(**changes: object) -> Callable[[FakeGuest, int], None]:
    return raw(wire.REPLY, wire.encode(ANSWER | changes))


def both(*lies: Callable[[FakeGuest, int], None]) -> Callable[[FakeGuest, int], None]:
    def lie(fake: FakeGuest, number: int) -> None:
        for each in lies:
            each(fake, number)

    return lie


def data(stream: int, content: bytes) -> Callable[[FakeGuest, int], None]:
    return raw(wire.DATA, bytes((stream,)) + content)


LIES = {
    "huge length": raw(wire.DATA, b"", 0xFFFFFFFF),
    "wrong id": lambda fake, number: raw(wire.REPLY, b"{}")(fake, number + 7),
    "garbage": lambda fake, number: fake.send(b"HTTP/1.1 200 OK\r\n\r\n"),
    "empty data": data(wire.STDOUT, b""),
    "data after the end": both(raw(wire.END, b""), data(wire.STDOUT, b"x")),
    "credit for nothing": raw(wire.WINDOW_MORE, b"\0\0\0\1"),
    "a stream that does not exist": data(99, b"x"),
    "a file in a command": data(wire.FILE, b"x"),
    "a result of more than was agreed": both(*(data(wire.RESULT, bytes(500)) for _ in range(3))),
    "no JSON": raw(wire.REPLY, b"{{{"),
    "NaN": raw(wire.REPLY, b'{"exit_code":NaN}'),
    "infinite": raw(wire.REPLY, b'{"exit_code":1e400}'),
    "nested": raw(wire.REPLY, b'{"a":' + b"[" * 20_000 + b"]" * 20_000 + b"}"),
    "no object": raw(wire.REPLY, b"[]"),
    "nothing said": raw(wire.REPLY, b"{}"),
    "exit code": answer(exit_code=256),
    "exit code that is none": answer(exit_code="0"),
    "exit code true": answer(exit_code=True),
    "exit code float": answer(exit_code=0.0),
    "time": answer(duration_ms=-1),
    "deadline": answer(timed_out=1),
    "left out": answer(dropped=[0]),
    "left out negative": answer(dropped=[0, -1]),
    "left out huge": answer(dropped=[0, 1 << 70]),
    "error without a code": raw(wire.ERROR, wire.encode({"message": "x", "details": {}})),
    "error without details": raw(wire.ERROR, wire.encode({"message": "x", "code": "x"})),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
async def test_a_lie_ends_the_channel(lie: Callable[[FakeGuest, int], None]) -> None:
    result, ended = await outcome(lambda guest: guest.exec(REQUEST), lie)
    assert isinstance(result, GuestMisbehaved)
    assert isinstance(ended, GuestMisbehaved)


async def test_an_answer_given_twice_ends_the_channel() -> None:
    _, ended = await outcome(lambda guest: guest.exec(REQUEST), both(answer(), answer()))
    assert isinstance(ended, GuestMisbehaved)


async def test_data_where_none_belongs() -> None:
    for call in (lambda guest: guest.ping(5), lambda guest: guest.shutdown()):
        result, ended = await outcome(call, data(wire.STDOUT, b"x"))
        assert isinstance(result, GuestMisbehaved) and isinstance(ended, GuestMisbehaved)


async def test_a_number_of_processes_that_is_none() -> None:
    for lie in (b"-1\n", b"x\n", b"9" * 50, b"1\n\n"):
        result, ended = await outcome(lambda guest: anext(guest.processes()), data(wire.RESULT, lie))  # type: ignore[arg-type]
        assert isinstance(result, GuestMisbehaved) and isinstance(ended, GuestMisbehaved)


async def test_the_end_in_the_middle_keeps_the_output() -> None:
    def lie(fake: FakeGuest, number: int) -> None:
        data(wire.STDOUT, b"half")(fake, number)
        fake.send(b"\x07\0\0")
        fake.writer.close()

    result, ended = await outcome(lambda guest: guest.exec(REQUEST), lie)
    assert isinstance(result, GuestGone) and isinstance(ended, GuestGone)
    assert result.partial.stdout == "half"


async def test_silence_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rundatsheesh.manager.guest.ANSWER_GRACE", 0.1)
    async with connected() as (fake, guest):
        with pytest.raises(GuestUnresponsive):
            await guest.exec(ExecRequest(cmd="x", timeout_ms=50, max_output=10))
        with pytest.raises(GuestUnresponsive):
            await guest.ping(0.1)
        assert (await fake.others.get()).kind == wire.CANCEL


async def test_a_greeting_that_does_not_come() -> None:
    async with streams() as (fake, stream):
        fake.hello = None
        with pytest.raises(GuestUnresponsive):
            await Guest.connect(stream, timeout=0.2)


@pytest.mark.parametrize(
    "hello", [b"", b"[]", b"{}", wire.encode(HELLO | {"protocol": 99}), wire.encode(HELLO | {"boot_id": "x" * 65})]
)
async def test_a_greeting_that_cannot_be(hello: bytes) -> None:
    async with streams() as (fake, stream):
        fake.hello = hello
        with pytest.raises(GuestMisbehaved):
            await Guest.connect(stream, timeout=30)
        await asyncio.wait_for(fake.left.wait(), 30)


async def test_a_stream_that_ends_while_greeting() -> None:
    async with streams() as (fake, stream):
        fake.writer.transport.abort()
        with pytest.raises(GuestGone):
            await Guest.connect(stream, timeout=30)


async def test_endless_output_is_held_to_its_limit() -> None:
    async with connected() as (fake, guest):
        task = asyncio.ensure_future(guest.exec(ExecRequest(cmd="x", timeout_ms=60_000, max_output=100_000)))
        number, _ = await fake.requests.get()
        tracemalloc.start()
        total = 0
        while total < 64 << 20:
            size = min(wire.MAX_CHUNK, fake.end.credit(number))
            if size:
                fake.send(fake.end.data(number, wire.STDOUT, b"x" * size))
                total += size
            await fake.writer.drain()
            await asyncio.sleep(0)
        fake.send(fake.end.reply(number, wire.encode(ANSWER | {"dropped": [5, 0]})))
        result = await task
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert f"[{total - 100_000 + 5} bytes left out]" in result.stdout
    assert result.truncated and len(result.stdout) < 100_100
    assert peak < 8 << 20


@pytest.mark.parametrize(
    ("code", "kind"),
    [("path_not_found", NotFound), ("path_outside_workspace", InvalidInput), ("invalid_input", InvalidInput)],
)
async def test_errors_of_the_guest(code: str, kind: type[RdsError]) -> None:
    message = {"code": code, "message": "no \ud800" + "x" * 9000, "details": {"n": 1, "deep": [[]], "s": "\udfff"}}
    result, ended = await outcome(lambda guest: guest.exec(REQUEST), raw(wire.ERROR, wire.encode(message)))
    assert type(result) is kind and ended is None
    assert result.code == code and result.message.startswith("no \ufffdx") and len(result.message) <= 4000
    assert result.details == {"n": 1}


async def test_an_error_with_a_word_of_its_own() -> None:
    lie = raw(wire.ERROR, wire.encode({"code": "unauthorized", "message": "m", "details": {}}))
    result, _ = await outcome(lambda guest: guest.exec(REQUEST), lie)
    assert type(result) is GuestError and result.code == "guest_error"


RESULTS = {
    b"1": (True, 1, None),
    b"null": (True, None, None),
    b'{"a":["\\ud800"]}': (True, {"a": ["\ufffd"]}, None),
    b"": (False, None, None),
    b"NaN": (False, None, "ResultError"),
    b"[-Infinity]": (False, None, "ResultError"),
    b"1e999": (False, None, "ResultError"),
    b"{": (False, None, "ResultError"),
    b"\xff": (False, None, "ResultError"),
    b"[" * 450 + b"]" * 450: (False, None, "ResultError"),
    b"[" * 900: (False, None, "ResultError"),
}


@pytest.mark.parametrize("text", RESULTS, ids=range(len(RESULTS)))
async def test_what_a_script_may_say(text: bytes) -> None:
    said = data(wire.RESULT, text) if text else both()
    result, ended = await outcome(lambda guest: guest.exec(REQUEST), both(said, answer()))
    assert isinstance(result, CallResult) and ended is None
    has_result, value, error = RESULTS[text]
    assert (result.has_result, result.result) == (has_result, value)
    assert (result.error or {}).get("name") == error
    assert result.exit_code == (0 if error is None else 1)


async def test_the_errors_of_a_script_are_read_alike() -> None:
    error = data(wire.SCRIPT_ERROR, b'{"name":"TypeError","message":"m"}')
    result, _ = await outcome(lambda guest: guest.exec(REQUEST), both(error, answer(exit_code=1)))
    assert isinstance(result, CallResult)
    assert (result.error, result.exit_code) == ({"name": "TypeError", "message": "m"}, 1)


async def test_a_cancelled_call_is_told_and_what_it_still_sends_is_dropped() -> None:
    async with connected() as (fake, guest):
        task = asyncio.ensure_future(guest.exec(REQUEST))
        number, _ = await fake.requests.get()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await fake.others.get()).kind == wire.CANCEL
        fake.send(fake.end.data(number, wire.STDOUT, b"late") + fake.end.error(number, b"{}"))
        ping = asyncio.ensure_future(guest.ping(5))
        number, _ = await fake.requests.get()
        fake.send(fake.end.reply(number, b"{}"))
        await ping


async def test_too_large_and_too_many() -> None:
    async with connected() as (_, guest):
        with pytest.raises(TooLarge):
            await guest.exec(ExecRequest(cmd="x" * (17 << 20), timeout_ms=1, max_output=1))
        tasks = [asyncio.ensure_future(guest.exec(REQUEST)) for _ in range(wire.MAX_CALLS)]
        await asyncio.sleep(0.1)
        with pytest.raises(Unavailable):
            await guest.exec(REQUEST)
        await guest.close()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, GuestGone) for result in results)
        assert await guest.wait_closed() is None
        with pytest.raises(GuestGone):
            await guest.ping(1)


async def pieces(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def test_an_upload_stops_when_the_guest_refuses() -> None:
    async with connected() as (fake, guest):
        endless = (bytes(100_000) for _ in range(1000))
        source = pieces(*endless)
        task = asyncio.ensure_future(guest.upload("/workspace", UploadManifest(1, 1, 1), source))
        number, request = await fake.requests.get()
        assert request == {"call": "upload", "dest": "/workspace", "entries": 1, "table_bytes": 1, "content_bytes": 1}
        fake.send(fake.end.error(number, wire.encode({"code": "path_not_found", "message": "m", "details": {}})))
        with pytest.raises(NotFound):
            await task
        await source.aclose()  # type: ignore[attr-defined]


async def test_an_upload_whose_source_fails_is_cancelled() -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"x"
        raise InvalidInput("broken")

    async with connected() as (fake, guest):
        with pytest.raises(InvalidInput):
            await guest.upload("/workspace", UploadManifest(1, 1, 1), broken())
        assert [(await fake.others.get()).kind for _ in range(2)] == [wire.DATA, wire.CANCEL]


async def test_a_slow_reader_stops_the_download_and_nothing_else() -> None:
    async with connected() as (fake, guest):
        task = asyncio.ensure_future(guest.download("/workspace"))
        number, _ = await fake.requests.get()
        while size := min(wire.MAX_CHUNK, fake.end.credit(number)):
            fake.send(fake.end.data(number, wire.FILE, b"x" * size))
        download = await task
        chunks = download.chunks
        received = len(await anext(chunks))
        while received < wire.WINDOW:
            received += len(await anext(chunks))
        assert fake.end.credit(number) <= wire.WINDOW
        fake.send(fake.end.error(number, wire.encode({"code": "internal", "message": "disk", "details": {}})))
        with pytest.raises(GuestError):
            await anext(chunks)


async def test_a_download_that_is_left_is_cancelled() -> None:
    async with connected() as (fake, guest):
        task = asyncio.ensure_future(guest.download("/workspace"))
        number, _ = await fake.requests.get()
        fake.send(fake.end.data(number, wire.FILE, b"x"))
        download = await task
        chunks = download.chunks
        assert await anext(chunks) == b"x"
        await chunks.aclose()  # type: ignore[attr-defined]
        assert (await fake.others.get()).kind == wire.CANCEL


async def test_an_empty_archive_cannot_be() -> None:
    result, ended = await outcome(lambda guest: guest.download("/workspace"), raw(wire.REPLY, b"{}"))
    assert isinstance(result, GuestMisbehaved) and isinstance(ended, GuestMisbehaved)
