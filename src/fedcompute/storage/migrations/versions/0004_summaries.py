"""What became of the devices of a round, summed up once it is settled, and requests by minute: what pages show.

Rounds that are over already are summed up by the round engine, a few at a time.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_TASK = ("population_name", "task_id")
_ITERATION = (*_TASK, "iteration_id", "attempt_id")


def upgrade() -> None:
    op.add_column("iteration", sa.Column("settled_time", _time(), nullable=True))
    op.create_index(
        "ix_iteration_unsettled",
        "iteration",
        list(_TASK),
        sqlite_where=sa.text("settled_time IS NULL"),
        postgresql_where=sa.text("settled_time IS NULL"),
    )
    op.create_index("ix_iteration_population_name_created_time", "iteration", ["population_name", "created_time"])
    seconds = ("collecting", "aggregating", "applying", "completion", "training", "upload", "assignment")
    op.create_table(
        "iteration_summary",
        *_keys(_ITERATION),
        *[sa.Column(f"{name}_seconds", sa.Float(53), nullable=True) for name in seconds],
        _child_of("iteration_summary", "iteration", _ITERATION),
        sa.PrimaryKeyConstraint(*_ITERATION, name=op.f("pk_iteration_summary")),
    )
    op.create_table(
        "iteration_outcome",
        *_keys((*_ITERATION, "status")),
        sa.Column("rejection", _name(64), nullable=False),
        sa.Column("sessions", sa.BigInteger(), nullable=False),
        _child_of("iteration_outcome", "iteration", _ITERATION),
        sa.PrimaryKeyConstraint(*_ITERATION, "status", "rejection", name=op.f("pk_iteration_outcome")),
    )
    op.create_table(
        "assignment_minute",
        *_keys((*_TASK, "status")),
        sa.Column("minute", _time(), nullable=False),
        sa.Column("sessions", sa.BigInteger(), nullable=False),
        _child_of("assignment_minute", "task", _TASK),
        sa.PrimaryKeyConstraint(*_TASK, "status", "minute", name=op.f("pk_assignment_minute")),
    )
    op.create_table(
        "request_minute",
        sa.Column("minute", _time(), nullable=False),
        sa.Column("endpoint", _name(16), nullable=False),
        sa.Column("population_name", _name(64), nullable=False),
        sa.Column("result", _name(64), nullable=False),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("seconds_sum", sa.Float(53), nullable=False),
        sa.Column("seconds_max", sa.Float(53), nullable=False),
        *[sa.Column(f"bucket_{number}", sa.BigInteger(), nullable=False) for number in range(12)],
        sa.PrimaryKeyConstraint("minute", "endpoint", "population_name", "result", name=op.f("pk_request_minute")),
    )
    op.create_index("ix_request_minute_population_name_minute", "request_minute", ["population_name", "minute"])


def _keys(names: tuple[str, ...]) -> list[sa.Column[object]]:
    return [
        sa.Column(name, _name(64) if name == "population_name" else sa.BigInteger(), nullable=False) for name in names
    ]


def _child_of(table: str, parent: str, names: tuple[str, ...]) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(
        names, [f"{parent}.{name}" for name in names], name=op.f(f"fk_{table}"), ondelete="CASCADE"
    )


def _name(length: int) -> sa.String:
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")


def _time() -> sa.DateTime:
    return sa.DateTime(timezone=True)
