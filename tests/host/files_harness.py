"""Runs the agent's file transfers as uid 1000 in a workspace of this host."""

from __future__ import annotations

import asyncio
import io
import os
import pickle
import subprocess
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rundatsheesh.agent import files, paths
from rundatsheesh.agent.job import CallFailed
from rundatsheesh.manager.disk.archive import CheckedUpload, UploadLimits, check_upload

USER = 1000
LIMITS = UploadLimits(compressed=1 << 30, content=1 << 40)


class Workspace:
    def __init__(self, path: Path) -> None:
        self.path = path

    def upload(self, archive: bytes, dest: str = "/workspace") -> None:
        """The whole way of an upload but for the wire: the host's check, the canonical stream, the guest's end."""
        asyncio.run(self._upload(archive, dest))

    def upload_stream(self, params: dict[str, Any], stream: bytes) -> None:
        _as_user(files.upload, params, stream)

    def download(self, path: str = "/workspace") -> bytes:
        return _as_user(files.download, {"path": path}, None)

    async def _upload(self, archive: bytes, dest: str) -> None:
        async def body() -> AsyncIterator[bytes]:
            yield archive

        checked: CheckedUpload = await check_upload(body(), io.BytesIO(), LIMITS)
        stream = b"".join([chunk async for chunk in checked.canonical_chunks()])
        manifest = checked.manifest
        params = {"dest": dest, "entries": manifest.entries, "table_bytes": manifest.table_bytes}
        self.upload_stream(params | {"content_bytes": manifest.content_bytes}, stream)


def tree(root: Path) -> dict[str, tuple[str, int]]:
    """Everything below: relative name → what it is (with a file's content), and its permission bits."""
    found = {}
    for path in root.rglob("*"):
        mode = path.lstat().st_mode & 0o7777
        if path.is_symlink():
            what = f"-> {path.readlink()}"
        elif path.is_dir():
            what = "dir"
        else:
            what = path.read_bytes().decode("latin-1") if path.is_file() else "special"
        found[str(path.relative_to(root))] = (what, mode)
    return found


def _as_user(function: Callable[[dict[str, Any], int], None], params: dict[str, Any], stream: bytes | None) -> bytes:
    """Call `function` in a child with one end of a pipe; feed it `stream`, or return what it writes."""
    reading, writing = os.pipe()
    report_reading, report_writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        _child(function, params, (reading, writing) if stream is not None else (writing, reading), report_writing)
    os.close(report_writing)
    ours, theirs = (writing, reading) if stream is not None else (reading, writing)
    os.close(theirs)
    collected: list[bytes] = []
    work = (lambda: _feed(ours, stream)) if stream is not None else (lambda: _collect(ours, collected))
    thread = threading.Thread(target=work)
    thread.start()
    with open(report_reading, "rb") as report:
        outcome = report.read()
    thread.join()
    _, status = os.waitpid(pid, 0)
    if outcome:
        code, message = pickle.loads(outcome)
        raise CallFailed(code, message) if code else RuntimeError(message)
    assert status == 0
    return b"".join(collected)


def _child(function: Any, params: dict[str, Any], fds: tuple[int, int], report: int) -> None:
    status = 1
    try:
        os.close(fds[1])
        os.setgroups([])
        os.setresgid(USER, USER, USER)
        os.setresuid(USER, USER, USER)
        os.chdir("/")
        os.umask(0o022)
        function(params, fds[0])
        status = 0
    except CallFailed as failed:
        os.write(report, pickle.dumps((failed.code, failed.message)))
    except BaseException as error:
        os.write(report, pickle.dumps(("", f"{type(error).__name__}: {error}")))
    finally:
        os._exit(status)


def _feed(fd: int, stream: bytes) -> None:
    with open(fd, "wb", buffering=0) as pipe:
        view = memoryview(stream)
        while view:
            try:
                view = view[pipe.write(view) :]
            except BrokenPipeError:
                return


def _collect(fd: int, into: list[bytes]) -> None:
    with open(fd, "rb", buffering=0) as pipe:
        while piece := pipe.read(1 << 20):
            into.append(piece)


@pytest.fixture
def workspace(monkeypatch: pytest.MonkeyPatch) -> Iterator[Workspace]:
    top = Path(tempfile.mkdtemp(prefix="rds-files-"))  # not tmp_path, which other users cannot enter
    top.chmod(0o755)
    path = top / "workspace"
    path.mkdir()
    os.chown(path, USER, USER)
    monkeypatch.setattr(paths, "WORKSPACE", str(path))
    monkeypatch.setattr(files, "WORKSPACE", str(path))
    monkeypatch.setattr(paths, "canonical", _with_place(str(path), paths.canonical))
    monkeypatch.setattr(files, "canonical", _with_place(str(path), paths.canonical))
    try:
        yield Workspace(path)
    finally:
        subprocess.run(["rm", "-rf", top], check=True)  # of any depth


def _with_place(place: str, canonical: Callable[[str], str]) -> Callable[[str], str]:
    """/workspace of a call is the temporary one."""

    def translated(path: str) -> str:
        name = canonical(path)
        return place + name[len("/workspace") :] if name == "/workspace" or name.startswith("/workspace/") else name

    return translated
