"""Netlink, as much of it as links and connection tracking need: attributes, acknowledged requests, dumps.

Written out because it is called ten times for every VM that is created: a request takes 50 us here, and 0.7 to 1.5 ms
through the general library, most of it interpreter time that competing creations on a small host wait for.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable, Iterator
from typing import Self

ROUTE, NETFILTER = 0, 12  # protocols
ACK, DUMP, REPLACE, EXCLUSIVE, CREATE = 4, 0x300, 0x100, 0x200, 0x400  # flags of a request

_REQUEST = 1
_ERROR, _DONE = 2, 3
_NESTED = 0x8000
_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_RECEIVE_BYTES = 1 << 16
_TIMEOUT = 30.0  # seconds without a reply: a busy kernel has all namespaces wait for each other


class Netlink:
    """A socket of the calling thread's network namespace. Everything raises OSError as the kernel says it."""

    def __init__(self, protocol: int, groups: int = 0) -> None:
        """`groups` are the multicast groups whose events are received too; such a socket is for `messages` alone."""
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._socket.settimeout(_TIMEOUT)
        self._socket.bind((0, groups))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def request(self, kind: int, body: bytes, flags: int = 0) -> None:
        """Send a request and wait until it is done."""
        self.send(kind, body, flags | ACK)
        for reply, payload in self.messages():
            if reply == _ERROR:
                return _check(payload)

    def dump(self, kind: int, body: bytes) -> Iterator[bytes]:
        """The payloads of all messages that answer a dump."""
        self.send(kind, body, DUMP)
        while True:
            for reply, payload in self.messages():
                if reply == _DONE:
                    return
                if reply == _ERROR:
                    _check(payload)
                yield payload

    def send(self, kind: int, body: bytes, flags: int = 0) -> None:
        self._socket.send(_HEADER.pack(_HEADER.size + len(body), kind, _REQUEST | flags, 1, 0) + body)

    def messages(self) -> Iterator[tuple[int, bytes]]:
        """What arrives next: kinds and payloads. Waits for it."""
        data = self._socket.recv(_RECEIVE_BYTES)
        while data:
            length, kind, _, _, _ = _HEADER.unpack_from(data)
            yield kind, data[_HEADER.size : length]
            data = data[_aligned(length) :]


def attribute(kind: int, value: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(length, kind) + value + bytes(_aligned(length) - length)


def nested(kind: int, parts: Iterable[bytes]) -> bytes:
    return attribute(kind | _NESTED, b"".join(parts))


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Kinds and values, nesting flags taken off."""
    while data:
        length, kind = _ATTRIBUTE.unpack_from(data)
        yield kind & ~_NESTED, data[_ATTRIBUTE.size : length]
        data = data[_aligned(length) :]


def number(value: int) -> bytes:
    return struct.pack("=I", value)


def _check(payload: bytes) -> None:
    """Raise what an error message says; an acknowledgement says nothing."""
    if code := -struct.unpack_from("=i", payload)[0]:
        raise OSError(code, os.strerror(code))


def _aligned(length: int) -> int:
    return (length + 3) & ~3
