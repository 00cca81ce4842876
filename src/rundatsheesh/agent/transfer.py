"""Files in and out: the bytes of a call, through a pipe or the transfer disk, to or from a process that works as the
user."""

from __future__ import annotations

import fcntl
import os
import threading

from . import wire
from .calls import Cancelled
from .job import CallFailed, code_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .calls import Call
    from .spawner import Spawner, Tree

_PIPE = 1 << 18
_MESSAGES = 4096  # bytes about slots that are passed on at once
_DISK = "/dev/vdc"


class Transfers:
    """Uploads and downloads, through the VM's transfer disk (see slots.py) where it has one and the host says so."""

    def __init__(self, spawner: Spawner, engine: str) -> None:
        self._spawner = spawner
        self._has_cache = engine == "qemu"  # gVisor has none of its own: the host's kernel has everything already
        has_disk = engine == "qemu" and os.path.exists(_DISK)
        self._disk = os.open(_DISK, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC) if has_disk else None
        self._turns: dict[int, threading.Lock] = {}  # by where a ring begins
        self._lock = threading.Lock()

    @property
    def have_disk(self) -> bool:
        return self._disk is not None

    def upload(self, call: Call, params: dict[str, Any]) -> dict[str, Any]:
        """Have files.upload write what the host sends. What was written before a failure stays; what is answered is
        kept, also when the machine is killed at the next moment."""
        reply = self._transfer("upload", _feed, call, params)
        if self._has_cache:
            os.sync()
        return reply

    def download(self, call: Call, params: dict[str, Any]) -> dict[str, Any]:
        """Send what files.download gives. A failure after the first byte ends the stream short, with an error."""
        return self._transfer("download", _drain, call, params)

    def _transfer(
        self, function: str, move: Callable[[Call, int], None], call: Call, params: dict[str, Any]
    ) -> dict[str, Any]:
        if "ring" in params:
            with self._turn(params["ring"]["offset"]):
                return self._through_disk(function, call, params)
        tree, ours = _start(call, function, params, self._spawner)
        try:
            try:
                move(call, ours)
            finally:
                os.close(ours)
            tree.wait()
            _judge(call, tree)
            return {}
        finally:
            tree.close()

    def _turn(self, offset: int) -> threading.Lock:
        """Held while a ring is used: a manager that is gone may have left somebody at work on it."""
        with self._lock:
            return self._turns.setdefault(offset, threading.Lock())

    def _through_disk(self, function: str, call: Call, params: dict[str, Any]) -> dict[str, Any]:
        tree, to_tree, from_tree = self._start_at_disk(function, call, params)
        try:
            _pass_on(call, to_tree, from_tree)
            tree.wait()
            _judge(call, tree)
            return {}
        finally:
            tree.kill()
            tree.wait()
            tree.close()

    def _start_at_disk(self, function: str, call: Call, params: dict[str, Any]) -> tuple[Tree, int, int]:
        """The process at work, and our ends of the pipes to and from it."""
        if self._disk is None:
            raise CallFailed("internal", "there is no transfer disk")
        from_us, to_tree = os.pipe2(os.O_CLOEXEC)
        from_tree, to_us = os.pipe2(os.O_CLOEXEC)
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        try:
            tree = self._spawner.start(("call", "files", function, params, 0), [from_us, to_us, null, self._disk])
        except BaseException:
            os.close(to_tree)
            os.close(from_tree)
            raise
        finally:
            for fd in (from_us, to_us, null):
                os.close(fd)
        call.on_cancel(tree.kill)
        return tree, to_tree, from_tree


def _pass_on(call: Call, to_tree: int, from_tree: int) -> None:
    """What is said about slots, in both directions, until the process has ended."""
    try:
        call.forward(to_tree)
        while told := os.read(from_tree, _MESSAGES):
            call.send_data(wire.SLOT, told)
    finally:
        call.forward(None)
        os.close(to_tree)
        os.close(from_tree)


def _feed(call: Call, writing: int) -> None:
    while (chunk := call.read_data()) is not None:
        view = memoryview(chunk)
        while view:
            try:
                view = view[os.write(writing, view) :]
            except BrokenPipeError:
                return  # the process has ended; why, it says itself


def _drain(call: Call, reading: int) -> None:
    while chunk := os.read(reading, wire.MAX_CHUNK):
        call.send_data(wire.FILE, chunk)


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
            raise CallFailed(code_of(number), text)
        raise CallFailed("internal", f"{stage}: {evidence}")
    if tree.status is None or tree.status != 0:
        raise CallFailed("internal", "the transfer was killed inside the guest")
