"""The update job: a round's partial sums in, the released model and metrics out (spec/server.md 6.5)."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from fedcompute.crypto.envelope import gzip_bytes
from fedcompute.errors import ArtifactInvalid, OperationFailed, Reason
from fedcompute.learning.contribution import clip_norm_told, empty_sum
from fedcompute.learning.noise_state import SEALED, begin_noise, open_noise, seal_noise
from fedcompute.learning.process import (
    RoundResult,
    client_checkpoint,
    metrics_json,
    metrics_of_checkpoint,
    read_metrics,
    read_state,
    round_update,
    staleness_weight,
)
from fedcompute.privacy.chain import Release
from fedcompute.privacy.noise import Draw, DrawnNoise, NoiseSource, RecordedNoise, SilentNoise, SystemNoise
from fedcompute.protos import learning_pb2
from fedcompute.server.graph_plans.form import GraphPlan
from fedcompute.server.rounds.plans import load_graphs, read_server_plan, read_stored
from fedcompute.server.rounds.spending import (
    Overspent,
    Prospect,
    Round,
    Spending,
    blank_round,
    entries_of,
    events_of,
    has_noise,
    prospect,
)
from fedcompute.server.rounds.sums import SumGroup, check_count, merge_all, read_stored_sum
from fedcompute.server.security.key_service import KeyService, held_keys
from fedcompute.storage.blobs import BlobStore, open_blob_store
from fedcompute.storage.keys import IterationKey
from fedcompute.storage.paths import MODEL
from fedcompute.storage.releases import Standing
from fedcompute.tensors.checkpoint import CheckpointLimits, read_checkpoint, write_checkpoint
from fedcompute.tensors.partial_sum import PartialSum
from fedcompute.tensors.tree import Tensors, spec_from_proto
from fedcompute.tracing import span

# Of a model whose noise is drawn ahead: 32 MiB for a release, some times that where a tree grows.
_MOST_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class UpdateJob:
    """Where the plan, the base server checkpoint, the partial sums in merging order and the results lie."""

    blob_url: str
    plan_path: str
    base_path: str
    sums: tuple[SumGroup, ...]
    checkpoint_path: str
    client_checkpoint_path: str
    metrics_path: str
    max_checkpoint_bytes: int
    key: IterationKey
    report_goal: int
    is_last: bool
    spending: Spending
    noise_key: bytes = field(repr=False)
    staleness: int = 0  # releases between the model that devices started from and the one that the round changes
    prospect: Prospect | None = None  # what is known already of what the round costs
    draws: tuple[Draw, ...] = field(default=(), repr=False)  # its noise, as far as it is drawn already
    private_keys: Mapping[str, bytes] = field(default_factory=dict, repr=False)  # of sums that are encrypted
    key_service: KeyService | None = None  # where other private keys are

    @property
    def contributions(self) -> int:
        """How many the sums hold, as their batches counted them."""
        return sum(group.contributions for group in self.sums)

    @property
    def sum_paths(self) -> tuple[str, ...]:
        """The sums of the batches, in order."""
        return tuple(path for group in self.sums for path in group.sums)


@dataclass(frozen=True)
class UpdateResult:
    """What the round may release: metrics (NaN where undefined), its ledger entries, how many devices are in it.

    `standing`: what the entries rest on; `no_more`: why the task's next round could not be released, if so.
    """

    metrics: Mapping[str, float]
    releases: tuple[Release, ...]
    standing: Standing
    contributions: int
    no_more: Overspent | None = None


def update(job: UpdateJob, noise: NoiseSource | None = None) -> UpdateResult | Overspent:
    """Merges the sums, applies them to the model and stores server checkpoint, metrics and client checkpoint.

    A round that its population's budget does not allow is not noised at all, and nothing is stored.

    `noise`: for an executor that a test makes; servers have no way to name one and always get `SystemNoise`, part of
    which may have been drawn while devices trained.
    An evaluation stores its metrics only. Raises ArtifactInvalid for artifacts that do not fit each other and
    OperationFailed for storage that fails.

    Formal guarantees: at most one noised result of a round is ever stored. The server checkpoint, which holds state
    and metrics, and an evaluation's metrics are created only if absent; when another run of this job was first, what
    it stored is kept, the other results are derived from it, and the noise drawn here is dropped unseen. Hence draws
    made ahead serve one release too, however often the job runs. Once a result is stored the sums are not looked at
    again, so that it holds the `contributions` that its entries name.
    """
    with span("update", {"sums": len(job.sum_paths), "worker": os.getpid()}) as traced:
        result = _apply(job, noise)
        traced["outcome"] = "refused" if isinstance(result, Overspent) else "stored"
        return result


def _apply(job: UpdateJob, noise: NoiseSource | None) -> UpdateResult | Overspent:
    blobs = open_blob_store(job.blob_url)
    limit = job.max_checkpoint_bytes
    stored_plan = blobs.get(MODEL, job.plan_path, limit=limit)
    plan = read_server_plan(stored_plan, limit)
    if plan.has_graphs:
        return _update_with_graphs(blobs, load_graphs(stored_plan, limit), plan.process, job)
    process = plan.process
    this_round = Round(job.key, job.report_goal, job.contributions)
    ahead = _prospect(blobs, process, job, this_round)
    if ahead.refused is not None:
        return ahead.refused
    kept = blobs.exists(MODEL, _first_result(process, job))
    if kept:
        base = _base(blobs, process, job, SilentNoise())
        # With the events of any other round of the process.
        result = blank_round(process, base) if has_noise(process) else RoundResult(base, {}, ())
    else:
        noise = noise or DrawnNoise(job.draws, SystemNoise())
        total = _total(blobs, plan.digest, job)
        base = _base(blobs, process, job, noise)
        result = round_update(process, base, total, noise, weight=staleness_weight(job.staleness))
    if events_of(process, result) != ahead.events:
        raise OperationFailed(Reason.INTERNAL, f"round {job.key} is not the one whose cost was worked out")
    kept = kept or not blobs.put(MODEL, _first_result(process, job), _first_bytes(process, job, result), if_absent=True)
    metrics, state = result.metrics, result.state
    if process.kind == learning_pb2.LearningProcess.TRAINING:
        if kept:
            released = _read_leaves(blobs, job, job.checkpoint_path)
            metrics, state = metrics_of_checkpoint(process, released), read_state(process, released)
        blobs.put(MODEL, job.client_checkpoint_path, client_checkpoint_bytes(process, state))
        blobs.put(MODEL, job.metrics_path, metrics_json(metrics))
    elif kept:
        metrics = read_metrics(blobs.get(MODEL, job.metrics_path, limit=limit))
    clip_norm = clip_norm_told(process, client_checkpoint(process, base)) if result.events else None
    return UpdateResult(
        metrics=dict(metrics),
        releases=entries_of(process, this_round, replace(result, metrics=metrics), clip_norm, ahead.epsilon),
        standing=job.spending.standing,
        contributions=job.contributions,
        no_more=ahead.no_more,
    )


def _update_with_graphs(
    blobs: BlobStore, graphs: GraphPlan, process: learning_pb2.LearningProcess, job: UpdateJob
) -> UpdateResult | Overspent:
    """`update` for a plan with server graphs: what they add in noise is theirs, and the ledger counts none of it."""
    limit = job.max_checkpoint_bytes
    this_round = Round(job.key, job.report_goal, job.contributions)
    ahead = _prospect(blobs, process, job, this_round)
    if ahead.refused is not None:
        return ahead.refused
    metrics: Mapping[str, float] | None = None
    if not blobs.exists(MODEL, _first_result(process, job)):
        base = read_stored(blobs.get(MODEL, job.base_path, limit=limit), limit)
        keys = held_keys(job.private_keys, job.key_service)
        partials = (read_stored_sum(blobs, path, keys, limit) for path in job.sum_paths)
        applied = graphs.apply(base, partials, job.contributions)
        trains = process.kind == learning_pb2.LearningProcess.TRAINING
        first = gzip_bytes(applied.checkpoint) if trains else metrics_json(applied.metrics)
        if blobs.put(MODEL, _first_result(process, job), first, if_absent=True):
            metrics = applied.metrics
    if process.kind == learning_pb2.LearningProcess.TRAINING:
        released = read_stored(blobs.get(MODEL, job.checkpoint_path, limit=limit), limit)
        metrics = graphs.metrics_of(released) if metrics is None else metrics
        blobs.put(MODEL, job.client_checkpoint_path, gzip_bytes(graphs.client_checkpoint(released)))
        blobs.put(MODEL, job.metrics_path, metrics_json(metrics))
    elif metrics is None:
        metrics = read_metrics(blobs.get(MODEL, job.metrics_path, limit=limit))
    return UpdateResult(
        metrics=dict(metrics),
        releases=entries_of(process, this_round, RoundResult({}, metrics, ()), None, ahead.epsilon),
        standing=job.spending.standing,
        contributions=job.contributions,
        no_more=ahead.no_more,
    )


def foresee(job: UpdateJob) -> Prospect:
    """What a round will cost if it holds no more devices than its goal; looks at no contribution, stores nothing."""
    blobs = open_blob_store(job.blob_url)
    limit = job.max_checkpoint_bytes
    process = read_server_plan(blobs.get(MODEL, job.plan_path, limit=limit), limit).process
    return _prospect(blobs, process, job, Round(job.key, job.report_goal, job.report_goal))


@dataclass(frozen=True)
class Preparation:
    """What can be done for a round while its devices train."""

    prospect: Prospect
    draws: tuple[Draw, ...] = field(repr=False)


def prepare(job: UpdateJob) -> Preparation:
    """`foresee`, and the round's noise unless it is too much to keep, from a round of nobody that is thrown away.

    Formal guarantees: nothing that depends on a device is looked at, and nothing is stored; the draws are
    `SystemNoise` and stay in memory until `update` uses them.
    """
    with span("look_ahead", {"worker": os.getpid()}) as traced:
        found = _prepared(job)
        traced["drawn"] = bool(found.draws)
        return found


def _prepared(job: UpdateJob) -> Preparation:
    found = foresee(job)
    blobs = open_blob_store(job.blob_url)
    limit = job.max_checkpoint_bytes
    process = read_server_plan(blobs.get(MODEL, job.plan_path, limit=limit), limit).process
    elements = sum(math.prod(spec_from_proto(leaf).shape) for leaf in process.trainable)
    if found.refused is not None or elements > _MOST_ELEMENTS:
        return Preparation(found, ())
    noise = RecordedNoise(SystemNoise())
    base = _base(blobs, process, job, noise)
    clip_norm = clip_norm_told(process, client_checkpoint(process, base))
    round_update(process, base, empty_sum(process, b"", clip_norm), noise)
    return Preparation(found, tuple(noise.draws))


def client_checkpoint_bytes(process: learning_pb2.LearningProcess, state: Tensors) -> bytes:
    """The client checkpoint of a server state as stored: gzip, which the resource announces to devices."""
    return gzip_bytes(write_checkpoint(client_checkpoint(process, state)))


def read_checkpoint_object(stored: bytes, limit: int) -> Tensors:
    """Reads a stored checkpoint, gzip or not, of at most `limit` bytes; raises ArtifactInvalid."""
    return read_checkpoint(read_stored(stored, limit), CheckpointLimits(max_bytes=limit))


def _prospect(blobs: BlobStore, process: learning_pb2.LearningProcess, job: UpdateJob, this_round: Round) -> Prospect:
    if job.prospect is not None and job.prospect.fits(job.spending, this_round):
        return job.prospect
    silent = SilentNoise()
    return prospect(job.spending, process, this_round, lambda: _base(blobs, process, job, silent), is_last=job.is_last)


def _base(
    blobs: BlobStore, process: learning_pb2.LearningProcess, job: UpdateJob, noise: NoiseSource
) -> dict[str, NDArray[np.generic]]:
    stored = _read_leaves(blobs, job, job.base_path)
    state = read_state(process, open_noise(stored, job.noise_key, job.base_path, job.max_checkpoint_bytes))
    if SEALED in stored:
        return state
    # The first round: whoever delivered the checkpoint may know the noise in it.
    return begin_noise(process, state, noise)


def _first_result(process: learning_pb2.LearningProcess, job: UpdateJob) -> str:
    """Where the result lies that is stored once, and that all others are derived from."""
    return job.checkpoint_path if process.kind == learning_pb2.LearningProcess.TRAINING else job.metrics_path


def _first_bytes(process: learning_pb2.LearningProcess, job: UpdateJob, result: RoundResult) -> bytes:
    if process.kind != learning_pb2.LearningProcess.TRAINING:
        return metrics_json(result.metrics)
    return gzip_bytes(write_checkpoint(seal_noise(result.checkpoint(), job.noise_key, job.checkpoint_path)))


def _total(blobs: BlobStore, digest: bytes, job: UpdateJob) -> PartialSum:
    total = merge_all(blobs, job.sums, job.private_keys, job.key_service, job.max_checkpoint_bytes)
    if total.plan_digest != digest:
        raise ArtifactInvalid(Reason.PARTIAL_SUM_MISMATCH, "the partial sums belong to another plan")
    check_count(total, job.contributions)
    return total


def _read_leaves(blobs: BlobStore, job: UpdateJob, path: str) -> Tensors:
    return read_checkpoint_object(blobs.get(MODEL, path, limit=job.max_checkpoint_bytes), job.max_checkpoint_bytes)
