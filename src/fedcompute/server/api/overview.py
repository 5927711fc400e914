"""What an operator sees of tasks: the list, one task with everything about it, its rounds page by page."""

import json
from collections import Counter
from collections.abc import Mapping
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
from fedcompute.storage.assignments import count_assignments, count_by_iteration, count_rejections
from fedcompute.storage.blobs import BlobMissing
from fedcompute.storage.iterations import IterationRow, iterations_of, newest_iteration
from fedcompute.storage.keys import TaskKey
from fedcompute.storage.paths import MODEL, failure_path
from fedcompute.storage.releases import completed_iterations, ledger_entries, metrics_of
from fedcompute.storage.schema import AssignmentStatus, TaskStatus
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
            newest = newest_iteration(tx, row.key)
            counted = newest and iteration_document(newest, count_assignments(tx, newest.key), None)
            listed.append({**summary(row), "newest_iteration": counted})
    return {"tasks": listed, "next": str(rows[page.limit - 1].key) if len(rows) > page.limit else None}


def _message(context: Context, key: TaskKey) -> task_pb2.GetTaskByIdResponse:
    with context.database.read() as tx:
        return task_pb2.GetTaskByIdResponse(task=task_message(existing_task(get_task(tx, key), key)))


def _task(context: Context, key: TaskKey) -> dict[str, Any]:
    with context.database.read() as tx:
        row = existing_task(get_task(tx, key), key)
        completed = {one.iteration_id: one.completed.isoformat() for one in completed_iterations(tx, key)}
        newest_first = iterations_of(tx, key, limit=LONGEST_PAGE, newest_first=True)
        counts = count_by_iteration(tx, key)
        rounds = [
            iteration_document(one, counts.get(one.key, {}), completed.get(one.key.iteration_id))
            for one in reversed(newest_first)
        ]
        rejections = count_rejections(tx, key)
        metrics = [
            {"iteration_id": metric.iteration_id, "name": metric.name, "value": metric.value}
            for metric in metrics_of(tx, key)
        ]
        entries = ledger_entries(tx, key.population, task=key)
    assignments: Counter[str] = Counter()
    for one_round in rounds:
        assignments.update(one_round["assignments"])
    return {
        "task": summary(row),
        "failure": _failure(context, row),
        "iterations": rounds,
        "assignments": assignments,
        "rejections": rejections,
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
        rows = iterations_of(tx, key, after=after, limit=page.limit + 1)
        completed = {one.iteration_id: one.completed.isoformat() for one in completed_iterations(tx, key)}
        listed = [
            iteration_document(one, count_assignments(tx, one.key), completed.get(one.key.iteration_id))
            for one in rows[: page.limit]
        ]
    last = rows[page.limit - 1].key if len(rows) > page.limit else None
    return {"iterations": listed, "next": last and f"{last.iteration_id}.{last.attempt_id}"}


def iteration_document(
    row: IterationRow, counts: Mapping[AssignmentStatus, int], completed: str | None
) -> dict[str, Any]:
    """One attempt of one round as JSON; `completed` is when its round was released."""
    trained_on = row.info.evaluation_training_iteration_id
    return {
        "iteration_id": row.key.iteration_id,
        "attempt_id": row.key.attempt_id,
        "status": row.status.name,
        "report_goal": row.report_goal,
        "max_aggregation_size": row.max_aggregation_size,
        "evaluated_iteration_id": trained_on or None,
        "assignments": {status.name: count for status, count in sorted(counts.items()) if count},
        "opened": row.created.isoformat(),
        "entered": row.entered.isoformat(),
        "expires": row.expires.isoformat() if row.expires else None,
        "reason": row.reason,
        "completed": completed,
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
