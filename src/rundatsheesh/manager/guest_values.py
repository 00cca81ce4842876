"""What is asked of a guest and what it answers; `manager.guest` gives these names out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rundatsheesh.manager.model import WORKSPACE


@dataclass(frozen=True, slots=True)
class Hello:
    """What the agent says of itself."""

    agent_version: str
    boot_id: str  # new at each boot, and after `configure` gave one
    engine: str
    transfer_disk: bool = False  # whether it can use one


@dataclass(frozen=True, slots=True)
class Identity:
    """What makes a guest itself; set after its boot and after it was cloned."""

    hostname: str
    guest_ip: str
    mac: str
    gateway: str
    machine_id: str  # 32 hex digits
    entropy: bytes = field(repr=False)  # 64 bytes
    time_ns: int | None = None  # wall clock, ns since the epoch; None reads the host's at the moment of sending
    mount_workspace: bool = True  # unless its template had an empty one, and the guest's disk is a copy of that
    boot_id: str | None = None  # what `hello` says from now on; clones of one template have the same until then


@dataclass(frozen=True, slots=True)
class ExecRequest:
    cmd: str
    timeout_ms: int
    max_output: int  # bytes per stream
    cwd: str = WORKSPACE
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ScriptRequest:
    """Exactly one of `code` and `path`. `flags` go to the interpreter, `args` to the script."""

    language: Literal["ts", "js"]
    timeout_ms: int
    max_output: int  # bytes per stream, and of the result and of the error
    allow_net: bool
    code: str | None = None
    path: str | None = None
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CallResult:
    exit_code: int  # 128 + N for signal N, 124 for a deadline
    stdout: str
    stderr: str
    duration_ms: int
    timed_out: bool
    truncated: bool
    has_result: bool = False
    result: Any = None
    error: Any = None
