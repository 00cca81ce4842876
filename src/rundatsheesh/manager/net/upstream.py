"""Ask the host's own resolvers, or the configured one."""

from __future__ import annotations

import asyncio
import logging
import struct
from ipaddress import ip_address
from pathlib import Path

from rundatsheesh.manager.net.questions import matches

log = logging.getLogger(__name__)

RESOLV_CONF = Path("/etc/resolv.conf")
MAX_NAMESERVERS = 3  # as the C library
ATTEMPT_SECONDS = 1.5  # until the next server is asked
TOTAL_SECONDS = 5.0  # as long as a guest's own resolver waits
DNS_PORT = 53

Server = tuple[str, int]


class UpstreamError(Exception):
    """No server gave an answer in time."""


class Upstream:
    """`configured` is "IP", "IP:port" or "[IPv6]:port"; empty for the nameservers of /etc/resolv.conf, which is read at
    each question so that a change of network is followed. Raises ValueError for anything else."""

    def __init__(self, configured: str = "", resolv_conf: Path = RESOLV_CONF) -> None:
        self._configured = parse_server(configured) if configured else None
        self._resolv_conf = resolv_conf

    async def ask(self, query: bytes, *, tcp: bool) -> bytes:
        """The reply to a query of ours, its id and question checked. Raises UpstreamError within TOTAL_SECONDS."""
        try:
            async with asyncio.timeout(TOTAL_SECONDS):
                servers = await self._servers()
                for server in servers * 2:
                    try:
                        async with asyncio.timeout(ATTEMPT_SECONDS):
                            return await (_ask_tcp if tcp else _ask_udp)(server, query)
                    except (OSError, EOFError, TimeoutError) as error:
                        log.debug("name server %s: %r", server, error)
        except TimeoutError:
            raise UpstreamError(f"no answer within {TOTAL_SECONDS:g} s") from None
        raise UpstreamError("no name server answered" if servers else "no name server is configured")

    async def _servers(self) -> list[Server]:
        if self._configured is not None:
            return [self._configured]
        try:
            text = await asyncio.to_thread(self._resolv_conf.read_text, errors="replace")
        except OSError as error:
            raise UpstreamError(str(error)) from error
        return parse_resolv_conf(text)


def parse_server(text: str) -> Server:
    try:
        return str(ip_address(text)), DNS_PORT
    except ValueError:
        host, _, port = text.rpartition(":")
        if not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
            raise
        return str(ip_address(host.removeprefix("[").removesuffix("]"))), int(port)


def parse_resolv_conf(text: str) -> list[Server]:
    """The first name servers in it; lines that are none are passed over, as the C library does."""
    servers = []
    for line in text.splitlines():
        match line.split():
            case ["nameserver", address, *_]:
                try:
                    servers.append((str(ip_address(address)), DNS_PORT))
                except ValueError:
                    log.warning("no address in resolv.conf: %r", line)
    return servers[:MAX_NAMESERVERS]


class _Reply(asyncio.DatagramProtocol):
    """Waits for the one datagram that answers; others may be forged and are passed over."""

    def __init__(self, query: bytes) -> None:
        self._query = query
        self.received: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def datagram_received(self, data: bytes, addr: object) -> None:
        if not self.received.done() and matches(self._query, data):
            self.received.set_result(data)

    def error_received(self, exc: Exception) -> None:
        if not self.received.done():
            self.received.set_exception(exc)


async def _ask_udp(server: Server, query: bytes) -> bytes:
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_datagram_endpoint(lambda: _Reply(query), remote_addr=server)
    try:
        transport.sendto(query)
        return await protocol.received
    finally:
        transport.close()


async def _ask_tcp(server: Server, query: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(*server)
    try:
        writer.write(struct.pack("!H", len(query)) + query)
        reply = await reader.readexactly(*struct.unpack("!H", await reader.readexactly(2)))
    finally:
        writer.close()
    if not matches(query, reply):
        raise EOFError("a reply to something else")
    return reply
