"""The tables. A change here needs a migration in `migrations/versions` and a new `HEAD`; a test compares them."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
)

HEAD = "0002"  # the newest migration; equal to alembic_version when nothing is to be done


class UtcDateTime(TypeDecorator[datetime]):
    """Aware UTC datetimes. SQLite keeps no zone, so they are stored as UTC there and get their zone back on reading."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("naive datetime")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

vms = Table(
    "vms",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("node_id", String(64), nullable=False, index=True),
    Column("slot", Integer, nullable=False, unique=True),
    Column("state", String(16), nullable=False),
    Column("cpu", Integer, nullable=False),
    Column("mem_mb", Integer, nullable=False),
    Column("disk_mb", Integer, nullable=False),
    Column("outbound", Boolean, nullable=False),
    Column("allow_ips", JSON, nullable=False),
    Column("allow_domains", JSON, nullable=False),
    Column("engine", String(32), nullable=False),
    Column("image_id", String(128), nullable=False),
    Column("snapshot_id", String(128)),  # empty: there are no snapshots
    Column("name", String(128)),
    Column("labels", JSON, nullable=False),
    Column("isolation", String(32), nullable=False),
    Column("provision_mode", String(16), nullable=False),
    Column("boot_id", String(64)),
    Column("reason", Text),
    Column("created_at", UtcDateTime, nullable=False),
    Column("started_at", UtcDateTime),
    Column("created_by", String(320), index=True),  # who, as in the activity; whose limits the VM counts against
    Column("ttl_ms", BigInteger),
    Column("idle_timeout_ms", BigInteger),
    Column("expires_at", UtcDateTime, index=True),
)

# One row per block of slots: where the search for a free slot goes on, so that a slot just freed is the last to be
# used again. Updating it first also makes concurrent reservations of a block wait for each other.
slot_cursors = Table(
    "slot_cursors",
    metadata,
    Column("block", Integer, primary_key=True, autoincrement=False),
    Column("last_slot", Integer, nullable=False),
)

exec_log = Table(
    "exec_log",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("id", String(32), nullable=False, unique=True),
    Column("vm_id", ForeignKey("vms.id", ondelete="CASCADE"), nullable=False),
    Column("type", String(16), nullable=False),
    Column("input", Text, nullable=False),
    Column("input_truncated", Boolean, nullable=False),
    Column("exit_code", Integer),
    Column("duration_ms", Integer),
    Column("started_at", UtcDateTime, nullable=False),
    Column("finished_at", UtcDateTime),
    Column("bytes_in", BigInteger, nullable=False),
    Column("bytes_out", BigInteger, nullable=False),
    Column("timed_out", Boolean, nullable=False),
    Column("error", String(64)),
    Column("request_id", String(64), nullable=False),
    Column("who", String(320), nullable=False),
    Index("ix_exec_log_vm_id_seq", "vm_id", "seq"),
)

activity = Table(
    "activity",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("at", UtcDateTime, nullable=False),
    Column("kind", String(32), nullable=False),
    Column("vm_id", String(32), index=True),  # no foreign key: activity outlives the VM
    Column("reason", Text),
    Column("who", String(320), nullable=False),
    Column("request_id", String(64), nullable=False),
)

sessions = Table(
    "sessions",
    metadata,
    Column("token_hash", String(64), primary_key=True),
    Column("email", String(320), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime, nullable=False, index=True),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("name", String(128), nullable=False),
    Column("secret_hash", String(64), nullable=False, unique=True),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime),
    Column("revoked_at", UtcDateTime),
    Column("last_used_at", UtcDateTime),
    Column("scopes", JSON(none_as_null=True)),  # null: what a key may do that names none
    Column("egress", JSON(none_as_null=True)),
    Column("max_vms", Integer),
    Column("max_cpu", Integer),
    Column("max_mem_mb", Integer),
    Column("max_calls_per_minute", Integer),
)

# Creations that must happen once. `vm_id` is set by the transaction that makes the VM's record, `finished` when the VM
# was given to its caller: so an unfinished row without a VM is a creation that failed or was cut short.
idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("who", String(320), primary_key=True),
    Column("key_hash", String(64), primary_key=True),
    Column("body_hash", String(64), nullable=False),
    Column("owner", String(64), nullable=False),  # the creation that works on it
    Column("node_id", String(64), nullable=False),  # the server where that runs
    Column("vm_id", String(32)),  # no foreign key: the row outlives the VM
    Column("finished", Boolean, nullable=False),
    Column("created_at", UtcDateTime, nullable=False, index=True),
)
