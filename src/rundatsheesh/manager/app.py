"""Builds everything, and says in which order it starts and ends."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp, Message

from rundatsheesh.manager.api import Readiness, Services, create_api
from rundatsheesh.manager.api.protocol import HttpProtocol
from rundatsheesh.manager.build import AGENT
from rundatsheesh.manager.build.agent import ensure_agent, find_agent
from rundatsheesh.manager.build.image import find_image
from rundatsheesh.manager.disk.worker import Workers
from rundatsheesh.manager.engines.base import Engine
from rundatsheesh.manager.engines.gvisor import GVisor, GVisorConfig
from rundatsheesh.manager.engines.qemu import Qemu, QemuConfig
from rundatsheesh.manager.errors import HostError, StorageFull
from rundatsheesh.manager.expiry import Expiry
from rundatsheesh.manager.host import heap
from rundatsheesh.manager.model import Overview
from rundatsheesh.manager.net import Network
from rundatsheesh.manager.overview import collect_overview
from rundatsheesh.manager.pool import Pool
from rundatsheesh.manager.reconcile import Reconciler
from rundatsheesh.manager.settings import Settings
from rundatsheesh.manager.store import ExecLog, Store
from rundatsheesh.manager.vms import Images, Vms
from rundatsheesh.manager.vms_calls import VmCalls
from rundatsheesh.manager.vms_host import VmHost
from rundatsheesh.manager.vms_layout import Layout, load_node, sole_manager
from rundatsheesh.manager.vms_lifetimes import VmLifetimes
from rundatsheesh.manager.vms_once import Creations

log = logging.getLogger(__name__)

# Seconds for which a thread that computes keeps the event loop waiting for its turn. By Python's own 5 ms, some threads
# that check uploads or prepare machines make every other answer late.
SWITCH_INTERVAL = 0.001
DRAIN_SECONDS = 5  # calls that are open at SIGTERM may take this long to end


def engines(settings: Settings) -> Mapping[str, Engine]:
    """Every engine that this version has; whether the host can run them is theirs to say."""

    def image_root(image_id: str) -> Path:
        return settings.image_cache / "images" / image_id / "root"

    image = find_image(settings.image_cache)
    agent = (image and find_agent(settings.image_cache, image, AGENT)) or AGENT
    gvisor = GVisor(GVisorConfig(settings.image_cache, image_root, agent, settings.gvisor_platform))
    qemu = Qemu(QemuConfig(image_root, agent, disk_mb=settings.default_disk_mb))
    return {gvisor.name: gvisor, qemu.name: qemu}


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. Raises HostError for what keeps the server from starting. VMs that exist when it
    ends run on, and the next server adopts them."""
    _configure_logging(settings.log_level)
    heap.use_one()
    sys.setswitchinterval(SWITCH_INTERVAL)
    _check_certificate(settings)
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        # The HTTP server takes these over while it runs, and raises them once more when it has ended.
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    with _listening(settings) as listener:
        async with running(settings) as services:
            server = await _http_server(services)
            address = listener.getsockname()
            scheme = "https" if settings.tls_cert_file else "http"
            print(f"serving on {scheme}://{_shown_host(address[0])}:{address[1]}", flush=True)  # noqa: T201
            if not stopping.is_set():
                await server.serve(sockets=[listener])


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[Services]:
    """The manager without HTTP: everything started and recovered; let go in reverse order at the end."""
    async with AsyncExitStack() as stack:
        layout = Layout(settings.storage_root, settings.runtime_dir)
        settings.storage_root.mkdir(parents=True, exist_ok=True, mode=0o700)
        stack.enter_context(sole_manager(settings.storage_root))
        layout.prepare()
        node = await asyncio.to_thread(load_node, settings.storage_root)
        store = await Store.open(settings.effective_database_url)
        stack.push_async_callback(store.close)
        calls = await stack.enter_async_context(ExecLog(store.history))
        network = Network(node.block, dns_server=settings.dns_server_ip)
        await network.open()
        stack.push_async_callback(network.close)
        await _pack_agent(settings)
        workers = Workers(AGENT)
        stack.push_async_callback(workers.close)
        host = VmHost(node, layout, network, engines(settings), workers)
        await asyncio.to_thread(_look_at_engines, host)
        _start_helper(host, workers)
        vms = Vms(settings, store, host, _images(settings))
        stack.push_async_callback(vms.let_go)
        reconciler = Reconciler(store, host, vms)
        await reconciler.recover()
        stack.push_async_callback(reconciler.recovered)
        timer = asyncio.create_task(reconciler.run(), name="reconcile")
        stack.push_async_callback(_cancelled, timer)
        lifetimes = VmLifetimes(store, vms)
        clock = asyncio.create_task(Expiry(store, lifetimes, node.id).run(), name="expiry")
        stack.push_async_callback(_cancelled, clock)
        pool = Pool(settings, vms)
        stack.push_async_callback(pool.drain)
        filling = asyncio.create_task(_fill(pool, reconciler), name="warm pool")
        stack.push_async_callback(_cancelled, filling)
        creations = Creations(store.idempotency, node.id, vms.get)
        yield Services(
            settings=settings,
            vms=VmCalls(settings, vms, host, calls, pool, creations, lifetimes),
            credentials=store.credentials,
            history=store.history,
            overview=lambda: _overview(settings, store),
            readiness=lambda: _readiness(settings, host),
            audit=reconciler.audit,
            reconcile=reconciler.round,
        )


async def _http_server(services: Services) -> uvicorn.Server:
    """With everything loaded that the first request would wait for."""
    api = create_api(services)
    await _rehearse(api)
    config = uvicorn.Config(
        api,
        http=HttpProtocol,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=75,  # a client that pauses between calls must not meet a closed connection
        timeout_graceful_shutdown=DRAIN_SECONDS,
        ssl_certfile=services.settings.tls_cert_file or None,
        ssl_keyfile=services.settings.tls_key_file or None,
    )
    config.load()
    return uvicorn.Server(config)


async def _rehearse(api: ASGIApp) -> None:
    """One request without a client: what the framework puts off until the first one takes as long as 50 calls."""

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        log.debug("rehearsal: %s", message["type"])

    request = {"type": "http", "method": "GET", "path": "/health", "raw_path": b"/health", "query_string": b""}
    await api({**request, "headers": [(b"host", b"localhost")], "client": None, "server": None}, receive, send)


def _check_certificate(settings: Settings) -> None:
    """Before anything is touched: the HTTP server loads these files only when everything else runs."""
    if not settings.tls_cert_file:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            settings.tls_cert_file, settings.tls_key_file, password=""
        )
    except OSError as error:  # what is not PEM, or does not belong together, is one of these too
        hint = "both are PEM files; the key is without a passphrase and belongs to the certificate"
        raise HostError(f"TLS_CERT_FILE and TLS_KEY_FILE cannot be used: {error}", hint=hint) from error


def _listening(settings: Settings) -> socket.socket:
    """Bound before anything else is touched: a port that is taken costs nothing."""
    try:
        (family, kind, _, _, address) = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # The protocol is named so that the event loop recognises TCP and turns Nagle's algorithm off.
        listener = socket.socket(family, kind, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        hint = "set HOST and PORT to an address that is free"
        raise HostError(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}", hint=hint) from error
    return listener


async def _pack_agent(settings: Settings) -> None:
    """A set-up has done it, unless it was one of an earlier version with the same image."""
    image = find_image(settings.image_cache)
    if image is None or os.geteuid() != 0:
        return
    try:
        await ensure_agent(settings.image_cache, image, AGENT)
    except (HostError, OSError) as error:
        log.warning("guests start slower, for each finds and compiles the modules of its agent: %s", error)


def _images(settings: Settings) -> Images:
    def default() -> str | None:
        image = find_image(settings.image_cache)
        return image.id if image else None

    return Images(default, lambda image_id: find_image(settings.image_cache, image_id) is not None)


async def _overview(settings: Settings, store: Store) -> Overview:
    records = await store.list()
    return await collect_overview(records, storage_root=settings.storage_root, max_vms=settings.max_vms)


def _look_at_engines(host: VmHost) -> None:
    """They remember what they find out by starting programs, so that no request waits for it."""
    for engine in host.engines.values():
        found = engine.available()
        log.info("engine %s: %s", engine.name, found.fact)


def _start_helper(host: VmHost, workers: Workers) -> None:
    """Ahead of the first transfer, which would start it otherwise, or go through the guest where it cannot be."""
    if not host.engines["gvisor"].available().usable:
        return
    try:
        workers.start()
    except HostError as error:
        log.warning("files go through the guests: %s", error)


def _readiness(settings: Settings, host: VmHost) -> Readiness:
    if find_image(settings.image_cache) is None:
        return Readiness(False, "the guest image is missing: run `rds setup`")
    if not any(engine.available().usable for engine in host.engines.values()):
        return Readiness(False, "no engine can run on this host: see `rds doctor`")
    try:
        host.check_room()
    except StorageFull as full:
        return Readiness(False, f"{full.message}: {full.hint}")
    return Readiness(True)


async def _fill(pool: Pool, reconciler: Reconciler) -> None:
    """New warm VMs take the room of those that the last manager left."""
    await reconciler.recovered()
    await pool.run()


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    (outcome,) = await asyncio.gather(task, return_exceptions=True)
    if isinstance(outcome, Exception):
        log.error("%s ended before its time", task.get_name(), exc_info=outcome)


def _configure_logging(level: str) -> None:
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    for chatty in ("uvicorn", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def _shown_host(host: str) -> str:
    name = "localhost" if host in ("127.0.0.1", "0.0.0.0", "::", "::1") else host
    return f"[{name}]" if ":" in name else name
