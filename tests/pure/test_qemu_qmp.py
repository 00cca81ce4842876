"""QEMU's control protocol, against a QEMU that may lie."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from rundatsheesh.manager.engines.qmp import MAX_LINE, Qmp
from rundatsheesh.manager.errors import EngineError

Behaviour = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\n'


@asynccontextmanager
async def qemu(directory: Path, behave: Behaviour) -> AsyncIterator[Path]:
    """A server that greets, agrees to the capabilities and then behaves as told."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GREETING)
        await answer(reader, writer, {})
        await behave(reader, writer)
        writer.close()

    path = directory / "qmp.sock"
    server = await asyncio.start_unix_server(serve, str(path), limit=4 * MAX_LINE)
    try:
        yield path
    finally:
        server.close()


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, value: Any) -> dict[str, Any]:
    request: dict[str, Any] = json.loads(await reader.readline())
    writer.write(json.dumps({"return": value, "id": request["id"]}).encode() + b"\n")
    return request


async def test_commands_are_answered_in_turn_with_events_in_between(tmp_path: Path) -> None:
    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for number in range(3):
            writer.write(b'{"event": "STOP", "timestamp": {}}\n')
            request = await answer(reader, writer, number)
            assert request["execute"] == "query" and request["arguments"] == {"of": number}

    async with qemu(tmp_path, behave) as path:
        qmp = await Qmp.connect(path)
        assert [await qmp.execute("query", of=number) for number in range(3)] == [0, 1, 2]
        await qmp.close()


async def test_a_refusal_is_an_error_and_the_next_command_goes_on(tmp_path: Path) -> None:
    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = json.loads(await reader.readline())
        refusal = {"error": {"class": "GenericError", "desc": "no such thing"}, "id": request["id"]}
        writer.write(json.dumps(refusal).encode() + b"\n")
        await answer(reader, writer, "fine")

    async with qemu(tmp_path, behave) as path:
        qmp = await Qmp.connect(path)
        with pytest.raises(EngineError, match="no such thing"):
            await qmp.execute("impossible")
        assert await qmp.execute("possible") == "fine"
        await qmp.close()


async def test_a_descriptor_goes_with_its_command(tmp_path: Path) -> None:
    received: list[int] = []
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "qmp.sock"))
    listener.listen()

    def serve() -> None:
        connection, _ = listener.accept()
        connection.sendall(GREETING)
        for _ in range(2):
            line, fds, _, _ = socket.recv_fds(connection, 4096, 1)
            received.extend(fds)
            connection.sendall(json.dumps({"return": {}, "id": json.loads(line)["id"]}).encode() + b"\n")
        connection.close()

    serving = asyncio.create_task(asyncio.to_thread(serve))
    qmp = await Qmp.connect(tmp_path / "qmp.sock")
    with open("/dev/null", "rb") as file:
        await qmp.execute("getfd", descriptor=file.fileno(), fdname="state")
    await serving
    await qmp.close()
    listener.close()
    (descriptor,) = received
    assert os.readlink(f"/proc/self/fd/{descriptor}") == "/dev/null"  # noqa: PTH115  (pathlib would resolve no less)
    os.close(descriptor)


async def test_an_expected_event_is_told_by_its_data(tmp_path: Path) -> None:
    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await answer(reader, writer, {})
        writer.write(b'{"event": "MIGRATION", "data": {"status": "active"}}\n')
        writer.write(b'{"event": "MIGRATION", "data": {"status": "completed"}}\n')
        writer.write(b'{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}}\n')

    async with qemu(tmp_path, behave) as path:
        qmp = await Qmp.connect(path)
        active, completed = qmp.expect("MIGRATION", status="active"), qmp.expect("MIGRATION", status="completed")
        never = qmp.expect("MIGRATION", status="failed")
        await qmp.execute("migrate")
        await active
        await completed
        await qmp.wait_closed()
        assert never.cancelled()
        assert qmp.shutdown_reason == "guest-reset"
        assert qmp.expect("MIGRATION").cancelled()
        with pytest.raises(EngineError):
            await qmp.execute("more")


@pytest.mark.parametrize(
    "nonsense",
    [
        b"no json\n",
        b"[]\n",
        b"1\n",
        b"\xff\xfe\n",
        b'{"return": {}}\n' * 50,
        b"[" * 100_000 + b"\n",
        b"x" * (MAX_LINE + 1) + b"\n",
        b'{"event": ["SHUTDOWN"], "data": 3}\n',
        b'{"event": "SHUTDOWN", "data": {"reason": 3}}\n',
        b"",
    ],
)
async def test_nonsense_ends_in_an_error(tmp_path: Path, nonsense: bytes) -> None:
    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(nonsense)
        await writer.drain()

    async with qemu(tmp_path, behave) as path:
        qmp = await Qmp.connect(path)
        with pytest.raises(EngineError):
            await qmp.execute("query-status")
        await qmp.wait_closed()
        assert qmp.shutdown_reason is None
        await qmp.close()


async def test_nobody_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError):
        await Qmp.connect(tmp_path / "qmp.sock")
