"""The first page: every population, what runs in it, what it has learnt and spent."""

from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import Response

from fedcompute.monitoring.pages.attention import attention
from fedcompute.monitoring.pages.rendering import live_page
from fedcompute.monitoring.pages.table import page
from fedcompute.monitoring.pages.task_view import Measured, headline, measured
from fedcompute.server.context import Context, context_of, now
from fedcompute.storage.activity import activity, leading_tasks
from fedcompute.storage.charts import count_released, metric_names, overview_version, population_overviews
from fedcompute.storage.database import Transaction
from fedcompute.storage.schema import ACTIVE_TASK, AssignmentStatus
from fedcompute.storage.summaries import RoundSummary, round_summaries
from fedcompute.storage.tasks import TaskRow

POPULATIONS = 20
TASKS_EACH = 4
DAY = timedelta(days=1)


@dataclass(frozen=True)
class TaskLine:
    """A task in a list: its newest attempt of a round, how many were released, and what it measured last."""

    task: TaskRow
    newest: RoundSummary | None
    released: int
    measured: tuple[Measured, ...]

    @property
    def contributions(self) -> int:
        """Of the newest round."""
        return self.newest.assignments.get(AssignmentStatus.UPLOAD_COMPLETED, 0) if self.newest else 0

    @property
    def is_active(self) -> bool:
        """Whether anything may still happen to it."""
        return self.task.status in ACTIVE_TASK


async def populations_page(request: Request) -> Response:
    """Every population."""
    context = context_of(request)
    return await live_page(
        request, "populations.html", partial(_version, context), partial(_values, context, request.query_params)
    )


def task_line(tx: Transaction, row: TaskRow) -> TaskLine:
    """A task as lists show it."""
    newest = round_summaries(tx, row.key, limit=1)
    found = [measured(tx, row.key, name) for name in headline(metric_names(tx, row.key))[:2]]
    return TaskLine(row, newest[0] if newest else None, count_released(tx, row.key), tuple(one for one in found if one))


def _version(context: Context) -> str:
    with context.database.read() as tx:
        return f"{overview_version(tx)} {attention(context)}"


def _values(context: Context, query: QueryParams) -> dict[str, Any]:
    after = query.get("after", "")[:64]
    with context.database.read() as tx:
        found = population_overviews(tx, after=after or None, limit=POPULATIONS + 1)
        shown = found[:POPULATIONS]
        tasks = {
            one.name: [task_line(tx, row) for row in leading_tasks(tx, one.name, limit=TASKS_EACH)] for one in shown
        }
        goes_on = activity(tx, now() - DAY)
    return {
        # What runs, then what ran last.
        "populations": sorted(shown, key=lambda one: (one.active_tasks > 0, one.last_activity), reverse=True),
        "tasks": tasks,
        "after": after,
        "following": shown[-1].name if len(found) > POPULATIONS else None,
        "stuck": attention(context),
        "activity": goes_on,
        "announcement": f"{goes_on.released} rounds released in the last day",
    }


operations = (page("/", populations_page, "populations"),)
