"""What the guest image is made of: data only, no action.

`recipe_hash` names an image. It covers the values below, the pinned runtimes and the source of every build step, so
that a changed recipe never meets an image that an older one built.
"""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from pathlib import Path

from rundatsheesh.manager.model import GUEST_UID, WORKSPACE

HERE = Path(__file__).parent
RUNTIME_REQUIREMENTS = HERE / "guest-requirements.txt"

# Every file whose change makes another image. A new build step adds its source here.
RECIPE_SOURCES = (
    "recipe.py",
    "files.py",
    "tree.py",
    "runtimes.py",
    "kernel.py",
    "initrd.py",
    "guest-requirements.txt",
)

# The time stamp of every file in an image, seconds since the epoch: 2025-01-01. Any constant would do but 0, which zip
# and some build tools refuse.
SOURCE_DATE_EPOCH = 1_735_689_600

GUEST_PATH = f"/usr/local/bin:/usr/bin:/bin:{WORKSPACE}/.local/bin:{WORKSPACE}/.npm-global/bin"


@dataclass(frozen=True, slots=True)
class Recipe:
    suite: str  # Debian release
    packages: tuple[str, ...]  # besides Debian's minimal base
    excluded: tuple[str, ...]  # paths that no package may unpack, dpkg's glob patterns
    kept: tuple[str, ...]  # exceptions from `excluded`


RECIPE = Recipe(
    suite="trixie",
    packages=(
        "bash",
        "bzip2",
        "ca-certificates",
        "coreutils",
        "curl",
        "git",
        "gzip",
        "iproute2",
        "jq",
        "less",
        "libstdc++6",  # node links it
        "make",
        "patch",
        "procps",
        "python3",
        "python3-pip",
        "python3-venv",
        "ripgrep",
        "tar",
        "unzip",
        "xz-utils",
        "zip",
    ),
    excluded=(
        "/usr/share/doc/*",
        "/usr/share/info/*",
        "/usr/share/locale/*",
        "/usr/share/man/*",
        "/usr/share/lintian/*",
        "/usr/share/bug/*",
    ),
    kept=("/usr/share/doc/*/copyright",),
)

PROFILE = f"""\
# Login shells start for every command, so nothing here forks. A PATH that the caller chose is kept; those that bash,
# Debian's login and its /etc/profile give to whoever chose none are not.
#
# A shell that was started ahead of its command (agent/ahead_bash.py) says so, waits here for its directory, says that
# it goes on, and finds its command where its argument was. From then on it is as if it had been started just now.
case "${{BASH_EXECUTION_STRING-}}" in ": a shell that waits for its command "*)
  if printf w >&3; then
    read -r -u 3 || exit
    [ -z "$REPLY" ] || cd -P -- "$REPLY" || exit
    printf g >&3
    exec 3>&-
    mapfile -d "" -t REPLY < /proc/self/cmdline
    BASH_EXECUTION_STRING=${{REPLY[2]}} SECONDS=0
    unset REPLY OLDPWD
    export OLDPWD
  fi 2>/dev/null
  ;;
esac
case "${{PATH-}}" in
  "" | *:/usr/sbin:/bin:/sbin | *:/usr/sbin:/bin:/sbin:. | *:/usr/sbin:/usr/bin:/sbin:/bin | \\
  /usr/local/bin:/usr/bin:/bin | /usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games)
    PATH={GUEST_PATH}
    ;;
esac
export PATH
umask 022
if [ "${{PS1-}}" ]; then
  PS1='\\u@\\h:\\w\\$ '
fi
"""

# Written over what the packages left. Files that every VM gets its own version of are empty here: they are what an
# engine binds over.
FILES: dict[str, str] = {
    "etc/profile": PROFILE,
    "etc/resolv.conf": "",
    "etc/hostname": "",
    "etc/hosts": "127.0.0.1 localhost\n",
    "etc/machine-id": "",
    "etc/default/locale": "LANG=C.UTF-8\n",
    "etc/gitconfig": "[init]\n\tdefaultBranch = main\n",
    # npm install -g works without privilege, and npm asks nobody about newer versions of itself.
    "usr/local/etc/npmrc": f"prefix={WORKSPACE}/.npm-global\nupdate-notifier=false\nfund=false\n",
}

# Mount points and directories that must exist: path → mode.
DIRECTORIES: dict[str, int] = {
    "dev": 0o755,
    "proc": 0o555,
    "sys": 0o555,
    "run": 0o755,
    "run/agent": 0o700,
    "opt/rds": 0o755,
    "tmp": 0o1777,
    "var/tmp": 0o1777,
    "workspace": 0o755,
    "home": 0o755,
}

GUEST_USER = "user"
PASSWD_LINE = f"{GUEST_USER}:x:{GUEST_UID}:{GUEST_UID}::{WORKSPACE}:/bin/bash"
GROUP_LINE = f"{GUEST_USER}:x:{GUEST_UID}:"

# Left by the packages, different in each build or of no use in a guest that installs nothing: shell globs.
REMOVED = (
    "boot/*",
    "dev/*",
    "etc/*-",
    "etc/.pwd.lock",
    "etc/apt/apt.conf.d/99mmdebstrap",
    "etc/dpkg/dpkg.cfg.d/99mmdebstrap",
    "etc/ssh",
    "media",
    "mnt",
    "proc/*",
    "root/.*",
    "run/*",
    "srv",
    "sys/*",
    "tmp/*",
    "var/cache/*",
    "var/lib/apt/*",
    "var/lib/dpkg/*-old",
    "var/lib/dpkg/triggers/Lock",
    "var/lib/dpkg/lock*",
    "var/log/*",
    "var/tmp/*",
)


def guest_architecture() -> str:
    """Machine name of the host, and so of its guests: x86_64 or aarch64."""
    return platform.machine()


def recipe_hash() -> str:
    """16 hex digits; the same for the same sources on the same architecture, whatever the host."""
    digest = hashlib.sha256(guest_architecture().encode())
    for name in RECIPE_SOURCES:
        content = (HERE / name).read_bytes()
        digest.update(f"\n{name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:16]
