"""The update job: a round's partial sums in, the released model and metrics out (spec/server.md 6.5)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce

from fedcompute.crypto.envelope import gzip_bytes
from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.learning.contribution import clip_norm_told
from fedcompute.learning.process import (
    client_checkpoint,
    metrics_json,
    metrics_of_checkpoint,
    read_state,
    round_update,
)
from fedcompute.privacy.ledger import Event
from fedcompute.privacy.noise import NoiseSource, SystemNoise
from fedcompute.protos import learning_pb2
from fedcompute.server.rounds.plans import read_server_plan, read_stored
from fedcompute.storage.blobs import BlobMissing, BlobStore, open_blob_store
from fedcompute.storage.paths import AGGREGATED, MODEL
from fedcompute.tensors.checkpoint import CheckpointLimits, read_checkpoint, write_checkpoint
from fedcompute.tensors.partial_sum import PartialSum, decode, merge
from fedcompute.tensors.tree import Tensors


@dataclass(frozen=True)
class UpdateJob:
    """Where the plan, the base server checkpoint, the partial sums in merging order and the results lie."""

    blob_url: str
    plan_path: str
    base_path: str
    sum_paths: tuple[str, ...]
    checkpoint_path: str
    client_checkpoint_path: str
    metrics_path: str
    max_checkpoint_bytes: int


@dataclass(frozen=True)
class UpdateResult:
    """What the round released: metrics (NaN where undefined), the DP events if any, and how many devices are in it."""

    metrics: Mapping[str, float]
    events: tuple[Event, ...]
    clip_norm: float | None
    contributions: int


def update(job: UpdateJob, noise: NoiseSource | None = None) -> UpdateResult:
    """Merges the sums, applies them to the model and stores server checkpoint, metrics and client checkpoint.

    `noise`: for an executor that a test makes; servers have no way to name one and always get `SystemNoise`.
    An evaluation stores its metrics only. Raises ArtifactInvalid for artifacts that do not fit each other and
    OperationFailed for storage that fails.

    Formal guarantees: at most one noised result of a round is ever stored. The server checkpoint, which holds state
    and metrics, is created only if absent; when another run of this job was first, its checkpoint is kept, the other
    results are derived from it, and the noise drawn here is dropped unseen.
    """
    blobs = open_blob_store(job.blob_url)
    limit = job.max_checkpoint_bytes
    plan = read_server_plan(blobs.get(MODEL, job.plan_path, limit=limit), limit)
    process = plan.process
    base = read_state(process, _read_leaves(blobs, job.base_path, limit))
    total = reduce(merge, (_read_sum(blobs, path, plan.digest, limit) for path in job.sum_paths))
    result = round_update(process, base, total, noise or SystemNoise())
    metrics, state = result.metrics, result.state
    if process.kind == learning_pb2.LearningProcess.TRAINING:
        data = gzip_bytes(write_checkpoint(result.checkpoint()))
        if not blobs.put(MODEL, job.checkpoint_path, data, if_absent=True):
            released = _read_leaves(blobs, job.checkpoint_path, limit)
            metrics, state = metrics_of_checkpoint(process, released), read_state(process, released)
        blobs.put(MODEL, job.client_checkpoint_path, client_checkpoint_bytes(process, state))
    blobs.put(MODEL, job.metrics_path, metrics_json(metrics))
    clip_norm = clip_norm_told(process, client_checkpoint(process, base)) if result.events else None
    return UpdateResult(dict(metrics), result.events, clip_norm, total.num_inputs)


def client_checkpoint_bytes(process: learning_pb2.LearningProcess, state: Tensors) -> bytes:
    """The client checkpoint of a server state as stored: gzip, which the resource announces to devices."""
    return gzip_bytes(write_checkpoint(client_checkpoint(process, state)))


def read_checkpoint_object(stored: bytes, limit: int) -> Tensors:
    """Reads a stored checkpoint, gzip or not, of at most `limit` bytes; raises ArtifactInvalid."""
    return read_checkpoint(read_stored(stored, limit), CheckpointLimits(max_bytes=limit))


def _read_leaves(blobs: BlobStore, path: str, limit: int) -> Tensors:
    return read_checkpoint_object(blobs.get(MODEL, path, limit=limit), limit)


def _read_sum(blobs: BlobStore, path: str, digest: bytes, limit: int) -> PartialSum:
    try:
        # int64 or float64 leaves: at most twice the size of the float32 update.
        stored = read_stored(blobs.get(AGGREGATED, path, limit=4 * limit), 4 * limit)
    except (BlobMissing, ArtifactInvalid) as error:
        raise ArtifactInvalid(Reason.PARTIAL_SUM_MALFORMED, f"a partial sum is gone or damaged: {error}") from error
    total = decode(stored)
    if total.plan_digest != digest:
        raise ArtifactInvalid(Reason.PARTIAL_SUM_MISMATCH, "the partial sum belongs to another plan")
    return total
