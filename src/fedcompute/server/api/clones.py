"""Clones: a new task with the fields and the artifacts of an old one, from its first model or a released one."""

import logging

import numpy as np
from numpy.typing import NDArray
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fedcompute.crypto.envelope import gzip_bytes
from fedcompute.errors import FedComputeError, Reason, RequestRejected
from fedcompute.learning.noise_state import carries_noise, without_noise
from fedcompute.learning.process import read_state
from fedcompute.learning.specification import FINALIZER, NON_TRAINABLE, TRAINABLE
from fedcompute.protos import task_pb2
from fedcompute.server.api.acts import audited, name_subject
from fedcompute.server.api.artifacts import released_checkpoint, stored_artifact
from fedcompute.server.api.messages import ProtoResponse, asks_for_protobuf
from fedcompute.server.api.paths import number, task_key
from fedcompute.server.api.tasks import existing_task, summary
from fedcompute.server.context import Context, context_of, now
from fedcompute.storage.blobs import BlobMissing
from fedcompute.storage.keys import TaskKey
from fedcompute.storage.paths import MODEL, client_only_plan_path, initial_checkpoint_path, server_plan_path
from fedcompute.storage.tasks import TaskRow, cancel_task, create_task, get_task, task_message
from fedcompute.tensors.checkpoint import read_checkpoint, write_checkpoint
from fedcompute.tensors.tree import Tensors

_LOG = logging.getLogger(__name__)
# Of an old task's fields these are its history or depend on the day it was created.
_LEFT_OUT = ("task_id", "status", "created_time", "started_time", "stop_time", "do_not_create_iteration_after")
_MODEL_LEAVES = (f"{TRAINABLE}/", f"{NON_TRAINABLE}/", f"{FINALIZER}/")


async def clone(request: Request) -> Response:
    """Creates a task with the fields and artifacts of an old one and answers with it; it opens like any other.

    With `from_iteration=N` the new task starts from what round N released: model weights and optimizer, while clip
    norms and noise begin as they did in the old task. 409 if an active task of the kind exists or artifacts
    are missing.
    """
    text = request.query_params.get("from_iteration")
    start = None if text is None else number(text, "from_iteration")
    row = await run_in_threadpool(_clone, request, task_key(request), start)
    context_of(request).wake()
    if asks_for_protobuf(request):
        return ProtoResponse(task_pb2.CreateTaskResponse(task=task_message(row)), 201)
    return JSONResponse({"task": summary(row)}, status_code=201)


def _clone(request: Request, key: TaskKey, start: int | None) -> TaskRow:
    context = context_of(request)
    with context.database.read() as tx:
        old = existing_task(get_task(tx, key), key)
    # Read before anything is created: what is missing or damaged leaves nothing behind.
    plan, client_plan = _artifact(context, server_plan_path(key)), _artifact(context, client_only_plan_path(key))
    checkpoint = _artifact(context, initial_checkpoint_path(key))
    has_graphs = context.plans.server_plan(key).has_graphs
    if has_graphs and (start is not None or (old.is_training and carries_noise(read_checkpoint(checkpoint)))):
        # The graphs would draw the same noise again, or go on where the old task stopped.
        raise RequestRejected(
            Reason.TASK_INVALID,
            "the plan's graphs keep their noise in the checkpoint, and two tasks must not share it",
            remedy="build the task again" if start is None else "clone without from_iteration, or build the task again",
        )
    if start is not None:
        checkpoint = _from_release(context, old, checkpoint, start)
    message = task_message(old)
    for name in _LEFT_OUT:
        message.ClearField(name)
    with audited(request) as tx:
        row = create_task(tx, message, now())
        name_subject(request, f"{key} -> {row.key}" + ("" if start is None else f" from round {start}"))
    try:
        context.blobs.put(MODEL, initial_checkpoint_path(row.key), gzip_bytes(checkpoint))
        context.blobs.put(MODEL, server_plan_path(row.key), gzip_bytes(plan))
        context.blobs.put(MODEL, client_only_plan_path(row.key), gzip_bytes(client_plan))
    except FedComputeError:
        _take_back(context, row.key)
        raise
    return row


def _from_release(context: Context, old: TaskRow, initial: bytes, start: int) -> bytes:
    """The initial checkpoint of a task that goes on from a released round.

    Formal guarantees: it is a function of the old initial checkpoint and of weights and optimizer state that were
    released already (post-processing); no noise state, clip norm estimate or counter of the old task is in it, so that
    the new task is a mechanism of its own, charged for by its own ledger entries.
    """
    released, _ = released_checkpoint(context, old.key, start)
    state = without_noise(read_checkpoint(initial)) | _model(read_checkpoint(released))
    read_state(context.plans.server_plan(old.key).process, state)
    return write_checkpoint(state)


def _model(checkpoint: Tensors) -> dict[str, NDArray[np.generic]]:
    return {name: value for name, value in checkpoint.items() if name.startswith(_MODEL_LEAVES)}


def _artifact(context: Context, path: str) -> bytes:
    try:
        return stored_artifact(context, path)
    except BlobMissing:
        raise RequestRejected(
            Reason.TASK_CONFLICT, f"{path} of the old task is not in the store", remedy="build the task again"
        ) from None


def _take_back(context: Context, key: TaskKey) -> None:
    try:
        with context.database.write() as tx:
            cancel_task(tx, key, now())
    except FedComputeError:
        _LOG.warning("task %s was left behind without artifacts", key)
