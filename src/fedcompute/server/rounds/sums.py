"""Partial sums of a round, read and merged: one by one, and ahead of the update in groups that any worker can merge.

A round's sum is that of its groups' sums, in order, and a group's sum that of its batches', in order, whoever merges
them and when: lattice sums are the same in any order, sums of floats the same to the last bit.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import groupby

from fedcompute.crypto.aggregates import open_aggregate, seal_aggregate
from fedcompute.crypto.keys import PublicKey
from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.server.rounds.pipeline import pipelined
from fedcompute.server.security.key_service import KeyService, held_keys, key_client
from fedcompute.storage.blobs import BlobMissing, BlobStore, open_blob_store
from fedcompute.storage.paths import AGGREGATED
from fedcompute.tensors.partial_sum import PartialSum, decode, encode, merge
from fedcompute.tracing import span

_READERS = 2  # threads that read partial sums


@dataclass(frozen=True)
class SumGroup:
    """Batches that are merged among themselves: their sums in order, how many contributions these hold.

    `merged`: where the group's sum may lie; None while batches are still to come or to be added up.
    """

    sums: tuple[str, ...]
    contributions: int
    merged: str | None = None


@dataclass(frozen=True)
class MergeJob:
    """What a worker needs to merge a group; sizes in bytes, keys as in `AggregateJob`."""

    blob_url: str
    group: SumGroup
    max_checkpoint_bytes: int
    private_keys: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    key_service: KeyService | None = None
    seal_sum: bool = False
    seal_to: PublicKey | None = None


@dataclass
class Merged:
    """What an engine knows of a round's groups: where sums lie, and when (monotonic time) to look again."""

    paths: set[str] = field(default_factory=set)
    due: float = 0.0


def merge_group(job: MergeJob) -> int:
    """Stores the group's sum where it belongs, once; returns how many contributions it holds.

    Raises ArtifactInvalid for sums that are gone, damaged or not those that were recorded, and OperationFailed for
    storage or a key service that fails.
    """
    group = job.group
    assert group.merged is not None, "only whole groups are merged"
    with span("merge", {"sums": len(group.sums), "worker": os.getpid()}):
        blobs = open_blob_store(job.blob_url)
        if not blobs.exists(AGGREGATED, group.merged):
            key = job.seal_to
            if job.seal_sum and key is None and job.key_service is not None:
                key = key_client(job.key_service).public_key()
            keys = held_keys(job.private_keys, job.key_service)
            threads = _READERS if job.key_service is None else 1
            total = reduce(merge, _read_all(blobs, group.sums, keys, job.max_checkpoint_bytes, threads))
            check_count(total, group.contributions)
            blobs.put(AGGREGATED, group.merged, seal_aggregate(encode(total), key if job.seal_sum else None))
        return group.contributions


def merge_all(
    blobs: BlobStore,
    groups: Sequence[SumGroup],
    private_keys: Mapping[str, bytes],
    key_service: KeyService | None,
    limit: int,
) -> PartialSum:
    """A round's sum, from the groups' sums where they lie already. `limit`: bytes of a checkpoint.

    Raises as `merge_group`; ArtifactInvalid(PARTIAL_SUM_MISMATCH) unless all are of one plan.
    """
    folders = {group.merged.rsplit("/", 2)[0] for group in groups if group.merged is not None}
    ready = {path for folder in folders for path in blobs.list(AGGREGATED, folder)}
    parts = [
        (number, path)
        for number, group in enumerate(groups)
        for path in ((group.merged,) if group.merged is not None and group.merged in ready else group.sums)
    ]
    keys = held_keys(private_keys, key_service)
    # Several at once would wait for the key service one after the other.
    threads = _READERS if key_service is None else 1
    found = _read_all(blobs, [path for _, path in parts], keys, limit, threads)
    numbered = zip((number for number, _ in parts), found, strict=True)
    sums = (reduce(merge, (one for _, one in same)) for _, same in groupby(numbered, key=lambda pair: pair[0]))
    return reduce(merge, sums)


def check_count(total: PartialSum, contributions: int) -> None:
    """Raises ArtifactInvalid(PARTIAL_SUM_MISMATCH) unless a sum holds as many contributions as were recorded."""
    if total.num_inputs != contributions:
        # Made anew by a worker that came too late and found other uploads than were recorded.
        raise ArtifactInvalid(
            Reason.PARTIAL_SUM_MISMATCH, f"the partial sums hold {total.num_inputs} updates, not {contributions}"
        )


def read_stored_sum(blobs: BlobStore, path: str, keys: Mapping[str, bytes], limit: int) -> bytes:
    """A stored sum, opened. `limit`: bytes of a checkpoint. Raises ArtifactInvalid if it is gone or damaged."""
    # int64 or float64 leaves: at most twice the size of the float32 update; encryption adds a third.
    try:
        stored = blobs.get(AGGREGATED, path, limit=4 * limit)
    except BlobMissing as error:
        raise ArtifactInvalid(Reason.PARTIAL_SUM_MALFORMED, f"a partial sum is gone: {error}") from error
    return open_aggregate(stored, keys, limit=4 * limit)


def _read_all(
    blobs: BlobStore, paths: Sequence[str], keys: Mapping[str, bytes], limit: int, threads: int
) -> Iterator[PartialSum]:
    return pipelined(lambda path: decode(read_stored_sum(blobs, path, keys, limit)), paths, threads)
