"""Assignments: check-in, reports, time-outs and rejections of single devices (spec/server.md 2.1, 2.4, 4.3)."""

import hashlib
import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import ColumnElement, Row, delete, func, insert, select

from fedcompute.errors import Reason
from fedcompute.storage import schema, transitions
from fedcompute.storage.database import Transaction, lock_population
from fedcompute.storage.iterations import IterationRow, get_iteration, iteration_row
from fedcompute.storage.keys import AssignmentKey, BatchKey, IterationKey, TaskKey
from fedcompute.storage.schema import ACTIVE_ITERATION, STARTED_TASK, AssignmentStatus, IterationStatus, TaskStatus
from fedcompute.storage.tasks import TaskRow, get_task

IDEMPOTENCY_LIFETIME = timedelta(minutes=5)
LIST_LIMIT = 1000
_PLACE_LIMIT = 99  # the largest status code that holds a place
_CHUNK = 500

DEVICE_FAILURES = (
    AssignmentStatus.LOCAL_FAILED,
    AssignmentStatus.LOCAL_NOT_ELIGIBLE,
    AssignmentStatus.LOCAL_FAILED_EXAMPLE_GENERATION,
    AssignmentStatus.LOCAL_FAILED_MODEL_COMPUTATION,
    AssignmentStatus.LOCAL_FAILED_OPS_ERROR,
)


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


class DeclineKind(StrEnum):
    """Why a check-in got no assignment, most hopeful first (spec/server.md 2.1)."""

    ITERATION_FULL = "iteration_full"
    NOT_OPEN = "not_open"
    VERSION_MISMATCH = "version_mismatch"
    NOT_ACTIVE = "not_active"


@dataclass(frozen=True)
class Assigned:
    """A check-in that got a place; `repeated` if an earlier check-in with the same idempotency key had made it."""

    assignment: AssignmentRow
    iteration: IterationRow
    task: TaskRow
    repeated: bool = False


@dataclass(frozen=True)
class Declined:
    """A check-in that got no place."""

    kind: DeclineKind


def assign(
    tx: Transaction,
    population: str,
    client_version: int,
    now: datetime,
    *,
    choose: Callable[[int], int],
    idempotency_key: str | None = None,
    correlation_id: str = "",
) -> Assigned | Declined:
    """One check-in: finds an iteration with a free place, takes the place and says so; needs a write transaction.

    `choose(n)` draws uniformly from 0..n-1; it is called only if several iterations have room. The chance of each is
    its task's traffic weight; weight 0 is never chosen while another weight is above 0, and all 0 are alike.
    `idempotency_key` (any text; the caller puts owner and request key into it) makes a repetition within five minutes
    return the first answer's assignment, as long as that is ASSIGNED and its iteration COLLECTING.
    """
    lock_population(tx, population)
    key_hash = None if idempotency_key is None else _key_hash(population, idempotency_key)
    if key_hash is not None:
        earlier = _repeated(tx, key_hash, now)
        if earlier is not None:
            return earlier
    candidates = _candidates(tx, population)
    fitting = [
        (iteration, weight)
        for iteration, weight, is_open in candidates
        if is_open and int(iteration.min_client_version) <= client_version <= int(iteration.max_client_version)
    ]
    free = [(iteration, weight) for iteration, weight in fitting if _has_room(tx, iteration)]
    if not free:
        closed = any(not is_open for _, _, is_open in candidates) or _has_paused_task(tx, population)
        return Declined(_decline_kind(bool(candidates), closed, bool(fitting)))
    iteration = _weighted(free, choose)
    task = get_task(tx, iteration.key.task)
    assert task is not None, "an iteration's foreign key is its task"
    session_id = str(uuid.uuid4())
    values = _iteration_values(iteration.key) | {"session_id": session_id, "correlation_id": correlation_id}
    transitions.enter(tx, transitions.ASSIGNMENT, values, AssignmentStatus.ASSIGNED, now)
    if key_hash is not None:
        _remember(tx, key_hash, session_id, now)
    assignment = AssignmentRow(
        AssignmentKey(iteration.key, session_id), AssignmentStatus.ASSIGNED, now, now, correlation_id, None, None
    )
    return Assigned(assignment, iteration, task)


def forget_idempotency(tx: Transaction, now: datetime) -> int:
    """Deletes expired idempotency keys; returns how many."""
    table = schema.idempotency
    return tx.execute(delete(table).where(table.c.expires <= now)).rowcount


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


def count_by_iteration(tx: Transaction, task: TaskKey) -> dict[IterationKey, dict[AssignmentStatus, int]]:
    """How many assignments each iteration of a task has in each status; what there is none of is left out."""
    table = schema.assignment
    columns = [table.c[name] for name in (*schema.ITERATION_COLUMNS, "status")]
    query = select(*columns, func.count().label("n")).where(schema.of_task(table, task)).group_by(*columns)
    counts: dict[IterationKey, dict[AssignmentStatus, int]] = {}
    for row in tx.execute(query):
        key = IterationKey(row.population_name, row.task_id, row.iteration_id, row.attempt_id)
        counts.setdefault(key, {})[AssignmentStatus(row.status)] = row.n
    return counts


def count_rejections(tx: Transaction, task: TaskKey) -> dict[str, int]:
    """How many of a task's contributions were rejected, by the code of the reason."""
    table = schema.assignment
    query = (
        select(table.c.rejection, func.count().label("n"))
        .where(schema.of_task(table, task), table.c.status == int(AssignmentStatus.REMOTE_FAILED))
        .group_by(table.c.rejection)
        .order_by(table.c.rejection)
    )
    return {row.rejection or Reason.INTERNAL.value: row.n for row in tx.execute(query)}


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


def unbatched(tx: Transaction, iteration: IterationKey, *, limit: int = LIST_LIMIT) -> list[AssignmentRow]:
    """Collected uploads that no batch holds yet, in assignment order, at most `limit`."""
    table = schema.assignment
    where = [
        schema.of_iteration(table, iteration),
        table.c.status == int(AssignmentStatus.UPLOAD_COMPLETED),
        table.c.batch_id.is_(None),
    ]
    return _in_order(tx, where, limit)


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
    )


def chunks(values: Sequence[str]) -> list[Sequence[str]]:
    """`values` in pieces that fit into one statement's parameters."""
    return [values[start : start + _CHUNK] for start in range(0, len(values), _CHUNK)]


def _candidates(tx: Transaction, population: str) -> list[tuple[IterationRow, int, bool]]:
    table, task = schema.iteration, schema.task
    query = (
        select(table, task.c.status.label("task_status"))
        .join(task, (task.c.population_name == table.c.population_name) & (task.c.task_id == table.c.task_id))
        .where(
            table.c.population_name == population,
            table.c.status.in_([int(status) for status in ACTIVE_ITERATION]),
            task.c.status.in_([int(status) for status in STARTED_TASK]),
        )
        .order_by(table.c.task_id, table.c.iteration_id, table.c.attempt_id)
    )
    found = []
    for row in tx.execute(query):
        iteration = iteration_row(row)
        is_open = iteration.status is IterationStatus.COLLECTING and row.task_status == TaskStatus.OPEN
        found.append((iteration, iteration.info.task_info.traffic_weight, is_open))
    return found


def _has_paused_task(tx: Transaction, population: str) -> bool:
    table = schema.task
    paused = (table.c.population_name == population) & (table.c.status == int(TaskStatus.PAUSED))
    return tx.execute(select(table.c.task_id).where(paused).limit(1)).first() is not None


def _has_room(tx: Transaction, iteration: IterationRow) -> bool:
    table = schema.assignment
    query = select(func.count()).where(schema.of_iteration(table, iteration.key), table.c.status <= _PLACE_LIMIT)
    return tx.execute(query).scalar_one() < iteration.max_aggregation_size


def _decline_kind(any_candidate: bool, any_closed: bool, any_fitting: bool) -> DeclineKind:
    if any_fitting:
        return DeclineKind.ITERATION_FULL
    if any_closed:
        return DeclineKind.NOT_OPEN
    return DeclineKind.VERSION_MISMATCH if any_candidate else DeclineKind.NOT_ACTIVE


def _weighted(free: Sequence[tuple[IterationRow, int]], choose: Callable[[int], int]) -> IterationRow:
    if len(free) == 1:
        return free[0][0]
    total = sum(weight for _, weight in free)
    if total == 0:
        return free[choose(len(free))][0]
    drawn = choose(total)
    for iteration, weight in free:
        if drawn < weight:
            return iteration
        drawn -= weight
    raise ValueError("choose(n) must draw from 0..n-1")


def _key_hash(population: str, key: str) -> str:
    return hashlib.sha256(f"{population}/{key}".encode()).hexdigest()


def _repeated(tx: Transaction, key_hash: str, now: datetime) -> Assigned | None:
    table, remembered = schema.assignment, schema.idempotency
    row = tx.execute(
        select(table)
        .join(remembered, remembered.c.session_id == table.c.session_id)
        .where(
            remembered.c.key_hash == key_hash,
            remembered.c.expires > now,
            table.c.status == int(AssignmentStatus.ASSIGNED),
        )
    ).one_or_none()
    if row is None:
        return None
    assignment = assignment_row(row)
    iteration, task = get_iteration(tx, assignment.key.iteration), get_task(tx, assignment.key.task)
    assert iteration is not None, "an assignment's foreign key is its iteration"
    assert task is not None, "an iteration's foreign key is its task"
    if iteration.status is not IterationStatus.COLLECTING or task.status not in STARTED_TASK:
        return None
    return Assigned(assignment, iteration, task, repeated=True)


def _remember(tx: Transaction, key_hash: str, session_id: str, now: datetime) -> None:
    table = schema.idempotency
    tx.execute(delete(table).where(table.c.key_hash == key_hash))
    tx.execute(insert(table).values(key_hash=key_hash, session_id=session_id, expires=now + IDEMPOTENCY_LIFETIME))


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


def _iteration_values(key: IterationKey) -> dict[str, Any]:
    return {
        "population_name": key.population,
        "task_id": key.task_id,
        "iteration_id": key.iteration_id,
        "attempt_id": key.attempt_id,
    }
