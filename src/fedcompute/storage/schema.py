"""Tables and status codes (spec/server.md 4 and 9).

The codes are shared with dashboards and stored data and never change. A main row carries its status, the id of its
newest history row (`status_id`) and that row's time (`status_time`), so that a transition is one conditional update.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from enum import IntEnum

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    ColumnElement,
    DateTime,
    Dialect,
    Float,
    ForeignKeyConstraint,
    Index,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    and_,
    text,
)
from sqlalchemy.types import TypeEngine

from fedcompute.protos import task_pb2
from fedcompute.storage.keys import IterationKey, TaskKey


class TaskStatus(IntEnum):
    """Database codes of a task; `TO_API` maps them to the wire's numbers (spec/server.md 4.1)."""

    OPEN = 0
    COMPLETED = 1
    CREATED = 2
    PAUSED = 3
    CANCELED = 101
    FAILED = 102


ACTIVE_TASK = (TaskStatus.CREATED, TaskStatus.OPEN, TaskStatus.PAUSED)
# With artifacts that are ready, so that a round may be under way.
STARTED_TASK = (TaskStatus.OPEN, TaskStatus.PAUSED)

TO_API: Mapping[TaskStatus, task_pb2.TaskStatus.Enum] = {
    TaskStatus.OPEN: task_pb2.TaskStatus.OPEN,
    TaskStatus.COMPLETED: task_pb2.TaskStatus.COMPLETED,
    TaskStatus.CREATED: task_pb2.TaskStatus.CREATED,
    TaskStatus.PAUSED: task_pb2.TaskStatus.PAUSED,
    TaskStatus.CANCELED: task_pb2.TaskStatus.CANCELED,
    TaskStatus.FAILED: task_pb2.TaskStatus.FAILED,
}


class TaskKind(IntEnum):
    """Which member of `TaskInfo.info` a task has."""

    TRAINING = 1
    EVALUATION = 2


class IterationStatus(IntEnum):
    """Codes of an iteration; below 50 it is active (spec/server.md 4.2)."""

    COLLECTING = 0
    AGGREGATING = 1
    APPLYING = 4
    COMPLETED = 50
    POST_PROCESSED = 51
    CANCELED = 101
    AGGREGATING_FAILED = 102
    APPLYING_FAILED = 103


ACTIVE_ITERATION = (IterationStatus.COLLECTING, IterationStatus.AGGREGATING, IterationStatus.APPLYING)
RELEASED_ITERATION = (IterationStatus.COMPLETED, IterationStatus.POST_PROCESSED)


class AssignmentStatus(IntEnum):
    """Codes of an assignment; below 100 it holds one of its iteration's places (spec/server.md 4.3)."""

    ASSIGNED = 0
    LOCAL_COMPLETED = 1
    UPLOAD_COMPLETED = 2
    CANCELED = 101
    LOCAL_FAILED = 102
    LOCAL_NOT_ELIGIBLE = 103
    REMOTE_FAILED = 104
    LOCAL_FAILED_EXAMPLE_GENERATION = 105
    LOCAL_FAILED_MODEL_COMPUTATION = 106
    LOCAL_FAILED_OPS_ERROR = 107
    LOCAL_TIMEOUT = 151
    UPLOAD_TIMEOUT = 152


class BatchStatus(IntEnum):
    """Codes of an aggregation batch (spec/server.md 4.4)."""

    FULL = 1
    PUBLISH_COMPLETED = 2
    UPLOAD_COMPLETED = 3
    FAILED = 101


class UtcDateTime(TypeDecorator[datetime]):
    """A timestamp with a time zone, UTC in and UTC out; SQLite keeps text that sorts by time."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a stored timestamp needs a time zone")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Name(TypeDecorator[str]):
    """Text of at most `length` characters (None: any) that compares and sorts by its characters' codes.

    Databases have an order of their own for text, which their operator chose. PostgreSQL takes no NUL; one becomes
    U+FFFD on the way in, so that a name with a NUL in it, which nothing has, is asked for and not found.
    """

    impl = String
    cache_ok = True

    def __init__(self, length: int | None = None) -> None:
        super().__init__(length)
        self.length = length

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[str]:
        collation = "C" if dialect.name == "postgresql" else None
        return String(self.length, collation=collation) if self.length else Text(collation=collation)

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else value.replace("\0", "\ufffd")


metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s",
    }
)

TASK_COLUMNS = ("population_name", "task_id")
ITERATION_COLUMNS = (*TASK_COLUMNS, "iteration_id", "attempt_id")
ASSIGNMENT_COLUMNS = (*ITERATION_COLUMNS, "session_id")
BATCH_COLUMNS = (*ITERATION_COLUMNS, "batch_id")


def _keys(names: tuple[str, ...]) -> list[Column[object]]:
    return [Column(name, _KEY_TYPES.get(name, BigInteger), primary_key=True, autoincrement=False) for name in names]


_KEY_TYPES = {"population_name": Name(64), "session_id": Name(64), "batch_id": Name(64)}


def _child_of(parent: str, names: tuple[str, ...]) -> ForeignKeyConstraint:
    return ForeignKeyConstraint(names, [f"{parent}.{name}" for name in names], ondelete="CASCADE")


def _status() -> list[Column[object]]:
    return [
        Column("status", BigInteger, nullable=False),
        Column("status_id", BigInteger, nullable=False),
        Column("status_time", UtcDateTime, nullable=False),
    ]


def _log(names: tuple[str, ...]) -> list[Column[object]]:
    return [
        *_keys((*names, "status_id")),
        Column("status", BigInteger, nullable=False),
        Column("created_time", UtcDateTime, nullable=False),
    ]


task = Table(
    "task",
    metadata,
    *_keys(TASK_COLUMNS),
    Column("kind", BigInteger, nullable=False),
    Column("total_iteration", BigInteger, nullable=False),
    Column("min_aggregation_size", BigInteger, nullable=False),
    Column("max_aggregation_size", BigInteger, nullable=False),
    *_status(),
    Column("created_time", UtcDateTime, nullable=False),
    Column("start_time", UtcDateTime),
    Column("stop_time", UtcDateTime),
    Column("start_task_no_earlier_than", UtcDateTime),
    Column("do_not_create_iteration_after", UtcDateTime),
    Column("max_parallel", BigInteger, nullable=False),
    Column("correlation_id", Name(), nullable=False),
    Column("min_client_version", Name(32), nullable=False),
    Column("max_client_version", Name(32), nullable=False),
    Column("info", JSON, nullable=False),
    Column("reason", Name(64)),
    Index("ix_task_status", "status"),
    # The rule "one active task of a kind in a population" belongs to the database: two creators cannot both win.
    Index(
        "uq_task_active_kind",
        "population_name",
        "kind",
        unique=True,
        sqlite_where=text("status IN (0, 2, 3)"),
        postgresql_where=text("status IN (0, 2, 3)"),
    ),
)

task_status_history = Table("task_status_history", metadata, *_log(TASK_COLUMNS), _child_of("task", TASK_COLUMNS))

iteration = Table(
    "iteration",
    metadata,
    *_keys(ITERATION_COLUMNS),
    *_status(),
    Column("created_time", UtcDateTime, nullable=False),
    Column("base_iteration_id", BigInteger, nullable=False),
    Column("base_on_result_id", BigInteger, nullable=False),
    Column("report_goal", BigInteger, nullable=False),
    Column("expiration_time", UtcDateTime),
    Column("result_id", BigInteger, nullable=False),
    Column("info", JSON, nullable=False),
    Column("aggregation_level", BigInteger, nullable=False),
    Column("max_aggregation_size", BigInteger, nullable=False),
    Column("min_client_version", Name(32), nullable=False),
    Column("max_client_version", Name(32), nullable=False),
    Column("reason", Name(64)),
    # See `storage.retention`.
    Column("cleaned_time", UtcDateTime),
    Column("purged_time", UtcDateTime),
    # When it was summed up; see `storage.summaries`.
    Column("settled_time", UtcDateTime),
    _child_of("task", TASK_COLUMNS),
    Index("ix_iteration_status", "status"),
    Index(
        "ix_iteration_unsettled",
        *TASK_COLUMNS,
        sqlite_where=text("settled_time IS NULL"),
        postgresql_where=text("settled_time IS NULL"),
    ),
    Index("ix_iteration_population_name_status", "population_name", "status"),
    Index("ix_iteration_population_name_created_time", "population_name", "created_time"),
)

iteration_status_history = Table(
    "iteration_status_history",
    metadata,
    *_log(ITERATION_COLUMNS),
    Column("aggregation_level", BigInteger, nullable=False),
    _child_of("iteration", ITERATION_COLUMNS),
    Index("ix_iteration_status_history_task_status", *TASK_COLUMNS, "status", "created_time"),
)

assignment = Table(
    "assignment",
    metadata,
    *_keys(ASSIGNMENT_COLUMNS),
    *_status(),
    Column("created_time", UtcDateTime, nullable=False),
    Column("correlation_id", Name(), nullable=False),
    Column("batch_id", Name(64)),
    Column("rejection", Name(64)),
    Column("token_hash", Name(64)),
    Column("participant", Name(64)),
    _child_of("iteration", ITERATION_COLUMNS),
    # The wire names a session without its attempt, so a session is found by its id alone.
    Index("uq_assignment_session_id", "session_id", unique=True),
    Index("ix_assignment_iteration_status", *ITERATION_COLUMNS, "status", "batch_id"),
    Index("ix_assignment_status_status_time", "status", "status_time"),
    Index("ix_assignment_participant", "participant", *TASK_COLUMNS),
)

assignment_status_history = Table(
    "assignment_status_history",
    metadata,
    *_log(ASSIGNMENT_COLUMNS),
    Column("batch_id", Name(64)),
    Column("rejection", Name(64)),
    _child_of("assignment", ASSIGNMENT_COLUMNS),
)

# What became of the devices of an attempt that is settled, and how long it took: see `storage.summaries`.
iteration_summary = Table(
    "iteration_summary",
    metadata,
    *_keys(ITERATION_COLUMNS),
    Column("collecting_seconds", Float(53)),
    Column("aggregating_seconds", Float(53)),
    Column("applying_seconds", Float(53)),
    Column("completion_seconds", Float(53)),
    Column("training_seconds", Float(53)),
    Column("upload_seconds", Float(53)),
    Column("assignment_seconds", Float(53)),
    _child_of("iteration", ITERATION_COLUMNS),
)

iteration_outcome = Table(
    "iteration_outcome",
    metadata,
    *_keys((*ITERATION_COLUMNS, "status")),
    # Empty where nothing was rejected.
    Column("rejection", Name(64), primary_key=True),
    Column("sessions", BigInteger, nullable=False),
    _child_of("iteration", ITERATION_COLUMNS),
)

assignment_minute = Table(
    "assignment_minute",
    metadata,
    *_keys((*TASK_COLUMNS, "status")),
    Column("minute", UtcDateTime, primary_key=True),
    Column("sessions", BigInteger, nullable=False),
    _child_of("task", TASK_COLUMNS),
)

aggregation_batch = Table(
    "aggregation_batch",
    metadata,
    *_keys(BATCH_COLUMNS),
    *_status(),
    Column("created_time", UtcDateTime, nullable=False),
    Column("aggregation_level", BigInteger, nullable=False),
    Column("batch_size", BigInteger, nullable=False),
    Column("accepted_size", BigInteger),
    # `{population}/{task}/{iteration}/{attempt}` of a 64-character population needs more than 64 characters.
    Column("created_by_partition", Name(160), nullable=False),
    Column("aggregated_by", Name(64)),
    _child_of("iteration", ITERATION_COLUMNS),
    Index("ix_aggregation_batch_iteration_status", *ITERATION_COLUMNS, "aggregation_level", "status"),
)

aggregation_batch_status_history = Table(
    "aggregation_batch_status_history",
    metadata,
    *_log(BATCH_COLUMNS),
    Column("aggregation_level", BigInteger, nullable=False),
    Column("created_by_partition", Name(160), nullable=False),
    Column("aggregated_by", Name(64)),
    Column("accepted_size", BigInteger),
    _child_of("aggregation_batch", BATCH_COLUMNS),
)

model_metrics = Table(
    "model_metrics",
    metadata,
    *_keys((*TASK_COLUMNS, "iteration_id")),
    Column("metric_name", Name(), primary_key=True),
    Column("metric_value", Float(53)),
    Column("created_time", UtcDateTime, nullable=False),
    _child_of("task", TASK_COLUMNS),
    Index("ix_model_metrics_created_time", "created_time"),
)

# No foreign key: what was spent stays spent when a task's rows go.
privacy_ledger = Table(
    "privacy_ledger",
    metadata,
    Column("population_name", Name(64), primary_key=True),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("task_id", BigInteger, nullable=False),
    Column("iteration_id", BigInteger, nullable=False),
    Column("released", Name(16), nullable=False),
    Column("mechanism", Name(32), nullable=False),
    Column("event", JSON(none_as_null=True)),
    Column("claim", JSON(none_as_null=True)),
    Column("clip_norm", Float(53)),
    Column("report_goal", BigInteger, nullable=False),
    Column("contributions", BigInteger, nullable=False),
    Column("cumulative_epsilon", Float(53)),
    Column("delta", Float(53), nullable=False),
    Column("created_time", UtcDateTime, nullable=False),
    Column("previous_hash", Name(64), nullable=False),
    Column("hash", Name(64), nullable=False),
    # One round releases one thing once, whatever is delivered twice.
    Index("uq_privacy_ledger_release", "population_name", "task_id", "iteration_id", "released", unique=True),
)

privacy_budget = Table(
    "privacy_budget",
    metadata,
    Column("population_name", Name(64), primary_key=True),
    Column("epsilon", Float(53), nullable=False),
    Column("delta", Float(53), nullable=False),
    Column("assumption", Name(32), nullable=False),
    Column("created_time", UtcDateTime, nullable=False),
)

idempotency = Table(
    "idempotency",
    metadata,
    Column("key_hash", Name(64), primary_key=True),
    Column("session_id", Name(64), nullable=False),
    Column("expires", UtcDateTime, nullable=False),
    Index("ix_idempotency_expires", "expires"),
)

encryption_key = Table(
    "encryption_key",
    metadata,
    Column("id", Name(64), primary_key=True),
    Column("public_key", LargeBinary, nullable=False),
    Column("private_key", LargeBinary, nullable=False),
    Column("sealed_with", Name(64)),
    Column("created", UtcDateTime, nullable=False),
    Column("expires", UtcDateTime, nullable=False),
    Column("published_until", UtcDateTime, nullable=False),
)

server_secret = Table(
    "server_secret",
    metadata,
    Column("name", Name(64), primary_key=True),
    Column("value", LargeBinary, nullable=False),
    Column("sealed_with", Name(64)),
    Column("created", UtcDateTime, nullable=False),
)

# Tokens are bearer secrets that devices choose: stored as SHA-256, bound to their owner's digest.
authorization_token = Table(
    "authorization_token",
    metadata,
    Column("token_hash", Name(64), primary_key=True),
    Column("owner_hash", Name(64), nullable=False),
    Column("participant", Name(64)),
    # What the token was granted for; unique, so that one proof makes one token.
    Column("proof_hash", Name(64)),
    Column("created", UtcDateTime, nullable=False),
    Column("expires", UtcDateTime, nullable=False),
    Index("ix_authorization_token_expires", "expires"),
    Index("uq_authorization_token_proof_hash", "proof_hash", unique=True),
)

enrolment = Table(
    "enrolment",
    metadata,
    Column("id", Name(64), primary_key=True),
    Column("label", Name(64), nullable=False),
    Column("secret", LargeBinary, nullable=False),
    Column("sealed_with", Name(64)),
    Column("created", UtcDateTime, nullable=False),
    Column("revoked", UtcDateTime),
)

api_key = Table(
    "api_key",
    metadata,
    Column("id", Name(64), primary_key=True),
    Column("label", Name(64), nullable=False),
    Column("key_hash", Name(64), nullable=False),
    Column("role", Name(16), nullable=False),
    Column("created", UtcDateTime, nullable=False),
    Column("expires", UtcDateTime),
    Column("revoked", UtcDateTime),
    Index("uq_api_key_key_hash", "key_hash", unique=True),
)

# Requests of devices by minute, for charts over days and several servers: see `storage.request_minutes`.
request_minute = Table(
    "request_minute",
    metadata,
    Column("minute", UtcDateTime, primary_key=True),
    Column("endpoint", Name(16), primary_key=True),
    Column("population_name", Name(64), primary_key=True),
    Column("result", Name(64), primary_key=True),
    Column("requests", BigInteger, nullable=False),
    Column("seconds_sum", Float(53), nullable=False),
    Column("seconds_max", Float(53), nullable=False),
    *[Column(f"bucket_{number}", BigInteger, nullable=False) for number in range(12)],
    Index("ix_request_minute_population_name_minute", "population_name", "minute"),
)

# No foreign key: what was done stays on record when what it was done to goes.
audit_log = Table(
    "audit_log",
    metadata,
    Column("id", Name(64), primary_key=True),
    Column("created_time", UtcDateTime, nullable=False),
    Column("actor", Name(64), nullable=False),
    Column("role", Name(16), nullable=False),
    Column("action", Name(64), nullable=False),
    Column("subject", Name(256), nullable=False),
    Column("status", BigInteger, nullable=False),
    Column("request_id", Name(64), nullable=False),
    Index("ix_audit_log_created_time", "created_time"),
)

lease = Table(
    "lease",
    metadata,
    Column("name", Name(200), primary_key=True),
    Column("holder", Name(64), nullable=False),
    Column("expires", UtcDateTime, nullable=False),
)


def of_task(table: Table, key: TaskKey) -> ColumnElement[bool]:
    """The condition that a row of `table` belongs to a task."""
    return and_(table.c.population_name == key.population, table.c.task_id == key.task_id)


def of_iteration(table: Table, key: IterationKey) -> ColumnElement[bool]:
    """The condition that a row of `table` belongs to an attempt of an iteration."""
    return and_(
        of_task(table, key.task), table.c.iteration_id == key.iteration_id, table.c.attempt_id == key.attempt_id
    )
