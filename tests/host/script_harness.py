"""Runs what scripts.prepare() builds with the real Deno and Node.js, on this host instead of in a guest."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rundatsheesh.agent import paths, scripts
from rundatsheesh.agent.ahead_deno import VARIABLE, own_variables
from rundatsheesh.agent.job import CHANNEL_FD, Command
from rundatsheesh.manager.build.image import find_image
from rundatsheesh.manager.settings import Settings

ABSENT = object()  # no result, as opposed to a null


@dataclass(frozen=True)
class Outcome:
    exit_code: int
    stdout: str
    stderr: str
    result: Any
    error: Any


def interpreter(name: str) -> str:
    """Deno and Node.js as the guest image has them; they run on the host too."""
    image = find_image(Settings().image_cache)
    assert image is not None, "no guest image on this host: run `rds setup`"
    return str(image.root / "usr/local/bin" / name)


class Scripts:
    """A workspace in a temporary directory, and the runs in it."""

    def __init__(self, root: Path, *, ahead: bool) -> None:
        self.ahead = ahead  # as the agent does it where it can
        self.workspace = root / "workspace"
        self.workspace.mkdir()

    def run(
        self,
        language: str,
        code: str | None = None,
        *,
        path: str | None = None,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        flags: Sequence[str] = (),
        allow_net: bool = False,
        max_output: int = 2 << 20,
        timeout: float = 30,
    ) -> Outcome:
        command = scripts.prepare(
            {
                "language": language,
                "code": code,
                "path": path,
                "args": list(args),
                "env": dict(env or {}),
                "flags": list(flags),
                "allow_net": allow_net,
                "max_output": max_output,
            }
        )
        ours, theirs = os.pipe()
        reader = threading.Thread(target=_read, args=(ours, command.channel))
        begin = self._wake if self.ahead and command.ahead else self._start
        process = begin(command, theirs)
        os.close(theirs)
        reader.start()
        try:
            stdout, stderr = process.communicate(command.stdin, timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            stdout, stderr = process.communicate()
            process.returncode = 124
        reader.join()
        os.close(ours)
        assert command.channel is not None
        result, error = command.channel.finish(process.returncode, stderr)
        return Outcome(process.returncode, stdout.decode(), stderr.decode(), _json(result), _json(error))

    def _start(self, command: Command, channel: int) -> subprocess.Popen[bytes]:
        return _execute(command.argv, command.env, self.workspace, channel)

    def _wake(self, command: Command, channel: int) -> subprocess.Popen[bytes]:
        """A Deno that waits, with the command to it."""
        with tempfile.TemporaryDirectory() as directory:
            place = f"{directory}/control"
            own = own_variables(command) | {VARIABLE: f"unix:{place}"}
            process = _execute(command.argv[:1], own, Path("/"), channel)
            with socket.socket(socket.AF_UNIX) as control:
                while control.connect_ex(place):
                    assert process.poll() is None
                    time.sleep(0.005)
                order = {"cwd": str(self.workspace), "args": command.argv[1:], "env": list(command.given.items())}
                control.sendall(json.dumps(order, ensure_ascii=False).encode() + b"\n")
        return process


def _execute(argv: list[str], env: dict[str, str], cwd: Path, channel: int) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    shell = ["/bin/bash", "-c", f'exec "$@" {CHANNEL_FD}>&{channel}-', "bash"]
    return subprocess.Popen(
        [*shell, *argv], cwd=cwd, env=env, stdin=pipe, stdout=pipe, stderr=pipe, pass_fds=(channel,)
    )


def _read(end: int, channel: Any) -> None:
    while data := os.read(end, 65536):
        channel.feed(data)


def _json(text: bytes | None) -> Any:
    return ABSENT if text is None else json.loads(text)


def make_scripts(root: Path, patch: pytest.MonkeyPatch, *, ahead: bool = False) -> Scripts:
    made = Scripts(root, ahead=ahead)
    patch.setattr(paths, "WORKSPACE", str(made.workspace))
    patch.setattr(scripts, "WORKSPACE", str(made.workspace))
    patch.setitem(scripts._DENO_ENV, "DENO_DIR", str(root / "deno"))
    patch.setattr(scripts, "_program", interpreter)
    return made


__all__ = ["ABSENT", "Outcome", "Scripts", "make_scripts"]
