"""Limits of each user process. Set once from the agent's arguments, before anything is forked."""

from __future__ import annotations

import os
import resource

from . import libc

processes = 512  # of the user at once; a fork bomb ends here
files = 4096  # open at once, per process
preferred_by_oom_killer = False  # whether /proc/self/oom_score_adj means something in this kernel

_OWN_FILES = 65536
USER_OOM_SCORE = 500  # memory exhaustion takes the user's processes, not the agent
OWN_OOM_SCORE = -1000
# File systems in memory that the user can write to, and their shares of what is free when the agent starts. No process
# has to live for a file to stay: with all of it taken the kernel would have nobody to kill, and panic.
_IN_MEMORY = {"/tmp": 0.4, "/dev/shm": 0.15, "/var/tmp": 0.15}
_BYTES_PER_FILE = 8192  # of room; an empty file takes a kilobyte of the kernel's memory


def apply() -> None:
    """To this process and its descendants. Hard limits: they cannot be raised again by the user."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = files if most == resource.RLIM_INFINITY else min(files, most)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, allowed))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def apply_processes() -> None:
    """As `apply`, but apart, since it counts: Linux refuses execution to who became a user with too many processes, and
    then nobody could start the program that ends them."""
    resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))


def use_cpus(number: int) -> None:
    """Ours and our children's: what they ask for when they decide how many threads to start."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:number])


def raise_own() -> None:
    """As many descriptors for the agent itself as the kernel lets us have."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OWN_FILES if most == resource.RLIM_INFINITY else min(_OWN_FILES, most)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(now, wanted), most))


def set_oom_score(score: int) -> None:
    fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, b"%d" % score)
    finally:
        os.close(fd)


def bound_files_in_memory() -> None:
    """In a kernel of our own. Whatever the files take, programs have the rest; OSError where the kernel refuses."""
    free = _available_memory()
    for path, share in _IN_MEMORY.items():
        size = int(free * share)
        if libc.resize_tmpfs(path, f"size={size},nr_inodes={size // _BYTES_PER_FILE}") != 0:
            raise OSError(f"cannot bound {path}")


def _available_memory() -> int:
    """Bytes."""
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":") for line in file)
    return int(fields["MemAvailable"].split()[0]) * 1024
