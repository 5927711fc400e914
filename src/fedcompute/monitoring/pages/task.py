"""A task's page and its charts."""

from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from fedcompute.errors import Reason, RequestRejected
from fedcompute.monitoring.pages.rendering import chart_answer, live_page
from fedcompute.monitoring.pages.table import chart, page
from fedcompute.monitoring.pages.task_charts import TASK_CHARTS
from fedcompute.monitoring.pages.task_view import task_values
from fedcompute.server.api.paths import task_key
from fedcompute.server.context import Context, context_of
from fedcompute.storage.charts import task_version
from fedcompute.storage.keys import TaskKey


async def task_page(request: Request) -> Response:
    """A task: how far it is, what it learns, spends and rejects, and where its time goes."""
    key, context = task_key(request), context_of(request)
    values = partial(task_values, context, key, request.query_params)
    return await live_page(request, "task.html", partial(_version, context, key), values)


async def task_chart(request: Request) -> Response:
    """One chart of a task, by its name."""
    drawn = TASK_CHARTS.get(request.path_params["chart"])
    if drawn is None:
        raise RequestRejected(Reason.NOT_FOUND, "there is no such chart")
    return await chart_answer(request, partial(drawn, context_of(request), task_key(request), request.query_params))


def _version(context: Context, key: TaskKey) -> str:
    with context.database.read() as tx:
        return task_version(tx, key)


operations = (
    page("/tasks/{population}/{task}", task_page, "task"),
    chart("/charts/tasks/{population}/{task}/{chart}", task_chart, "task"),
)
