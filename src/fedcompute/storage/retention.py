"""What is old: rounds whose uploads nobody needs, checkpoints nobody starts from, tasks whose devices are history.

The rules, of which each look-up here is one half and the removal by `server.retention` the other:

- Updates and sums go once their round is settled: an attempt of it was released, or its task is over. An active
  attempt, a round that may be tried again and a paused task keep theirs.
- A released checkpoint goes when it is old, unless it is one of its task's newest, a round that is not released starts
  from it, or an evaluation measures it. The initial checkpoint stays.
- Assignments and batches go when their task has been over for long and what became of them is summed up
  (`storage.summaries`). Tasks, rounds, metrics, sums, ledger and budgets stay.

`iteration.cleaned_time` says when a round's objects were last removed, `purged_time` when its checkpoint was given up:
first the mark, which keeps evaluations off, then the objects, then `cleaned_time` again.
"""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from google.protobuf.json_format import ParseDict
from sqlalchemy import ColumnElement, Exists, and_, delete, exists, func, or_, select, update

from fedcompute.protos import task_pb2
from fedcompute.storage import schema
from fedcompute.storage.database import Transaction, lock_population
from fedcompute.storage.keys import TaskKey
from fedcompute.storage.schema import ACTIVE_ITERATION, ACTIVE_TASK, RELEASED_ITERATION, TaskKind

LIST_LIMIT = 200
# A transaction that holds up writers for some milliseconds only.
_CHUNK = 100
_ITERATION, _TASK = schema.iteration, schema.task


@dataclass(frozen=True, order=True)
class Round:
    """One round of a task, all of its attempts: where its objects lie and whether one of the attempts was released."""

    task: TaskKey
    iteration_id: int
    result_id: int
    is_training: bool
    released: bool

    def __str__(self) -> str:
        return f"{self.task}/{self.iteration_id}"


def settled_rounds(tx: Transaction, before: datetime, *, limit: int = LIST_LIMIT) -> list[Round]:
    """Rounds settled at or before `before` whose updates and sums are still there, oldest tasks first."""
    released = _some_attempt(RELEASED_ITERATION)
    over = and_(
        _TASK.c.status.not_in(_codes(ACTIVE_TASK)), func.coalesce(_TASK.c.stop_time, _TASK.c.status_time) <= before
    )
    query = (
        select(*_names(), _ITERATION.c.result_id, _TASK.c.kind, released.label("released"))
        .distinct()
        .join(_TASK, _of_same_task(_TASK))
        .where(
            _ITERATION.c.cleaned_time.is_(None),
            _ITERATION.c.status_time <= before,
            or_(_ITERATION.c.status.in_(_codes(RELEASED_ITERATION)), over),
            ~_some_attempt(ACTIVE_ITERATION),
        )
        .order_by(*_names())
        .limit(limit)
    )
    return [_round(row, bool(row.released)) for row in tx.execute(query)]


def mark_cleaned(tx: Transaction, one: Round, now: datetime) -> None:
    """Remembers that the round's objects are removed, as far as they were given up."""
    tx.execute(update(_ITERATION).where(*_attempts(one)).values(cleaned_time=now))


def old_checkpoints(tx: Transaction, before: datetime, keep_newest: int, *, limit: int = LIST_LIMIT) -> list[Round]:
    """Training rounds released at or before `before` whose checkpoint nobody needs, oldest first."""
    rank = (
        func.row_number()
        .over(
            partition_by=[_ITERATION.c[name] for name in schema.TASK_COLUMNS],
            order_by=_ITERATION.c.iteration_id.desc(),
        )
        .label("rank")
    )
    ranked = (
        select(
            *_names(), _ITERATION.c.result_id, _ITERATION.c.status_time, _ITERATION.c.cleaned_time,
            _ITERATION.c.purged_time, _TASK.c.kind, rank,
        )
        .join(_TASK, _of_same_task(_TASK))
        .where(_ITERATION.c.status.in_(_codes(RELEASED_ITERATION)), _TASK.c.kind == int(TaskKind.TRAINING))
        .subquery()
    )  # fmt: skip
    query = (
        select(ranked)
        .where(
            ranked.c.rank > keep_newest,
            ranked.c.status_time <= before,
            ranked.c.cleaned_time.is_not(None),
            ranked.c.purged_time.is_(None),
        )
        .order_by(ranked.c.population_name, ranked.c.task_id, ranked.c.iteration_id)
        .limit(limit)
    )
    needed = _needed_results(tx)
    found = [_round(row, True) for row in tx.execute(query)]
    return [one for one in found if (one.task, one.result_id) not in needed]


def give_up_checkpoint(tx: Transaction, one: Round, now: datetime) -> bool:
    """Marks a checkpoint that is about to be removed; False, and nothing written, if a round needs it after all.

    Formal guarantees: with `claim_checkpoint`, of a purge and an evaluation that race for a checkpoint one loses.
    """
    lock_population(tx, one.task.population)
    where = (*_attempts(one), _ITERATION.c.status.in_(_codes(RELEASED_ITERATION)), _ITERATION.c.purged_time.is_(None))
    # Locked before the question who needs it: an evaluation that holds the row shared is seen by the next statement.
    if tx.execute(select(_ITERATION.c.attempt_id).where(*where).with_for_update()).first() is None:
        return False
    if (one.task, one.result_id) in _needed_results(tx):
        return False
    tx.execute(update(_ITERATION).where(*where).values(purged_time=now))
    return True


def given_up_checkpoints(tx: Transaction, *, limit: int = LIST_LIMIT) -> list[Round]:
    """Rounds whose checkpoint was given up and may not be removed yet: its remover was killed."""
    query = (
        select(*_names(), _ITERATION.c.result_id, _TASK.c.kind)
        .join(_TASK, _of_same_task(_TASK))
        .where(_ITERATION.c.purged_time > _ITERATION.c.cleaned_time)
        .order_by(*_names())
        .limit(limit)
    )
    return [_round(row, True) for row in tx.execute(query)]


def claim_checkpoint(tx: Transaction, task: TaskKey, iteration_id: int) -> bool:
    """Whether the released checkpoint is still there; it stays so until the transaction, which uses it, has ended."""
    query = (
        select(_ITERATION.c.purged_time)
        .where(
            schema.of_task(_ITERATION, task),
            _ITERATION.c.iteration_id == iteration_id,
            _ITERATION.c.status.in_(_codes(RELEASED_ITERATION)),
        )
        .with_for_update(read=True)
    )
    rows = tx.execute(query).all()
    return bool(rows) and all(row.purged_time is None for row in rows)


def old_tasks(tx: Transaction, before: datetime, *, limit: int = LIST_LIMIT) -> list[TaskKey]:
    """Tasks over at or before `before`, every attempt of them summed up, that still have assignments or batches."""
    unsettled = exists().where(_of_same_task(_ITERATION, _TASK), _ITERATION.c.settled_time.is_(None))
    held = [exists().where(_of_same_task(table, _TASK)) for table in (schema.assignment, schema.aggregation_batch)]
    query = (
        select(_TASK.c.population_name, _TASK.c.task_id)
        .where(
            _TASK.c.status.not_in(_codes(ACTIVE_TASK)),
            func.coalesce(_TASK.c.stop_time, _TASK.c.status_time) <= before,
            ~unsettled,
            or_(*held),
        )
        .order_by(_TASK.c.population_name, _TASK.c.task_id)
        .limit(limit)
    )
    return [TaskKey(row.population_name, row.task_id) for row in tx.execute(query)]


def forget_devices(tx: Transaction, task: TaskKey, *, limit: int = _CHUNK) -> int:
    """Deletes up to `limit` of a task's assignments, else of its batches, histories included; returns how many."""
    for table, name in ((schema.assignment, "session_id"), (schema.aggregation_batch, "batch_id")):
        names = tx.execute(select(table.c[name]).where(schema.of_task(table, task)).limit(limit)).scalars().all()
        if names:
            return tx.execute(delete(table).where(schema.of_task(table, task), table.c[name].in_(names))).rowcount
    return 0


def count_devices(tx: Transaction, task: TaskKey) -> int:
    """How many assignments of a task are stored."""
    table = schema.assignment
    return tx.execute(select(func.count()).select_from(table).where(schema.of_task(table, task))).scalar_one()


def _needed_results(tx: Transaction) -> set[tuple[TaskKey, int]]:
    """What rounds that are not over, or may be tried again, start from or measure: training task and result id."""
    query = (
        select(*_names(), _ITERATION.c.base_on_result_id, _ITERATION.c.info, _TASK.c.kind)
        .join(_TASK, _of_same_task(_TASK))
        .where(_TASK.c.status.in_(_codes(ACTIVE_TASK)), ~_some_attempt(RELEASED_ITERATION))
    )
    needed = set()
    for row in tx.execute(query):
        if row.kind == TaskKind.TRAINING:
            # What its devices start from, and what its update is added to: not the same where rounds overlap.
            for result_id in (row.base_on_result_id, row.iteration_id - 1):
                needed.add((TaskKey(row.population_name, row.task_id), result_id))
            continue
        info = ParseDict(row.info, task_pb2.IterationInfo())
        measured = info.task_info.evaluation_info
        training = TaskKey(measured.training_population_name or row.population_name, measured.training_task_id)
        needed.add((training, info.evaluation_training_iteration_id))
    return needed


def _some_attempt(statuses: Collection[int]) -> Exists:
    """Whether an attempt of the round, this one or another, has one of the statuses."""
    other = _ITERATION.alias("other")
    same_round = and_(*(other.c[name] == _ITERATION.c[name] for name in (*schema.TASK_COLUMNS, "iteration_id")))
    return exists().where(same_round, other.c.status.in_(_codes(statuses)))


def _names() -> list[ColumnElement[Any]]:
    return [_ITERATION.c[name] for name in (*schema.TASK_COLUMNS, "iteration_id")]


def _of_same_task(table: Any, other: Any = _ITERATION) -> ColumnElement[bool]:
    return and_(*(table.c[name] == other.c[name] for name in schema.TASK_COLUMNS))


def _attempts(one: Round) -> tuple[ColumnElement[bool], ...]:
    return (schema.of_task(_ITERATION, one.task), _ITERATION.c.iteration_id == one.iteration_id)


def _codes(statuses: Collection[int]) -> list[int]:
    return [int(status) for status in statuses]


def _round(row: Any, released: bool) -> Round:
    return Round(
        TaskKey(row.population_name, row.task_id),
        row.iteration_id,
        row.result_id,
        row.kind == TaskKind.TRAINING,
        released,
    )
