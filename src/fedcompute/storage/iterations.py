"""Iterations: creation, look-ups, moves, and the release that ends one (spec/server.md 4.2, 5.3, 5.4)."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from google.protobuf.json_format import MessageToDict, ParseDict
from sqlalchemy import ColumnElement, Row, Table, func, or_, select, tuple_
from sqlalchemy.exc import IntegrityError

from fedcompute.errors import Reason
from fedcompute.privacy.chain import Release
from fedcompute.protos import task_pb2
from fedcompute.storage import schema, transitions
from fedcompute.storage.assignments import chunks
from fedcompute.storage.database import Transaction, lock_population
from fedcompute.storage.keys import IterationKey, TaskKey
from fedcompute.storage.releases import LedgerMoved, Standing, append_releases, record_metrics, standing_of
from fedcompute.storage.schema import AssignmentStatus, BatchStatus, IterationStatus, TaskStatus
from fedcompute.storage.tasks import TaskRow, complete_task, task_row

LIST_LIMIT = 1000
AGGREGATION_LEVELS = {IterationStatus.COLLECTING: 0, IterationStatus.AGGREGATING: 1, IterationStatus.APPLYING: 2}


@dataclass(frozen=True)
class NewIteration:
    """What an iteration is created with; it starts in COLLECTING."""

    key: IterationKey
    base_iteration_id: int
    base_on_result_id: int  # whose client checkpoint devices get
    result_id: int
    report_goal: int  # contributions
    max_aggregation_size: int  # assignments that hold a place
    min_client_version: str
    max_client_version: str
    info: task_pb2.IterationInfo
    expires: datetime | None = None


@dataclass(frozen=True)
class IterationRow:
    """One attempt of one round as stored; `entered` is when its present status began, UTC."""

    key: IterationKey
    status: IterationStatus
    aggregation_level: int
    base_iteration_id: int
    base_on_result_id: int
    result_id: int
    report_goal: int
    max_aggregation_size: int
    min_client_version: str
    max_client_version: str
    info: task_pb2.IterationInfo
    created: datetime
    entered: datetime
    expires: datetime | None
    reason: str | None = None  # code of why this attempt ended without a release


def next_iteration(
    task: TaskRow,
    last: IterationRow | None,
    *,
    training_iteration_id: int | None = None,
    released: int | None = None,
    expires: datetime | None = None,
) -> NewIteration:
    """The iteration that follows `last` (None: the first one), as spec/server.md 5.4 derives it from the task.

    `released`: the round whose model the devices of a training round start from, if it is not `last`: where rounds
    overlap. An evaluation needs `training_iteration_id`, the released training iteration that it measures; training
    takes none. Raises ValueError otherwise.
    """
    if task.is_training == (training_iteration_id is not None):
        raise ValueError("training_iteration_id belongs to evaluation tasks, and they need it")
    last_id = 0 if last is None else last.key.iteration_id
    iteration_id = last_id + 1
    newest = last_id if released is None else released
    base = newest if task.is_training else iteration_id
    return NewIteration(
        key=IterationKey(task.key.population, task.key.task_id, iteration_id),
        base_iteration_id=base,
        base_on_result_id=base,
        result_id=iteration_id,
        report_goal=task.min_aggregation_size,
        max_aggregation_size=task.max_aggregation_size,
        min_client_version=task.min_client_version,
        max_client_version=task.max_client_version,
        info=task_pb2.IterationInfo(task_info=task.info, evaluation_training_iteration_id=training_iteration_id or 0),
        expires=expires,
    )


def create_iteration(tx: Transaction, new: NewIteration, now: datetime) -> bool:
    """Opens an iteration in COLLECTING; False, and nothing written, if it exists or its task is not OPEN."""
    task = schema.task
    lock_population(tx, new.key.population)
    status = tx.execute(select(task.c.status).where(schema.of_task(task, new.key.task))).scalar_one_or_none()
    if status != TaskStatus.OPEN:
        return False
    values = {
        "population_name": new.key.population,
        "task_id": new.key.task_id,
        "iteration_id": new.key.iteration_id,
        "attempt_id": new.key.attempt_id,
        "base_iteration_id": new.base_iteration_id,
        "base_on_result_id": new.base_on_result_id,
        "result_id": new.result_id,
        "report_goal": new.report_goal,
        "max_aggregation_size": new.max_aggregation_size,
        "min_client_version": new.min_client_version,
        "max_client_version": new.max_client_version,
        "info": MessageToDict(new.info),
        "expiration_time": new.expires,
        "aggregation_level": 0,
    }
    try:
        with tx.begin_nested():
            transitions.enter(tx, transitions.ITERATION, values, IterationStatus.COLLECTING, now)
    except IntegrityError:
        return False
    return True


def get_iteration(tx: Transaction, key: IterationKey) -> IterationRow | None:
    """The iteration, or None."""
    row = tx.execute(select(schema.iteration).where(schema.of_iteration(schema.iteration, key))).one_or_none()
    return None if row is None else iteration_row(row)


def newest_iteration(tx: Transaction, task: TaskKey) -> IterationRow | None:
    """The iteration with the largest id, then attempt; None before the first."""
    found = iterations_of(tx, task, limit=1, newest_first=True)
    return found[0] if found else None


def iterations_of(
    tx: Transaction,
    task: TaskKey,
    *,
    after: tuple[int, int] | None = None,
    limit: int = LIST_LIMIT,
    newest_first: bool = False,
) -> list[IterationRow]:
    """A task's iterations by id and attempt, at most `limit`; only what is later than `after`, an id and an attempt."""
    table = schema.iteration
    order = [table.c.iteration_id, table.c.attempt_id]
    ordered = [column.desc() for column in order] if newest_first else order
    query = select(table).where(schema.of_task(table, task)).order_by(*ordered).limit(limit)
    if after is not None:
        same = (table.c.iteration_id == after[0]) & (table.c.attempt_id > after[1])
        query = query.where((table.c.iteration_id > after[0]) | same)
    return [iteration_row(row) for row in tx.execute(query)]


def active_iterations(tx: Transaction, task: TaskKey) -> list[IterationRow]:
    """A task's rounds under way, by id."""
    rows = list_iterations(tx, statuses=schema.ACTIVE_ITERATION, task=task)
    return sorted(rows, key=lambda one: one.key)


def tasks_to_advance(tx: Transaction, *, after: TaskKey | None = None, limit: int = LIST_LIMIT) -> list[TaskRow]:
    """OPEN and PAUSED tasks without a round under way, or that may have several, by key, at most `limit`."""
    table, rounds = schema.task, schema.iteration
    of_same_task = (
        rounds.c.population_name == table.c.population_name,
        rounds.c.task_id == table.c.task_id,
        rounds.c.status.in_([int(status) for status in schema.ACTIVE_ITERATION]),
    )
    under_way = select(func.count()).where(*of_same_task).scalar_subquery()
    query = (
        select(table)
        .where(
            table.c.status.in_([int(status) for status in schema.STARTED_TASK]),
            or_(~select(rounds.c.task_id).where(*of_same_task).exists(), under_way < table.c.max_parallel),
        )
        .order_by(table.c.population_name, table.c.task_id)
        .limit(limit)
    )
    if after is not None:
        query = query.where(tuple_(table.c.population_name, table.c.task_id) > (after.population, after.task_id))
    return [task_row(row) for row in tx.execute(query)]


def newest_release(tx: Transaction, task: TaskKey) -> int:
    """The id of a task's last released round; 0 before the first."""
    table = schema.iteration
    done = [int(IterationStatus.COMPLETED), int(IterationStatus.POST_PROCESSED)]
    query = select(func.max(table.c.iteration_id)).where(schema.of_task(table, task), table.c.status.in_(done))
    return tx.execute(query).scalar() or 0


def expired_iterations(
    tx: Transaction, now: datetime, *, key: IterationKey | None = None, limit: int = LIST_LIMIT
) -> list[IterationRow]:
    """Collecting rounds of OPEN tasks whose `expires` has come, at most `limit`; `key` asks about one."""
    table, task = schema.iteration, schema.task
    query = (
        select(table)
        .join(task, (task.c.population_name == table.c.population_name) & (task.c.task_id == table.c.task_id))
        .where(
            table.c.status == int(IterationStatus.COLLECTING),
            table.c.expiration_time <= now,
            task.c.status == int(TaskStatus.OPEN),
        )
        .order_by(table.c.expiration_time)
        .limit(limit)
    )
    if key is not None:
        query = query.where(schema.of_iteration(table, key))
    return [iteration_row(row) for row in tx.execute(query)]


def busy_iterations(tx: Transaction, sessions: Collection[str] = ()) -> set[IterationKey]:
    """Collecting rounds in which something can be done: with a batch in a job, or with uploads that no batch holds.

    Uploads that are not collected yet are those of `sessions`.
    """
    table, batch, assignment = schema.iteration, schema.aggregation_batch, schema.assignment
    keys = [table.c[name] for name in schema.ITERATION_COLUMNS]

    def held_by(other: Table, *conditions: ColumnElement[bool]) -> ColumnElement[bool]:
        same = [other.c[name] == table.c[name] for name in schema.ITERATION_COLUMNS]
        return select(other.c.status).where(*same, *conditions).exists()

    collecting = select(*keys).where(table.c.status == int(IterationStatus.COLLECTING))
    in_jobs = batch.c.status.in_([int(BatchStatus.FULL), int(BatchStatus.PUBLISH_COMPLETED)])
    loose = [assignment.c.status == int(AssignmentStatus.UPLOAD_COMPLETED), assignment.c.batch_id.is_(None)]
    arrived = select(*[assignment.c[name] for name in schema.ITERATION_COLUMNS]).where(
        assignment.c.status == int(AssignmentStatus.LOCAL_COMPLETED)
    )
    queries = [collecting.where(or_(held_by(batch, in_jobs), held_by(assignment, *loose)))]
    queries += [arrived.where(assignment.c.session_id.in_(chunk)).distinct() for chunk in chunks(sorted(sessions))]
    return {IterationKey(*row) for query in queries for row in tx.execute(query)}


def list_iterations(
    tx: Transaction,
    *,
    statuses: Collection[IterationStatus],
    task: TaskKey | None = None,
    limit: int = LIST_LIMIT,
) -> list[IterationRow]:
    """Iterations in any of `statuses`, longest in their status first so that none starves; at most `limit`."""
    table = schema.iteration
    query = (
        select(table)
        .where(table.c.status.in_([int(status) for status in statuses]))
        .order_by(table.c.status_time, *[table.c[name] for name in schema.ITERATION_COLUMNS])
        .limit(limit)
    )
    if task is not None:
        query = query.where(schema.of_task(table, task))
    return [iteration_row(row) for row in tx.execute(query)]


def move_iteration(
    tx: Transaction,
    key: IterationKey,
    from_status: IterationStatus,
    to_status: IterationStatus,
    now: datetime,
    *,
    reason: Reason | None = None,
) -> bool:
    """Moves one iteration and sets the aggregation level of its new status; False if it was not in `from_status`.

    `reason`: why it ends without a release, if it does.
    """
    lock_population(tx, key.population)
    changes: dict[str, Any] = (
        {"aggregation_level": AGGREGATION_LEVELS[to_status]} if to_status in AGGREGATION_LEVELS else {}
    )
    if reason is not None:
        changes["reason"] = reason.value
    where = [schema.of_iteration(schema.iteration, key)]
    return bool(transitions.move(tx, transitions.ITERATION, where, from_status, to_status, now, **changes))


def close_and_open_next(
    tx: Transaction,
    key: IterationKey,
    *,
    metrics: Mapping[str, float | None],
    releases: Sequence[Release],
    standing: Standing | None,
    following: NewIteration | None,
    now: datetime,
    end: Reason | None = None,
) -> bool:
    """Releases an iteration: APPLYING -> COMPLETED, its metrics, its ledger entries, and what comes next, or nothing.

    What comes next: with `following` None and the iteration id at the task's total, or with a reason in `end`, the
    task completes; with neither (an evaluation without a checkpoint) the task stays OPEN; else `following` opens. A
    PAUSED task completes with its last iteration and otherwise stays PAUSED: `following` and `end` wait.
    `standing`: see `append_releases`. False, and nothing written, if the iteration was not APPLYING or its successor
    exists already: another worker was first. Raises LedgerMoved if the standing is no longer true, ValueError if
    `following` or one of `releases` belongs to another iteration, and whatever the database raises; the transaction
    is then back where it was.

    Formal guarantees: for one iteration at most one entry is ever stored for each thing that it releases, and an
    iteration is COMPLETED with a release only in the transaction that stores the entries given for it.
    """
    if following is not None and (following.key.task != key.task or following.key.iteration_id != key.iteration_id + 1):
        raise ValueError(f"{following.key} does not follow {key}")
    # Before the savepoint: going back to it would give the lock away.
    lock_population(tx, key.population)
    savepoint = tx.begin_nested()
    try:
        closed = _close(tx, key, metrics, releases, standing, following, now, end)
    except BaseException:
        savepoint.rollback()
        raise
    if closed:
        savepoint.commit()
    else:
        savepoint.rollback()
    return closed


def end_unreleased(tx: Transaction, key: IterationKey, standing: Standing, reason: Reason, now: datetime) -> bool:
    """Ends a round that may not be released: APPLYING -> CANCELED, its task COMPLETED for `reason`.

    False, and nothing written, if the iteration was not APPLYING. Raises LedgerMoved, and writes nothing, if the
    standing that this was decided from is no longer true.
    """
    lock_population(tx, key.population)
    if standing_of(tx, key.population) != standing:
        raise LedgerMoved(f"the ledger or the budget of {key.population} has moved on")
    if not move_iteration(tx, key, IterationStatus.APPLYING, IterationStatus.CANCELED, now, reason=reason):
        return False
    complete_task(tx, key.task, now, reason=reason)
    return True


def _close(
    tx: Transaction,
    key: IterationKey,
    metrics: Mapping[str, float | None],
    releases: Sequence[Release],
    standing: Standing | None,
    following: NewIteration | None,
    now: datetime,
    end: Reason | None,
) -> bool:
    task = schema.task
    row = tx.execute(select(task.c.total_iteration, task.c.status).where(schema.of_task(task, key.task))).one_or_none()
    if row is None or not move_iteration(tx, key, IterationStatus.APPLYING, IterationStatus.COMPLETED, now):
        return False
    record_metrics(tx, key, metrics, now)
    append_releases(tx, key, releases, standing, now)
    if key.iteration_id >= row.total_iteration:
        if following is not None:
            raise ValueError(f"the task of {key} ends after {row.total_iteration} iterations")
        return complete_task(tx, key.task, now)
    if row.status == TaskStatus.PAUSED:
        return True
    if end is not None:
        return complete_task(tx, key.task, now, reason=end)
    return following is None or create_iteration(tx, following, now)


def iteration_row(row: Row[Any]) -> IterationRow:
    """A row of the iteration table as its dataclass."""
    return IterationRow(
        key=IterationKey(row.population_name, row.task_id, row.iteration_id, row.attempt_id),
        status=IterationStatus(row.status),
        aggregation_level=row.aggregation_level,
        base_iteration_id=row.base_iteration_id,
        base_on_result_id=row.base_on_result_id,
        result_id=row.result_id,
        report_goal=row.report_goal,
        max_aggregation_size=row.max_aggregation_size,
        min_client_version=row.min_client_version,
        max_client_version=row.max_client_version,
        info=ParseDict(row.info, task_pb2.IterationInfo()),
        created=row.created_time,
        entered=row.status_time,
        expires=row.expiration_time,
        reason=row.reason,
    )
