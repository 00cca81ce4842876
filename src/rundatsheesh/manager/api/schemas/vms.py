"""VMs and their logs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from rundatsheesh.manager.api.schemas.base import Body, Line, Query, QueryInt, Text, Timestamp, View

# Literals, because OpenAPI shows them; a test compares them with the model's enums.
ShownState = Literal["CREATING", "STARTING", "RUNNING", "STOPPING", "STOPPED", "PAUSED", "ERROR"]
CallTypeName = Literal["exec", "run-ts", "run-js", "upload", "download"]

LABEL_KEY = r"^[^=\x00-\x1f\x7f-\x9f\u2028\u2029]*$"

LabelKey = Annotated[str, Field(min_length=1, max_length=64, pattern=LABEL_KEY)]
LabelValue = Annotated[Line, Field(max_length=256)]
Id = Annotated[str, Field(pattern="^[A-Za-z0-9._:-]{1,128}$")]


MIN_LIFETIME_MS = 1000
MAX_LIFETIME_MS = 365 * 24 * 3_600_000
LifetimeMs = Annotated[int, Field(ge=MIN_LIFETIME_MS, le=MAX_LIFETIME_MS)]


class CreateVmBody(Body):
    cpu: int = Field(ge=1, description="vCPUs, up to MAX_CPU.", examples=[1])
    mem_mb: int = Field(ge=128, description="Memory in MiB, up to MAX_MEM_MB.", examples=[256])
    allow_ips: list[Annotated[Text, Field(max_length=64)]] = Field(
        description="IPv4 addresses or CIDRs that the VM may reach, when `outboundInternet` is true.",
        examples=[["172.16.0.1/32"]],
    )
    outbound_internet: bool = Field(False, description="false: no packet leaves. true: to allowIps and allowDomains.")
    allow_domains: list[Annotated[Text, Field(max_length=255)]] = Field(
        default=[], description="Names, or `*.example.com` for all subdomains.", examples=[["example.com"]]
    )
    engine: Annotated[Line, Field(min_length=1, max_length=32)] | None = Field(
        None, description="gvisor, qemu, or auto (the default).", examples=["auto"]
    )
    image_id: Id | None = Field(None, description="The default image unless given.")
    snapshot_id: Id | None = Field(None, description="Start with the files of this snapshot.")
    user_overlay_snapshot_id: Id | None = Field(None, description="Another name of `snapshotId`.")
    disk_size_mb: int | None = Field(None, ge=64, description="Size of /workspace in MiB, up to MAX_DISK_MB.")
    name: Annotated[Line, Field(min_length=1, max_length=128)] | None = None
    labels: dict[LabelKey, LabelValue] = Field(default={}, max_length=32, description="At most 32.")
    ttl_ms: LifetimeMs | None = Field(None, description="Delete the VM this long after its creation.")
    idle_timeout_ms: LifetimeMs | None = Field(
        None, description="Stop the VM when for this long no call was open and no process of its user lived."
    )

    @model_validator(mode="after")
    def _one_snapshot(self) -> CreateVmBody:
        if self.snapshot_id is not None and self.user_overlay_snapshot_id is not None:
            raise ValueError("snapshotId and userOverlaySnapshotId are the same field; give one")
        return self


class UpdateVmBody(Body):
    model_config = ConfigDict(json_schema_extra={"minProperties": 1})

    ttl_ms: LifetimeMs | None = Field(
        None, description="Delete the VM this long from now; null: never.", examples=[3_600_000]
    )
    idle_timeout_ms: LifetimeMs | None = Field(None, description="As at the creation; null: never stop it.")

    @model_validator(mode="after")
    def _something(self) -> UpdateVmBody:
        if not self.model_fields_set:
            raise ValueError("name at least one of ttlMs and idleTimeoutMs")
        return self


class ListVmsQuery(Query):
    state: ShownState | None = Field(None, description="Only VMs in this state.")
    label: list[str] = Field(default=[], description="`key=value`; repeat it to require several.", max_length=32)


class LogsQuery(Query):
    type: Literal["engine", "console"] = Field("engine", description="Which log.")
    tail: QueryInt = Field(200, ge=1, le=10_000, description="Lines at most, the newest.")


class ExecLogsQuery(Query):
    limit: QueryInt = Field(50, ge=1, le=1000, description="Entries at most, the newest.")
    type: CallTypeName | None = Field(None, description="Only calls of this type.")


class VmView(View):
    id: str = Field(examples=["vm-0123456789abcdef"])
    name: str | None = Field(None, description="Absent when the VM has none.")
    state: ShownState
    cpu: int
    mem_mb: int
    guest_ip: str = Field(examples=["172.16.1.7"])
    allow_ips: list[str]
    outbound_internet: bool
    engine: str = Field(examples=["gvisor"])
    isolation: Literal["hardware-vm", "emulated-vm", "application-kernel"] = Field(
        description="What separates the guest from the host."
    )
    provision_mode: Literal["boot", "snapshot"]
    image_id: str
    labels: dict[str, str]
    allow_domains: list[str]
    created_at: Timestamp
    started_at: Timestamp | None = Field(description="null before its first start.")
    boot_id: str | None = Field(description="New at each boot of the guest.")
    reason: str | None = Field(None, description="Why the VM is in ERROR or stopped by itself; absent otherwise.")
    ttl_ms: int | None = Field(None, description="Time to live as last set; absent when the VM has none.")
    expires_at: Timestamp | None = Field(None, description="When it ends; absent when the VM has none.")
    remaining_ms: int | None = Field(None, description="Until `expiresAt`; absent when the VM has none.")
    idle_timeout_ms: int | None = Field(None, description="Absent when the VM has none.")
    idle_remaining_ms: int | None = Field(
        None, description="Until the VM is stopped if nothing happens; absent unless it runs and has `idleTimeoutMs`."
    )


class LogsView(View):
    type: str
    lines: list[str]
    truncated: bool = Field(description="Older lines exist.")
    updated_at: Timestamp = Field(description="When something was written last; of an empty log, when it was made.")


class ExecLogEntryView(View):
    id: str
    type: CallTypeName
    input: str = Field(description="Command, code or path; only its head when `inputTruncated`.")
    input_truncated: bool
    exit_code: int | None
    duration_ms: int | None
    started_at: Timestamp
    finished_at: Timestamp | None = Field(description="null while it runs.")
    bytes_in: int
    bytes_out: int
    timed_out: bool
    error: str | None = Field(description="Code of the error that ended the call.")
    request_id: str
    who: str


class ExecLogsView(View):
    entries: list[ExecLogEntryView]
    has_more: bool
