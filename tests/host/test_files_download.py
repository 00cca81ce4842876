"""The tar that a download gives, read by tar programs and by our own upload."""

from __future__ import annotations

import gzip
import io
import os
import socket
import subprocess
import tarfile
import threading
from pathlib import Path

import pytest
from files_harness import USER, Workspace, tree, workspace

from rundatsheesh.agent.job import CallFailed

__all__ = ["workspace"]


def own(path: Path) -> None:
    for each in [path, *path.rglob("*")]:
        os.chown(each, USER, USER, follow_symlinks=False)


def fill(root: Path) -> None:
    (root / "a/b").mkdir(parents=True)
    (root / "empty").mkdir(mode=0o700)
    (root / "a/file").write_text("text")
    (root / "a/b/none").touch(mode=0o600)
    (root / "run").write_text("#!/bin/sh")
    (root / "run").chmod(0o4755)
    (root / "a/link").symlink_to("../run")
    (root / "out").symlink_to("/etc/passwd")
    (root / "long-link").symlink_to("t" * 300)
    (root / "hard").hardlink_to(root / "a/file")
    (root / ("n" * 255)).write_text("long")
    (root / "p").joinpath(*["q" * 60] * 4).mkdir(parents=True)
    (root / "p").joinpath(*["q" * 60] * 4, "f").write_text("deep")
    Path(os.fsdecode(os.fsencode(root) + b"/\xff\xfe latin\n")).write_text("bytes")
    (root / "big").write_bytes(os.urandom(3_000_001))
    (root / "holes").touch()
    os.truncate(root / "holes", 1_000_000)
    os.utime(root / "a/file", ns=(0, 1_500_000_000_000_000_000))


def test_gnu_tar_recreates_the_content(workspace: Workspace, tmp_path: Path) -> None:
    fill(workspace.path)
    (workspace.path / "run").chmod(0o755)
    own(workspace.path)
    (tmp_path / "out").mkdir()
    subprocess.run(["tar", "-xf", "-", "-C", tmp_path / "out"], input=workspace.download(), check=True)
    assert tree(tmp_path / "out") == tree(workspace.path)
    assert (tmp_path / "out/a/file").stat().st_mtime == 1_500_000_000


def test_names_kinds_and_bits(workspace: Workspace) -> None:
    fill(workspace.path)
    own(workspace.path)
    (workspace.path / "run").chmod(0o4755)
    os.mkfifo(workspace.path / "fifo")
    (sock := socket.socket(socket.AF_UNIX)).bind(str(workspace.path / "socket"))
    sock.close()
    archive = workspace.download("/home/user")
    assert len(archive) % 512 == 0 and archive.endswith(bytes(1024))
    with tarfile.open(fileobj=io.BytesIO(archive), errorlevel=2) as tar:
        members = {member.name: member for member in tar}
    assert all(name == "." or name.startswith("./") for name in members)
    assert not {"./fifo", "./socket"} & members.keys()
    assert members["./run"].mode == 0o755 and members["./a/link"].linkname == "../run"
    assert members["./long-link"].linkname == "t" * 300 and members["./hard"].isreg()
    assert all((member.uid, member.gid, member.uname) == (USER, USER, "") for member in members.values())


def test_download_of_an_upload_is_the_upload(workspace: Workspace) -> None:
    fill(workspace.path)
    for link in ("a/link", "out", "long-link"):
        (workspace.path / link).unlink()
    own(workspace.path)
    first = workspace.download()
    workspace.upload(gzip.compress(first, 1), "/workspace/copy")
    copied = tree(workspace.path / "copy")
    assert copied == {name: (what, mode & 0o777) for name, (what, mode) in tree(workspace.path).items()
                      if not name.startswith("copy")}  # fmt: skip


def test_one_file_and_other_places(workspace: Workspace) -> None:
    fill(workspace.path)
    (workspace.path / "by-name").symlink_to("a/file")
    (workspace.path / "by-dir").symlink_to("a")
    own(workspace.path)
    for path, names in {
        "/workspace/a/file": ["file"],
        "/home/user/a/file": ["file"],
        "/workspace/by-name": ["by-name"],
        "/workspace/" + "n" * 255: ["n" * 255],
        "/workspace/empty": ["."],
        "/workspace/a/b": [".", "./none"],
    }.items():
        with tarfile.open(fileobj=io.BytesIO(workspace.download(path))) as tar:
            assert tar.getnames() == names, path
    with tarfile.open(fileobj=io.BytesIO(workspace.download("/workspace/by-dir"))) as tar:
        assert set(tar.getnames()) == {".", "./file", "./link", "./b", "./b/none"}


def test_refusals(workspace: Workspace) -> None:
    fill(workspace.path)
    (workspace.path / "up").symlink_to("..")
    os.mkfifo(workspace.path / "fifo")
    own(workspace.path)
    for path, code in {
        "/workspace/missing": "path_not_found",
        "/workspace/a/missing/x": "path_not_found",
        "/etc/passwd": "path_outside_workspace",
        "/workspace/../etc": "path_outside_workspace",
        "/workspace/out": "path_outside_workspace",
        "/workspace/up": "path_outside_workspace",
        "/workspace/up/x": "path_outside_workspace",
        "/": "path_outside_workspace",
        "/workspace/fifo": "invalid_input",
        "/workspace/\0": "invalid_input",
    }.items():
        with pytest.raises(CallFailed) as caught:
            workspace.download(path)
        assert caught.value.code == code, path


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_the_user_cannot_read_is_told(workspace: Workspace, kind: str) -> None:
    (workspace.path / "dir").mkdir(mode=0o755)
    secret = workspace.path / "dir/secret"
    if kind == "file":
        secret.touch(mode=0o600)
    else:
        secret.mkdir(mode=0o700)
    for path in ("/workspace", "/workspace/dir/secret"):
        with pytest.raises(CallFailed) as caught:
            workspace.download(path)
        assert caught.value.code == "path_unreadable" and "secret" in caught.value.message


def test_deeper_than_a_path_may_be(workspace: Workspace) -> None:
    fd = os.open(workspace.path, os.O_RDONLY)
    for _ in range(50):
        os.mkdir("d" * 120, 0o755, dir_fd=fd)
        below = os.open("d" * 120, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    file = os.open("file", os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=fd)
    os.close(file)
    os.close(fd)
    with tarfile.open(fileobj=io.BytesIO(workspace.download())) as tar:
        assert max(len(name) for name in tar.getnames()) == len("./" + "d" * 120 * 50 + "/" * 50 + "file")


def test_a_tree_that_changes_meanwhile(workspace: Workspace) -> None:
    """Files grow, shrink, vanish and turn into other things: the archive stays sound."""
    root = workspace.path
    for number in range(60):
        (root / f"d{number}").mkdir()
        (root / f"d{number}/f").write_bytes(b"x" * 50_000)
    own(root)
    stop = threading.Event()

    def change() -> None:
        number = 0
        while not stop.is_set():
            number = (number + 7) % 60
            path = root / f"d{number}/f"
            os.truncate(path, number * 1000)
            (root / f"d{number}/g").write_bytes(b"y" * 10_000)
            (root / f"d{number}/g").unlink()
            (root / f"d{number}").rename(root / f"e{number}")
            (root / f"d{number}").symlink_to("/etc")
            (root / f"d{number}").unlink()
            (root / f"e{number}").rename(root / f"d{number}")

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(5):
            archive = workspace.download()
            with tarfile.open(fileobj=io.BytesIO(archive), errorlevel=2) as tar:
                for member in tar:
                    assert "passwd" not in member.name
                    if member.isreg():
                        content = tar.extractfile(member)
                        assert content is not None and len(content.read()) == member.size
            assert archive.endswith(bytes(1024))
    finally:
        stop.set()
        thread.join()
