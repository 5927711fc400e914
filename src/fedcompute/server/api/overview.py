"""What an operator sees of tasks: the list, one task with everything about it, its rounds page by page."""

import json
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fedcompute.errors import CATALOGUE, OperationFailed, Reason, RequestRejected
from fedcompute.privacy.chain import MODEL as MODEL_RELEASE
from fedcompute.privacy.chain import NO_MECHANISM
from fedcompute.privacy.ledger_document import entry_document
from fedcompute.protos import task_pb2
from fedcompute.server.api.messages import ProtoResponse, asks_for_protobuf
from fedcompute.server.api.paging import Page, bad_cursor, page_of
from fedcompute.server.api.paths import number, task_key
from fedcompute.server.api.tasks import existing_task, summary
from fedcompute.server.context import Context, context_of
from fedcompute.storage.blobs import BlobMissing
from fedcompute.storage.keys import TaskKey
from fedcompute.storage.paths import MODEL, failure_path
from fedcompute.storage.releases import ledger_entries, metrics_of
from fedcompute.storage.schema import TaskStatus
from fedcompute.storage.summaries import RoundSummary, round_summaries, summaries_after, task_totals
from fedcompute.storage.tasks import TaskRow, get_task, list_tasks, task_message

PAGE = 100
LONGEST_PAGE = 1000
_FAILURE_LIMIT = 64 * 1024


async def tasks(request: Request) -> JSONResponse:
    """Every task with its newest round, by population and id."""
    population = request.query_params.get("population")
    statuses = [_status(text) for text in request.query_params.getlist("status")]
    page = page_of(request, usual=PAGE, most=LONGEST_PAGE)
    return JSONResponse(await run_in_threadpool(_tasks, context_of(request), population, statuses, page))


async def task(request: Request) -> Response:
    """One task: its fields, its newest 1000 rounds, metrics, rejections, ledger entries, and why it failed."""
    key, context = task_key(request), context_of(request)
    if asks_for_protobuf(request):
        return ProtoResponse(await run_in_threadpool(_message, context, key))
    return JSONResponse(await run_in_threadpool(_task, context, key))


async def iterations(request: Request) -> JSONResponse:
    """A task's rounds, every attempt of them, from the first on."""
    page = page_of(request, usual=PAGE, most=LONGEST_PAGE)
    return JSONResponse(await run_in_threadpool(_iterations, context_of(request), task_key(request), page))


def _tasks(context: Context, population: str | None, statuses: list[TaskStatus], page: Page) -> dict[str, Any]:
    after = None if page.after is None else _task_cursor(page.after)
    with context.database.read() as tx:
        rows = list_tasks(tx, population=population, statuses=statuses or None, after=after, limit=page.limit + 1)
        listed = []
        for row in rows[: page.limit]:
            newest = round_summaries(tx, row.key, limit=1)
            listed.append({**summary(row), "newest_iteration": iteration_document(newest[0]) if newest else None})
    return {"tasks": listed, "next": str(rows[page.limit - 1].key) if len(rows) > page.limit else None}


def _message(context: Context, key: TaskKey) -> task_pb2.GetTaskByIdResponse:
    with context.database.read() as tx:
        return task_pb2.GetTaskByIdResponse(task=task_message(existing_task(get_task(tx, key), key)))


def _task(context: Context, key: TaskKey) -> dict[str, Any]:
    with context.database.read() as tx:
        row = existing_task(get_task(tx, key), key)
        rounds = round_summaries(tx, key, limit=LONGEST_PAGE)
        totals = task_totals(tx, key)
        oldest = rounds[0].key.iteration_id if rounds else 1
        metrics = [
            {"iteration_id": metric.iteration_id, "name": metric.name, "value": metric.value}
            for metric in metrics_of(tx, key, after=oldest - 1)
        ]
        entries = ledger_entries(tx, key.population, task=key)
    return {
        "task": summary(row),
        "failure": _failure(context, row),
        "iterations": [iteration_document(one) for one in rounds],
        "assignments": {status.name: count for status, count in totals.assignments.items()},
        "rejections": totals.rejections,
        "metrics": metrics,
        # The noised models alone, as reports count them; everything released is in the population's ledger.
        "ledger": [
            {**entry_document(entry), "time": entry.created}
            for entry in entries
            if entry.released == MODEL_RELEASE and entry.mechanism != NO_MECHANISM
        ],
    }


def _iterations(context: Context, key: TaskKey, page: Page) -> dict[str, Any]:
    after = None if page.after is None else _round_cursor(page.after)
    with context.database.read() as tx:
        existing_task(get_task(tx, key), key)
        found = summaries_after(tx, key, after, limit=page.limit + 1)
    listed = [iteration_document(one) for one in found[: page.limit]]
    last = found[page.limit - 1].key if len(found) > page.limit else None
    return {"iterations": listed, "next": last and f"{last.iteration_id}.{last.attempt_id}"}


def iteration_document(one: RoundSummary) -> dict[str, Any]:
    """One attempt of one round as JSON; `completed` is when its result was released."""
    return {
        "iteration_id": one.key.iteration_id,
        "attempt_id": one.key.attempt_id,
        "status": one.status.name,
        "report_goal": one.report_goal,
        "max_aggregation_size": one.max_aggregation_size,
        "evaluated_iteration_id": one.evaluated_iteration_id,
        "assignments": {status.name: count for status, count in one.assignments.items()},
        "opened": one.opened.isoformat(),
        "entered": one.entered.isoformat(),
        "expires": one.expires.isoformat() if one.expires else None,
        "reason": one.reason,
        "completed": one.released.isoformat() if one.released else None,
    }


def _failure(context: Context, row: TaskRow) -> dict[str, str] | None:
    try:
        document: dict[str, str] = json.loads(context.blobs.get(MODEL, failure_path(row.key), limit=_FAILURE_LIMIT))
    except BlobMissing:
        if row.reason is None:
            return None
        # The server was killed before it could say more.
        remedy = CATALOGUE[Reason(row.reason)].remedy
        return {"code": row.reason, "message": row.reason.replace("_", " "), "remedy": remedy}
    except (OperationFailed, ValueError):
        return {"code": Reason.STORAGE_FAILED.value, "message": "the reason cannot be read", "remedy": ""}
    return document


def _status(text: str) -> TaskStatus:
    try:
        return TaskStatus[text.upper()]
    except KeyError:
        known = ", ".join(one.name for one in TaskStatus)
        raise RequestRejected(Reason.MALFORMED_REQUEST, f"status {text[:40]!r} is none of {known}") from None


def _task_cursor(text: str) -> TaskKey:
    population, slash, task_id = text.rpartition("/")
    if not slash or not population:
        raise bad_cursor()
    return TaskKey(population, number(task_id, "after"))


def _round_cursor(text: str) -> tuple[int, int]:
    iteration, dot, attempt = text.partition(".")
    if not dot:
        raise bad_cursor()
    return number(iteration, "after"), number(attempt, "after")
