"""One device's update: judged, bounded and added to a sum."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedcompute.errors import Reason, UploadRejected
from fedcompute.learning.aggregators import aggregator_of, lattice_of
from fedcompute.privacy.clipping import NORM_TOLERANCE, clip_by_global_norm, global_norm
from fedcompute.privacy.lattice import to_lattice
from fedcompute.protos import learning_pb2
from fedcompute.tensors.partial_sum import PartialSum
from fedcompute.tensors.tree import Tensors, spec_from_proto


@dataclass(frozen=True)
class Contribution:
    """What one update adds: `lattice` leaves are int64 steps, `real` leaves float64."""

    lattice: Mapping[str, NDArray[np.int64]]
    real: Mapping[str, NDArray[np.float64]]


def read_contribution(process: learning_pb2.LearningProcess, update: Tensors) -> Contribution:
    """Judges an update against its process and bounds it. Raises UploadRejected with the typed reason.

    Refused: leaves missing or unknown, another shape or dtype, a value that is not finite, a count other than 1, and,
    where the process bounds contributions, an L2 norm over the clip norm by more than `NORM_TOLERANCE` relative.

    Formal guarantees: where the aggregator has a clip norm, the deltas that are returned lie on its lattice with an
    L2 norm of at most the clip norm, whatever the device sent. Metric leaves are not bounded or noised: they leave the
    server as plain sums (spec/artifacts.md 10.1).
    """
    _check_layout(process, update)
    by_role: dict[int, dict[str, NDArray[np.generic]]] = {}
    for leaf in process.updates:
        by_role.setdefault(leaf.role, {})[leaf.spec.name] = update[leaf.spec.name]
    for name, count in by_role.get(learning_pb2.UpdateLeaf.COUNT, {}).items():
        if int(count) != 1:
            raise UploadRejected(Reason.WRONG_COUNT, f"{name} is {int(count)}, not 1")
    deltas = by_role.get(learning_pb2.UpdateLeaf.DELTA, {})
    real = {
        name: value.astype(np.float64)
        for role, leaves in by_role.items()
        if role != learning_pb2.UpdateLeaf.DELTA
        for name, value in leaves.items()
    }
    clip_norm = aggregator_of(process).clip_norm(process)
    lattice = lattice_of(process)
    if clip_norm is None or lattice is None or not deltas:
        return Contribution({}, {**real, **{name: value.astype(np.float64) for name, value in deltas.items()}})
    norm = global_norm(deltas)  # type: ignore[arg-type]
    if not norm <= clip_norm * (1 + NORM_TOLERANCE):
        raise UploadRejected(Reason.NORM_TOO_LARGE, f"update norm {norm:.6g} exceeds clip norm {clip_norm:.6g}")
    return Contribution(to_lattice(clip_by_global_norm(deltas, clip_norm), lattice), real)  # type: ignore[arg-type]


def empty_sum(process: learning_pb2.LearningProcess, plan_digest: bytes) -> PartialSum:
    """The sum of no contribution, with every leaf in place and writable."""
    lattice = lattice_of(process)
    has_deltas = any(leaf.role == learning_pb2.UpdateLeaf.DELTA for leaf in process.updates)
    on_lattice = lattice is not None and has_deltas
    integers: dict[str, NDArray[np.int64]] = {}
    reals: dict[str, NDArray[np.float64]] = {}
    for leaf in process.updates:
        shape = spec_from_proto(leaf.spec).shape
        if on_lattice and leaf.role == learning_pb2.UpdateLeaf.DELTA:
            integers[leaf.spec.name] = np.zeros(shape, np.int64)
        else:
            reals[leaf.spec.name] = np.zeros(shape, np.float64)
    return PartialSum(plan_digest, 0, lattice.step if lattice and on_lattice else 0.0, integers, reals)


def add(total: PartialSum, contribution: Contribution) -> PartialSum:
    """`total` with one more contribution; adds into the arrays of `total`, which must be writable.

    Formal guarantees: lattice leaves are exact integers, so any order of contributions gives the same bytes.
    """
    for name, value in contribution.lattice.items():
        total.lattice[name][...] += value
    for name, real in contribution.real.items():
        total.real[name][...] += real
    return PartialSum(total.plan_digest, total.num_inputs + 1, total.lattice_step, total.lattice, total.real)


def _check_layout(process: learning_pb2.LearningProcess, update: Tensors) -> None:
    expected = {leaf.spec.name: spec_from_proto(leaf.spec) for leaf in process.updates}
    if update.keys() != expected.keys():
        missing = sorted(expected.keys() - update.keys())
        unknown = sorted(update.keys() - expected.keys())
        raise UploadRejected(
            Reason.WRONG_LEAF_NAMES,
            f"{len(missing)} leaves missing {missing[:3]}, {len(unknown)} unknown {unknown[:3]}",
        )
    for name, spec in expected.items():
        value = update[name]
        if value.dtype != spec.dtype:
            raise UploadRejected(Reason.WRONG_LEAF_TYPE, f"{name} is {value.dtype}, not {spec.dtype}")
        if value.shape != spec.shape:
            raise UploadRejected(Reason.WRONG_LEAF_SHAPE, f"{name} has shape {value.shape}, not {spec.shape}")
        if not np.isfinite(value).all():
            raise UploadRejected(Reason.NOT_FINITE, f"{name} holds a value that is not finite")
