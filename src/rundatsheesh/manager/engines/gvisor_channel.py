"""How the host reaches the agent of a gVisor sandbox: a unix socket that the guest listens on, in a directory that it
shares with the host. Everything in that directory is the guest's doing."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from rundatsheesh.manager.engines.base import Stream
from rundatsheesh.manager.errors import EngineError
from rundatsheesh.manager.host.inotify import NewEntries

LISTEN_RETRY = 0.002  # seconds; the socket's file appears a moment before its owner listens, which nothing announces


async def connect(path: Path, guest_ends: Callable[[], Awaitable[object]], deadline: float) -> Stream:
    """Connect to the agent's socket, waiting for it to appear and to be listened on.

    `guest_ends` returns when the guest has ended, as often as it is called. Raises EngineError when that happens first,
    when nobody listens within `deadline` seconds, and when the socket is no socket.
    """
    end = asyncio.ensure_future(guest_ends())
    try:
        with NewEntries(path.parent) as entries:
            async with asyncio.timeout(deadline):
                while (connected := _dial(path)) is None:
                    await first_of([entries.wait(), asyncio.shield(end)], _retry_after(path))
                    if end.done():
                        raise EngineError("the guest ended before its agent answered")
                return await asyncio.open_unix_connection(sock=connected)
    except TimeoutError:
        raise EngineError(f"the agent does not listen after {deadline:g} s") from None
    except OSError as error:  # the directory is gone: so is the guest
        raise EngineError(f"cannot reach the agent: {error}") from error
    finally:
        end.cancel()


async def first_of(awaitables: Sequence[Awaitable[object]], limit: float | None) -> None:
    """Return when one has ended, or after `limit` seconds; the others are cancelled. Raises what the ended ones did."""
    tasks = [asyncio.ensure_future(a) for a in awaitables]
    try:
        done, _ = await asyncio.wait(tasks, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


def _retry_after(path: Path) -> float | None:
    return LISTEN_RETRY if os.path.lexists(path) else None


def _dial(path: Path) -> socket.socket | None:
    """Connect to the agent's socket; None while it does not exist or nobody listens. The guest's root may put anything
    at that path, a link to a socket of the host for one, so the connection is made to the inode that was looked at."""
    try:
        inode = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        if not stat.S_ISSOCK(os.fstat(inode).st_mode):
            raise EngineError("the guest has put something else in the place of its agent's socket")
        return _connect_to(f"/proc/self/fd/{inode}")
    finally:
        os.close(inode)


def _connect_to(path: str) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        connection.connect(path)
    except OSError as error:
        connection.close()
        if error.errno in (errno.ECONNREFUSED, errno.EAGAIN):  # not listening yet; too many wait to be accepted
            return None
        raise EngineError(f"cannot connect to the agent: {error.strerror}") from error
    return connection
