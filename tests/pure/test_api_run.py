"""exec, run-ts and run-js."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from api_support import KEY, Outcome, Server, Wire, serve

from rundatsheesh.manager.api.schemas.run import ExecView, ScriptView
from rundatsheesh.manager.model import ExecCall, ScriptCall


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with serve(tmp_path, max_exec_timeout_ms=600_000) as running:
        yield running


async def call(server: Server, verb: str, body: Any, vm_id: str | None = None) -> Any:
    vm_id = vm_id or await server.vm()
    server.vms.asked.clear()
    return await server.client.post(f"/v1/vms/{vm_id}/{verb}", headers=KEY, json=body)


async def test_exec(server: Server) -> None:
    server.vms.outcome = Outcome(exit_code=137, stdout="é\ufffd\0", stderr="x", timed_out=True, truncated=True)
    body = {"cmd": "echo $A\nexit 3", "cwd": "/home/user/p", "env": {"A": "b=c\n"}, "timeoutMs": 5}
    answer = await call(server, "exec", body)
    assert answer.status_code == 200
    ExecView.model_validate(answer.json())
    assert answer.json() == {
        "exitCode": 137,
        "stdout": "é\ufffd\0",
        "stderr": "x",
        "durationMs": 1,
        "timedOut": True,
        "truncated": True,
    }
    assert server.vms.asked == [ExecCall("echo $A\nexit 3", "/workspace/p", {"A": "b=c\n"}, 5)]


async def test_defaults(server: Server) -> None:
    await call(server, "exec", {"cmd": "true", "cwd": None, "timeoutMs": None})
    assert server.vms.asked == [ExecCall("true", "/workspace", {}, 120_000)]
    await call(server, "run-ts", {"code": ""})
    assert server.vms.asked == [ScriptCall("ts", code="", timeout_ms=120_000)]


async def test_the_default_timeout_obeys_the_limit(tmp_path: Path) -> None:
    async with serve(tmp_path, max_exec_timeout_ms=1000) as server:
        await call(server, "exec", {"cmd": "true"})
        assert server.vms.asked[0].timeout_ms == 1000


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "cmd"),
        ({"cmd": ""}, "cmd"),
        ({"cmd": 1}, "cmd"),
        ({"cmd": "a\0b"}, "NUL"),
        ({"cmd": "x" * (128 << 10)}, "cmd"),
        ({"cmd": "é" * (100 << 10)}, "cmd: larger"),
        ({"cmd": "x", "env": {"A": "é" * (100 << 10)}}, "env: A: larger"),
        ({"cmd": "x", "timeoutMs": 0}, "timeoutMs"),
        ({"cmd": "x", "timeoutMs": 1.5}, "timeoutMs"),
        ({"cmd": "x", "timeoutMs": 600_001}, "MAX_EXEC_TIMEOUT_MS"),
        ({"cmd": "x", "cwd": ""}, "cwd"),
        ({"cmd": "x", "cwd": "/workspace/a\0"}, "cwd"),
        ({"cmd": "x", "env": ["A=b"]}, "env"),
        ({"cmd": "x", "env": {"A B": "c"}}, "env"),
        ({"cmd": "x", "env": {"": "c"}}, "env"),
        ({"cmd": "x", "env": {"A": "\0"}}, "env"),
        ({"cmd": "x", "env": {"A": None}}, "env"),
        ({"cmd": "x", "env": {f"K{n}": "" for n in range(257)}}, "env"),
        ({"cmd": "x", "env": {f"K{n}": "v" * 100_000 for n in range(20)}}, "env"),
        ({"cmd": "x", "timeout": 5}, "unknown field 'timeout'"),
        ({"cmd": "x", "timeout_ms": 5}, "unknown field 'timeout_ms'"),
    ],
)
async def test_exec_refuses_by_name(server: Server, body: Any, named: str) -> None:
    answer = await call(server, "exec", body)
    assert answer.status_code == 400 and named in answer.json()["message"], answer.text
    assert server.vms.asked == []


@pytest.mark.parametrize(
    "cwd", ["/", "/etc", "/workspaces", "/home/username", "/workspace/../etc", "..", "//etc", "a/../.."]
)
@pytest.mark.parametrize("verb", ["exec", "run-ts"])
async def test_paths_outside_the_workspace(server: Server, verb: str, cwd: str) -> None:
    answer = await call(server, verb, {"cmd": "true", "cwd": cwd} if verb == "exec" else {"path": cwd})
    assert (answer.status_code, answer.json()["code"]) == (400, "path_outside_workspace")


async def test_scripts(server: Server) -> None:
    body = {"path": "/home/user/a.ts", "args": ["-x", ""], "env": ["A=b=c", "E="], "timeoutMs": 9}
    await call(server, "run-ts", {**body, "denoFlags": ["--no-check", "--v8-flags=--x"]})
    expected = {"path": "/workspace/a.ts", "args": ("-x", ""), "env": {"A": "b=c", "E": ""}, "timeout_ms": 9}
    assert server.vms.asked == [ScriptCall("ts", flags=("--no-check", "--v8-flags=--x"), **expected)]
    await call(server, "run-js", {**body, "nodeFlags": ["-p"]})
    assert server.vms.asked == [ScriptCall("js", flags=("-p",), **expected)]


@pytest.mark.parametrize("verb", ["run-ts", "run-js"])
@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "exactly one"),
        ({"code": None}, "exactly one"),
        ({"code": "1", "path": "a.ts"}, "exactly one"),
        ({"code": 1}, "code"),
        ({"code": "\0"}, "code"),
        ({"code": "x" * ((1 << 20) + 1)}, "code"),
        ({"code": "", "args": "x"}, "args"),
        ({"code": "", "args": ["a\0"]}, "args[0]"),
        ({"code": "", "args": ["a", "é" * (100 << 10)]}, "args[1]: larger"),
        ({"code": "", "env": {"A": "b"}}, "env"),
        ({"code": "", "env": ["A"]}, "env[0]"),
        ({"code": "", "env": ["B=1", "=b"]}, "env[1]"),
        ({"code": "", "env": ["A,B=c"]}, "env[0]"),
        ({"code": "", "env": ["A=1", "A=2"]}, "twice"),
        ({"code": "", "env": ["A=\0"]}, "env[0]"),
        ({"code": "", "cwd": "/workspace"}, "unknown field 'cwd'"),
    ],
)
async def test_scripts_refuse_by_name(server: Server, verb: str, body: Any, named: str) -> None:
    answer = await call(server, verb, body)
    assert answer.status_code == 400 and named in answer.json()["message"], answer.text
    assert server.vms.asked == []


@pytest.mark.parametrize("flag", ["", "-", "--", "x.ts", "--a\0", " --a", 5])
async def test_flags_are_flags(server: Server, flag: Any) -> None:
    assert (await call(server, "run-ts", {"code": "", "denoFlags": [flag]})).status_code == 400
    assert (await call(server, "run-js", {"code": "", "nodeFlags": [flag]})).status_code == 400
    assert "nodeFlags" in (await call(server, "run-ts", {"code": "", "nodeFlags": []})).json()["message"]


@pytest.mark.parametrize("value", [None, 0, "", [], {"a": [1.5, "x"]}])
async def test_the_result_is_absent_or_exactly_what_was_set(server: Server, value: Any) -> None:
    assert set((await call(server, "run-ts", {"code": ""})).json()) & {"result", "error"} == set()
    server.vms.outcome = Outcome(has_result=True, result=value, error={"name": "Error", "message": "m"})
    answer = await call(server, "run-ts", {"code": ""})
    ScriptView.model_validate(answer.json())
    assert answer.json()["result"] == value and answer.json()["error"] == {"name": "Error", "message": "m"}


async def test_a_result_that_is_no_json_is_the_guest_s_fault(server: Server) -> None:
    deep: Any = 0
    for _ in range(100_000):
        deep = [deep]
    for value in (float("nan"), float("inf"), deep, object()):
        server.vms.outcome = Outcome(has_result=True, result=value)
        answer = await call(server, "run-ts", {"code": ""})
        assert (answer.status_code, answer.json()["code"]) == (502, "guest_misbehaved")
    while deep:
        deep = deep[0]  # a deep list must not be freed by recursion


@pytest.mark.parametrize("verb", ["exec", "run-ts", "run-js"])
async def test_a_client_that_goes_away_ends_its_call(server: Server, verb: str) -> None:
    vm_id = await server.vm()
    server.vms.hang = asyncio.Event()
    body = json.dumps({"cmd": "sleep 9"} if verb == "exec" else {"code": ""}).encode()
    wire = Wire(server.app, "POST", f"/v1/vms/{vm_id}/{verb}", body)
    await server.vms.began.wait()
    wire.go_away()
    await asyncio.wait_for(wire.done, 30)
    assert server.vms.cancelled == 1 and wire.sent == []


async def test_a_client_that_goes_away_ends_its_create(server: Server) -> None:
    server.vms.hang = asyncio.Event()
    wire = Wire(server.app, "POST", "/v1/vms", b'{"cpu":1,"memMb":128,"allowIps":[]}')
    await server.vms.began.wait()
    wire.go_away()
    await asyncio.wait_for(wire.done, 30)
    assert server.vms.cancelled == 1 and server.vms.records == {}


async def test_a_server_that_ends_cancels_its_calls(server: Server) -> None:
    vm_id = await server.vm()
    server.vms.hang = asyncio.Event()
    wire = Wire(server.app, "POST", f"/v1/vms/{vm_id}/exec", b'{"cmd":"true"}')
    await server.vms.began.wait()
    wire.done.cancel()
    await asyncio.wait_for(wire.done, 30)
    assert (server.vms.cancelled, wire.status) == (1, 503)
