"""Facts about a host, each with a hint where it is not as needed. Looking changes nothing.

A check is one function; the list grows by whoever knows more (engines, the image) and is run by `examine`.
"""

from __future__ import annotations

import asyncio
import os
import platform
import shutil
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from rundatsheesh.manager.errors import HostError
from rundatsheesh.manager.host import process, tools
from rundatsheesh.manager.host.cgroup_layout import REQUIRED, find_layout

COMMAND_TIMEOUT = 20.0  # seconds
CHECK_TIMEOUT = 60.0
MIN_KERNEL = (5, 15)
MIN_MEMORY_MB = 1024
MIN_DISK_MB = {"STORAGE_ROOT": 2048, "IMAGE_CACHE": 1024}
SET_UP = "run `make setup` (or `sudo rds setup`)"


class Level(StrEnum):
    OK = "ok"
    WARN = "warn"  # works, or works in part; the hint says what is lost
    FAIL = "fail"  # the server does not start


@dataclass(frozen=True, slots=True)
class Finding:
    level: Level
    fact: str
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    look: Callable[[], Awaitable[Finding]]


@dataclass(frozen=True, slots=True)
class Result:
    name: str
    finding: Finding


async def examine(checks: Sequence[Check]) -> list[Result]:
    """Run all checks at once; the results are in the order of the checks. A check that breaks is a failed one."""
    findings = await asyncio.gather(*(_guarded(check) for check in checks))
    return [Result(check.name, finding) for check, finding in zip(checks, findings, strict=True)]


def ok(fact: str) -> Finding:
    return Finding(Level.OK, fact)


def warn(fact: str, hint: str) -> Finding:
    return Finding(Level.WARN, fact, hint)


def fail(fact: str, hint: str) -> Finding:
    return Finding(Level.FAIL, fact, hint)


def in_thread(look: Callable[[], Finding]) -> Callable[[], Awaitable[Finding]]:
    """A check that reads files or asks an engine, made one that can be awaited."""
    return lambda: asyncio.to_thread(look)


async def _guarded(check: Check) -> Finding:
    try:
        async with asyncio.timeout(CHECK_TIMEOUT):
            return await check.look()
    except TimeoutError:  # before OSError, of which it is one
        return fail(f"no answer within {CHECK_TIMEOUT:g} s", "the host is overloaded or a kernel facility hangs")
    except (HostError, OSError, ValueError) as error:
        return fail(f"could not be examined: {error}", "this is unexpected; please report it with this line")


def host_checks(*, storage_root: Path, image_cache: Path) -> tuple[Check, ...]:
    """What can be said about a host without knowing engines or images."""
    return (
        Check("user", in_thread(_user)),
        Check("system", in_thread(_system)),
        Check("python", in_thread(_python)),
        Check("memory", in_thread(_memory)),
        Check("storage", in_thread(lambda: _disk("STORAGE_ROOT", storage_root))),
        Check("image cache", in_thread(lambda: _disk("IMAGE_CACHE", image_cache))),
        Check("programs", in_thread(lambda: _programs(image_cache))),
        Check("nftables", _nftables),
        Check("network namespaces", _network_namespaces),
        Check("cgroups", in_thread(_cgroups)),
        Check("loop devices", _loop_devices),
        Check("ip forwarding", in_thread(_ip_forward)),
        Check("other firewalls", _other_firewalls),
        Check("runsc", lambda: _runsc(image_cache)),
        Check("kvm", in_thread(_kvm)),
        Check("qemu", _qemu),
    )


def _user() -> Finding:
    if os.geteuid() == 0:
        return ok("root")
    return fail(f"uid {os.geteuid()}", "the server makes namespaces, mounts and cgroups, which only root may: use sudo")


def _system() -> Finding:
    release = platform.release()
    fact = f"{platform.system()} {release} on {platform.machine()}"
    if platform.system() != "Linux":
        return fail(fact, "only Linux has what isolates the VMs")
    if platform.machine() not in ("x86_64", "aarch64"):
        return fail(fact, "guest images exist for x86_64 and aarch64")
    major, minor = (int(part) for part in release.split("-")[0].split(".")[:2])
    if (major, minor) < MIN_KERNEL:
        return warn(
            fact, f"older than {MIN_KERNEL[0]}.{MIN_KERNEL[1]}, which is the oldest kernel this was written for"
        )
    return ok(fact)


def _python() -> Finding:
    fact = platform.python_version()
    return ok(fact) if sys.version_info >= (3, 11) else fail(fact, "install Python 3.11 or newer")


def _memory() -> Finding:
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    sizes = {words[0].rstrip(":"): int(words[1]) // 1024 for words in lines}
    fact = f"{sizes['MemAvailable']} MiB available of {sizes['MemTotal']}"
    if sizes["MemAvailable"] < MIN_MEMORY_MB:
        return warn(fact, "a VM takes its memMb on top of about 40 MiB; end something else or lower MAX_MEM_MB")
    return ok(fact)


def _disk(setting: str, path: Path) -> Finding:
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(existing).free >> 20
    fact = f"{path}: {free} MiB free"
    if free < MIN_DISK_MB[setting]:
        return warn(fact, f"point {setting} at a larger disk; {MIN_DISK_MB[setting]} MiB is the least that makes sense")
    return ok(fact)


def _programs(image_cache: Path) -> Finding:
    required, _ = tools.missing_packages(image_cache)
    if required:
        return fail(f"missing Debian packages: {' '.join(required)}", SET_UP)
    return ok(", ".join(dict.fromkeys(tool.program for tool in tools.REQUIRED)))


async def _nftables() -> Finding:
    """Check a ruleset like ours against the running kernel without loading it."""
    if tools.find_tool("nft") is None:
        return fail("nft is not installed", SET_UP)
    if os.geteuid() != 0:
        return warn("not examined", "only root may ask; use sudo")
    rules = (
        b"table inet rds_doctor { chain forward { type filter hook forward priority 0; meta nfproto ipv6 reject; }; }"
    )
    tried = await process.run(["nft", "-c", "-f", "-"], input=rules, timeout=COMMAND_TIMEOUT, check=False)
    if tried.returncode == 0:
        return ok("the kernel takes our rules")
    return fail(f"refused: {_first_line(tried.stderr)}", "load nf_tables (modprobe nf_tables), or grant CAP_NET_ADMIN")


async def _network_namespaces() -> Finding:
    if os.geteuid() != 0:
        return warn("not examined", "only root may ask; use sudo")
    # A pair of links in a namespace that ends with the command: nothing to clean up, whatever happens.
    script = "ip link add rds-a type veth peer name rds-b && ip link set rds-a up"
    tried = await process.run(["unshare", "--net", "sh", "-c", script], timeout=COMMAND_TIMEOUT, check=False)
    if tried.returncode == 0:
        return ok("namespaces and veth links can be made")
    hint = "the kernel or a container around this host forbids them: CAP_SYS_ADMIN and the veth module are needed"
    return fail(f"refused: {_first_line(tried.stderr)}", hint)


async def _loop_devices() -> Finding:
    if os.geteuid() != 0:
        return warn("not examined", "only root may ask; use sudo")
    tried = await process.run(["losetup", "--find"], timeout=COMMAND_TIMEOUT, check=False)
    if tried.returncode == 0:
        return ok(f"{tried.stdout.decode().strip()} is free")
    return fail(
        f"none: {_first_line(tried.stderr)}", "load the loop module (modprobe loop); in a container pass /dev/loop*"
    )


def _cgroups() -> Finding:
    """Every controller may sit in either hierarchy, and a mounted v2 hierarchy may well be empty."""
    try:
        layout = find_layout()
    except HostError as error:
        return fail(error.message, error.hint or SET_UP)
    return ok(", ".join(f"{name}: {layout.place_of(name)}" for name in REQUIRED))


def _ip_forward() -> Finding:
    if Path("/proc/sys/net/ipv4/ip_forward").read_text().strip() == "1":
        return ok("on")
    return ok("off; the server turns it on while a VM may reach the network")


async def _other_firewalls() -> Finding:
    """Docker and ufw drop what is forwarded unless they know it; our rules can refuse, not overrule that."""
    if os.geteuid() != 0 or tools.find_tool("nft") is None:
        return warn("not examined", "needs root and nft")
    listed = await process.run(["nft", "list", "chains"], timeout=COMMAND_TIMEOUT, check=False)
    table, dropping = "", []
    for line in listed.stdout.decode(errors="replace").splitlines():
        words = line.split()
        if words[:1] == ["table"]:
            table = " ".join(words[1:3])
        elif "hook forward" in line and "policy drop" in line and "rundatsheesh" not in table:
            dropping.append(table)
    if not dropping:
        return ok("none drops forwarded packets")
    hint = "VMs reach no network until those accept links named rds*, as in chain DOCKER-USER or with ufw route allow"
    return warn(f"forwarded packets are dropped by table {', '.join(dropping)}", hint)


async def _runsc(image_cache: Path) -> Finding:
    found = tools.find_runsc(image_cache)
    if found is None:
        return warn("none that is new enough", SET_UP)
    version = await tools.runsc_version(found)
    fact = f"{version[0]}.{version[1]} ({found.resolve()})"
    if version < tools.MIN_RUNSC:
        return warn(fact, f"older than {tools.MIN_RUNSC[0]}: remove {found}, then {SET_UP}")
    return ok(fact)


def usable_kvm() -> tuple[bool, str]:
    """Whether guests can have hardware virtualisation, and why.

    Some hosts have a /dev/kvm that opens but starts no stock kernel; their CPU flags lack vmx and svm.
    """
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return False, "no /dev/kvm"
    except OSError as error:
        return False, f"/dev/kvm: {error.strerror}"
    if platform.machine() == "x86_64":
        flags = _cpu_flags()
        if not flags & {"vmx", "svm"}:
            return False, "/dev/kvm opens, but the CPU shows neither vmx nor svm"
    return True, "usable"


def _kvm() -> Finding:
    usable, fact = usable_kvm()
    if usable:
        return ok(fact)
    return warn(fact, "the qemu engine emulates the CPU, which is slow; gVisor does not need it")


async def _qemu() -> Finding:
    program = next((tool.program for tool in tools.OPTIONAL if tool.program.startswith("qemu")), None)
    found = tools.find_tool(program) if program else None
    if found is None:
        return warn("not installed", f"only needed for the qemu engine: {SET_UP}")
    told = await process.run([str(found), "--version"], timeout=COMMAND_TIMEOUT)
    return ok(_first_line(told.stdout))


def _cpu_flags() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.split(":", 1)[1].split())
    return set()


def _first_line(output: bytes) -> str:
    return next(iter(output.decode(errors="replace").strip().splitlines()), "no message")
