"""Assignments: reports, time-outs and rejections of single devices (spec/server.md 2.4, 4.3)."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Row, func, select, update

from fedcompute.errors import Reason
from fedcompute.storage import schema, transitions
from fedcompute.storage.database import Transaction
from fedcompute.storage.keys import AssignmentKey, BatchKey, IterationKey, TaskKey
from fedcompute.storage.schema import AssignmentStatus

LIST_LIMIT = 1000
_CHUNK = 500

DEVICE_FAILURES = (
    AssignmentStatus.LOCAL_FAILED,
    AssignmentStatus.LOCAL_NOT_ELIGIBLE,
    AssignmentStatus.LOCAL_FAILED_EXAMPLE_GENERATION,
    AssignmentStatus.LOCAL_FAILED_MODEL_COMPUTATION,
    AssignmentStatus.LOCAL_FAILED_OPS_ERROR,
)
# What such an assignment would have contributed can never count; every other one may have, or may yet.
CONTRIBUTES_NOTHING = (*DEVICE_FAILURES, AssignmentStatus.LOCAL_TIMEOUT, AssignmentStatus.UPLOAD_TIMEOUT)


@dataclass(frozen=True)
class AssignmentRow:
    """One device's participation as stored; `entered` is when its present status began, UTC."""

    key: AssignmentKey
    status: AssignmentStatus
    created: datetime
    entered: datetime
    correlation_id: str
    batch_id: str | None
    rejection: str | None
    token_hash: str | None = None
    participant: str | None = None


def get_assignment(tx: Transaction, key: AssignmentKey) -> AssignmentRow | None:
    """The assignment, or None."""
    found = find_assignment(tx, key.task, key.iteration.iteration_id, key.session_id)
    return found if found is not None and found.key == key else None


def find_assignment(tx: Transaction, task: TaskKey, iteration_id: int, session_id: str) -> AssignmentRow | None:
    """The assignment of any attempt of an iteration, as a report's path names it; None if there is none."""
    table = schema.assignment
    row = tx.execute(
        select(table).where(
            table.c.session_id == session_id, schema.of_task(table, task), table.c.iteration_id == iteration_id
        )
    ).one_or_none()
    return None if row is None else assignment_row(row)


def hold_assignment(tx: Transaction, task: TaskKey, iteration_id: int, session_id: str) -> AssignmentRow | None:
    """As `find_assignment`, and nobody else moves the assignment, nor its round to another attempt, until `tx` ends."""
    table = schema.assignment
    where = [table.c.session_id == session_id, schema.of_task(table, task), table.c.iteration_id == iteration_id]
    held = select(table).where(*where).with_for_update(key_share=True)
    # Where another attempt took the row over while this waited, the row that it waited for is gone.
    row = tx.execute(held).one_or_none() or tx.execute(held).one_or_none()
    return None if row is None else assignment_row(row)


def rebind_session(tx: Transaction, assignment: AssignmentRow, token_hash: str) -> bool:
    """Binds an assignment to another token than the one in `assignment`; False if it has a third one by now."""
    table = schema.assignment
    statement = update(table).where(
        schema.of_iteration(table, assignment.key.iteration),
        table.c.session_id == assignment.key.session_id,
        table.c.token_hash == assignment.token_hash,
    )
    return tx.execute(statement.values(token_hash=token_hash)).rowcount == 1


def report_completed(tx: Transaction, key: AssignmentKey, now: datetime) -> bool:
    """ASSIGNED -> LOCAL_COMPLETED. True also if it is LOCAL_COMPLETED already; False if unknown or in another state."""
    if _move_one(tx, key, AssignmentStatus.ASSIGNED, AssignmentStatus.LOCAL_COMPLETED, now):
        return True
    row = get_assignment(tx, key)
    return row is not None and row.status is AssignmentStatus.LOCAL_COMPLETED


def report_failed(tx: Transaction, key: AssignmentKey, status: AssignmentStatus, now: datetime) -> bool:
    """ASSIGNED -> one of `DEVICE_FAILURES`; False if it was not ASSIGNED. Raises ValueError for another status."""
    if status not in DEVICE_FAILURES:
        raise ValueError(f"{status.name} is no failure that a device reports")
    return _move_one(tx, key, AssignmentStatus.ASSIGNED, status, now)


def mark_uploaded(tx: Transaction, iteration: IterationKey, session_ids: Collection[str], now: datetime) -> list[str]:
    """LOCAL_COMPLETED -> UPLOAD_COMPLETED for those of `session_ids` that are; returns the ones that moved, sorted."""
    table = schema.assignment
    moved: list[str] = []
    for chunk in chunks(sorted(session_ids)):
        where = [schema.of_iteration(table, iteration), table.c.session_id.in_(chunk), table.c.batch_id.is_(None)]
        rows = transitions.move(
            tx,
            transitions.ASSIGNMENT,
            where,
            AssignmentStatus.LOCAL_COMPLETED,
            AssignmentStatus.UPLOAD_COMPLETED,
            now,
        )
        moved += [row["session_id"] for row in rows]
    return sorted(moved)


def reject_contribution(tx: Transaction, key: AssignmentKey, reason: Reason, now: datetime) -> bool:
    """UPLOAD_COMPLETED in a batch -> REMOTE_FAILED with its reason; False if it was not that."""
    return _move_one(
        tx,
        key,
        AssignmentStatus.UPLOAD_COMPLETED,
        AssignmentStatus.REMOTE_FAILED,
        now,
        schema.assignment.c.batch_id.is_not(None),
        rejection=reason.value,
    )


def cancel_late(tx: Transaction, key: AssignmentKey, now: datetime) -> bool:
    """ASSIGNED or LOCAL_COMPLETED -> CANCELED, for a device that finished after its round closed; else False."""
    open_statuses = (AssignmentStatus.ASSIGNED, AssignmentStatus.LOCAL_COMPLETED)
    return any(_move_one(tx, key, old, AssignmentStatus.CANCELED, now) for old in open_statuses)


def cancel_unused(tx: Transaction, iteration: IterationKey, now: datetime) -> int:
    """LOCAL_COMPLETED, and UPLOAD_COMPLETED without a batch, -> CANCELED; returns how many.

    For a round that is over: it needs none of them any more. Devices that still compute keep their state, so
    that their reports and time-outs tell how they fared.
    """
    table = schema.assignment
    where = [schema.of_iteration(table, iteration), table.c.batch_id.is_(None)]
    unused = (AssignmentStatus.LOCAL_COMPLETED, AssignmentStatus.UPLOAD_COMPLETED)
    return sum(
        len(transitions.move(tx, transitions.ASSIGNMENT, where, old, AssignmentStatus.CANCELED, now)) for old in unused
    )


def time_out_computing(
    tx: Transaction, now: datetime, age: timedelta, *, iteration: IterationKey | None = None, limit: int = LIST_LIMIT
) -> list[AssignmentKey]:
    """ASSIGNED for longer than `age` -> LOCAL_TIMEOUT, oldest first; returns what moved, at most `limit`.

    Exactly `age` is not longer. `iteration` narrows it to one; without it closed iterations are cleaned up too.
    """
    return _time_out(tx, now, age, AssignmentStatus.ASSIGNED, AssignmentStatus.LOCAL_TIMEOUT, iteration, (), limit)


def time_out_uploading(
    tx: Transaction,
    now: datetime,
    age: timedelta,
    *,
    iteration: IterationKey | None = None,
    keep: Collection[str] = (),
    limit: int = LIST_LIMIT,
) -> list[AssignmentKey]:
    """LOCAL_COMPLETED for longer than `age` -> UPLOAD_TIMEOUT, as `time_out_computing`.

    `keep` holds sessions whose upload lies in the store and is about to be collected; at most a few thousand.
    """
    return _time_out(
        tx, now, age, AssignmentStatus.LOCAL_COMPLETED, AssignmentStatus.UPLOAD_TIMEOUT, iteration, keep, limit
    )


def count_assignments(tx: Transaction, iteration: IterationKey) -> dict[AssignmentStatus, int]:
    """How many assignments an iteration has in each status; every status is a key."""
    table = schema.assignment
    query = (
        select(table.c.status, func.count().label("n"))
        .where(schema.of_iteration(table, iteration))
        .group_by(table.c.status)
    )
    counts = dict.fromkeys(AssignmentStatus, 0)
    return counts | {AssignmentStatus(row.status): row.n for row in tx.execute(query)}


def list_assignments(
    tx: Transaction,
    iteration: IterationKey,
    *,
    statuses: Collection[AssignmentStatus] | None = None,
    limit: int = LIST_LIMIT,
) -> list[AssignmentRow]:
    """An iteration's assignments in assignment order, at most `limit`."""
    where = [schema.of_iteration(schema.assignment, iteration)]
    if statuses is not None:
        where.append(schema.assignment.c.status.in_([int(status) for status in statuses]))
    return _in_order(tx, where, limit)


def assignments_page(
    tx: Transaction, iteration: IterationKey, *, status: AssignmentStatus | None = None, after: str = "", limit: int
) -> list[AssignmentRow]:
    """An iteration's assignments by session id, from behind `after`, at most `limit`; of one status if it is given."""
    table = schema.assignment
    query = select(table).where(schema.of_iteration(table, iteration), table.c.session_id > after)
    if status is not None:
        query = query.where(table.c.status == int(status))
    return [assignment_row(row) for row in tx.execute(query.order_by(table.c.session_id).limit(limit))]


def uploading(tx: Transaction) -> dict[IterationKey, set[str]]:
    """The sessions of every LOCAL_COMPLETED assignment, by iteration."""
    table = schema.assignment
    columns = [table.c[name] for name in schema.ASSIGNMENT_COLUMNS]
    found: dict[IterationKey, set[str]] = {}
    for *key, session_id in tx.execute(select(*columns).where(table.c.status == int(AssignmentStatus.LOCAL_COMPLETED))):
        found.setdefault(IterationKey(*key), set()).add(session_id)
    return found


def unbatched(tx: Transaction, iteration: IterationKey, *, limit: int = LIST_LIMIT) -> list[AssignmentRow]:
    """Collected uploads that no batch holds yet, in assignment order, at most `limit`."""
    table = schema.assignment
    where = [
        schema.of_iteration(table, iteration),
        table.c.status == int(AssignmentStatus.UPLOAD_COMPLETED),
        table.c.batch_id.is_(None),
    ]
    return _in_order(tx, where, limit)


def uploading_among(tx: Transaction, iteration: IterationKey, session_ids: Collection[str]) -> list[str]:
    """Those of `session_ids` that are LOCAL_COMPLETED in the iteration, sorted."""
    table = schema.assignment
    found: list[str] = []
    for chunk in chunks(sorted(session_ids)):
        query = select(table.c.session_id).where(
            schema.of_iteration(table, iteration),
            table.c.session_id.in_(chunk),
            table.c.status == int(AssignmentStatus.LOCAL_COMPLETED),
        )
        found += tx.execute(query).scalars()
    return sorted(found)


def assignments_of_batch(tx: Transaction, batch: BatchKey, *, limit: int = 100_000) -> list[AssignmentRow]:
    """A batch's members in assignment order, rejected ones included."""
    table = schema.assignment
    return _in_order(tx, [schema.of_iteration(table, batch.iteration), table.c.batch_id == batch.batch_id], limit)


def assignment_row(row: Row[Any]) -> AssignmentRow:
    """A row of the assignment table as its dataclass."""
    return AssignmentRow(
        key=AssignmentKey(
            IterationKey(row.population_name, row.task_id, row.iteration_id, row.attempt_id), row.session_id
        ),
        status=AssignmentStatus(row.status),
        created=row.created_time,
        entered=row.status_time,
        correlation_id=row.correlation_id,
        batch_id=row.batch_id,
        rejection=row.rejection,
        token_hash=row.token_hash,
        participant=row.participant,
    )


def chunks(values: Sequence[str]) -> list[Sequence[str]]:
    """`values` in pieces that fit into one statement's parameters."""
    return [values[start : start + _CHUNK] for start in range(0, len(values), _CHUNK)]


def _move_one(
    tx: Transaction,
    key: AssignmentKey,
    old: AssignmentStatus,
    new: AssignmentStatus,
    now: datetime,
    *conditions: ColumnElement[bool],
    **changes: Any,
) -> bool:
    table = schema.assignment
    where = [schema.of_iteration(table, key.iteration), table.c.session_id == key.session_id, *conditions]
    return bool(transitions.move(tx, transitions.ASSIGNMENT, where, old, new, now, **changes))


def _time_out(
    tx: Transaction,
    now: datetime,
    age: timedelta,
    old: AssignmentStatus,
    new: AssignmentStatus,
    iteration: IterationKey | None,
    keep: Collection[str],
    limit: int,
) -> list[AssignmentKey]:
    table = schema.assignment
    late = [table.c.status == int(old), table.c.status_time < now - age]
    if iteration is not None:
        late.append(schema.of_iteration(table, iteration))
    if keep:
        late.append(table.c.session_id.not_in(sorted(keep)))
    oldest = select(table.c.session_id).where(*late).order_by(table.c.status_time).limit(limit)
    # Whoever has locked a row is about to move it; to wait for several of them could be to wait in a circle.
    chosen = oldest.with_for_update(key_share=True, skip_locked=True).cte("oldest")
    where = [table.c.session_id.in_(select(chosen.c.session_id)), table.c.status_time < now - age]
    rows = transitions.move(tx, transitions.ASSIGNMENT, where, old, new, now)
    return sorted(
        AssignmentKey(
            IterationKey(row["population_name"], row["task_id"], row["iteration_id"], row["attempt_id"]),
            row["session_id"],
        )
        for row in rows
    )


def _in_order(tx: Transaction, where: Sequence[ColumnElement[bool]], limit: int) -> list[AssignmentRow]:
    table = schema.assignment
    query = select(table).where(*where).order_by(table.c.created_time, table.c.session_id).limit(limit)
    return [assignment_row(row) for row in tx.execute(query)]
