"""The first process of the guest: forks, reaps, and ends the guest when the server ends.

It has one thread, so forking is safe, and it never sees a call: what is forked from here holds no caller's secrets.
The server asks for supervisors over a socket of packets: FORK with a descriptor (control), POWER_OFF.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket

from . import libc, limits, seccomp
from .console import report, say
from .descriptors import receive
from .options import Options
from .signals import Waiter
from .supervisor import supervise
from .sweep import descendants, sweep

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

FORK = b"F"
POWER_OFF = b"P"

_SWEEP_WAIT_MS = 20


class Init:
    def __init__(self, options: Options, requests: socket.socket, server: int, waiter: Waiter) -> None:
        self._options = options
        self._requests = requests
        self._server = server
        self._waiter = waiter
        self._supervisors: set[int] = set()

    def run(self) -> NoReturn:
        poll = select.poll()
        poll.register(self._requests, select.POLLIN)
        poll.register(self._waiter.fd, select.POLLIN)
        while True:
            self._reap()
            ready = dict(poll.poll())
            self._waiter.clear()
            if self._requests.fileno() in ready:
                self._on_request()

    def _on_request(self) -> None:
        message, fds = receive(self._requests, 1, 1)
        if message == FORK:
            self._fork_supervisor(socket.socket(fileno=fds[0]))
        else:  # the end of the server is its end of file
            self._end(0 if message == POWER_OFF else 1)

    def _fork_supervisor(self, control: socket.socket) -> None:
        with control:
            try:
                pid = os.fork()
            except OSError as error:  # the descriptor closes, by which the server knows
                say(f"cannot fork a supervisor: {error}")
                return
            if pid == 0:
                self._requests.close()
                self._waiter.forget()
                supervise(control)
            self._supervisors.add(pid)

    def _reap(self) -> None:
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)  # the server is a child as long as this loop runs
            if pid == 0:
                return
            if pid == self._server:
                say(f"the server ended with wait status {status}")
                self._end(1)
            if pid in self._supervisors:
                self._supervisors.discard(pid)
                if status != 0:
                    say(f"supervisor {pid} ended with wait status {status}")
                    self._sweep_orphans()

    def _sweep_orphans(self) -> None:
        """A supervisor was lost (the kernel ran out of memory): its processes are ours now and belong to no call."""
        sweep(os.getpid(), {self._server, *self._supervisors}, self._wait_for_orphans)

    def _wait_for_orphans(self) -> bool:
        self._waiter.wait(_SWEEP_WAIT_MS)
        self._reap_orphans()
        return bool(descendants(os.getpid(), {self._server, *self._supervisors}))

    def _reap_orphans(self) -> None:
        for pid in descendants(os.getpid(), {self._server, *self._supervisors}):
            try:
                os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                continue  # its parent is not this process yet

    def _end(self, status: int) -> NoReturn:
        """End the guest. What is written to the workspace is flushed first where the guest owns the disk."""
        if self._options.engine == "qemu":
            sweep(os.getpid(), set(), self._wait_for_all)
            libc.power_off()
        os._exit(status)

    def _wait_for_all(self) -> bool:
        self._waiter.wait(_SWEEP_WAIT_MS)
        while True:
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    return True
            except ChildProcessError:
                return False


def main(arguments: list[str]) -> NoReturn:
    options = Options(arguments)
    _prepare(options)
    waiter = Waiter(signal.SIGCHLD)
    requests, servers_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server = os.fork()
    if server == 0:
        try:
            waiter.forget()
            requests.close()
            from .server import main as serve  # after the fork: what it imports would burden each supervisor

            serve(options, servers_end)
        except BaseException as error:
            report(error)
        finally:
            os._exit(1)
    servers_end.close()
    Init(options, requests, server, waiter).run()


def _prepare(options: Options) -> None:
    gc.disable()  # a collection in a forked process would copy every page
    gc.freeze()
    libc.renounce_privileges()
    libc.hide_from_users()
    limits.processes = options.max_processes
    limits.files = options.max_files
    limits.raise_own()
    if options.cpus:
        limits.use_cpus(options.cpus)
    if options.engine == "gvisor":
        seccomp.forbid_privileges()
    if options.engine == "qemu":
        limits.set_oom_score(limits.OWN_OOM_SCORE)
        limits.bound_files_in_memory()
        limits.preferred_by_oom_killer = True
        # For each upload and download to find it loaded: an emulated CPU takes a tenth of a second to do so, and what a
        # template has loaded all its clones share.
        from . import files  # noqa: F401
    os.umask(0o077)
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    while null < 3:  # 0, 1, 2 were closed
        null = os.dup(null)
    if null != 3:
        os.dup2(null, 3, inheritable=False)  # the numbers that programs use stay taken, see supervisor.py
        os.close(null)
