"""Which paths of the guest a caller may name."""

from __future__ import annotations

import errno
import os

from .job import CallFailed

WORKSPACE = "/workspace"
ALIAS = "/home/user"  # the same directory under its other name
# What the kernel says of a path that was changed between two looks at it.
CHANGED = (errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.ELOOP, errno.ENOTEMPTY, errno.EEXIST, errno.EINVAL)


def canonical(path: str) -> str:
    """The path under its first name; does not look at the file system."""
    if "\0" in path:
        raise CallFailed("invalid_input", "a path contains a NUL character")
    if path == ALIAS or path.startswith(ALIAS + "/"):
        return WORKSPACE + path[len(ALIAS) :]
    return path


def inside_workspace(path: str) -> str:
    """The real path of an existing file or directory; CallFailed path_outside_workspace or path_not_found.

    A relative path is taken from the workspace. Where the path leaves the workspace it is outside, whether it exists
    there or not, so that the answer tells nothing about the rest of the file system.
    """
    root = os.path.realpath(WORKSPACE)
    try:
        real = os.path.realpath(os.path.join(root, canonical(path)))
    except OSError:  # a link was exchanged between two looks at it
        raise CallFailed("path_not_found", f"{path} was changed while it was looked for") from None
    if real != root and not real.startswith(root + "/"):
        raise CallFailed("path_outside_workspace", f"{path} is outside {WORKSPACE}")
    if not os.path.lexists(real):
        raise CallFailed("path_not_found", f"{path} does not exist")
    return real


def directory_inside_workspace(path: str) -> str:
    """As inside_workspace, for a directory to work in."""
    if canonical(path) == WORKSPACE:
        return WORKSPACE  # a mount, which nobody in here can move
    real = inside_workspace(path)
    if not os.path.isdir(real):
        raise CallFailed("path_not_found", f"{path} is not a directory")
    return real
