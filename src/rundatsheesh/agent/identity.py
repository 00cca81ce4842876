"""Who this guest is: set after its boot, and again after it was cloned from a template.

Under gVisor all of it was told to the sandbox from outside; only a QEMU guest sets itself up.
"""

from __future__ import annotations

import errno
import os
import socket
import time

from . import libc
from .job import CallFailed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_WORKSPACE = "/workspace"
_WORKSPACE_DISK = "/dev/vdb"
# No background writes into an idle disk, and deleted files free space on the host.
_MOUNT_OPTIONS = "noinit_itable,discard,errors=remount-ro"
_INTERFACE = b"eth0"
_SIOCADDRT, _SIOCSIFFLAGS, _SIOCGIFFLAGS = 0x890B, 0x8914, 0x8913
_SIOCSIFADDR, _SIOCSIFNETMASK, _SIOCSIFHWADDR = 0x8916, 0x891C, 0x8924
_IFF_UP = 1
_RTF_UP, _RTF_GATEWAY, _RTF_HOST = 1, 2, 4
_ARPHRD_ETHER = 1
_RNDADDENTROPY, _RNDRESEEDCRNG = 0x40085203, 0x5207

boot_id = os.urandom(16).hex()


def configure(params: dict[str, Any], engine: str) -> dict[str, Any]:
    """Set what the host says; CallFailed names the step that the kernel refused."""
    global boot_id
    if engine == "qemu":
        _step("entropy", _add_entropy, bytes.fromhex(params["entropy"]))
        _step("clock", time.clock_settime_ns, time.CLOCK_REALTIME, params["time_ns"])
        _step("hostname", socket.sethostname, params["hostname"])
        _step("name", _write_file, "/etc/hostname", params["hostname"] + "\n")
        _step("hosts", _write_file, "/etc/hosts", f"127.0.0.1 localhost\n{params['guest_ip']} {params['hostname']}\n")
        _step("machine-id", _write_file, "/etc/machine-id", params["machine_id"] + "\n")
        _step("network", _set_network, params["guest_ip"], params["mac"], params["gateway"])
        _step("workspace", _mount_workspace)
    boot_id = params["boot_id"] or boot_id
    return {"boot_id": boot_id} | ({"clock_ns": time.time_ns()} if engine == "qemu" else {})


def set_clock(params: dict[str, Any]) -> dict[str, Any]:
    """Once more, where what `configure` said was old when it arrived."""
    _step("clock", time.clock_settime_ns, time.CLOCK_REALTIME, params["time_ns"])
    return {"clock_ns": time.time_ns()}


def _step(name: str, function: Callable[..., object], *arguments: Any) -> None:
    try:
        function(*arguments)
    except OSError as error:
        raise CallFailed("internal", f"cannot set the guest's {name}: {error}") from None


def _add_entropy(entropy: bytes) -> None:
    """Mix it into the kernel's pool, credit it, and have all that is drawn from now on depend on it."""
    import fcntl

    size = len(entropy).to_bytes(4, "little")
    bits = (8 * len(entropy)).to_bytes(4, "little")
    fd = os.open("/dev/urandom", os.O_WRONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _RNDADDENTROPY, bits + size + entropy)
        fcntl.ioctl(fd, _RNDRESEEDCRNG)
    finally:
        os.close(fd)


def _write_file(path: str, text: str) -> None:
    """In place: the file is bound over the image's own."""
    fd = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.write(fd, text.encode("ascii"))
    finally:
        os.close(fd)


def _mount_workspace() -> None:
    """Only now: a template has no disk, and what a kernel remembered of one would be wrong for the next."""
    if not os.path.ismount(_WORKSPACE) and libc.mount(_WORKSPACE_DISK, _WORKSPACE, "ext4", _MOUNT_OPTIONS) != 0:
        raise OSError(errno.EIO, f"the kernel refuses to mount {_WORKSPACE_DISK}")


def _set_network(address: str, mac: str, gateway: str) -> None:
    """One address, the gateway on the link, everything else through it. Taking the link down drops what was before."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        _set_flags(control, up=False)
        hardware = _ARPHRD_ETHER.to_bytes(2, "little") + bytes.fromhex(mac.replace(":", ""))
        _request(control, _SIOCSIFHWADDR, hardware)
        _request(control, _SIOCSIFADDR, _address(address))
        _request(control, _SIOCSIFNETMASK, _address("255.255.255.255"))
        _set_flags(control, up=True)
        _add_route(control, gateway, "255.255.255.255", "0.0.0.0", _RTF_UP | _RTF_HOST)
        _add_route(control, "0.0.0.0", "0.0.0.0", gateway, _RTF_UP | _RTF_GATEWAY)


def _set_flags(control: socket.socket, *, up: bool) -> None:
    flags = int.from_bytes(_request(control, _SIOCGIFFLAGS, b"")[16:18], "little")
    flags = flags | _IFF_UP if up else flags & ~_IFF_UP
    _request(control, _SIOCSIFFLAGS, flags.to_bytes(2, "little"))


def _request(control: socket.socket, number: int, argument: bytes) -> bytes:
    """An ioctl on struct ifreq: 16 bytes of name, 24 of argument."""
    import fcntl

    return fcntl.ioctl(control, number, _INTERFACE.ljust(16, b"\0") + argument.ljust(24, b"\0"))


def _address(address: str) -> bytes:
    """struct sockaddr_in without a port."""
    return socket.AF_INET.to_bytes(2, "little") + b"\0\0" + socket.inet_aton(address) + bytes(8)


def _add_route(control: socket.socket, destination: str, mask: str, gateway: str, flags: int) -> None:
    """struct rtentry on a 64-bit machine; its device is a pointer to a name, which lives as long as the call."""
    import ctypes  # for a pointer; too slow to load at every start
    import fcntl

    device = ctypes.create_string_buffer(_INTERFACE)
    entry = b"".join(
        (
            bytes(8),
            _address(destination),
            _address(gateway),
            _address(mask),
            flags.to_bytes(2, "little"),
            bytes(2 + 4 + 8 + 8),  # rt_pad2 with its alignment, rt_pad3, tos and class
            bytes(2 + 6),  # rt_metric with its alignment
            ctypes.addressof(device).to_bytes(8, "little"),
            bytes(8 + 8 + 8),  # mtu, window, irtt with its alignment
        )
    )
    try:
        fcntl.ioctl(control, _SIOCADDRT, entry)
    except OSError as error:
        if error.errno != errno.EEXIST:
            raise
