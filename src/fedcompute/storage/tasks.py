"""Tasks: creation with its rules, look-ups, and the states from CREATED to the end (spec/server.md 1.5, 4.1, 5.7)."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy import Row, func, select, update
from sqlalchemy.exc import IntegrityError

from fedcompute.errors import Reason, RequestRejected
from fedcompute.protos import task_pb2
from fedcompute.storage import schema, transitions
from fedcompute.storage.assignments import cancel_unused
from fedcompute.storage.database import Transaction, lock_population
from fedcompute.storage.keys import IterationKey, TaskKey
from fedcompute.storage.schema import ACTIVE_ITERATION, STARTED_TASK, TO_API, IterationStatus, TaskKind, TaskStatus

POPULATION_LIMIT = 64
VERSION_LIMIT = 32
PARALLEL_LIMIT = 64
LIST_LIMIT = 1000
_INT64 = 2**63
# What a URL path segment may hold as it is: devices do not percent-encode.
_POPULATION = re.compile(r"[A-Za-z0-9._~:@!$&'()*+,;=-]+")
_VERSION = re.compile(r"-?[0-9]{1,19}")


@dataclass(frozen=True)
class TaskRow:
    """One federated task as stored; times are UTC, sizes are devices."""

    key: TaskKey
    kind: TaskKind
    status: TaskStatus
    total_iteration: int
    min_aggregation_size: int
    max_aggregation_size: int
    min_client_version: str
    max_client_version: str
    info: task_pb2.TaskInfo
    max_parallel: int
    correlation_id: str
    created: datetime
    started: datetime | None
    stopped: datetime | None
    start_no_earlier_than: datetime | None
    do_not_create_iteration_after: datetime | None
    entered: datetime  # when its present status began
    reason: str | None = None  # code of why it ended early

    @property
    def is_training(self) -> bool:
        return self.kind is TaskKind.TRAINING


def create_task(tx: Transaction, task: task_pb2.Task, now: datetime) -> TaskRow:
    """Stores a new task as CREATED under the next id of `task.population_name`; `task.task_id` is ignored.

    A missing `info` means training with traffic weight 1; an evaluation's empty `training_population_name` means its
    own population. Raises RequestRejected(TASK_INVALID) naming every problem, and RequestRejected(TASK_CONFLICT) if
    the population already has an active (CREATED, OPEN, PAUSED) task of the same kind.
    """
    info = _info(task)
    start, stop = _time(task, "start_task_no_earlier_than"), _time(task, "do_not_create_iteration_after")
    problems = _problems(task, info) + _time_problems(start, stop, now)
    if problems:
        raise RequestRejected(Reason.TASK_INVALID, "; ".join(problems))
    kind = _kind(info)
    table = schema.task
    population = task.population_name
    lock_population(tx, population)
    active = tx.execute(
        select(table.c.task_id).where(
            table.c.population_name == population,
            table.c.kind == int(kind),
            table.c.status.in_([int(status) for status in schema.ACTIVE_TASK]),
        )
    ).scalar()
    if active is not None:
        raise RequestRejected(
            Reason.TASK_CONFLICT, f"population {population} has the active {kind.name.lower()} task {active}"
        )
    last = tx.execute(select(func.max(table.c.task_id)).where(table.c.population_name == population)).scalar()
    key = TaskKey(population, (last or 0) + 1)
    values = {
        "population_name": population,
        "task_id": key.task_id,
        "kind": int(kind),
        "total_iteration": task.total_iteration,
        "min_aggregation_size": task.min_aggregation_size,
        "max_aggregation_size": task.max_aggregation_size,
        "start_task_no_earlier_than": start,
        "do_not_create_iteration_after": stop,
        "max_parallel": task.max_parallel,
        "correlation_id": task.correlation_id,
        "min_client_version": task.min_client_version,
        "max_client_version": task.max_client_version,
        "info": MessageToDict(info),
    }
    try:
        with tx.begin_nested():
            transitions.enter(tx, transitions.TASK, values, TaskStatus.CREATED, now)
    except IntegrityError:
        # The questions above were asked under the lock; this is the database's own word on the rule.
        raise RequestRejected(
            Reason.TASK_CONFLICT, f"another task of population {population} was created at the same moment"
        ) from None
    return _existing(get_task(tx, key))


def get_task(tx: Transaction, key: TaskKey) -> TaskRow | None:
    """The task, or None."""
    row = tx.execute(select(schema.task).where(schema.of_task(schema.task, key))).one_or_none()
    return None if row is None else task_row(row)


def list_tasks(
    tx: Transaction,
    *,
    population: str | None = None,
    statuses: Collection[TaskStatus] | None = None,
    after: TaskKey | None = None,
    limit: int = LIST_LIMIT,
) -> list[TaskRow]:
    """Tasks by population, then id, at most `limit`; `after` is the last key of the page before."""
    table = schema.task
    query = select(table).order_by(table.c.population_name, table.c.task_id).limit(limit)
    if population is not None:
        query = query.where(table.c.population_name == population)
    if statuses is not None:
        query = query.where(table.c.status.in_([int(status) for status in statuses]))
    if after is not None:
        query = query.where(
            (table.c.population_name > after.population)
            | ((table.c.population_name == after.population) & (table.c.task_id > after.task_id))
        )
    return [task_row(row) for row in tx.execute(query)]


def newest_tasks(
    tx: Transaction,
    population: str,
    *,
    status: TaskStatus | None = None,
    before: int | None = None,
    limit: int = 100,
) -> list[TaskRow]:
    """A population's tasks, newest first, at most `limit`; of those in a status, of those with ids below `before`."""
    table = schema.task
    query = select(table).where(table.c.population_name == population)
    if status is not None:
        query = query.where(table.c.status == int(status))
    if before is not None:
        query = query.where(table.c.task_id < before)
    return [task_row(row) for row in tx.execute(query.order_by(table.c.task_id.desc()).limit(limit))]


def open_task(tx: Transaction, key: TaskKey, now: datetime) -> bool:
    """CREATED -> OPEN; False if the task was not CREATED."""
    return _move(tx, key, TaskStatus.CREATED, TaskStatus.OPEN, now, start_time=now)


def pause_task(tx: Transaction, key: TaskKey, now: datetime) -> bool:
    """OPEN -> PAUSED; False if the task was not OPEN.

    A round in progress goes on with the devices that it has: nobody else is assigned, and no other round follows.
    """
    return _move(tx, key, TaskStatus.OPEN, TaskStatus.PAUSED, now)


def resume_task(tx: Transaction, key: TaskKey, now: datetime) -> bool:
    """PAUSED -> OPEN; False if the task was not PAUSED. Its rounds expire as much later as it was paused."""
    lock_population(tx, key.population)
    row = get_task(tx, key)
    if row is None or not _move(tx, key, TaskStatus.PAUSED, TaskStatus.OPEN, now):
        return False
    table = schema.iteration
    where = (
        schema.of_task(table, key),
        table.c.status.in_([int(status) for status in ACTIVE_ITERATION]),
        table.c.expiration_time.is_not(None),
    )
    names = [table.c[name] for name in ("iteration_id", "attempt_id", "expiration_time")]
    for one in tx.execute(select(*names).where(*where)).all():
        this = (schema.of_task(table, key), table.c.iteration_id == one.iteration_id)
        later = one.expiration_time + (now - row.entered)
        tx.execute(update(table).where(*this, table.c.attempt_id == one.attempt_id).values(expiration_time=later))
    return True


def complete_task(
    tx: Transaction,
    key: TaskKey,
    now: datetime,
    *,
    reason: Reason | None = None,
    statuses: Collection[TaskStatus] = STARTED_TASK,
) -> bool:
    """OPEN or PAUSED, or what `statuses` allows of the two, -> COMPLETED; False if the task was in none of them.

    `reason`: why, if it has not run all of its rounds; rounds under way are CANCELED, and what they need no more
    (`cancel_unused`).
    """
    return _stop(tx, key, statuses, TaskStatus.COMPLETED, now, reason=_code(reason))


def fail_task(tx: Transaction, key: TaskKey, now: datetime, *, reason: Reason | None = None) -> bool:
    """CREATED, OPEN or PAUSED -> FAILED, its active iterations -> CANCELED; False if the task was already over."""
    return _stop(tx, key, schema.ACTIVE_TASK, TaskStatus.FAILED, now, reason=_code(reason))


def cancel_task(tx: Transaction, key: TaskKey, now: datetime) -> bool:
    """CREATED, OPEN or PAUSED -> CANCELED, its active iterations -> CANCELED; False if the task was already over.

    An update of a canceled iteration that is still being computed can no longer be released.
    """
    return _stop(tx, key, schema.ACTIVE_TASK, TaskStatus.CANCELED, now)


def task_message(row: TaskRow) -> task_pb2.Task:
    """The task as the API shows it, without the URL lists, which depend on the server's public address."""
    message = task_pb2.Task(
        population_name=row.key.population,
        task_id=row.key.task_id,
        total_iteration=row.total_iteration,
        min_aggregation_size=row.min_aggregation_size,
        max_aggregation_size=row.max_aggregation_size,
        status=TO_API[row.status],
        max_parallel=row.max_parallel,
        correlation_id=row.correlation_id,
        min_client_version=row.min_client_version,
        max_client_version=row.max_client_version,
        info=row.info,
    )
    for name, value in (
        ("created_time", row.created),
        ("started_time", row.started),
        ("stop_time", row.stopped),
        ("start_task_no_earlier_than", row.start_no_earlier_than),
        ("do_not_create_iteration_after", row.do_not_create_iteration_after),
    ):
        if value is not None:
            getattr(message, name).FromDatetime(value)
    return message


def task_row(row: Row[Any]) -> TaskRow:
    """A row of the task table as its dataclass."""
    return TaskRow(
        key=TaskKey(row.population_name, row.task_id),
        kind=TaskKind(row.kind),
        status=TaskStatus(row.status),
        total_iteration=row.total_iteration,
        min_aggregation_size=row.min_aggregation_size,
        max_aggregation_size=row.max_aggregation_size,
        min_client_version=row.min_client_version,
        max_client_version=row.max_client_version,
        info=ParseDict(row.info, task_pb2.TaskInfo()),
        max_parallel=row.max_parallel,
        correlation_id=row.correlation_id,
        created=row.created_time,
        started=row.start_time,
        stopped=row.stop_time,
        start_no_earlier_than=row.start_task_no_earlier_than,
        do_not_create_iteration_after=row.do_not_create_iteration_after,
        entered=row.status_time,
        reason=row.reason,
    )


def _move(tx: Transaction, key: TaskKey, old: TaskStatus, new: TaskStatus, now: datetime, **changes: Any) -> bool:
    lock_population(tx, key.population)
    moved = transitions.move(tx, transitions.TASK, [schema.of_task(schema.task, key)], old, new, now, **changes)
    return bool(moved)


def _code(reason: Reason | None) -> str | None:
    return None if reason is None else reason.value


def _stop(
    tx: Transaction, key: TaskKey, olds: Collection[TaskStatus], new: TaskStatus, now: datetime, **changes: Any
) -> bool:
    if not any(_move(tx, key, old, new, now, stop_time=now, **changes) for old in olds):
        return False
    for status in ACTIVE_ITERATION:
        where = [schema.of_task(schema.iteration, key)]
        for row in transitions.move(tx, transitions.ITERATION, where, status, IterationStatus.CANCELED, now):
            cancel_unused(tx, IterationKey(key.population, key.task_id, row["iteration_id"], row["attempt_id"]), now)
    return True


def _info(task: task_pb2.Task) -> task_pb2.TaskInfo:
    info = task_pb2.TaskInfo()
    if not task.HasField("info"):
        info.traffic_weight = 1
        info.training_info.SetInParent()
        return info
    info.CopyFrom(task.info)
    if info.HasField("evaluation_info") and not info.evaluation_info.training_population_name:
        info.evaluation_info.training_population_name = task.population_name
    return info


def _kind(info: task_pb2.TaskInfo) -> TaskKind:
    return TaskKind.TRAINING if info.WhichOneof("info") == "training_info" else TaskKind.EVALUATION


def population_problems(name: str) -> list[str]:
    """What makes a name no population's."""
    if not name:
        return ["population_name is empty"]
    if len(name) > POPULATION_LIMIT:
        return [f"population_name has {len(name)} characters, at most {POPULATION_LIMIT}"]
    if not _POPULATION.fullmatch(name) or name in (".", ".."):
        return ["population_name may hold ASCII letters, digits and ._~:@!$&'()*+,;=- only"]
    return []


def _problems(task: task_pb2.Task, info: task_pb2.TaskInfo) -> list[str]:
    problems = population_problems(task.population_name)
    if task.status not in (task_pb2.TaskStatus.UNKNOWN, task_pb2.TaskStatus.CREATED):
        problems.append("status must be unset or CREATED")
    if task.total_iteration <= 0:
        problems.append(f"total_iteration is {task.total_iteration}, must be above 0")
    if task.min_aggregation_size <= 0:
        problems.append(f"min_aggregation_size is {task.min_aggregation_size}, must be above 0")
    if task.max_aggregation_size <= 0:
        problems.append(f"max_aggregation_size is {task.max_aggregation_size}, must be above 0")
    elif task.max_aggregation_size < task.min_aggregation_size:
        problems.append(
            f"max_aggregation_size {task.max_aggregation_size} is below the minimum {task.min_aggregation_size}"
        )
    if not 0 <= task.max_parallel <= PARALLEL_LIMIT:
        problems.append(f"max_parallel is {task.max_parallel}, must be between 0 and {PARALLEL_LIMIT}")
    problems += _version_problems(task)
    if info.traffic_weight < 0:
        problems.append(f"info.traffic_weight is {info.traffic_weight}, must not be negative")
    match info.WhichOneof("info"):
        case None:
            problems.append("info has neither training_info nor evaluation_info")
        case "evaluation_info":
            problems += _evaluation_problems(info.evaluation_info)
    return problems


def _time_problems(start: datetime | None, stop: datetime | None, now: datetime) -> list[str]:
    if stop is None:
        return []
    if stop <= now:
        return ["do_not_create_iteration_after has passed already"]
    if start is not None and stop <= start:
        return ["do_not_create_iteration_after is not later than start_task_no_earlier_than"]
    return []


def _version_problems(task: task_pb2.Task) -> list[str]:
    problems = []
    for name in ("min_client_version", "max_client_version"):
        value: str = getattr(task, name)
        if not _VERSION.fullmatch(value) or not -_INT64 <= int(value) < _INT64:
            problems.append(f"{name} must be a 64-bit integer in decimal")
    if not problems and int(task.min_client_version) > int(task.max_client_version):
        problems.append(f"min_client_version {task.min_client_version} is above max {task.max_client_version}")
    return problems


def _evaluation_problems(info: task_pb2.EvaluationInfo) -> list[str]:
    problems = []
    if info.training_task_id <= 0:
        problems.append("evaluation_info.training_task_id must be above 0")
    selector = info.check_point_selector
    match selector.WhichOneof("selector_type"):
        case "iteration_selector" if selector.iteration_selector.size > 0:
            pass
        case "duration_selector" if selector.duration_selector.hours > 0:
            pass
        case _:
            problems.append("evaluation_info.check_point_selector needs a size or a number of hours above 0")
    return problems


def _time(task: task_pb2.Task, name: str) -> datetime | None:
    if not task.HasField(name):
        return None
    value: Timestamp = getattr(task, name)
    try:
        return value.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise RequestRejected(Reason.TASK_INVALID, f"{name} is no valid timestamp") from None


def _existing(row: TaskRow | None) -> TaskRow:
    assert row is not None
    return row
