"""Requests of devices, counted by minute: what charts over days need, added up over all API servers."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import case, delete, select
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from fedcompute.storage import schema
from fedcompute.storage.database import Transaction

CHECK_IN = "check_in"
REPORT = "report"
# Upper bounds of latency, seconds; one bucket more has what took longer.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
LIST_LIMIT = 200_000
_TABLE = schema.request_minute
_NAMES = [f"bucket_{number}" for number in range(len(BUCKETS) + 1)]


@dataclass(frozen=True)
class RequestMinute:
    """Requests of one endpoint, population and result in the minute that begins at `minute`.

    `buckets`: how many took at most each of BUCKETS and more than the one before it; the last, how many took longer.
    """

    minute: datetime
    endpoint: str
    population: str
    result: str
    count: int
    seconds_sum: float
    seconds_max: float
    buckets: tuple[int, ...]


def add_request_minutes(tx: Transaction, minutes: Sequence[RequestMinute]) -> None:
    """Adds to what is stored of the same minutes."""
    if not minutes:
        return
    make = postgresql_insert if tx.dialect.name == "postgresql" else sqlite_insert
    added = make(_TABLE)
    summed = {name: _TABLE.c[name] + added.excluded[name] for name in ("requests", "seconds_sum", *_NAMES)}
    longest = case(
        (_TABLE.c.seconds_max > added.excluded.seconds_max, _TABLE.c.seconds_max), else_=added.excluded.seconds_max
    )
    keys = [column.name for column in _TABLE.primary_key]
    statement = added.on_conflict_do_update(index_elements=keys, set_={**summed, "seconds_max": longest})
    # In one order, so that two servers never wait for each other.
    ordered = sorted(minutes, key=lambda one: (one.minute, one.endpoint, one.population, one.result))
    tx.execute(
        statement,
        [
            {
                "minute": one.minute,
                "endpoint": one.endpoint,
                "population_name": one.population,
                "result": one.result,
                "requests": one.count,
                "seconds_sum": one.seconds_sum,
                "seconds_max": one.seconds_max,
                **dict(zip(_NAMES, one.buckets, strict=True)),
            }
            for one in ordered
        ],
    )


def request_minutes(
    tx: Transaction,
    since: datetime,
    until: datetime,
    *,
    endpoint: str | None = None,
    population: str | None = None,
    limit: int = LIST_LIMIT,
) -> list[RequestMinute]:
    """What is stored of the minutes from `since` to `until`, ascending, at most `limit`."""
    query = select(_TABLE).where(_TABLE.c.minute >= since, _TABLE.c.minute <= until)
    if endpoint is not None:
        query = query.where(_TABLE.c.endpoint == endpoint)
    if population is not None:
        query = query.where(_TABLE.c.population_name == population)
    rows = tx.execute(query.order_by(_TABLE.c.minute).limit(limit))
    return [
        RequestMinute(
            row.minute,
            row.endpoint,
            row.population_name,
            row.result,
            row.requests,
            row.seconds_sum,
            row.seconds_max,
            tuple(row[7:]),
        )
        for row in rows
    ]


def forget_request_minutes(tx: Transaction, before: datetime) -> int:
    """Removes older minutes; returns how many rows went."""
    return tx.execute(delete(_TABLE).where(_TABLE.c.minute < before)).rowcount


def bucket_of(seconds: float) -> int:
    """The place in `RequestMinute.buckets` of a request that took so long."""
    return bisect_left(BUCKETS, seconds)


def quantile(buckets: Sequence[int], share: float) -> float | None:
    """The latency below which `share` of the requests stay, seconds, linear within its bucket; None without any.

    What took longer than the last bound counts as the last bound.
    """
    whole = sum(buckets)
    if not whole:
        return None
    wanted, passed = share * whole, 0
    for number, count in enumerate(buckets):
        if passed + count >= wanted and count:
            low = BUCKETS[number - 1] if number else 0.0
            high = BUCKETS[min(number, len(BUCKETS) - 1)]
            return low + (high - low) * max(0.0, wanted - passed) / count
        passed += count
    return BUCKETS[-1]


def added_buckets(minutes: Iterable[RequestMinute]) -> list[int]:
    """The buckets of several rows together."""
    whole = [0] * (len(BUCKETS) + 1)
    for one in minutes:
        whole = [first + second for first, second in zip(whole, one.buckets, strict=True)]
    return whole
