"""What a client can measure of any server: each function is a contender that measures once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from rundatsheesh.bench.connection import Box, Connection, milliseconds
from rundatsheesh.bench.samples import STREAM_MB
from rundatsheesh.bench.schedule import Contender

REST = 0.6  # seconds after which a VM without work is at rest
HELLO_TS = 'const greeting: string = "hello"; console.log(greeting);\n'
HELLO_JS = 'console.log("hello");\n'
# Bash's own clock, around the runtime alone: neither the call nor the shell's start is in it. Microseconds.
TIMED = "s=$EPOCHREALTIME; {} >/dev/null || exit; e=$EPOCHREALTIME; echo $((${{e/./}} - ${{s/./}}))"

Prepare = Callable[[], Awaitable[None]]


def create(connection: Connection, kind: str, prepare: Prepare | None = None, **fields: Any) -> Contender:
    """A VM from create to its first output, then to its end. `kind` ends the measures' names: "", "_warm", ..."""

    def measure() -> Mapping[str, float]:
        started = time.perf_counter()
        box = Box.create(connection, **fields)
        created = milliseconds(started)
        try:
            box.run("exec", cmd="echo hello")
            output = milliseconds(started)
        finally:
            ending = time.perf_counter()
            box.delete()
        return {f"create{kind}": created, f"first_output{kind}": output, "delete": milliseconds(ending)}

    return _contender(measure, prepare)


def call(box: Box, key: str, verb: str, **fields: Any) -> Contender:
    def measure() -> Mapping[str, float]:
        started = time.perf_counter()
        box.run(verb, **fields)
        return {key: milliseconds(started)}

    return _contender(measure)


def rested(box: Box, key: str, verb: str, **fields: Any) -> Contender:
    """After a pause as people and models make it; the VM may have been frozen meanwhile."""
    contender = call(box, key, verb, **fields)

    async def measure() -> Mapping[str, float]:
        await asyncio.sleep(REST)
        return await contender()

    return measure


def inside(box: Box, key: str, command: str) -> Contender:
    """The runtime itself, started in the VM by a shell and timed there."""

    def measure() -> Mapping[str, float]:
        outcome = box.run("exec", cmd=TIMED.format(command))
        return {key: int(outcome["stdout"]) / 1000}

    return _contender(measure)


def upload_stream(box: Box, archive: bytes) -> Contender:
    def measure() -> Mapping[str, float]:
        started = time.perf_counter()
        box.upload(archive, "/workspace/in")
        return {"upload": STREAM_MB / (time.perf_counter() - started)}

    return _contender(measure)


def download_stream(box: Box, path: str) -> Contender:
    def measure() -> Mapping[str, float]:
        started = time.perf_counter()
        box.download(path)
        return {"download": STREAM_MB / (time.perf_counter() - started)}

    return _contender(measure)


def upload_files(box: Box, archive: bytes) -> Contender:
    """Into a directory that is new each time."""

    def measure() -> Mapping[str, float]:
        box.run("exec", cmd="rm -rf /workspace/files-in")
        started = time.perf_counter()
        box.upload(archive, "/workspace/files-in")
        return {"upload_files": milliseconds(started)}

    return _contender(measure)


def download_files(box: Box, path: str) -> Contender:
    def measure() -> Mapping[str, float]:
        started = time.perf_counter()
        box.download(path)
        return {"download_files": milliseconds(started)}

    return _contender(measure)


def _contender(measure: Callable[[], Mapping[str, float]], prepare: Prepare | None = None) -> Contender:
    """The clock runs in a thread of its own, so no event loop's turn is in what it shows."""

    async def contend() -> Mapping[str, float]:
        if prepare is not None:
            await prepare()
        return await asyncio.to_thread(measure)

    return contend
