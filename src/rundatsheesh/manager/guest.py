"""The host's end of one VM's channel: what can be asked of the agent, and what is believed of its answers.

Errors: InvalidInput and NotFound where the caller's path is wrong; GuestUnresponsive where no answer came in time;
GuestMisbehaved where the guest broke the protocol (the channel is then closed); GuestGone where the stream ended;
GuestError for everything else that the guest says went wrong.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rundatsheesh.agent import wire
from rundatsheesh.manager.errors import (
    GuestMisbehaved,
    RdsError,
)
from rundatsheesh.manager.guest_answers import SIMPLE_TIMEOUT, answer_of
from rundatsheesh.manager.guest_channel import STALL, Channel, GuestCall, GuestGone, Stream
from rundatsheesh.manager.guest_files import ChannelSender, Download, SlotSender
from rundatsheesh.manager.guest_output import Capture, UnusableValueError, Value, parse_value
from rundatsheesh.manager.guest_slots import WORTH_IT, Ring, TransferDisk, lent
from rundatsheesh.manager.guest_values import CallResult, ExecRequest, Hello, Identity, ScriptRequest
from rundatsheesh.manager.model import UploadManifest

__all__ = [
    "CallResult",
    "Download",
    "ExecRequest",
    "Guest",
    "GuestGone",
    "Hello",
    "Identity",
    "ScriptRequest",
]

log = logging.getLogger(__name__)

ANSWER_GRACE = 45.0  # seconds after a command's deadline in which the guest must have killed it and answered
KILLED = 137
CLOCK_NS = 50_000_000  # by which a guest's clock may be behind
CLOCK_ATTEMPTS = 20
_MAX_INT = 1 << 53

T = TypeVar("T")


class Guest:
    def __init__(self, channel: Channel, hello: Hello, disk: TransferDisk | None) -> None:
        self._channel = channel
        self._disk = disk
        if disk is not None:
            channel.when_ended(disk.close)
        self.hello = hello

    @classmethod
    async def connect(cls, stream: Stream, *, timeout: float, transfer_disk: Path | None = None) -> Guest:  # noqa: ASYNC109  (named in its error)
        """Take over the stream, which may carry bytes of an earlier user. Closes it when it raises. `transfer_disk` is
        the host's side of the disk through which the guest's files go in and out."""
        channel = Channel(stream)
        answer = await channel.open(timeout)
        try:
            hello = _hello(answer)
            disk = TransferDisk(transfer_disk) if transfer_disk is not None and hello.transfer_disk else None
            return cls(channel, hello, disk)
        except BaseException:
            await channel.close()
            raise

    async def wait_closed(self) -> RdsError | None:
        """Return when the channel has ended: why, or None when `close` was called."""
        return await self._channel.wait_closed()

    async def close(self) -> None:
        """End the channel and all its calls. The guest itself runs on. Idempotent."""
        await self._channel.close()

    async def configure(self, identity: Identity) -> None:
        """Give the guest its identity; returns when all of it is in force."""
        answer = await self._simple(
            {
                "call": "configure",
                "hostname": identity.hostname,
                "guest_ip": identity.guest_ip,
                "mac": identity.mac,
                "gateway": identity.gateway,
                "machine_id": identity.machine_id,
                "entropy": identity.entropy.hex(),
                "time_ns": identity.time_ns if identity.time_ns is not None else time.time_ns(),
                "mount_workspace": identity.mount_workspace,
                "boot_id": identity.boot_id,
            }
        )
        self.hello = replace(self.hello, boot_id=self._believed(lambda: _word(answer, "boot_id")))
        if identity.time_ns is None:
            await self._correct_clock(answer)

    async def _correct_clock(self, answer: dict[str, Any]) -> None:
        """Tell the time until it arrives while it is true: on a busy host a message may take seconds. How late it was
        is at most what the guest's clock is behind when its answer is here. A guest that has the host's clock says
        nothing of it."""
        for _ in range(CLOCK_ATTEMPTS):
            if "clock_ns" not in answer:
                return
            if time.time_ns() - self._believed(partial(_integer, answer["clock_ns"], 1 << 63)) < CLOCK_NS:
                return
            answer = await self._simple({"call": "clock", "time_ns": time.time_ns()})
        log.warning("a guest's clock is more than %d ms behind, and stays so", CLOCK_NS // 1_000_000)

    async def exec(self, request: ExecRequest) -> CallResult:
        """Run a shell command to its end or its deadline."""
        return await self._run(
            {"call": "exec", "cmd": request.cmd, "cwd": request.cwd, "env": dict(request.env)},
            request.timeout_ms,
            request.max_output,
        )

    async def run_script(self, request: ScriptRequest) -> CallResult:
        """Run TypeScript or JavaScript to its end or its deadline."""
        parameters = {
            "call": "script",
            "language": request.language,
            "code": request.code,
            "path": request.path,
            "args": list(request.args),
            "env": dict(request.env),
            "flags": list(request.flags),
            "allow_net": request.allow_net,
        }
        return await self._run(parameters, request.timeout_ms, request.max_output)

    async def upload(self, dest: str, manifest: UploadManifest, chunks: AsyncIterator[bytes]) -> None:
        """Write a checked upload's canonical stream beneath `dest`. When it raises, part of it may be written."""
        sizes = {
            "entries": manifest.entries,
            "table_bytes": manifest.table_bytes,
            "content_bytes": manifest.content_bytes,
        }
        request = {"call": "upload", "dest": dest, **sizes}
        with lent(self._disk if manifest.stream_bytes >= WORTH_IT else None) as ring:
            sender = ChannelSender() if ring is None else SlotSender(ring)
            call = sender.call = self._call(request, sender.take, ring)
            try:
                await sender.send(chunks, manifest.table_bytes)
                call.finish_sending()
                await answer_of(call, STALL)
            finally:
                call.cancel()

    async def download(self, path: str) -> Download:
        """Start reading a directory or file as tar. Returns with the first bytes, so a wrong path raises now."""
        download = Download(self._disk.lend() if self._disk is not None else None)
        try:
            download.call = self._call({"call": "download", "path": path}, download.take, download.ring)
            await download.first()
        except BaseException:
            download.cancel()
            raise
        return download

    async def processes(self) -> AsyncIterator[int]:
        """The number of live user process trees, now and whenever it changes between none and some. Ends only with an
        error, or when the caller stops iterating."""
        watch = _Watch()
        call = watch.call = self._channel.call({"call": "processes"}, watch.take)
        try:
            while not call.ended:
                if watch.latest is None:
                    await call.news(None)
                else:
                    number, watch.latest = watch.latest, None
                    yield number
            await answer_of(call, SIMPLE_TIMEOUT)
            raise call.condemned("the guest ended a watch that nobody cancelled")
        finally:
            call.cancel()

    async def ping(self, timeout: float) -> None:  # noqa: ASYNC109  (named in its error)
        """Return when the agent has answered; GuestUnresponsive after `timeout` seconds."""
        await self._simple({"call": "ping"}, timeout)

    async def shutdown(self) -> None:
        """Have the guest flush its disk and end. Returns when it has agreed; the channel's end follows."""
        await self._simple({"call": "shutdown"})

    def _call(self, request: dict[str, Any], on_data: Callable[[int, bytes], None], ring: Ring | None) -> GuestCall:
        """A call that may hold a ring until its end."""
        if ring is None:
            return self._channel.call(request, on_data)
        try:
            call = self._channel.call(request | ring.place, on_data)
        except RdsError:
            ring.release()
            raise
        call.when_ended(ring.release)
        return call

    async def _simple(self, request: dict[str, Any], timeout: float = SIMPLE_TIMEOUT) -> dict[str, Any]:  # noqa: ASYNC109
        return await answer_of(self._channel.call(request, _refuse_data), timeout)

    async def _run(self, request: dict[str, Any], timeout_ms: int, max_output: int) -> CallResult:
        run = _Run(max_output)
        limits = {"timeout_ms": timeout_ms, "max_output": max_output}
        run.call = self._channel.call(request | limits, run.take)
        try:
            answer = await answer_of(run.call, timeout_ms / 1000 + ANSWER_GRACE)
        except GuestGone as gone:
            gone.partial = run.partial()
            raise
        return self._believed(lambda: run.result(answer))

    def _believed(self, read: Callable[[], T]) -> T:
        """The value, or the end of the channel where the guest's answer cannot be."""
        try:
            return read()
        except GuestMisbehaved as error:
            self._channel.condemn(error)
            raise


class _Run:
    """What arrives of one command."""

    call: GuestCall

    def __init__(self, max_output: int) -> None:
        self._started = time.monotonic()
        self._output = {wire.STDOUT: Capture(max_output), wire.STDERR: Capture(max_output)}
        self._values = {wire.RESULT: Value(max_output), wire.SCRIPT_ERROR: Value(max_output)}

    def take(self, stream: int, data: bytes) -> None:
        """Raises GuestMisbehaved for a stream that does not exist, or a result over the limit."""
        sink = self._output.get(stream) or self._values.get(stream)
        if sink is None:
            raise GuestMisbehaved(f"data on stream {stream}")
        sink.feed(data)
        self.call.consumed(len(data))

    def result(self, answer: dict[str, Any]) -> CallResult:
        """The whole result; GuestMisbehaved for numbers that cannot be."""
        dropped = answer.get("dropped")
        if not isinstance(dropped, list) or len(dropped) != 2:
            raise GuestMisbehaved("no numbers of bytes left out")
        for stream, number in zip((wire.STDOUT, wire.STDERR), dropped, strict=True):
            self._output[stream].left_out += _integer(number, _MAX_INT)
        timed_out = answer.get("timed_out")
        if not isinstance(timed_out, bool):
            raise GuestMisbehaved("no word about the deadline")
        has_result, result, error = self._script_values()
        exit_code = _integer(answer.get("exit_code"), 255)
        return replace(
            self.partial(),
            exit_code=1 if error is not None and exit_code == 0 else exit_code,
            duration_ms=min(_integer(answer.get("duration_ms"), _MAX_INT), self._elapsed_ms()),
            timed_out=timed_out,
            has_result=has_result,
            result=result,
            error=error,
        )

    def _script_values(self) -> tuple[bool, Any, Any]:
        """Whether there is a result, the result, the error."""
        try:
            _, error = parse_value(self._values[wire.SCRIPT_ERROR])
            return *parse_value(self._values[wire.RESULT]), error
        except UnusableValueError as problem:
            return False, None, {"name": "ResultError", "message": f"the script's result is not usable: {problem}"}

    def partial(self) -> CallResult:
        out, err = self._output[wire.STDOUT], self._output[wire.STDERR]
        return CallResult(
            exit_code=KILLED,
            stdout=out.text(),
            stderr=err.text(),
            duration_ms=self._elapsed_ms(),
            timed_out=False,
            truncated=bool(out.left_out or err.left_out),
        )

    def _elapsed_ms(self) -> int:
        return int((time.monotonic() - self._started) * 1000)


class _Watch:
    """The latest number that arrived."""

    call: GuestCall

    def __init__(self) -> None:
        self.latest: int | None = None
        self._line = b""

    def take(self, stream: int, data: bytes) -> None:
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            if not line.isdigit() or len(line) > 9:
                raise GuestMisbehaved("a number of processes that is none")
            self.latest = int(line)
        if stream != wire.RESULT or len(self._line) > 9:
            raise GuestMisbehaved("a number of processes that is none")
        self.call.consumed(len(data))


def _hello(answer: dict[str, Any]) -> Hello:
    if answer.get("protocol") != wire.PROTOCOL:
        raise GuestMisbehaved(f"the agent does not speak protocol {wire.PROTOCOL}")
    disk = answer.get("transfer_disk") is True  # earlier agents say nothing of it
    return Hello(_word(answer, "agent_version"), _word(answer, "boot_id"), _word(answer, "engine"), disk)


def _word(answer: dict[str, Any], name: str) -> str:
    value = answer.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= 64 or not value.isascii() or not value.isprintable():
        raise GuestMisbehaved(f"a greeting without {name}")
    return value


def _integer(value: Any, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise GuestMisbehaved("a number that cannot be")
    return value


def _refuse_data(stream: int, data: bytes) -> None:
    raise GuestMisbehaved("data on a call that has none")
