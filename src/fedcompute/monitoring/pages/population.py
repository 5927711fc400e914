"""A population's page: its tasks and rounds, and what its devices do, minute by minute."""

from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from typing import Any

from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import Response

from fedcompute.errors import Reason, RequestRejected
from fedcompute.monitoring.pages.charts import MOST_POINTS, Chart, Series
from fedcompute.monitoring.pages.minutes import RANGES, minutes_chart
from fedcompute.monitoring.pages.populations import task_line
from fedcompute.monitoring.pages.rendering import chart_answer, live_page
from fedcompute.monitoring.pages.table import chart, page
from fedcompute.monitoring.pages.traffic import newest_request, outcomes_chart
from fedcompute.monitoring.plots import metric_label
from fedcompute.server.context import Context, context_of, now
from fedcompute.storage.activity import rounds_opened
from fedcompute.storage.charts import (
    metric_names,
    metric_series,
    newest_attempts,
    overview_version,
    population_overviews,
)
from fedcompute.storage.database import Transaction
from fedcompute.storage.keys import TaskKey
from fedcompute.storage.request_minutes import CHECK_IN, REPORT
from fedcompute.storage.schema import TaskStatus
from fedcompute.storage.tasks import newest_tasks

TASKS = 50
# What a chart of several tasks can show and a person tell apart.
TASKS_DRAWN = 8
ROUNDS = 25


async def population_page(request: Request) -> Response:
    """One population."""
    name, context = str(request.path_params["population"]), context_of(request)
    return await live_page(
        request,
        "population.html",
        partial(_version, context, name),
        partial(_values, context, name, request.query_params),
    )


async def population_chart(request: Request) -> Response:
    """One chart of a population, by its name."""
    drawn = POPULATION_CHARTS.get(request.path_params["chart"])
    if drawn is None:
        raise RequestRejected(Reason.NOT_FOUND, "there is no such chart")
    name = str(request.path_params["population"])
    return await chart_answer(request, partial(drawn, context_of(request), name, request.query_params))


def span_of(query: QueryParams, usual: str = "30 days") -> tuple[str, timedelta]:
    """The name and length of the range of time that a query asks for; the usual one if it asks for none."""
    name = query.get("range", usual)
    name = name if name in RANGES else usual
    return name, RANGES[name]


def _version(context: Context, name: str) -> str:
    with context.database.read() as tx:
        # Check-ins that get nothing change no task; their charts follow once a minute.
        return f"{overview_version(tx, name)} {newest_request(tx, context, name)}"


def _values(context: Context, name: str, query: QueryParams) -> dict[str, Any]:
    status = TaskStatus.__members__.get(query.get("status", ""))
    before = int(text) if (text := query.get("before", "")).isdecimal() and len(text) < 10 else None
    with context.database.read() as tx:
        overview = next(iter(population_overviews(tx, name=name)), None)
        if overview is None:
            raise RequestRejected(Reason.NOT_FOUND, f"there is no population {name}")
        rows = newest_tasks(tx, name, status=status, before=before, limit=TASKS + 1)
        shown, drawn = rows[:TASKS], _keys(tx, name, TASKS_DRAWN)
        names = sorted({metric_label(one) for key in drawn for one in metric_names(tx, key)})
        lines = {row.key: task_line(tx, row) for row in shown}
        rounds = newest_attempts(tx, name, limit=ROUNDS)
    wanted, usual = query.get("metric", ""), [*(one for one in names if "accuracy" in one), *names, ""][0]
    return {
        "population": name,
        "overview": overview,
        "tasks": shown,
        "lines": lines,
        "older": rows[TASKS - 1].key.task_id if len(rows) > TASKS else None,
        "rounds": rounds,
        "status": status.name if status is not None else "",
        "statuses": [one.name for one in TaskStatus],
        "names": names,
        "metric": wanted if wanted in names else usual,
        "range": span_of(query)[0],
        "ranges": list(RANGES),
        "announcement": f"{overview.rounds_released} rounds released",
    }


def _keys(tx: Transaction, name: str, limit: int) -> list[TaskKey]:
    return [row.key for row in newest_tasks(tx, name, limit=limit)]


def _minutes(context: Context, name: str, query: QueryParams) -> Chart:
    with context.database.read() as tx:
        return minutes_chart(tx, _keys(tx, name, TASKS), now(), span_of(query)[1])


def _over_time(context: Context, name: str, query: QueryParams) -> Chart:
    since = now() - span_of(query)[1]
    with context.database.read() as tx:
        keys = _keys(tx, name, TASKS_DRAWN)
        rounds = {key: rounds_opened(tx, key, since, limit=MOST_POINTS) for key in reversed(keys)}
    series = [
        Series(f"task {key.task_id}", [opened for _, opened in found], [number for number, _ in found])
        for key, found in rounds.items()
    ]
    return Chart("Iterations over time", "opened (UTC)", "round", series, x_is="time", empty="No round in this time.")


def _metric(context: Context, name: str, query: QueryParams) -> Chart:
    wanted = query.get("metric", "")
    series = []
    with context.database.read() as tx:
        for key in reversed(_keys(tx, name, TASKS_DRAWN)):
            for metric in [one for one in metric_names(tx, key) if metric_label(one) == wanted][:1]:
                points = metric_series(tx, key, [metric], limit=MOST_POINTS)[metric]
                label = f"{name}/{key.task_id}-{wanted}"
                series.append(Series(label, [number for number, _ in points], [value for _, value in points]))
    title = wanted.capitalize() or "Metric"
    return Chart(title, "round", wanted, series, share="accuracy" in wanted, empty="No metric yet.")


def _check_ins(context: Context, name: str, query: QueryParams) -> Chart:
    return outcomes_chart(context, CHECK_IN, name, span_of(query)[1], query.get("result", ""))


def _reports(context: Context, name: str, query: QueryParams) -> Chart:
    return outcomes_chart(context, REPORT, name, span_of(query)[1])


POPULATION_CHARTS: Mapping[str, Callable[[Context, str, QueryParams], Chart]] = {
    "minutes": _minutes,
    "over-time": _over_time,
    "metric": _metric,
    "check-ins": _check_ins,
    "reports": _reports,
}

operations = (
    page("/populations/{population}", population_page, "population"),
    chart("/charts/populations/{population}/{chart}", population_chart, "population"),
)
