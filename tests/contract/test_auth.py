"""Keys, sessions, further keys, and what happens to guessers."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import httpx
import pytest

from server_support import Server

LOGIN = {"email": "admin@localhost", "password": "admin"}


@pytest.fixture
def browser(server: Server) -> Iterator[httpx.Client]:
    """A client without a key, but with a login."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        assert client.post("/auth/login", json=LOGIN).json() == {"email": "admin@localhost"}
        yield client


def test_no_key_and_a_wrong_key_are_401(server: Server) -> None:
    for headers in ({}, {"X-API-Key": "wrong"}, {"X-API-Key": ""}, {"Cookie": "rds_session=forged"}):
        for path in ("/v1/vms", "/v1/nothing", "/v1/admin/overview"):
            answer = httpx.get(server.url + path, headers=headers, timeout=60)
            assert answer.status_code == 401, (headers, path)
            assert answer.json()["code"] == "unauthenticated"


def test_login_sets_a_careful_cookie(server: Server) -> None:
    answer = httpx.post(server.url + "/auth/login", json=LOGIN, timeout=60)
    assert answer.status_code == 200 and answer.json() == {"email": "admin@localhost"}
    name, *attributes = answer.headers["set-cookie"].split("; ")
    assert name.startswith("rds_session=")
    assert {"httponly", "samesite=lax", "path=/"} <= {attribute.lower() for attribute in attributes}


def test_a_session_is_as_good_as_a_key(browser: httpx.Client) -> None:
    assert browser.get("/auth/me").json() == {"email": "admin@localhost"}
    assert browser.get("/v1/vms").status_code == 200


def test_logout_revokes_on_the_server(browser: httpx.Client) -> None:
    token = browser.cookies["rds_session"]
    assert browser.post("/auth/logout").json() == {"ok": True}
    stolen = httpx.get(browser.base_url.join("/auth/me"), headers={"Cookie": f"rds_session={token}"}, timeout=60)
    assert stolen.status_code == 401


def test_me_without_a_session_is_401(server: Server) -> None:
    assert httpx.get(server.url + "/auth/me", timeout=60).status_code == 401


def test_a_wrong_login_is_401(server: Server) -> None:
    for wrong in ({**LOGIN, "email": "else@localhost"}, {"email": "other@localhost", "password": "nope"}):
        answer = httpx.post(server.url + "/auth/login", json=wrong, timeout=60)
        assert (answer.status_code, answer.json()["code"]) == (401, "wrong_login")


def test_a_flood_of_wrong_logins_has_to_wait(server: Server) -> None:
    guess = {"email": "flood@localhost", "password": "guess"}
    answers = [httpx.post(server.url + "/auth/login", json=guess, timeout=60) for _ in range(12)]
    assert answers[0].status_code == 401
    assert answers[-1].status_code == 429
    assert int(answers[-1].headers["Retry-After"]) >= 1
    assert httpx.post(server.url + "/auth/login", json=LOGIN, timeout=60).status_code == 200, (
        "others are not locked out"
    )


def test_pages_of_other_sites_change_nothing(browser: httpx.Client) -> None:
    for headers in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        answer = browser.post("/v1/vms", json={}, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (403, "cross_site_request")


def test_a_foreign_host_name_is_refused_while_the_development_key_works(server: Server) -> None:
    answer = httpx.get(server.url + "/v1/vms", headers={"X-API-Key": "dev-key", "Host": "rebound.example"}, timeout=60)
    assert (answer.status_code, answer.json()["code"]) == (403, "host_not_allowed")


def test_further_keys(server: Server, browser: httpx.Client) -> None:
    made = browser.post("/v1/admin/api-keys", json={"name": "contract"})
    assert made.status_code == 201
    secret, key_id = made.json()["secret"], made.json()["id"]
    assert httpx.get(server.url + "/v1/vms", headers={"X-API-Key": secret}, timeout=60).status_code == 200
    listed = browser.get("/v1/admin/api-keys")
    assert key_id in listed.text and secret not in listed.text, "a secret is shown once"
    assert secret not in (server.storage / "rds.db").read_bytes().decode("latin-1"), "only its hash is kept"
    assert browser.post(f"/v1/admin/api-keys/{key_id}/revoke").status_code == 200
    assert httpx.get(server.url + "/v1/vms", headers={"X-API-Key": secret}, timeout=60).status_code == 401
    assert browser.post("/v1/admin/api-keys/key-0000000000000000/revoke").status_code == 404


def test_keys_expire(browser: httpx.Client) -> None:
    past = (datetime.now(UTC) - timedelta(minutes=1)).isoformat()
    future = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    assert browser.post("/v1/admin/api-keys", json={"name": "x", "expiresAt": past}).status_code == 400
    assert browser.post("/v1/admin/api-keys", json={"name": "x", "expiresAt": "soon"}).status_code == 400
    made = browser.post("/v1/admin/api-keys", json={"name": "x", "expiresAt": future})
    assert made.status_code == 201 and made.json()["expiresAt"]
    assert browser.post(f"/v1/admin/api-keys/{made.json()['id']}/revoke").status_code == 200


def test_keys_are_made_with_the_admin_session_only(server: Server) -> None:
    for method, path in (("POST", ""), ("GET", ""), ("POST", "/key-0000000000000000/revoke")):
        answer = server.http.request(method, "/v1/admin/api-keys" + path, json={"name": "x"} if path == "" else None)
        assert answer.status_code == 403, answer.text


def test_overview_and_activity(server: Server, browser: httpx.Client) -> None:
    overview = server.http.get("/v1/admin/overview")
    assert overview.status_code == 200
    assert set(overview.json()) == {"vms", "cpu", "memory", "disk"}
    assert browser.get("/v1/admin/activity", params={"limit": 5}).json()["entries"][0]["kind"] == "login"
