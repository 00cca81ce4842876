"""The frequency of the CPU's time stamp counter, which no file of the kernel tells."""

from __future__ import annotations

import ctypes
import functools
import mmap
import platform
import time
from collections.abc import Callable

from rundatsheesh.manager.errors import HostError

# rdtsc; shl rdx, 32; or rax, rdx; ret
_READ_TSC = bytes.fromhex("0f31 48c1e220 4809d0 c3")
MEASURE_SECONDS = 0.05  # an error of 100 ns in a reading makes 2 millionths then
_READINGS = 20


@functools.cache
def frequency_khz() -> int:
    """Measured once against the kernel's raw clock; takes a twentieth of a second. HostError where it cannot be."""
    if platform.machine() != "x86_64":
        raise HostError(f"{platform.machine()} has no time stamp counter")
    read = _reader()
    first = _sample(read)
    time.sleep(MEASURE_SECONDS)
    second = _sample(read)
    return round((second[0] - first[0]) * 1_000_000 / (second[1] - first[1]))


def _sample(read: Callable[[], int]) -> tuple[int, int]:
    """The counter, and the time in nanoseconds at which it had that value: the least disturbed of some readings."""
    best: tuple[int, int, int] | None = None
    for _ in range(_READINGS):
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        ticks = read()
        after = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        if best is None or after - before < best[0]:
            best = (after - before, ticks, (before + after) // 2)
    assert best is not None
    return best[1], best[2]


def _reader() -> Callable[[], int]:
    """rdtsc as a function: six instructions in a page of their own."""
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError as error:
        raise HostError(f"cannot read the time stamp counter: {error}") from error
    page.write(_READ_TSC)
    view = ctypes.c_char.from_buffer(page)
    function = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(view))

    def read(_keep: tuple[mmap.mmap, ctypes.c_char] = (page, view)) -> int:
        return int(function())

    return read
