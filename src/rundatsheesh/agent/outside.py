"""File work outside of the guest, on a host that has the workspace mounted: the same code, in a process that can reach
nothing but that workspace.

The manager starts one helper, as root and first process of a pid, mount, network and ipc namespace of its own:

    unshare --fork --kill-child --pid --net --ipc --mount --propagation private python -I -S -B DIRECTORY --outside

Descriptor 0 is a socket of packets. Each packet asks for a worker and brings its descriptors: a stream on which it
serves one call (see line.py), a detached copy of the workspace's mount, and the `cgroup.procs` files of the groups to
join. The answer is a pidfd of the worker. At the socket's end the helper ends, and the kernel ends the workers with
the first process of their namespace.

A worker confines itself before it reads a byte of its call: it ends where a step of that fails. What it sees then is a
root directory with the workspace under both of its names, and nothing else: no /proc, no device, no other file system.
It is the user, has no capability and no way to gain one, no network, cannot fork, and a filter leaves it the system
calls that its work takes.
"""

from __future__ import annotations

import gc
import os
import resource
import signal
import socket
import struct

from . import descriptors, libc, limits, seccomp, wire
from .console import say
from .files import receive
from .job import USER, VERSION, CallFailed, code_of
from .line import Gone, Line, LineReader, LineWriter
from .paths import ALIAS, WORKSPACE
from .tar import send

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

STARTED = b"+"
FAILED = b"-"
STREAM = 0  # the worker's stream to the manager

OOM_SCORE = 800  # above that of the sandboxes: memory that is used up takes a transfer rather than a machine
MEMORY = 512 << 20  # bytes of address space; it is 40 MB, and what a table of 65,536 names takes
FILES = 64  # descriptors; a transfer has about five
HELLO: dict[str, Any] = {
    "protocol": wire.PROTOCOL,
    "agent_version": VERSION,
    "boot_id": "none",
    "engine": "outside",
    "transfer_disk": False,
}

_MOST_DESCRIPTORS = 32
_ABOVE_ALL = 4096  # of the helper's descriptors, which are a dozen
_EMPTY_ROOT = b"/proc"  # where the new root is put together; any directory that every host has
_HARMLESS = libc.MS_NOSUID | libc.MS_NODEV | libc.MS_NOEXEC
_CAPABILITY_VERSION = 0x20080522
_LIMITS = {
    resource.RLIMIT_AS: MEMORY,
    resource.RLIMIT_NOFILE: FILES,
    resource.RLIMIT_NPROC: 0,
    resource.RLIMIT_CORE: 0,
    resource.RLIMIT_MEMLOCK: 0,
    resource.RLIMIT_MSGQUEUE: 0,
}


def main(arguments: list[str]) -> NoReturn:
    """The helper's whole life."""
    control = socket.socket(fileno=0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _leave_reaping_to_the_kernel()
    limits.set_oom_score(OOM_SCORE)
    enter_empty_root()
    wire.decode(wire.encode({"rehearsed": True}))
    gc.freeze()  # what is shared with the workers stays so
    try:
        while fds := descriptors.receive(control, 16, _MOST_DESCRIPTORS)[1]:
            _start_worker(control, fds)
            for fd in fds:
                os.close(fd)
    except (BrokenPipeError, ConnectionResetError):  # the manager was killed
        pass
    os._exit(0)


def enter_empty_root() -> None:
    """Leave the host's files behind. What remains is a read-only root with a place for the workspace."""
    libc.must("mount", b"none", _EMPTY_ROOT, b"tmpfs", libc.MS_NOSUID | libc.MS_NODEV, b"size=16k,nr_inodes=8,mode=755")
    os.chdir(_EMPTY_ROOT)
    os.umask(0o022)  # the user looks things up here, whatever the manager's is
    os.mkdir(WORKSPACE[1:])
    os.mkdir(os.path.dirname(ALIAS)[1:])
    os.symlink(WORKSPACE, ALIAS[1:])
    # With "." twice the old root is stacked on the new one, from where it is taken off: pivot_root(2), NOTES.
    libc.must("pivot_root", b".", b".")
    libc.must("umount2", b".", libc.MNT_DETACH)
    os.chdir("/")
    libc.must("mount", b"none", b"/", b"", libc.MS_REMOUNT | libc.MS_BIND | libc.MS_RDONLY | _HARMLESS, b"")


def _start_worker(control: socket.socket, fds: list[int]) -> None:
    try:
        pidfd = _fork_worker(fds)
    except OSError as error:
        control.send(FAILED + str(error).encode())
        return
    descriptors.send(control, STARTED, [pidfd])
    os.close(pidfd)


def _fork_worker(fds: list[int]) -> int:
    """A worker that ends before there is a pidfd of it must not be reaped before, or its number names nobody."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        pid = os.fork()
        if pid == 0:
            _work(fds)
        return os.pidfd_open(pid)
    finally:
        _leave_reaping_to_the_kernel()


def _leave_reaping_to_the_kernel() -> None:
    """Nobody here waits for a worker: the manager has a pidfd of each."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:  # who ended before it was left to the kernel
            pass
    except ChildProcessError:
        pass


def _work(fds: list[int]) -> NoReturn:
    """A worker's whole life. It says on the helper's stderr why it could not be confined, and is silent later."""
    status = 1
    gc.disable()  # it ends before there is much to collect
    try:
        stream, tree, *groups = fds
        confine(stream, tree, groups)
        serve(Line(socket.socket(fileno=STREAM)))
        status = 0
    except Gone:
        status = 0
    except BaseException as error:
        say(f"file worker: {type(error).__name__}: {error}")
    finally:
        os._exit(status)


def confine(stream: int, tree: int, groups: list[int]) -> None:
    """Raises OSError where a step fails; the process must not go on then."""
    for group in groups:
        os.write(group, b"0")  # this process, whatever its number is there
    _mount_workspace(tree)
    _keep_only(stream)
    os.setgroups([])
    os.setresgid(USER, USER, USER)
    for limit, most in _LIMITS.items():
        resource.setrlimit(limit, (most, most))
    libc.renounce_privileges()
    os.setresuid(USER, USER, USER)
    _drop_capabilities()
    seccomp.keep_file_work()


def _mount_workspace(tree: int) -> None:
    place = WORKSPACE.encode()
    libc.must("unshare", libc.CLONE_NEWNS)
    libc.must("syscall", libc.SYS_MOVE_MOUNT, tree, b"", libc.AT_FDCWD, place, libc.MOVE_MOUNT_F_EMPTY_PATH)
    flags = libc.MS_REMOUNT | libc.MS_BIND | libc.MS_NOATIME | _HARMLESS
    libc.must("mount", b"none", place, b"", flags, b"")
    os.chdir("/")


def _keep_only(stream: int) -> None:
    """The stream, and /dev/null for what is said by mistake; the helper's socket above all is let go of."""
    os.dup2(stream, STREAM, inheritable=False)
    os.dup2(1, 2)
    os.closerange(3, _ABOVE_ALL)


def _drop_capabilities() -> None:
    """The change of user has dropped those in force. That the kernel takes three empty sets shows it, and empties the
    third, which execution would inherit from."""
    libc.must("capset", struct.pack("=Ii", _CAPABILITY_VERSION, 0), bytes(24))
    if libc.bounding_set():
        raise OSError("the bounding set of capabilities is not empty")


def serve(line: Line) -> None:
    """One call. What was written before a failure stays, as in the guest."""
    params = line.request(HELLO)
    try:
        if params["call"] == "upload":
            receive(params, LineReader(line))
        elif params["call"] == "download":
            send(params, LineWriter(line))
        else:
            raise CallFailed("internal", "only files are worked on here")
    except CallFailed as failure:
        line.fail(failure.code, failure.message, failure.details)
    except OSError as error:
        line.fail(code_of(error.errno), os.strerror(error.errno or 0), {})
    except MemoryError:
        line.fail("internal", "the transfer takes more memory than it may have", {})
    else:
        line.reply()
    line.wait_closed()
