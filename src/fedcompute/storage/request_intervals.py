"""Requests of devices added up over longer intervals than a minute, by the database: a month has too many minutes."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from sqlalchemy import BigInteger, ColumnElement, case, cast, extract, func, literal_column, select, tuple_

from fedcompute.storage import schema
from fedcompute.storage.database import Transaction
from fedcompute.storage.request_minutes import BUCKETS

_TABLE = schema.request_minute
_NAMES = [f"bucket_{number}" for number in range(len(BUCKETS) + 1)]
_COLUMNS = {"endpoint": _TABLE.c.endpoint, "population": _TABLE.c.population_name, "result": _TABLE.c.result}
Label = Literal["endpoint", "population", "result"]


@dataclass(frozen=True)
class Requests:
    """Which requests: from the minute `since` to the minute `until`; None is any."""

    since: datetime
    until: datetime
    endpoint: str | None = None
    population: str | None = None
    result: str | None = None

    def includes(self, endpoint: str, population: str, result: str) -> bool:
        """Whether requests of this endpoint, population and result are meant."""
        wanted = ((self.endpoint, endpoint), (self.population, population), (self.result, result))
        return all(one is None or one == other for one, other in wanted)


def requests_between(tx: Transaction, which: Requests) -> tuple[datetime, datetime] | None:
    """The first and the last minute that had any; None without."""
    minutes = select(_TABLE.c.minute).where(*_conditions(which)).limit(1)
    first = tx.execute(minutes.order_by(_TABLE.c.minute)).scalar()
    last = tx.execute(minutes.order_by(_TABLE.c.minute.desc())).scalar()
    return None if first is None or last is None else (first, last)


def busiest(tx: Transaction, which: Requests, by: Sequence[Label], limit: int) -> list[tuple[str, ...]]:
    """The labels with the most requests, at most `limit`, the busiest first."""
    columns = [_COLUMNS[one] for one in by]
    query = select(*columns).where(*_conditions(which)).group_by(*columns)
    rows = tx.execute(query.order_by(func.sum(_TABLE.c.requests).desc(), *columns).limit(limit))
    return [tuple(row) for row in rows]


def count_requests(
    tx: Transaction, which: Requests, minutes: int, by: Sequence[Label], kept: Sequence[tuple[str, ...]] | None = None
) -> dict[tuple[str, ...], dict[datetime, int]]:
    """Requests by label and the begin of their interval; intervals of `minutes` are counted from the epoch.

    Labels that are not among `kept` are added up under (), None keeps each.
    """
    columns: list[Any] = [_COLUMNS[one] for one in by]
    if kept is not None:
        mine = tuple_(*columns).in_(kept)
        columns = [case((mine, column)) for column in columns]
    query = select(_begin(tx, minutes), *columns, func.sum(_TABLE.c.requests)).where(*_conditions(which))
    # By place: PostgreSQL does not see that two expressions with parameters are the same one.
    query = query.group_by(*[literal_column(str(place + 1)) for place in range(1 + len(by))])
    found: dict[tuple[str, ...], dict[datetime, int]] = {}
    for row in tx.execute(query):
        label = () if row[1] is None else tuple(row[1:-1])
        found.setdefault(label, {})[datetime.fromtimestamp(int(row[0]), UTC)] = int(row[-1])
    return found


def count_latencies(tx: Transaction, which: Requests, minutes: int) -> dict[datetime, list[int]]:
    """The buckets of latency (`request_minutes.BUCKETS`) by the begin of their interval."""
    query = select(_begin(tx, minutes), *[func.sum(_TABLE.c[name]) for name in _NAMES])
    query = query.where(*_conditions(which)).group_by(literal_column("1"))
    return {datetime.fromtimestamp(int(row[0]), UTC): [int(count) for count in row[1:]] for row in tx.execute(query)}


def _conditions(which: Requests) -> list[ColumnElement[bool]]:
    wanted = (("endpoint", which.endpoint), ("population", which.population), ("result", which.result))
    found = [_TABLE.c.minute >= which.since, _TABLE.c.minute <= which.until]
    return found + [_COLUMNS[name] == value for name, value in wanted if value is not None]


def _begin(tx: Transaction, minutes: int) -> ColumnElement[int]:
    seconds: ColumnElement[Any] = (
        extract("epoch", _TABLE.c.minute) if tx.dialect.name == "postgresql" else func.strftime("%s", _TABLE.c.minute)
    )
    length = 60 * minutes
    return cast(seconds, BigInteger) // length * length
