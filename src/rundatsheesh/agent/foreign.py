"""Memory of another process of the user, for whoever has the user's identity and is that process's ancestor."""

from __future__ import annotations

from struct import pack

from . import libc

_STACK = 1 << 14  # bytes below its top in which arguments and environment are looked for


def find_argument(pid: int, argument: bytes) -> int:
    """The address of an argument that the process was executed with; LookupError where it is not found."""
    low, high = _stack(pid)
    low = max(low, high - _STACK)
    buffer = libc.Buffer(bytes(high - low))
    _transfer("process_vm_readv", pid, low, buffer)
    at = buffer.content.rfind(b"\0" + argument + b"\0")
    if at < 0:
        raise LookupError("the argument is not where arguments are")
    return low + at + 1


def write(pid: int, address: int, data: bytes) -> None:
    """Raises OSError where it is refused, or the process has ended."""
    _transfer("process_vm_writev", pid, address, libc.Buffer(data))


def _stack(pid: int) -> tuple[int, int]:
    with open(f"/proc/{pid}/maps", "rb") as file:
        for line in file:
            if line.endswith(b"[stack]\n"):
                low, high = line.split(b" ", 1)[0].split(b"-")
                return int(low, 16), int(high, 16)
    raise LookupError("the process has no stack")


def _transfer(function: str, pid: int, address: int, buffer: libc.Buffer) -> None:
    ours, theirs = pack("PN", buffer.address, buffer.size), pack("PN", address, buffer.size)
    if libc.call(function, pid, ours, 1, theirs, 1, 0) != buffer.size:
        raise OSError(f"{function} was refused")
