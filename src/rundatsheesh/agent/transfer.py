"""Files in and out: the bytes of a call, through a pipe, to or from a process that works as the user."""

from __future__ import annotations

import errno
import fcntl
import os

from . import wire
from .calls import Cancelled
from .job import CallFailed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .calls import Call
    from .spawner import Spawner, Tree

_PIPE = 1 << 18
_FULL = (errno.ENOSPC, errno.EDQUOT)


def upload(call: Call, params: dict[str, Any], spawner: Spawner) -> dict[str, Any]:
    """Feed what the host sends to files.upload. What was written before a failure stays."""
    tree, writing = _start(call, "upload", params, spawner)
    try:
        try:
            _pass_on(call, writing)
        finally:
            os.close(writing)
        tree.wait()
        _judge(call, tree)
        return {}
    finally:
        tree.close()


def download(call: Call, params: dict[str, Any], spawner: Spawner) -> dict[str, Any]:
    """Send what files.download writes. A failure after the first byte ends the stream short, with an error."""
    tree, reading = _start(call, "download", params, spawner)
    try:
        try:
            while chunk := os.read(reading, wire.MAX_CHUNK):
                call.send_data(wire.FILE, chunk)
        finally:
            os.close(reading)
        tree.wait()
        _judge(call, tree)
        return {}
    finally:
        tree.close()


def _start(call: Call, function: str, params: dict[str, Any], spawner: Spawner) -> tuple[Tree, int]:
    """The process at work, and our end of its pipe."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, _PIPE)
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    up = function == "upload"
    theirs, ours = (reading, writing) if up else (writing, reading)
    fds = [reading, null, null] if up else [null, writing, null]
    try:
        tree = spawner.start(("call", "files", function, params, fds.index(theirs)), fds)
    except BaseException:
        os.close(ours)
        raise
    finally:
        os.close(theirs)
        os.close(null)
    call.on_cancel(tree.kill)
    return tree, ours


def _pass_on(call: Call, writing: int) -> None:
    while (chunk := call.read_data()) is not None:
        view = memoryview(chunk)
        while view:
            try:
                view = view[os.write(writing, view) :]
            except BrokenPipeError:
                return  # the process has ended; why, it says itself


def _judge(call: Call, tree: Tree) -> None:
    """Raise what went wrong, if something did."""
    if call.cancelled:
        raise Cancelled
    failure = tree.failure()
    if failure is not None:
        stage, evidence = failure
        if stage == "failed":
            code, message, details = evidence
            raise CallFailed(code, message, details)
        if stage == "call":
            number, text = evidence
            raise CallFailed("workspace_full" if number in _FULL else "internal", text)
        raise CallFailed("internal", f"{stage}: {evidence}")
    if tree.status is None or tree.status != 0:
        raise CallFailed("internal", "the transfer was killed inside the guest")
