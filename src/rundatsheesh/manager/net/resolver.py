"""The name server of the guests: it answers under each VM's policy, and what is refused goes nowhere.

Guests ask 172.16.0.1:53; the firewall redirects that to this server's port, has checked the source address, by which
the VM is known here, and bounds the rate. Here the work in flight is bounded for each VM.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import struct
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any

import dns.rcode
import dns.rdatatype

from rundatsheesh.manager.errors import NetworkError
from rundatsheesh.manager.model import GATEWAY, EgressPolicy, Slot
from rundatsheesh.manager.net.policy import DnsVerdict, judge_name, may_open
from rundatsheesh.manager.net.questions import (
    MAX_QUERY_BYTES,
    BadQueryError,
    Question,
    parse_answer,
    parse_query,
    readdress,
)
from rundatsheesh.manager.net.upstream import Upstream, UpstreamError

log = logging.getLogger(__name__)

IP_FREEBIND = 15  # the gateway's address exists only while there are links
QUERIES_PER_VM = 32  # forwarded and not yet answered
CONNECTIONS_PER_VM = 8
IDLE_SECONDS = 10.0  # a TCP connection without a query is closed
MIN_OPEN_SECONDS = 30  # for answers with a shorter life: the guest must have the time to use them
BIND_ATTEMPTS = 20
TCP_PAYLOAD = 65535

# Opens addresses for a VM unless its policy has changed since; False when they stay closed.
Opener = Callable[[Slot, EgressPolicy, list[IPv4Address], int], Awaitable[bool]]


@dataclass(slots=True, eq=False)
class _Vm:
    slot: Slot
    policy: EgressPolicy
    queries: int = 0
    connections: int = 0


class Resolver:
    """Listens on the gateway's address, UDP and TCP, at one free port."""

    def __init__(self, upstream: Upstream, opener: Opener) -> None:
        self._upstream = upstream
        self._opener = opener
        self._vms: dict[str, _Vm] = {}  # by the guest's address
        self._tasks: set[asyncio.Task[None]] = set()
        self._transport: asyncio.DatagramTransport | None = None
        self._server: asyncio.Server | None = None
        self.port = 0

    async def open(self) -> None:
        """Listen. Idempotent; raises NetworkError."""
        if self._server is not None:
            return
        udp, tcp, self.port = _bind_both()
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_datagram_endpoint(lambda: _Datagrams(self), sock=udp)
        self._server = await asyncio.start_server(self._serve_connection, sock=tcp, limit=MAX_QUERY_BYTES + 2)

    async def close(self) -> None:
        """Stop listening and end what is in flight. Idempotent."""
        if self._transport is not None:
            self._transport.close()
        if self._server is not None:
            self._server.close()
        self._transport = self._server = None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def put(self, slot: Slot, policy: EgressPolicy) -> None:
        """From now on answer this VM under this policy."""
        vm = self._vms.setdefault(str(slot.guest_ip), _Vm(slot, policy))
        vm.policy = policy

    def remove(self, slot: Slot) -> None:
        self._vms.pop(str(slot.guest_ip), None)

    def policy_of(self, slot: Slot) -> EgressPolicy | None:
        """The policy that holds now; None for a VM that is not known."""
        vm = self._vms.get(str(slot.guest_ip))
        return vm.policy if vm else None

    def datagram(self, data: bytes, source: tuple[str, int]) -> None:
        vm = self._vms.get(source[0])
        if vm is None:
            log.debug("question from %s, which is no VM of ours", source[0])
            return
        self._spawn(self._serve_datagram(vm, data, source))

    async def answer(self, vm: _Vm, wire: bytes, *, tcp: bool) -> bytes | None:
        """The reply to one query; None where it deserves none."""
        try:
            question = parse_query(wire)
        except BadQueryError as bad:
            return bad.reply
        policy = vm.policy
        verdict = judge_name(policy, question.labels)
        if verdict is DnsVerdict.REFUSE:
            return question.reply(dns.rcode.REFUSED)
        if question.rdtype == dns.rdatatype.AAAA:
            return question.reply(dns.rcode.NOERROR)  # the guest has no IPv6, so it need not try
        if vm.queries >= QUERIES_PER_VM:
            return question.reply(dns.rcode.SERVFAIL)
        vm.queries += 1
        try:
            reply = await self._forward(question, tcp=tcp)
            if verdict is DnsVerdict.FORWARD:
                return readdress(reply, question)
            return await self._opened(vm.slot, policy, question, reply, tcp=tcp)
        except (UpstreamError, NetworkError) as error:
            log.warning("%s: a name was not resolved: %s", vm.slot.link, error)
            return question.reply(dns.rcode.SERVFAIL)
        finally:
            vm.queries -= 1

    async def _forward(self, question: Question, *, tcp: bool) -> bytes:
        reply = await self._upstream.ask(question.to_upstream().to_wire(), tcp=tcp)
        if not tcp and len(reply) > question.payload:
            raise UpstreamError("the name server sent more than it was told to")
        return reply

    async def _opened(self, slot: Slot, policy: EgressPolicy, question: Question, reply: bytes, *, tcp: bool) -> bytes:
        """The reply, after its addresses have been opened for at least as long as the guest may keep it."""
        answer = parse_answer(question, reply)
        if answer is None:
            raise UpstreamError("the name server's reply is malformed")
        addresses = [address for address in answer.addresses if may_open(address)]
        seconds = max(answer.seconds, MIN_OPEN_SECONDS)
        if addresses and not await self._opener(slot, policy, addresses, seconds):
            return question.reply(dns.rcode.SERVFAIL)
        return answer.to_wire(TCP_PAYLOAD if tcp else question.payload)

    async def _serve_datagram(self, vm: _Vm, data: bytes, source: tuple[str, int]) -> None:
        reply = await self.answer(vm, data, tcp=False)
        if reply is not None and self._transport is not None:
            self._transport.sendto(reply, source)

    async def _serve_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        vm = self._vms.get(writer.get_extra_info("peername", ("",))[0])
        try:
            if vm is not None and vm.connections < CONNECTIONS_PER_VM:
                await self._serve_stream(vm, reader, writer)
        except (OSError, EOFError, TimeoutError) as error:
            log.debug("a guest's DNS connection ended: %r", error)
        except asyncio.CancelledError:
            log.debug("a guest's DNS connection is closed with the resolver")
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _serve_stream(self, vm: _Vm, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        vm.connections += 1
        try:
            while True:
                async with asyncio.timeout(IDLE_SECONDS):
                    (length,) = struct.unpack("!H", await reader.readexactly(2))
                    if length > MAX_QUERY_BYTES:
                        return
                    query = await reader.readexactly(length)
                reply = await self.answer(vm, query, tcp=True)
                if reply is None:
                    return
                writer.write(struct.pack("!H", len(reply)) + reply)
                async with asyncio.timeout(IDLE_SECONDS):
                    await writer.drain()
        finally:
            vm.connections -= 1

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the resolver failed on a query", exc_info=error)


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, resolver: Resolver) -> None:
        self._resolver = resolver

    def datagram_received(self, data: bytes, addr: tuple[str | Any, int]) -> None:
        self._resolver.datagram(data, addr)

    def error_received(self, exc: Exception) -> None:
        log.debug("a DNS reply was not delivered: %r", exc)


def _bind_both() -> tuple[socket.socket, socket.socket, int]:
    """A UDP and a TCP socket at the same free port."""
    for _ in range(BIND_ATTEMPTS):
        udp = _socket(socket.SOCK_DGRAM)
        tcp = _socket(socket.SOCK_STREAM)
        try:
            udp.bind((str(GATEWAY), 0))
            port: int = udp.getsockname()[1]
            tcp.bind((str(GATEWAY), port))
            return udp, tcp, port
        except OSError as error:
            udp.close()
            tcp.close()
            if error.errno != errno.EADDRINUSE:
                raise NetworkError(f"the resolver cannot listen on {GATEWAY}: {error}") from error
    raise NetworkError(f"the resolver finds no free port on {GATEWAY}")


def _socket(kind: int) -> socket.socket:
    made = socket.socket(socket.AF_INET, kind | socket.SOCK_NONBLOCK)
    made.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
    return made
