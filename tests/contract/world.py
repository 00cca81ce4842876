"""A network beyond the host: a namespace with addresses that the host routes to, and an HTTP server on each."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

PORT = 20_000 + os.getpid() % 10_000  # two runs of the tests at once have two
GREETER = """
import http.server, socketserver, sys
class Greeter(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b"hello from the world"
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args): pass
class Server(http.server.ThreadingHTTPServer):
    def server_bind(self):
        self.socket.setsockopt(0, 15, 1)  # IP_FREEBIND: the address may come later
        socketserver.TCPServer.server_bind(self)
server = Server((sys.argv[1], int(sys.argv[2])), Greeter)
print("listening", flush=True)
server.serve_forever()
"""


@dataclass(frozen=True)
class World:
    """Neighbours that the host reaches, and the cloud's metadata service as it exists elsewhere. Two test runs beside
    each other have different numbers."""

    number: int

    @property
    def router(self) -> str:
        """The host's own address there."""
        return f"198.18.{self.number}.1"

    @property
    def allowed(self) -> str:
        return f"198.18.{self.number}.2"

    @property
    def other(self) -> str:
        return f"198.18.{self.number}.3"

    @property
    def named(self) -> str:
        return f"198.18.{self.number}.4"

    @property
    def private(self) -> str:
        return f"10.177.{self.number}.2"

    @property
    def metadata(self) -> str:
        return "169.254.169.254"

    @property
    def addresses(self) -> tuple[str, ...]:
        return (self.allowed, self.other, self.named, self.private, self.metadata)


@contextmanager
def listening(address: str, port: int = PORT, netns: str | None = None) -> Iterator[None]:
    """An HTTP server on this address, in a namespace or on the host itself."""
    inside = ["nsenter", f"--net=/run/netns/{netns}"] if netns else []
    process = subprocess.Popen(
        [*inside, sys.executable, "-c", GREETER, address, str(port)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "listening\n"
        yield
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@contextmanager
def open_world() -> Iterator[World]:
    """Everything of it is gone afterwards."""
    world, name = World(secrets.randbelow(256)), f"world{secrets.token_hex(3)}"
    host_end = name[:15]
    _ip("netns", "add", name)
    try:
        _ip("link", "add", host_end, "type", "veth", "peer", "name", "up0", "netns", name)
        _ip("addr", "add", f"{world.router}/32", "dev", host_end)
        _ip("link", "set", host_end, "up")
        for link in ("lo", "up0"):
            _ip("-n", name, "link", "set", link, "up")
        for address in world.addresses:
            _ip("-n", name, "addr", "add", f"{address}/32", "dev", "up0")
            # The metric lets two runs have a way to the one address that cannot differ.
            _ip("route", "add", f"{address}/32", "dev", host_end, "metric", str(1000 + world.number))
        _ip("-n", name, "route", "add", f"{world.router}/32", "dev", "up0")
        with listening("0.0.0.0", netns=name):
            yield world
    finally:
        _ip("netns", "delete", name)
        subprocess.run(["ip", "link", "delete", host_end], capture_output=True)  # gone with its peer, if not yet


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, (arguments, done.stderr)
