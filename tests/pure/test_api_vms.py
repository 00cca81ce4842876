"""/v1/vms."""

from __future__ import annotations

from collections.abc import AsyncIterator
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest
from api_support import KEY, Server, serve

from rundatsheesh.manager.api.schemas.vms import ExecLogsView, LogsView, VmView
from rundatsheesh.manager.model import CreateVm

VM: dict[str, Any] = {"cpu": 1, "memMb": 256, "allowIps": []}


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with serve(tmp_path, max_cpu=4, max_mem_mb=1024, max_disk_mb=2048, max_allow_ips=3) as running:
        yield running


async def test_create_with_everything(server: Server) -> None:
    body = {
        "cpu": 2,
        "memMb": 512,
        "allowIps": ["172.16.0.1/32", "10.1.2.3/8", "1.1.1.1"],
        "outboundInternet": True,
        "allowDomains": ["Example.ORG.", "*.example.com", "bücher.example"],
        "engine": "qemu",
        "imageId": "img",
        "userOverlaySnapshotId": "snap-1",
        "diskSizeMb": 100,
        "name": "builder",
        "labels": {"team": "a", "empty": ""},
    }
    answer = await server.client.post("/v1/vms", headers=KEY, json=body)
    assert answer.status_code == 201, answer.text
    assert server.vms.asked == [
        CreateVm(
            cpu=2,
            mem_mb=512,
            disk_mb=100,
            allow_ips=(IPv4Network("172.16.0.1/32"), IPv4Network("10.0.0.0/8"), IPv4Network("1.1.1.1/32")),
            outbound=True,
            allow_domains=("example.org", "*.example.com", "xn--bcher-kva.example"),
            engine="qemu",
            image_id="img",
            snapshot_id="snap-1",
            name="builder",
            labels={"team": "a", "empty": ""},
        )
    ]
    vm = answer.json()
    VmView.model_validate(vm)
    assert vm["allowIps"] == ["172.16.0.1/32", "10.0.0.0/8", "1.1.1.1/32"]
    assert vm["name"] == "builder" and vm["guestIp"].startswith("172.16.")


async def test_create_with_the_least(server: Server) -> None:
    answer = await server.client.post("/v1/vms", headers=KEY, json={**VM, "engine": "auto", "name": None})
    assert server.vms.asked == [CreateVm(cpu=1, mem_mb=256)]
    vm = answer.json()
    assert not {"name", "reason"} & set(vm)
    assert vm["outboundInternet"] is False and vm["labels"] == {} and vm["createdAt"].endswith("Z")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"cpu": None}, "cpu"),
        ({"cpu": True}, "cpu"),
        ({"cpu": "1"}, "cpu"),
        ({"cpu": 1.0}, "cpu"),
        ({"cpu": 0}, "cpu"),
        ({"cpu": 5}, "MAX_CPU"),
        ({"cpu": 10**30}, "MAX_CPU"),
        ({"memMb": 127}, "memMb"),
        ({"memMb": 1025}, "MAX_MEM_MB"),
        ({"diskSizeMb": 1}, "diskSizeMb"),
        ({"diskSizeMb": 4096}, "MAX_DISK_MB"),
        ({"allowIps": None}, "allowIps"),
        ({"allowIps": "1.1.1.1"}, "allowIps"),
        ({"allowIps": ["1.1.1.1", 2]}, "allowIps[1]"),
        ({"allowIps": ["1.1.1.1"] * 4}, "MAX_ALLOW_IPS"),
        ({"allowIps": ["1.1.1.1"] * 2000}, "allowIps"),
        ({"outboundInternet": 1}, "outboundInternet"),
        ({"outboundInternet": "true"}, "outboundInternet"),
        ({"engine": ""}, "engine"),
        ({"engine": "a\nb"}, "engine"),
        ({"imageId": "../x"}, "imageId"),
        ({"name": ""}, "name"),
        ({"name": "x" * 129}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"name": "a\0b"}, "name"),
        ({"labels": {"a=b": "c"}}, "labels"),
        ({"labels": {"a": 1}}, "labels"),
        ({"labels": {f"k{n}": "" for n in range(33)}}, "labels"),
        ({"snapshotId": "a", "userOverlaySnapshotId": "a"}, "snapshotId"),
        ({"memory": 5}, "unknown field 'memory'"),
        ({"mem_mb": 5}, "unknown field 'mem_mb'"),
    ],
)
async def test_refused_by_name(server: Server, change: dict[str, Any], named: str) -> None:
    answer = await server.client.post("/v1/vms", headers=KEY, json={**VM, **change})
    assert answer.status_code == 400, answer.text
    assert named in answer.json()["message"]
    assert server.vms.asked == []


@pytest.mark.parametrize("field", ["cpu", "memMb", "allowIps"])
async def test_required_fields(server: Server, field: str) -> None:
    answer = await server.client.post("/v1/vms", headers=KEY, json={k: v for k, v in VM.items() if k != field})
    assert (answer.status_code, answer.json()["message"]) == (400, f"{field}: is required")


@pytest.mark.parametrize(
    ("field", "entry"),
    [
        *(
            ("allowIps", entry)
            for entry in ("", "1.1.1", "1.1.1.256", "01.1.1.1", "1.1.1.1/33", "1.1.1.1/", " 1.1.1.1")
        ),
        *(
            ("allowIps", entry)
            for entry in ("1.1.1.1/255.0.0.0", "::1", "fe80::/10", "example.com", "\u0661.1.1.1", "0x7f.1")
        ),
        *(("allowDomains", entry) for entry in ("", "*", "*.", "a..b", "1.2.3.4", "a b.c", "*.*.c", "a.*.c", "-a.b")),
        *(
            ("allowDomains", entry)
            for entry in ("x" * 64 + ".a", "a/b", "http://a.b", "::1", "a." * 126 + "aa", "\u200d.a")
        ),
    ],
)
async def test_egress_rules_are_refused_by_place(server: Server, field: str, entry: str) -> None:
    entries = ["1.1.1.1" if field == "allowIps" else "a.example", entry]
    answer = await server.client.post("/v1/vms", headers=KEY, json={**VM, field: entries})
    assert (answer.status_code, answer.json()["code"]) == (400, "egress_rule_invalid"), answer.text
    assert answer.json()["details"]["index"] == 1 and f"{field}[1]" in answer.json()["message"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"  ",
        b"null",
        b"[]",
        b'"x"',
        b"{",
        b'{"cpu":1,}',
        b'{"cpu":NaN}',
        b'{"name":"\xff"}',
        b'{"name":"\\ud800"}',
        b"\xef\xbb\xbf{}",
        b'{"a":' * 5000,
        b"[" * 100_000,
        b'{"cpu":' + b"9" * 10_000 + b"}",
        b"%PDF",
    ],
)
async def test_malformed_bodies(server: Server, content: bytes) -> None:
    answer = await server.client.post("/v1/vms", headers=KEY, content=content)
    assert (answer.status_code, answer.json()["code"]) == (400, "malformed_json"), answer.text


async def test_a_body_of_a_million_mistakes_is_cheap_to_refuse(server: Server) -> None:
    many = ",".join(f'"k{n}":1' for n in range(500_000))
    answer = await server.client.post("/v1/vms", headers=KEY, content="{" + many + "}")
    assert answer.status_code == 400 and len(answer.content) < 10_000


@pytest.mark.parametrize("declared", [True, False])
async def test_a_body_over_the_limit_is_refused(server: Server, declared: bool) -> None:
    sent = 0

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(64):
            sent += 1
            yield b" " * (1 << 20)

    headers = {**KEY, **({"content-length": str(64 << 20)} if declared else {})}
    answer = await server.client.post("/v1/vms", headers=headers, content=pieces())
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
    assert sent < 12


async def test_the_content_type_of_json_does_not_matter(server: Server) -> None:
    headers = {**KEY, "content-type": "application/x-www-form-urlencoded"}
    answer = await server.client.post("/v1/vms", headers=headers, content=b'{"cpu":1,"memMb":128,"allowIps":[]}')
    assert answer.status_code == 201


async def test_a_life(server: Server) -> None:
    vm_id = await server.vm()
    call = server.client
    assert (await call.get(f"/v1/vms/{vm_id}", headers=KEY)).json()["state"] == "RUNNING"
    assert (await call.post(f"/v1/vms/{vm_id}/start", headers=KEY)).status_code == 409
    stopped = await call.post(f"/v1/vms/{vm_id}/stop", headers=KEY, json={})
    assert (stopped.status_code, stopped.content) == (204, b"")
    refused = await call.post(f"/v1/vms/{vm_id}/exec", headers=KEY, json={"cmd": "true"})
    assert (refused.status_code, refused.json()["details"]) == (409, {"state": "STOPPED"})
    assert (await call.post(f"/v1/vms/{vm_id}/start", headers=KEY, json={"x": 1})).status_code == 400
    assert (await call.post(f"/v1/vms/{vm_id}/start", headers=KEY)).status_code == 204
    assert (await call.delete(f"/v1/vms/{vm_id}", headers=KEY)).status_code == 204
    assert (await call.delete(f"/v1/vms/{vm_id}", headers=KEY)).json()["code"] == "vm_not_found"


async def test_list_and_its_filters(server: Server) -> None:
    first, second = await server.vm(), await server.vm()
    await server.client.post(f"/v1/vms/{second}/stop", headers=KEY)

    async def ids(query: str) -> list[str]:
        answer = await server.client.get(f"/v1/vms?{query}", headers=KEY)
        assert answer.status_code == 200, answer.text
        return [vm["id"] for vm in answer.json()]

    assert await ids("") == [first, second]
    assert await ids("state=STOPPED") == [second]
    assert await ids("label=a%3Db&state=RUNNING") == [first]
    assert await ids("label=a=b&label=c=d") == []
    assert await ids("label=a=") == []


@pytest.mark.parametrize(
    "query",
    [
        "state=running",
        "state=DELETING",
        "state=",
        "label=a",
        "label==b",
        "label=a=b&label=a=c",
        "nope=1",
        "state=ERROR&state=ERROR",
        "label=%ff",
    ],
)
async def test_wrong_filters(server: Server, query: str) -> None:
    assert (await server.client.get(f"/v1/vms?{query}", headers=KEY)).status_code == 400


async def test_logs(server: Server) -> None:
    vm_id = await server.vm()
    logs = await server.client.get(f"/v1/vms/{vm_id}/logs?type=console&tail=1", headers=KEY)
    LogsView.model_validate(logs.json())
    assert (logs.json()["lines"], logs.json()["truncated"]) == (["two"], True)
    entries = await server.client.get(f"/v1/vms/{vm_id}/exec-logs?limit=5&type=exec", headers=KEY)
    ExecLogsView.model_validate(entries.json())
    for query in (
        "logs?tail=0",
        "logs?tail=x",
        "logs?tail=100000",
        "logs?type=x",
        "exec-logs?limit=0",
        "exec-logs?type=x",
    ):
        assert (await server.client.get(f"/v1/vms/{vm_id}/{query}", headers=KEY)).status_code == 400
    assert (await server.client.get("/v1/vms/vm-nope/logs", headers=KEY)).status_code == 404
