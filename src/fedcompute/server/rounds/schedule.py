"""Tasks on their way: CREATED to OPEN, and the next round of an open task (spec/server.md 5.2-5.5)."""

import json
import logging
from datetime import datetime, timedelta

from fedcompute.crypto.envelope import GZIP_MAGIC, gzip_bytes
from fedcompute.errors import ArtifactInvalid, FedComputeError, OperationFailed, Reason
from fedcompute.learning.process import read_state
from fedcompute.protos import learning_pb2
from fedcompute.server.context import Context, now
from fedcompute.server.rounds.broadcast import Broadcast, BroadcastJob, broadcast
from fedcompute.server.rounds.evaluate import choose, measurable_of
from fedcompute.server.rounds.jobs import BroadcastKey
from fedcompute.server.rounds.order import Outlook, outlook
from fedcompute.server.rounds.plans import ServerPlan, read_example_selector, read_server_plan
from fedcompute.server.rounds.spending import Overspent
from fedcompute.server.rounds.update import client_checkpoint_bytes, read_checkpoint_object
from fedcompute.server.settings import Settings
from fedcompute.storage.blobs import BlobMissing
from fedcompute.storage.check_ins import has_room
from fedcompute.storage.database import Transaction, lock_population
from fedcompute.storage.iterations import (
    IterationRow,
    NewIteration,
    active_iterations,
    create_iteration,
    iterations_of,
    newest_iteration,
    newest_release,
    next_iteration,
)
from fedcompute.storage.keys import IterationKey, TaskKey
from fedcompute.storage.paths import (
    MODEL,
    client_checkpoint_path,
    client_only_plan_path,
    failure_path,
    server_checkpoint_path,
    server_plan_path,
)
from fedcompute.storage.releases import completed_iterations, standing_of
from fedcompute.storage.retention import claim_checkpoint
from fedcompute.storage.schema import IterationStatus, TaskStatus
from fedcompute.storage.tasks import TaskRow, complete_task, fail_task, get_task, open_task

_LOG = logging.getLogger(__name__)
_ROUND_LIMIT = 100_000
_FAILED = (IterationStatus.CANCELED, IterationStatus.AGGREGATING_FAILED, IterationStatus.APPLYING_FAILED)


def open_if_complete(context: Context, task: TaskRow) -> bool:
    """CREATED -> OPEN once the artifacts lie in the store, checked and ready for devices; True if it moved.

    Artifacts that cannot be used, or that do not come in time, fail the task, with the reason where the operator API
    finds it. A task that starts later opens without a round: its devices are told to come back soon.
    """
    try:
        plan = _prepare(context, task)
    except BlobMissing as error:
        return _without_artifacts(context, task, error)
    except ArtifactInvalid as error:
        return fail(context, task.key, error)
    if plan is None:
        return False
    context.warm_up()
    first = _following(context, task, None) if task.is_training and _has_started(task) and not _is_over(task) else None
    ahead = Outlook(known=True) if first is None else outlook(context, first)
    if not ahead.known:
        return False
    with context.database.write() as tx:
        if ahead.refused is not None and not _still_refused(tx, task.key, ahead.refused):
            return True
        opened = open_task(tx, task.key, now())
        if opened and ahead.refused is not None:
            complete_task(tx, task.key, now(), reason=Reason.BUDGET_SPENT)
        elif opened and first is not None:
            # Together: a device that asks in between would be sent away for a day or two.
            create_iteration(tx, first, now())
    if opened and ahead.refused is not None:
        tell_overspent(context, task.key, ahead.refused)
    elif opened:
        _LOG.info("task %s is open", task.key)
    if opened and plan.has_graphs and task.is_training:
        _LOG.warning("task %s runs server graphs: its models count as released without noise that protects", task.key)
    return opened


def advance(context: Context, task: TaskRow) -> bool:
    """Gives an open task its next round if it may have one; True if anything changed.

    A paused task gets none; it only ends with its last round. A task of overlapping rounds gets another one when those
    under way have no place left for a device, up to its `max_parallel`.
    """
    with context.database.read() as tx:
        newest = newest_iteration(tx, task.key)
        active = active_iterations(tx, task.key)
        waits = len(active) >= max(1, task.max_parallel) or any(has_room(tx, one) for one in active)
    if waits:
        return False
    if newest is not None and newest.status in _FAILED:
        with context.database.write() as tx:
            return fail_task(tx, task.key, now(), reason=Reason(newest.reason) if newest.reason else None)
    if newest is not None and newest.key.iteration_id >= task.total_iteration:
        return not active and _complete(context, task)
    if task.status is TaskStatus.PAUSED or not _has_started(task):
        return False
    if _is_over(task):
        return not active and _complete(context, task, Reason.STOP_TIME_PASSED)
    if not task.is_training:
        return _next_evaluation(context, task, newest)
    following = _following(context, task, newest)
    ahead = outlook(context, following)
    if not ahead.known or ahead.refused is not None:
        # Rounds under way were foreseen before; what they spend decides at their own release.
        return ahead.refused is not None and not active and _end(context, task.key, ahead.refused)
    with context.database.write() as tx:
        return create_iteration(tx, following, now())


def expiry(settings: Settings, moment: datetime) -> datetime | None:
    """When a round that opens at `moment` expires; None: never."""
    return moment + timedelta(seconds=settings.round_expiry) if settings.round_expiry else None


def fail(context: Context, task: TaskKey, error: FedComputeError) -> bool:
    """Ends a task as FAILED and keeps the reason for the operator; False if it was over already."""
    with context.database.write() as tx:
        failed = fail_task(tx, task, now(), reason=error.reason)
    if failed:
        tell_failed(context, task, error)
    return failed


def tell_failed(context: Context, task: TaskKey, error: FedComputeError) -> None:
    """Keeps, for the operator, why a task failed."""
    _LOG.error("task %s failed: %s", task, error)
    keep_failure(context, task, error)


def keep_failure(context: Context, task: TaskKey, error: FedComputeError) -> None:
    """Stores why a task failed, as JSON: code, message, remedy."""
    document = {"code": error.reason.value, "message": error.detail, "remedy": error.remedy}
    context.blobs.put(MODEL, failure_path(task), json.dumps(document).encode())


def tell_overspent(context: Context, task: TaskKey, overspent: Overspent) -> None:
    """Keeps, for the operator, why a task ended before its last round."""
    _LOG.warning("task %s is over: %s", task, overspent)
    keep_failure(context, task, OperationFailed(Reason.BUDGET_SPENT, str(overspent)))


def _prepare(context: Context, task: TaskRow) -> ServerPlan | None:
    """Checks what the builder delivered and writes what devices of the first round get; None while a job does."""
    blobs, limit = context.blobs, context.settings.max_checkpoint_bytes
    client_plan = blobs.get(MODEL, client_only_plan_path(task.key), limit=limit)
    plan = read_server_plan(blobs.get(MODEL, server_plan_path(task.key), limit=limit), limit)
    read_example_selector(client_plan, limit)
    wanted = learning_pb2.LearningProcess.TRAINING if task.is_training else learning_pb2.LearningProcess.EVALUATION
    if plan.process.kind != wanted:
        kind = learning_pb2.LearningProcess.Kind.Name(plan.process.kind)
        raise ArtifactInvalid(Reason.PLAN_UNSUPPORTED, f"a {task.kind.name} task cannot run a plan of kind {kind}")
    if task.max_parallel > 1 and task.is_training and not plan.overlaps:
        name = plan.process.WhichOneof("aggregator") or "server graphs"
        raise ArtifactInvalid(
            Reason.PLAN_UNSUPPORTED,
            f"max_parallel is {task.max_parallel}, and rounds with {name} must not overlap",
            remedy="set max_parallel to 1, or build with FIXED_GAUSSIAN or without noise",
        )
    if task.is_training or plan.has_graphs:
        first = IterationKey(task.key.population, task.key.task_id, 1)
        told = _told(context, plan, first, server_checkpoint_path(task.key, 0) if task.is_training else None)
        if told is None:
            return None
        if task.is_training:
            blobs.put(MODEL, client_checkpoint_path(task.key, 0), told.client_checkpoint)
    if client_plan[:2] != GZIP_MAGIC:
        blobs.put(MODEL, client_only_plan_path(task.key), gzip_bytes(client_plan))
    return plan


def _told(
    context: Context, plan: ServerPlan, key: IterationKey, checkpoint: str | None, training_iteration_id: int = 0
) -> Broadcast | None:
    """What the devices of a round are told of a server checkpoint; None while a job finds it out with graphs.

    Without a checkpoint only the graphs are checked. Raises ArtifactInvalid and BlobMissing.
    """
    limit = context.settings.max_checkpoint_bytes
    if not plan.has_graphs:
        assert checkpoint is not None, "there are no graphs to check"
        stored = context.blobs.get(MODEL, checkpoint, limit=limit)
        state = read_state(plan.process, read_checkpoint_object(stored, limit))
        return Broadcast(client_checkpoint_bytes(plan.process, state), training_iteration_id)
    if checkpoint is not None and not context.blobs.exists(MODEL, checkpoint):
        raise BlobMissing(Reason.NOT_FOUND, "the server checkpoint is not in the store")
    job = BroadcastJob(context.settings.blobs, server_plan_path(key.task), checkpoint, limit, training_iteration_id)
    outcome = context.jobs.poll(BroadcastKey(key), broadcast, lambda: job)
    if outcome is None:
        return None
    context.jobs.forget(BroadcastKey(key))
    if outcome.error is not None:
        raise ArtifactInvalid(outcome.error.reason, outcome.error.detail, remedy=outcome.error.remedy)
    told: Broadcast = outcome.result
    return told


def _without_artifacts(context: Context, task: TaskRow, missing: BlobMissing) -> bool:
    seconds = context.settings.artifact_expiry
    if not seconds or now() <= task.created + timedelta(seconds=seconds):
        return False
    detail = f"after {seconds:.0f} s the task still lacks an artifact: {missing.detail}"
    return fail(context, task.key, OperationFailed(Reason.ARTIFACTS_MISSING, detail))


def _has_started(task: TaskRow) -> bool:
    return task.start_no_earlier_than is None or now() >= task.start_no_earlier_than


def _is_over(task: TaskRow) -> bool:
    return task.do_not_create_iteration_after is not None and now() > task.do_not_create_iteration_after


def _still_refused(tx: Transaction, task: TaskKey, overspent: Overspent) -> bool:
    """Whether the ledger and the budget are those that decided; keeps them so until the transaction ends."""
    lock_population(tx, task.population)
    return standing_of(tx, task.population) == overspent.standing


def _following(context: Context, task: TaskRow, last: IterationRow | None) -> NewIteration:
    with context.database.read() as tx:
        released = newest_release(tx, task.key)
    return next_iteration(task, last, released=released, expires=expiry(context.settings, now()))


def _complete(context: Context, task: TaskRow, reason: Reason | None = None) -> bool:
    with context.database.write() as tx:
        return complete_task(tx, task.key, now(), reason=reason)


def _end(context: Context, task: TaskKey, overspent: Overspent) -> bool:
    with context.database.write() as tx:
        if not _still_refused(tx, task, overspent):
            return True
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
        stored = completed_iterations(tx, training_key, since=_evaluated_since(context), stored=True)
        earlier = [one.info.evaluation_training_iteration_id for one in iterations_of(tx, task.key, limit=_ROUND_LIMIT)]
    there = {one.iteration_id for one in stored if (training_key, one.iteration_id) not in context.missing}
    measurable = measurable_of(info.check_point_selector, released, training.created, there=there, evaluated=earlier)
    chosen = choose(measurable, earlier)
    if chosen is None:
        return False
    new = next_iteration(task, newest, training_iteration_id=chosen, expires=expiry(context.settings, now()))
    ahead = outlook(context, new)
    if not ahead.known or ahead.refused is not None:
        return ahead.refused is not None and _end(context, task.key, ahead.refused)
    try:
        plan = context.plans.server_plan(task.key)
        told = _told(context, plan, new.key, server_checkpoint_path(training_key, chosen), chosen)
    except ArtifactInvalid as error:
        return fail(context, task.key, error)
    except BlobMissing:
        _LOG.warning("the checkpoint of round %s/%d is gone; task %s takes another", training_key, chosen, task.key)
        context.missing.add((training_key, chosen))
        return True
    if told is None:
        return False
    if told.training_iteration_id != chosen:
        # A job that began earlier looked at another one.
        new = next_iteration(task, newest, training_iteration_id=told.training_iteration_id, expires=new.expires)
    path = client_checkpoint_path(task.key, new.base_on_result_id)
    with context.database.write() as tx:
        lock_population(tx, task.key.population)
        if not claim_checkpoint(tx, training_key, told.training_iteration_id):
            return True
        created = create_iteration(tx, new, now())
        if created:
            # Before anybody sees the row, and only by the engine whose choice it holds.
            context.blobs.put(MODEL, path, told.client_checkpoint)
    return created


def _evaluated_since(context: Context) -> datetime | None:
    hours = context.settings.evaluation_lookback_hours
    return now() - timedelta(hours=hours) if hours else None
