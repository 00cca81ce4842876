"""The guest image that set-up built on this host: what the contract says about the inside of a VM."""

from __future__ import annotations

import stat
import subprocess
from pathlib import Path

import pytest

from rundatsheesh.manager.build import files, image
from rundatsheesh.manager.build.image import Image
from rundatsheesh.manager.build.recipe import DIRECTORIES, FILES, GUEST_PATH
from rundatsheesh.manager.settings import Settings

ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/workspace", "USER": "user"}


@pytest.fixture(scope="module")
def built() -> Image:
    found = image.find_image(Settings().image_cache)
    assert found is not None, "no guest image of this recipe: run `make setup`"
    return found


def as_user(built: Image, command: str, *, path: str | None = None) -> str:
    """Run a login shell of the image as its user, in a mount namespace of its own with just /dev, /proc and tmpfs."""
    script = (
        'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0"; cd "$0" && mount -t tmpfs none workspace'
        " && chown 1000:1000 workspace && mount -t tmpfs none tmp && mount -t proc none proc"
        " && mount -t tmpfs none dev && mknod -m 666 dev/null c 1 3 && mknod -m 666 dev/urandom c 1 9"
        ' && exec chroot --userspec=1000:1000 --groups= "$0" /usr/bin/env "$2" /bin/bash -lc "cd; $1"'
    )
    chosen = f"PATH={path}" if path else "-uPATH"
    argv = ["unshare", "--mount", "--pid", "--fork", "--net", "sh", "-euc", script, str(built.root), command, chosen]
    done = subprocess.run(argv, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "program",
    [
        "bash --version",
        "git --version",
        "curl --version",
        "tar --version",
        "gzip --version",
        "python3 --version",
        "node --version",
        "npm --version",
        "npx --version",
        "deno --version",
        "ps",
        "ip -V",
        "jq --version",
        "rg --version",
        "python3 -m pip --version",
    ],
)
def test_programs_run_as_the_user(built: Image, program: str) -> None:
    assert as_user(built, program)


def test_the_user_and_its_home(built: Image) -> None:
    told = as_user(built, "id -u; id -g; id -un; pwd; umask; cd /home/user; pwd -P; getent passwd user")
    assert told.splitlines() == [
        *("1000", "1000", "user", "/workspace", "0022", "/workspace"),
        "user:x:1000:1000::/workspace:/bin/bash",
    ]


def test_login_shells_know_where_users_install(built: Image) -> None:
    told = as_user(built, "echo $PATH").split(":")
    assert told == GUEST_PATH.split(":")
    assert as_user(built, "echo $PATH", path="/usr/local/bin:/usr/bin:/bin").split(":") == told
    assert as_user(built, "echo $PATH", path="/mine:/usr/bin:/bin") == "/mine:/usr/bin:/bin"


def test_programs_find_their_locale_in_one_file(built: Image) -> None:
    assert (built.root / "usr/lib/locale/locale-archive").stat().st_mode & 0o777 == 0o644
    assert as_user(built, "localedef --list-archive; LC_ALL=C.UTF-8 bash -c 'x=ü; echo ${#x}'") == "C.utf8\n1"


def test_npm_installs_globally_into_the_workspace(built: Image) -> None:
    assert as_user(built, "npm prefix --global") == "/workspace/.npm-global"


def test_python_makes_environments_with_pip(built: Image) -> None:
    assert as_user(built, "python3 -m venv e && e/bin/pip --version").startswith("pip ")


def test_certificates_are_there(built: Image) -> None:
    code = "import ssl; print(len(ssl.create_default_context().get_ca_certs()))"
    assert int(as_user(built, f"python3 -c '{code}'")) > 50


def test_no_program_raises_privileges(built: Image) -> None:
    for path in files.walk(built.root):
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            continue
        assert not mode & (stat.S_ISUID | stat.S_ISGID), path
        assert not stat.S_ISBLK(mode) and not stat.S_ISCHR(mode), path


def test_nothing_is_writable_by_all_but_the_temporary_directories(built: Image) -> None:
    open_to_all = {
        str(path.relative_to(built.root))
        for path in files.walk(built.root)
        if path.lstat().st_mode & stat.S_IWOTH and not path.is_symlink()
    }
    assert open_to_all == {"tmp", "var/tmp"}


def test_mount_points_and_files_of_the_recipe(built: Image) -> None:
    for name, mode in DIRECTORIES.items():
        assert stat.S_IMODE((built.root / name).stat().st_mode) == mode, name
    for name, text in FILES.items():
        assert (built.root / name).read_text() == text and not (built.root / name).is_symlink()
    assert (built.root / "workspace").stat().st_uid == 1000
    assert (built.root / "home/user").readlink() == Path("/workspace")


def test_no_trace_of_the_host_that_built_it(built: Image) -> None:
    contents = (built.directory / "contents.txt").read_text()
    assert not [word for word in ("var/lib/apt/lists", "etc/ssh", "dpkg.cfg.d/99", "apt.conf.d/99") if word in contents]


def test_python_is_compiled_for_good(built: Image) -> None:
    """Byte code that is never compared with its source: flags 1 in the header, see PEP 552."""
    libraries = [path for path in (built.root / "usr/lib").glob("python3.*") if path.is_dir()]
    compiled = [path for library in libraries for path in library.glob("__pycache__/*.pyc")]
    assert len(compiled) > 100
    assert {path.read_bytes()[4:8] for path in compiled} == {b"\x01\0\0\0"}


def test_it_is_as_it_was_built(built: Image) -> None:
    assert image.changed_files(built) == []


def test_the_manifest_says_what_is_inside(built: Image) -> None:
    manifest = built.manifest
    assert {"python3", "git", "curl", "bash"} <= set(manifest.packages)
    assert len(manifest.wheels) == 2
    assert manifest.size_bytes < 600 << 20
