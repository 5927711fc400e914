"""Collecting: uploads become batches, batches become sums, enough of them close the round (spec/server.md 6.1, 6.4)."""

import logging
import os
from collections.abc import Sequence
from datetime import timedelta
from functools import partial

from fedcompute.crypto.keys import PublicKey
from fedcompute.server.context import Context, now
from fedcompute.server.rounds.aggregate import AggregateJob, AggregateResult, aggregate
from fedcompute.server.rounds.attempts import batch_failed
from fedcompute.server.rounds.jobs import Outcome
from fedcompute.server.rounds.merge import merge_ahead
from fedcompute.server.security.key_service import key_service_of
from fedcompute.server.settings import RAY
from fedcompute.storage.assignments import (
    assignments_of_batch,
    mark_uploaded,
    time_out_computing,
    time_out_uploading,
    unbatched,
    uploading,
    uploading_among,
)
from fedcompute.storage.batches import (
    BatchRow,
    create_batch,
    finish_batch,
    list_batches,
    publish_batch,
    sum_batches,
)
from fedcompute.storage.database import Transaction, lock_population
from fedcompute.storage.iterations import IterationRow, get_iteration, list_iterations, move_iteration
from fedcompute.storage.paths import (
    GRADIENT,
    aggregate_path,
    client_checkpoint_path,
    server_plan_path,
    update_path,
    updates_prefix,
)
from fedcompute.storage.schema import AssignmentStatus, BatchStatus, IterationStatus
from fedcompute.storage.secrets import private_keys, published_keys

_LOG = logging.getLogger(__name__)
_ROUND_LIMIT = 100_000
_FEW = 4  # uploads
_MANY = 50
_FOLDER_LIMIT = 1_000_000


def collect(context: Context, iteration: IterationRow) -> bool:
    """One look at a COLLECTING iteration; True if anything changed."""
    changed = run_batches(context, iteration)
    folder, seen = updates_prefix(iteration.key.task, iteration.result_id), context.uploads.all()
    capped = _fixed_denominator(context, iteration)
    with context.database.read() as tx:
        # Takes as long as there are such uploads, not as there are devices in the round.
        arrived = uploading_among(tx, iteration.key, seen) if seen else []
        closes = sum_batches(tx, iteration.key).expected >= iteration.report_goal
        if not (arrived or closes):
            groups, lacking = _groups(context, tx, iteration, capped)
            if not groups:
                return context.uploads.wait_for(folder, lacking, seen) or changed
    with context.database.write() as tx:
        if not _still(tx, iteration):
            return changed
        moved = mark_uploaded(tx, iteration.key, arrived, now()) if arrived else []
        changed |= bool(moved)
        groups, lacking = _groups(context, tx, iteration, capped)
        for group in groups:
            changed |= create_batch(tx, iteration.key, group, now()) is not None
        for batch in list_batches(tx, iteration.key, statuses=[BatchStatus.FULL]):
            changed |= publish_batch(tx, batch.key, now())
        if sum_batches(tx, iteration.key).expected >= iteration.report_goal:
            changed |= move_iteration(tx, iteration.key, IterationStatus.COLLECTING, IterationStatus.AGGREGATING, now())
    context.uploads.discard(arrived)
    return context.uploads.wait_for(folder, lacking, seen) or changed


def finish_aggregating(context: Context, iteration: IterationRow) -> bool:
    """One look at an AGGREGATING iteration: when every batch has ended it goes on, or back to collecting."""
    changed = run_batches(context, iteration)
    unfinished = [BatchStatus.FULL, BatchStatus.PUBLISH_COMPLETED]
    with context.database.read() as tx:
        if list_batches(tx, iteration.key, statuses=unfinished, limit=1):
            return changed
    with context.database.write() as tx:
        if not _still(tx, iteration):
            return changed
        if list_batches(tx, iteration.key, statuses=unfinished, limit=1):
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
    if published:
        merge_ahead(context, iteration)
    return changed


def time_out(context: Context) -> bool:
    """Ends assignments that took too long, in rounds of every status; True if there were any.

    Looks into the store first: an upload that lies there is collected, however late its report was, and also when
    nobody saw it arrive (a restart, another process).
    """
    settings = context.settings
    # Before the question who waits: an upload that arrives meanwhile must not count as forgotten.
    seen = context.uploads.all()
    with context.database.read() as tx:
        # An aggregating round may collect again.
        unclosed = list_iterations(
            tx, statuses=[IterationStatus.COLLECTING, IterationStatus.AGGREGATING], limit=_ROUND_LIMIT
        )
        sessions = uploading(tx)
    for iteration in unclosed:
        for session_id in _arrived(context, iteration, sessions.get(iteration.key, set()) - seen):
            context.uploads.add(session_id, updates_prefix(iteration.key.task, iteration.result_id))
    waiting = set().union(*(sessions.get(one.key, set()) for one in unclosed))
    context.uploads.discard(seen - waiting)
    stored = context.uploads.among(sorted(waiting))
    with context.database.write() as tx:
        late = time_out_uploading(tx, now(), timedelta(seconds=settings.upload_timeout), keep=stored)
        slow = time_out_computing(tx, now(), timedelta(seconds=settings.local_compute_timeout))
    if late or slow:
        _LOG.info("%d assignments timed out computing, %d uploading", len(slow), len(late))
    return bool(late or slow or stored)


def _arrived(context: Context, iteration: IterationRow, session_ids: set[str]) -> set[str]:
    """Those of the sessions whose upload lies in the store: by one look each, or at the folder where they are many."""
    task, result_id = iteration.key.task, iteration.result_id
    if len(session_ids) > _MANY:
        stored = context.blobs.list(GRADIENT, updates_prefix(task, result_id), limit=_FOLDER_LIMIT)
        return session_ids & {path.rsplit("/", 2)[1] for path in stored}
    return {one for one in session_ids if context.blobs.exists(GRADIENT, update_path(task, result_id, one))}


def _still(tx: Transaction, iteration: IterationRow) -> bool:
    """Whether the round is in the status in which it was read; keeps it there until the transaction ends."""
    lock_population(tx, iteration.key.population)
    present = get_iteration(tx, iteration.key)
    return present is not None and present.status is iteration.status


def _groups(context: Context, tx: Transaction, iteration: IterationRow, capped: bool) -> tuple[list[list[str]], int]:
    """The batches that can be made now of collected uploads, and how many more uploads the next one takes."""
    ready = [row.key.session_id for row in unbatched(tx, iteration.key, limit=_ROUND_LIMIT)]
    sums = sum_batches(tx, iteration.key)
    committed = sums.full + sums.expected
    missing = max(0, iteration.report_goal - committed)
    if capped:
        # The mean divides by the goal whatever arrives, so more than the goal would bias it; the rest stands by for
        # contributions that turn out bad.
        ready = ready[:missing]
    groups: list[list[str]] = []
    while True:
        size = batch_size(context.settings.collector_batch_size, missing)
        # Where nothing is missing any more, one that comes late still counts.
        least = size if missing else 1
        if len(ready) < least:
            return groups, least - len(ready)
        group, ready = ready[:size], ready[size:]
        missing = max(0, missing - len(group))
        groups.append(group)


def batch_size(most: int, missing: int) -> int:
    """How many uploads the next batch holds where `missing` are not in one yet.

    Towards the end of a round batches get smaller: what devices wait for after the last upload is the last batch. None
    gets smaller than it must, since the sum of a few devices tells more about each.
    """
    if missing <= 0:
        return most
    half = max(-(-missing // 2), _FEW)
    return min(most, half if missing - half >= _FEW else missing)


def _fixed_denominator(context: Context, iteration: IterationRow) -> bool:
    return context.plans.server_plan(iteration.key.task).fixed_denominator


def _job(context: Context, iteration: IterationRow, batch: BatchRow) -> AggregateJob:
    settings, task = context.settings, iteration.key.task
    # There every CPU has a worker.
    on_ray = settings.executor == RAY
    with context.database.read() as tx:
        members: Sequence[str] = [
            row.key.session_id
            for row in assignments_of_batch(tx, batch.key)
            if row.status is AssignmentStatus.UPLOAD_COMPLETED
        ]
        keys = private_keys(tx, context.sealer)
        service = key_service_of(settings)
        own = published_keys(tx, context.sealer, now()) if settings.seals_aggregates and service is None else []
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
        key_service=service,
        seal_sum=settings.seals_aggregates,
        seal_to=PublicKey(own[0].id, own[0].public_key) if own else None,
        unpackers=1 if service is not None or on_ray else max(1, (os.cpu_count() or 1) // settings.worker_count),
    )


def _record(context: Context, iteration: IterationRow, batch: BatchRow, outcome: Outcome) -> bool:
    if outcome.error is not None:
        return batch_failed(context, iteration, batch, outcome.error)
    result: AggregateResult = outcome.result
    rejected = {one.session_id: one.reason for one in result.rejected}
    with context.database.write() as tx:
        if not _still(tx, iteration):
            return False
        finished = finish_batch(tx, batch.key, result.accepted, rejected, now())
    if finished:
        context.measures.contributions(batch.key.iteration.population, "accepted", result.accepted)
    for one in result.rejected if finished else ():
        context.measures.contributions(batch.key.iteration.population, one.reason.value)
        _LOG.warning("upload of session %.8s rejected: %s [%s]", one.session_id, one.detail, one.reason.value)
    return True
