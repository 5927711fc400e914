"""Who may call: tokens, enrolments, API keys and the audit log; and how a round ended.

Secrets may be stored sealed from here on: `sealed_with` names the operator secret, and is empty where none was set.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("iteration", sa.Column("reason", _name(64), nullable=True))
    op.add_column("iteration", sa.Column("cleaned_time", _time(), nullable=True))
    op.add_column("iteration", sa.Column("purged_time", _time(), nullable=True))
    op.add_column("assignment", sa.Column("token_hash", _name(64), nullable=True))
    op.add_column("assignment", sa.Column("participant", _name(64), nullable=True))
    op.create_index("ix_assignment_participant", "assignment", ["participant", "population_name", "task_id"])
    for table in ("encryption_key", "server_secret"):
        op.add_column(table, sa.Column("sealed_with", _name(64), nullable=True))
    op.create_table(
        "authorization_token",
        sa.Column("token_hash", _name(64), nullable=False),
        sa.Column("owner_hash", _name(64), nullable=False),
        sa.Column("participant", _name(64), nullable=True),
        sa.Column("proof_hash", _name(64), nullable=True),
        sa.Column("created", _time(), nullable=False),
        sa.Column("expires", _time(), nullable=False),
        sa.PrimaryKeyConstraint("token_hash", name=op.f("pk_authorization_token")),
    )
    op.create_index("ix_authorization_token_expires", "authorization_token", ["expires"])
    op.create_index("uq_authorization_token_proof_hash", "authorization_token", ["proof_hash"], unique=True)
    op.create_table(
        "enrolment",
        sa.Column("id", _name(64), nullable=False),
        sa.Column("label", _name(64), nullable=False),
        sa.Column("secret", sa.LargeBinary(), nullable=False),
        sa.Column("sealed_with", _name(64), nullable=True),
        sa.Column("created", _time(), nullable=False),
        sa.Column("revoked", _time(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_enrolment")),
    )
    op.create_table(
        "api_key",
        sa.Column("id", _name(64), nullable=False),
        sa.Column("label", _name(64), nullable=False),
        sa.Column("key_hash", _name(64), nullable=False),
        sa.Column("role", _name(16), nullable=False),
        sa.Column("created", _time(), nullable=False),
        sa.Column("expires", _time(), nullable=True),
        sa.Column("revoked", _time(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_key")),
    )
    op.create_index("uq_api_key_key_hash", "api_key", ["key_hash"], unique=True)
    op.create_table(
        "audit_log",
        sa.Column("id", _name(64), nullable=False),
        sa.Column("created_time", _time(), nullable=False),
        sa.Column("actor", _name(64), nullable=False),
        sa.Column("role", _name(16), nullable=False),
        sa.Column("action", _name(64), nullable=False),
        sa.Column("subject", _name(256), nullable=False),
        sa.Column("status", sa.BigInteger(), nullable=False),
        sa.Column("request_id", _name(64), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_log")),
    )
    op.create_index("ix_audit_log_created_time", "audit_log", ["created_time"])


def _name(length: int) -> sa.String:
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")


def _time() -> sa.DateTime:
    return sa.DateTime(timezone=True)
