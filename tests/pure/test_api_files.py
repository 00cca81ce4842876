"""Uploads and downloads."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from api_support import KEY, Server, Wire, serve

from rundatsheesh.manager.api import streaming
from rundatsheesh.manager.errors import NotFound

GZIP = {**KEY, "content-type": "application/gzip"}


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with serve(tmp_path, max_upload_bytes=1000) as running:
        yield running


async def upload(
    server: Server, content: bytes | AsyncIterator[bytes], query: str = "dest=/home/user/p", **headers: str
) -> httpx.Response:
    vm_id = await server.vm()
    url = f"/v1/vms/{vm_id}/files/upload?{query}"
    return await server.client.post(url, headers={**GZIP, **headers}, content=content)


@pytest.mark.parametrize("kind", ["application/gzip", "application/x-gzip", "Application/Octet-Stream; x=y"])
async def test_upload(server: Server, kind: str) -> None:
    answer = await upload(server, b"bytes", **{"content-type": kind})
    assert (answer.status_code, answer.content) == (204, b"")
    assert server.vms.uploaded == b"bytes" and server.vms.asked[-1] == "/workspace/p"


async def test_other_types_are_refused_with_a_hint(server: Server) -> None:
    answer = await upload(server, b"x", **{"content-type": "application/x-www-form-urlencoded"})
    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")
    assert "application/gzip" in answer.json()["hint"]


async def test_an_upload_over_the_limit(server: Server) -> None:
    sent = 0

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += 1
            yield b"x" * 100

    for answer in (await upload(server, b"x" * 1001), await upload(server, pieces())):
        assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
        assert "MAX_UPLOAD_BYTES" in answer.json()["message"]
    assert sent <= 12
    assert (await upload(server, b"x" * 1000)).status_code == 204


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("", "invalid_input"),
        ("dest=", "invalid_input"),
        ("dest=/workspace&dest=/workspace", "invalid_input"),
        ("dest=/workspace&mode=1", "invalid_input"),
        ("dest=/workspace/%00", "invalid_input"),
        ("dest=/workspace/%ff", "invalid_input"),
        ("dest=/etc", "path_outside_workspace"),
        ("dest=%2Fworkspace%2F..%2Fetc", "path_outside_workspace"),
    ],
)
async def test_wrong_destinations(server: Server, query: str, code: str) -> None:
    answer = await upload(server, b"x", query)
    assert (answer.status_code, answer.json()["code"]) == (400, code), answer.text
    wrong = await server.client.get(f"/v1/vms/vm-1/files/download?{query.replace('dest', 'path')}", headers=KEY)
    assert (wrong.status_code, wrong.json()["code"]) == (400, code)


async def test_a_client_that_goes_away_in_an_upload(server: Server) -> None:
    vm_id = await server.vm()
    wire = Wire(server.app, "POST", f"/v1/vms/{vm_id}/files/upload?dest=/workspace", None)
    wire.go_away()
    await asyncio.wait_for(wire.done, 30)
    assert wire.sent == [] and server.vms.asked[1:] == []


async def test_an_upload_that_stalls(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rundatsheesh.manager.api.requests.STALL_TIMEOUT_S", 0.05)
    vm_id = await server.vm()
    wire = Wire(server.app, "POST", f"/v1/vms/{vm_id}/files/upload?dest=/workspace", None)
    await asyncio.wait_for(wire.done, 30)
    assert wire.status == 408


async def download(server: Server, query: str = "path=/home/user/p") -> httpx.Response:
    vm_id = await server.vm()
    return await server.client.get(f"/v1/vms/{vm_id}/files/download?{query}", headers=KEY)


async def test_download(server: Server) -> None:
    data = gzip.compress(b"x" * 100)
    server.vms.download_chunks = [data[:5], data[5:]]
    answer = await download(server)
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/gzip"
    assert "content-length" not in answer.headers and "content-encoding" not in answer.headers
    assert answer.headers["content-disposition"] == 'attachment; filename="p.tar.gz"'
    assert gzip.decompress(answer.content) == b"x" * 100
    assert server.vms.asked[-1] == "/workspace/p" and server.vms.download_closed


async def test_the_file_name_cannot_break_the_header(server: Server) -> None:
    answer = await download(server, "path=/workspace/a%22%0d%0aX:%20y%C3%A9")
    assert answer.headers["content-disposition"] == 'attachment; filename="a___X__y_.tar.gz"'


async def test_errors_before_the_first_byte(server: Server) -> None:
    await server.vm()
    server.vms.fails_with = NotFound("no such file", code="path_not_found")
    vm_id = next(iter(server.vms.records))
    answer = await server.client.get(f"/v1/vms/{vm_id}/files/download?path=/workspace/x", headers=KEY)
    assert (answer.status_code, answer.json()["code"]) == (404, "path_not_found")


async def test_an_error_in_the_middle_breaks_the_transfer(server: Server) -> None:
    vm_id = await server.vm()
    server.vms.download_chunks, server.vms.download_fails_after = [b"a", b"b"], 1
    wire = Wire(server.app, "GET", f"/v1/vms/{vm_id}/files/download?path=/workspace")
    with pytest.raises(Exception, match="broken in the middle"):
        await wire.done
    assert [message.get("body") for message in wire.sent] == [None, b"a"]
    assert server.vms.download_closed


async def test_a_client_that_goes_away_in_a_download(server: Server) -> None:
    vm_id = await server.vm()
    server.vms.download_chunks = [b"x"] * 1000
    wire = Wire(server.app, "GET", f"/v1/vms/{vm_id}/files/download?path=/workspace")
    wire.reading.clear()
    await wire.first_chunk.wait()
    wire.go_away()
    await asyncio.wait_for(wire.done, 30)
    assert server.vms.download_closed and len(wire.sent) == 2


async def test_a_client_that_stops_reading(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "STALL_TIMEOUT_S", 0.05)
    vm_id = await server.vm()
    wire = Wire(server.app, "GET", f"/v1/vms/{vm_id}/files/download?path=/workspace")
    wire.reading.clear()
    await asyncio.wait_for(wire.done, 30)
    assert server.vms.download_closed and len(wire.sent) == 2
