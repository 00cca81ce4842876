"""Trees of files: walking, describing and comparing them, and making directories whatever the umask."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path


def make_directory(path: Path) -> None:
    """Make a directory and its missing parents, all 0755 whatever the umask; what exists stays as it is."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir()
        path.chmod(0o755)


def describe(root: Path) -> str:
    """One line per file, sorted: mode, owner, content and path; no times. Equal text means equal trees.

    Content is the SHA-256 of a file, the target of a link, the number of a device and `-` for a directory.
    """
    return "".join(_describe(path, path.relative_to(root)) for path in walk(root))


def walk(root: Path) -> Iterator[Path]:
    """Everything beneath `root` in a fixed order; links are named, not followed."""
    for directory, names, files in os.walk(root):
        names.sort()
        links = [name for name in names if (Path(directory) / name).is_symlink()]
        for name in sorted([*files, *names]):
            yield Path(directory) / name
        names[:] = [name for name in names if name not in links]


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_of(root: Path) -> int:
    """Bytes of all regular files; one with several names counts once."""
    sizes: dict[int, int] = {}
    for path in walk(root):
        facts = path.lstat()
        if stat.S_ISREG(facts.st_mode):
            sizes[facts.st_ino] = facts.st_size
    return sum(sizes.values())


def _describe(path: Path, name: Path) -> str:
    facts = path.lstat()
    if stat.S_ISREG(facts.st_mode):
        content = sha256_of(path)
    elif stat.S_ISLNK(facts.st_mode):
        content = f"->{str(path.readlink())!r}"
    elif stat.S_ISDIR(facts.st_mode):
        content = "-"
    else:
        content = f"device:{facts.st_rdev}"
    return f"{facts.st_mode:o} {facts.st_uid}:{facts.st_gid} {content} {str(name)!r}\n"
