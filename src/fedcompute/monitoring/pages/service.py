"""The service's page: how many devices ask, what they are told, and how long it takes (spec/server.md 10.2)."""

from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from typing import Any

from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import Response

from fedcompute.errors import Reason, RequestRejected
from fedcompute.monitoring.pages.charts import Chart
from fedcompute.monitoring.pages.minutes import RANGES
from fedcompute.monitoring.pages.population import span_of
from fedcompute.monitoring.pages.rendering import chart_answer, live_page
from fedcompute.monitoring.pages.table import chart, page
from fedcompute.monitoring.pages.traffic import (
    LATELY,
    lately,
    latency_chart,
    newest_request,
    outcomes_chart,
    rate_chart,
)
from fedcompute.server.context import Context, context_of, now
from fedcompute.server.measures import UNKNOWN
from fedcompute.storage.charts import population_names
from fedcompute.storage.request_minutes import CHECK_IN, REPORT

# Seconds between two looks of a page that is open.
PERIOD = 10
USUAL_RANGE = "day"
# Outcomes that have a chart of their own, as an operator looks for one of them.
CHECK_IN_RESULTS = ("CREATED", "NO_TASK_AVAILABLE")
REPORT_RESULTS = (
    "COMPLETED",
    "FAILED",
    "NOT_ELIGIBLE",
    "FAILED_EXAMPLE_GENERATION",
    "FAILED_MODEL_COMPUTATION",
    "FAILED_OPS_ERROR",
)


async def service_page(request: Request) -> Response:
    """Check-ins and reports of all populations, or one."""
    context = context_of(request)
    return await live_page(
        request, "service.html", partial(_version, context), partial(_values, context, request.query_params)
    )


async def service_chart(request: Request) -> Response:
    """One chart of the service, by its name."""
    drawn = SERVICE_CHARTS.get(request.path_params["chart"])
    if drawn is None:
        raise RequestRejected(Reason.NOT_FOUND, "there is no such chart")
    return await chart_answer(request, partial(drawn, context_of(request), request.query_params))


def _version(context: Context) -> str:
    with context.database.read() as tx:
        newest = newest_request(tx, context)
    # While devices ask, every figure moves; more often than this nobody reads them.
    asking = newest is not None and now() - newest < 2 * LATELY
    return f"{newest} {int(now().timestamp() // PERIOD) if asking else ''}"


def _values(context: Context, query: QueryParams) -> dict[str, Any]:
    with context.database.read() as tx:
        known = [*population_names(tx), UNKNOWN]
    chosen = query.get("population", "")
    return {
        "lately": lately(context),
        "minutes": int(LATELY.total_seconds() // 60),
        "populations": known,
        "population": chosen if chosen in known else "",
        "range": span_of(query, USUAL_RANGE)[0],
        "ranges": list(RANGES),
        "check_in_results": CHECK_IN_RESULTS,
        "report_results": REPORT_RESULTS,
    }


def _span(query: QueryParams) -> timedelta:
    return span_of(query, USUAL_RANGE)[1]


def _outcomes(endpoint: str, context: Context, query: QueryParams) -> Chart:
    population = query.get("population", "") or None
    return outcomes_chart(context, endpoint, population, _span(query), query.get("result", ""))


SERVICE_CHARTS: Mapping[str, Callable[[Context, QueryParams], Chart]] = {
    "check-ins": partial(_outcomes, CHECK_IN),
    "reports": partial(_outcomes, REPORT),
    "rate": lambda context, query: rate_chart(context, _span(query)),
    "check-in-latency": lambda context, query: latency_chart(context, CHECK_IN, _span(query)),
    "report-latency": lambda context, query: latency_chart(context, REPORT, _span(query)),
}

operations = (
    page("/service", service_page, "service"),
    chart("/charts/service/{chart}", service_chart, "service"),
)
