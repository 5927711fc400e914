"""What became of a round's devices and how long things took (spec/server.md 10.3, 10.4).

An attempt that is over, and none of whose devices is still at work, is settled: nothing about it changes any more. It
is then summed up, once, in rows that pages read instead of counting assignments, and that stay when retention removes
these. Attempts that are not settled are counted as they stand.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from statistics import fmean, median
from typing import Any

from sqlalchemy import ColumnElement, Row, String, Table, cast, func, insert, select, tuple_, update
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from fedcompute.errors import Reason
from fedcompute.storage import schema
from fedcompute.storage.database import Transaction
from fedcompute.storage.iterations import IterationRow, iteration_row
from fedcompute.storage.keys import IterationKey, TaskKey
from fedcompute.storage.schema import ACTIVE_ITERATION, AssignmentStatus, IterationStatus

# Durations of attempts with more sessions are told once they are settled.
MOST_LIVE_SESSIONS = 2000
_CHUNK = 200
_WORKING = (AssignmentStatus.ASSIGNED, AssignmentStatus.LOCAL_COMPLETED)
_SECONDS = ("collecting", "aggregating", "applying", "completion", "training", "upload", "assignment")
_MINUTE = "%Y-%m-%d %H:%M"


@dataclass(frozen=True)
class RoundSummary:
    """One attempt of one round. Durations are seconds, None while there is nothing to measure.

    `assignments`: sessions by present status; `rejections`: contributions by the code of the reason; no zeros.
    `collecting_seconds`: first COLLECTING to first AGGREGATING; `aggregating_seconds`: from there to first APPLYING;
    `applying_seconds`: from there to COMPLETED; `completion_seconds`: first COLLECTING to COMPLETED.
    `training_seconds`: median from ASSIGNED to LOCAL_COMPLETED, `upload_seconds`: median from LOCAL_COMPLETED to
    UPLOAD_COMPLETED, `assignment_seconds`: mean from ASSIGNED to UPLOAD_COMPLETED, over the sessions that have both.
    """

    key: IterationKey
    status: IterationStatus
    opened: datetime
    entered: datetime
    released: datetime | None
    expires: datetime | None
    report_goal: int
    max_aggregation_size: int
    evaluated_iteration_id: int | None
    reason: str | None
    assignments: Mapping[AssignmentStatus, int]
    rejections: Mapping[str, int]
    collecting_seconds: float | None = None
    aggregating_seconds: float | None = None
    applying_seconds: float | None = None
    completion_seconds: float | None = None
    training_seconds: float | None = None
    upload_seconds: float | None = None
    assignment_seconds: float | None = None


@dataclass(frozen=True)
class TaskTotals:
    """Everything that became of a task's devices: sessions by status, contributions by the reason of rejection."""

    assignments: Mapping[AssignmentStatus, int]
    rejections: Mapping[str, int]


@dataclass
class _Counts:
    assignments: dict[AssignmentStatus, int] = field(default_factory=dict)
    rejections: dict[str, int] = field(default_factory=dict)

    def add(self, status: int, rejection: str | None, sessions: int) -> None:
        found = AssignmentStatus(status)
        self.assignments[found] = self.assignments.get(found, 0) + sessions
        if found is AssignmentStatus.REMOTE_FAILED:
            reason = rejection or Reason.INTERNAL.value
            self.rejections[reason] = self.rejections.get(reason, 0) + sessions


def round_summaries(
    tx: Transaction, task: TaskKey, *, before: int | None = None, limit: int = 1000
) -> list[RoundSummary]:
    """The newest `limit` attempts of a task's rounds, of rounds before `before`, by round and attempt."""
    table = schema.iteration
    query = select(table).where(schema.of_task(table, task))
    if before is not None:
        query = query.where(table.c.iteration_id < before)
    newest = query.order_by(table.c.iteration_id.desc(), table.c.attempt_id.desc()).limit(limit)
    return _summaries(tx, task, list(reversed(tx.execute(newest).all())))


def round_attempts(tx: Transaction, task: TaskKey, iteration_id: int) -> list[RoundSummary]:
    """Every attempt of one round, in their order; none if there is no such round."""
    table = schema.iteration
    query = select(table).where(schema.of_task(table, task), table.c.iteration_id == iteration_id)
    return _summaries(tx, task, list(tx.execute(query.order_by(table.c.attempt_id))))


def summaries_after(
    tx: Transaction, task: TaskKey, after: tuple[int, int] | None = None, *, limit: int = 1000
) -> list[RoundSummary]:
    """Attempts by round and attempt, at most `limit`; only what is later than `after`, a round and an attempt."""
    table = schema.iteration
    query = select(table).where(schema.of_task(table, task))
    if after is not None:
        same = (table.c.iteration_id == after[0]) & (table.c.attempt_id > after[1])
        query = query.where((table.c.iteration_id > after[0]) | same)
    return _summaries(tx, task, list(tx.execute(query.order_by(table.c.iteration_id, table.c.attempt_id).limit(limit))))


def task_totals(tx: Transaction, task: TaskKey) -> TaskTotals:
    """What became of all of a task's devices."""
    counts, outcome, assignment = _Counts(), schema.iteration_outcome, schema.assignment
    settled = select(outcome.c.status, outcome.c.rejection, func.sum(outcome.c.sessions)).where(
        schema.of_task(outcome, task)
    )
    for row in tx.execute(settled.group_by(outcome.c.status, outcome.c.rejection)):
        counts.add(row[0], row[1], int(row[2]))
    for key in unsettled_attempts(tx, [task]):
        for row in tx.execute(_counted(assignment, schema.of_iteration(assignment, key))):
            counts.add(row.status, row.rejection, row.n)
    return TaskTotals(dict(sorted(counts.assignments.items())), dict(sorted(counts.rejections.items())))


def assignments_per_minute(
    tx: Transaction, tasks: Sequence[TaskKey], since: datetime, until: datetime
) -> dict[AssignmentStatus, list[tuple[datetime, int]]]:
    """Sessions by the minute of their first arrival in each status, ascending; minutes without any are left out."""
    found: dict[int, dict[str, int]] = {}
    table = schema.assignment_minute
    first = since.astimezone(UTC).replace(second=0, microsecond=0)
    for task in tasks:
        # A month has tens of thousands of rows, and a text of all of them is read in a quarter of the time.
        each = _minute(tx, table.c.minute) + "=" + cast(table.c.sessions, String)
        query = (
            select(table.c.status, func.aggregate_strings(each, ","))
            .where(
                schema.of_task(table, task),
                table.c.status.in_([int(status) for status in AssignmentStatus]),
                table.c.minute >= first,
                table.c.minute <= until,
            )
            .group_by(table.c.status)
        )
        for status, minutes in tx.execute(query):
            pairs = (one.split("=") for one in minutes.split(","))
            _add(found, ((status, minute, int(sessions)) for minute, sessions in pairs))
    begin, end = first.strftime(_MINUTE), until.astimezone(UTC).strftime(_MINUTE)
    for key in unsettled_attempts(tx, tasks):
        _add(found, [row for row in _arrivals(tx, key) if begin <= row[1] <= end])
    # Many statuses share a minute, and a month has many minutes.
    moments = {minute: _moment(minute) for minute in set().union(*found.values())}
    return {
        AssignmentStatus(status): [(moments[minute], minutes[minute]) for minute in sorted(minutes)]
        for status, minutes in sorted(found.items())
    }


def round_timeline(tx: Transaction, key: IterationKey) -> list[tuple[datetime, IterationStatus]]:
    """When an attempt entered each of its statuses, in order."""
    table = schema.iteration_status_history
    query = select(table.c.created_time, table.c.status).where(schema.of_iteration(table, key))
    return [(row[0], IterationStatus(row[1])) for row in tx.execute(query.order_by(table.c.status_id))]


def arrivals_of_round(tx: Transaction, task: TaskKey, iteration_id: int, *, limit: int = 100_000) -> list[datetime]:
    """When each session of a round, of any attempt, first reached UPLOAD_COMPLETED, in order, at most `limit`."""
    history = schema.assignment_status_history
    moment = func.min(history.c.created_time).label("moment")
    query = (
        select(moment)
        .where(
            schema.of_task(history, task),
            history.c.iteration_id == iteration_id,
            history.c.status == int(AssignmentStatus.UPLOAD_COMPLETED),
        )
        .group_by(history.c.session_id)
        .order_by(moment)
        .limit(limit)
    )
    return list(tx.execute(query).scalars())


def to_settle(tx: Transaction, *, limit: int = 50) -> list[IterationKey]:
    """Attempts that are settled and not summed up yet, at most `limit`."""
    table, assignment = schema.iteration, schema.assignment
    same = [assignment.c[name] == table.c[name] for name in schema.ITERATION_COLUMNS]
    working = assignment.c.status.in_([int(status) for status in _WORKING])
    query = (
        select(*[table.c[name] for name in schema.ITERATION_COLUMNS])
        .where(
            table.c.settled_time.is_(None),
            table.c.status.not_in([int(status) for status in ACTIVE_ITERATION]),
            ~select(assignment.c.status).where(*same, working).exists(),
        )
        .limit(limit)
    )
    # Sorted here: for an order by key a database may walk through all rounds that there ever were.
    return sorted(IterationKey(*row) for row in tx.execute(query))


def settle(tx: Transaction, key: IterationKey, now: datetime) -> bool:
    """Sums an attempt up; False if it is not settled, or was summed up already."""
    table, assignment = schema.iteration, schema.assignment
    mine = schema.of_iteration(table, key)
    working = assignment.c.status.in_([int(status) for status in _WORKING])
    claimed = tx.execute(
        update(table)
        .where(
            mine,
            table.c.settled_time.is_(None),
            table.c.status.not_in([int(status) for status in ACTIVE_ITERATION]),
            ~select(assignment.c.status).where(schema.of_iteration(assignment, key), working).exists(),
        )
        .values(settled_time=now)
    )
    if claimed.rowcount != 1:
        return False
    place = (key.population, key.task_id, key.iteration_id, key.attempt_id)
    values = dict(zip(schema.ITERATION_COLUMNS, place, strict=True))
    seconds = phase_seconds(round_timeline(tx, key)) | _device_seconds(tx, key)
    tx.execute(insert(schema.iteration_summary), [values | {f"{name}_seconds": seconds.get(name) for name in _SECONDS}])
    outcomes = [
        values | {"status": row.status, "rejection": row.rejection or "", "sessions": row.n}
        for row in tx.execute(_counted(assignment, schema.of_iteration(assignment, key)))
    ]
    if outcomes:
        tx.execute(insert(schema.iteration_outcome), outcomes)
    minutes = [
        {
            "population_name": key.population,
            "task_id": key.task_id,
            "status": status,
            "minute": _moment(minute),
            "sessions": sessions,
        }
        # In one order, so that two engines never wait for each other.
        for status, minute, sessions in sorted(_arrivals(tx, key))
    ]
    if minutes:
        make = postgresql_insert if tx.dialect.name == "postgresql" else sqlite_insert
        added = make(schema.assignment_minute)
        whole = schema.assignment_minute.c.sessions + added.excluded.sessions
        keys = [column.name for column in schema.assignment_minute.primary_key]
        tx.execute(added.on_conflict_do_update(index_elements=keys, set_={"sessions": whole}), minutes)
    return True


def _summaries(tx: Transaction, task: TaskKey, rows: Sequence[Row[Any]]) -> list[RoundSummary]:
    """Of some attempts of one task that follow one another."""
    if not rows:
        return []
    first, last = rows[0].iteration_id, rows[-1].iteration_id
    counts, seconds = _settled(tx, task, first, last)
    released = _released(tx, task, first, last)
    found = []
    for row in rows:
        one = iteration_row(row)
        if row.settled_time is None:
            counted, measured = _live(tx, one.key)
            found.append(_summary(one, counted, measured, released.get(one.key)))
        else:
            place = row.iteration_id, row.attempt_id
            counted = counts.get(place, _Counts())
            found.append(_summary(one, counted, seconds.get(place, {}), released.get(one.key)))
    return found


def _summary(
    row: IterationRow, counts: _Counts, seconds: Mapping[str, float | None], released: datetime | None
) -> RoundSummary:
    return RoundSummary(
        key=row.key,
        status=row.status,
        opened=row.created,
        entered=row.entered,
        released=released,
        expires=row.expires,
        report_goal=row.report_goal,
        max_aggregation_size=row.max_aggregation_size,
        evaluated_iteration_id=row.info.evaluation_training_iteration_id or None,
        reason=row.reason,
        assignments=dict(sorted(counts.assignments.items())),
        rejections=dict(sorted(counts.rejections.items())),
        **{f"{name}_seconds": seconds.get(name) for name in _SECONDS},
    )


def _settled(
    tx: Transaction, task: TaskKey, first: int, last: int
) -> tuple[dict[tuple[int, int], _Counts], dict[tuple[int, int], dict[str, float | None]]]:
    """By round and attempt: what became of the devices, and the durations."""
    outcome, summary = schema.iteration_outcome, schema.iteration_summary
    counts: dict[tuple[int, int], _Counts] = {}
    counted = select(*[outcome.c[name] for name in ("iteration_id", "attempt_id", "status", "rejection", "sessions")])
    for number, attempt, status, rejection, sessions in tx.execute(
        counted.where(*_between(outcome, task, first, last))
    ):
        counts.setdefault((number, attempt), _Counts()).add(status, rejection, sessions)
    measured = select(
        *[summary.c[name] for name in ("iteration_id", "attempt_id")],
        *[summary.c[f"{name}_seconds"] for name in _SECONDS],
    )
    seconds: dict[tuple[int, int], dict[str, float | None]] = {}
    for number, attempt, *durations in tx.execute(measured.where(*_between(summary, task, first, last))):
        seconds[number, attempt] = dict(zip(_SECONDS, durations, strict=True))
    return counts, seconds


def _released(tx: Transaction, task: TaskKey, first: int, last: int) -> dict[IterationKey, datetime]:
    history = schema.iteration_status_history
    query = select(*[history.c[name] for name in (*schema.ITERATION_COLUMNS, "created_time")]).where(
        *_between(history, task, first, last), history.c.status == int(IterationStatus.COMPLETED)
    )
    return {IterationKey(*row[:4]): row[4] for row in tx.execute(query)}


def _live(tx: Transaction, key: IterationKey) -> tuple[_Counts, dict[str, float]]:
    counts, table = _Counts(), schema.assignment
    for row in tx.execute(_counted(table, schema.of_iteration(table, key))):
        counts.add(row.status, row.rejection, row.n)
    seconds = phase_seconds(round_timeline(tx, key))
    if sum(counts.assignments.values()) <= MOST_LIVE_SESSIONS:
        seconds |= _device_seconds(tx, key)
    return counts, seconds


def _counted(table: Table, where: ColumnElement[bool]) -> Any:
    return (
        select(table.c.status, table.c.rejection, func.count().label("n"))
        .where(where)
        .group_by(table.c.status, table.c.rejection)
    )


def phase_seconds(timeline: Iterable[tuple[datetime, IterationStatus]]) -> dict[str, float]:
    """How long each phase of a round that is over took, `completion` all of them; phases it never left are absent."""
    first: dict[IterationStatus, datetime] = {}
    for moment, status in timeline:
        first.setdefault(status, moment)
    spans = {
        "collecting": (IterationStatus.COLLECTING, IterationStatus.AGGREGATING),
        "aggregating": (IterationStatus.AGGREGATING, IterationStatus.APPLYING),
        "applying": (IterationStatus.APPLYING, IterationStatus.COMPLETED),
        "completion": (IterationStatus.COLLECTING, IterationStatus.COMPLETED),
    }
    return {
        name: (first[end] - first[start]) / timedelta(seconds=1)
        for name, (start, end) in spans.items()
        if start in first and end in first
    }


def _device_seconds(tx: Transaction, key: IterationKey) -> dict[str, float]:
    times: dict[str, dict[int, datetime]] = {}
    for session, status, moment in tx.execute(_first_arrivals(key)):
        times.setdefault(session, {})[status] = moment

    def spans(start: AssignmentStatus, end: AssignmentStatus) -> list[float]:
        return [(one[end] - one[start]) / timedelta(seconds=1) for one in times.values() if start in one and end in one]

    measured: dict[str, tuple[Callable[[list[float]], float], list[float]]] = {
        "training": (median, spans(AssignmentStatus.ASSIGNED, AssignmentStatus.LOCAL_COMPLETED)),
        "upload": (median, spans(AssignmentStatus.LOCAL_COMPLETED, AssignmentStatus.UPLOAD_COMPLETED)),
        "assignment": (fmean, spans(AssignmentStatus.ASSIGNED, AssignmentStatus.UPLOAD_COMPLETED)),
    }
    return {name: float(middle(values)) for name, (middle, values) in measured.items() if values}


def _first_arrivals(key: IterationKey) -> Any:
    history = schema.assignment_status_history
    return (
        select(history.c.session_id, history.c.status, func.min(history.c.created_time).label("moment"))
        .where(schema.of_iteration(history, key))
        .group_by(history.c.session_id, history.c.status)
    )


def _arrivals(tx: Transaction, key: IterationKey) -> list[tuple[int, str, int]]:
    """Status, minute, and how many sessions came to the status for the first time then."""
    first = _first_arrivals(key).subquery()
    minute = _minute(tx, first.c.moment)
    query = select(first.c.status, minute, func.count()).group_by(first.c.status, minute)
    return [(row[0], row[1], row[2]) for row in tx.execute(query)]


def _minute(tx: Transaction, moment: ColumnElement[Any]) -> ColumnElement[str]:
    """The minute of a time, as text in UTC that sorts by time."""
    if tx.dialect.name == "postgresql":
        return func.to_char(func.timezone("UTC", moment), "YYYY-MM-DD HH24:MI", type_=String)
    return func.substr(cast(moment, String), 1, 16, type_=String)


def _moment(minute: str) -> datetime:
    return datetime.fromisoformat(minute).replace(tzinfo=UTC)


def unsettled_attempts(tx: Transaction, tasks: Sequence[TaskKey]) -> list[IterationKey]:
    """Attempts of some tasks' rounds that are not summed up, by their keys."""
    table = schema.iteration
    found: list[IterationKey] = []
    for start in range(0, len(tasks), _CHUNK):
        these = [(one.population, one.task_id) for one in tasks[start : start + _CHUNK]]
        query = select(*[table.c[name] for name in schema.ITERATION_COLUMNS]).where(
            table.c.settled_time.is_(None), tuple_(table.c.population_name, table.c.task_id).in_(these)
        )
        found += [IterationKey(*row) for row in tx.execute(query)]
    return sorted(found)


def _between(table: Table, task: TaskKey, first: int, last: int) -> tuple[ColumnElement[bool], ...]:
    return schema.of_task(table, task), table.c.iteration_id >= first, table.c.iteration_id <= last


def _add(found: dict[int, dict[str, int]], rows: Iterable[Any]) -> None:
    for status, minute, sessions in rows:
        minutes = found.setdefault(status, {})
        minutes[minute] = minutes.get(minute, 0) + sessions
