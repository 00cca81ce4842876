"""Uploads and downloads: what goes in comes out, and nothing hostile gets in."""

from __future__ import annotations

import gzip
import io
import os
import socket
import tarfile
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from test_archive_hostile import HOSTILE

from server_support import KEY, Box, Server, eventually, tgz


@pytest.fixture(scope="module")
def box(server: Server, engine: str) -> Iterator[Box]:
    """Its disk has the size that the archive for an overfull one was made for."""
    made = server.create(engine, diskSizeMb=256)
    yield made
    made.delete()


@pytest.mark.parametrize("kind", ["application/gzip", "application/x-gzip", "application/octet-stream"])
def test_content_types(box: Box, kind: str) -> None:
    assert box.upload(tgz({"typed.txt": kind.encode()}), "/workspace/typed", kind).status_code == 204
    assert box.output("cat typed/typed.txt") == kind


def test_other_content_types_are_refused(box: Box) -> None:
    assert box.upload(tgz({"x": b""}), kind="text/html").status_code in (400, 415)


@pytest.mark.every_engine
def test_round_trip(box: Box) -> None:
    files = {
        "empty": b"",
        "binary": bytes(range(256)) * 300,
        "deep/er/file": os.urandom(300_000),
        "spaces and ünïcode 文件": b"x",
        "-rf": b"dash",
        "n" * 200: b"long",
    }
    assert box.upload(tgz(files), "/workspace/trip").status_code == 204
    found = {name.removeprefix("./"): content for name, content in box.fetch("/workspace/trip").items()}
    assert {name: content for name, content in found.items() if content is not None} == files
    assert box.output("find trip ! -user 1000 -o ! -group 1000") == ""


def test_one_file_can_be_downloaded(box: Box) -> None:
    box.output("mkdir -p one; echo content > one/file.txt")
    assert list(box.fetch("/workspace/one/file.txt").values()) == [b"content\n"]
    assert list(box.fetch("/home/user/one/file.txt").values()) == [b"content\n"]


def test_downloads_are_announced_as_gzip(box: Box) -> None:
    answer = box.download("/workspace")
    assert answer.headers["content-type"] == "application/gzip"
    assert answer.content[:2] == b"\x1f\x8b"


def test_existing_files_of_other_names_stay(box: Box) -> None:
    box.upload(tgz({"a": b"1", "b": b"1"}), "/workspace/stay")
    assert box.upload(tgz({"b": b"2", "c": b"2"}), "/workspace/stay").status_code == 204
    assert box.output("cd stay && cat a b c") == "122"


def test_setuid_bits_are_dropped_and_executables_stay_so(box: Box) -> None:
    box.upload(tgz({"tool": b"#!/bin/sh\necho ran\n"}, 0o6755), "/workspace/bits")
    assert box.output("stat -c %a bits/tool; bits/tool") == "755\nran\n"


def test_missing_and_outside(box: Box) -> None:
    missing = box.download("/workspace/nothing/here")
    assert (missing.status_code, missing.json()["code"]) == (404, "path_not_found")
    for outside in ("/etc/passwd", "/", "/workspace/../etc/passwd", "/proc/self/environ"):
        refused = box.download(outside)
        assert (refused.status_code, refused.json()["code"]) == (400, "path_outside_workspace"), outside
    no_path = box.server.http.get(f"{box.path}/files/download")
    assert no_path.status_code == 400
    assert box.server.http.post(f"{box.path}/files/upload", content=tgz({"x": b""})).status_code == 400


@pytest.mark.every_engine
def test_through_links_that_leave_the_workspace(box: Box) -> None:
    box.output(
        "mkdir -p links/real; ln -sfn /tmp links/out; ln -sfn / links/root; ln -sfn real links/in; echo x > /tmp/x"
    )
    for dest in ("links/out", "links/out/sub", "links/root", "links/root/workspace", "links/root/workspace/links"):
        assert box.upload(tgz({"planted": b"x"}), f"/workspace/{dest}").status_code == 400, dest
    assert box.upload(tgz({"planted": b"x"}), "/workspace/links/in").status_code == 204
    assert (
        box.output("find / -name planted -not -path '/proc/*' 2>/dev/null || true") == "/workspace/links/real/planted\n"
    )
    assert box.exec("ls /tmp/sub")["exitCode"] != 0
    assert box.download("/workspace/links/out/x").status_code in (400, 404)
    assert box.download("/workspace/links/root/etc/passwd").status_code in (400, 404)
    answer = box.upload(tgz({"out/planted": b"x"}), "/workspace/links")
    assert answer.status_code in (204, 400, 409)
    assert box.exec("ls /tmp/planted")["exitCode"] != 0


def test_links_in_a_download_stay_links(box: Box) -> None:
    box.output("mkdir -p tree; ln -sfn /etc/passwd tree/link; echo x > tree/file")
    with tarfile.open(fileobj=io.BytesIO(box.download("/workspace/tree").content), mode="r:gz") as tar:
        kinds = {member.name.removeprefix("./"): member for member in tar}
    assert "link" not in kinds or kinds["link"].issym()
    assert kinds["file"].isfile()


def test_odd_files_in_a_download(box: Box) -> None:
    box.output(
        "mkdir -p odd; mkfifo odd/fifo; touch odd/file odd/secret; chmod 0 odd/secret; truncate -s 5M odd/sparse"
    )
    refused = box.download("/workspace/odd")
    assert (refused.status_code, refused.json()["code"]) == (400, "path_unreadable")
    box.output("chmod 600 odd/secret")
    found = {name.removeprefix("./"): content for name, content in box.fetch("/workspace/odd").items()}
    assert found["file"] == b"" and found["sparse"] == bytes(5 << 20)
    assert found.get("fifo") is None


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_write_nothing(box: Box, name: str) -> None:
    reason, archive = HOSTILE[name]
    answer = box.upload(archive, "/workspace/hostile/sub")
    assert answer.status_code == 400, answer.text
    assert answer.json()["code"] == "archive_invalid" and answer.json()["details"]["reason"] == reason
    assert len(answer.json()["message"]) > 10


def test_there_were_many_and_nothing_is_there(box: Box) -> None:
    assert len(HOSTILE) >= 45
    assert box.output("ls -A hostile /workspace/../evil /tmp/evil 2>/dev/null || true") == ""


def test_a_bomb(box: Box) -> None:
    answer = box.upload(gzip.compress(gzip_free_tar(200 << 20), 6), "/workspace/bomb")
    assert answer.status_code == 400, answer.text
    assert box.exec("ls bomb")["exitCode"] != 0


def gzip_free_tar(size: int) -> bytes:
    member = tarfile.TarInfo("zeros")
    member.size = size
    return member.tobuf() + bytes(size) + bytes(1024)


def test_an_upload_that_breaks_off_writes_nothing(box: Box) -> None:
    whole = tgz({"partial": os.urandom(1 << 20)})

    def half() -> object:
        yield whole[: len(whole) // 2]
        raise ConnectionError("the client is gone")

    with pytest.raises((ConnectionError, httpx.HTTPError)):
        box.upload(half(), "/workspace/broken")
    assert box.exec("ls broken/partial")["exitCode"] != 0


def last_upload(box: Box) -> dict[str, Any]:
    entries = box.server.http.get(f"{box.path}/exec-logs", params={"type": "upload", "limit": 1}).json()["entries"]
    assert entries, "an upload was logged"
    return dict(entries[0])


def test_the_log_knows_how_much_of_a_refused_archive_came(box: Box) -> None:
    archive = b"no archive at all" * 100
    assert box.upload(archive).status_code == 400
    entry = last_upload(box)
    assert (entry["input"], entry["bytesIn"], entry["error"]) == ("/workspace", len(archive), "archive_invalid")


def test_an_upload_whose_client_goes_away_is_cancelled(box: Box) -> None:
    host, port = box.server.url.removeprefix("http://").split(":")
    archive = tgz({"half": os.urandom(100_000)})
    head = {**KEY, "host": host, "content-type": "application/gzip", "content-length": str(len(archive))}
    lines = [f"POST {box.path}/files/upload?dest=%2Fworkspace%2Fgone HTTP/1.1", *(f"{k}: {v}" for k, v in head.items())]
    with socket.create_connection((host, int(port)), timeout=box.scale(10)) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + archive[:50_000])
        eventually(lambda: last_upload(box)["input"] == "/workspace/gone", box.scale(10), "the upload began")
    eventually(lambda: last_upload(box)["finishedAt"], box.scale(10), "the upload ended")
    entry = last_upload(box)
    # The server may not have taken all of it from the socket by then.
    assert entry["error"] == "cancelled" and len("/workspace/gone") < entry["bytesIn"] <= 50_000, entry
    assert box.exec("test -e gone")["exitCode"] == 1
