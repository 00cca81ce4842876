"""Connections, transactions and the schema's version. The only place that knows which database is underneath."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, event, inspect, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from rundatsheesh.manager.errors import HostError, StorageFull
from rundatsheesh.manager.host.threads import in_thread
from rundatsheesh.manager.store.room import Room
from rundatsheesh.manager.store.schema import HEAD

T = TypeVar("T")

BUSY_TIMEOUT_S = 15
MIGRATION_LOCK = 0x72647368  # any fixed number: PostgreSQL's advisory lock while migrating
SQLSTATE_DISK_FULL = "53100"

_ASYNC_DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}


class Database:
    """Writing transactions, and connections that read with one statement each, on one pool."""

    def __init__(self, engine: AsyncEngine, room: Room | None = None) -> None:
        """`room` is what the database has for itself, where its disk is one that we look after."""
        self._engine = engine
        self._room = room
        self._writer = engine.execution_options(rds_write=True)
        # SQLite has one writer at a time: waiting here is fair and costs no thread, waiting in SQLite is a poll.
        self._turn: AbstractAsyncContextManager[Any] = asyncio.Lock() if _is_sqlite(engine.url) else nullcontext()

    @classmethod
    async def open(cls, url: str) -> Database:
        """Connect and bring the schema up to date. Raises HostError when that cannot be, or when it is newer;
        StorageFull when there is no room for a first one."""
        try:
            parsed = make_url(url)
            room = _room(parsed)
            if room is not None:
                await in_thread(room.make_way)
            database = cls(_create_engine(parsed), room)
            try:
                await database._migrate()
                await database.keep_room()
            except BaseException:
                await database.close()
                raise
        except (SQLAlchemyError, OSError, ImportError) as error:
            raise HostError(f"the database cannot be opened: {error}", code="database_unavailable") from error
        return database

    @classmethod
    async def open_existing(cls, url: str) -> Database | None:
        """Connect to a database that another process made, to read from it; nothing is made and nothing is migrated.
        None where there is none yet. Raises HostError where its schema is not of this version."""
        try:
            parsed = make_url(url)
            if _is_sqlite(parsed) and not await asyncio.to_thread(Path(parsed.database or "").is_file):
                return None
            database = cls(_create_engine(parsed))
            try:
                async with database.read() as connection:
                    version = await connection.run_sync(_version)
            except BaseException:
                await database.close()
                raise
        except (SQLAlchemyError, OSError, ImportError) as error:
            raise HostError(f"the database cannot be opened: {error}", code="database_unavailable") from error
        if version == HEAD:
            return database
        await database.close()
        if version is None:
            return None
        hint = "the next start of the server brings it up to date, if it is not newer"
        raise HostError(f"the database is of version {version}, not {HEAD}", code="database_version", hint=hint)

    async def close(self) -> None:
        await self._engine.dispose()

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        async with self._engine.connect() as connection:
            yield connection

    @asynccontextmanager
    async def write(self, *, adds: bool = False) -> AsyncIterator[AsyncConnection]:
        """One transaction: committed when the block ends, rolled back when it raises. Raises StorageFull; one that
        `adds` what can grow without end is refused before the disk is full, so that the others can go on."""
        if adds and self._room is not None and self._room.is_short:
            raise _full()
        try:
            async with self._turn, self._writer.begin() as connection:
                yield connection
        except DBAPIError as error:
            if self._is_full(error):
                raise _full() from error
            raise

    async def insist(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """`finish`, for what takes something away or ends it: where the disk is full, once more in the room kept for
        that. Raises StorageFull."""
        return await finish(self._insist(work))

    async def _insist(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        try:
            return await work()
        except StorageFull:
            if self._room is None:
                raise
            await in_thread(self._room.give_up)
            await self._empty_log()
            return await work()

    async def _empty_log(self) -> None:
        """Have SQLite write its log back into the database, as far as there is room, to begin it anew."""
        async with self._turn, self._engine.connect() as connection:
            with suppress(DBAPIError):
                await connection.exec_driver_sql("PRAGMA wal_checkpoint")

    async def keep_room(self) -> None:
        """Hold again the room that was given up, where there is some. Now and then: what the log has is written back
        as well, so that little of it makes the database grow when the disk becomes full."""
        if self._room is not None:
            await self._empty_log()
            async with self._turn:
                await in_thread(self._room.keep)

    def _is_full(self, error: DBAPIError) -> bool:
        if getattr(error.orig, "sqlstate", None) == SQLSTATE_DISK_FULL or "disk is full" in str(error.orig):
            return True
        # What SQLite says when it is not the log that cannot grow, but what it keeps beside it.
        return "disk I/O error" in str(error.orig) and self._room is not None and self._room.is_short

    async def _migrate(self) -> None:
        async with self._engine.connect() as connection:
            if await connection.run_sync(_version) == HEAD:
                return
        async with self.write() as connection:
            if connection.dialect.name == "postgresql":
                await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
            await connection.run_sync(_upgrade)


async def finish(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` to its end even when the caller is cancelled meanwhile; the cancellation is raised after it.

    A transaction that may or may not have been committed helps nobody.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            await _settle(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            raise asyncio.CancelledError from error
        raise


async def _settle(task: asyncio.Task[Any]) -> None:
    try:
        await asyncio.wait([task])
    except asyncio.CancelledError:
        return  # cancelled again while waiting: the first cancellation is raised when the work is done


def is_unique_violation(error: IntegrityError) -> bool:
    return "unique" in str(error.orig).lower()


def _create_engine(url: URL) -> AsyncEngine:
    url = url.set(drivername=_ASYNC_DRIVERS.get(url.drivername, url.drivername))
    if not _is_sqlite(url):
        return create_async_engine(url, pool_pre_ping=True)
    _create_private(url)
    # isolation_level=None: the driver begins nothing by itself, `_begin` does.
    engine = create_async_engine(url, connect_args={"isolation_level": None, "timeout": BUSY_TIMEOUT_S})
    event.listen(engine.sync_engine, "connect", _prepare_sqlite)
    event.listen(engine.sync_engine, "begin", _begin)
    return engine


def _full() -> StorageFull:
    return StorageFull("the disk of the server's database is full", hint="free space on it, or destroy VMs")


def _room(url: URL) -> Room | None:
    """Where a database server looks after the data, its disk is none of ours."""
    is_file = _is_sqlite(url) and url.database and url.database != ":memory:"
    return Room(Path(str(url.database))) if is_file else None


def _is_sqlite(url: URL) -> bool:
    return url.get_backend_name() == "sqlite"


def _create_private(url: URL) -> None:
    """Make the file readable by the manager alone before SQLite creates it (and its -wal and -shm) by the umask."""
    if url.database and url.database != ":memory:":
        Path(url.database).touch(mode=0o600)


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")  # a revocation that was answered must survive a power cut
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_S * 1000}")
    cursor.close()


def _begin(connection: Connection) -> None:
    """A writer takes the write lock at once: a reader that turns writer later may find its snapshot stale and fail.

    Readers need no transaction: each reads with one statement.
    """
    if connection.get_execution_options().get("rds_write", False):
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _version(connection: Connection) -> str | None:
    """Read directly: importing Alembic takes longer than everything else in opening an up-to-date database."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one_or_none()


def _upgrade(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parents[1] / "migrations"))
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise HostError(
            f"the database cannot be brought to version {HEAD}: {error}",
            code="database_version",
            hint="it was probably written by a newer release of the server",
        ) from error
