"""Who this guest is: set after its boot, and again after it was cloned from a template.

Under gVisor all of it was told to the sandbox from outside; only a QEMU guest sets itself up.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import time

from . import libc, limits, network
from .console import say
from .job import CallFailed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_WORKSPACE = "/workspace"
_WORKSPACE_DISK = "/dev/vdb"
_FRESH_DISK = "/dev/vdd"  # holds an empty file system when a template is taken, and is a new machine's workspace then
_EXT4_MAGIC, _EXT4_MAGIC_AT = b"\x53\xef", 1080
# No background writes into an idle disk, and deleted files free space on the host.
_MOUNT_OPTIONS = "noinit_itable,discard,errors=remount-ro"
_RNDADDENTROPY, _RNDRESEEDCRNG = 0x40085203, 0x5207

boot_id = os.urandom(16).hex()


def prepare() -> None:
    """What machines that are cloned from this one have in common: done once, before the template is taken."""
    try:
        network.bring_up()
        if _holds_ext4(_FRESH_DISK):
            _mount(_FRESH_DISK)
            os.sync()
        limits.bound_files_in_memory()  # once more: less memory is free than when the agent began
    except OSError as error:  # `configure` needs the same, and fails where the host hears of it
        say(f"cannot prepare: {error}")


def configure(params: dict[str, Any], engine: str) -> dict[str, Any]:
    """Set what the host says; CallFailed names the step that the kernel refused."""
    global boot_id
    if engine == "qemu":
        _step("entropy", _add_entropy, bytes.fromhex(params["entropy"]))
        _step("clock", _set_clock, params)
        _step("hostname", socket.sethostname, params["hostname"])
        _step("name", _write_file, "/etc/hostname", params["hostname"] + "\n")
        _step("hosts", _write_file, "/etc/hosts", f"127.0.0.1 localhost\n{params['guest_ip']} {params['hostname']}\n")
        _step("machine-id", _write_file, "/etc/machine-id", params["machine_id"] + "\n")
        _step("network", network.configure, params["guest_ip"], params["mac"], params["gateway"])
        _step("workspace", _mount_workspace if params["mount_workspace"] else _check_workspace)
    boot_id = params["boot_id"] or boot_id
    return {"boot_id": boot_id} | ({"clock_ns": time.time_ns()} if engine == "qemu" else {})


def set_clock(params: dict[str, Any]) -> dict[str, Any]:
    """Once more, where what `configure` said was old when it arrived."""
    _step("clock", _set_clock, params)
    return {"clock_ns": time.time_ns()}


def _step(name: str, function: Callable[..., object], *arguments: Any) -> None:
    try:
        function(*arguments)
    except OSError as error:
        raise CallFailed("internal", f"cannot set the guest's {name}: {error}") from None


def _set_clock(params: dict[str, Any]) -> None:
    """What the host said, and what has passed since that arrived: an emulated CPU takes 50 ms to get here."""
    passed = time.monotonic_ns() - params["arrived_ns"]
    time.clock_settime_ns(time.CLOCK_REALTIME, params["time_ns"] + passed)


def _add_entropy(entropy: bytes) -> None:
    """Mix it into the kernel's pool, credit it, and have all that is drawn from now on depend on it."""
    import fcntl

    size = len(entropy).to_bytes(4, "little")
    bits = (8 * len(entropy)).to_bytes(4, "little")
    fd = os.open("/dev/urandom", os.O_WRONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _RNDADDENTROPY, bits + size + entropy)
        fcntl.ioctl(fd, _RNDRESEEDCRNG)
    finally:
        os.close(fd)


def _write_file(path: str, text: str) -> None:
    """In place: the file is bound over the image's own."""
    fd = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.write(fd, text.encode("ascii"))
    finally:
        os.close(fd)


def _mount_workspace() -> None:
    """Only now: what a kernel remembered of another disk would be wrong for this one."""
    libc.unmount(_WORKSPACE)  # the fresh one
    _mount(_WORKSPACE_DISK)
    _open_to_owner(_WORKSPACE)


def _open_to_owner(directory: str) -> None:
    """The user may close the workspace to itself, and no command could start in it then, for good."""
    root = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        mode = stat.S_IMODE(os.fstat(root).st_mode)
        if mode & stat.S_IRWXU != stat.S_IRWXU:
            os.fchmod(root, mode | stat.S_IRWXU)
    except OSError as error:  # a damaged file system is read-only: what can be read of it still is
        say(f"the workspace keeps its mode: {error}")
    finally:
        os.close(root)


def _check_workspace() -> None:
    if not os.path.ismount(_WORKSPACE):
        raise OSError(errno.EIO, "the template had mounted none")


def _mount(disk: str) -> None:
    if libc.mount(disk, _WORKSPACE, "ext4", _MOUNT_OPTIONS) != 0:
        raise OSError(errno.EIO, f"the kernel refuses to mount {disk}")


def _holds_ext4(disk: str) -> bool:
    with open(disk, "rb", 0) as file:
        return os.pread(file.fileno(), len(_EXT4_MAGIC), _EXT4_MAGIC_AT) == _EXT4_MAGIC
