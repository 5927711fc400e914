"""What a task's page says in words and numbers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from starlette.datastructures import QueryParams

from fedcompute.errors import CATALOGUE, FedComputeError, Reason
from fedcompute.monitoring.comparison import Fact, facts_of_process
from fedcompute.server.api.tasks import existing_task
from fedcompute.server.context import Context
from fedcompute.storage.blobs import BlobMissing
from fedcompute.storage.budgets import budget_of
from fedcompute.storage.charts import count_released, evaluations_of, metric_names, metric_series, newest_entries
from fedcompute.storage.database import Transaction
from fedcompute.storage.keys import TaskKey
from fedcompute.storage.paths import MODEL, failure_path
from fedcompute.storage.releases import MetricRow, metrics_of
from fedcompute.storage.schema import ACTIVE_ITERATION, ACTIVE_TASK, AssignmentStatus, TaskStatus
from fedcompute.storage.summaries import RoundSummary, round_summaries, task_totals
from fedcompute.storage.tasks import TaskRow, get_task

ROUNDS_SHOWN = 50
_RECENT = 10
_FAILURE_LIMIT = 64 * 1024


@dataclass(frozen=True)
class Measured:
    """A metric's newest value, the one before it, and the round it is of."""

    name: str
    value: float
    before: float | None
    iteration_id: int

    @property
    def change(self) -> str:
        """How far it moved since the round before, with its sign; empty if it is the first."""
        return "" if self.before is None else f"{self.value - self.before:+.3g}"


@dataclass(frozen=True)
class Spending:
    """What the population had spent at this task's last release, and what limits it; None where nothing does."""

    epsilon: float | None
    delta: float
    limit: float | None
    limit_name: str

    @property
    def left(self) -> float | None:
        """What is left of the limit; None without one."""
        if self.limit is None or self.epsilon is None:
            return None
        return max(0.0, self.limit - self.epsilon)


def task_values(context: Context, key: TaskKey, query: QueryParams) -> dict[str, Any]:
    """Everything on a task's page but its charts. Raises RequestRejected(NOT_FOUND)."""
    before = int(text) if (text := query.get("before", "")).isdecimal() and len(text) < 10 else None
    with context.database.read() as tx:
        row = existing_task(get_task(tx, key), key)
        facts, promised = plan_facts(context, row)
        shown = round_summaries(tx, key, before=before, limit=ROUNDS_SHOWN + 1)
        newest = round_summaries(tx, key, limit=_RECENT) if before is not None else shown[-_RECENT:]
        oldest = shown[0].key.iteration_id if shown else 1
        metrics = _by_round(metrics_of(tx, key, after=oldest - 1, last=before))
        names = metric_names(tx, key)
        released = count_released(tx, key)
        totals = task_totals(tx, key)
        evaluations = evaluations_of(tx, key)
        spending = _spending(tx, row, promised)
        latest = [measured(tx, key, name) for name in headline(names)]
        evaluated = (
            [measured(tx, evaluations[0].key, name) for name in headline(metric_names(tx, evaluations[0].key))]
            if evaluations
            else []
        )
    older = len(shown) > ROUNDS_SHOWN
    shown = shown[-ROUNDS_SHOWN:]
    pace = _seconds_per_round(newest)
    left = max(0, row.total_iteration - released)
    return {
        "task": row,
        "key": key,
        "released": released,
        "under_way": [one for one in newest if one.status in ACTIVE_ITERATION],
        "rounds": list(reversed(shown)),
        "older": shown[0].key.iteration_id if older else None,
        "before": before,
        "metrics": metrics,
        "names": names,
        "columns": headline(names),
        "rest": [name for name in names if name not in headline(names)],
        "latest": [one for one in latest if one],
        "evaluated": [one for one in evaluated if one],
        "evaluations": evaluations,
        "measures": None if row.is_training else _training_of(row),
        "totals": totals,
        "spending": spending,
        "facts": facts,
        "failure": failure_of(context, row),
        "pace": pace,
        "seconds_left": left * pace if pace and row.status in ACTIVE_TASK else None,
        "contributed": lambda one: one.assignments.get(AssignmentStatus.UPLOAD_COMPLETED, 0),
        "announcement": _announcement(newest, latest),
        "can_pause": row.status is TaskStatus.OPEN,
        "can_resume": row.status is TaskStatus.PAUSED,
        "can_cancel": row.status in ACTIVE_TASK,
        "cancel_needs_operator": row.status is not TaskStatus.CREATED,
    }


def headline(names: Sequence[str]) -> list[str]:
    """Of a task's metrics those that people look at first: accuracies, then the loss, else the first one."""
    first = [name for name in names if "accuracy" in name] + [name for name in names if name.endswith("/loss")]
    return first[:4] or list(names[:1])


def plan_facts(context: Context, row: TaskRow) -> tuple[dict[str, Fact], float | None]:
    """What a task's plan says of its configuration, and the epsilon that it promises; nothing before it is open."""
    if row.status is TaskStatus.CREATED:
        # Its plan may still be replaced; the engine would go on with the one that was read here.
        return {}, None
    try:
        process = context.plans.server_plan(row.key).process
    except FedComputeError:
        return {}, None
    promised = process.privacy_claim.epsilon if process.HasField("privacy_claim") else None
    return facts_of_process(process), promised or None


def failure_of(context: Context, row: TaskRow) -> Mapping[str, str] | None:
    """Why a task ended early: `code`, `message`, `remedy`; None if it did not."""
    if row.reason is None:
        return None
    try:
        stored = json.loads(context.blobs.get(MODEL, failure_path(row.key), limit=_FAILURE_LIMIT))
        return {name: str(stored.get(name, "")) for name in ("code", "message", "remedy")}
    except (BlobMissing, FedComputeError, ValueError):
        return reason_of(row.reason)


def reason_of(code: str) -> Mapping[str, str]:
    """A stored reason in words, with what to do."""
    try:
        remedy = CATALOGUE[Reason(code)].remedy
    except ValueError:
        remedy = ""
    return {"code": code, "message": code.replace("_", " "), "remedy": remedy}


def measured(tx: Transaction, key: TaskKey, name: str) -> Measured | None:
    """A metric's newest value; None if none of the latest rounds has one."""
    points = [(number, value) for number, value in metric_series(tx, key, [name], limit=20)[name] if value is not None]
    if not points:
        return None
    return Measured(name, points[-1][1], points[-2][1] if len(points) > 1 else None, points[-1][0])


def _training_of(row: TaskRow) -> TaskKey:
    """What an evaluation task measures."""
    info = row.info.evaluation_info
    return TaskKey(info.training_population_name or row.key.population, info.training_task_id)


def _by_round(rows: Sequence[MetricRow]) -> dict[int, dict[str, float | None]]:
    found: dict[int, dict[str, float | None]] = {}
    for row in rows:
        found.setdefault(row.iteration_id, {})[row.name] = row.value
    return found


def _spending(tx: Transaction, row: TaskRow, promised: float | None) -> Spending | None:
    entries = newest_entries(tx, row.key.population, limit=1)
    if not entries or not row.is_training:
        return None
    entry = entries[0]
    budget = budget_of(tx, row.key.population)
    if budget is not None:
        return Spending(entry.cumulative_epsilon, entry.delta, budget.epsilon, "the population's budget")
    return Spending(entry.cumulative_epsilon, entry.delta, promised, "the plan's promise")


def _seconds_per_round(rounds: Sequence[RoundSummary]) -> float | None:
    times: list[datetime] = sorted(one.released for one in rounds if one.released)
    if len(times) < 2:
        return None
    return (times[-1] - times[0]) / timedelta(seconds=1) / (len(times) - 1) or None


def _announcement(rounds: Sequence[RoundSummary], latest: Sequence[Measured | None]) -> str:
    done = [one.key.iteration_id for one in rounds if one.released]
    if not done:
        return ""
    told = [f"{one.name.rpartition('/')[2].replace('_', ' ')} {one.value:.3g}" for one in latest if one]
    return ", ".join([f"Round {done[-1]} released", *told[:2]])
