"""Task management: creating, getting, pausing, resuming and canceling tasks, as messages and as JSON.

The paths below /taskmanagement are the reference's (spec/server.md 1.5) and speak protobuf unless asked for JSON; those
below /api are ours and speak JSON unless asked for protobuf. Cancel, pause and resume are ours in both.
"""

from collections.abc import Callable
from datetime import datetime
from typing import Any

from google.protobuf.json_format import MessageToDict
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fedcompute import tracing
from fedcompute.errors import Reason, RequestRejected
from fedcompute.protos import task_pb2
from fedcompute.server.api.acts import audited, caller_of, name_subject
from fedcompute.server.api.messages import ProtoResponse, asks_for_protobuf, message_response, read_message
from fedcompute.server.api.paths import task_key
from fedcompute.server.context import Context, context_of, now
from fedcompute.server.security.limits import TASK_LIMIT
from fedcompute.storage.api_keys import Role
from fedcompute.storage.database import Transaction, lock_population
from fedcompute.storage.keys import TaskKey
from fedcompute.storage.paths import MODEL, client_only_plan_path, initial_checkpoint_path, server_plan_path
from fedcompute.storage.schema import TaskStatus
from fedcompute.storage.tasks import (
    TaskRow,
    cancel_task,
    create_task,
    get_task,
    pause_task,
    resume_task,
    task_message,
)

MANAGEMENT = "/taskmanagement/"
_LONGEST_NAME = 64  # in a trace


async def create(request: Request) -> Response:
    """Creates a task, CREATED until its artifacts lie where the answer's URL lists say."""
    message = await read_message(request, task_pb2.CreateTaskRequest, limit=TASK_LIMIT)
    message.task.population_name = request.path_params["population"]
    facts = {
        "population": message.task.population_name[:_LONGEST_NAME],
        "correlation_id": message.task.correlation_id[:_LONGEST_NAME],
    }
    with tracing.span("create_task", facts, parent=tracing.received(request.headers), serves=True) as traced:
        row = await run_in_threadpool(_create, request, message.task)
        traced["task"] = row.key.task_id
    context_of(request).measures.know_one(row.key.population)
    return message_response(request, task_pb2.CreateTaskResponse(task=described(context_of(request), row)))


async def get(request: Request) -> Response:
    """Returns a task; while it is CREATED with the URLs to upload its artifacts to, if the caller may do that."""
    row = await run_in_threadpool(_get, context_of(request), task_key(request))
    return _answer(request, row)


async def cancel(request: Request) -> Response:
    """Ends a task and its rounds under way; nothing changes if it was over already.

    A task that never opened may also be taken back by who may create it.
    """
    return await _changed(request, _cancel)


async def pause(request: Request) -> Response:
    """Pauses an OPEN task: no more devices are assigned and no round follows; 409 if it is not OPEN."""
    return await _changed(request, _pause)


async def resume(request: Request) -> Response:
    """Resumes a PAUSED task where it stopped; 409 if it is not PAUSED."""
    return await _changed(request, _resume)


def described(context: Context, row: TaskRow) -> task_pb2.Task:
    """The task as a message; while it is CREATED its URL lists say where its artifacts are to be PUT."""
    message = task_message(row)
    if row.status is TaskStatus.CREATED:

        def destination(path: str) -> str:
            return context.signed_url("PUT", MODEL, path, context.settings.artifact_url_life)

        message.client_only_plan_url.append(destination(client_only_plan_path(row.key)))
        message.server_phase_url.append(destination(server_plan_path(row.key)))
        message.init_checkpoint_url.append(destination(initial_checkpoint_path(row.key)))
    return message


def summary(row: TaskRow) -> dict[str, Any]:
    """The fields of a task as JSON."""
    return {
        "population": row.key.population,
        "task_id": row.key.task_id,
        "kind": row.kind.name,
        "status": row.status.name,
        "total_iteration": row.total_iteration,
        "min_aggregation_size": row.min_aggregation_size,
        "max_aggregation_size": row.max_aggregation_size,
        "max_parallel": row.max_parallel,
        "min_client_version": row.min_client_version,
        "max_client_version": row.max_client_version,
        "traffic_weight": row.info.traffic_weight,
        "info": MessageToDict(row.info, preserving_proto_field_name=True),
        "reason": row.reason,
        "created": row.created.isoformat(),
        "opened": row.started.isoformat() if row.started else None,
        "stopped": row.stopped.isoformat() if row.stopped else None,
        "entered": row.entered.isoformat(),
        "start_no_earlier_than": row.start_no_earlier_than.isoformat() if row.start_no_earlier_than else None,
        "do_not_create_iteration_after": (
            row.do_not_create_iteration_after.isoformat() if row.do_not_create_iteration_after else None
        ),
    }


def existing_task(row: TaskRow | None, key: TaskKey) -> TaskRow:
    """`row` if there is one; raises RequestRejected(NOT_FOUND)."""
    if row is None:
        raise RequestRejected(Reason.NOT_FOUND, f"there is no task {key}")
    return row


async def _changed(request: Request, change: Callable[[Request, TaskKey], TaskRow]) -> Response:
    row = await run_in_threadpool(change, request, task_key(request))
    context_of(request).wake()
    return _answer(request, row)


def _answer(request: Request, row: TaskRow) -> Response:
    # A signed URL lets its holder write an artifact; a viewer may only look.
    shown = described(context_of(request), row) if caller_of(request).role.covers(Role.BUILDER) else task_message(row)
    if request.url.path.startswith(MANAGEMENT):
        return message_response(request, task_pb2.GetTaskByIdResponse(task=shown))
    if asks_for_protobuf(request):
        return ProtoResponse(task_pb2.GetTaskByIdResponse(task=task_message(row)))
    return JSONResponse({"task": summary(row)})


def _create(request: Request, task: task_pb2.Task) -> TaskRow:
    with audited(request) as tx:
        row = create_task(tx, task, now())
        name_subject(request, str(row.key))
        return row


def _get(context: Context, key: TaskKey) -> TaskRow:
    with context.database.read() as tx:
        return existing_task(get_task(tx, key), key)


def _cancel(request: Request, key: TaskKey) -> TaskRow:
    with audited(request) as tx:
        lock_population(tx, key.population)
        row = existing_task(get_task(tx, key), key)
        if row.status is not TaskStatus.CREATED and not caller_of(request).role.covers(Role.OPERATOR):
            raise RequestRejected(Reason.ROLE_INSUFFICIENT, f"task {key} has opened; its end needs the role operator")
        cancel_task(tx, key, now())
        return existing_task(get_task(tx, key), key)


def _pause(request: Request, key: TaskKey) -> TaskRow:
    return _between(request, key, pause_task, TaskStatus.OPEN, "paused")


def _resume(request: Request, key: TaskKey) -> TaskRow:
    return _between(request, key, resume_task, TaskStatus.PAUSED, "resumed")


def _between(
    request: Request, key: TaskKey, move: Callable[[Transaction, TaskKey, datetime], bool], old: TaskStatus, what: str
) -> TaskRow:
    with audited(request) as tx:
        moved = move(tx, key, now())
        row = existing_task(get_task(tx, key), key)
        if not moved:
            raise RequestRejected(
                Reason.TASK_CONFLICT,
                f"task {key} is {row.status.name} and stays so",
                remedy=f"nothing to do; only a task that is {old.name} can be {what}",
            )
        return row
