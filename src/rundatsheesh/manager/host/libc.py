"""The C library, for the system calls that Python 3.11 has no function for."""

from __future__ import annotations

import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: object) -> None:
    """Raise OSError, naming `what`, where the result of a call says that it failed."""
    if result < 0:
        raise failure(what)


def failure(what: object) -> OSError:
    """The error that this thread's last call ended with, naming `what`."""
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), str(what))
