"""What a virtual machine is started from: the image's boot files, the agent, and QEMU itself."""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from rundatsheesh.agent import wire
from rundatsheesh.manager.engines.base import Stream
from rundatsheesh.manager.errors import EngineError
from rundatsheesh.manager.host import cpio, memfile
from rundatsheesh.manager.host.bootfiles import BootFiles

CACHE = "__pycache__"
_READ = 1 << 16
_REHEARSAL = {"call": "exec", "cmd": "true", "env": {}, "cwd": "/workspace", "timeout_ms": 60_000, "max_output": 1024}
_CPUINFO_BYTES = 4096  # holds the first processor


class Agent:
    """The agent's package, as an archive to append to an image's initrd. It is read once: a manager that is running
    goes on with the agent that it was started with."""

    def __init__(self, directory: Path) -> None:
        self._archive = cpio.archive(_entries(directory))
        self.digest = hashlib.sha256(self._archive).hexdigest()

    def initrd(self, boot_files: BootFiles) -> int:
        """A descriptor of the image's initrd with the agent in it, in memory."""
        return memfile.sealed("initrd", boot_files.initrd.read_bytes() + self._archive)


async def rehearse(stream: Stream, timeout: float) -> None:  # noqa: ASYNC109  (named in its error)
    """Return when the agent has answered and run a program: what that reads from the disk and writes to memory, no
    clone has to any more. Leaves the stream open. Raises EngineError."""
    reader, writer = stream
    end = wire.HostEnd(secrets.token_bytes(wire.NONCE_BYTES))
    try:
        async with asyncio.timeout(timeout):
            writer.write(end.greeting())
            await _answer(reader, end)
            _, request = end.request(wire.encode(_REHEARSAL))
            writer.write(request)
            if (await _answer(reader, end)).kind != wire.REPLY:
                raise EngineError("the agent does not run a program")
    except TimeoutError:
        raise EngineError(f"the agent does not answer after {timeout:g} s") from None
    except (OSError, wire.ProtocolError) as error:
        raise EngineError(f"the agent does not answer: {error}") from error


async def _answer(reader: asyncio.StreamReader, end: wire.HostEnd) -> wire.Event:
    """The next greeting or end of a call."""
    while data := await reader.read(_READ):
        for event in end.receive(data):
            if event.kind in (wire.HELLO, wire.REPLY, wire.ERROR):
                return event
    raise EngineError("the guest ended before its agent answered")


def identity(path: Path) -> tuple[int, ...]:
    """Changes whenever the file is replaced or written to. Raises EngineError when there is none."""
    try:
        facts = path.stat()
    except OSError as error:
        raise EngineError(f"{path}: {error.strerror}") from error
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def cpu_model() -> str:
    """Model and features of this host's first processor."""
    with open("/proc/cpuinfo") as file:
        lines = file.read(_CPUINFO_BYTES).splitlines()
    return "\n".join(line for line in lines if line.startswith(("vendor_id", "model name", "flags")))


def _entries(directory: Path) -> Iterator[cpio.Entry]:
    """Everything in the package but what Python leaves behind, below `agent`, in a fixed order."""
    yield cpio.directory("agent", 0o700)  # nothing in it is for the user
    for parent, names, files in os.walk(directory):
        names[:] = sorted(name for name in names if name != CACHE)
        place = Path("agent", Path(parent).relative_to(directory))
        yield from (cpio.directory(str(place / name)) for name in names)
        yield from (cpio.file(str(place / name), Path(parent, name).read_bytes()) for name in sorted(files))
