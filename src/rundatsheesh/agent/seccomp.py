"""What no process of the user's may ask of an application kernel.

Whoever makes a user namespace has every capability in it, and gVisor has no setting against that (Linux has
user.max_user_namespaces, see build/initrd.py); it also lets everybody make device nodes in its own file systems. So a
filter refuses both, which all descendants inherit and nobody can take off: seccomp(2).
"""

from __future__ import annotations

import errno
import os
import stat
from struct import pack

from . import libc

PR_SET_SECCOMP = 22
MODE_FILTER = 2
ALLOW = 0x7FFF0000
ERRNO = 0x00050000  # and the number

# All of clone(2)'s and unshare(2)'s CLONE_NEW*, and the one that unshare alone knows.
NAMESPACES = 0x7E020000
NEWTIME = 0x80
X32 = 0x40000000  # in the number of a call: another architecture's

# Of <linux/audit.h>, with the numbers of unshare, setns, clone, clone3, mknodat and, where there is one, mknod.
CALLS = {
    "x86_64": (0xC000003E, 272, 308, 56, 435, 259, 133),
    "aarch64": (0xC00000B7, 97, 268, 220, 435, 33, None),
}

# struct seccomp_data: where it has the number, the architecture, and the lower half of an argument.
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
# <linux/bpf_common.h>
_LOAD, _EQUAL, _GREATER_OR_EQUAL, _ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06


def forbid_privileges() -> None:
    """For this process, which must not be able to gain privileges by execution, and all that it starts from now on.
    Raises OSError where the kernel does not know filters, or the machine is of an unknown architecture."""
    calls = CALLS.get(os.uname().machine)
    if calls is None:
        raise OSError(f"no filter of system calls for {os.uname().machine}")
    program = libc.Buffer(b"".join(_filter(*calls)))
    if libc.call("prctl", PR_SET_SECCOMP, MODE_FILTER, pack("HP", program.size // 8, program.address), 0, 0) != 0:
        raise OSError("the filter of system calls was refused")


def _filter(
    architecture: int, unshare: int, setns: int, clone: int, clone3: int, mknodat: int, mknod: int | None
) -> list[bytes]:
    return [
        _step(_LOAD, _ARCHITECTURE),
        *_unless(_EQUAL, architecture, errno.ENOSYS),
        _step(_LOAD, _NUMBER),
        *_where(_GREATER_OR_EQUAL, X32, [_refuse(errno.ENOSYS)]),
        *_where(_EQUAL, clone3, [_refuse(errno.ENOSYS)]),  # its flags are in memory; everybody then takes clone
        *_where(_EQUAL, setns, [_refuse(errno.EPERM)]),
        *_where(_EQUAL, clone, _flags(NAMESPACES)),
        *_where(_EQUAL, unshare, _flags(NAMESPACES | NEWTIME)),
        *_where(_EQUAL, mknodat, _mode(2)),
        *(_where(_EQUAL, mknod, _mode(1)) if mknod is not None else ()),
        _step(_RETURN, ALLOW),
    ]


def _flags(refused: int) -> list[bytes]:
    return [
        _step(_LOAD, _argument(0)),
        *_where(_ANY_BIT, refused, [_refuse(errno.EPERM)]),
        _step(_RETURN, ALLOW),
    ]


def _mode(number: int) -> list[bytes]:
    return [
        _step(_LOAD, _argument(number)),
        _step(_AND, stat.S_IFMT(0xFFFF)),
        *_where(_EQUAL, stat.S_IFCHR, [_refuse(errno.EPERM)]),
        *_where(_EQUAL, stat.S_IFBLK, [_refuse(errno.EPERM)]),
        _step(_RETURN, ALLOW),
    ]


def _where(test: int, value: int, steps: list[bytes]) -> list[bytes]:
    return [_step(test, value, if_not=len(steps)), *steps]


def _unless(test: int, value: int, error: int) -> list[bytes]:
    return [_step(test, value, if_so=1), _refuse(error)]


def _refuse(error: int) -> bytes:
    return _step(_RETURN, ERRNO | error)


def _argument(number: int) -> int:
    """Little-endian: the lower half comes first."""
    return _ARGUMENTS + 8 * number


def _step(code: int, value: int, *, if_so: int = 0, if_not: int = 0) -> bytes:
    """struct sock_filter; how many steps to leave out."""
    return pack("=HBBI", code, if_so, if_not, value)
