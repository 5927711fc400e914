"""One round on the server: `state, sum -> state, metrics` (spec/artifacts.md 6.5, 8)."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.learning.aggregators import DELTA, update_leaves
from fedcompute.learning.catalogue import aggregator_of
from fedcompute.learning.metrics import definition
from fedcompute.learning.optimizers import OPTIMIZERS
from fedcompute.learning.specification import (
    FINALIZER,
    NON_FINITE_STAT,
    OWN,
    metric_leaf,
    state_specs,
)
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

    `state`: the new server state; `metrics`: key of the metrics file -> value, NaN where undefined; `events`: what was
    released about devices under DP, empty without.
    """

    state: Mapping[str, NDArray[np.generic]]
    metrics: Mapping[str, float]
    events: tuple[Event, ...]

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


def exported(checkpoint: Tensors) -> dict[str, NDArray[np.generic]]:
    """A server checkpoint for people: without the noise of trees, whose leaves become zeros or are left out.

    Formal guarantees: what is returned does not depend on noise that future or past releases hide behind, other than
    through released models and metrics (spec/artifacts.md 9, consequence 5).
    """
    return {
        name: np.zeros_like(value) if _is_tree_noise(name) else value
        for name, value in checkpoint.items()
        if not name.startswith(OWN)
    }


def client_checkpoint(process: Process, state: Tensors) -> dict[str, NDArray[np.generic]]:
    """What devices receive: the broadcast leaves under their client names."""
    return {
        leaf.client_name: np.array(leaf.constant, np.float32)
        if leaf.WhichOneof("source") == "constant"
        else state[leaf.state_name]
        for leaf in process.broadcasts
    }


def round_update(process: Process, state: Tensors, total: PartialSum, noise: NoiseSource) -> RoundResult:
    """Applies a round's sum: noise, server optimizer, metrics. The state of an evaluation stays as it was.

    A mean that is not finite leaves weights, optimizer and aggregator as they were and sets
    `update_non_finite` to 1; the metrics are those of the round all the same.

    Formal guarantees: with a DP aggregator, everything that depends on `total`'s deltas passes through one call of its
    mechanism; `events` describe that call. Call once per sum: a second call draws new noise and is a second release.
    """
    metrics = {metric.stat_name: _finalize(metric, total) for metric in process.metrics}
    if process.kind == Process.EVALUATION:
        return RoundResult(dict(state), metrics, ())
    aggregated = aggregator_of(process).release(process, subtree(state, "server"), total, noise)
    gradient = [aggregated.mean[name] for name in update_leaves(process, DELTA)]
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
    return RoundResult(new, metrics, aggregated.events)


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


def _is_tree_noise(name: str) -> bool:
    return "/previous_tree_noise" in name or name.endswith("/level_buffer") or "/level_buffer/" in name


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return len(shape) == len(wanted) and all(want in (-1, size) for size, want in zip(shape, wanted, strict=True))


def _finalize(metric: learning_pb2.Metric, total: PartialSum) -> float:
    value = definition(metric.name).finalize([total.real[name] for name in metric.update_names])
    return float(np.float32(value))
