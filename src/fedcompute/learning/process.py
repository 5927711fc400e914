"""One round on the server: `state, sum -> state, metrics` (spec/artifacts.md 6.5, 8)."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.learning.aggregators import DELTA, update_leaves
from fedcompute.learning.catalogue import aggregator_of
from fedcompute.learning.contribution import noised_metric_leaves
from fedcompute.learning.metrics import definition
from fedcompute.learning.optimizers import OPTIMIZERS
from fedcompute.learning.specification import (
    FINALIZER,
    NON_FINITE_STAT,
    OWN,
    metric_leaf,
    state_specs,
)
from fedcompute.privacy.gaussian import FixedGaussian
from fedcompute.privacy.lattice import Lattice
from fedcompute.privacy.ledger import Event
from fedcompute.privacy.noise import NoiseSource
from fedcompute.protos import learning_pb2
from fedcompute.tensors.partial_sum import PartialSum
from fedcompute.tensors.tree import Tensors, subtree

Process = learning_pb2.LearningProcess
_COUNTS = (NON_FINITE_STAT, "server/aggregator/zeroed_count")


@dataclass(frozen=True)
class RoundResult:
    """A round's outcome.

    `state`: the new server state; `metrics`: key of the metrics file -> value, NaN where undefined; `events`: what the
    model released about devices under DP, empty without; `metric_events`: the same of the metrics.
    """

    state: Mapping[str, NDArray[np.generic]]
    metrics: Mapping[str, float]
    events: tuple[Event, ...]
    metric_events: tuple[Event, ...] = ()

    def checkpoint(self) -> dict[str, NDArray[np.generic]]:
        """Leaves of the server checkpoint: state and metrics."""
        leaves: dict[str, NDArray[np.generic]] = dict(self.state)
        for stat_name, value in self.metrics.items():
            dtype = np.int32 if stat_name in _COUNTS else np.float32
            leaves[metric_leaf(stat_name)] = np.array(value, dtype)
        return leaves


def read_state(process: Process, checkpoint: Tensors) -> dict[str, NDArray[np.generic]]:
    """The state leaves of a server checkpoint, our own optional ones too; others are ignored (spec/artifacts.md 6.4).

    Raises ArtifactInvalid (STATE_MISMATCH) when a leaf is missing or of another shape or dtype.
    """
    state = {name: value for name, value in checkpoint.items() if name.startswith(OWN)}
    for spec in state_specs(process):
        value = checkpoint.get(spec.name)
        if value is None or not _fits(value.shape, spec.shape) or value.dtype != spec.dtype:
            found = "missing" if value is None else f"{value.dtype}{list(value.shape)}"
            raise ArtifactInvalid(
                Reason.STATE_MISMATCH, f"state leaf {spec.name!r} is {found}, not {spec.dtype}{list(spec.shape)}"
            )
        state[spec.name] = value
    return state


def client_checkpoint(process: Process, state: Tensors) -> dict[str, NDArray[np.generic]]:
    """What devices receive: the broadcast leaves under their client names."""
    return {
        leaf.client_name: np.array(leaf.constant, np.float32)
        if leaf.WhichOneof("source") == "constant"
        else state[leaf.state_name]
        for leaf in process.broadcasts
    }


def staleness_weight(staleness: int) -> float:
    """How much the mean of a round counts whose devices started `staleness` releases before it: 1 / sqrt(1 + s).

    Source: FedBuff (arXiv 2106.06639), section 5, with a round as the buffer.
    """
    return 1.0 / math.sqrt(1.0 + staleness)


def round_update(
    process: Process, state: Tensors, total: PartialSum, noise: NoiseSource, *, weight: float = 1.0
) -> RoundResult:
    """Applies a round's sum: noise, server optimizer, metrics. The state of an evaluation stays as it was.

    `weight` multiplies the mean, after its noise: what has been released may be scaled at no cost.

    A mean that is not finite leaves weights, optimizer and aggregator as they were and sets
    `update_non_finite` to 1; the metrics are those of the round all the same.

    Formal guarantees: with a DP aggregator, everything that depends on `total`'s deltas passes through one call of its
    mechanism; `events` describe that call. With metric noise the same holds for metrics and `metric_events`. Call once
    per sum: a second call draws new noise and is a second release.
    """
    total, metric_events = _with_metric_noise(process, total, noise)
    metrics = {metric.stat_name: _finalize(metric, total) for metric in process.metrics}
    if process.kind == Process.EVALUATION:
        return RoundResult(dict(state), metrics, (), metric_events)
    aggregated = aggregator_of(process).release(process, subtree(state, "server"), total, noise)
    gradient = [weight * aggregated.mean[name] for name in update_leaves(process, DELTA)]
    finite = all(np.isfinite(leaf).all() for leaf in gradient)
    new = dict(state)
    if finite:
        optimizer = OPTIMIZERS[str(process.WhichOneof("server_optimizer"))]
        weights = [state[leaf.name] for leaf in process.trainable]
        finalizer, moved = optimizer.update(subtree(state, FINALIZER), weights, gradient)
        new.update(zip((leaf.name for leaf in process.trainable), moved, strict=True))
        new.update({f"{FINALIZER}/{name}": value for name, value in finalizer.items()})
        new.update({f"server/{name}": value for name, value in aggregated.state.items()})
    metrics.update({f"server/{name}": value for name, value in aggregated.metrics.items()})
    metrics[NON_FINITE_STAT] = 0.0 if finite else 1.0
    return RoundResult(new, metrics, aggregated.events, metric_events)


def metrics_of_checkpoint(process: Process, checkpoint: Tensors) -> dict[str, float]:
    """The released metrics that a server checkpoint carries, in the order of the metrics file."""
    names = [metric.stat_name for metric in process.metrics]
    if process.kind == Process.TRAINING:
        names += [f"server/{name}" for name in aggregator_of(process).stats]
        names.append(NON_FINITE_STAT)
    return {name: float(checkpoint[metric_leaf(name)]) for name in names if metric_leaf(name) in checkpoint}


def metrics_json(metrics: Mapping[str, float]) -> bytes:
    """The metrics file: one flat JSON object on one line; what is not finite is null (spec/task-builder.md 9.4)."""
    values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    return json.dumps(values).encode()


def read_metrics(data: bytes) -> dict[str, float]:
    """Reads `metrics_json`, null as NaN. Raises ArtifactInvalid (METRICS_MALFORMED) for anything else."""
    try:
        return {str(name): math.nan if value is None else float(value) for name, value in json.loads(data).items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as cause:
        raise ArtifactInvalid(Reason.METRICS_MALFORMED, f"{len(data)} bytes are no metrics file") from cause


def _with_metric_noise(process: Process, total: PartialSum, noise: NoiseSource) -> tuple[PartialSum, tuple[Event, ...]]:
    """The sum with metric leaves noised and in model units, where the process wants that; else as it is."""
    names = noised_metric_leaves(process)
    if not names:
        return total, ()
    clip_norm = float(process.metric_noise.clip_norm)
    # Over a goal of one, the mean is the sum.
    mechanism = FixedGaussian(clip_norm, process.metric_noise.noise_multiplier * clip_norm, report_goal=1.0)
    sums = {name: total.lattice[name] for name in names}
    noised = mechanism.release(sums, Lattice(total.steps[names[0]]), noise)
    rest = {name: value for name, value in total.lattice.items() if name not in noised}
    return replace(total, lattice=rest, real={**total.real, **noised}), (mechanism.event,)


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return len(shape) == len(wanted) and all(want in (-1, size) for size, want in zip(shape, wanted, strict=True))


def _finalize(metric: learning_pb2.Metric, total: PartialSum) -> float:
    value = definition(metric.name).finalize([total.real[name] for name in metric.update_names])
    return float(np.float32(value))
