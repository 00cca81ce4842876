"""Frozen values that every layer of the manager shares. No behaviour beyond arithmetic on their own fields."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum, StrEnum
from ipaddress import IPv4Address, IPv4Network
from typing import Literal

GATEWAY = IPv4Address("172.16.0.1")
GUEST_NETWORK = IPv4Network("172.16.0.0/16")
GUEST_UID = 1000
WORKSPACE = "/workspace"

# Slots are host-wide: each manager on a host owns one block of SLOTS_PER_BLOCK, so that two managers never share
# an address or a link name. 64 blocks of 1024 fill 172.16.0.0/16; the first 256 slots stay unused (gateway, .0.x).
SLOTS_PER_BLOCK = 1024
FIRST_USABLE_SLOT = 256


class State(StrEnum):
    CREATING = "CREATING"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    STOPPING = "STOPPING"
    STOPPED = "STOPPED"
    PAUSED = "PAUSED"
    ERROR = "ERROR"
    # Internal, unknown to callers:
    WARM = "WARM"  # started ahead of demand, nobody's yet
    DELETING = "DELETING"  # nobody's any more


HIDDEN = frozenset({State.WARM, State.DELETING})


class Isolation(StrEnum):
    """What separates the guest from the host's kernel, strongest first."""

    HARDWARE_VM = "hardware-vm"
    EMULATED_VM = "emulated-vm"
    APPLICATION_KERNEL = "application-kernel"


class ProvisionMode(StrEnum):
    BOOT = "boot"
    SNAPSHOT = "snapshot"


@dataclass(frozen=True, slots=True)
class EgressPolicy:
    """Where the VM's packets may go. `outbound=False` means nowhere, whatever the lists say."""

    outbound: bool = False
    allow_ips: tuple[IPv4Network, ...] = ()
    allow_domains: tuple[str, ...] = ()  # lower case, no trailing dot; "*.example.com" matches subdomains only


@dataclass(frozen=True, slots=True)
class Slot:
    """One integer from which every host name of a VM is derived; unique on the host while its record exists."""

    number: int

    @property
    def block(self) -> int:
        return self.number // SLOTS_PER_BLOCK

    @property
    def link(self) -> str:
        """Name of the host end of the VM's link: at most 15 bytes (IFNAMSIZ - 1)."""
        return f"rds{self.block}-{self.number % SLOTS_PER_BLOCK}"

    @property
    def netns(self) -> str:
        """Name of the network namespace in /run/netns; the same as the link's, one word to search for."""
        return self.link

    @property
    def guest_ip(self) -> IPv4Address:
        return GUEST_NETWORK.network_address + self.number

    @property
    def guest_mac(self) -> str:
        """Locally administered, derived from the address so that it is unique on the host."""
        octets = self.guest_ip.packed
        return "02:fd:" + ":".join(f"{b:02x}" for b in octets)


@dataclass(frozen=True, slots=True)
class Lifetime:
    """How long a VM may last, in milliseconds; None: for ever."""

    ttl_ms: int | None = None  # from the creation, or from the last change of it; then the VM is deleted
    idle_timeout_ms: int | None = None  # without an open call and without a process of the user; then it is stopped


class Unchanged(Enum):
    UNCHANGED = "unchanged"


@dataclass(frozen=True, slots=True)
class LifetimeChange:
    """What a caller changes of a VM's lifetime. A new `ttl_ms` counts from the change."""

    ttl_ms: int | Unchanged | None = Unchanged.UNCHANGED
    idle_timeout_ms: int | Unchanged | None = Unchanged.UNCHANGED


@dataclass(frozen=True, slots=True)
class VmSpec:
    """What the caller asked for, parsed and within the limits of the settings."""

    cpu: int
    mem_mb: int
    disk_mb: int
    policy: EgressPolicy
    engine: str  # a concrete engine name, never "auto"
    image_id: str
    name: str | None = None
    labels: dict[str, str] = field(default_factory=dict)
    lifetime: Lifetime = Lifetime()


@dataclass(frozen=True, slots=True)
class VmRecord:
    """One row of the database: the truth about a VM from before its first side effect until after its last."""

    id: str
    node_id: str
    slot: Slot
    spec: VmSpec
    state: State
    isolation: Isolation
    provision_mode: ProvisionMode
    boot_id: str | None  # new at each boot of the guest
    reason: str | None  # why the VM is in ERROR or was stopped by us
    created_at: datetime
    started_at: datetime | None
    expires_at: datetime | None = None  # when its time to live ends
    idle_since: datetime | None = None  # filled in while the VM runs and is idle; not kept in the database


class Scope(StrEnum):
    """What an API key may do."""

    VM_READ = "vm:read"
    VM_WRITE = "vm:write"
    EXEC = "exec"
    FILES = "files"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one API key may use at once, over all its VMs whatever their state; None: as much as the server has."""

    vms: int | None = None
    cpu: int | None = None
    mem_mb: int | None = None
    calls_per_minute: int | None = None


@dataclass(frozen=True, slots=True)
class Rights:
    """What an API key may do, how much of it, and where its VMs may reach at most (None: anywhere)."""

    scopes: frozenset[Scope] = frozenset(Scope) - {Scope.ADMIN}
    egress: tuple[IPv4Network, ...] | None = None
    limits: Limits = Limits()


@dataclass(frozen=True, slots=True)
class Once:
    """A request that must have its effect once: the caller's key for it, and what it asks for. Both are hashes."""

    key: str
    body: str


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asked, and the id under which the request is found in logs."""

    request_id: str
    who: str  # "key:<id>", "session:<email>" or "manager"
    limits: Limits = Limits()
    once: Once | None = None


# --- requests: what callers ask for, parsed at the edge and within its limits, and what they are shown ---------------


@dataclass(frozen=True, slots=True)
class CreateVm:
    """`None` means "whatever the server's default is"."""

    cpu: int
    mem_mb: int
    disk_mb: int | None = None
    allow_ips: tuple[IPv4Network, ...] = ()
    outbound: bool = False
    allow_domains: tuple[str, ...] = ()  # lower case, IDNA, no trailing dot
    engine: str | None = None
    image_id: str | None = None
    snapshot_id: str | None = None
    name: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    lifetime: Lifetime = Lifetime()


@dataclass(frozen=True, slots=True)
class ExecCall:
    cmd: str
    cwd: str = WORKSPACE
    env: Mapping[str, str] = field(default_factory=dict)
    timeout_ms: int = 120_000


@dataclass(frozen=True, slots=True)
class ScriptCall:
    """Exactly one of `code` and `path` is set. `flags` go to the interpreter, `args` to the script."""

    language: Literal["ts", "js"]
    code: str | None = None
    path: str | None = None
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    timeout_ms: int = 120_000


@dataclass(frozen=True, slots=True)
class UploadManifest:
    """Sizes of a checked upload's canonical stream: a table of entries, then the content of its files."""

    entries: int
    table_bytes: int
    content_bytes: int

    @property
    def stream_bytes(self) -> int:
        return self.table_bytes + self.content_bytes


CallType = Literal["exec", "run-ts", "run-js", "upload", "download"]


@dataclass(frozen=True, slots=True)
class LogView:
    """The tail of one of a VM's logs. `truncated` says that older lines exist."""

    type: str
    lines: tuple[str, ...]
    truncated: bool
    updated_at: datetime  # of an empty log: when it was made


@dataclass(frozen=True, slots=True)
class ExecLogEntry:
    """One call into a VM. The values of its environment are never kept."""

    id: str
    vm_id: str
    type: CallType
    input: str  # command, code, script path or file path; its head only when it was long
    input_truncated: bool
    exit_code: int | None
    duration_ms: int | None
    started_at: datetime
    finished_at: datetime | None  # None while it runs
    bytes_in: int  # size of the input or of the upload
    bytes_out: int  # stdout and stderr together, or the size of the download
    timed_out: bool
    error: str | None  # code of the error that ended it; "interrupted" when the manager ended first
    request_id: str
    who: str


@dataclass(frozen=True, slots=True)
class ExecLogPage:
    entries: tuple[ExecLogEntry, ...]  # newest first
    has_more: bool


@dataclass(frozen=True, slots=True)
class ActivityEntry:
    """Something that happened to a VM or to the server's credentials; kept after the VM is gone."""

    id: int
    at: datetime
    kind: str  # "vm.create", "vm.start", "vm.stop", "vm.destroy", "vm.died", "key.create", "login", ...
    vm_id: str | None
    reason: str | None
    who: str
    request_id: str


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A further API key. Only the hash of its secret is kept."""

    id: str
    name: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None
    rights: Rights = Rights()


@dataclass(frozen=True, slots=True)
class Session:
    """A login of the admin. Its token is known to the browser alone."""

    email: str
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class Overview:
    """How full this host is. Memory in MiB, disk in bytes."""

    vms_by_state: Mapping[State, int]
    max_vms: int
    cpu_allocated: int  # of VMs that hold it now; more than `cpu_host` is normal
    cpu_host: int
    load_1m: float
    mem_allocated_mb: int
    mem_host_mb: int
    mem_available_mb: int
    disk_total: int  # of the file system that holds STORAGE_ROOT
    disk_free: int


class LeakKind(StrEnum):
    """What can be on a host in a VM's name. In the order in which it is taken away."""

    PROCESS = "process"
    CGROUP = "cgroup"
    LINK = "link"
    NAMESPACE = "namespace"
    RULES = "rules"
    SOCKET = "socket"
    MOUNT = "mount"
    LOOP_DEVICE = "loop_device"
    DIRECTORY = "directory"
    RECORD = "record"  # the other way round: it says that a VM runs, or is being worked on, and neither is so


@dataclass(frozen=True, slots=True)
class Leak:
    """One difference between the records and the host."""

    kind: LeakKind
    name: str  # pid, path, link name, ... : what the host calls it
    vm_id: str | None  # whose it is or was, where its name says so; that VM may have no record any more


@dataclass(frozen=True, slots=True)
class Healing:
    """What a round of reconciliation found and removed, and what is still there after it."""

    healed: tuple[Leak, ...]
    remaining: tuple[Leak, ...]


def now() -> datetime:
    return datetime.now(UTC)


def new_vm_id() -> str:
    """`vm-` and 16 hex digits. Fixed length: runsc matches ids by prefix."""
    return "vm-" + secrets.token_hex(8)


def machine_id(vm_id: str) -> str:
    """32 hex digits that are the VM's own, the same at each of its starts, and do not tell its id."""
    return hashlib.sha256(f"machine-id of {vm_id}".encode()).hexdigest()[:32]
