"""Requests of devices by minute: what they were told, how many a second, how long it took (spec/server.md 10.2)."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from fedcompute.monitoring.pages.charts import Chart, Series
from fedcompute.monitoring.pages.minutes import MINUTE, Bins, begin_of, bins_of, floor, mean_of, per_minute
from fedcompute.server.context import Context, now
from fedcompute.storage.database import Transaction
from fedcompute.storage.request_intervals import (
    Label,
    Requests,
    busiest,
    count_latencies,
    count_requests,
    requests_between,
)
from fedcompute.storage.request_minutes import (
    CHECK_IN,
    REPORT,
    RequestMinute,
    added_buckets,
    quantile,
    request_minutes,
)

# What a person can tell apart; the rest is one series more.
MOST_SERIES = 11
LATELY = timedelta(minutes=5)
OTHERS = "others"
_WORDS = {CHECK_IN: "check-ins", REPORT: "reports"}
_COLOURS = {
    "CREATED": 2,
    "COMPLETED": 2,
    "NO_TASK_AVAILABLE": 0,
    "NO_ACTIVE_TASK_EXISTS": 6,
    "NOT_ELIGIBLE": 4,
    "FAILED": 1,
    "FAILED_EXAMPLE_GENERATION": 3,
    "FAILED_MODEL_COMPUTATION": 5,
    "FAILED_OPS_ERROR": 6,
    OTHERS: 7,
}
_EMPTY = "No request in this time."


@dataclass(frozen=True)
class Lately:
    """Check-ins and reports a minute, as of late.

    `assigned`, `completed`: share of the check-ins that got an assignment, of the reports that say COMPLETED, 0 to 1;
    `latency`: below which 99 % of the check-ins stay, seconds. None where there was none.
    """

    check_ins: float
    assigned: float | None
    reports: float
    completed: float | None
    latency: float | None


def outcomes_chart(context: Context, endpoint: str, population: str | None, span: timedelta, result: str = "") -> Chart:
    """Requests per minute by outcome, of one population or by population; of one `result` alone if it is given."""
    by: list[Label] = [] if population is not None else ["population"]
    if not result:
        by.append("result")
    series: list[Series] = []
    with context.database.read() as tx:
        which, bins, recent = _requests(tx, context, endpoint, population, result or None, span)
        if bins is not None:
            series = _outcomes(tx, which, bins, recent, by or ["result"])
    return Chart(
        f"{_WORDS[endpoint].capitalize()} per minute" + (f": {result}" if result else ""),
        "time (UTC)",
        per_minute(1 if bins is None else bins.step, _WORDS[endpoint]),
        series,
        x_is="time",
        kind="bar",
        stacked=True,
        empty=_EMPTY,
    )


def rate_chart(context: Context, span: timedelta) -> Chart:
    """Requests a second of each device endpoint, over all populations."""
    series: list[Series] = []
    with context.database.read() as tx:
        which, bins, recent = _requests(tx, context, None, None, None, span)
        if bins is not None:
            counts = _added(
                count_requests(tx, which, bins.step, ["endpoint"]), recent, bins, lambda one: (one.endpoint,)
            )
            series = [
                Series(words, bins.begins, [mean / 60 for mean in bins.means(counts[endpoint,])], colour=place)
                for place, (endpoint, words) in enumerate(_WORDS.items())
                if (endpoint,) in counts
            ]
    axis = "requests a second" + mean_of(1 if bins is None else bins.step)
    return Chart("Requests a second", "time (UTC)", axis, series, x_is="time", empty=_EMPTY)


def latency_chart(context: Context, endpoint: str, span: timedelta) -> Chart:
    """Latency of a device endpoint: the median and the 99th percentile of each interval, from its histogram."""
    series: list[Series] = []
    with context.database.read() as tx:
        which, bins, recent = _requests(tx, context, endpoint, None, None, span)
        if bins is not None:
            buckets = count_latencies(tx, which, bins.step)
            for one in recent:
                known = buckets.setdefault(floor(one.minute, bins.step), [0] * len(one.buckets))
                known[:] = [sum(pair) for pair in zip(known, one.buckets, strict=True)]
            series = [
                Series(name, bins.begins, bins.gaps(_milliseconds(buckets, share)), marks=True, colour=colour)
                for name, share, colour in (("p50", 0.5, 0), ("p99", 0.99, 1))
            ]
    title = f"Latency of {_WORDS[endpoint]}"
    return Chart(title, "time (UTC)", "milliseconds", series, x_is="time", empty=_EMPTY)


def lately(context: Context) -> Lately | None:
    """What devices asked for in the last minutes; None if they asked for nothing."""
    until = now()
    with context.database.read() as tx:
        stored = request_minutes(tx, until - LATELY, until + MINUTE)
    found = [one for one in [*stored, *context.measures.recent()] if one.minute >= until - LATELY]
    if not found:
        return None
    first = min(one.minute for one in found)
    minutes = max(1.0, (until - first) / MINUTE)
    check_ins = [one for one in found if one.endpoint == CHECK_IN]
    reports = [one for one in found if one.endpoint == REPORT]
    return Lately(
        check_ins=sum(one.count for one in check_ins) / minutes,
        assigned=_share(check_ins, "CREATED"),
        reports=sum(one.count for one in reports) / minutes,
        completed=_share(reports, "COMPLETED"),
        latency=quantile(added_buckets(check_ins), 0.99),
    )


def newest_request(tx: Transaction, context: Context, population: str | None = None) -> datetime | None:
    """The minute of the newest request of a device, of one population or any; None if there was none in a month."""
    until = now()
    recent = [one.minute for one in context.measures.recent() if population in (None, one.population)]
    which = Requests(until - timedelta(days=30), until + MINUTE, population=population)
    between = requests_between(tx, which)
    return max([*recent, *(between or ())], default=None)


def _requests(
    tx: Transaction,
    context: Context,
    endpoint: str | None,
    population: str | None,
    result: str | None,
    span: timedelta,
) -> tuple[Requests, Bins | None, list[RequestMinute]]:
    """What is stored, the intervals it is drawn in, and what this server has not stored yet; no intervals: nothing."""
    until = now()
    which = Requests(begin_of(until, span), until + MINUTE, endpoint, population, result)
    recent = [one for one in context.measures.recent() if which.includes(one.endpoint, one.population, one.result)]
    moments = [*(one.minute for one in recent), *(requests_between(tx, which) or ())]
    if not moments:
        return which, None, []
    bins = bins_of(min(moments), max(moments), which.since, until)
    return replace(which, since=bins.begins[0]), bins, recent


def _outcomes(
    tx: Transaction, which: Requests, bins: Bins, recent: Sequence[RequestMinute], by: Sequence[Label]
) -> list[Series]:
    def label(one: RequestMinute) -> tuple[str, ...]:
        return tuple(getattr(one, name) for name in by)

    # One more than are drawn, to know whether there are more.
    labels = list(dict.fromkeys([*busiest(tx, which, by, MOST_SERIES + 1), *map(label, recent)]))
    kept = None if len(labels) <= MOST_SERIES else labels[:MOST_SERIES]
    counts = _added(
        count_requests(tx, which, bins.step, by, kept),
        recent,
        bins,
        lambda one: label(one) if kept is None or label(one) in kept else (),
    )
    names = {one: " ".join(one) or OTHERS for one in sorted(counts, key=lambda one: (one == (), one))}
    free = [place for place in range(8) if place not in {_COLOURS.get(name) for name in names.values()}]
    series = []
    for one, name in names.items():
        fixed = _COLOURS.get(name)
        colour = fixed if fixed is not None else (free.pop(0) if free else None)
        series.append(Series(name, bins.begins, bins.means(counts[one]), colour=colour))
    return series


def _added(
    counts: Mapping[tuple[str, ...], Mapping[datetime, int]],
    recent: Iterable[RequestMinute],
    bins: Bins,
    label: Callable[[RequestMinute], tuple[str, ...]],
) -> dict[tuple[str, ...], dict[datetime, int]]:
    found = {name: defaultdict(int, moments) for name, moments in counts.items()}
    for one in recent:
        found.setdefault(label(one), defaultdict(int))[floor(one.minute, bins.step)] += one.count
    return {name: dict(moments) for name, moments in found.items()}


def _share(minutes: Sequence[RequestMinute], result: str) -> float | None:
    whole = sum(one.count for one in minutes)
    return sum(one.count for one in minutes if one.result == result) / whole if whole else None


def _milliseconds(buckets: Mapping[datetime, Sequence[int]], share: float) -> dict[datetime, float | None]:
    found = {begin: quantile(counts, share) for begin, counts in buckets.items()}
    return {begin: None if seconds is None else 1000 * seconds for begin, seconds in found.items()}
