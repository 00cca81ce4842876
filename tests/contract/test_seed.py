"""The API as it was asked for: each command of it, pasted into bash, and each sentence about it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from server_support import Box, Server, tgz

pytestmark = pytest.mark.every_engine

CREATE = r"""
curl -sS \
  -H "X-API-Key: dev-key" \
  -H "content-type: application/json" \
  -d '{"cpu":1,"memMb":256,"allowIps":["172.16.0.1/32"],"outboundInternet":true}' \
  http://localhost:3000/v1/vms
"""
EXEC = r"""
curl -sS \
  -H "X-API-Key: dev-key" \
  -H "content-type: application/json" \
  -d '{"cmd":"id && echo hello","timeoutMs":30000}' \
  "http://localhost:3000/v1/vms/${VM_ID}/exec"
"""
RUN_TS = r"""
curl -sS \
  -H "X-API-Key: dev-key" \
  -H "content-type: application/json" \
  -d '{"code":"console.log(2 + 2)"}' \
  "http://localhost:3000/v1/vms/${VM_ID}/run-ts"
"""
ENV = r"""
curl -sS \
  -H "X-API-Key: dev-key" \
  -H "content-type: application/json" \
  -d '{
    "env": ["CLICKUP_TOKEN=...","CLICKUP_BASE_URL=https://api.clickup.com/api/v2"],
    "code": "console.log(Deno.env.get(\"CLICKUP_BASE_URL\"))"
  }' \
  "http://localhost:3000/v1/vms/${VM_ID}/run-ts"
"""
RESULT = r"""
curl -sS \
  -H "X-API-Key: dev-key" \
  -H "content-type: application/json" \
  -d '{
    "code": "result.set({ ok: true, answer: 42 }); console.log(\"done\")"
  }' \
  "http://localhost:3000/v1/vms/${VM_ID}/run-ts"
"""
ARCHIVE = r"""
mkdir -p /tmp/rds-upload
echo "hello run-dat-sheesh" >/tmp/rds-upload/hello.txt
tar -czf /tmp/upload.tar.gz -C /tmp/rds-upload .
"""
UPLOAD = r"""
curl -sS \
  -H "X-API-Key: dev-key" \
  -H "content-type: application/gzip" \
  --data-binary @/tmp/upload.tar.gz \
  "http://localhost:3000/v1/vms/${VM_ID}/files/upload?dest=%2Fhome%2Fuser%2Fproject"
"""
DOWNLOAD = r"""
curl -sS \
  -H "X-API-Key: dev-key" \
  -o download.tar.gz \
  "http://localhost:3000/v1/vms/${VM_ID}/files/download?path=%2Fhome%2Fuser%2Fproject"
"""
EXTRACT = r"""
mkdir -p out
tar -xzf download.tar.gz -C out
"""


class Shell:
    """bash in a directory of its own, with the server's port and a private /tmp in the place of the documented ones."""

    def __init__(self, server: Server, directory: Path) -> None:
        self._server = server
        self._directory = directory

    def paste(self, command: str, vm_id: str = "") -> str:
        here = command.replace("http://localhost:3000", self._server.url).replace("/tmp/", f"{self._directory}/")
        script = f'set -e\nVM_ID="{vm_id}"\n{here}'
        done = subprocess.run(["bash", "-c", script], cwd=self._directory, capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == "", done
        return done.stdout

    def answer(self, command: str, vm_id: str = "") -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.paste(command, vm_id))
        return found


@pytest.fixture
def shell(server: Server, tmp_path: Path) -> Shell:
    return Shell(server, tmp_path)


def test_create_a_vm(server: Server, shell: Shell, engine: str) -> None:
    with_engine = CREATE.replace('"cpu":1', f'"engine":"{engine}","cpu":1')
    created = shell.answer(CREATE if engine == "gvisor" else with_engine)
    try:
        assert created.get("state") == "RUNNING", created
        assert (created["cpu"], created["memMb"]) == (1, 256)
        assert created["allowIps"] == ["172.16.0.1/32"] and created["outboundInternet"] is True
        assert server.http.get(f"/v1/vms/{created['id']}").json() == created
    finally:
        assert server.http.delete(f"/v1/vms/{created.get('id')}").status_code == 204


def test_exec_a_shell_command(box: Box, shell: Shell) -> None:
    done = shell.answer(EXEC, box.id)
    assert done["exitCode"] == 0 and done["stderr"] == "" and done["timedOut"] is False
    first, second = done["stdout"].splitlines()
    assert first.startswith("uid=1000(user) gid=1000(user)") and second == "hello"
    assert box.output("pwd") == "/workspace\n"


def test_run_typescript(box: Box, shell: Shell) -> None:
    done = shell.answer(RUN_TS, box.id)
    assert done["exitCode"] == 0 and done["stdout"] == "4\n", done


def test_env_vars_in_run_ts(box: Box, shell: Shell) -> None:
    done = shell.answer(ENV, box.id)
    assert done["exitCode"] == 0 and done["stdout"] == "https://api.clickup.com/api/v2\n", done


def test_only_those_keys(box: Box) -> None:
    code = """
        const told = (f: () => unknown) => { try { return f() } catch (error) { return (error as Error).name } };
        result.set([told(() => Deno.env.get("A")), told(() => Deno.env.get("OTHER")), told(() => Deno.env.get("PATH")),
            told(() => Deno.env.toObject()), told(() => Deno.env.set("NEW", "1"))]);
    """
    done = box.ts(code, env=["A=1"])
    assert done["result"] == ["1", "NotCapable", "NotCapable", "NotCapable", "NotCapable"], done
    assert box.ts('console.log(Deno.env.get("A"))')["error"]["name"] == "NotCapable"


def test_a_structured_value(box: Box, shell: Shell) -> None:
    done = shell.answer(RESULT, box.id)
    assert done["exitCode"] == 0 and done["stdout"] == "done\n"
    assert done["result"] == {"ok": True, "answer": 42} and "error" not in done


def test_a_structured_error_exits_non_zero(box: Box) -> None:
    done = box.ts('result.error({ code: "E_TEAPOT", status: 418 })')
    assert done["exitCode"] != 0 and done["error"] == {"code": "E_TEAPOT", "status": 418}


def test_upload_and_download(box: Box, shell: Shell, tmp_path: Path) -> None:
    shell.paste(ARCHIVE)
    assert shell.paste(UPLOAD, box.id) == ""
    assert box.output("cat project/hello.txt") == "hello run-dat-sheesh\n"
    assert shell.paste(DOWNLOAD, box.id) == ""
    shell.paste(EXTRACT)
    assert (tmp_path / "out" / "hello.txt").read_text() == "hello run-dat-sheesh\n"


def test_uploads_are_restricted_to_the_workspace(box: Box) -> None:
    for dest in ("/etc", "/tmp/x", "/home/other", "/workspace/../etc"):
        answer = box.upload(tgz({"x": b"x"}), dest)
        assert (answer.status_code, answer.json()["code"]) == (400, "path_outside_workspace")


def test_uploads_must_be_tar_gz(box: Box) -> None:
    assert box.upload(b"hello").status_code == 400


def test_everything_needs_a_key_or_a_session(server: Server) -> None:
    plain = f"curl -sS -o /dev/null -w '%{{http_code}}' {server.url}/v1/vms"
    assert subprocess.check_output(plain, shell=True, text=True) == "401"
    jar = f"curl -sS -c - -o /dev/null {server.url}/auth/login -d " + (
        '\'{"email":"admin@localhost","password":"admin"}\' | grep -o "[^[:space:]]*$" | tail -1'
    )
    token = subprocess.check_output(jar, shell=True, text=True).strip()
    with_cookie = f"{plain} -H 'Cookie: rds_session={token}'"
    assert subprocess.check_output(with_cookie, shell=True, text=True) == "200"
