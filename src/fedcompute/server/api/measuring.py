"""Times every request, and gives the figures out."""

import asyncio
import time

from prometheus_client import CollectorRegistry, Gauge, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedcompute.server.api.admission import Call, call_of
from fedcompute.server.api.paths import TemplateRoute
from fedcompute.server.context import context_of
from fedcompute.server.measures import Measures
from fedcompute.server.readiness import Readiness
from fedcompute.storage.request_minutes import CHECK_IN, REPORT

_TEXT = "text/plain; version=0.0.4; charset=utf-8"
_ENDPOINTS = {Call.CHECK_IN: CHECK_IN, Call.REPORT: REPORT}
# Paths that no route has.
_NO_ROUTE = "none"


class Measuring:
    """ASGI middleware around everything: time of the whole request, and of a device's its outcome.

    An endpoint says the outcome in `state["outcome"]`; a request without one was turned away before it, or failed.
    """

    def __init__(self, app: ASGIApp, measures: Measures) -> None:
        self._app = app
        self._measures = measures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 499
        state = scope.setdefault("state", {})

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        finally:
            seconds = time.perf_counter() - started
            template = scope.get("template")
            self._measures.request(scope["method"] if template else "any", template or _NO_ROUTE, status, seconds)
            call = call_of(scope)
            endpoint = None if call is None else _ENDPOINTS.get(call)
            if endpoint is not None:
                outcome = state.get("outcome") or ("TURNED_AWAY" if status < 400 else f"HTTP_{status}")
                self._measures.device_request(endpoint, _population(scope), outcome, seconds)


async def metrics(request: Request) -> Response:
    """GET /metrics: everything that the server measures of itself, in Prometheus' text format.

    The answer comes within about two seconds, whatever hangs: it says then which part does not work, and that it is not
    complete.
    """
    readiness: Readiness = request.app.state.readiness
    text = run_in_threadpool(context_of(request).measures.text)
    problems, text_of_measures = await asyncio.gather(readiness.problems(), text)
    registry = CollectorRegistry()
    ready = Gauge(
        "fedcompute_part_ready", "1 if a part does its work, as /ready sees it.", ("part",), registry=registry
    )
    for part in readiness.parts:
        ready.labels(part).set(part not in problems)
    return Response(text_of_measures + generate_latest(registry), media_type=_TEXT)


routes = [TemplateRoute("/metrics", metrics, methods=["GET"], name="metrics")]


def _population(scope: Scope) -> str:
    named = str(scope.get("path_params", {}).get("population", ""))
    if not named:
        # Turned away before a route was found.
        parts = scope["path"].split("/")
        named = parts[4] if len(parts) > 4 else ""
    return named.partition(":create-task-assignment")[0]
