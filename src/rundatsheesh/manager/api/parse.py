"""Bodies to the manager's frozen values: addresses, names, paths, and the limits that depend on the settings."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime

import idna
from starlette.datastructures import Headers

from rundatsheesh.manager.api.schemas.admin import CreateApiKeyBody
from rundatsheesh.manager.api.schemas.run import MAX_ARGUMENT_BYTES, ExecBody, RunJsBody, RunTsBody
from rundatsheesh.manager.api.schemas.vms import CreateVmBody, UpdateVmBody
from rundatsheesh.manager.errors import InvalidInput
from rundatsheesh.manager.model import (
    WORKSPACE,
    CreateVm,
    ExecCall,
    Lifetime,
    LifetimeChange,
    Limits,
    Once,
    Rights,
    Scope,
    ScriptCall,
    Unchanged,
    now,
)
from rundatsheesh.manager.settings import Settings

HOME_ALIAS = "/home/user"
DEFAULT_TIMEOUT_MS = 120_000
NAME_BYTES, PATH_BYTES = 255, 4095  # Linux' NAME_MAX, and PATH_MAX without its NUL
MAX_PROCESS_BYTES = 1 << 20  # arguments and variables of one process together; the kernel's limit is 2 MiB

_IPV4 = re.compile(r"[0-9]{1,3}(\.[0-9]{1,3}){3}(/[0-9]{1,2})?")
_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_RFC_3339 = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d{1,9})?(?P<zone>Z|[+-]\d\d:\d\d)?", re.ASCII)
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")


def create_vm(body: CreateVmBody, settings: Settings) -> CreateVm:
    _at_most("cpu", body.cpu, settings.max_cpu, "MAX_CPU")
    _at_most("memMb", body.mem_mb, settings.max_mem_mb, "MAX_MEM_MB")
    if body.disk_size_mb is not None:
        _at_most("diskSizeMb", body.disk_size_mb, settings.max_disk_mb, "MAX_DISK_MB")
    _at_most("allowIps", len(body.allow_ips), settings.max_allow_ips, "MAX_ALLOW_IPS", "entries")
    _at_most("allowDomains", len(body.allow_domains), settings.max_allow_ips, "MAX_ALLOW_IPS", "entries")
    return CreateVm(
        cpu=body.cpu,
        mem_mb=body.mem_mb,
        disk_mb=body.disk_size_mb,
        allow_ips=tuple(_network(index, entry) for index, entry in enumerate(body.allow_ips)),
        outbound=body.outbound_internet,
        allow_domains=tuple(_domain(index, entry) for index, entry in enumerate(body.allow_domains)),
        engine=None if body.engine == "auto" else body.engine,
        image_id=body.image_id,
        snapshot_id=body.snapshot_id or body.user_overlay_snapshot_id,
        name=body.name,
        labels=body.labels,
        lifetime=Lifetime(body.ttl_ms, body.idle_timeout_ms),
    )


def lifetime_change(body: UpdateVmBody) -> LifetimeChange:
    named = body.model_fields_set
    return LifetimeChange(
        ttl_ms=body.ttl_ms if "ttl_ms" in named else Unchanged.UNCHANGED,
        idle_timeout_ms=body.idle_timeout_ms if "idle_timeout_ms" in named else Unchanged.UNCHANGED,
    )


def rights(body: CreateApiKeyBody) -> Rights:
    egress = None if body.allow_ips is None else [_network(index, entry) for index, entry in enumerate(body.allow_ips)]
    limits = body.limits
    return Rights(
        scopes=Rights().scopes if body.scopes is None else frozenset(Scope(name) for name in body.scopes),
        egress=None if egress is None else tuple(egress),
        limits=Limits(limits.max_vms, limits.max_cpu, limits.max_mem_mb, limits.calls_per_minute),
    )


def once(headers: Headers, body: CreateVmBody) -> Once | None:
    """What `Idempotency-Key` asks for. Raises InvalidInput (`idempotency_key_invalid`)."""
    given = headers.getlist("idempotency-key")
    if not given:
        return None
    if len(given) > 1 or not _IDEMPOTENCY_KEY.fullmatch(given[0]):
        raise InvalidInput("Idempotency-Key: 1 to 255 visible ASCII characters, once", code="idempotency_key_invalid")
    asked = json.dumps(body.model_dump(), sort_keys=True)
    return Once(hashlib.sha256(given[0].encode()).hexdigest(), hashlib.sha256(asked.encode()).hexdigest())


def exec_call(body: ExecBody, settings: Settings) -> ExecCall:
    _check_argument("cmd", body.cmd)
    _check_process_size(body.env)
    return ExecCall(
        cmd=body.cmd,
        cwd=WORKSPACE if body.cwd is None else guest_path(body.cwd, "cwd"),
        env=body.env,
        timeout_ms=_timeout(body.timeout_ms, settings),
    )


def script_call(body: RunTsBody | RunJsBody, settings: Settings) -> ScriptCall:
    env = _env_pairs(body.env)
    _check_process_size(env, body.args)
    return ScriptCall(
        language="ts" if isinstance(body, RunTsBody) else "js",
        code=body.code,
        path=None if body.path is None else guest_path(body.path, "path"),
        args=tuple(body.args),
        env=env,
        flags=tuple(body.deno_flags if isinstance(body, RunTsBody) else body.node_flags),
        timeout_ms=_timeout(body.timeout_ms, settings),
    )


def guest_path(path: str, field: str) -> str:
    """An absolute path in /workspace without `.` and `..`. Relative ones start there, /home/user is another name of
    it. Symbolic links are the guest's to judge. Raises InvalidInput (`path_outside_workspace`, `path_too_long`)."""
    whole = posixpath.normpath(posixpath.join(WORKSPACE, path)).replace("//", "/", 1)
    for root in (WORKSPACE, HOME_ALIAS):
        if whole == root or whole.startswith(root + "/"):
            return _fitting(WORKSPACE + whole[len(root) :], field)
    raise InvalidInput(
        f"{field}: {path[:256]!r} is outside {WORKSPACE}",
        code="path_outside_workspace",
        hint=f"give a path in {WORKSPACE}",
    )


def _fitting(path: str, field: str) -> str:
    """No file can have a longer one."""
    if len(path.encode()) > PATH_BYTES or any(len(name.encode()) > NAME_BYTES for name in path.split("/")):
        raise InvalidInput(
            f"{field}: at most {NAME_BYTES} bytes for a name, {PATH_BYTES} for a path", code="path_too_long"
        )
    return path


def label_filter(pairs: Iterable[str]) -> dict[str, str]:
    labels: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise InvalidInput(f"label: {pair[:128]!r} is not key=value")
        if labels.get(key, value) != value:
            raise InvalidInput(f"label: {key[:64]!r} is given twice with different values")
        labels[key] = value
    return labels


def future_time(text: str, field: str) -> datetime:
    found = _RFC_3339.fullmatch(text.upper())
    if found is not None and found["zone"] is None:
        raise InvalidInput(f"{field}: has no time zone", hint="end it with Z")
    try:
        # In UTC from here on: what only another zone's calendar can say overflows here rather than in the store.
        time = datetime.fromisoformat(found[0]).astimezone(UTC) if found else None
    except (ValueError, OverflowError):
        time = None
    if time is None:
        raise InvalidInput(f"{field}: not an RFC 3339 time", hint="such as 2099-01-01T00:00:00Z")
    if time <= now():
        raise InvalidInput(f"{field}: is not in the future")
    return time


def _at_most(field: str, value: int, limit: int, setting: str, unit: str = "") -> None:
    if value > limit:
        amount = f"{limit} {unit}".strip()
        raise InvalidInput(f"{field}: at most {amount} ({setting})", details={"field": field, "limit": limit})


def _timeout(timeout_ms: int | None, settings: Settings) -> int:
    if timeout_ms is None:
        return min(DEFAULT_TIMEOUT_MS, settings.max_exec_timeout_ms)
    _at_most("timeoutMs", timeout_ms, settings.max_exec_timeout_ms, "MAX_EXEC_TIMEOUT_MS")
    return timeout_ms


def _network(index: int, entry: str) -> ipaddress.IPv4Network:
    problem = "is not an IPv4 address or CIDR"
    if ":" in entry:
        problem = "is IPv6, which no VM can reach; only IPv4 is possible"
    elif _IPV4.fullmatch(entry):
        try:
            return ipaddress.IPv4Network(entry, strict=False)
        except ValueError:
            pass  # told below, by name
    raise _bad_rule("allowIps", index, entry, problem)


def _domain(index: int, entry: str) -> str:
    name = entry.removeprefix("*.").removesuffix(".")
    try:
        ascii_name = name.lower() if name.isascii() else idna.encode(name, uts46=True).decode()
    except idna.IDNAError:
        ascii_name = ""
    labels = ascii_name.split(".")
    if len(ascii_name) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise _bad_rule("allowDomains", index, entry, "is not a host name, nor *.name")
    if labels[-1].isdigit():
        raise _bad_rule("allowDomains", index, entry, "is an address; addresses belong in allowIps")
    return "*." + ascii_name if entry.startswith("*.") else ascii_name


def _bad_rule(field: str, index: int, entry: str, problem: str) -> InvalidInput:
    return InvalidInput(
        f"{field}[{index}]: {entry[:128]!r} {problem}",
        code="egress_rule_invalid",
        details={"field": field, "index": index, "entry": entry[:128]},
    )


def _env_pairs(pairs: Iterable[str]) -> dict[str, str]:
    env: dict[str, str] = {}
    for index, pair in enumerate(pairs):
        key, _, value = pair.partition("=")  # the schema has checked that there is one
        if key in env:
            raise InvalidInput(f"env[{index}]: {key} is given twice")
        env[key] = value
    return env


def _check_process_size(env: Mapping[str, str], args: Sequence[str] = ()) -> None:
    strings = [*(f"{key}={value}" for key, value in env.items()), *args]
    for index, argument in enumerate(args):
        _check_argument(f"args[{index}]", argument)
    for key, value in env.items():
        _check_argument(f"env: {key}", f"{key}={value}")
    if sum(len(string.encode()) + 9 for string in strings) > MAX_PROCESS_BYTES:  # 9: its NUL and a pointer to it
        raise InvalidInput(f"args and env: together larger than {MAX_PROCESS_BYTES} bytes")


def _check_argument(field: str, text: str) -> None:
    """The schema counts characters, the kernel bytes."""
    if len(text.encode()) > MAX_ARGUMENT_BYTES:
        raise InvalidInput(f"{field}: larger than {MAX_ARGUMENT_BYTES} bytes", hint="put it into a file")
