"""The first schema (spec/server.md 9, and our ledger, idempotency, keys, secrets and leases)."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "encryption_key",
        sa.Column("id", _name(64), nullable=False),
        sa.Column("public_key", sa.LargeBinary(), nullable=False),
        sa.Column("private_key", sa.LargeBinary(), nullable=False),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires", sa.DateTime(timezone=True), nullable=False),
        sa.Column("published_until", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_encryption_key")),
    )
    op.create_table(
        "idempotency",
        sa.Column("key_hash", _name(64), nullable=False),
        sa.Column("session_id", _name(64), nullable=False),
        sa.Column("expires", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("key_hash", name=op.f("pk_idempotency")),
    )
    op.create_index("ix_idempotency_expires", "idempotency", ["expires"], unique=False)
    op.create_table(
        "lease",
        sa.Column("name", _name(200), nullable=False),
        sa.Column("holder", _name(64), nullable=False),
        sa.Column("expires", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_lease")),
    )
    op.create_table(
        "privacy_ledger",
        sa.Column("population_name", _name(64), autoincrement=False, nullable=False),
        sa.Column("task_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("iteration_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("event", sa.JSON(), nullable=False),
        sa.Column("clip_norm", sa.Float(precision=53), nullable=True),
        sa.Column("report_goal", sa.BigInteger(), nullable=False),
        sa.Column("contributions", sa.BigInteger(), nullable=False),
        sa.Column("created_time", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("population_name", "task_id", "iteration_id", name=op.f("pk_privacy_ledger")),
    )
    op.create_table(
        "server_secret",
        sa.Column("name", _name(64), nullable=False),
        sa.Column("value", sa.LargeBinary(), nullable=False),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_server_secret")),
    )
    op.create_table(
        "task",
        sa.Column("population_name", _name(64), autoincrement=False, nullable=False),
        sa.Column("task_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("kind", sa.BigInteger(), nullable=False),
        sa.Column("total_iteration", sa.BigInteger(), nullable=False),
        sa.Column("min_aggregation_size", sa.BigInteger(), nullable=False),
        sa.Column("max_aggregation_size", sa.BigInteger(), nullable=False),
        sa.Column("status", sa.BigInteger(), nullable=False),
        sa.Column("status_id", sa.BigInteger(), nullable=False),
        sa.Column("status_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("start_time", sa.DateTime(timezone=True), nullable=True),
        sa.Column("stop_time", sa.DateTime(timezone=True), nullable=True),
        sa.Column("start_task_no_earlier_than", sa.DateTime(timezone=True), nullable=True),
        sa.Column("do_not_create_iteration_after", sa.DateTime(timezone=True), nullable=True),
        sa.Column("max_parallel", sa.BigInteger(), nullable=False),
        sa.Column("correlation_id", _name(), nullable=False),
        sa.Column("min_client_version", _name(32), nullable=False),
        sa.Column("max_client_version", _name(32), nullable=False),
        sa.Column("info", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("population_name", "task_id", name=op.f("pk_task")),
    )
    op.create_index("ix_task_status", "task", ["status"], unique=False)
    op.create_index(
        "uq_task_active_kind",
        "task",
        ["population_name", "kind"],
        unique=True,
        sqlite_where=sa.text("status IN (0, 2, 3)"),
        postgresql_where=sa.text("status IN (0, 2, 3)"),
    )
    op.create_table(
        "iteration",
        sa.Column("population_name", _name(64), autoincrement=False, nullable=False),
        sa.Column("task_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("iteration_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("attempt_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("status", sa.BigInteger(), nullable=False),
        sa.Column("status_id", sa.BigInteger(), nullable=False),
        sa.Column("status_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("base_iteration_id", sa.BigInteger(), nullable=False),
        sa.Column("base_on_result_id", sa.BigInteger(), nullable=False),
        sa.Column("report_goal", sa.BigInteger(), nullable=False),
        sa.Column("expiration_time", sa.DateTime(timezone=True), nullable=True),
        sa.Column("result_id", sa.BigInteger(), nullable=False),
        sa.Column("info", sa.JSON(), nullable=False),
        sa.Column("aggregation_level", sa.BigInteger(), nullable=False),
        sa.Column("max_aggregation_size", sa.BigInteger(), nullable=False),
        sa.Column("min_client_version", _name(32), nullable=False),
        sa.Column("max_client_version", _name(32), nullable=False),
        sa.ForeignKeyConstraint(
            ["population_name", "task_id"],
            ["task.population_name", "task.task_id"],
            name=op.f("fk_iteration"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("population_name", "task_id", "iteration_id", "attempt_id", name=op.f("pk_iteration")),
    )
    op.create_index("ix_iteration_population_name_status", "iteration", ["population_name", "status"], unique=False)
    op.create_index("ix_iteration_status", "iteration", ["status"], unique=False)
    op.create_table(
        "model_metrics",
        sa.Column("population_name", _name(64), autoincrement=False, nullable=False),
        sa.Column("task_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("iteration_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("metric_name", _name(), nullable=False),
        sa.Column("metric_value", sa.Float(precision=53), nullable=True),
        sa.Column("created_time", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["population_name", "task_id"],
            ["task.population_name", "task.task_id"],
            name=op.f("fk_model_metrics"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint(
            "population_name", "task_id", "iteration_id", "metric_name", name=op.f("pk_model_metrics")
        ),
    )
    op.create_index("ix_model_metrics_created_time", "model_metrics", ["created_time"], unique=False)
    op.create_table(
        "task_status_history",
        sa.Column("population_name", _name(64), autoincrement=False, nullable=False),
        sa.Column("task_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("status_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("status", sa.BigInteger(), nullable=False),
        sa.Column("created_time", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["population_name", "task_id"],
            ["task.population_name", "task.task_id"],
            name=op.f("fk_task_status_history"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("population_name", "task_id", "status_id", name=op.f("pk_task_status_history")),
    )
    op.create_table(
        "aggregation_batch",
        sa.Column("population_name", _name(64), autoincrement=False, nullable=False),
        sa.Column("task_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("iteration_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("attempt_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("batch_id", _name(64), autoincrement=False, nullable=False),
        sa.Column("status", sa.BigInteger(), nullable=False),
        sa.Column("status_id", sa.BigInteger(), nullable=False),
        sa.Column("status_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("aggregation_level", sa.BigInteger(), nullable=False),
        sa.Column("batch_size", sa.BigInteger(), nullable=False),
        sa.Column("accepted_size", sa.BigInteger(), nullable=True),
        sa.Column("created_by_partition", _name(160), nullable=False),
        sa.Column("aggregated_by", _name(64), nullable=True),
        sa.ForeignKeyConstraint(
            ["population_name", "task_id", "iteration_id", "attempt_id"],
            ["iteration.population_name", "iteration.task_id", "iteration.iteration_id", "iteration.attempt_id"],
            name=op.f("fk_aggregation_batch"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint(
            "population_name", "task_id", "iteration_id", "attempt_id", "batch_id", name=op.f("pk_aggregation_batch")
        ),
    )
    op.create_index(
        "ix_aggregation_batch_iteration_status",
        "aggregation_batch",
        ["population_name", "task_id", "iteration_id", "attempt_id", "aggregation_level", "status"],
        unique=False,
    )
    op.create_table(
        "assignment",
        sa.Column("population_name", _name(64), autoincrement=False, nullable=False),
        sa.Column("task_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("iteration_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("attempt_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("session_id", _name(64), autoincrement=False, nullable=False),
        sa.Column("status", sa.BigInteger(), nullable=False),
        sa.Column("status_id", sa.BigInteger(), nullable=False),
        sa.Column("status_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("correlation_id", _name(), nullable=False),
        sa.Column("batch_id", _name(64), nullable=True),
        sa.Column("rejection", _name(64), nullable=True),
        sa.ForeignKeyConstraint(
            ["population_name", "task_id", "iteration_id", "attempt_id"],
            ["iteration.population_name", "iteration.task_id", "iteration.iteration_id", "iteration.attempt_id"],
            name=op.f("fk_assignment"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint(
            "population_name", "task_id", "iteration_id", "attempt_id", "session_id", name=op.f("pk_assignment")
        ),
    )
    op.create_index(
        "ix_assignment_iteration_status",
        "assignment",
        ["population_name", "task_id", "iteration_id", "attempt_id", "status", "batch_id"],
        unique=False,
    )
    op.create_index("ix_assignment_status_status_time", "assignment", ["status", "status_time"], unique=False)
    op.create_index("uq_assignment_session_id", "assignment", ["session_id"], unique=True)
    op.create_table(
        "iteration_status_history",
        sa.Column("population_name", _name(64), autoincrement=False, nullable=False),
        sa.Column("task_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("iteration_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("attempt_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("status_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("status", sa.BigInteger(), nullable=False),
        sa.Column("created_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("aggregation_level", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["population_name", "task_id", "iteration_id", "attempt_id"],
            ["iteration.population_name", "iteration.task_id", "iteration.iteration_id", "iteration.attempt_id"],
            name=op.f("fk_iteration_status_history"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint(
            "population_name",
            "task_id",
            "iteration_id",
            "attempt_id",
            "status_id",
            name=op.f("pk_iteration_status_history"),
        ),
    )
    op.create_index(
        "ix_iteration_status_history_task_status",
        "iteration_status_history",
        ["population_name", "task_id", "status", "created_time"],
        unique=False,
    )
    op.create_table(
        "aggregation_batch_status_history",
        sa.Column("population_name", _name(64), autoincrement=False, nullable=False),
        sa.Column("task_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("iteration_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("attempt_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("batch_id", _name(64), autoincrement=False, nullable=False),
        sa.Column("status_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("status", sa.BigInteger(), nullable=False),
        sa.Column("created_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("aggregation_level", sa.BigInteger(), nullable=False),
        sa.Column("created_by_partition", _name(160), nullable=False),
        sa.Column("aggregated_by", _name(64), nullable=True),
        sa.Column("accepted_size", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(
            ["population_name", "task_id", "iteration_id", "attempt_id", "batch_id"],
            [
                "aggregation_batch.population_name",
                "aggregation_batch.task_id",
                "aggregation_batch.iteration_id",
                "aggregation_batch.attempt_id",
                "aggregation_batch.batch_id",
            ],
            name=op.f("fk_aggregation_batch_status_history"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint(
            "population_name",
            "task_id",
            "iteration_id",
            "attempt_id",
            "batch_id",
            "status_id",
            name=op.f("pk_aggregation_batch_status_history"),
        ),
    )
    op.create_table(
        "assignment_status_history",
        sa.Column("population_name", _name(64), autoincrement=False, nullable=False),
        sa.Column("task_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("iteration_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("attempt_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("session_id", _name(64), autoincrement=False, nullable=False),
        sa.Column("status_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("status", sa.BigInteger(), nullable=False),
        sa.Column("created_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("batch_id", _name(64), nullable=True),
        sa.Column("rejection", _name(64), nullable=True),
        sa.ForeignKeyConstraint(
            ["population_name", "task_id", "iteration_id", "attempt_id", "session_id"],
            [
                "assignment.population_name",
                "assignment.task_id",
                "assignment.iteration_id",
                "assignment.attempt_id",
                "assignment.session_id",
            ],
            name=op.f("fk_assignment_status_history"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint(
            "population_name",
            "task_id",
            "iteration_id",
            "attempt_id",
            "session_id",
            "status_id",
            name=op.f("pk_assignment_status_history"),
        ),
    )


def _name(length: int | None = None) -> sa.types.TypeEngine[str]:
    if length is None:
        return sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")
