"""Filters of system calls, which all descendants inherit and nobody can take off: seccomp(2).

In an application kernel, one against gaining privileges. Whoever makes a user namespace has every capability in it, and
gVisor has no setting against that (Linux has user.max_user_namespaces, see build/initrd.py); it also lets everybody
make device nodes in its own file systems.

On the host, one that leaves to work on files (outside.py) only what that takes.
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
_S_IFMT = 0o170000  # of a mode: the kind of file, inode(7)
X32 = 0x40000000  # in the number of a call: another architecture's

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the tables, <linux/audit.h>
# Numbers of <asm/unistd.h>, for x86_64 and aarch64; None where the call does not exist.
PRIVILEGED = {
    "unshare": (272, 97),
    "setns": (308, 268),
    "clone": (56, 220),
    "clone3": (435, 435),
    "mknodat": (259, 33),
    "mknod": (133, None),
}
FILE_WORK: dict[str, tuple[int | None, int | None]] = {
    # Of an open file or stream.
    **{"read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67)},
    **{"pwrite64": (18, 68), "lseek": (8, 62), "close": (3, 57), "dup": (32, 23), "fcntl": (72, 25)},
    **{"fstat": (5, 80), "fchmod": (91, 52), "ftruncate": (77, 46), "fallocate": (285, 47), "fsync": (74, 82)},
    **{"fdatasync": (75, 83), "fadvise64": (221, 223), "getdents64": (217, 61), "fstatfs": (138, 44)},
    **{"sendto": (44, 206), "recvfrom": (45, 207), "sendmsg": (46, 211), "recvmsg": (47, 212), "shutdown": (48, 210)},
    **{"getsockname": (51, 204), "getsockopt": (55, 209), "setsockopt": (54, 208), "poll": (7, None)},
    **{"ppoll": (271, 73), "ioctl": (16, 29)},
    # Of names.
    **{"openat": (257, 56), "openat2": (437, 437), "newfstatat": (262, 79), "statx": (332, 291), "statfs": (137, 43)},
    **{"mkdirat": (258, 34), "unlinkat": (263, 35), "renameat": (264, 38), "renameat2": (316, 276)},
    **{"readlinkat": (267, 78), "utimensat": (280, 88), "fchmodat": (268, 53), "faccessat": (269, 48)},
    **{"faccessat2": (439, 439), "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50), "umask": (95, 166)},
    # The same, as they were called before there were descriptors of directories; the C library still does.
    **{"open": (2, None), "stat": (4, None), "lstat": (6, None), "access": (21, None), "readlink": (89, None)},
    **{"mkdir": (83, None), "rename": (82, None), "unlink": (87, None), "rmdir": (84, None), "chmod": (90, None)},
    # Of the interpreter itself.
    **{"mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "mremap": (25, 216), "madvise": (28, 233)},
    **{"brk": (12, 214), "futex": (202, 98), "sched_yield": (24, 124), "clock_gettime": (228, 113)},
    **{"getrandom": (318, 278), "getpid": (39, 172), "gettid": (186, 178), "prlimit64": (302, 261)},
    **{"rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132)},
    **{"restart_syscall": (219, 128), "exit": (60, 93), "exit_group": (231, 94)},
}

# struct seccomp_data: where it has the number, the architecture, and the lower half of an argument.
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
# <linux/bpf_common.h>
_LOAD, _EQUAL, _GREATER_OR_EQUAL, _ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06


def forbid_privileges() -> None:
    """For this process, which must not be able to gain privileges by execution, and all that it starts from now on.
    Raises OSError where the kernel does not know filters, or the machine is of an unknown architecture."""
    column, _ = _architecture()
    calls = {name: numbers[column] for name, numbers in PRIVILEGED.items()}
    _install(
        [
            *_where(_EQUAL, calls["clone3"], _refuse(errno.ENOSYS)),  # its flags are in memory; all then take clone
            *_where(_EQUAL, calls["setns"], _refuse(errno.EPERM)),
            *_where(_EQUAL, calls["clone"], _unless_flags(NAMESPACES)),
            *_where(_EQUAL, calls["unshare"], _unless_flags(NAMESPACES | NEWTIME)),
            *_where(_EQUAL, calls["mknodat"], _unless_device(2)),
            *_where(_EQUAL, calls["mknod"], _unless_device(1)),
            _step(_RETURN, ALLOW),
        ]
    )


def keep_file_work() -> None:
    """As `forbid_privileges`, but whatever is not in FILE_WORK is refused."""
    column, _ = _architecture()
    allowed = [numbers[column] for numbers in FILE_WORK.values() if numbers[column] is not None]
    steps = [_step(_EQUAL, number, if_so=len(allowed) - at) for at, number in enumerate(allowed)]  # type: ignore[arg-type]
    _install([*steps, *_refuse(errno.EPERM), _step(_RETURN, ALLOW)])


def _architecture() -> tuple[int, int]:
    found = ARCHITECTURES.get(os.uname().machine)
    if found is None:
        raise OSError(f"no filter of system calls for {os.uname().machine}")
    return found


def _install(steps: list[bytes]) -> None:
    """`steps` begin with the number of the call, and end."""
    _, architecture = _architecture()
    program = b"".join(
        [
            _step(_LOAD, _ARCHITECTURE),
            _step(_EQUAL, architecture, if_so=1),
            *_refuse(errno.ENOSYS),
            _step(_LOAD, _NUMBER),
            *_where(_GREATER_OR_EQUAL, X32, _refuse(errno.ENOSYS)),
            *steps,
        ]
    )
    memory = libc.Buffer(program)
    if libc.call("prctl", PR_SET_SECCOMP, MODE_FILTER, pack("HP", memory.size // 8, memory.address), 0, 0) != 0:
        raise OSError("the filter of system calls was refused")


def _unless_flags(refused: int) -> list[bytes]:
    return [_step(_LOAD, _argument(0)), *_where(_ANY_BIT, refused, _refuse(errno.EPERM)), _step(_RETURN, ALLOW)]


def _unless_device(mode: int) -> list[bytes]:
    return [
        _step(_LOAD, _argument(mode)),
        _step(_AND, _S_IFMT),
        *_where(_EQUAL, stat.S_IFCHR, _refuse(errno.EPERM)),
        *_where(_EQUAL, stat.S_IFBLK, _refuse(errno.EPERM)),
        _step(_RETURN, ALLOW),
    ]


def _where(test: int, value: int | None, steps: list[bytes]) -> list[bytes]:
    return [_step(test, value, if_not=len(steps)), *steps] if value is not None else []


def _refuse(error: int) -> list[bytes]:
    return [_step(_RETURN, ERRNO | error)]


def _argument(number: int) -> int:
    """Little-endian: the lower half comes first."""
    return _ARGUMENTS + 8 * number


def _step(code: int, value: int, *, if_so: int = 0, if_not: int = 0) -> bytes:
    """struct sock_filter; how many steps to leave out."""
    return pack("=HBBI", code, if_so, if_not, value)
