"""Aggregation batches: groups of collected uploads that one job adds up (spec/server.md 4.4, 6.1)."""

import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Row, func, select

from fedcompute.errors import OperationFailed, Reason
from fedcompute.storage import schema, transitions
from fedcompute.storage.assignments import chunks, reject_contribution
from fedcompute.storage.database import Transaction
from fedcompute.storage.keys import AssignmentKey, BatchKey, IterationKey
from fedcompute.storage.schema import AssignmentStatus, BatchStatus


@dataclass(frozen=True)
class BatchRow:
    """One batch as stored; `accepted_size` is None until the batch is added up."""

    key: BatchKey
    status: BatchStatus
    batch_size: int  # assignments
    accepted_size: int | None  # contributions that count
    aggregation_level: int
    created: datetime
    entered: datetime


@dataclass(frozen=True)
class BatchSums:
    """Contributions of an iteration by the state of their batch."""

    full: int  # not yet handed to a job
    published: int  # in a job
    aggregated: int  # in a finished job, rejected ones included
    accepted: int  # in a finished job and counted
    failed: int

    @property
    def expected(self) -> int:
        """What the iteration will have if no more contributions are rejected."""
        return self.published + self.accepted


def create_batch(
    tx: Transaction, iteration: IterationKey, session_ids: Sequence[str], now: datetime
) -> BatchRow | None:
    """Puts collected, un-batched uploads into a new FULL batch; None, and nothing written, unless all of them are that.

    Raises ValueError for no or repeated sessions.
    """
    if not session_ids or len(set(session_ids)) != len(session_ids):
        raise ValueError("a batch needs sessions, each once")
    key = BatchKey(iteration, str(uuid.uuid4()))
    table = schema.assignment
    savepoint = tx.begin_nested()
    attached = 0
    for chunk in chunks(session_ids):
        where = [schema.of_iteration(table, iteration), table.c.session_id.in_(chunk), table.c.batch_id.is_(None)]
        uploaded = AssignmentStatus.UPLOAD_COMPLETED
        moved = transitions.move(tx, transitions.ASSIGNMENT, where, uploaded, uploaded, now, batch_id=key.batch_id)
        attached += len(moved)
    if attached != len(session_ids):
        savepoint.rollback()
        return None
    values = {
        "population_name": iteration.population,
        "task_id": iteration.task_id,
        "iteration_id": iteration.iteration_id,
        "attempt_id": iteration.attempt_id,
        "batch_id": key.batch_id,
        "aggregation_level": 0,
        "batch_size": len(session_ids),
        "created_by_partition": str(iteration),
    }
    transitions.enter(tx, transitions.BATCH, values, BatchStatus.FULL, now)
    savepoint.commit()
    return get_batch(tx, key)


def get_batch(tx: Transaction, key: BatchKey) -> BatchRow | None:
    """The batch, or None."""
    table = schema.aggregation_batch
    row = tx.execute(
        select(table).where(schema.of_iteration(table, key.iteration), table.c.batch_id == key.batch_id)
    ).one_or_none()
    return None if row is None else _batch_row(row)


def list_batches(
    tx: Transaction,
    iteration: IterationKey,
    *,
    statuses: Collection[BatchStatus] | None = None,
    limit: int | None = None,
) -> list[BatchRow]:
    """An iteration's batches in a fixed order (creation, then id); all, or the first `limit`."""
    table = schema.aggregation_batch
    query = (
        select(table)
        .where(schema.of_iteration(table, iteration))
        .order_by(table.c.created_time, table.c.batch_id)
        .limit(limit)
    )
    if statuses is not None:
        query = query.where(table.c.status.in_([int(status) for status in statuses]))
    return [_batch_row(row) for row in tx.execute(query)]


def publish_batch(tx: Transaction, key: BatchKey, now: datetime) -> bool:
    """FULL -> PUBLISH_COMPLETED: a job has it; False if it was not FULL."""
    return _move(tx, key, BatchStatus.FULL, BatchStatus.PUBLISH_COMPLETED, now)


def finish_batch(
    tx: Transaction, key: BatchKey, accepted_size: int, rejected: Mapping[str, Reason], now: datetime
) -> bool:
    """PUBLISH_COMPLETED -> UPLOAD_COMPLETED together with the REMOTE_FAILED of the `rejected` sessions.

    False, and nothing written, if it was not PUBLISH_COMPLETED. Raises OperationFailed(INTERNAL), nothing written, if
    `accepted_size` and `rejected` do not add up to the batch, or a rejected session is not in it.
    """
    savepoint = tx.begin_nested()
    try:
        finished = _finish(tx, key, accepted_size, rejected, now)
    except BaseException:
        savepoint.rollback()
        raise
    savepoint.commit()
    return finished


def fail_batch(tx: Transaction, key: BatchKey, reason: Reason, now: datetime) -> bool:
    """FULL or PUBLISH_COMPLETED -> FAILED, its members -> REMOTE_FAILED for `reason`; False if it was neither."""
    if not any(
        _move(tx, key, old, BatchStatus.FAILED, now) for old in (BatchStatus.PUBLISH_COMPLETED, BatchStatus.FULL)
    ):
        return False
    table = schema.assignment
    transitions.move(
        tx,
        transitions.ASSIGNMENT,
        [schema.of_iteration(table, key.iteration), table.c.batch_id == key.batch_id],
        AssignmentStatus.UPLOAD_COMPLETED,
        AssignmentStatus.REMOTE_FAILED,
        now,
        rejection=reason.value,
    )
    return True


def sum_batches(tx: Transaction, iteration: IterationKey, *, level: int = 0) -> BatchSums:
    """How many contributions are in batches of each state."""
    table = schema.aggregation_batch
    query = (
        select(
            table.c.status,
            func.sum(table.c.batch_size).label("size"),
            func.sum(func.coalesce(table.c.accepted_size, 0)).label("accepted"),
        )
        .where(schema.of_iteration(table, iteration), table.c.aggregation_level == level)
        .group_by(table.c.status)
    )
    found = {BatchStatus(row.status): (int(row.size), int(row.accepted)) for row in tx.execute(query)}
    nothing = (0, 0)
    return BatchSums(
        full=found.get(BatchStatus.FULL, nothing)[0],
        published=found.get(BatchStatus.PUBLISH_COMPLETED, nothing)[0],
        aggregated=found.get(BatchStatus.UPLOAD_COMPLETED, nothing)[0],
        accepted=found.get(BatchStatus.UPLOAD_COMPLETED, nothing)[1],
        failed=found.get(BatchStatus.FAILED, nothing)[0],
    )


def _finish(tx: Transaction, key: BatchKey, accepted_size: int, rejected: Mapping[str, Reason], now: datetime) -> bool:
    if not _move(
        tx, key, BatchStatus.PUBLISH_COMPLETED, BatchStatus.UPLOAD_COMPLETED, now, accepted_size=accepted_size
    ):
        return False
    batch = get_batch(tx, key)
    assert batch is not None, "its row has just changed"
    if accepted_size < 0 or accepted_size + len(rejected) != batch.batch_size:
        raise OperationFailed(
            Reason.INTERNAL,
            f"batch {key} has {batch.batch_size} members, not {accepted_size} accepted and {len(rejected)} rejected",
        )
    table = schema.assignment
    for session_id, reason in sorted(rejected.items()):
        member = tx.execute(
            select(table.c.batch_id).where(schema.of_iteration(table, key.iteration), table.c.session_id == session_id)
        ).scalar_one_or_none()
        if member != key.batch_id or not reject_contribution(tx, AssignmentKey(key.iteration, session_id), reason, now):
            raise OperationFailed(Reason.INTERNAL, f"session {session_id} does not count in batch {key}")
    return True


def _move(tx: Transaction, key: BatchKey, old: BatchStatus, new: BatchStatus, now: datetime, **changes: Any) -> bool:
    table = schema.aggregation_batch
    where = [schema.of_iteration(table, key.iteration), table.c.batch_id == key.batch_id]
    return bool(transitions.move(tx, transitions.BATCH, where, old, new, now, **changes))


def _batch_row(row: Row[Any]) -> BatchRow:
    iteration = IterationKey(row.population_name, row.task_id, row.iteration_id, row.attempt_id)
    return BatchRow(
        key=BatchKey(iteration, row.batch_id),
        status=BatchStatus(row.status),
        batch_size=row.batch_size,
        accepted_size=row.accepted_size,
        aggregation_level=row.aggregation_level,
        created=row.created_time,
        entered=row.status_time,
    )
