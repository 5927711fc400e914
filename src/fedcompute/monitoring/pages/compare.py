"""Several runs side by side: any metric in one chart, and what differs between their configurations."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Any
from urllib.parse import urlencode

from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import Response

from fedcompute.monitoring.comparison import Fact, RunFacts, differing, labels
from fedcompute.monitoring.pages.charts import MOST_POINTS, Chart, Series
from fedcompute.monitoring.pages.rendering import chart_answer, live_page
from fedcompute.monitoring.pages.table import chart, page
from fedcompute.monitoring.pages.task_view import plan_facts
from fedcompute.monitoring.plots import metric_label
from fedcompute.privacy.chain import Entry
from fedcompute.server.context import Context, context_of
from fedcompute.storage.charts import (
    count_released,
    metric_names,
    metric_series,
    overview_version,
    recent_tasks,
    task_entries,
    task_version,
)
from fedcompute.storage.database import Transaction
from fedcompute.storage.keys import TaskKey
from fedcompute.storage.schema import AssignmentStatus
from fedcompute.storage.summaries import RoundSummary, round_attempts, round_summaries
from fedcompute.storage.tasks import TaskRow, get_task

MOST_RUNS = 8
_OFFERED = 50


@dataclass(frozen=True)
class Run:
    """A run in the comparison; the best value of the metric is the highest, of a loss the lowest.

    `spent`: its last entry in the ledger, whose epsilon is that of the whole population.
    """

    task: TaskRow
    label: str
    facts: dict[str, Fact]
    final: float | None
    best: float | None
    rounds: int
    spent: Entry | None
    seconds: float | None


async def compare_page(request: Request) -> Response:
    """Runs side by side."""
    context = context_of(request)
    query = request.query_params
    return await live_page(request, "compare.html", partial(_version, context, query), partial(_values, context, query))


async def compare_chart(request: Request) -> Response:
    """One metric of several runs."""
    return await chart_answer(request, partial(_chart, context_of(request), request.query_params))


def run_facts(context: Context, row: TaskRow) -> RunFacts:
    """What a task's configuration says, as comparisons name it."""
    facts: dict[str, Fact] = {"kind": row.kind.name.lower(), **plan_facts(context, row)[0]}
    facts |= {"report goal": row.min_aggregation_size, "rounds": row.total_iteration}
    return RunFacts(row.key.population, row.key.task_id, facts)


def _version(context: Context, query: QueryParams) -> str:
    with context.database.read() as tx:
        chosen = _chosen(tx, query)
        return " ".join([overview_version(tx), *(task_version(tx, row.key) for row in chosen)])


def _values(context: Context, query: QueryParams) -> dict[str, Any]:
    wanted = query.get("population", "")[:64]
    with context.database.read() as tx:
        rows = _chosen(tx, query)
        offered = recent_tasks(tx, population=wanted or None, limit=_OFFERED)
        names = {row.key: metric_names(tx, row.key) for row in rows}
        known = [{metric_label(name) for name in found} for found in names.values()]
        common = sorted(set.union(*known)) if known else []
        metric = _metric(query, common)
        runs = _runs(context, tx, rows, metric)
    facts = [run_facts(context, row) for row in rows]
    chosen = {row.key for row in rows}
    return {
        "runs": runs,
        "names": common,
        "metric": metric,
        "by_time": query.get("x") == "time",
        "offered": [*rows, *(row for row in offered if row.key not in chosen)],
        "chosen": chosen,
        "differing": differing(facts),
        "wanted": wanted,
        "most": MOST_RUNS,
        "query": urlencode([*(("run", str(row.key)) for row in rows), ("metric", metric)]),
    }


def _chart(context: Context, query: QueryParams) -> Chart:
    measure, by_time = query.get("measure", "metric"), query.get("x") == "time"
    with context.database.read() as tx:
        rows = _chosen(tx, query)
        found = [_points(tx, row.key, query.get("metric", ""), measure, by_time) for row in rows]
    names = labels([run_facts(context, row) for row in rows])
    series = [
        Series(name, [x for x, _ in points], [y for _, y in points]) for name, points in zip(names, found, strict=True)
    ]
    titles = {"devices": ("Devices per round", "devices"), "seconds": ("Iteration processing time", "seconds")}
    metric = query.get("metric", "")
    title, value = titles.get(measure, (metric.capitalize() or "Metric", metric))
    axis = "seconds since the first round opened" if by_time else "round"
    share = measure == "metric" and "accuracy" in metric
    return Chart(title, axis, value, series, share=share, empty="None of these runs has measured it.")


def _points(
    tx: Transaction, key: TaskKey, metric: str, measure: str, by_time: bool
) -> Sequence[tuple[float, float | None]]:
    rounds = {one.key.iteration_id: one for one in round_summaries(tx, key, limit=MOST_POINTS)}
    values: list[tuple[int, float | None]]
    if measure == "devices":
        values = [(number, one.assignments.get(AssignmentStatus.UPLOAD_COMPLETED, 0)) for number, one in rounds.items()]
    elif measure == "seconds":
        values = [(number, one.completion_seconds) for number, one in rounds.items()]
    else:
        name = next((one for one in metric_names(tx, key) if metric_label(one) == metric), "")
        values = metric_series(tx, key, [name], limit=MOST_POINTS)[name]
    if not by_time:
        return values
    if not rounds:
        return []
    first = _began(tx, key, list(rounds.values()))
    ended = {number: one.released or one.entered for number, one in rounds.items()}
    return [((ended[number] - first) / timedelta(seconds=1), value) for number, value in values if number in ended]


def _began(tx: Transaction, key: TaskKey, rounds: Sequence[RoundSummary]) -> datetime:
    """When a task's first round opened, which may lie before the newest `rounds`."""
    return min(one.opened for one in [*round_attempts(tx, key, 1), *rounds])


def _runs(context: Context, tx: Transaction, rows: Sequence[TaskRow], metric: str) -> list[Run]:
    facts = [run_facts(context, row) for row in rows]
    found = []
    for row, one, label in zip(rows, facts, labels(facts), strict=True):
        name = next((other for other in metric_names(tx, row.key) if metric_label(other) == metric), "")
        values = [value for _, value in metric_series(tx, row.key, [name])[name] if value is not None]
        entries = task_entries(tx, row.key, limit=1)
        rounds = round_summaries(tx, row.key, limit=MOST_POINTS)
        ends = [attempt.released for attempt in rounds if attempt.released]
        better = min if "loss" in metric or "entropy" in metric or "error" in metric else max
        found.append(
            Run(
                row,
                label,
                dict(one.facts),
                values[-1] if values else None,
                better(values) if values else None,
                count_released(tx, row.key),
                entries[-1] if entries else None,
                (max(ends) - _began(tx, row.key, rounds)) / timedelta(seconds=1) if ends else None,
            )
        )
    return found


def _chosen(tx: Transaction, query: QueryParams) -> list[TaskRow]:
    """The runs that a query names, else the newest two of a kind that have measured the same."""
    keys = [key for text in query.getlist("run")[:MOST_RUNS] if (key := _key(text)) is not None]
    if query.getlist("run"):
        return [row for key in dict.fromkeys(keys) if (row := get_task(tx, key)) is not None]
    seen: list[tuple[TaskRow, set[str]]] = []
    for row in recent_tasks(tx, limit=_OFFERED):
        names = {metric_label(name) for name in metric_names(tx, row.key)}
        for newer, known in seen:
            if newer.kind is row.kind and names & known:
                return [row, newer]
        seen.append((row, names))
    return []


def _key(text: str) -> TaskKey | None:
    population, _, number = text.rpartition("/")
    return TaskKey(population, int(number)) if population and number.isdecimal() and len(number) < 19 else None


def _metric(query: QueryParams, names: Sequence[str]) -> str:
    wanted = query.get("metric", "")
    return wanted if wanted in names else [*(name for name in names if "accuracy" in name), *names, ""][0]


operations = (page("/compare", compare_page, "compare"), chart("/charts/compare", compare_chart, "compare"))
