"""Which objects the rows of one moment refer to: what a backup must hold, and what a healthy store has."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import and_, or_, select

from fedcompute.storage import schema
from fedcompute.storage.database import Transaction
from fedcompute.storage.keys import TaskKey
from fedcompute.storage.paths import (
    AGGREGATED,
    GRADIENT,
    MODEL,
    aggregate_path,
    client_checkpoint_path,
    client_only_plan_path,
    failure_path,
    metrics_path,
    server_checkpoint_path,
    server_plan_path,
    update_path,
)
from fedcompute.storage.schema import (
    ACTIVE_ITERATION,
    ACTIVE_TASK,
    RELEASED_ITERATION,
    STARTED_TASK,
    AssignmentStatus,
    BatchStatus,
    IterationStatus,
    TaskKind,
)


@dataclass(frozen=True, order=True)
class Reference:
    """An object that a row refers to; `required` if work or people need it, else it is taken if it is there."""

    bucket: str
    path: str
    required: bool


def references(tx: Transaction) -> Iterator[Reference]:
    """Every object that matters at the moment that `tx` sees.

    Nothing that a round would compute anew is named unless its inputs are fixed: a result that was computed from
    later uploads than these rows know of must not stand beside them.
    """
    yield from _of_tasks(tx)
    yield from _of_released(tx)
    for row in tx.execute(_unreleased()).all():
        yield from _of_unreleased(tx, row)


def _of_tasks(tx: Transaction) -> Iterator[Reference]:
    table = schema.task
    for row in tx.execute(select(table.c.population_name, table.c.task_id, table.c.status, table.c.kind)):
        task, started = TaskKey(row.population_name, row.task_id), row.status in [int(one) for one in STARTED_TASK]
        yield Reference(MODEL, client_only_plan_path(task), started)
        yield Reference(MODEL, server_plan_path(task), started)
        if row.kind == TaskKind.TRAINING:
            yield Reference(MODEL, server_checkpoint_path(task, 0), started)
            yield Reference(MODEL, client_checkpoint_path(task, 0), started)
        yield Reference(MODEL, failure_path(task), False)


def _of_released(tx: Transaction) -> Iterator[Reference]:
    table = schema.iteration
    released = table.c.status.in_([int(one) for one in RELEASED_ITERATION])
    query = select(table, schema.task.c.kind).join(schema.task, _same_task()).where(released)
    for row in tx.execute(query):
        task = TaskKey(row.population_name, row.task_id)
        yield Reference(MODEL, metrics_path(task, row.result_id), False)
        if row.kind == TaskKind.TRAINING and row.purged_time is None:
            yield Reference(MODEL, server_checkpoint_path(task, row.result_id), True)
            yield Reference(MODEL, client_checkpoint_path(task, row.result_id), False)


def _unreleased() -> Any:
    """Rounds that are under way or may be tried again."""
    table, task = schema.iteration, schema.task
    other = table.alias("other")
    same = and_(*(other.c[name] == table.c[name] for name in (*schema.TASK_COLUMNS, "iteration_id")))
    released = select(other.c.attempt_id).where(same, other.c.status.in_([int(one) for one in RELEASED_ITERATION]))
    return (
        select(table, task.c.kind)
        .join(task, _same_task())
        .where(
            task.c.status.in_([int(one) for one in ACTIVE_TASK]),
            or_(
                table.c.status.in_([int(one) for one in ACTIVE_ITERATION]),
                and_(table.c.status.not_in([int(one) for one in RELEASED_ITERATION]), ~released.exists()),
            ),
        )
    )


def _of_unreleased(tx: Transaction, row: Any) -> Iterator[Reference]:
    task, result_id = TaskKey(row.population_name, row.task_id), row.result_id
    active = row.status in [int(one) for one in ACTIVE_ITERATION]
    yield Reference(MODEL, client_checkpoint_path(task, row.base_on_result_id), active)
    if row.kind == TaskKind.TRAINING:
        yield Reference(MODEL, server_checkpoint_path(task, row.base_on_result_id), active)
    if row.status in (IterationStatus.APPLYING, IterationStatus.APPLYING_FAILED):
        # Its inputs are fixed, and a result that is stored already keeps its noise.
        for path in (server_checkpoint_path, client_checkpoint_path, metrics_path):
            yield Reference(MODEL, path(task, result_id), False)
    assignment, batch = schema.assignment, schema.aggregation_batch
    of_round = and_(*(assignment.c[name] == getattr(row, name) for name in schema.ITERATION_COLUMNS))
    uploaded = (AssignmentStatus.LOCAL_COMPLETED, AssignmentStatus.UPLOAD_COMPLETED)
    held = assignment.c.status.in_([int(one) for one in uploaded])
    for one in tx.execute(select(assignment.c.session_id, assignment.c.status).where(of_round, held)):
        required = active and one.status == AssignmentStatus.UPLOAD_COMPLETED
        yield Reference(GRADIENT, update_path(task, result_id, one.session_id), required)
    of_round = and_(*(batch.c[name] == getattr(row, name) for name in schema.ITERATION_COLUMNS))
    finished = batch.c.status == int(BatchStatus.UPLOAD_COMPLETED)
    for one in tx.execute(select(batch.c.batch_id).where(of_round, finished)):
        yield Reference(AGGREGATED, aggregate_path(task, result_id, one.batch_id), active)


def _same_task() -> Any:
    table, task = schema.iteration, schema.task
    return and_(*(table.c[name] == task.c[name] for name in schema.TASK_COLUMNS))
