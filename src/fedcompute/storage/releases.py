"""What left the server about devices: completed rounds, metrics, the privacy ledger (spec/server.md 5.5, 9)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import insert, select

from fedcompute.errors import OperationFailed, Reason
from fedcompute.storage import schema
from fedcompute.storage.database import Transaction
from fedcompute.storage.keys import IterationKey, TaskKey
from fedcompute.storage.schema import IterationStatus

LIST_LIMIT = 100_000


@dataclass(frozen=True)
class LedgerEntry:
    """One release under differential privacy, as data that an accountant reads; epsilon is never stored.

    `event` holds `"class"` (a name of dp-accounting's events) and that event's arguments; `clip_norm` is the L2 norm
    in model units (None where nothing is clipped), `report_goal` the fixed denominator, `contributions` the devices
    that the released sum holds.
    """

    iteration: IterationKey
    event: Mapping[str, Any]
    clip_norm: float | None
    report_goal: int
    contributions: int
    created: datetime


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
    tx: Transaction, task: TaskKey, *, since: datetime | None = None, limit: int = LIST_LIMIT
) -> list[CompletedIteration]:
    """A task's released iterations by id, completed at or after `since`: the candidates of evaluation selectors."""
    history = schema.iteration_status_history
    query = (
        select(history.c.iteration_id, history.c.created_time)
        .where(schema.of_task(history, task), history.c.status == int(IterationStatus.COMPLETED))
        .order_by(history.c.iteration_id)
        .limit(limit)
    )
    if since is not None:
        query = query.where(history.c.created_time >= since)
    return [CompletedIteration(row.iteration_id, row.created_time) for row in tx.execute(query)]


def metrics_of(tx: Transaction, task: TaskKey, *, limit: int = LIST_LIMIT) -> list[MetricRow]:
    """A task's metrics by iteration, then name."""
    table = schema.model_metrics
    query = (
        select(table)
        .where(schema.of_task(table, task))
        .order_by(table.c.iteration_id, table.c.metric_name)
        .limit(limit)
    )
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
    tx: Transaction, population: str, *, task: TaskKey | None = None, limit: int = LIST_LIMIT
) -> list[LedgerEntry]:
    """What a population's devices were charged for, in the order of release; `task` narrows it to one task.

    Raises OperationFailed(STORAGE_FAILED) if there are more than `limit`: a part of a ledger would understate the loss.
    """
    table = schema.privacy_ledger
    query = (
        select(table)
        .where(table.c.population_name == population)
        .order_by(table.c.created_time, table.c.task_id, table.c.iteration_id)
        .limit(limit + 1)
    )
    if task is not None:
        query = query.where(schema.of_task(table, task))
    rows = tx.execute(query).all()
    if len(rows) > limit:
        raise OperationFailed(Reason.STORAGE_FAILED, f"the ledger of {population} has more than {limit} entries")
    return [
        LedgerEntry(
            iteration=IterationKey(row.population_name, row.task_id, row.iteration_id),
            event=row.event,
            clip_norm=row.clip_norm,
            report_goal=row.report_goal,
            contributions=row.contributions,
            created=row.created_time,
        )
        for row in rows
    ]


def record_entry(tx: Transaction, entry: LedgerEntry) -> None:
    """Adds one entry; raises `sqlalchemy.exc.IntegrityError` if the iteration has one already.

    Formal guarantees: entries are only ever added, one per iteration; no function of this package changes or deletes
    one, and they outlive their task's rows.
    """
    tx.execute(
        insert(schema.privacy_ledger).values(
            population_name=entry.iteration.population,
            task_id=entry.iteration.task_id,
            iteration_id=entry.iteration.iteration_id,
            event=dict(entry.event),
            clip_norm=entry.clip_norm,
            report_goal=entry.report_goal,
            contributions=entry.contributions,
            created_time=entry.created,
        )
    )
