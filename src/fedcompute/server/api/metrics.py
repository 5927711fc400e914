"""The metrics of a task, round by round, as JSON or as CSV."""

import csv
import io
from collections.abc import Sequence

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fedcompute.errors import Reason, RequestRejected
from fedcompute.server.api.messages import asks_for
from fedcompute.server.api.paging import page_of
from fedcompute.server.api.paths import number, task_key
from fedcompute.server.api.tasks import existing_task
from fedcompute.server.context import Context, context_of
from fedcompute.storage.iterations import newest_iteration
from fedcompute.storage.keys import TaskKey
from fedcompute.storage.releases import MetricRow, metrics_of
from fedcompute.storage.tasks import get_task

PAGE = 1000
LONGEST_PAGE = 10_000
CSV = "text/csv"
_COLUMNS = ("iteration_id", "name", "value", "time")


async def metrics(request: Request) -> Response:
    """Metrics by round, then name; a value is null, or empty in CSV, where there was nothing finite to measure.

    A page is `limit` rounds long. CSV for `Accept: text/csv` or `?format=csv`; `x-next` is then the `after` of the
    next page.
    """
    page = page_of(request, usual=PAGE, most=LONGEST_PAGE)
    after = 0 if page.after is None else number(page.after, "after")
    form = request.query_params.get("format", "csv" if asks_for(request, CSV) else "json")
    if form not in ("csv", "json"):
        raise RequestRejected(Reason.MALFORMED_REQUEST, f"format {form[:40]!r} is neither json nor csv")
    rows, following = await run_in_threadpool(_metrics, context_of(request), task_key(request), after, page.limit)
    if form == "csv":
        headers = {} if following is None else {"x-next": following}
        return Response(_table(rows), media_type=CSV, headers=headers)
    listed = [dict(zip(_COLUMNS, _values(row), strict=True)) for row in rows]
    return JSONResponse({"metrics": listed, "next": following})


def _metrics(context: Context, key: TaskKey, after: int, rounds: int) -> tuple[list[MetricRow], str | None]:
    last = after + rounds
    with context.database.read() as tx:
        existing_task(get_task(tx, key), key)
        found = metrics_of(tx, key, after=after, last=last)
        newest = newest_iteration(tx, key)
    more = newest is not None and newest.key.iteration_id > last
    return found, str(last) if more else None


def _table(rows: Sequence[MetricRow]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(_COLUMNS)
    writer.writerows(_values(row) for row in rows)
    return text.getvalue()


def _values(row: MetricRow) -> tuple[int, str, float | None, str]:
    return row.iteration_id, row.name, row.value, row.created.isoformat()
