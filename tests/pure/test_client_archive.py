"""Packing and unpacking of what goes into a VM and comes out of it."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rundatsheesh.client.archive import pack, unpack
from rundatsheesh.client.errors import ArchiveError

NAMES = st.text(st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]), min_size=1, max_size=60).filter(
    lambda name: name not in (".", "..") and len(name.encode()) <= 200
)
TREES = st.dictionaries(st.lists(NAMES, min_size=1, max_size=3).map(tuple), st.binary(max_size=2000), max_size=6)


def tar_of(*members: tuple[tarfile.TarInfo, bytes]) -> io.BytesIO:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    out.seek(0)
    return out


def entry(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", mode: int = 0o644) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, target, mode
    return info


@settings(max_examples=60, deadline=None)
@given(tree=TREES)
def test_what_is_packed_comes_out_again(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[tuple[str, ...], bytes]
) -> None:
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    written: dict[str, bytes] = {}
    for parts, content in tree.items():
        path = source.joinpath(*parts)
        if any(source.joinpath(*parts[:i]).is_file() for i in range(1, len(parts))) or path.is_dir():
            continue  # a file where another name needs a directory
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        written[str(path.relative_to(source))] = content
    unpacked = unpack(io.BytesIO(b"".join(pack(source))), target)
    assert {str(p.relative_to(target)): p.read_bytes() for p in target.rglob("*") if p.is_file()} == written
    assert unpacked.files == len(written) and unpacked.skipped == ()


def test_one_file_is_packed_under_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "script.sh").write_text("x")
    (tmp_path / "script.sh").chmod(0o755)
    unpack(io.BytesIO(b"".join(pack(tmp_path / "script.sh"))), tmp_path / "out")
    assert os.access(tmp_path / "out/script.sh", os.X_OK)


def test_packing_takes_constant_memory(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(64 << 20)
    assert max(len(chunk) for chunk in pack(tmp_path)) < 1 << 20


def test_links_are_not_uploaded(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("elsewhere")
    with pytest.raises(ArchiveError, match="link"):
        list(pack(tmp_path))


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x"])
def test_names_outside_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArchiveError, match="outside"):
        unpack(tar_of((entry(name), b"")), tmp_path / "out")
    assert list(tmp_path.rglob("x")) == []


@pytest.mark.parametrize("target", ["/etc/passwd", "..", "../..", "a/../..", "sub/../../../x", "sub/.."])
def test_links_that_may_leave_are_skipped(tmp_path: Path, target: str) -> None:
    unpacked = unpack(tar_of((entry("link", tarfile.SYMTYPE, target), b"")), tmp_path / "out")
    assert unpacked.skipped == ("link",) and not (tmp_path / "out/link").is_symlink()


def test_links_that_stay_are_made(tmp_path: Path) -> None:
    members = [(entry("bin/tool", tarfile.SYMTYPE, "../pkg/tool.js"), b""), (entry("pkg/tool.js"), b"js")]
    unpacked = unpack(tar_of(*members), tmp_path)
    assert unpacked.skipped == () and (tmp_path / "bin/tool").read_text() == "js"


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    """Neither one of the archive, nor one that lies in the target."""
    outside = tmp_path / "outside"
    outside.mkdir()
    target = tmp_path / "out"
    target.mkdir()
    (target / "d").symlink_to(outside)
    (target / "f").symlink_to(outside / "f")
    with pytest.raises(ArchiveError, match="in the way"):
        unpack(tar_of((entry("d/x"), b"x")), target)
    unpack(tar_of((entry("f"), b"new")), target)
    assert list(outside.iterdir()) == [] and (target / "f").read_text() == "new"
    with pytest.raises(ArchiveError):
        unpack(tar_of((entry("e", tarfile.SYMTYPE, "d"), b""), (entry("e/x"), b"x"), (entry("e"), b"")), target)


def test_hard_links_only_within_the_archive(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    target = tmp_path / "out"
    members = [
        (entry("one"), b"1"),
        (entry("two", tarfile.LNKTYPE, "one"), b""),
        (entry("bad", tarfile.LNKTYPE, "../secret"), b""),
        (entry("worse", tarfile.LNKTYPE, str(tmp_path / "secret")), b""),
        (entry("missing", tarfile.LNKTYPE, "none"), b""),
    ]
    unpacked = unpack(tar_of(*members), target)
    assert (target / "two").read_text() == "1"
    assert unpacked.skipped == ("bad", "worse", "missing")


def test_devices_are_skipped_and_modes_are_tamed(tmp_path: Path) -> None:
    members = [(entry("null", tarfile.CHRTYPE), b""), (entry("fifo", tarfile.FIFOTYPE), b"")]
    unpacked = unpack(tar_of(*members, (entry("suid", mode=0o6777), b"")), tmp_path)
    assert unpacked.skipped == ("null", "fifo")
    assert (tmp_path / "suid").stat().st_mode & 0o7777 == 0o755


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"not a gzip", lambda data: b""])
def test_damage_is_told(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    data = tar_of((entry("x"), os.urandom(20000))).getvalue()
    with pytest.raises(ArchiveError, match="damaged"):
        unpack(io.BytesIO(damage(data)), tmp_path)


def test_a_bomb_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="more than it may"):
        unpack(tar_of((entry("zeros"), bytes(2 << 20))), tmp_path, max_bytes=1 << 20)
