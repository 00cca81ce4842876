"""Who is let in."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from http.cookies import SimpleCookie
from pathlib import Path

import pytest
from api_support import KEY, LOGIN, Server, make_settings, serve

from rundatsheesh.manager.api.auth import Authenticator
from rundatsheesh.manager.api.problems import Unauthenticated
from rundatsheesh.manager.errors import LimitReached
from rundatsheesh.manager.model import now

VM = {"cpu": 1, "memMb": 256, "allowIps": []}


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with serve(tmp_path) as running:
        yield running


@pytest.mark.parametrize("headers", [{}, {"X-API-Key": ""}, {"X-API-Key": "wrong"}, {"X-API-Key": "x" * 5000}])
@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v1/vms"), ("POST", "/v1/vms"), ("GET", "/v1"), ("GET", "/v1/nope"), ("PUT", "/v1/vms")],
)
async def test_nothing_under_v1_without_credentials(
    server: Server, method: str, path: str, headers: dict[str, str]
) -> None:
    answer = await server.client.request(method, path, headers=headers, content=b"{broken")
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")
    assert "www-authenticate" in answer.headers


async def test_a_wrong_key_is_not_saved_by_a_good_cookie(server: Server) -> None:
    await server.log_in()
    assert (await server.client.get("/v1/vms")).status_code == 200
    assert (await server.client.get("/v1/vms", headers={"X-API-Key": "wrong"})).status_code == 401


async def test_login_me_logout(server: Server) -> None:
    assert (await server.client.get("/auth/me")).status_code == 401
    answer = await server.client.post("/auth/login", json=LOGIN)
    assert (answer.status_code, answer.json()) == (200, {"email": LOGIN["email"]})
    assert "; HttpOnly; SameSite=Lax; Path=/" in answer.headers["set-cookie"]
    cookie = SimpleCookie(answer.headers["set-cookie"])["rds_session"]
    assert not cookie["secure"] and int(cookie["max-age"]) > 6 * 24 * 3600
    assert (await server.client.get("/auth/me")).json() == {"email": LOGIN["email"]}
    token = cookie.value
    answer = await server.client.post("/auth/logout")
    assert (answer.status_code, answer.json()) == (200, {"ok": True})
    server.client.cookies.clear()
    server.client.cookies.set("rds_session", token)
    assert (await server.client.get("/auth/me")).status_code == 401
    assert (await server.client.get("/v1/vms")).status_code == 401


async def test_the_cookie_is_secure_behind_tls(server: Server) -> None:
    answer = await server.client.post("https://localhost/auth/login", json=LOGIN)
    assert SimpleCookie(answer.headers["set-cookie"])["rds_session"]["secure"]


async def test_a_session_survives_a_restart(tmp_path: Path) -> None:
    async with serve(tmp_path) as first:
        await first.log_in()
        token = first.client.cookies["rds_session"]
    async with serve(tmp_path) as second:
        second.client.cookies.set("rds_session", token)
        assert (await second.client.get("/auth/me")).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 201),
        ({"origin": "http://localhost:3000"}, 201),
        ({"sec-fetch-site": "same-origin"}, 201),
        ({"sec-fetch-site": "none"}, 201),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"origin": "http://localhost:3001"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"referer": "http://localhost:3000/swagger"}, 201),
        ({"referer": "https://evil.example/page"}, 403),
        ({"origin": "http://localhost:3000", "referer": "https://evil.example/"}, 201),
        ({"origin": "http://[broken"}, 400),
        ({"origin": "https://evil.example", **KEY}, 201),
    ],
)
async def test_the_cookie_serves_pages_of_this_server_only(
    server: Server, headers: dict[str, str], status: int
) -> None:
    await server.log_in()
    answer = await server.client.post("/v1/vms", json=VM, headers=headers)
    assert answer.status_code == status, answer.text


async def test_reading_with_the_cookie_needs_no_origin(server: Server) -> None:
    await server.log_in()
    assert (await server.client.get("/v1/vms", headers={"sec-fetch-site": "cross-site"})).status_code == 200
    assert (await server.client.post("/auth/logout", headers={"sec-fetch-site": "cross-site"})).status_code == 403
    assert (await server.client.post("/auth/login", headers={"origin": "null"}, json=LOGIN)).status_code == 403


@pytest.mark.parametrize("body", [{}, {"email": "a"}, {"email": 1, "password": "x"}, {**LOGIN, "otp": "1"}])
async def test_malformed_logins(server: Server, body: dict[str, object]) -> None:
    answer = await server.client.post("/auth/login", json=body)
    assert answer.status_code == 400 and "admin" not in answer.text


async def test_repeated_failures_are_slowed_down(server: Server) -> None:
    wrong = {**LOGIN, "password": "guess"}
    for _ in range(5):
        answer = await server.client.post("/auth/login", json=wrong)
        assert (answer.status_code, answer.json()["code"]) == (401, "wrong_login")
    for body in (wrong, LOGIN):
        answer = await server.client.post("/auth/login", json=body)
        assert (answer.status_code, answer.json()["code"]) == (429, "too_many_failures")
        assert int(answer.headers["retry-after"]) >= 1


class Logins:
    """The door alone, on a clock of the test's own."""

    def __init__(self, server: Server, directory: Path) -> None:
        self.at = 0.0
        self._authenticator = Authenticator(make_settings(directory), server.store.credentials, lambda: self.at)

    async def attempt(self, address: str, email: str = LOGIN["email"], password: str = "guess") -> str:
        try:
            await self._authenticator.log_in(email, password, address)
        except (Unauthenticated, LimitReached) as refused:
            return refused.code
        return "in"


@pytest.fixture
def logins(server: Server, tmp_path: Path) -> Logins:
    return Logins(server, tmp_path)


async def test_one_address_is_slowed_down_whatever_it_names_and_holds_nobody_up(logins: Logins) -> None:
    answers = [await logins.attempt("192.0.2.1", f"{n}@localhost") for n in range(40)]
    assert answers == ["wrong_login"] * 30 + ["too_many_failures"] * 10
    assert await logins.attempt("192.0.2.2", **LOGIN) == "in"
    logins.at += 2
    assert await logins.attempt("192.0.2.1", **LOGIN) == "in"


async def test_a_flood_from_everywhere_is_slowed_down_but_not_where_somebody_logged_in(logins: Logins) -> None:
    assert await logins.attempt("192.0.2.1", **LOGIN) == "in"
    answers = [await logins.attempt(f"198.51.100.{n}") for n in range(130)]
    assert answers == ["wrong_login"] * 120 + ["too_many_failures"] * 10
    assert await logins.attempt("192.0.2.2", **LOGIN) == "too_many_failures"
    assert await logins.attempt("192.0.2.1", **LOGIN) == "in"
    logins.at += 1
    assert await logins.attempt("192.0.2.2", **LOGIN) == "in"


async def test_a_trickle_of_wrong_logins_locks_nobody_out(logins: Logins) -> None:
    for n in range(300):
        assert await logins.attempt("192.0.2.1", f"{n}@localhost") == "wrong_login", n
        logins.at += 10
    assert await logins.attempt("192.0.2.2", **LOGIN) == "in"


async def test_a_further_key_until_its_revocation(server: Server) -> None:
    await server.log_in()
    created = (await server.client.post("/v1/admin/api-keys", json={"name": "ci"})).json()
    server.client.cookies.clear()
    key = {"X-API-Key": created["secret"]}
    assert (await server.client.get("/v1/vms", headers=key)).status_code == 200
    assert (await server.client.post("/v1/vms", headers=key, json=VM)).status_code == 201
    assert server.vms.callers[-1].who == f"key:{created['id']}"
    for path in ("overview", "activity", "api-keys"):
        answer = await server.client.get(f"/v1/admin/{path}", headers=key)
        assert answer.status_code == 403, path
    await server.log_in()
    answer = await server.client.post(f"/v1/admin/api-keys/{created['id']}/revoke")
    assert answer.status_code == 200 and answer.json()["revokedAt"]
    server.client.cookies.clear()
    assert (await server.client.get("/v1/vms", headers=key)).status_code == 401


async def test_an_expired_key(server: Server) -> None:
    _, secret = await server.store.credentials.create_api_key("old", now() - timedelta(seconds=1))
    assert (await server.client.get("/v1/vms", headers={"X-API-Key": secret})).status_code == 401


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost", 200), ("127.0.0.1:3000", 200), ("[::1]:3000", 200), ("rebound.example", 403), ("[", 403)],
)
async def test_the_development_key_is_for_localhost(server: Server, host: str, status: int) -> None:
    assert (await server.client.get("/v1/vms", headers={**KEY, "host": host})).status_code == status


async def test_a_real_key_works_under_any_name(tmp_path: Path) -> None:
    async with serve(tmp_path, api_key="real") as server:
        headers = {"X-API-Key": "real", "host": "runner.example"}
        assert (await server.client.get("/v1/vms", headers=headers)).status_code == 200
        assert (await server.client.get("/v1/vms", headers={**headers, **KEY})).status_code == 401
