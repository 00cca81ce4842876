"""The bare runtime: runsc as its manual says, without any of ours around it; Deno and tar on the host."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rundatsheesh.bench.connection import milliseconds
from rundatsheesh.bench.over_http import HELLO_TS
from rundatsheesh.bench.schedule import Contender
from rundatsheesh.manager.engines import gvisor_channel, oci
from rundatsheesh.manager.guest import Guest
from rundatsheesh.manager.model import GUEST_UID, WORKSPACE, Slot

DEADLINE = 60.0  # seconds for anything that runs once
MEM_MB = 256
USER = f"{GUEST_UID}:{GUEST_UID}"
ENV = {"PATH": oci.PATH, "LANG": "C.UTF-8"}


class BareError(Exception):
    """The bare runtime did not do what it does everywhere else."""


@dataclass(frozen=True)
class Runsc:
    """One directory for bundles and state; the guest's image is the servers' own."""

    program: Path
    image: Path
    agent: Path  # packed for the image, as the manager's own
    directory: Path
    platform: str

    def command(self, *words: str) -> list[str]:
        """Its defaults, but for what it cannot do without: no network, no cgroup, and a socket for the agent."""
        flags = [f"--root={self.directory / 'state'}", f"--platform={self.platform}", "--network=none"]
        return [str(self.program), *flags, "--ignore-cgroups", "--overlay2=none", "--host-uds=create", *words]

    def bundle(self, args: Sequence[str] | None = None) -> Sandbox:
        """With the agent, or with a command of the user's."""
        name = f"bench-{secrets.token_hex(6)}"
        own = self.directory / name
        for part in ("bundle", "etc", "channel", "workspace"):
            (own / part).mkdir(parents=True)
        shutil.copytree(self.agent, own / "rds/agent")
        os.chown(own / "workspace", GUEST_UID, GUEST_UID)
        for file, text in oci.identity_files(name, Slot(300).guest_ip).items():
            (own / "etc" / file).write_text(text)
        (own / "bundle/config.json").write_text(json.dumps(self._configuration(name, own, args)))
        return Sandbox(self, name, own)

    def _configuration(self, name: str, own: Path, args: Sequence[str] | None) -> dict[str, Any]:
        sources = oci.Sources(
            image=str(self.image),
            workspace=str(own / "workspace"),
            agent_parent=str(own / "rds"),
            channel=str(own / "channel"),
            etc=str(own / "etc"),
            netns="",
        )
        config = oci.configuration(vm_id=name, cpu=1, mem_mb=MEM_MB, cgroup="", sources=sources)
        config["linux"] = {"namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts", "network")]}
        if args is not None:
            config["process"] |= {"args": list(args), "user": {"uid": GUEST_UID, "gid": GUEST_UID}, "cwd": WORKSPACE}
            config["process"]["capabilities"] = {}
        return config


@dataclass(frozen=True)
class Sandbox:
    runsc: Runsc
    name: str
    directory: Path

    async def run(self, **streams: int) -> Process:
        return await asyncio.create_subprocess_exec(
            *self.runsc.command("run", f"--bundle={self.directory / 'bundle'}", self.name),
            stdin=DEVNULL,
            stderr=DEVNULL,
            env=ENV,
            **{"stdout": DEVNULL, **streams},
        )

    async def greet(self, running: Process) -> Guest:
        """The agent's first reply, over the socket that it listens on."""
        socket = self.directory / "channel/agent.sock"
        stream = await gvisor_channel.connect(socket, running.wait, DEADLINE)
        return await Guest.connect(stream, timeout=DEADLINE)

    async def end(self, running: Process) -> None:
        """Nothing of it is left: a sandbox that still runs is killed."""
        if running.returncode is None:
            await run_to_end(self.runsc.command("kill", self.name, "KILL"))
            await asyncio.wait_for(running.wait(), DEADLINE)
        await asyncio.to_thread(shutil.rmtree, self.directory)


def run_agent(runsc: Runsc) -> Contender:
    """`runsc run` of the agent, to its first reply."""

    async def measure() -> Mapping[str, float]:
        sandbox = runsc.bundle()
        started = time.perf_counter()
        running = await sandbox.run()
        try:
            guest = await sandbox.greet(running)
            took = milliseconds(started)
            await guest.close()
        finally:
            await sandbox.end(running)
        return {"bare_run_agent": took}

    return measure


def run_shell(runsc: Runsc) -> Contender:
    """`runsc run` of `bash -lc`, to the first byte that it prints."""

    async def measure() -> Mapping[str, float]:
        sandbox = runsc.bundle(["/bin/bash", "-lc", "echo hello"])
        started = time.perf_counter()
        running = await sandbox.run(stdout=PIPE)
        try:
            assert running.stdout is not None
            async with asyncio.timeout(DEADLINE):
                if not await running.stdout.read(1):
                    raise BareError("runsc run printed nothing")
                took = milliseconds(started)
                await running.wait()
        finally:
            await sandbox.end(running)
        return {"bare_run_output": took}

    return measure


@asynccontextmanager
async def standing(runsc: Runsc) -> AsyncIterator[Sandbox]:
    """A sandbox that runs, for `runsc exec`."""
    sandbox = runsc.bundle()
    running = await sandbox.run()
    try:
        guest = await sandbox.greet(running)
        yield sandbox
        await guest.close()
    finally:
        await sandbox.end(running)


def exec_true(sandbox: Sandbox) -> Contender:
    argv = sandbox.runsc.command("exec", f"--user={USER}", "--cwd=/workspace", sandbox.name, "/bin/bash", "-lc", "true")

    async def measure() -> Mapping[str, float]:
        return {"bare_exec": await run_to_end(argv)}

    return measure


def host_deno(program: Path, directory: Path) -> Contender:
    """`deno run` on the host, with the caches of the runs before."""
    script = directory / "hello.ts"
    script.write_text(HELLO_TS)
    env = {**ENV, "DENO_DIR": str(directory / "deno"), "DENO_NO_UPDATE_CHECK": "1"}

    async def measure() -> Mapping[str, float]:
        return {"host_deno": await run_to_end([str(program), "run", "--no-prompt", "--quiet", str(script)], env=env)}

    return measure


def host_untar(directory: Path, archive: bytes) -> Contender:
    """`tar -xz` of the archive that is uploaded, into a directory that is new each time."""
    source = directory / "files.tar.gz"
    source.write_bytes(archive)

    async def measure() -> Mapping[str, float]:
        target = directory / "untar"
        await asyncio.to_thread(shutil.rmtree, target, ignore_errors=True)
        target.mkdir()
        return {"host_untar": await run_to_end(["tar", "-xzf", str(source), "-C", str(target)])}

    return measure


async def host_tar(directory: Path, archive: bytes) -> Contender:
    """`tar -cz` of the same files."""
    source, tree = directory / "tree.tar.gz", directory / "tree"
    source.write_bytes(archive)
    tree.mkdir()
    await run_to_end(["tar", "-xzf", str(source), "-C", str(tree)])

    async def measure() -> Mapping[str, float]:
        return {"host_tar": await run_to_end(["tar", "-czf", str(directory / "again.tar.gz"), "-C", str(tree), "."])}

    return measure


async def run_to_end(argv: Sequence[str], env: Mapping[str, str] = ENV) -> float:
    """Milliseconds; raises BareError where the command fails."""
    started = time.perf_counter()
    child = await asyncio.create_subprocess_exec(*argv, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, env=env)
    try:
        async with asyncio.timeout(DEADLINE):
            told, complaints = await child.communicate()
    except TimeoutError:
        child.kill()
        raise BareError(f"no end after {DEADLINE:g} s: {argv}") from None
    took = milliseconds(started)
    if child.returncode != 0:
        raise BareError(f"{argv} ended with {child.returncode}: {(complaints or told)[-500:]!r}")
    return took
