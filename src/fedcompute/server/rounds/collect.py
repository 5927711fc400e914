"""Collecting: uploads become batches, batches become sums, enough of them close the round (spec/server.md 6.1, 6.4)."""

import logging
from collections.abc import Sequence
from datetime import timedelta
from functools import partial

from fedcompute.learning.catalogue import aggregator_of
from fedcompute.protos import learning_pb2
from fedcompute.server.context import Context, now
from fedcompute.server.rounds.aggregate import AggregateJob, AggregateResult, aggregate
from fedcompute.server.rounds.jobs import Outcome
from fedcompute.server.rounds.schedule import fail
from fedcompute.storage.assignments import (
    assignments_of_batch,
    list_assignments,
    mark_uploaded,
    time_out_computing,
    time_out_uploading,
    unbatched,
)
from fedcompute.storage.batches import (
    BatchRow,
    create_batch,
    fail_batch,
    finish_batch,
    list_batches,
    publish_batch,
    sum_batches,
)
from fedcompute.storage.database import Transaction, lock_population
from fedcompute.storage.iterations import IterationRow, get_iteration, list_iterations, move_iteration
from fedcompute.storage.paths import GRADIENT, aggregate_path, client_checkpoint_path, server_plan_path, update_path
from fedcompute.storage.schema import AssignmentStatus, BatchStatus, IterationStatus
from fedcompute.storage.secrets import private_keys

_LOG = logging.getLogger(__name__)
_ROUND_LIMIT = 100_000


def collect(context: Context, iteration: IterationRow) -> bool:
    """One look at a COLLECTING iteration; True if anything changed."""
    changed = run_batches(context, iteration)
    arrived = context.uploads.among(_waiting(context, iteration))
    with context.database.read() as tx:
        if not arrived and not unbatched(tx, iteration.key, limit=1):
            return changed
    capped = _fixed_denominator(context, iteration)
    with context.database.write() as tx:
        if not _still(tx, iteration):
            return changed
        moved = mark_uploaded(tx, iteration.key, arrived, now()) if arrived else []
        changed |= bool(moved) | _form_batches(context, tx, iteration, capped)
        for batch in list_batches(tx, iteration.key, statuses=[BatchStatus.FULL]):
            changed |= publish_batch(tx, batch.key, now())
        if sum_batches(tx, iteration.key).expected >= iteration.report_goal:
            changed |= move_iteration(tx, iteration.key, IterationStatus.COLLECTING, IterationStatus.AGGREGATING, now())
    context.uploads.discard(arrived)
    return changed


def finish_aggregating(context: Context, iteration: IterationRow) -> bool:
    """One look at an AGGREGATING iteration: when every batch has ended it goes on, or back to collecting."""
    changed = run_batches(context, iteration)
    with context.database.write() as tx:
        if not _still(tx, iteration):
            return changed
        if list_batches(tx, iteration.key, statuses=[BatchStatus.FULL, BatchStatus.PUBLISH_COMPLETED]):
            return changed
        enough = sum_batches(tx, iteration.key).accepted >= iteration.report_goal
        following = IterationStatus.APPLYING if enough else IterationStatus.COLLECTING
        moved = move_iteration(tx, iteration.key, IterationStatus.AGGREGATING, following, now())
    if moved and not enough:
        _LOG.warning("round %s is below its goal after rejections and collects again", iteration.key)
    return moved or changed


def run_batches(context: Context, iteration: IterationRow) -> bool:
    """Starts the jobs of published batches and records those that ended; True if any ended."""
    with context.database.read() as tx:
        published = list_batches(tx, iteration.key, statuses=[BatchStatus.PUBLISH_COMPLETED])
    changed = False
    for batch in published:
        outcome = context.jobs.poll(batch.key, aggregate, partial(_job, context, iteration, batch))
        # A round that has moved on is looked at again as it is then; one that is over asks for no sum.
        if outcome is None or not _record(context, iteration, batch, outcome):
            continue
        context.jobs.forget(batch.key)
        changed = True
    return changed


def add_up_again(context: Context, iteration: IterationRow) -> bool | None:
    """Makes the sums of a round's finished batches anew, from the uploads that counted.

    None while its jobs run; then whether every sum holds again what its batch counted.
    """
    with context.database.read() as tx:
        finished = list_batches(tx, iteration.key, statuses=[BatchStatus.UPLOAD_COMPLETED])
    outcomes = [
        (batch, context.jobs.poll(batch.key, aggregate, partial(_job, context, iteration, batch))) for batch in finished
    ]
    whole = True
    for batch, outcome in outcomes:
        if outcome is None:
            return None
        whole &= outcome.error is None and outcome.result == AggregateResult(batch.accepted_size or 0, ())
    for batch, _ in outcomes:
        context.jobs.forget(batch.key)
    return whole


def time_out(context: Context) -> bool:
    """Ends assignments that took too long, in rounds of every status; True if there were any.

    Looks into the store first: an upload that lies there is collected, however late its report was, and also when
    nobody saw it arrive (a restart, another process).
    """
    settings = context.settings
    waiting: set[str] = set()
    # Before the question who waits: an upload that arrives meanwhile must not count as forgotten.
    seen = context.uploads.all()
    with context.database.read() as tx:
        # An aggregating round may collect again.
        unclosed = list_iterations(tx, statuses=[IterationStatus.COLLECTING, IterationStatus.AGGREGATING])
    for iteration in unclosed:
        for session_id in _waiting(context, iteration):
            waiting.add(session_id)
            path = update_path(iteration.key.task, iteration.result_id, session_id)
            if not context.uploads.among([session_id]) and context.blobs.exists(GRADIENT, path):
                context.uploads.add(session_id)
    context.uploads.discard(seen - waiting)
    stored = context.uploads.among(sorted(waiting))
    with context.database.write() as tx:
        late = time_out_uploading(tx, now(), timedelta(seconds=settings.upload_timeout), keep=stored)
        slow = time_out_computing(tx, now(), timedelta(seconds=settings.local_compute_timeout))
    if late or slow:
        _LOG.info("%d assignments timed out computing, %d uploading", len(slow), len(late))
    return bool(late or slow or stored)


def _still(tx: Transaction, iteration: IterationRow) -> bool:
    """Whether the round is in the status in which it was read; keeps it there until the transaction ends."""
    lock_population(tx, iteration.key.population)
    present = get_iteration(tx, iteration.key)
    return present is not None and present.status is iteration.status


def _waiting(context: Context, iteration: IterationRow) -> list[str]:
    with context.database.read() as tx:
        rows = list_assignments(tx, iteration.key, statuses=[AssignmentStatus.LOCAL_COMPLETED], limit=_ROUND_LIMIT)
    return [row.key.session_id for row in rows]


def _form_batches(context: Context, tx: Transaction, iteration: IterationRow, capped: bool) -> bool:
    ready = [row.key.session_id for row in unbatched(tx, iteration.key, limit=_ROUND_LIMIT)]
    if not ready:
        return False
    sums = sum_batches(tx, iteration.key)
    committed = sums.full + sums.expected
    missing = max(0, iteration.report_goal - committed)
    if capped:
        # The mean divides by the goal whatever arrives, so more than the goal would bias it; the rest stands by for
        # contributions that turn out bad.
        ready = ready[:missing]
    size = context.settings.collector_batch_size
    groups = [ready[start : start + size] for start in range(0, len(ready), size)]
    created = False
    for group in groups:
        if len(group) == size or len(ready) >= missing:
            created |= create_batch(tx, iteration.key, group, now()) is not None
    return created


def _fixed_denominator(context: Context, iteration: IterationRow) -> bool:
    process = context.plans.server_plan(iteration.key.task).process
    training = process.kind == learning_pb2.LearningProcess.TRAINING
    return training and aggregator_of(process).fixed_denominator


def _job(context: Context, iteration: IterationRow, batch: BatchRow) -> AggregateJob:
    settings, task = context.settings, iteration.key.task
    with context.database.read() as tx:
        members: Sequence[str] = [
            row.key.session_id
            for row in assignments_of_batch(tx, batch.key)
            if row.status is AssignmentStatus.UPLOAD_COMPLETED
        ]
        keys = private_keys(tx, now())
    return AggregateJob(
        blob_url=settings.blobs,
        plan_path=server_plan_path(task),
        client_checkpoint_path=client_checkpoint_path(task, iteration.base_on_result_id),
        uploads=tuple((one, update_path(task, iteration.result_id, one)) for one in members),
        output_path=aggregate_path(task, iteration.result_id, batch.key.batch_id),
        max_upload_bytes=settings.max_upload_bytes,
        max_checkpoint_bytes=settings.max_checkpoint_bytes,
        allow_plaintext=settings.allow_plaintext_uploads,
        private_keys=keys,
    )


def _record(context: Context, iteration: IterationRow, batch: BatchRow, outcome: Outcome) -> bool:
    if outcome.error is not None:
        with context.database.write() as tx:
            if not _still(tx, iteration):
                return False
            failed = fail_batch(tx, batch.key, outcome.error.reason, now())
            if failed:
                move_iteration(tx, iteration.key, iteration.status, IterationStatus.AGGREGATING_FAILED, now())
        if failed:
            fail(context, iteration.key.task, outcome.error)
        return True
    result: AggregateResult = outcome.result
    rejected = {one.session_id: one.reason for one in result.rejected}
    with context.database.write() as tx:
        if not _still(tx, iteration):
            return False
        finished = finish_batch(tx, batch.key, result.accepted, rejected, now())
    for one in result.rejected if finished else ():
        _LOG.warning("upload of session %.8s rejected: %s [%s]", one.session_id, one.detail, one.reason.value)
    return True
