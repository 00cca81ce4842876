"""Run one command as the user: its output, its deadline, its end."""

from __future__ import annotations

import os
import select
import time

from . import wire
from .calls import Cancelled
from .job import CallFailed
from .paths import directory_inside_workspace
from .streams import Streams

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .ahead import Ahead, Waiting
    from .calls import Call
    from .job import Command
    from .memory import Guard
    from .spawner import Spawner, Tree

TIMED_OUT = 124
NOT_EXECUTABLE = 126
NOT_FOUND = 127
SIGNALLED = 128
KILLED = SIGNALLED + 9

_READ = 1 << 16
# After the program's end, how long to wait for more output from what it left behind (`cmd > >(filter)`): until nobody
# holds the output, it was quiet for the first time or the second has passed. Milliseconds.
_QUIET = 50
_GRACE = 250
_STDERR_FOR_CHANNEL = 1 << 16
_RETRY = 100  # for credit that has not come yet
# A process in an uninterruptible wait of the kernel must not hold the answer for ever. To end 512 processes takes
# gVisor a quarter of a second, and ten where others want the CPUs, too.
_KILL_WAIT = 30_000


class Output:
    """One stream as the host shall have it: the head at once, the tail at the end, the middle counted."""

    def __init__(self, stream: int, limit: int) -> None:
        self._stream = stream
        self._head_left = limit // 2
        self._tail_limit = limit - limit // 2
        self._head = bytearray()  # not sent yet
        self._tail = bytearray()
        self.dropped = 0

    def feed(self, data: bytes) -> None:
        head = data[: self._head_left]
        self._head_left -= len(head)
        self._head += head
        self._tail += data[len(head) :]
        if len(self._tail) > 2 * self._tail_limit + _READ:  # not each time: moving the tail costs its length
            self._trim()

    def flush(self, call: Call) -> bool:
        """Send of the head what the credit allows; whether that was all."""
        if self._head:
            del self._head[: call.try_send(self._stream, self._head)]
        return not self._head

    def finish(self, call: Call) -> None:
        """Send all that is left, waiting for credit."""
        self._trim()
        call.send_data(self._stream, self._head)
        call.send_data(self._stream, self._tail)

    def _trim(self) -> None:
        excess = max(0, len(self._tail) - self._tail_limit)
        self.dropped += excess
        del self._tail[:excess]


class Run:
    """One command from its start to its answer."""

    def __init__(
        self,
        call: Call,
        command: Command,
        spawner: Spawner,
        ahead: Ahead,
        guard: Guard,
        timeout_ms: int,
        max_output: int,
    ) -> None:
        self._call = call
        self._command = command
        self._spawner = spawner
        self._ahead = ahead
        self._guard = guard
        self._kills_before = guard.kills
        self._started = _milliseconds()
        self._deadline = self._started + timeout_ms
        self._timed_out = False
        self._ended = 0  # when the program ended
        self._last_output = 0
        self._outputs = {wire.STDOUT: Output(wire.STDOUT, max_output), wire.STDERR: Output(wire.STDERR, max_output)}
        self._streams: dict[int, int] = {}  # descriptor -> stream; RESULT is the channel
        self._waiting: Waiting | None = None  # started ahead of the call
        self._has_given_up = False
        self._stderr = bytearray()  # its end, where a channel makes something of it

    def run(self) -> dict[str, Any]:
        """The answer. Raises CallFailed where the command could not be tried, Cancelled when nobody wants it."""
        cwd = directory_inside_workspace(self._command.cwd)
        _check_strings(self._command)
        tree: Tree | None = None
        try:
            tree = self._start(cwd)
            self._pump(tree)
            if self._waiting is not None and self._waiting.was_lost() and not self._timed_out:
                tree = None
                self._give_up_waiting()
                tree = self._start(cwd)
                self._pump(tree)
            if self._call.cancelled:
                raise Cancelled
            return self._answer(tree)
        finally:
            self._let_go(tree)

    def _start(self, cwd: str) -> Tree:
        command = self._command
        self._waiting = None if self._has_given_up else self._ahead.take(command, cwd)
        if self._waiting is not None:
            self._streams = self._waiting.streams.ours
            return self._waiting.tree
        streams = Streams(command.stdin, channel=command.channel is not None)
        self._streams = streams.ours
        try:
            return self._spawner.start(("execute", command.argv, command.env, cwd), streams.theirs)
        finally:
            streams.hand_over()

    def _give_up_waiting(self) -> None:
        """The one that waited is dead: nothing has happened yet, and the command is started as any other."""
        assert self._waiting is not None
        self._waiting.close()
        self._streams, self._ended, self._has_given_up = {}, 0, True

    def _pump(self, tree: Tree) -> None:
        """Until the program has ended, and with it what it left or was killed with, as far as that is awaited."""
        self._call.on_cancel(tree.kill)
        poll = select.poll()
        control = tree.control
        for fd in (control, *self._streams):
            poll.register(fd, select.POLLIN)
        while True:
            stuck = [output for output in self._outputs.values() if not output.flush(self._call)]
            left = self._left(tree, not stuck)
            if left <= 0:
                return
            for fd, _ in poll.poll(left):
                if fd == control:
                    self._on_report(tree)
                    if tree.empty:
                        poll.unregister(control)
                elif not self._on_output(fd):
                    poll.unregister(fd)

    def _left(self, tree: Tree, flushed: bool) -> int:
        """Milliseconds to wait for the next event; 0 when enough was waited. Kills when the deadline is over."""
        now = _milliseconds()
        retry = self._deadline if flushed else now + _RETRY
        if self._ended and (tree.empty or not (self._timed_out or self._call.cancelled)):
            if not self._streams:
                return 0
            return min(self._ended + _GRACE, max(self._ended, self._last_output) + _QUIET) - now
        if not self._timed_out and now >= self._deadline:
            self._timed_out = True
            self._deadline = now + _KILL_WAIT
            tree.kill()
        return max(0, min(self._deadline, max(retry, now + 1)) - now)

    def _on_report(self, tree: Tree) -> None:
        tree.read()
        if not self._ended and (tree.status is not None or tree.empty):
            self._ended = _milliseconds()

    def _on_output(self, fd: int) -> bool:
        """Whether there may be more."""
        try:
            data = os.read(fd, _READ)
        except BlockingIOError:
            return True
        except ConnectionResetError:
            data = b""
        stream = self._streams[fd]
        if not data:
            del self._streams[fd]
            os.close(fd)
            return False
        self._last_output = _milliseconds()
        if stream == wire.RESULT:
            if self._command.channel is not None:
                self._command.channel.feed(data)
        else:
            self._outputs[stream].feed(data)
            if stream == wire.STDERR and self._command.channel is not None:
                self._stderr += data
                del self._stderr[:-_STDERR_FOR_CHANNEL]
        return True

    def _answer(self, tree: Tree) -> dict[str, Any]:
        duration = (self._ended or _milliseconds()) - self._started
        code = self._exit_code(tree)
        self._explain_kill(code)
        for output in self._outputs.values():
            output.finish(self._call)
        if self._command.channel is not None:
            values = self._command.channel.finish(code, bytes(self._stderr))
            if values[1] is not None and code == 0:
                code = 1  # the program reported an error and left as if there was none
            for stream, text in zip((wire.RESULT, wire.SCRIPT_ERROR), values, strict=True):
                self._call.send_data(stream, text or b"")
        return {
            "exit_code": TIMED_OUT if self._timed_out else code,
            "timed_out": self._timed_out,
            "duration_ms": duration,
            "dropped": [self._outputs[stream].dropped for stream in (wire.STDOUT, wire.STDERR)],
        }

    def _exit_code(self, tree: Tree) -> int:
        failure = tree.failure() if self._ended else None
        if failure is not None:
            return self._explain(*failure)
        if tree.status is None:
            return KILLED  # the supervisor was killed, and its tree with it
        code = os.waitstatus_to_exitcode(tree.status)
        return code if code >= 0 else SIGNALLED - code

    def _explain(self, stage: str, evidence: Any) -> int:
        """The exit code of a program that was not executed, in the manner of a shell."""
        if stage == "failed":
            code, message, details = evidence
            raise CallFailed(code, message, details)
        if stage != "execute":
            raise CallFailed("internal", f"{stage}: {evidence}")
        number, text = evidence
        self._outputs[wire.STDERR].feed(f"{self._command.argv[0]}: {text}\n".encode(errors="replace"))
        return NOT_FOUND if number == 2 else NOT_EXECUTABLE

    def _explain_kill(self, code: int) -> None:
        """Say so in the output where memory exhaustion is what ended the program."""
        if code != KILLED or self._timed_out or self._guard.kills == self._kills_before:
            return
        self._outputs[wire.STDERR].feed(b"Killed: the VM is out of memory (%d MiB)\n" % (self._guard.total >> 20))

    def _let_go(self, tree: Tree | None) -> None:
        """The call is over; what the program left behind lives on, unless it was to be killed."""
        if self._waiting is not None:
            self._waiting.let_go()
        channel = [fd for fd, stream in self._streams.items() if stream == wire.RESULT]
        for fd in channel:
            del self._streams[fd]
            os.close(fd)
        if tree is not None and self._ended and not tree.empty:
            self._spawner.leave(tree, list(self._streams))
            return
        for fd in self._streams:
            os.close(fd)
        if tree is not None:
            tree.close()


def _check_strings(command: Command) -> None:
    """What the kernel cannot take is the caller's mistake."""
    for name, value in command.env.items():
        if not name or "=" in name:
            raise CallFailed("invalid_input", f"{name!r} cannot be the name of a variable")
        _check_string(name, "an environment variable's name")
        _check_string(value, f"the variable {name}")
    for argument in command.argv:
        _check_string(argument, "the command")


def _check_string(text: str, what: str) -> None:
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError:
        raise CallFailed("invalid_input", f"{what} contains a lone surrogate") from None
    if b"\0" in encoded:
        raise CallFailed("invalid_input", f"{what} contains a NUL character")


def _milliseconds() -> int:
    return time.monotonic_ns() // 1_000_000
