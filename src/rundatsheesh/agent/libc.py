"""System calls that the standard library has no name for.

Through `_ctypes` itself: the `ctypes` package around it costs a tenth of the agent's start.
"""

from __future__ import annotations

import _ctypes
import os

PR_SET_DUMPABLE = 4
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_NOATIME, MS_BIND = 1, 2, 4, 8, 32, 1024, 4096
MNT_DETACH = 2
CLONE_NEWNS = 0x20000
SYS_MOVE_MOUNT = 429  # on every architecture
MOVE_MOUNT_F_EMPTY_PATH = 4
AT_FDCWD = -100
POWER_OFF = 0x4321FEDC
LAST_CAPABILITY = 63  # above the last that exists; dropping one that does not is refused and means nothing

_self = _ctypes.dlopen(None, 0)  # type: ignore[arg-type]  # None is the program with all that it has loaded


class _Byte(_ctypes._SimpleCData):  # type: ignore[type-arg]  # it cannot be subscripted when it runs
    _type_ = "B"


class Buffer:
    """Memory with an address, for as long as this lives."""

    def __init__(self, content: bytes) -> None:
        self.size = len(content)
        self._bytes = (_Byte * self.size)(*content)
        self.address = _ctypes.addressof(self._bytes)

    @property
    def content(self) -> bytes:
        return bytes(self._bytes)


def call(function: str, *arguments: int | bytes) -> int:
    """The function's int result. -1 is failure; errno is not available."""
    result: int = _ctypes.call_function(_ctypes.dlsym(_self, function), arguments)
    return result


def must(function: str, *arguments: int | bytes) -> None:
    """Call it; raises OSError where it fails."""
    if call(function, *arguments) != 0:
        raise OSError(f"{function} was refused")


def must_prctl(option: int, argument: int) -> None:
    if call("prctl", option, argument, 0, 0, 0) != 0:
        raise OSError(f"prctl({option}, {argument}) was refused")


def renounce_privileges() -> None:
    """Nothing started from here on can gain a privilege by executing a file; the caller keeps what it has."""
    must_prctl(PR_SET_NO_NEW_PRIVS, 1)
    for capability in range(LAST_CAPABILITY + 1):
        call("prctl", PR_CAPBSET_DROP, capability, 0, 0, 0)


def bounding_set() -> list[int]:
    """The capabilities that an executed file could still give."""
    return [number for number in range(LAST_CAPABILITY + 1) if call("prctl", PR_CAPBSET_READ, number, 0, 0, 0) == 1]


def be_subreaper() -> None:
    """Every descendant that loses its parent becomes our child, whatever session or group it made for itself."""
    must_prctl(PR_SET_CHILD_SUBREAPER, 1)


def hide_from_users() -> None:
    """Our memory, environment and descriptors cannot be looked at by other users of this kernel."""
    must_prctl(PR_SET_DUMPABLE, 0)


def mount(source: str, target: str, fstype: str, options: str) -> int:
    """Without set-uid programs and devices; -1 where the kernel refuses."""
    flags = MS_NOSUID | MS_NODEV | MS_NOATIME
    return call("mount", source.encode(), target.encode(), fstype.encode(), flags, options.encode())


def unmount(target: str) -> int:
    """-1 where nothing is mounted, or it is in use."""
    return call("umount2", target.encode(), 0)


def resize_tmpfs(target: str, options: str) -> int:
    """-1 where the kernel refuses."""
    return call("mount", b"tmpfs", target.encode(), b"tmpfs", MS_NOSUID | MS_NODEV | MS_REMOUNT, options.encode())


def power_off() -> None:
    """Flush what is written and switch the machine off. Returns only where that is refused."""
    os.sync()
    call("umount2", b"/workspace", 0)
    os.sync()
    call("reboot", POWER_OFF)
