"""Task management: creating, getting, pausing and canceling tasks as messages (spec/server.md 1.5)."""

from collections.abc import Callable, Mapping
from datetime import datetime

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.routing import Route

from fedcompute.errors import Reason, RequestRejected
from fedcompute.protos import task_pb2
from fedcompute.server.api.messages import ProtoResponse, read_proto
from fedcompute.server.api.paths import number, split_verb
from fedcompute.server.context import Context, context_of, now
from fedcompute.server.security.limits import TASK_LIMIT
from fedcompute.storage.assignments import cancel_unused
from fedcompute.storage.database import Transaction, lock_population
from fedcompute.storage.iterations import newest_iteration
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


async def create(request: Request) -> ProtoResponse:
    """POST /taskmanagement/v1/population/{population}:create-task."""
    population = split_verb(request.path_params["population"], "create-task")
    message = await read_proto(request, task_pb2.CreateTaskRequest, limit=TASK_LIMIT)
    message.task.population_name = population
    context = context_of(request)
    row = await run_in_threadpool(_create, context, message.task)
    return ProtoResponse(task_pb2.CreateTaskResponse(task=described(context, row)))


async def get(request: Request) -> ProtoResponse:
    """GET /taskmanagement/v1/population/{population}/tasks/{task}:get."""
    context = context_of(request)
    row = await run_in_threadpool(_get, context, _key(request, "get"))
    return ProtoResponse(task_pb2.GetTaskByIdResponse(task=described(context, row)))


async def change(request: Request) -> ProtoResponse:
    """POST /taskmanagement/v1/population/{population}/tasks/{task}:{cancel, pause or resume}.

    Ours, the reference has no such calls. To cancel a task that is over already changes nothing and returns it all the
    same; to pause one that is not OPEN, or to resume one that is not PAUSED, is a conflict.
    """
    context = context_of(request)
    verb = request.path_params["task"].rpartition(":")[2]
    key = _key(request, verb if verb in _CHANGES else "cancel")
    row = await run_in_threadpool(_CHANGES[verb], context, key)
    context.wake()
    return ProtoResponse(task_pb2.GetTaskByIdResponse(task=described(context, row)))


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


def existing_task(row: TaskRow | None, key: TaskKey) -> TaskRow:
    """`row` if there is one; raises RequestRejected(NOT_FOUND)."""
    if row is None:
        raise RequestRejected(Reason.NOT_FOUND, f"there is no task {key}")
    return row


def _key(request: Request, verb: str) -> TaskKey:
    task_id = number(split_verb(request.path_params["task"], verb), "task")
    return TaskKey(request.path_params["population"], task_id)


def _create(context: Context, task: task_pb2.Task) -> TaskRow:
    with context.database.write() as tx:
        return create_task(tx, task, now())


def _get(context: Context, key: TaskKey) -> TaskRow:
    with context.database.read() as tx:
        return existing_task(get_task(tx, key), key)


def _cancel(context: Context, key: TaskKey) -> TaskRow:
    with context.database.write() as tx:
        lock_population(tx, key.population)
        existing_task(get_task(tx, key), key)
        newest = newest_iteration(tx, key)
        if cancel_task(tx, key, now()) and newest is not None:
            cancel_unused(tx, newest.key, now())
        return existing_task(get_task(tx, key), key)


def _pause(context: Context, key: TaskKey) -> TaskRow:
    return _between(context, key, pause_task, TaskStatus.OPEN, "paused")


def _resume(context: Context, key: TaskKey) -> TaskRow:
    return _between(context, key, resume_task, TaskStatus.PAUSED, "resumed")


def _between(
    context: Context, key: TaskKey, move: Callable[[Transaction, TaskKey, datetime], bool], old: TaskStatus, what: str
) -> TaskRow:
    with context.database.write() as tx:
        moved = move(tx, key, now())
        row = existing_task(get_task(tx, key), key)
    if not moved:
        raise RequestRejected(
            Reason.TASK_CONFLICT,
            f"task {key} is {row.status.name} and stays so",
            remedy=f"nothing to do; only a task that is {old.name} can be {what}",
        )
    return row


_CHANGES: Mapping[str, Callable[[Context, TaskKey], TaskRow]] = {"cancel": _cancel, "pause": _pause, "resume": _resume}

routes = [
    Route("/taskmanagement/v1/population/{population}", create, methods=["POST"]),
    Route("/taskmanagement/v1/population/{population}/tasks/{task}", get, methods=["GET"]),
    Route("/taskmanagement/v1/population/{population}/tasks/{task}", change, methods=["POST"]),
]
