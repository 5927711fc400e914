"""Merging ahead: groups of batches become one sum each while others are still added up, so that updates wait less."""

import math
import time
from collections.abc import Sequence
from functools import partial

from fedcompute.crypto.keys import PublicKey
from fedcompute.server.context import Context, now
from fedcompute.server.rounds.jobs import MergeKey
from fedcompute.server.rounds.sums import Merged, MergeJob, SumGroup, merge_group
from fedcompute.server.security.key_service import key_service_of
from fedcompute.storage.batches import BatchRow, list_batches
from fedcompute.storage.iterations import IterationRow
from fedcompute.storage.keys import TaskKey
from fedcompute.storage.paths import aggregate_path, merged_path
from fedcompute.storage.schema import BatchStatus
from fedcompute.storage.secrets import private_keys, published_keys

# Of 23 batches, 1,000 uploads, an update reads 8 sums; of a thousand batches 70.
GROUP = 16
_LOOK_SECONDS = 1.0
_OVER = (BatchStatus.UPLOAD_COMPLETED, BatchStatus.FAILED)


def groups_of(task: TaskKey, result_id: int, batches: Sequence[BatchRow]) -> list[SumGroup]:
    """All of a round's batches, in their order, as groups of `GROUP`; those that failed have no sum."""
    groups = []
    for start in range(0, len(batches), GROUP):
        members = batches[start : start + GROUP]
        counted = [one for one in members if one.status is BatchStatus.UPLOAD_COMPLETED]
        if not counted:
            continue
        ids = [one.key.batch_id for one in counted]
        whole = len(members) == GROUP and all(one.status in _OVER for one in members) and len(counted) > 1
        groups.append(
            SumGroup(
                tuple(aggregate_path(task, result_id, one) for one in ids),
                sum(one.accepted_size or 0 for one in counted),
                merged_path(task, result_id, ids) if whole else None,
            )
        )
    return groups


def merge_ahead(context: Context, iteration: IterationRow) -> None:
    """Starts the jobs that merge whole groups of a round, at most once a second, and notes those that ended.

    Only a convenience: an update merges what it finds unmerged.
    """
    known = context.merged.setdefault(iteration.key, Merged())
    if time.monotonic() < known.due:
        return
    # What server graphs make of a sum is theirs to merge.
    graphs = context.plans.server_plan(iteration.key.task).has_graphs
    known.due = math.inf if graphs else time.monotonic() + _LOOK_SECONDS
    if graphs:
        return
    with context.database.read() as tx:
        groups = groups_of(iteration.key.task, iteration.result_id, list_batches(tx, iteration.key))
    for group in groups:
        if group.merged is None or group.merged in known.paths:
            continue
        key = MergeKey(iteration.key, group.merged)
        if context.jobs.poll(key, merge_group, partial(_job, context, group)) is not None:
            # One that failed would fail again; the update will tell why.
            known.paths.add(group.merged)
            context.jobs.forget(key)


def _job(context: Context, group: SumGroup) -> MergeJob:
    settings = context.settings
    service = key_service_of(settings)
    with context.database.read() as tx:
        keys = private_keys(tx, context.sealer)
        own = published_keys(tx, context.sealer, now()) if settings.seals_aggregates and service is None else []
    return MergeJob(
        blob_url=settings.blobs,
        group=group,
        max_checkpoint_bytes=settings.max_checkpoint_bytes,
        private_keys=keys,
        key_service=service,
        seal_sum=settings.seals_aggregates,
        seal_to=PublicKey(own[0].id, own[0].public_key) if own else None,
    )
