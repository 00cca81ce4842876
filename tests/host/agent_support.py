"""A real agent for tests: as first process of its own pid namespace, or as init of a gVisor sandbox."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from script_harness import interpreter

import rundatsheesh.agent
from rundatsheesh.manager.build.image import find_image
from rundatsheesh.manager.build.recipe import PROFILE
from rundatsheesh.manager.guest import CallResult, ExecRequest, Guest, ScriptRequest
from rundatsheesh.manager.host.tools import find_runsc
from rundatsheesh.manager.settings import Settings

AGENT = Path(rundatsheesh.agent.__file__).parent
PYTHON = "/usr/bin/python3"
MAX_OUTPUT = 1 << 20
# Natively the guests' user is one of the host's, and its limit of processes counts all that it has there, in whatever
# run of the tests. Each native agent holds this for itself and others, and alone where the limit is to be reached. A
# directory that every host has, so that no file is left for the lock.
USER_LOCK = Path("/run/lock")
CAPABILITIES = ["CAP_SETUID", "CAP_SETGID", "CAP_KILL", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_SETPCAP"]

# $1 is the directory of the test. The new root shows this system's programs and nothing of its files. Its shells begin
# as a guest's do, without a fork.
NATIVE = """
set -e
mount --make-rprivate /
mount -t tmpfs none "$1/root"
cd "$1/root"
mkdir -p usr etc proc dev tmp var/tmp workspace run/agent opt/rds/agent home
for link in bin sbin lib lib64; do ln -s usr/$link $link; done
ln -s /workspace home/user
chmod 1777 tmp var/tmp
mount --rbind /usr usr; mount --bind /etc etc; mount --rbind /dev dev
mount -t proc proc proc
mount --bind "$1/profile" etc/profile
mount --bind "$1/workspace" workspace
mount --bind "$1/run" run/agent
mount --bind "$2" opt/rds/agent
for link in "$1"/interpreters/*.link; do
    program="${link%.link}"; : > "$program"; mount --bind "$(readlink "$link")" "$program"
done
mount --rbind "$1/interpreters" usr/local/bin
shift 2
exec chroot . "$@"
"""


class RunningAgent:
    """`directory` holds workspace/ and run/agent.sock as the host sees them."""

    def __init__(self, directory: Path, process: subprocess.Popen[bytes]) -> None:
        self.directory = directory
        self.process = process

    @property
    def workspace(self) -> Path:
        return self.directory / "workspace"

    @property
    def socket(self) -> Path:
        return self.directory / "run/agent.sock"

    def log(self) -> str:
        return (self.directory / "log").read_text(errors="replace")

    def complaints(self) -> list[str]:
        """Lines of its log, but for the ends of supervisors that a `kill -9 -1` of the user's met while they had the
        user's identity, see agent/launch.py."""
        lines = self.log().replace("\0", "").splitlines()
        return [line for line in lines if not re.fullmatch(r"supervisor \d+ ended with wait status 9", line)]

    async def stream(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Waits until the agent listens."""
        deadline = time.monotonic() + 30
        while True:
            try:
                return await asyncio.open_unix_connection(str(self.socket))
            except (FileNotFoundError, ConnectionRefusedError):
                assert self.process.poll() is None, self.log()
                assert time.monotonic() < deadline, self.log()
                await asyncio.sleep(0.01)

    @contextlib.asynccontextmanager
    async def guest(self) -> AsyncIterator[Guest]:
        guest = await Guest.connect(await self.stream(), timeout=20)
        try:
            yield guest
        finally:
            await guest.close()


class UserLock:
    """This process's hold on USER_LOCK, for as many agents as it has."""

    def __init__(self) -> None:
        self._fd = -1
        self._holders = 0

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """While there is a native agent; waits for who has the user alone."""
        if self._holders == 0:
            self._fd = os.open(USER_LOCK, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._fd, fcntl.LOCK_SH)
        self._holders += 1
        try:
            yield
        finally:
            self._holders -= 1
            if self._holders == 0:
                os.close(self._fd)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """While only this process has native agents; waits for the end of all others. For who is within `shared`."""
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_SH)


user_lock = UserLock()


@contextlib.contextmanager
def native_agent(directory: Path, *options: str) -> Iterator[RunningAgent]:
    with user_lock.shared():
        yield from _native_agent(directory, *options)


def _native_agent(directory: Path, *options: str) -> Iterator[RunningAgent]:
    _prepare(directory)
    argv = [PYTHON, "-I", "-S", "/opt/rds/agent", "--engine", "gvisor", *options]
    command = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "sh", "-c", NATIVE, "sh"]
    with open(directory / "log", "wb") as log:
        process = subprocess.Popen(
            [*command, str(directory), str(AGENT), *argv], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        yield RunningAgent(directory, process)
    finally:
        process.kill()
        process.wait()
        deadline = time.monotonic() + 10
        while using := _processes_using(directory):
            assert time.monotonic() < deadline, f"left behind: {using}"
            time.sleep(0.02)


@contextlib.contextmanager
def gvisor_agent(directory: Path, runsc: str, root: str, *options: str) -> Iterator[RunningAgent]:
    _prepare(directory)
    argv = ["/usr/bin/python3", "-I", "-S", "/opt/rds/agent", "--engine", "gvisor", *options]
    (directory / "config.json").write_text(json.dumps(_bundle(directory, root, argv)))
    vm = "vm-" + secrets.token_hex(8)
    state = f"--root={directory}/state"
    flags = ["--platform=systrap", "--network=none", "--host-uds=create", "--overlay2=root:memory"]
    with open(directory / "log", "wb") as log:
        process = subprocess.Popen(
            [runsc, state, *flags, "run", "--bundle", str(directory), vm],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        yield RunningAgent(directory, process)
    finally:
        if process.poll() is None:
            subprocess.run([runsc, state, "kill", vm, "KILL"], check=False, capture_output=True)
        process.wait(timeout=20)


def engines() -> list[str]:
    return ["native", "gvisor"]


@contextlib.contextmanager
def agent_on(engine: str, directory: Path, *options: str) -> Iterator[RunningAgent]:
    if engine == "native":
        started = native_agent(directory, *options)
    else:
        cache = Settings().image_cache
        runsc, image = find_runsc(cache), find_image(cache)
        assert runsc is not None and image is not None, "this host is not set up: run `rds setup`"
        started = gvisor_agent(directory, str(runsc), str(image.root), *options)
    with started as agent:
        yield agent


async def settled(guest: Guest, background: int = 0) -> None:
    """Return when the agent has done what it does once a call is over, and nothing is left but so many trees of
    processes in the background. Whatever it starts ahead of a call counts until calls find it."""
    async with asyncio.timeout(60):
        while await processes(guest) != background:
            await asyncio.sleep(0.05)  # longer than the calm in which it begins with that


async def processes(guest: Guest) -> int:
    """How many trees of processes there are now."""
    watch = guest.processes()
    try:
        return await anext(watch)
    finally:
        await watch.aclose()  # type: ignore[attr-defined]


async def sh(guest: Guest, cmd: str, timeout_ms: int = 30_000, **more: object) -> CallResult:
    arguments = {"max_output": MAX_OUTPUT} | more
    return await guest.exec(ExecRequest(cmd=cmd, timeout_ms=timeout_ms, **arguments))  # type: ignore[arg-type]


async def script(guest: Guest, code: str, **more: object) -> CallResult:
    arguments = {"language": "js", "timeout_ms": 30_000, "max_output": MAX_OUTPUT, "allow_net": False} | more
    return await guest.run_script(ScriptRequest(code=code, **arguments))  # type: ignore[arg-type]


def _prepare(directory: Path) -> None:
    for name in ("root", "workspace", "run", "state", "interpreters"):
        (directory / name).mkdir()
    (directory / "run").chmod(0o700)
    for name in ("deno", "node"):
        (directory / f"interpreters/{name}.link").symlink_to(interpreter(name))
    (directory / "profile").write_text(PROFILE)
    shutil.chown(directory / "workspace", 1000, 1000)
    # A copy below a directory that the image has: runsc would make a missing mount point in the shared image.
    shutil.copytree(AGENT, directory / "rds/agent")


def _bundle(directory: Path, root: str, argv: list[str]) -> dict[str, object]:
    capabilities = dict.fromkeys(("bounding", "effective", "permitted"), CAPABILITIES)
    mounts = [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777", "size=64m"]},
        {"destination": "/workspace", "type": "bind", "source": f"{directory}/workspace", "options": ["rbind", "rw"]},
        {"destination": "/run/agent", "type": "bind", "source": f"{directory}/run", "options": ["rbind", "rw"]},
        {"destination": "/opt/rds", "type": "bind", "source": f"{directory}/rds", "options": ["rbind", "ro"]},
    ]
    return {
        "ociVersion": "1.0.0",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": argv,
            "env": ["PATH=/usr/bin:/bin"],
            "cwd": "/",
            "capabilities": capabilities,
            "noNewPrivileges": True,
            "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 65536, "hard": 65536}],
        },
        "root": {"path": root, "readonly": True},
        "hostname": "vm",
        "mounts": mounts,
        "linux": {"namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts", "network")]},
    }


def _processes_using(directory: Path) -> list[int]:
    """Live processes whose root is below the directory."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and str((entry / "root").readlink()).startswith(str(directory)):
                found.append(int(entry.name))
    return found
