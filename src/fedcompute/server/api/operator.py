"""What an operator sees: tasks, their rounds, and what they released, as JSON."""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from google.protobuf.json_format import MessageToDict
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fedcompute.errors import CATALOGUE, ArtifactInvalid, OperationFailed, Reason, RequestRejected
from fedcompute.learning.catalogue import AGGREGATORS
from fedcompute.learning.noise_state import without_noise
from fedcompute.privacy.chain import MODEL as MODEL_RELEASE
from fedcompute.privacy.chain import NO_MECHANISM
from fedcompute.privacy.ledger_document import entry_document
from fedcompute.server.api.paths import number
from fedcompute.server.api.tasks import existing_task
from fedcompute.server.context import Context, context_of
from fedcompute.server.rounds.plans import read_stored
from fedcompute.storage.assignments import count_assignments, count_by_iteration, count_rejections
from fedcompute.storage.blobs import BlobMissing
from fedcompute.storage.iterations import IterationRow, iterations_of, newest_iteration
from fedcompute.storage.keys import TaskKey
from fedcompute.storage.paths import MODEL, failure_path, server_checkpoint_path, server_plan_path
from fedcompute.storage.releases import completed_iterations, ledger_entries, metrics_of
from fedcompute.storage.schema import AssignmentStatus, IterationStatus
from fedcompute.storage.tasks import TaskRow, get_task, list_tasks
from fedcompute.tensors.checkpoint import read_checkpoint, write_checkpoint

_LIST_LIMIT = 1000
_FAILURE_LIMIT = 64 * 1024
# Their states hold the noise itself.
_WITH_SECRETS = tuple(name for name, entry in AGGREGATORS.items() if entry.restart is not None)
_RELEASED = (IterationStatus.COMPLETED, IterationStatus.POST_PROCESSED)


async def tasks(request: Request) -> JSONResponse:
    """GET /api/v1/tasks[?population=P]: every task with its newest round."""
    population = request.query_params.get("population")
    return JSONResponse({"tasks": await run_in_threadpool(_tasks, context_of(request), population)})


async def task(request: Request) -> JSONResponse:
    """GET /api/v1/tasks/{population}/{task_id}: the task, its rounds, metrics, rejections and ledger."""
    return JSONResponse(await run_in_threadpool(_task, context_of(request), _key(request)))


async def checkpoint(request: Request) -> Response:
    """GET /api/v1/tasks/{population}/{task_id}/checkpoint[?iteration=N]: a released server checkpoint, not gzipped.

    0 is the initial one; without `iteration` it is the newest.
    """
    text = request.query_params.get("iteration")
    wanted = None if text is None else number(text, "iteration")
    data, iteration_id = await run_in_threadpool(_checkpoint, context_of(request), _key(request), wanted)
    return Response(data, media_type="application/octet-stream", headers={"x-iteration": str(iteration_id)})


async def plan(request: Request) -> Response:
    """GET /api/v1/tasks/{population}/{task_id}/plan: the server plan, not gzipped."""
    data = await run_in_threadpool(_plan, context_of(request), _key(request))
    return Response(data, media_type="application/octet-stream")


def _key(request: Request) -> TaskKey:
    return TaskKey(request.path_params["population"], number(request.path_params["task"], "task"))


def _tasks(context: Context, population: str | None) -> list[dict[str, Any]]:
    with context.database.read() as tx:
        rows = list_tasks(tx, population=population)
        listed = []
        for row in rows:
            newest = newest_iteration(tx, row.key)
            counted = newest and _iteration(newest, count_assignments(tx, newest.key), None)
            listed.append({**_summary(row), "newest_iteration": counted})
    return listed


def _task(context: Context, key: TaskKey) -> dict[str, Any]:
    with context.database.read() as tx:
        row = existing_task(get_task(tx, key), key)
        completed = {one.iteration_id: one.completed.isoformat() for one in completed_iterations(tx, key)}
        newest_first = iterations_of(tx, key, limit=_LIST_LIMIT, newest_first=True)
        counts = count_by_iteration(tx, key)
        rounds = [
            _iteration(one, counts.get(one.key, {}), completed.get(one.key.iteration_id))
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
        "task": _summary(row),
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


def _summary(row: TaskRow) -> dict[str, Any]:
    return {
        "population": row.key.population,
        "task_id": row.key.task_id,
        "kind": row.kind.name,
        "status": row.status.name,
        "total_iteration": row.total_iteration,
        "min_aggregation_size": row.min_aggregation_size,
        "max_aggregation_size": row.max_aggregation_size,
        "min_client_version": row.min_client_version,
        "max_client_version": row.max_client_version,
        "traffic_weight": row.info.traffic_weight,
        "info": MessageToDict(row.info, preserving_proto_field_name=True),
        "reason": row.reason,
        "created": row.created.isoformat(),
        "opened": row.started.isoformat() if row.started else None,
        "stopped": row.stopped.isoformat() if row.stopped else None,
    }


def _iteration(row: IterationRow, counts: Mapping[AssignmentStatus, int], completed: str | None) -> dict[str, Any]:
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


def _checkpoint(context: Context, key: TaskKey, wanted: int | None) -> tuple[bytes, int]:
    with context.database.read() as tx:
        row = existing_task(get_task(tx, key), key)
        if not row.is_training:
            raise RequestRejected(Reason.NOT_FOUND, f"task {key} evaluates; it has no checkpoints")
        released = {one.iteration_id for one in completed_iterations(tx, key)} | {0}
    iteration_id = max(released) if wanted is None else wanted
    # A checkpoint may lie in the store before its round is released, or of a round that never will be.
    if iteration_id not in released:
        raise RequestRejected(Reason.NOT_FOUND, f"round {iteration_id} of task {key} has released nothing")
    data = _artifact(context, server_checkpoint_path(key, iteration_id))
    if context.plans.server_plan(key).process.WhichOneof("aggregator") in _WITH_SECRETS:
        data = write_checkpoint(without_noise(read_checkpoint(data)))
    return data, iteration_id


def _plan(context: Context, key: TaskKey) -> bytes:
    with context.database.read() as tx:
        existing_task(get_task(tx, key), key)
    return _artifact(context, server_plan_path(key))


def _artifact(context: Context, path: str) -> bytes:
    limit = context.settings.max_checkpoint_bytes
    try:
        return read_stored(context.blobs.get(MODEL, path, limit=limit), limit)
    except ArtifactInvalid as error:
        raise OperationFailed(Reason.STORAGE_FAILED, f"the stored object is damaged: {error.detail}") from error


routes = [
    Route("/api/v1/tasks", tasks, methods=["GET"]),
    Route("/api/v1/tasks/{population}/{task}", task, methods=["GET"]),
    Route("/api/v1/tasks/{population}/{task}/checkpoint", checkpoint, methods=["GET"]),
    Route("/api/v1/tasks/{population}/{task}/plan", plan, methods=["GET"]),
]
