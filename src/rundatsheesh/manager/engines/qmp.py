"""QEMU's control protocol: one JSON object per line, replies in the order of the commands, events in between.

A guest that has broken into QEMU is at the other end, so nothing that arrives is believed beyond its form, and a line
that is too long ends the connection.
"""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

from rundatsheesh.manager.errors import EngineError

MAX_LINE = 1 << 20
MAX_UNREAD = 8
REPLY_TIMEOUT = 30.0  # seconds; QEMU answers in a millisecond unless the host is overloaded


class Qmp:
    """One connection. Commands may be sent by several tasks; each waits for its turn."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: socket.socket) -> None:
        self._connection = connection  # the writer's own, which cannot send descriptors
        self._reader = reader
        self._writer = writer
        self._turn = asyncio.Lock()
        self._commands = 0
        self._replies: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._ended = False
        self._expected: list[tuple[str, dict[str, Any], asyncio.Future[None]]] = []
        self.shutdown_reason: str | None = None  # as QEMU told it: guest-shutdown, guest-reset, host-qmp-quit...
        self._task = asyncio.create_task(self._read(), name="qmp")

    @classmethod
    async def connect(cls, path: Path) -> Qmp:
        """Connect and leave negotiation mode. Raises EngineError when nobody answers."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            connection.connect(str(path))
            reader, writer = await asyncio.open_unix_connection(sock=connection, limit=MAX_LINE)
        except OSError as error:
            connection.close()
            raise EngineError(f"cannot reach QEMU's control socket: {error}") from error
        qmp = cls(reader, writer, connection)
        try:
            await qmp._next_reply()  # the greeting
            await qmp.execute("qmp_capabilities")
        except BaseException:
            await qmp.close()
            raise
        return qmp

    async def execute(self, command: str, *, descriptor: int | None = None, **arguments: Any) -> Any:
        """The command's return value. A descriptor goes with it where one is given. Raises EngineError when QEMU
        refuses, is gone or does not answer in time."""
        async with self._turn:
            if self._ended:
                raise EngineError(f"QEMU is gone, so it cannot do {command}")
            self._commands += 1
            self._send({"execute": command, "arguments": arguments, "id": self._commands}, descriptor)
            # Other replies are to commands whose sender was cancelled.
            while (reply := await self._next_reply()).get("id") != self._commands:
                continue
        if "return" not in reply:
            error = reply.get("error")
            raise EngineError(f"QEMU refused {command}: {error.get('desc') if isinstance(error, dict) else reply}")
        return reply["return"]

    def expect(self, event: str, **data: Any) -> asyncio.Future[None]:
        """Resolves at the next event of this name with these values; cancelled when the connection ends."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._ended:
            future.cancel()
        else:
            self._expected.append((event, data, future))
        return future

    async def wait_closed(self) -> None:
        """Return when the connection has ended and all that it brought is known."""
        await asyncio.shield(self._task)

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def _send(self, request: dict[str, Any], descriptor: int | None) -> None:
        line = json.dumps(request).encode() + b"\n"
        if descriptor is None:
            self._writer.write(line)
            return
        try:
            # The socket's buffer is empty: all commands before were answered.
            socket.send_fds(self._connection, [line], [descriptor])
        except OSError as error:
            raise EngineError(f"cannot hand a file to QEMU: {error}") from error

    async def _next_reply(self) -> dict[str, Any]:
        try:
            async with asyncio.timeout(REPLY_TIMEOUT):
                reply = await self._replies.get()
        except TimeoutError:
            self._task.cancel()  # a late reply would be taken for that of the next command
            raise EngineError(f"QEMU does not answer within {REPLY_TIMEOUT:g} s") from None
        if reply is None:
            self._replies.put_nowait(None)  # for whoever comes next
            raise EngineError("QEMU closed its control socket")
        return reply

    async def _read(self) -> None:
        try:
            # A line that is too long, or no JSON object, raises ValueError.
            while line := await self._reader.readline():
                self._take(json.loads(line))
        except (OSError, ValueError, RecursionError):
            return
        finally:
            self._ended = True
            self._replies.put_nowait(None)
            for _, _, future in self._expected:
                future.cancel()
            self._writer.close()

    def _take(self, message: Any) -> None:
        if not isinstance(message, dict):
            raise ValueError("not an object")
        if "event" not in message:
            if self._replies.qsize() >= MAX_UNREAD:
                raise ValueError("replies to nothing")
            self._replies.put_nowait(message)
            return
        name, data = message["event"], message.get("data", {})
        if name == "SHUTDOWN" and isinstance(data, dict) and isinstance(data.get("reason"), str):
            self.shutdown_reason = data["reason"]
        for event, wanted, future in self._expected:
            if event == name and not future.done() and _holds(data, wanted):
                future.set_result(None)
        self._expected = [entry for entry in self._expected if not entry[2].done()]


def _holds(data: Any, wanted: dict[str, Any]) -> bool:
    return isinstance(data, dict) and all(data.get(key) == value for key, value in wanted.items())
