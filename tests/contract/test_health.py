"""Liveness, readiness, the public documents and what every answer carries."""

from __future__ import annotations

import re

import httpx
import pytest

from server_support import Server, eventually, scale


def public(server: Server, path: str) -> httpx.Response:
    return httpx.get(server.url + path, follow_redirects=True, timeout=60)


@pytest.mark.parametrize("path", ["/", "/docs/", "/docs/api", "/swagger", "/openapi.json", "/health", "/health/ready"])
def test_public_pages_need_no_credentials(server: Server, path: str) -> None:
    answer = public(server, path)
    assert answer.status_code == 200, answer.text
    assert len(answer.content) > 10


def test_health(server: Server) -> None:
    assert public(server, "/health").json() == {"status": "ok"}
    assert public(server, "/health/ready").json() == {"status": "ready"}


def test_every_answer_has_a_request_id_and_errors_repeat_it(server: Server) -> None:
    for path, status in (("/health", 200), ("/v1/vms", 401), ("/nowhere", 404)):
        answer = public(server, path)
        assert answer.status_code == status
        assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", answer.headers["X-Request-Id"])
        if status != 200:
            assert answer.json()["requestId"] == answer.headers["X-Request-Id"]
            assert set(answer.json()) >= {"message", "code", "requestId"}


def test_the_request_id_of_the_client_is_kept_and_logged(server: Server) -> None:
    answer = server.http.get("/v1/vms/vm-0000000000000000", headers={"X-Request-Id": "contract-health-1"})
    assert answer.status_code == 404
    assert answer.headers["X-Request-Id"] == answer.json()["requestId"] == "contract-health-1"
    eventually(lambda: "contract-health-1" in server.log.read_text(), scale(5), "the id in the log")


def test_the_document_names_every_path_of_the_seed(server: Server) -> None:
    document = public(server, "/openapi.json").json()
    for path in ("/v1/vms", "/exec", "/run-ts", "/files/upload", "/files/download", "/auth/login"):
        assert any(known.endswith(path) for known in document["paths"]), path
