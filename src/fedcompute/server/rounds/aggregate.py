"""The aggregation job: one batch of uploads in, one partial sum out (spec/server.md 6.3)."""

import contextlib
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from fedcompute.crypto.aggregates import seal_aggregate
from fedcompute.crypto.envelope import Body, open_update
from fedcompute.crypto.keys import PublicKey
from fedcompute.errors import FedComputeError, OperationFailed, Reason, UploadRejected
from fedcompute.learning.contribution import (
    add,
    clip_norm_leaf,
    clip_norm_told,
    empty_sum,
    judge,
    rules_of,
)
from fedcompute.protos import learning_pb2
from fedcompute.server.graph_plans import plan as graph_plan
from fedcompute.server.graph_plans.form import GraphPlan
from fedcompute.server.rounds.pipeline import pipelined
from fedcompute.server.rounds.plans import load_graphs, read_server_plan, read_stored
from fedcompute.server.security.key_service import KeyService, held_keys, key_client
from fedcompute.storage.blobs import BlobMissing, BlobStore, BlobTooLarge, Scratch, open_blob_store
from fedcompute.storage.paths import AGGREGATED, GRADIENT, MODEL
from fedcompute.tensors.checkpoint import CheckpointLimits, read_checkpoint
from fedcompute.tensors.partial_sum import encode
from fedcompute.tensors.reader import CheckpointReader
from fedcompute.tensors.tree import Tensors, spec_from_proto
from fedcompute.tracing import span

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class AggregateJob:
    """What a worker needs; sizes in bytes.

    The paths say where the plan lies, what devices were told, the uploads (session id, path) in order, and the result.
    `private_keys`: key id -> raw private key.
    """

    blob_url: str
    plan_path: str
    client_checkpoint_path: str
    uploads: tuple[tuple[str, str], ...]
    output_path: str
    max_upload_bytes: int
    max_checkpoint_bytes: int
    allow_plaintext: bool
    private_keys: Mapping[str, bytes] = field(repr=False)
    key_service: KeyService | None = None  # where other private keys are
    seal_sum: bool = False
    seal_to: PublicKey | None = None  # without one the key service chooses
    unpackers: int = 1  # threads that may unpack uploads at a time


@dataclass(frozen=True)
class Rejected:
    """A session whose upload does not count, and why."""

    session_id: str
    reason: Reason
    detail: str


@dataclass(frozen=True)
class AggregateResult:
    """How many uploads the stored sum holds, and those that it does not."""

    accepted: int
    rejected: tuple[Rejected, ...]


def aggregate(job: AggregateJob) -> AggregateResult:
    """Adds the batch's uploads, in order and one at a time, and stores their partial sum.

    Memory is that of the sum and of a few uploads, however many there are. A bad upload is left out, alone. The same
    uploads give the same sum, so running twice changes nothing. Raises ArtifactInvalid for a plan that cannot be read
    and OperationFailed for storage or a key service that fails.
    """
    with span("aggregate", {"uploads": len(job.uploads), "worker": os.getpid()}) as traced:
        result = _add_up(job)
        traced["accepted"] = result.accepted
        for reason, count in Counter(one.reason for one in result.rejected).items():
            traced[f"rejected.{reason.value}"] = count
        return result


def _add_up(job: AggregateJob) -> AggregateResult:
    blobs = open_blob_store(job.blob_url)
    stored_plan = blobs.get(MODEL, job.plan_path, limit=job.max_checkpoint_bytes)
    plan = read_server_plan(stored_plan, job.max_checkpoint_bytes)
    if plan.has_graphs:
        return _add_up_with_graphs(blobs, load_graphs(stored_plan, job.max_checkpoint_bytes), job)
    limit = min(job.max_checkpoint_bytes, update_bytes_limit(plan.process))
    clip_norm = _clip_norm(blobs, plan.process, job)
    total, rules = empty_sum(plan.process, plan.digest, clip_norm), rules_of(plan.process, clip_norm)
    rejected: list[Rejected] = []
    # A key service that is away is noticed before the work, not after it.
    key = sum_key(job)
    for session_id, update in _unpacked(blobs, job, limit):
        try:
            if isinstance(update, UploadRejected):
                raise update
            with _judging():
                total = add(total, judge(rules, update))
        except UploadRejected as error:
            rejected.append(Rejected(session_id, error.reason, error.detail))
        # The next one is read into the same memory, which the processor's cache holds.
        del update
    blobs.put(AGGREGATED, job.output_path, seal_aggregate(encode(total), key))
    return AggregateResult(total.num_inputs, tuple(rejected))


def sum_key(job: AggregateJob) -> PublicKey | None:
    """What to encrypt the job's sum to; None: it is stored in plain. Raises OperationFailed(KEY_SERVICE_FAILED)."""
    if not job.seal_sum or job.seal_to is not None or job.key_service is None:
        return job.seal_to if job.seal_sum else None
    return key_client(job.key_service).public_key()


def _add_up_with_graphs(blobs: BlobStore, plan: GraphPlan, job: AggregateJob) -> AggregateResult:
    limit = min(job.max_checkpoint_bytes, graph_plan.update_bytes_limit(plan))
    paths, key = dict(job.uploads), sum_key(job)

    def fetch(session_id: str) -> Tensors:
        with _fetching(job.max_upload_bytes):
            stored = blobs.get(GRADIENT, paths[session_id], limit=job.max_upload_bytes)
        with _judging():
            return read_checkpoint(_open(stored, job, limit), CheckpointLimits(max_bytes=limit))

    total = graph_plan.add_up(plan, list(paths), fetch)
    blobs.put(AGGREGATED, job.output_path, seal_aggregate(total.partial, key))
    rejected = tuple(Rejected(one, error.reason, error.detail) for one, error in total.refused.items())
    return AggregateResult(total.num_inputs, rejected)


def update_bytes_limit(process: learning_pb2.LearningProcess) -> int:
    """An upper bound, in bytes, on the checkpoint file of an honest update: no upload may inflate beyond it."""
    specs = [spec_from_proto(leaf.spec) for leaf in process.updates]
    # Ten bytes is the longest varint; names, shapes and framing stay far below 4 KiB per leaf.
    return 65_536 + sum(4_096 + 10 * math.prod(spec.shape) for spec in specs)


@contextlib.contextmanager
def _fetching(limit: int) -> Iterator[None]:
    """Makes of an upload that is not there, or larger than `limit` bytes, its rejection."""
    try:
        yield
    except BlobMissing as error:
        raise UploadRejected(Reason.UPLOAD_MISSING, "the upload is no longer in the store") from error
    except BlobTooLarge as error:
        raise UploadRejected(Reason.UPLOAD_TOO_LARGE, f"the stored upload has more than {limit} bytes") from error


def _clip_norm(blobs: BlobStore, process: learning_pb2.LearningProcess, job: AggregateJob) -> float | None:
    if clip_norm_leaf(process) is None:
        return None
    limit = job.max_checkpoint_bytes
    told = read_stored(blobs.get(MODEL, job.client_checkpoint_path, limit=limit), limit)
    return clip_norm_told(process, read_checkpoint(told, CheckpointLimits(max_bytes=limit)))


def _unpacked(blobs: BlobStore, job: AggregateJob, limit: int) -> Iterator[tuple[str, Tensors | UploadRejected]]:
    """Each upload's session and leaves, or why it has none, in order. Leaves hold until the next upload is asked for.

    To unpack an encrypted one takes ten times as long as to check and add it.
    """
    reader = CheckpointReader(CheckpointLimits(max_bytes=limit))
    # Threads read ahead, each into memory of its own.
    scratch = Scratch() if job.unpackers <= 1 else None

    def unpack(upload: tuple[str, str]) -> tuple[str, Tensors | UploadRejected]:
        try:
            with _fetching(job.max_upload_bytes):
                stored = blobs.get_into(scratch or Scratch(), GRADIENT, upload[1], limit=job.max_upload_bytes)
            with _judging():
                return upload[0], reader.read(_open(stored, job, limit))
        except UploadRejected as error:
            return upload[0], error

    return pipelined(unpack, job.uploads, job.unpackers)


def _open(stored: Body, job: AggregateJob, limit: int) -> bytes | Body:
    keys = held_keys(job.private_keys, job.key_service)
    return open_update(stored, keys, allow_plaintext=job.allow_plaintext, limit=limit)


@contextlib.contextmanager
def _judging() -> Iterator[None]:
    """Makes of every fault of an upload its rejection."""
    try:
        yield
    except (UploadRejected, OperationFailed):
        # A key service that does not answer says nothing about the upload.
        raise
    except FedComputeError as error:
        raise UploadRejected(error.reason, error.detail) from error
    except Exception as error:
        # Whatever a device sends must cost its own contribution only, also where a reader has a fault.
        _LOG.exception("an upload could not be read")
        raise UploadRejected(Reason.INTERNAL, f"reading the upload failed: {type(error).__name__}") from error
