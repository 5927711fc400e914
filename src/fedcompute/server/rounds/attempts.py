"""Rounds that did not come to an end: tried again with what their devices gave, or given up (spec/server.md 4.2)."""

import logging

from fedcompute.errors import FedComputeError, OperationFailed, Reason
from fedcompute.server.context import Context, now
from fedcompute.server.rounds.schedule import expiry, tell_failed
from fedcompute.storage.assignments import cancel_unused
from fedcompute.storage.attempts import open_attempt
from fedcompute.storage.batches import BatchRow, fail_batch, get_batch, list_batches
from fedcompute.storage.database import lock_population
from fedcompute.storage.iterations import IterationRow, expired_iterations, move_iteration
from fedcompute.storage.paths import AGGREGATED, aggregate_path, aggregates_prefix
from fedcompute.storage.schema import BatchStatus, IterationStatus
from fedcompute.storage.tasks import fail_task

_LOG = logging.getLogger(__name__)
_DAMAGED_SUM = (Reason.PARTIAL_SUM_MALFORMED, Reason.PARTIAL_SUM_MISMATCH)


def expire(context: Context) -> bool:
    """Tries every collecting round anew whose time is over, those of paused tasks excepted; True if there were any."""
    with context.database.read() as tx:
        late = expired_iterations(tx, now())
    for iteration in late:
        age = (now() - iteration.created).total_seconds()
        error = OperationFailed(Reason.ROUND_EXPIRED, f"round {iteration.key} collected for {age:.0f} s")
        _again(context, iteration, error, IterationStatus.CANCELED, IterationStatus.COLLECTING, [])
    return bool(late)


def batch_failed(context: Context, iteration: IterationRow, batch: BatchRow, error: FedComputeError) -> bool:
    """Tries a round anew of which one batch cannot be added up; False if the round or the batch has moved on."""
    return _again(context, iteration, error, IterationStatus.AGGREGATING_FAILED, IterationStatus.COLLECTING, [batch])


def update_failed(context: Context, iteration: IterationRow, error: FedComputeError) -> bool:
    """Repeats the update of a round; adds up all of its uploads anew first, if its sums were damaged.

    Formal guarantees: noise that was drawn for the round and not used up is used by the repetition, and what the failed
    one stored is kept (`update`), so that a round has one noised result however often it is tried.
    """
    ended = IterationStatus.APPLYING_FAILED
    if error.reason not in _DAMAGED_SUM:
        return _again(context, iteration, error, ended, IterationStatus.APPLYING, [])
    with context.database.read() as tx:
        batches = list_batches(tx, iteration.key, statuses=[BatchStatus.UPLOAD_COMPLETED])
    return _again(context, iteration, error, ended, IterationStatus.COLLECTING, batches)


def _again(
    context: Context,
    iteration: IterationRow,
    error: FedComputeError,
    ended: IterationStatus,
    into: IterationStatus,
    damaged: list[BatchRow],
) -> bool:
    key, last = iteration.key, iteration.key.attempt_id + 1 >= context.settings.round_attempts
    with context.database.write() as tx:
        lock_population(tx, key.population)
        if error.reason is Reason.ROUND_EXPIRED and not expired_iterations(tx, now(), key=key):
            # It closed, or its task was paused meanwhile, which stops its clock.
            return False
        for batch in damaged:
            present = get_batch(tx, batch.key)
            if present is None or present.status is not batch.status:
                return False
        if last:
            moved = move_iteration(tx, key, iteration.status, ended, now(), reason=error.reason)
            for batch in damaged if moved else []:
                fail_batch(tx, batch.key, error.reason, now())
            if moved:
                # Together: a task without a round to go on with would stand still for ever.
                cancel_unused(tx, key, now())
                fail_task(tx, key.task, now(), reason=error.reason)
            new = None
        else:
            new = open_attempt(
                tx,
                key,
                old=iteration.status,
                ended=ended,
                into=into,
                reason=error.reason,
                now=now(),
                expires=expiry(context.settings, now()) if into is IterationStatus.COLLECTING else None,
                dissolve=[batch.key.batch_id for batch in damaged],
            )
            moved = new is not None
    if moved:
        context.measures.round_ended(key.population, ended.name.lower(), error.reason.value)
    if moved and last:
        tell_failed(context, key.task, error)
    elif new is not None:
        _LOG.warning("round %s is tried again, attempt %d: %s", key, new.attempt_id + 1, error)
        if key in context.prepared:
            context.prepared[new] = context.prepared.pop(key)
        for batch in damaged:
            # Beside the sums of others that share most of its devices it would tell what the rest gave.
            context.blobs.delete(AGGREGATED, aggregate_path(key.task, iteration.result_id, batch.key.batch_id))
        merged = aggregates_prefix(key.task, iteration.result_id, 1)
        for path in context.blobs.list(AGGREGATED, merged) if damaged else []:
            context.blobs.delete(AGGREGATED, path)
    return moved
