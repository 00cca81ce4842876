"""Lifetimes of VMs, rights of API keys, creations that happen once."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

UTC = sa.DateTime(timezone=True)
KEY_COLUMNS = ("max_vms", "max_cpu", "max_mem_mb", "max_calls_per_minute")


def upgrade() -> None:
    op.add_column("vms", sa.Column("created_by", sa.String(length=320), nullable=True))
    op.add_column("vms", sa.Column("ttl_ms", sa.BigInteger(), nullable=True))
    op.add_column("vms", sa.Column("idle_timeout_ms", sa.BigInteger(), nullable=True))
    op.add_column("vms", sa.Column("expires_at", UTC, nullable=True))
    op.create_index(op.f("ix_vms_created_by"), "vms", ["created_by"], unique=False)
    op.create_index(op.f("ix_vms_expires_at"), "vms", ["expires_at"], unique=False)
    op.add_column("api_keys", sa.Column("scopes", sa.JSON(), nullable=True))
    op.add_column("api_keys", sa.Column("egress", sa.JSON(), nullable=True))
    for name in KEY_COLUMNS:
        op.add_column("api_keys", sa.Column(name, sa.Integer(), nullable=True))
    op.create_table(
        "idempotency_keys",
        sa.Column("who", sa.String(length=320), nullable=False),
        sa.Column("key_hash", sa.String(length=64), nullable=False),
        sa.Column("body_hash", sa.String(length=64), nullable=False),
        sa.Column("owner", sa.String(length=64), nullable=False),
        sa.Column("node_id", sa.String(length=64), nullable=False),
        sa.Column("vm_id", sa.String(length=32), nullable=True),
        sa.Column("finished", sa.Boolean(), nullable=False),
        sa.Column("created_at", UTC, nullable=False),
        sa.PrimaryKeyConstraint("who", "key_hash", name=op.f("pk_idempotency_keys")),
    )
    op.create_index(op.f("ix_idempotency_keys_created_at"), "idempotency_keys", ["created_at"], unique=False)


def downgrade() -> None:
    op.drop_index(op.f("ix_idempotency_keys_created_at"), table_name="idempotency_keys")
    op.drop_table("idempotency_keys")
    with op.batch_alter_table("api_keys") as api_keys:
        for name in (*KEY_COLUMNS, "egress", "scopes"):
            api_keys.drop_column(name)
    op.drop_index(op.f("ix_vms_expires_at"), table_name="vms")
    op.drop_index(op.f("ix_vms_created_by"), table_name="vms")
    with op.batch_alter_table("vms") as vms:
        for name in ("expires_at", "idle_timeout_ms", "ttl_ms", "created_by"):
            vms.drop_column(name)
