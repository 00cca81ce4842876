"""Input that is wrong: a 4xx that says what, in the one shape of errors, and the server is none the worse."""

from __future__ import annotations

import json
import socket
from http.client import HTTPConnection, HTTPResponse
from typing import Any

import pytest

from server_support import KEY, Box, Server, scale

GOOD: dict[str, Any] = {"cpu": 1, "memMb": 256, "allowIps": []}


def problem(answer: Any, status: int = 400, code: str | None = None) -> str:
    """The message of an error, after a look at its shape."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert {"message", "code", "requestId"} <= set(body) <= {
        "message", "code", "requestId", "hint", "retryable", "details",
    }  # fmt: skip
    assert code is None or body["code"] == code, body
    assert body["message"] and "Traceback" not in answer.text
    return str(body["message"])


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"cpu": 0}, "cpu"),
        ({"cpu": -1}, "cpu"),
        ({"cpu": 1.5}, "cpu"),
        ({"cpu": "1"}, "cpu"),
        ({"cpu": True}, "cpu"),
        ({"cpu": None}, "cpu"),
        ({"cpu": 10**6}, "MAX_CPU"),
        ({"cpu": 10**30}, "cpu"),
        ({"memMb": 127}, "memMb"),
        ({"memMb": 10**7}, "MAX_MEM_MB"),
        ({"memMb": "256"}, "memMb"),
        ({"allowIps": "172.16.0.1"}, "allowIps"),
        ({"allowIps": None}, "allowIps"),
        ({"allowIps": [1]}, "allowIps[0]"),
        ({"allowIps": {"0": "172.16.0.1"}}, "allowIps"),
        ({"allowIps": ["10.0.0.1"] * 65}, "MAX_ALLOW_IPS"),
        ({"outboundInternet": "true"}, "outboundInternet"),
        ({"outboundInternet": 1}, "outboundInternet"),
        ({"diskSizeMb": 1}, "diskSizeMb"),
        ({"diskSizeMb": 10**9}, "MAX_DISK_MB"),
        ({"name": ""}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"name": "n" * 129}, "name"),
        ({"labels": {"a": 1}}, "labels"),
        ({"labels": ["a"]}, "labels"),
        ({"labels": {str(n): "" for n in range(33)}}, "labels"),
        ({"engine": "vmware"}, "vmware"),
        ({"engine": "GVISOR"}, "GVISOR"),
        ({"engine": ""}, "engine"),
        ({"engine": 7}, "engine"),
        ({"unknownField": 1}, "unknownField"),
        ({"CPU": 1}, "CPU"),
        ({"mem_mb": 256}, "mem_mb"),
    ],
)
def test_create_names_the_field(server: Server, changed: dict[str, Any], named: str) -> None:
    assert named in problem(server.http.post("/v1/vms", json={**GOOD, **changed}))


@pytest.mark.parametrize("missing", GOOD)
def test_create_needs_its_fields(server: Server, missing: str) -> None:
    body = {name: value for name, value in GOOD.items() if name != missing}
    assert missing in problem(server.http.post("/v1/vms", json=body))


@pytest.mark.parametrize(
    "entry",
    [
        "",
        "localhost",
        "1.2.3",
        "1.2.3.4.5",
        "256.1.1.1",
        "1.2.3.4/33",
        "1.2.3.4/-1",
        "1.2.3.4/",
        "1.2.3.4/255.0.0.0",
        "0x7f.1",
        "::1",
        "fe80::/10",
        " 1.2.3.4",
        "1.2.3.4\n",
        "1.2.3.4; drop",
        "\u0661.2.3.4",
        "1.2.3.4-1.2.3.9",
        "9" * 64,
    ],
)
def test_bad_addresses_are_named(server: Server, entry: str) -> None:
    body = {**GOOD, "allowIps": ["10.0.0.1", entry], "outboundInternet": True}
    message = problem(server.http.post("/v1/vms", json=body), code="egress_rule_invalid")
    assert "allowIps[1]" in message


@pytest.mark.parametrize(
    "entry",
    ["", "*", "*.", "a..b", "-a.example", "a b.example", "10.0.0.1", "x" * 64 + ".example", "a/b", "*.*.example"],
)
def test_bad_domains_are_named(server: Server, entry: str) -> None:
    body = {**GOOD, "allowDomains": [entry], "outboundInternet": True}
    assert "allowDomains[0]" in problem(server.http.post("/v1/vms", json=body), code="egress_rule_invalid")


@pytest.mark.parametrize("field", ["snapshotId", "userOverlaySnapshotId", "imageId"])
def test_what_does_not_exist_is_404(server: Server, field: str) -> None:
    answer = server.http.post("/v1/vms", json={**GOOD, field: "nothing-of-that-name"})
    assert "nothing-of-that-name" in problem(answer, 404)


BROKEN = {
    "nothing": b"",
    "blanks": b"  \n",
    "half": b'{"cpu": 1',
    "text": b"hello",
    "a list": b"[]",
    "a number": b"1",
    "null": b"null",
    "a trailing comma": b'{"cpu": 1,}',
    "NaN": b'{"cpu": NaN}',
    "invalid UTF-8": b'{"cmd": "\xff\xfe"}',
    "a lone surrogate": b'{"cmd": "\\ud800"}',
    "two objects": b"{}{}",
    "deep": b'{"cmd":' * 5000,
    "deep lists": b"[" * 100_000,
    "a huge number": b'{"cpu": ' + b"9" * 10_000 + b"}",
    "gzip": b"\x1f\x8b\x08\x00",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_json(box: Box, name: str) -> None:
    for path in ("/v1/vms", f"{box.path}/exec", f"{box.path}/run-ts", "/auth/login"):
        problem(box.server.http.post(path, content=BROKEN[name], headers={"content-type": "application/json"}))


def test_oversized_bodies(box: Box) -> None:
    padded = b'{"cmd": "' + b"x" * (9 << 20) + b'"}'
    for path in ("/v1/vms", f"{box.path}/exec", "/auth/login"):
        problem(box.server.http.post(path, content=padded), 413)
        problem(box.server.http.post(path, content=iter([padded])), 413)  # chunked: no declared length


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"cmd": ""}, "cmd"),
        ({"cmd": None}, "cmd"),
        ({"cmd": ["ls"]}, "cmd"),
        ({"cmd": "a\0b"}, "cmd"),
        ({"cmd": "x" * 131_072}, "cmd"),
        ({"cwd": ""}, "cwd"),
        ({"cwd": 1}, "cwd"),
        ({"cwd": "/workspace/\0"}, "cwd"),
        ({"timeoutMs": 0}, "timeoutMs"),
        ({"timeoutMs": -1}, "timeoutMs"),
        ({"timeoutMs": "100"}, "timeoutMs"),
        ({"timeoutMs": 3_600_001}, "MAX_EXEC_TIMEOUT_MS"),
        ({"env": ["A=b"]}, "env"),
        ({"env": {"A": 1}}, "env"),
        ({"env": {"A=B": "c"}}, "env"),
        ({"env": {"": "c"}}, "env"),
        ({"env": {"A": "b\0"}}, "env"),
        ({"env": {f"A{n}": "x" * 100_000 for n in range(20)}}, "env"),
        ({"shell": "zsh"}, "shell"),
    ],
)
def test_exec_names_the_field(box: Box, changed: dict[str, Any], named: str) -> None:
    message = problem(box.post("exec", {"cmd": "true", **changed}))
    assert named in message or "variables" in message


@pytest.mark.parametrize(
    "changed",
    [
        {"env": {"A": "b"}},
        {"env": ["A"]},
        {"env": ["=b"]},
        {"env": ["1A=b"]},
        {"args": "one"},
        {"args": [1]},
        {"denoFlags": "--no-check"},
        {"nodeFlags": ["--no-warnings"]},
        {"timeoutMs": 1.5},
        {"language": "ts"},
    ],
)
def test_run_ts_names_the_field(box: Box, changed: dict[str, Any]) -> None:
    assert next(iter(changed)) in problem(box.post("run-ts", {"code": "1", **changed}))


@pytest.mark.parametrize(
    "query", ["dest=/workspace&dest=/workspace/b", "dest=", "dest=/workspace/%00", "dest=/workspace/%ff", "", "other=1"]
)
def test_upload_queries(box: Box, query: str) -> None:
    headers = {"content-type": "application/gzip"}
    problem(box.server.http.post(f"{box.path}/files/upload?{query}", content=b"", headers=headers))


@pytest.mark.parametrize("query", ["limit=0", "limit=x", "limit=1001", "type=rm", "unknown=1", "limit=1&limit=2"])
def test_log_queries(box: Box, query: str) -> None:
    problem(box.server.http.get(f"{box.path}/exec-logs?{query}"))


@pytest.mark.parametrize(
    "path", ["/v1/vms/..%2f..", "/v1/vms/%00", "/v1/vms/vm-' or 1=1 --", "/v1/vms/" + "a" * 5000, "/v2/vms", "/v1//vms"]
)
def test_odd_paths_are_404(server: Server, path: str) -> None:
    problem(server.http.get(path), 404)


def test_wrong_methods_are_405(server: Server) -> None:
    answer = server.http.put("/v1/vms", json={})
    problem(answer, 405)
    assert "GET" in answer.headers["Allow"]


@pytest.mark.parametrize(
    "request_",
    [
        b"hello\r\n\r\n",
        b"BREW /v1/vms HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /auth/login HTTP/1.1\r\nHost: localhost\r\nContent-Length: many\r\n\r\n",
        b"POST /auth/login HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        b"POST /auth/login HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nno\r\n",
    ],
    ids=["text", "method", "long", "length", "lengths", "chunk"],
)
def test_what_is_not_http_gets_an_error_like_any_other(server: Server, request_: bytes) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=scale(10)) as connection:
        connection.sendall(request_)
        answer = HTTPResponse(connection)
        answer.begin()
        body = json.loads(answer.read())
        assert connection.recv(1) == b"", "the connection is closed"
    assert (answer.status, body["code"]) == (400, "malformed_request")
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["X-Request-Id"] == body["requestId"] and body["requestId"] in server.log.read_text()


def test_an_upload_over_the_limit_is_413_before_it_is_sent(box: Box) -> None:
    host, port = box.server.url.removeprefix("http://").split(":")
    connection = HTTPConnection(host, int(port), timeout=box.scale(10))
    connection.putrequest("POST", f"{box.path}/files/upload?dest=/workspace")
    for name, value in {**KEY, "content-type": "application/gzip", "content-length": str((2 << 30) + 1)}.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.status == 413 and json.loads(answer.read())["code"]
    connection.close()


def test_the_server_is_none_the_worse(box: Box) -> None:
    assert box.output("echo fine") == "fine\n"
    log = box.server.log.read_text()
    assert "Traceback" not in log, log[log.index("Traceback") :][:3000]
