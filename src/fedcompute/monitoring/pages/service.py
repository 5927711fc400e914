"""The service's page: how many devices ask, what they are told, and how long it takes (spec/server.md 10.2)."""

from collections.abc import Callable, Mapping
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
from fedcompute.monitoring.pages.traffic import latency_chart, outcomes_chart, populations_seen, rate_chart
from fedcompute.server.context import Context, context_of
from fedcompute.storage.request_minutes import CHECK_IN, REPORT

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
    return str(sum(one.count for one in context.measures.recent()))


def _values(context: Context, query: QueryParams) -> dict[str, Any]:
    name, span = span_of(query)
    known = populations_seen(context, span)
    chosen = query.get("population", "")
    return {
        "populations": known,
        "population": chosen if chosen in known else "",
        "range": name,
        "ranges": list(RANGES),
        "check_in_results": CHECK_IN_RESULTS,
        "report_results": REPORT_RESULTS,
    }


def _outcomes(endpoint: str, context: Context, query: QueryParams) -> Chart:
    population = query.get("population", "") or None
    return outcomes_chart(context, endpoint, population, span_of(query)[1], query.get("result", ""))


SERVICE_CHARTS: Mapping[str, Callable[[Context, QueryParams], Chart]] = {
    "check-ins": partial(_outcomes, CHECK_IN),
    "reports": partial(_outcomes, REPORT),
    "rate": lambda context, query: rate_chart(context, span_of(query)[1]),
    "check-in-latency": lambda context, query: latency_chart(context, CHECK_IN, span_of(query)[1]),
    "report-latency": lambda context, query: latency_chart(context, REPORT, span_of(query)[1]),
}

operations = (
    page("/service", service_page, "service"),
    chart("/charts/service/{chart}", service_chart, "service"),
)
