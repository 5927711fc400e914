"""A round's page: every attempt of it, its devices, batches and errors, what it measured and spent."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import Response

from fedcompute.errors import Reason, RequestRejected
from fedcompute.monitoring.pages.rendering import live_page
from fedcompute.monitoring.pages.table import page
from fedcompute.monitoring.pages.task_view import reason_of
from fedcompute.server.api.paths import number, task_key
from fedcompute.server.api.tasks import existing_task
from fedcompute.server.context import Context, context_of, now
from fedcompute.storage.assignments import assignments_page
from fedcompute.storage.batches import list_batches, sum_batches
from fedcompute.storage.charts import newest_round, round_entries, task_version
from fedcompute.storage.iterations import active_iterations
from fedcompute.storage.keys import TaskKey
from fedcompute.storage.releases import metrics_of
from fedcompute.storage.schema import AssignmentStatus, IterationStatus
from fedcompute.storage.summaries import RoundSummary, round_attempts, round_timeline
from fedcompute.storage.tasks import get_task

PAGE = 100
_BATCHES = 200
# Who knows a session may report for it, so pages show no whole one.
_SHOWN_SESSION = 8
# A page's last session, long enough to be the only one, too short to be used; what follows sorts behind every digit.
_CURSOR = 13


@dataclass(frozen=True)
class Phase:
    """A status of a round, since when, for how long, and as a share of the round's time."""

    status: IterationStatus
    since: datetime
    seconds: float
    share: float


async def round_page(request: Request) -> Response:
    """One round of a task."""
    key, context = task_key(request), context_of(request)
    iteration_id = number(request.path_params["iteration"], "round")
    values = partial(_values, context, key, iteration_id, request.query_params)
    return await live_page(request, "round.html", partial(_version, context, key, iteration_id), values)


def _version(context: Context, key: TaskKey, iteration_id: int) -> str:
    with context.database.read() as tx:
        under_way = [one.key for one in active_iterations(tx, key) if one.key.iteration_id == iteration_id]
        return repr((task_version(tx, key), [sum_batches(tx, one) for one in under_way]))


def _values(context: Context, key: TaskKey, iteration_id: int, query: QueryParams) -> dict[str, Any]:
    status = _status(query.get("status", ""))
    after = query.get("after", "")[:64]
    with context.database.read() as tx:
        row = existing_task(get_task(tx, key), key)
        attempts = round_attempts(tx, key, iteration_id)
        if not attempts:
            raise RequestRejected(Reason.NOT_FOUND, f"task {key} has no round {iteration_id}")
        newest = attempts[-1]
        timelines = {one.key: round_timeline(tx, one.key) for one in attempts}
        batches = list_batches(tx, newest.key, limit=_BATCHES)
        sessions = assignments_page(tx, newest.key, status=status, after=after, limit=PAGE + 1)
        metrics = metrics_of(tx, key, after=iteration_id - 1, last=iteration_id)
        entries = round_entries(tx, key, iteration_id)
        last = newest_round(tx, key)
    return {
        "task": row,
        "key": key,
        "round": newest,
        "iteration_id": iteration_id,
        "attempts": list(reversed(attempts)),
        "phases": {one: _phases(timeline) for one, timeline in timelines.items()},
        "batches": batches,
        "sessions": sessions[:PAGE],
        "following": sessions[PAGE - 1].key.session_id[:_CURSOR] + "~" if len(sessions) > PAGE else None,
        "shorten": lambda text: text[:_SHOWN_SESSION],
        "status": status,
        "statuses": [one for one in AssignmentStatus if newest.assignments.get(one) or one is status],
        "metrics": metrics,
        "entries": entries,
        "last": last,
        "contributed": newest.assignments.get(AssignmentStatus.UPLOAD_COMPLETED, 0),
        "reasons": _reasons(attempts),
        "announcement": f"Round {iteration_id} is {newest.status.name.lower()}",
    }


def _phases(timeline: list[tuple[datetime, IterationStatus]]) -> list[Phase]:
    over = timeline[-1][1] not in (IterationStatus.COLLECTING, IterationStatus.AGGREGATING, IterationStatus.APPLYING)
    end = timeline[-1][0] if over else now()
    whole = (end - timeline[0][0]) / timedelta(seconds=1) or 1.0
    ends = [moment for moment, _ in timeline[1:]] + [end]
    return [
        Phase(status, since, (until - since) / timedelta(seconds=1), (until - since) / timedelta(seconds=1) / whole)
        for (since, status), until in zip(timeline, ends, strict=True)
    ]


def _reasons(attempts: list[RoundSummary]) -> Mapping[str, Mapping[str, str]]:
    codes = {code for one in attempts for code in one.rejections} | {one.reason for one in attempts if one.reason}
    return {code: reason_of(code) for code in sorted(codes)}


def _status(text: str) -> AssignmentStatus | None:
    return AssignmentStatus[text] if text in AssignmentStatus.__members__ else None


operations = (page("/tasks/{population}/{task}/rounds/{iteration}", round_page, "round"),)
