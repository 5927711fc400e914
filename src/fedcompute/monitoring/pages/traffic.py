"""Requests of devices by minute: what they were told, how many a second, how long it took (spec/server.md 10.2)."""

from collections import defaultdict
from datetime import datetime, timedelta

from fedcompute.monitoring.pages.charts import Chart, Series
from fedcompute.monitoring.pages.minutes import MINUTE, filled, per_minute
from fedcompute.server.context import Context, now
from fedcompute.storage.request_minutes import (
    CHECK_IN,
    REPORT,
    RequestMinute,
    added_buckets,
    quantile,
    request_minutes,
)

_WORDS = {CHECK_IN: "check-ins", REPORT: "reports"}
_COLOURS = {"CREATED": 2, "COMPLETED": 2, "NO_TASK_AVAILABLE": 0, "NO_ACTIVE_TASK_EXISTS": 4, "FAILED": 1}
_EMPTY = "No request in this time."


def outcomes_chart(context: Context, endpoint: str, population: str | None, span: timedelta, result: str = "") -> Chart:
    """Requests per minute by outcome, of one population or all; of one `result` alone if it is given."""
    counts: dict[str, dict[datetime, float]] = defaultdict(lambda: defaultdict(float))
    for one in _minutes(context, endpoint, population, span):
        if not result or one.result == result:
            name = one.result if population is not None else f"{one.population} {one.result}"
            counts[name][one.minute] += one.count
    drawn, step = filled(dict(sorted(counts.items())))
    series = [Series(name, times, values, colour=_COLOURS.get(name)) for name, times, values in drawn]
    title = f"{_WORDS[endpoint].capitalize()} per minute"
    return Chart(
        title,
        "time (UTC)",
        per_minute(step, _WORDS[endpoint]),
        series,
        x_is="time",
        kind="bar",
        stacked=True,
        empty=_EMPTY,
    )


def rate_chart(context: Context, span: timedelta) -> Chart:
    """Requests a second of each device endpoint, over all populations."""
    counts: dict[str, dict[datetime, float]] = {}
    for endpoint, words in _WORDS.items():
        minutes = counts.setdefault(words, defaultdict(float))
        for one in _minutes(context, endpoint, None, span):
            minutes[one.minute] += one.count / 60
    drawn, _ = filled({name: minutes for name, minutes in counts.items() if minutes})
    series = [Series(name, times, values) for name, times, values in drawn]
    return Chart("Requests a second", "time (UTC)", "requests a second", series, x_is="time", empty=_EMPTY)


def latency_chart(context: Context, endpoint: str, span: timedelta) -> Chart:
    """Latency of a device endpoint: the median and the 99th percentile of each interval, from its histogram."""
    rows: dict[datetime, list[RequestMinute]] = defaultdict(list)
    for one in _minutes(context, endpoint, None, span):
        rows[one.minute].append(one)
    _, step = filled({"all": dict.fromkeys(rows, 1.0)})
    intervals: dict[datetime, list[RequestMinute]] = defaultdict(list)
    for moment, found in rows.items():
        length = 60 * step
        intervals[datetime.fromtimestamp(moment.timestamp() // length * length, moment.tzinfo)] += found
    times = sorted(intervals)
    buckets = [added_buckets(intervals[one]) for one in times]
    series = [
        Series(name, times, [_milliseconds(quantile(one, share)) for one in buckets], colour=colour)
        for name, share, colour in (("p50", 0.5, 0), ("p99", 0.99, 1))
    ]
    title = f"Latency of {_WORDS[endpoint]}"
    return Chart(title, "time (UTC)", "milliseconds", series if times else [], x_is="time", empty=_EMPTY)


def populations_seen(context: Context, span: timedelta) -> list[str]:
    """The populations that devices asked for."""
    return sorted({one.population for one in _minutes(context, None, None, span)})


def _minutes(context: Context, endpoint: str | None, population: str | None, span: timedelta) -> list[RequestMinute]:
    """What is stored, and what this server has not stored yet."""
    until = now()
    with context.database.read() as tx:
        found = request_minutes(tx, until - span, until + MINUTE, endpoint=endpoint, population=population)
    recent = [
        one
        for one in context.measures.recent()
        if (endpoint is None or one.endpoint == endpoint) and (population is None or one.population == population)
    ]
    return found + recent


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds
