"""Login sessions and further API keys. Tokens are 256 random bits, so a plain SHA-256 of them is enough to keep."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from ipaddress import IPv4Network
from typing import Any

from sqlalchemy import Row, bindparam, delete, func, insert, or_, select, update

from rundatsheesh.manager.errors import LimitReached, NotFound, StorageFull
from rundatsheesh.manager.model import ApiKey, Limits, Rights, Scope, Session, now
from rundatsheesh.manager.store import schema
from rundatsheesh.manager.store.database import Database, finish

SESSION_LIFE = timedelta(days=7)
MAX_SESSIONS = 1000  # the oldest go first
MAX_API_KEYS = 1000
DEFAULT_RIGHTS = Rights()


def hash_token(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


class Credentials:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def create_session(self, email: str) -> tuple[str, Session]:
        """A token, known to nobody but its receiver, and the session it opens."""
        token, at = secrets.token_urlsafe(32), now()
        session = Session(email, at + SESSION_LIFE)
        digest = hash_token(token)
        await self._database.insist(lambda: self._insert_session(digest, session, at))
        return token, session

    async def _insert_session(self, token_hash: str, session: Session, at: datetime) -> None:
        table = schema.sessions
        newest = select(table.c.token_hash).order_by(table.c.created_at.desc()).limit(MAX_SESSIONS - 1)
        async with self._database.write() as db:
            await db.execute(delete(table).where(or_(table.c.expires_at <= at, table.c.token_hash.not_in(newest))))
            await db.execute(
                insert(table).values(
                    token_hash=token_hash, email=session.email, created_at=at, expires_at=session.expires_at
                )
            )

    async def find_session(self, token: str) -> Session | None:
        """None when unknown, revoked or expired."""
        table = schema.sessions
        query = select(table.c.email, table.c.expires_at).where(
            table.c.token_hash == hash_token(token), table.c.expires_at > now()
        )
        async with self._database.read() as db:
            row = (await db.execute(query)).one_or_none()
        return None if row is None else Session(row.email, row.expires_at)

    async def revoke_session(self, token: str) -> None:
        await self._database.insist(lambda: self._revoke_session(hash_token(token)))

    async def _revoke_session(self, token_hash: str) -> None:
        async with self._database.write() as db:
            await db.execute(delete(schema.sessions).where(schema.sessions.c.token_hash == token_hash))

    async def create_api_key(
        self, name: str, expires_at: datetime | None, rights: Rights = DEFAULT_RIGHTS
    ) -> tuple[ApiKey, str]:
        """The key and its secret, which cannot be read again. Raises LimitReached over MAX_API_KEYS valid keys."""
        secret = "rds_" + secrets.token_urlsafe(32)
        key = ApiKey("key-" + secrets.token_hex(8), name, now(), expires_at, None, None, rights)
        await finish(self._insert_api_key(key, hash_token(secret)))
        return key, secret

    async def _insert_api_key(self, key: ApiKey, secret_hash: str) -> None:
        table = schema.api_keys
        async with self._database.write() as db:
            count = await db.scalar(select(func.count()).select_from(table))
            if (count or 0) >= MAX_API_KEYS:
                await db.execute(delete(table).where(or_(table.c.revoked_at.is_not(None), table.c.expires_at <= now())))
                count = await db.scalar(select(func.count()).select_from(table))
            if (count or 0) >= MAX_API_KEYS:
                raise LimitReached(f"there are already {MAX_API_KEYS} API keys", hint="revoke some", retry_after=60)
            await db.execute(
                insert(table).values(
                    id=key.id,
                    name=key.name,
                    secret_hash=secret_hash,
                    created_at=key.created_at,
                    expires_at=key.expires_at,
                    **_rights_columns(key.rights),
                )
            )

    async def list_api_keys(self) -> list[ApiKey]:
        """All of them, the revoked too, oldest first."""
        table = schema.api_keys
        async with self._database.read() as db:
            return [_key(row) for row in await db.execute(select(table).order_by(table.c.created_at, table.c.id))]

    async def find_api_key(self, secret: str) -> ApiKey | None:
        """None when unknown or revoked. An expired one is returned: the caller compares `expires_at`."""
        table = schema.api_keys
        query = select(table).where(table.c.secret_hash == hash_token(secret), table.c.revoked_at.is_(None))
        async with self._database.read() as db:
            row = (await db.execute(query)).one_or_none()
        return None if row is None else _key(row)

    async def revoke_api_key(self, key_id: str) -> ApiKey:
        """Idempotent. Raises NotFound (`api_key_not_found`)."""
        return await self._database.insist(lambda: self._revoke_api_key(key_id))

    async def _revoke_api_key(self, key_id: str) -> ApiKey:
        table = schema.api_keys
        async with self._database.write() as db:
            row = (
                await db.execute(
                    update(table)
                    .where(table.c.id == key_id)
                    .values(
                        revoked_at=func.coalesce(table.c.revoked_at, bindparam("at", now(), table.c.revoked_at.type))
                    )
                    .returning(table)
                )
            ).one_or_none()
        if row is None:
            raise NotFound(f"no API key {key_id[:64]!r}", code="api_key_not_found")
        return _key(row)

    async def mark_used(self, used: Mapping[str, datetime]) -> None:
        """Note when each key (by id) was last used. Not on a full disk: no call fails for this."""
        if used:
            with suppress(StorageFull):
                await finish(self._mark_used(used))

    async def _mark_used(self, used: Mapping[str, datetime]) -> None:
        table = schema.api_keys
        statement = update(table).where(table.c.id == bindparam("key")).values(last_used_at=bindparam("at"))
        async with self._database.write(adds=True) as db:
            await db.execute(statement, [{"key": key, "at": at} for key, at in used.items()])


def _key(row: Row[Any]) -> ApiKey:
    rights = _rights(row)
    return ApiKey(row.id, row.name, row.created_at, row.expires_at, row.revoked_at, row.last_used_at, rights)


def _rights(row: Row[Any]) -> Rights:
    return Rights(
        # A scope that this version does not know gives nothing.
        scopes=DEFAULT_RIGHTS.scopes if row.scopes is None else frozenset(Scope) & frozenset(row.scopes),
        egress=None if row.egress is None else tuple(IPv4Network(network) for network in row.egress),
        limits=Limits(row.max_vms, row.max_cpu, row.max_mem_mb, row.max_calls_per_minute),
    )


def _rights_columns(rights: Rights) -> dict[str, Any]:
    limits = rights.limits
    return {
        "scopes": sorted(rights.scopes),
        "egress": None if rights.egress is None else [str(network) for network in rights.egress],
        "max_vms": limits.vms,
        "max_cpu": limits.cpu,
        "max_mem_mb": limits.mem_mb,
        "max_calls_per_minute": limits.calls_per_minute,
    }
