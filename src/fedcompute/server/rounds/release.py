"""Applying: a round's sums become a released model, its metrics and its ledger entry, together (spec/server.md 5.3)."""

import logging
import math

from fedcompute.errors import FedComputeError, Reason
from fedcompute.privacy.ledger import events_document
from fedcompute.server.context import Context, now
from fedcompute.server.rounds.collect import add_up_again
from fedcompute.server.rounds.schedule import fail
from fedcompute.server.rounds.update import UpdateJob, UpdateResult, update
from fedcompute.storage.assignments import cancel_unused
from fedcompute.storage.batches import list_batches
from fedcompute.storage.iterations import IterationRow, close_and_open_next, move_iteration, next_iteration
from fedcompute.storage.keys import TaskKey
from fedcompute.storage.paths import (
    aggregate_path,
    client_checkpoint_path,
    metrics_path,
    server_checkpoint_path,
    server_plan_path,
)
from fedcompute.storage.releases import LedgerEntry
from fedcompute.storage.schema import BatchStatus, IterationStatus
from fedcompute.storage.tasks import TaskRow, get_task

_LOG = logging.getLogger(__name__)
_DAMAGED_SUM = (Reason.PARTIAL_SUM_MALFORMED, Reason.PARTIAL_SUM_MISMATCH)


def apply(context: Context, iteration: IterationRow) -> bool:
    """One look at an APPLYING iteration: starts its update job, or closes it with what the job gave; True if it did.

    Sums that lie damaged in the store are made anew from their uploads, once.
    """
    outcome = context.jobs.poll(iteration.key, update, lambda: _job(context, iteration))
    if outcome is None:
        return False
    if outcome.error is not None and outcome.error.reason in _DAMAGED_SUM and iteration.key not in context.repaired:
        again = add_up_again(context, iteration)
        if again is None:
            return False
        _LOG.warning("the sums of round %s were damaged and %s", iteration.key, "are made anew" if again else "lost")
        context.repaired.add(iteration.key)
        if again:
            context.jobs.forget(iteration.key)
            return True
    if outcome.error is not None:
        _give_up(context, iteration, outcome.error)
    else:
        _close(context, iteration, outcome.result)
    context.jobs.forget(iteration.key)
    return True


def _close(context: Context, iteration: IterationRow, result: UpdateResult) -> None:
    metrics = {name: value if math.isfinite(value) else None for name, value in result.metrics.items()}
    with context.database.write() as tx:
        task = get_task(tx, iteration.key.task)
        assert task is not None, "an iteration's foreign key is its task"
        closed = close_and_open_next(
            tx,
            iteration.key,
            metrics=metrics,
            entry=_entry(iteration, result),
            # An evaluation's next round needs a checkpoint of its own choice; the next pass makes it.
            following=next_iteration(task, iteration) if _trains_on(task, iteration) else None,
            now=now(),
        )
        if closed:
            cancel_unused(tx, iteration.key, now())
    if closed:
        _LOG.info("round %s is complete with %d contributions", iteration.key, result.contributions)


def _trains_on(task: TaskRow, iteration: IterationRow) -> bool:
    return task.is_training and iteration.key.iteration_id < task.total_iteration


def _entry(iteration: IterationRow, result: UpdateResult) -> LedgerEntry | None:
    if not result.events:
        return None
    return LedgerEntry(
        iteration=iteration.key,
        event=events_document(result.events),
        clip_norm=result.clip_norm,
        report_goal=iteration.report_goal,
        contributions=result.contributions,
        created=now(),
    )


def _give_up(context: Context, iteration: IterationRow, error: FedComputeError) -> None:
    with context.database.write() as tx:
        move_iteration(tx, iteration.key, IterationStatus.APPLYING, IterationStatus.APPLYING_FAILED, now())
    fail(context, iteration.key.task, error)


def _job(context: Context, iteration: IterationRow) -> UpdateJob:
    task, result_id = iteration.key.task, iteration.result_id
    with context.database.read() as tx:
        row = get_task(tx, task)
        batches = list_batches(tx, iteration.key, statuses=[BatchStatus.UPLOAD_COMPLETED])
    assert row is not None, "an iteration's foreign key is its task"
    return UpdateJob(
        blob_url=context.settings.blobs,
        plan_path=server_plan_path(task),
        base_path=_base_path(row, iteration),
        sum_paths=tuple(aggregate_path(task, result_id, batch.key.batch_id) for batch in batches),
        checkpoint_path=server_checkpoint_path(task, result_id),
        client_checkpoint_path=client_checkpoint_path(task, result_id),
        metrics_path=metrics_path(task, result_id),
        max_checkpoint_bytes=context.settings.max_checkpoint_bytes,
    )


def _base_path(task: TaskRow, iteration: IterationRow) -> str:
    if task.is_training:
        return server_checkpoint_path(task.key, iteration.base_on_result_id)
    info = task.info.evaluation_info
    training = TaskKey(info.training_population_name, info.training_task_id)
    return server_checkpoint_path(training, iteration.info.evaluation_training_iteration_id)
