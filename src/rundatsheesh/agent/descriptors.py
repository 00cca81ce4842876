"""Pass descriptors over a unix socket. (`socket.recv_fds` forgets the flag that keeps them from being inherited.)"""

from __future__ import annotations

import socket
from struct import calcsize, iter_unpack, pack

_INT = calcsize("i")


def send(to: socket.socket, data: bytes, fds: list[int]) -> None:
    """Send `data` and copies of the descriptors with it."""
    to.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, pack(f"{len(fds)}i", *fds))])


def receive(source: socket.socket, size: int, most: int) -> tuple[bytes, list[int]]:
    """At most `size` bytes and `most` descriptors that were sent together, not inheritable. Empty at the end."""
    data, ancillary, _, _ = source.recvmsg(size, socket.CMSG_LEN(most * _INT), socket.MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds += [fd for (fd,) in iter_unpack("i", payload[: len(payload) // _INT * _INT])]
    return data, fds
