"""What left the server about devices: completed rounds, metrics, the privacy ledger (spec/server.md 5.5, 9)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Row, and_, func, insert, select, text

from fedcompute.privacy.budget import Budget
from fedcompute.privacy.chain import Entry, Release, chained
from fedcompute.storage import schema
from fedcompute.storage.budgets import budget_of
from fedcompute.storage.database import Transaction, lock_population
from fedcompute.storage.keys import IterationKey, TaskKey
from fedcompute.storage.schema import IterationStatus

LIST_LIMIT = 100_000
_LOCK = 0x6C6564676572
_LEDGER = schema.privacy_ledger


class LedgerMoved(Exception):
    """Since the caller looked, the population was charged for something or its budget changed; nothing is written."""


@dataclass(frozen=True)
class Standing:
    """What a decision about a budget rests on: the population's last charged entry (0: none) and its budget."""

    last_charge: int
    budget: Budget | None


@dataclass(frozen=True)
class CompletedIteration:
    """A round whose result was released, and when (UTC)."""

    iteration_id: int
    completed: datetime


@dataclass(frozen=True)
class MetricRow:
    """One metric of one round; the value is None where there was nothing to measure or the result was not finite."""

    iteration_id: int
    name: str
    value: float | None
    created: datetime


def completed_iterations(
    tx: Transaction, task: TaskKey, *, since: datetime | None = None, stored: bool = False, limit: int = LIST_LIMIT
) -> list[CompletedIteration]:
    """A task's released iterations by id, completed at or after `since`: the candidates of evaluation selectors.

    With `stored`, those alone whose checkpoint retention has not given up.
    """
    history = schema.iteration_status_history
    query = (
        select(history.c.iteration_id, history.c.created_time)
        .where(schema.of_task(history, task), history.c.status == int(IterationStatus.COMPLETED))
        .order_by(history.c.iteration_id)
        .limit(limit)
    )
    if since is not None:
        query = query.where(history.c.created_time >= since)
    if stored:
        table = schema.iteration
        same = and_(*(table.c[name] == history.c[name] for name in schema.ITERATION_COLUMNS))
        query = query.join(table, same).where(table.c.purged_time.is_(None))
    return [CompletedIteration(row.iteration_id, row.created_time) for row in tx.execute(query)]


def metrics_of(
    tx: Transaction, task: TaskKey, *, after: int = 0, last: int | None = None, limit: int = LIST_LIMIT
) -> list[MetricRow]:
    """A task's metrics by iteration, then name, at most `limit`; only of iterations behind `after`, up to `last`."""
    table = schema.model_metrics
    query = (
        select(table)
        .where(schema.of_task(table, task), table.c.iteration_id > after)
        .order_by(table.c.iteration_id, table.c.metric_name)
        .limit(limit)
    )
    if last is not None:
        query = query.where(table.c.iteration_id <= last)
    return [
        MetricRow(row.iteration_id, row.metric_name, row.metric_value, row.created_time) for row in tx.execute(query)
    ]


def record_metrics(tx: Transaction, key: IterationKey, metrics: Mapping[str, float | None], now: datetime) -> None:
    """Stores a round's metrics, once; values that are not finite become None.

    Raises `sqlalchemy.exc.IntegrityError` if one is stored already.
    """
    rows = [
        {
            "population_name": key.population,
            "task_id": key.task_id,
            "iteration_id": key.iteration_id,
            "metric_name": name,
            "metric_value": float(value) if value is not None and math.isfinite(value) else None,
            "created_time": now,
        }
        for name, value in metrics.items()
    ]
    if rows:
        tx.execute(insert(schema.model_metrics), rows)


def ledger_entries(
    tx: Transaction, population: str, *, task: TaskKey | None = None, after: int = 0, limit: int = LIST_LIMIT
) -> list[Entry]:
    """A population's ledger in its order, from the entry behind `after`, at most `limit` of it; `task` narrows it."""
    query = (
        select(_LEDGER)
        .where(_LEDGER.c.population_name == population, _LEDGER.c.sequence > after)
        .order_by(_LEDGER.c.sequence)
        .limit(limit)
    )
    if task is not None:
        query = query.where(schema.of_task(_LEDGER, task))
    return [_entry(row) for row in tx.execute(query)]


def charged_entries(tx: Transaction, population: str, *, after: int = 0) -> list[Entry]:
    """Every entry behind `after` that a population is charged for, in its order: a part would understate the loss."""
    query = (
        select(_LEDGER)
        .where(_LEDGER.c.population_name == population, _LEDGER.c.sequence > after, _LEDGER.c.event.is_not(None))
        .order_by(_LEDGER.c.sequence)
    )
    return [_entry(row) for row in tx.execute(query)]


def count_entries(tx: Transaction, population: str) -> dict[int, int]:
    """Task id -> number of the ledger's entries."""
    query = (
        select(_LEDGER.c.task_id, func.count())
        .where(_LEDGER.c.population_name == population)
        .group_by(_LEDGER.c.task_id)
        .order_by(_LEDGER.c.task_id)
    )
    return {row[0]: row[1] for row in tx.execute(query)}


def standing_of(tx: Transaction, population: str) -> Standing:
    """What a decision about the population's next release rests on."""
    last = tx.execute(
        select(_LEDGER.c.sequence)
        .where(_LEDGER.c.population_name == population, _LEDGER.c.event.is_not(None))
        .order_by(_LEDGER.c.sequence.desc())
        .limit(1)
    ).scalar_one_or_none()
    return Standing(last or 0, budget_of(tx, population))


def append_releases(
    tx: Transaction, key: IterationKey, releases: Sequence[Release], standing: Standing | None, now: datetime
) -> list[Entry]:
    """Chains what a round releases to its population's ledger, all of it together, and returns the entries.

    `standing`: what was known when it was decided that the round may be charged; None for a round that charges
    nothing, which repeats the cumulative epsilon of the entry before it. Raises LedgerMoved if it has changed since,
    ValueError for releases of another round or a charge without a standing, and `sqlalchemy.exc.IntegrityError` if
    one of them is in the ledger already.

    Formal guarantees: entries are only ever added, one per thing that a round releases; no function of this package
    changes or deletes one, and they outlive their task's rows. With a standing, no charge lies between the one that
    the decision knew of and these.
    """
    if any(IterationKey(one.population, one.task_id, one.iteration_id, key.attempt_id) != key for one in releases):
        raise ValueError(f"the ledger entries of {key} belong to another round")
    lock_population(tx, key.population)
    charges = any(one.event is not None for one in releases)
    if charges and standing is None:
        raise ValueError(f"{key} is charged for without a look at the ledger")
    _take_turns(tx, key.population)
    last = tx.execute(
        select(_LEDGER).where(_LEDGER.c.population_name == key.population).order_by(_LEDGER.c.sequence.desc()).limit(1)
    ).one_or_none()
    if standing is not None and standing_of(tx, key.population) != standing:
        raise LedgerMoved(f"the ledger or the budget of {key.population} has moved on")
    before = None if last is None else _entry(last)
    entries: list[Entry] = []
    for release in releases:
        if not charges:
            epsilon, delta = (before.cumulative_epsilon, before.delta) if before else (0.0, release.delta)
            release = replace(release, cumulative_epsilon=epsilon, delta=delta)
        entries.append(chained(entries[-1] if entries else before, release, _created(now)))
    if entries:
        tx.execute(insert(_LEDGER), [_values(entry, now) for entry in entries])
    return entries


def _take_turns(tx: Transaction, population: str) -> None:
    # SQLite has one writer at a time; elsewhere two releases of a population would both be its next entry.
    if tx.dialect.name == "postgresql":
        tx.execute(
            text("SELECT pg_advisory_xact_lock(hashtextextended(:name, :salt))"), {"name": population, "salt": _LOCK}
        )


def _created(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="microseconds")


def _values(entry: Entry, now: datetime) -> dict[str, Any]:
    values = {name: value for name, value in asdict(entry).items() if name in _LEDGER.c}
    return values | {"population_name": entry.population, "created_time": now}


def _entry(row: Row[Any]) -> Entry:
    values = {name: value for name, value in row._mapping.items() if name not in ("population_name", "created_time")}
    return Entry(**values, population=row.population_name, created=_created(row.created_time))
