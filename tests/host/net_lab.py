"""A host of its own for each network test: a private root namespace with loopback, a world beyond it, and guests.

The calling thread, and so every thread and process that it starts, lives in a fresh network namespace while the lab is
open. Nothing of the machine's own network is seen or changed, and what is left behind can be compared exactly.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import selectors
import socket
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Network
from typing import TypeVar

import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

from rundatsheesh.manager.host import namespaces
from rundatsheesh.manager.host.namespaces import Kind
from rundatsheesh.manager.model import EgressPolicy, Slot
from rundatsheesh.manager.net import Network, kernel

T = TypeVar("T")

BLOCK = 800 + 2 * (os.getpid() % 50)  # two runs of the tests at once have two
OTHER_BLOCK = BLOCK + 1
WORLD = "198.51.100.2"  # the next hop of everything
UPLINK = "198.51.100.1"  # the host's own address on the way to it
WORLD_ADDRESSES = (
    "10.77.0.2",
    "192.168.77.2",
    "100.64.77.2",
    "169.254.77.2",
    "203.0.113.5",
    "203.0.113.6",
    "169.254.169.254",
    "169.254.170.2",
    "100.100.100.200",
    "168.63.129.16",
    "192.0.0.192",
)
PORT = 7000
GATEWAY = "172.16.0.1"
AT_ONCE = 0.9  # seconds; the kernel needs milliseconds, a packet that is dropped at least one second


def slot(number: int, block: int = BLOCK) -> Slot:
    return Slot(block * 1024 + 300 + number)


def policy(*allow_ips: str, domains: tuple[str, ...] = (), outbound: bool = True) -> EgressPolicy:
    return EgressPolicy(outbound, tuple(IPv4Network(text) for text in allow_ips), domains)


class Servers:
    """TCP and UDP servers in one thread: each greets with the address that it was called from."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._sockets: list[socket.socket] = [self._wake, self._woken]
        self._thread = threading.Thread(target=self._serve, name="lab servers")

    def listen(self, address: str, port: int = PORT) -> None:
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            made = socket.socket(socket.AF_INET, kind)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.setsockopt(socket.IPPROTO_IP, 15, 1)  # IP_FREEBIND: the gateway's address comes with the first link
            made.bind((address, port))
            if kind == socket.SOCK_STREAM:
                made.listen()
            self._sockets.append(made)
            self._selector.register(made, selectors.EVENT_READ)

    def __enter__(self) -> Servers:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._wake.send(b"x")
        self._thread.join()
        for one in self._sockets:
            one.close()
        self._selector.close()

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select():
                ready = key.fileobj
                assert isinstance(ready, socket.socket)
                if ready is self._woken:
                    return
                if ready.type == socket.SOCK_DGRAM:
                    data, source = ready.recvfrom(2048)
                    ready.sendto(source[0].encode() + b" " + data, source)
                elif _is_listening(ready):
                    connection, source = ready.accept()
                    connection.sendall(source[0].encode())
                    self._sockets.append(connection)
                    self._selector.register(connection, selectors.EVENT_READ)
                else:
                    self._echo(ready)

    def _echo(self, connection: socket.socket) -> None:
        with contextlib.suppress(ConnectionError):
            if data := connection.recv(2048):
                connection.sendall(data)
                return
        self._selector.unregister(connection)


def _is_listening(made: socket.socket) -> bool:
    return bool(made.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


@dataclass
class FakeDns:
    """An upstream name server on loopback: a zone of A records, and a list of all that it was asked."""

    zone: dict[str, tuple[int, list[str]]]  # name → TTL, addresses
    asked: list[str] = field(default_factory=list)
    port: int = 0
    hold: asyncio.Event | None = None  # while given and clear, replies wait

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[FakeDns]:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(lambda: _FakeDnsUdp(self), local_addr=("127.0.0.1", 0))
        self.port = transport.get_extra_info("sockname")[1]
        server = await asyncio.start_server(self._tcp, "127.0.0.1", self.port)
        try:
            yield self
        finally:
            transport.close()
            server.close()
            await server.wait_closed()

    async def reply(self, wire: bytes, max_size: int) -> bytes:
        query = dns.message.from_wire(wire)
        name = query.question[0].name.to_text(omit_final_dot=True).lower()
        kind = query.question[0].rdtype
        self.asked.append(f"{name} {dns.rdatatype.to_text(kind)}")
        if self.hold is not None:
            await self.hold.wait()
        response = dns.message.make_response(query)
        ttl, addresses = self.zone.get(name, (0, []))
        if name not in self.zone:
            response.set_rcode(dns.rcode.NXDOMAIN)
        elif kind == dns.rdatatype.A and addresses:
            response.answer.append(dns.rrset.from_text(query.question[0].name, ttl, "IN", "A", *addresses))
        return response.to_wire(max_size=max_size, prefer_truncation=True)

    async def _tcp(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        length = int.from_bytes(await reader.readexactly(2), "big")
        reply = await self.reply(await reader.readexactly(length), 65535)
        writer.write(len(reply).to_bytes(2, "big") + reply)
        writer.close()


class _FakeDnsUdp(asyncio.DatagramProtocol):
    def __init__(self, server: FakeDns) -> None:
        self._server = server
        self._tasks: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self._transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        task = asyncio.create_task(self._answer(data, addr))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, data: bytes, addr: tuple[str, int]) -> None:
        self._transport.sendto(await self._server.reply(data, 512), addr)


@dataclass(frozen=True)
class Lab:
    servers: Servers
    world_name: str

    async def inside(self, guest: Slot, call: Callable[[], T]) -> T:
        """Run blocking code as the guest: in its namespace, behind its eth0."""
        return await asyncio.to_thread(kernel.inside_namespace, guest.netns, call)

    async def in_world(self, call: Callable[[], T]) -> T:
        return await asyncio.to_thread(kernel.inside_namespace, self.world_name, call)

    async def tcp(self, guest: Slot, address: str, port: int = PORT) -> str:
        return await self.inside(guest, lambda: tcp(address, port))

    async def udp(self, guest: Slot, address: str, port: int = PORT) -> str:
        return await self.inside(guest, lambda: udp(address, port))

    async def ping(self, guest: Slot, address: str) -> str:
        return await self.inside(guest, lambda: ping(address))

    async def resolve(self, guest: Slot, name: str, kind: str = "A", *, tcp: bool = False) -> dns.message.Message:
        return await self.inside(guest, lambda: resolve(name, kind, tcp=tcp))


def tcp(address: str, port: int) -> str:
    """The server's greeting, or how it was refused; a refusal that is not immediate fails the test."""
    before = time.monotonic()
    try:
        with socket.create_connection((address, port), timeout=2) as made:
            return made.recv(100).decode()
    except OSError as error:
        assert time.monotonic() - before < AT_ONCE, f"the refusal took {time.monotonic() - before:.2f} s: {error!r}"
        return type(error).__name__


def udp(address: str, port: int, data: bytes = b"hello") -> str:
    before = time.monotonic()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        made.settimeout(2)
        try:
            made.connect((address, port))
            made.send(data)
            return made.recv(2048).decode()
        except OSError as error:
            assert time.monotonic() - before < AT_ONCE, f"the refusal took {time.monotonic() - before:.2f} s: {error!r}"
            return type(error).__name__


def ping(address: str) -> str:
    """What comes back to an echo request: "reply" or "refused" (ICMP destination unreachable, code 13)."""
    packet = b"\x08\x00" + bytes.fromhex("f7fd") + b"\x00\x01\x00\x01"
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as made:
        made.settimeout(2)
        made.sendto(packet, (address, 0))
        while True:
            kind, code = made.recv(2048)[20:22]
            if kind == 0:
                return "reply"
            if (kind, code) == (3, 13):
                return "refused"


def resolve(name: str, kind: str, *, tcp: bool) -> dns.message.Message:
    query = dns.message.make_query(name, kind)
    wire = query.to_wire()
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM) as made:
        made.settimeout(8)
        made.connect((GATEWAY, 53))
        if tcp:
            made.sendall(len(wire).to_bytes(2, "big") + wire)
            stream = made.makefile("rb")
            reply = stream.read(int.from_bytes(stream.read(2), "big"))
        else:
            made.send(wire)
            reply = made.recv(4096)
    response = dns.message.from_wire(reply)
    assert query.is_response(response)
    return response


def addresses_of(response: dns.message.Message) -> list[str]:
    return sorted(record.address for records in response.answer for record in records if hasattr(record, "address"))


def shell(command: str) -> str:
    return subprocess.run(["sh", "-ec", command], check=True, capture_output=True, text=True, timeout=20).stdout


@contextlib.asynccontextmanager
async def lab() -> AsyncIterator[Lab]:
    """Opens the private host; at the end compares it with what it was."""
    with _private_network(), _world() as world, Servers() as servers:
        for address in (WORLD, *WORLD_ADDRESSES):
            kernel.inside_namespace(world, lambda here=address: servers.listen(here))
        servers.listen(GATEWAY)
        servers.listen(UPLINK)
        servers.listen("10.77.0.1")
        before = left_behind()
        yield Lab(servers, world)
        changed = {kind: (before[kind], now) for kind, now in left_behind().items() if now != before[kind]}
        assert not changed, changed


@contextlib.asynccontextmanager
async def network(block: int = BLOCK, *guests: tuple[Slot, EgressPolicy], dns_port: int = 1) -> AsyncIterator[Network]:
    """A Network with VMs attached; at the end they are detached and it is closed."""
    made = Network(block, dns_server=f"127.0.0.1:{dns_port}")
    await made.open()
    try:
        for guest, its_policy in guests:
            await made.attach(guest, its_policy)
        yield made
    finally:
        for guest in await present(made):
            await made.detach(guest)
        await made.close()


async def present(net: Network) -> set[Slot]:
    """Slots of which anything exists on the host."""
    traces = await net.list_traces()
    return {*traces.links, *traces.namespaces, *traces.rules}


def refused_packets(guest: Slot) -> int:
    """How many of its packets the policy has refused."""
    listed = json.loads(shell(f"nft --json list set inet rundatsheesh_{guest.block} refusals"))["nftables"]
    counters = (element["elem"] for entry in listed for element in entry.get("set", {}).get("elem", []))
    return next((found["counter"]["packets"] for found in counters if found["val"] == guest.link), 0)


def left_behind() -> dict[str, object]:
    """Everything that a network could leave."""
    return {
        "links": sorted(name for _, name in socket.if_nameindex()),
        "namespaces": sorted(
            n for n in kernel.namespace_names() if n.startswith((f"rds{BLOCK}-", f"rds{OTHER_BLOCK}-"))
        ),
        "rules": shell("nft list ruleset"),
        "addresses": shell("ip -o -4 addr show"),
        "routes": shell("ip -4 route show table all"),
        "rules of routing": shell("ip -4 rule"),
    }


@contextlib.contextmanager
def _private_network() -> Iterator[None]:
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        namespaces.enter_new(Kind.NETWORK)
        shell("ip link set lo up")
        yield
    finally:
        namespaces.enter(home, Kind.NETWORK)
        os.close(home)


@contextlib.contextmanager
def _world() -> Iterator[str]:
    """A namespace that has every address of WORLD_ADDRESSES, knows no route to any guest, and is the default route."""
    name = f"rdslab-{os.getpid()}"
    kernel.create_namespace(name)
    try:
        shell(
            f"ip link add wan0 type veth peer name wan1 netns {name};"
            f"ip addr add {UPLINK}/24 dev wan0; ip addr add 10.77.0.1/24 dev wan0; ip link set wan0 up;"
            f"ip route add default via {WORLD}; echo 1 > /proc/sys/net/ipv4/ip_forward"
        )
        inside = f"ip -n {name}"
        shell(
            f"{inside} link set lo up; {inside} addr add {WORLD}/24 dev wan1; {inside} link set wan1 up;"
            + "".join(f"{inside} addr add {address}/32 dev wan1;" for address in WORLD_ADDRESSES)
            + f"{inside} route add 10.77.0.1 dev wan1"
        )
        while "linkdown" in shell("ip -4 route show table all"):  # the kernel takes note of the peer by and by
            time.sleep(0.01)
        yield name
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            shell("ip link del wan0")
        kernel.remove_namespace(name)
