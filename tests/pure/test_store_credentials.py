"""Sessions and API keys."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
from api_support import open_store

from rundatsheesh.manager.errors import LimitReached, NotFound
from rundatsheesh.manager.model import now
from rundatsheesh.manager.store import Credentials, credentials


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[Credentials]:
    store = await open_store(tmp_path / "rds.db")
    yield store.credentials
    await store.close()


async def test_a_session_until_its_revocation(opened: Credentials) -> None:
    token, session = await opened.create_session("a@b")
    other, _ = await opened.create_session("a@b")
    assert len(token) >= 43 and token != other
    assert timedelta(days=6) < session.expires_at - now() <= timedelta(days=7)
    assert await opened.find_session(token) == session
    await opened.revoke_session(token)
    await opened.revoke_session(token)
    assert await opened.find_session(token) is None and await opened.find_session(other)


async def test_a_session_expires(opened: Credentials, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "SESSION_LIFE", timedelta(seconds=-1))
    token, _ = await opened.create_session("a@b")
    assert await opened.find_session(token) is None


async def test_old_sessions_make_room(opened: Credentials, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "MAX_SESSIONS", 3)
    tokens = [(await opened.create_session("a@b"))[0] for _ in range(5)]
    assert [await opened.find_session(token) is not None for token in tokens] == [False, False, True, True, True]


async def test_no_secret_is_in_the_file(opened: Credentials, tmp_path: Path) -> None:
    token, _ = await opened.create_session("a@b")
    key, secret = await opened.create_api_key("ci", None)
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert key.id.encode() in stored
    assert token.encode() not in stored and secret.encode() not in stored


async def test_keys(opened: Credentials) -> None:
    expires = now() + timedelta(days=1)
    key, secret = await opened.create_api_key("ci", expires)
    assert await opened.find_api_key(secret) == key and await opened.list_api_keys() == [key]
    assert await opened.find_api_key(secret + "x") is None
    used = now()
    await opened.mark_used({key.id: used, "key-gone": used})
    await opened.mark_used({})
    assert (await opened.list_api_keys())[0].last_used_at == used
    revoked = await opened.revoke_api_key(key.id)
    assert revoked.revoked_at and await opened.revoke_api_key(key.id) == revoked
    assert await opened.find_api_key(secret) is None and await opened.list_api_keys() == [revoked]
    with pytest.raises(NotFound):
        await opened.revoke_api_key("key-gone")


async def test_only_dead_keys_make_room(opened: Credentials, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "MAX_API_KEYS", 2)
    await opened.create_api_key("expired", now() - timedelta(seconds=1))
    dead, _ = await opened.create_api_key("revoked", None)
    await opened.revoke_api_key(dead.id)
    await opened.create_api_key("one", None)
    await opened.create_api_key("two", None)
    with pytest.raises(LimitReached):
        await opened.create_api_key("three", None)
    assert [key.name for key in await opened.list_api_keys()] == ["one", "two"]
