"""Tasks on their way: CREATED to OPEN, and the next round of an open task (spec/server.md 5.2-5.5)."""

import json
import logging

from fedcompute.crypto.envelope import GZIP_MAGIC, gzip_bytes
from fedcompute.errors import ArtifactInvalid, FedComputeError, OperationFailed, Reason
from fedcompute.learning.process import read_state
from fedcompute.protos import learning_pb2
from fedcompute.server.context import Context, now
from fedcompute.server.rounds.evaluate import candidates, choose
from fedcompute.server.rounds.order import Outlook, outlook
from fedcompute.server.rounds.plans import read_example_selector, read_server_plan
from fedcompute.server.rounds.spending import Overspent
from fedcompute.server.rounds.update import client_checkpoint_bytes, read_checkpoint_object
from fedcompute.storage.blobs import BlobMissing
from fedcompute.storage.iterations import (
    IterationRow,
    create_iteration,
    iterations_of,
    newest_iteration,
    next_iteration,
)
from fedcompute.storage.keys import TaskKey
from fedcompute.storage.paths import (
    MODEL,
    client_checkpoint_path,
    client_only_plan_path,
    failure_path,
    server_checkpoint_path,
    server_plan_path,
)
from fedcompute.storage.releases import completed_iterations
from fedcompute.storage.schema import ACTIVE_ITERATION, IterationStatus, TaskStatus
from fedcompute.storage.tasks import TaskRow, complete_task, fail_task, get_task, open_task

_LOG = logging.getLogger(__name__)
_ROUND_LIMIT = 100_000
_FAILED = (IterationStatus.AGGREGATING_FAILED, IterationStatus.APPLYING_FAILED)


def open_if_complete(context: Context, task: TaskRow) -> bool:
    """CREATED -> OPEN once the artifacts lie in the store, checked and ready for devices; True if it moved.

    Artifacts that cannot be used fail the task, with the reason where the operator API finds it.
    """
    try:
        _prepare(context, task)
    except BlobMissing:
        return False
    except ArtifactInvalid as error:
        return fail(context, task.key, error)
    context.warm_up()
    first = outlook(context, next_iteration(task, None)) if task.is_training else Outlook(known=True)
    if not first.known:
        return False
    with context.database.write() as tx:
        opened = open_task(tx, task.key, now())
        if opened and first.refused is not None:
            complete_task(tx, task.key, now(), reason=Reason.BUDGET_SPENT)
        elif opened and task.is_training:
            # Together: a device that asks in between would be sent away for a day or two.
            create_iteration(tx, next_iteration(task, None), now())
    if opened and first.refused is not None:
        tell_overspent(context, task.key, first.refused)
    elif opened:
        _LOG.info("task %s is open", task.key)
    return opened


def advance(context: Context, task: TaskRow) -> bool:
    """Gives an open task its next round if none is under way; True if anything changed.

    A paused task gets none; it only ends with its last round.
    """
    with context.database.read() as tx:
        newest = newest_iteration(tx, task.key)
    if newest is not None and newest.status in ACTIVE_ITERATION:
        return False
    if newest is not None and newest.status in _FAILED:
        with context.database.write() as tx:
            return fail_task(tx, task.key, now())
    if newest is not None and newest.status is IterationStatus.CANCELED:
        return False
    if newest is not None and newest.key.iteration_id >= task.total_iteration:
        with context.database.write() as tx:
            return complete_task(tx, task.key, now())
    if task.status is TaskStatus.PAUSED:
        return False
    if not task.is_training:
        return _next_evaluation(context, task, newest)
    following = next_iteration(task, newest)
    ahead = outlook(context, following)
    if not ahead.known or ahead.refused is not None:
        return ahead.refused is not None and _end(context, task.key, ahead.refused)
    with context.database.write() as tx:
        return create_iteration(tx, following, now())


def fail(context: Context, task: TaskKey, error: FedComputeError) -> bool:
    """Ends a task as FAILED and keeps the reason for the operator; False if it was over already."""
    with context.database.write() as tx:
        failed = fail_task(tx, task, now(), reason=error.reason)
    if failed:
        _LOG.error("task %s failed: %s", task, error)
        keep_failure(context, task, error)
    return failed


def keep_failure(context: Context, task: TaskKey, error: FedComputeError) -> None:
    """Stores why a task failed, as JSON: code, message, remedy."""
    document = {"code": error.reason.value, "message": error.detail, "remedy": error.remedy}
    context.blobs.put(MODEL, failure_path(task), json.dumps(document).encode())


def tell_overspent(context: Context, task: TaskKey, overspent: Overspent) -> None:
    """Keeps, for the operator, why a task ended before its last round."""
    _LOG.warning("task %s is over: %s", task, overspent)
    keep_failure(context, task, OperationFailed(Reason.BUDGET_SPENT, str(overspent)))


def _prepare(context: Context, task: TaskRow) -> None:
    blobs, limit = context.blobs, context.settings.max_checkpoint_bytes
    client_plan = blobs.get(MODEL, client_only_plan_path(task.key), limit=limit)
    plan = read_server_plan(blobs.get(MODEL, server_plan_path(task.key), limit=limit), limit)
    read_example_selector(client_plan, limit)
    wanted = learning_pb2.LearningProcess.TRAINING if task.is_training else learning_pb2.LearningProcess.EVALUATION
    if plan.process.kind != wanted:
        kind = learning_pb2.LearningProcess.Kind.Name(plan.process.kind)
        raise ArtifactInvalid(Reason.PLAN_UNSUPPORTED, f"a {task.kind.name} task cannot run a plan of kind {kind}")
    if task.is_training:
        stored = blobs.get(MODEL, server_checkpoint_path(task.key, 0), limit=limit)
        state = read_state(plan.process, read_checkpoint_object(stored, limit))
        blobs.put(MODEL, client_checkpoint_path(task.key, 0), client_checkpoint_bytes(plan.process, state))
    if client_plan[:2] != GZIP_MAGIC:
        blobs.put(MODEL, client_only_plan_path(task.key), gzip_bytes(client_plan))


def _end(context: Context, task: TaskKey, overspent: Overspent) -> bool:
    with context.database.write() as tx:
        # Not one that was paused meanwhile: it may get more budget before it goes on.
        ended = complete_task(tx, task, now(), reason=Reason.BUDGET_SPENT, statuses=[TaskStatus.OPEN])
    if ended:
        tell_overspent(context, task, overspent)
    return ended


def _next_evaluation(context: Context, task: TaskRow, newest: IterationRow | None) -> bool:
    info = task.info.evaluation_info
    training_key = TaskKey(info.training_population_name, info.training_task_id)
    with context.database.read() as tx:
        training = get_task(tx, training_key)
        if training is None:
            return False
        released = completed_iterations(tx, training_key)
        earlier = [one.info.evaluation_training_iteration_id for one in iterations_of(tx, task.key, limit=_ROUND_LIMIT)]
    chosen = choose(candidates(info.check_point_selector, released, training.created), earlier)
    if chosen is None:
        return False
    new = next_iteration(task, newest, training_iteration_id=chosen)
    ahead = outlook(context, new)
    if not ahead.known or ahead.refused is not None:
        return ahead.refused is not None and _end(context, task.key, ahead.refused)
    limit = context.settings.max_checkpoint_bytes
    stored = context.blobs.get(MODEL, server_checkpoint_path(training_key, chosen), limit=limit)
    process = context.plans.server_plan(task.key).process
    try:
        state = read_state(process, read_checkpoint_object(stored, limit))
    except ArtifactInvalid as error:
        return fail(context, task.key, error)
    # Before the row: devices may ask for it as soon as the row is there.
    path = client_checkpoint_path(task.key, new.base_on_result_id)
    context.blobs.put(MODEL, path, client_checkpoint_bytes(process, state))
    with context.database.write() as tx:
        return create_iteration(tx, new, now())
