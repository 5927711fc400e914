"""The artifacts of a task: its plans, and the checkpoints that its rounds released."""

from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fedcompute.errors import ArtifactInvalid, OperationFailed, Reason, RequestRejected
from fedcompute.learning.catalogue import AGGREGATORS
from fedcompute.learning.noise_state import without_noise
from fedcompute.server.api.paging import page_of
from fedcompute.server.api.paths import number, task_key
from fedcompute.server.api.tasks import existing_task
from fedcompute.server.context import Context, context_of
from fedcompute.server.rounds.plans import read_stored
from fedcompute.storage.blobs import BlobMissing
from fedcompute.storage.keys import TaskKey
from fedcompute.storage.paths import (
    MODEL,
    client_checkpoint_path,
    client_only_plan_path,
    server_checkpoint_path,
    server_plan_path,
)
from fedcompute.storage.releases import completed_iterations
from fedcompute.storage.tasks import get_task
from fedcompute.tensors.checkpoint import read_checkpoint, write_checkpoint

PAGE = 100
LONGEST_PAGE = 1000
# Their states hold the noise itself.
_WITH_SECRETS = tuple(name for name, entry in AGGREGATORS.items() if entry.restart is not None)


async def artifacts(request: Request) -> JSONResponse:
    """What lies in the store of a task and may be downloaded: plans on the first page, checkpoints round by round."""
    page = page_of(request, usual=PAGE, most=LONGEST_PAGE)
    after = None if page.after is None else number(page.after, "after")
    return JSONResponse(await run_in_threadpool(_artifacts, context_of(request), task_key(request), after, page.limit))


async def plan(request: Request) -> Response:
    """The server plan, a `Plan` message, not gzipped."""
    return await run_in_threadpool(_plan, context_of(request), task_key(request), server_plan_path)


async def client_plan(request: Request) -> Response:
    """The devices' plan, a `ClientOnlyPlan` message, not gzipped."""
    return await run_in_threadpool(_plan, context_of(request), task_key(request), client_only_plan_path)


async def checkpoint(request: Request) -> Response:
    """A released server checkpoint without its noise, not gzipped; `x-iteration` says of which round."""
    return await run_in_threadpool(_checkpoint, context_of(request), task_key(request), _iteration(request), True)


async def client_checkpoint(request: Request) -> Response:
    """What devices of the round after a released one start from, not gzipped; `x-iteration` says of which round."""
    return await run_in_threadpool(_checkpoint, context_of(request), task_key(request), _iteration(request), False)


def released_checkpoint(context: Context, key: TaskKey, iteration_id: int | None) -> tuple[bytes, int]:
    """A released server checkpoint without noise and its round; 0 is the initial one, None the newest.

    Raises RequestRejected(NOT_FOUND) for an evaluation task and for a round that has released nothing, BlobMissing for
    one whose checkpoint was deleted since.
    """
    found = _released(context, key, iteration_id)
    data = stored_artifact(context, server_checkpoint_path(key, found))
    plan = context.plans.server_plan(key)
    # Nobody can tell what graphs keep; their noise has the names of ours.
    if plan.has_graphs or plan.process.WhichOneof("aggregator") in _WITH_SECRETS:
        data = write_checkpoint(without_noise(read_checkpoint(data)))
    return data, found


def stored_artifact(context: Context, path: str) -> bytes:
    """An object of the bucket `model`, not gzipped; raises BlobMissing, OperationFailed."""
    limit = context.settings.max_checkpoint_bytes
    try:
        return read_stored(context.blobs.get(MODEL, path, limit=limit), limit)
    except ArtifactInvalid as error:
        raise OperationFailed(Reason.STORAGE_FAILED, f"the stored object is damaged: {error.detail}") from error


def _artifacts(context: Context, key: TaskKey, after: int | None, limit: int) -> dict[str, Any]:
    with context.database.read() as tx:
        row = existing_task(get_task(tx, key), key)
        rounds = [0, *(one.iteration_id for one in completed_iterations(tx, key))] if row.is_training else []
    rounds = [one for one in rounds if after is None or one > after]
    base = f"/api/v1/tasks/{key}"
    wanted: list[tuple[str, int | None, str]] = []
    if after is None:
        wanted += [("plan", None, server_plan_path(key)), ("client-plan", None, client_only_plan_path(key))]
    for one in rounds[:limit]:
        wanted.append(("checkpoint", one, server_checkpoint_path(key, one)))
        wanted.append(("client-checkpoint", one, client_checkpoint_path(key, one)))
    listed = []
    for name, iteration, path in wanted:
        try:
            size = context.blobs.size(MODEL, path)
        except BlobMissing:
            # Not uploaded yet, or deleted since its round was released.
            continue
        query = "" if iteration is None else f"?iteration={iteration}"
        listed.append({"name": name, "iteration_id": iteration, "stored_bytes": size, "path": f"{base}/{name}{query}"})
    return {"artifacts": listed, "next": str(rounds[limit - 1]) if len(rounds) > limit else None}


def _plan(context: Context, key: TaskKey, path: Any) -> Response:
    with context.database.read() as tx:
        existing_task(get_task(tx, key), key)
    return Response(stored_artifact(context, path(key)), media_type="application/octet-stream")


def _checkpoint(context: Context, key: TaskKey, wanted: int | None, is_server: bool) -> Response:
    if is_server:
        data, found = released_checkpoint(context, key, wanted)
    else:
        found = _released(context, key, wanted)
        data = stored_artifact(context, client_checkpoint_path(key, found))
    return Response(data, media_type="application/octet-stream", headers={"x-iteration": str(found)})


def _released(context: Context, key: TaskKey, wanted: int | None) -> int:
    with context.database.read() as tx:
        row = existing_task(get_task(tx, key), key)
        if not row.is_training:
            raise RequestRejected(Reason.NOT_FOUND, f"task {key} evaluates; it has no checkpoints")
        released = {one.iteration_id for one in completed_iterations(tx, key)} | {0}
    iteration_id = max(released) if wanted is None else wanted
    # A checkpoint may lie in the store before its round is released, or of a round that never will be.
    if iteration_id not in released:
        raise RequestRejected(Reason.NOT_FOUND, f"round {iteration_id} of task {key} has released nothing")
    return iteration_id


def _iteration(request: Request) -> int | None:
    text = request.query_params.get("iteration")
    return None if text is None else number(text, "iteration")
