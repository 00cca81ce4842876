"""What an upload leaves in the workspace, and that a refused one leaves nothing."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from files_harness import USER, Workspace, tree, workspace
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rundatsheesh.agent.job import CallFailed

__all__ = ["workspace"]


def tgz(**members: bytes | None) -> bytes:
    return packed({name: (0o644, content) for name, content in members.items()})


def packed(members: dict[str, tuple[int, bytes | None]], mtime: int = 1_600_000_000) -> bytes:
    """name → mode, content (None: a directory)."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz", compresslevel=1) as tar:
        for name, (mode, content) in members.items():
            info = tarfile.TarInfo(name)
            info.mode, info.size, info.mtime = mode, len(content or b""), mtime
            info.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
            tar.addfile(info, io.BytesIO(content or b""))
    return made.getvalue()


def refusal(workspace: Workspace, archive: bytes, dest: str = "/workspace") -> str:
    """The code; the workspace is as it was."""
    before = tree(workspace.path)
    with pytest.raises(CallFailed) as caught:
        workspace.upload(archive, dest)
    assert tree(workspace.path) == before
    return caught.value.code


def test_modes_times_and_owners(workspace: Workspace) -> None:
    members: dict[str, tuple[int, bytes | None]] = {
        "closed": (0o500, None),
        "closed/file": (0o400, b"in a directory that cannot be written"),
        "run.sh": (0o7755, b"#!/bin/sh\n"),
        "empty": (0o600, b""),
        "open": (0o777, None),
        "made/for/file": (0o666, b"x"),
    }
    workspace.upload(packed(members))
    assert tree(workspace.path) == {
        "closed": ("dir", 0o500),
        "closed/file": ("in a directory that cannot be written", 0o400),
        "run.sh": ("#!/bin/sh\n", 0o755),
        "empty": ("", 0o600),
        "open": ("dir", 0o777),
        "made": ("dir", 0o755),
        "made/for": ("dir", 0o755),
        "made/for/file": ("x", 0o666),
    }
    for path in workspace.path.rglob("*"):
        status = path.stat()
        assert (status.st_uid, status.st_gid) == (USER, USER)
        assert path.name in ("made", "for") or status.st_mtime == 1_600_000_000, path


@pytest.mark.parametrize(
    "dest", ["/workspace", "/workspace/", "/workspace/a/b/../c", "/home/user/project", "/home/user"]
)
def test_dest_is_made(workspace: Workspace, dest: str) -> None:
    workspace.upload(tgz(f=b"1"), dest)
    below = {"/workspace": "", "/workspace/": "", "/workspace/a/b/../c": "a/c", "/home/user/project": "project"}
    assert (workspace.path / below.get(dest, "") / "f").read_text() == "1"
    empty = packed({"./": (0o755, None)})
    workspace.upload(empty, "/workspace/only-this")
    assert (workspace.path / "only-this").is_dir()


def test_other_files_stay_and_files_are_replaced(workspace: Workspace) -> None:
    workspace.upload(packed({"d": (0o750, None), "d/keep": (0o640, b"keep"), "d/old": (0o600, b"old")}))
    with open(workspace.path / "d/old") as reader:
        workspace.upload(packed({"d": (0o777, None), "d/old": (0o644, b"new"), "d/more": (0o644, b"more")}))
        assert reader.read() == "old"  # who had it open keeps it
    assert tree(workspace.path) == {
        "d": ("dir", 0o750),
        "d/keep": ("keep", 0o640),
        "d/old": ("new", 0o644),
        "d/more": ("more", 0o644),
    }


def test_a_link_is_replaced_and_never_written_through(workspace: Workspace) -> None:
    outside = workspace.path.parent / "outside"
    outside.write_text("untouched")
    os.chown(outside, USER, USER)
    for name, target in {"out": "../outside", "in": "real", "dangling": "nowhere", "dir": "."}.items():
        (workspace.path / name).symlink_to(target)
    (workspace.path / "real").write_text("real")
    os.mkfifo(workspace.path / "fifo")
    workspace.upload(tgz(out=b"1", dangling=b"2", dir=b"3", fifo=b"4", **{"in": b"5"}))
    files = {name: what for name, (what, _) in tree(workspace.path).items()}
    assert files == {"out": "1", "dangling": "2", "dir": "3", "fifo": "4", "in": "5", "real": "real"}
    assert outside.read_text() == "untouched"


def test_directory_links_inside_are_followed_outside_refused(workspace: Workspace) -> None:
    (workspace.path / "real").mkdir(mode=0o755)
    os.chown(workspace.path / "real", USER, USER)
    (workspace.path / "inside").symlink_to("real")
    (workspace.path / "absolute").symlink_to(workspace.path / "real")
    workspace.upload(tgz(**{"inside/a": b"1", "absolute/b/c": b"2"}))
    workspace.upload(tgz(d=b"3"), "/workspace/inside/deeper")
    assert (workspace.path / "real/a").read_text() == "1" and (workspace.path / "real/b/c").read_text() == "2"
    assert (workspace.path / "real/deeper/d").read_text() == "3" and (workspace.path / "inside").is_symlink()

    outside = workspace.path.parent / "outside"
    outside.mkdir()
    os.chown(outside, USER, USER)
    for name, target in {"up": "..", "out": "../outside", "root": "/", "tmp": str(outside), "loop": "loop"}.items():
        (workspace.path / name).symlink_to(target)
    (workspace.path / "twice").symlink_to("inside/../up")
    for name in ("up", "out", "root", "tmp", "twice"):
        assert refusal(workspace, tgz(first=b"1", **{f"{name}/x": b"2"})) == "path_outside_workspace", name
        assert refusal(workspace, tgz(x=b"1"), f"/workspace/{name}") == "path_outside_workspace", name
        assert refusal(workspace, tgz(x=b"1"), f"/workspace/{name}/deeper") == "path_outside_workspace", name
    assert refusal(workspace, tgz(**{"loop/x": b"1"})) in ("path_conflict", "path_outside_workspace")
    assert not list(outside.iterdir())


@pytest.mark.parametrize(
    "dest",
    ["/", "/etc", "/tmp", "/workspacex", "/workspace/..", "/workspace/../etc", "/home", "/home/user/..", "..", "\0"],
)
def test_dest_outside(workspace: Workspace, dest: str) -> None:
    assert refusal(workspace, tgz(f=b"1"), dest) in ("path_outside_workspace", "invalid_input")


def test_conflicts_are_found_before_anything_is_written(workspace: Workspace) -> None:
    workspace.upload(tgz(file=b"1", **{"dir/x": b"2"}))
    (workspace.path / "dangling").symlink_to("nowhere")
    (workspace.path / "to-file").symlink_to("file")
    for members in ({"dir": b"x"}, {"file/below": b"x"}, {"dangling/x": b"x"}, {"to-file/x": b"x"}, {"file/a/b": b"x"}):
        assert refusal(workspace, tgz(a_first=b"1", **members)) == "path_conflict", members
    assert refusal(workspace, packed({"a": (0o644, b"1"), "file": (0o755, None)})) == "path_conflict"
    for dest in ("file", "file/below", "to-file", "file/a/b/c"):
        assert refusal(workspace, tgz(x=b"1"), f"/workspace/{dest}") == "path_conflict", dest


def test_what_the_user_may_not_write(workspace: Workspace) -> None:
    (workspace.path / "of-root").mkdir(mode=0o755)
    assert refusal(workspace, tgz(**{"of-root/x": b"1"})) == "path_unwritable"
    assert refusal(workspace, tgz(**{"of-root/new/x": b"1"})) == "path_unwritable"
    assert refusal(workspace, tgz(x=b"1"), "/workspace/of-root/dest") == "path_unwritable"


@pytest.fixture
def small(workspace: Workspace) -> Iterator[Workspace]:
    options = f"size=1m,nr_inodes=20,uid={USER},gid={USER},mode=755"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", workspace.path], check=True)
    try:
        yield workspace
    finally:
        subprocess.run(["umount", workspace.path], check=True)


def test_too_large_for_the_workspace(small: Workspace) -> None:
    small.upload(tgz(old=b"x" * 500_000))
    assert refusal(small, tgz(a=b"1", b=os.urandom(600_000))) == "workspace_full"
    assert refusal(small, tgz(old=os.urandom(600_000))) == "workspace_full"  # the old one stays until the new is whole
    assert refusal(small, tgz(**{f"f{i}": b"" for i in range(30)})) == "workspace_full"
    small.upload(tgz(a=b"1", b=os.urandom(400_000)))


def test_a_stream_that_ends_early(workspace: Workspace) -> None:
    record = b"f\x01\xa4\x00\x04" + (100).to_bytes(8, "big") + bytes(8)
    params = {"dest": "/workspace", "entries": 1, "table_bytes": len(record) + 4, "content_bytes": 100}
    workspace.upload_stream(params, record + b"name" + b"x" * 100)
    for stream in (b"", record, record + b"name", record + b"name" + b"y" * 99):
        with pytest.raises(CallFailed) as caught:
            workspace.upload_stream(params, stream)
        assert caught.value.code == "upload_incomplete"
    assert tree(workspace.path) == {"name": ("x" * 100, 0o644)}  # never half a replacement, no temporary file


def test_deep_and_long_names(workspace: Workspace) -> None:
    deep = "d/" * 1200 + "file"
    workspace.upload(packed({deep: (0o644, b"deep"), "n" * 255: (0o644, b"long"), "e/" * 900 + "e": (0o700, None)}))
    assert (workspace.path / deep).read_text() == "deep" and (workspace.path / ("n" * 255)).read_text() == "long"
    with pytest.raises(CallFailed) as caught:
        workspace.upload(packed({"x": (0o644, b""), "d/" * 2040 + "file": (0o644, b"")}))
    assert caught.value.code == "path_too_long" and not (workspace.path / "x").exists()


def test_many_small_files(workspace: Workspace) -> None:
    members: dict[str, tuple[int, bytes | None]] = {f"d{i % 40}/f{i}": (0o644, b"%d" % i) for i in range(2000)}
    workspace.upload(packed(members), "/workspace/many")
    assert sum(1 for path in workspace.path.rglob("f*") if path.is_file()) == 2000
    assert (workspace.path / "many/d39/f1999").read_text() == "1999"


parts = st.binary(min_size=1, max_size=40).filter(lambda b: not set(b) & set(b"/\0") and b not in (b".", b".."))
names = st.lists(parts, min_size=1, max_size=5).map(lambda split: os.fsdecode(b"/".join(split)))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(names, st.tuples(st.sampled_from([0o400, 0o644, 0o755]), st.binary(max_size=2000)), max_size=6),
       st.integers(0, 1 << 30))  # fmt: skip
def test_both_ends_agree(workspace: Workspace, members: dict[str, tuple[int, bytes]], number: int) -> None:
    """Whatever names and contents there are: what the host's end sends is what the guest's end writes."""
    if any(other.startswith(name + "/") for name in members for other in members):
        return
    dest = f"run-{number}-{len(list(workspace.path.iterdir()))}"
    workspace.upload(packed(dict(members.items())), f"/workspace/{dest}")
    found = {}
    for top, _, files in os.walk(os.fsencode(workspace.path / dest)):
        for name in files:
            path = Path(os.fsdecode(top), os.fsdecode(name))
            found[str(path.relative_to(workspace.path / dest))] = (path.stat().st_mode & 0o7777, path.read_bytes())
    assert found == members
