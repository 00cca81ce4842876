"""The agent's server: one trusted stream from the host at a time, many calls over it."""

from __future__ import annotations

import gc
import os
import signal
import socket
import time

from . import identity, wire
from .ahead import Ahead
from .calls import Call, Cancelled, Connection
from .console import report, say
from .init import POWER_OFF
from .job import VERSION, CallFailed, Command
from .loop import IN, Loop
from .memory import KernelsGuard, MemoryGuard
from .room import Room
from .run import Run
from .spawner import Spawner
from .transfer import Transfers
from .workers import Workers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    from .options import Options

_TIMED = ("clock", "configure")  # calls that tell the time


class Server:
    def __init__(self, options: Options, init: socket.socket) -> None:
        self._options = options
        self._init = init
        self.loop = Loop()
        self._workers = Workers()
        self._spawner = Spawner(self.loop, init)
        self._spawner.on_change = self._on_change
        self._guard = MemoryGuard(self._spawner) if options.engine == "gvisor" else KernelsGuard()
        self._transfers = Transfers(self._spawner, options.engine)
        # A clone of a Linux guest would share with its siblings what an interpreter took for random at its start.
        has_ahead = options.ahead and options.engine == "gvisor"
        memory = self._guard.total if has_ahead else 0
        self._ahead = Ahead(self._spawner, self.loop, self._workers, memory=memory)
        self._room = Room() if options.engine == "qemu" else None  # gVisor's kernel has no OOM killer, see memory.py
        self._watchers: list[Watcher] = []
        # Each runs in a thread of its own and returns the reply. Those of `_at_once` answer in the main thread.
        self._handlers: dict[str, Callable[[Call, dict[str, Any]], dict[str, Any]]] = {
            "exec": self._exec,
            "script": self._script,
            "upload": self._transfers.upload,
            "download": self._transfers.download,
            "clock": lambda call, params: identity.set_clock(params),
            "configure": lambda call, params: identity.configure(params, self._options.engine),
        }
        self._at_once: dict[str, Callable[[Call], None]] = {
            "ping": lambda call: call.reply({}),
            "processes": self._watch_processes,
            "shutdown": self._shutdown,
        }

    def prepare(self) -> None:
        """Have a supervisor waiting for the first call, and somebody to watch over what it does."""
        self._spawner.refill()
        self._workers.prepare()
        self._guard.start()

    def hello(self) -> bytes:
        return wire.encode(
            {
                "protocol": wire.PROTOCOL,
                "agent_version": VERSION,
                "boot_id": identity.boot_id,
                "engine": self._options.engine,
                "transfer_disk": self._transfers.have_disk,
            }
        )

    def dispatch(self, call: Call, body: bytes) -> None:
        arrived = time.monotonic_ns()
        params = wire.decode(body)
        name = params.pop("call", None)
        if name in self._at_once:
            self._at_once[name](call)
        elif name in self._handlers:
            self._start(self._handlers[name], call, params | {"arrived_ns": arrived} if name in _TIMED else params)
        else:
            call.fail("internal", f"the agent does not know the call {name!r}")

    def _start(self, handler: Callable[[Call, dict[str, Any]], dict[str, Any]], call: Call, params: Any) -> None:
        try:
            self._workers.run(lambda: self._run(handler, call, params))
        except RuntimeError:  # the kernel has no room for another thread
            call.fail("guest_overloaded", "the guest cannot start another call")

    def _run(self, handler: Callable[[Call, dict[str, Any]], dict[str, Any]], call: Call, params: Any) -> None:
        try:
            call.reply(handler(call, params))
        except CallFailed as failure:
            call.fail(failure.code, failure.message, failure.details)
        except Cancelled:
            call.fail("cancelled", "the call was cancelled")
        except Exception as error:
            report(error)
            call.fail("internal", f"{type(error).__name__} in the agent")
        finally:
            self._spawner.refill()
            self._ahead.answered()

    def _exec(self, call: Call, params: dict[str, Any]) -> dict[str, Any]:
        argv = ["/bin/bash", "-lc", params["cmd"]]
        command = Command(argv=argv, env={}, given=params["env"], cwd=params["cwd"], ahead="bash")
        return self._execute(call, command, params)

    def _script(self, call: Call, params: dict[str, Any]) -> dict[str, Any]:
        from . import scripts  # costs the start nothing this way

        command = scripts.prepare(params)
        if self._room is None:
            return self._execute(call, command, params)
        with self._room.place(call, params["timeout_ms"]) as waited:
            return self._execute(call, command, params | {"timeout_ms": params["timeout_ms"] - waited})

    def _execute(self, call: Call, command: Command, params: dict[str, Any]) -> dict[str, Any]:
        limits = (params["timeout_ms"], params["max_output"])
        with self._ahead.call(command):
            return Run(call, command, self._spawner, self._ahead, self._guard, *limits).run()

    def _watch_processes(self, call: Call) -> None:
        self._watchers = [watcher for watcher in self._watchers if not watcher.call.cancelled]
        watcher = Watcher(call, self._spawner)
        self._watchers.append(watcher)
        call.on_credit = watcher.tell
        call.on_cancel(lambda: call.fail("cancelled", "the watch was cancelled"))
        watcher.tell()

    def _on_change(self) -> None:
        self._guard.wake()
        for watcher in self._watchers:
            watcher.tell()

    def _shutdown(self, call: Call) -> None:
        call.reply({})
        self._init.send(POWER_OFF)


class Watcher:
    """Tells the host how many process trees live, whenever that changes between none and some."""

    def __init__(self, call: Call, spawner: Spawner) -> None:
        self.call = call
        self._spawner = spawner
        self._told: int | None = None

    def tell(self) -> None:
        if self.call.cancelled:
            return
        try:
            with self.call.lock:
                live = self._spawner.live
                news = self._told is None or bool(live) != bool(self._told)
                if news and self.call.try_send(wire.RESULT, b"%d\n" % live):
                    self._told = live
        except Cancelled:
            return


class SocketTransport:
    """Listens on a unix socket; a new connection replaces the one before, whose manager is gone."""

    def __init__(self, server: Server, path: str) -> None:
        self._server = server
        self._stream: socket.socket | None = None
        self._connection: Connection | None = None
        if os.path.lexists(path):  # of an earlier boot
            os.unlink(path)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)  # as init's umask has it: for root alone
        self._listener.listen(8)
        self._listener.setblocking(False)
        server.loop.watch(self._listener.fileno(), self._on_connect)

    def _on_connect(self, events: int) -> None:
        try:
            stream, _ = self._listener.accept()
        except BlockingIOError:
            return
        self._disconnect()
        stream.setblocking(False)
        self._stream = stream
        self._connection = Connection(stream.fileno(), self._server.loop, self._server.hello, self._server.dispatch)
        self._server.loop.watch(stream.fileno(), self._on_ready)

    def _on_ready(self, events: int) -> None:
        connection = self._connection
        assert connection is not None
        try:
            if events & ~IN:
                connection.write()
            if not connection.read():
                self._disconnect()
        except wire.ProtocolError as error:
            say(f"dropping the connection: {error}")
            self._disconnect()

    def _disconnect(self) -> None:
        if self._stream is None or self._connection is None:
            return
        self._server.loop.forget(self._stream.fileno())
        self._connection.close()
        self._stream.close()
        self._stream = self._connection = None


def main(options: Options, init: socket.socket) -> NoReturn:
    gc.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server = Server(options, init)
    if options.port is None:
        SocketTransport(server, options.socket)
    else:
        from .port import PortTransport

        if options.engine == "qemu":
            identity.prepare()
        PortTransport(server, options.port)
    server.prepare()
    # What there is now stays. To have it looked through while a call waits would take an emulated CPU 30 ms.
    gc.freeze()
    server.loop.run()
