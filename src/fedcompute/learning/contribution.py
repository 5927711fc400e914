"""One device's update: judged, bounded and added to a sum."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedcompute.errors import ArtifactInvalid, Reason, UploadRejected
from fedcompute.learning.aggregators import (
    BELOW_ESTIMATE,
    COUNT,
    DELTA,
    METRIC,
    WEIGHT,
    ZEROED,
    Process,
    Role,
    update_leaves,
)
from fedcompute.learning.catalogue import aggregator_of
from fedcompute.privacy.adaptive import BIT, BIT_STEP
from fedcompute.privacy.clipping import NORM_TOLERANCE, clip_by_global_norm, clip_factor, global_norm
from fedcompute.privacy.lattice import Lattice, lattice_for, to_lattice
from fedcompute.tensors.partial_sum import PartialSum
from fedcompute.tensors.tree import Tensors, spec_from_proto

# What a scalar of each role may be, exactly, and how to say so.
_SCALARS: Mapping[Role, tuple[Callable[[float], bool], str]] = {
    COUNT: (lambda value: value == 1, "1"),
    WEIGHT: (lambda value: value >= 0, "0 or more"),
    BELOW_ESTIMATE: (lambda value: abs(value) == BIT, f"-{BIT} or {BIT}"),
    ZEROED: (lambda value: value in (0, 1), "0 or 1"),
}


@dataclass(frozen=True)
class Contribution:
    """What one update adds: `lattice` leaves are int64 steps, `real` leaves float64."""

    lattice: Mapping[str, NDArray[np.int64]]
    real: Mapping[str, NDArray[np.float64]]


def noised_metric_leaves(process: Process) -> list[str]:
    """The update leaves beside deltas and bits that are bounded and noised; empty unless the process says so."""
    if not process.HasField("metric_noise"):
        return []
    return [leaf.spec.name for leaf in process.updates if leaf.role in (METRIC, ZEROED)]


def clip_norm_leaf(process: Process) -> str | None:
    """The client checkpoint's leaf with the L2 bound of this process's deltas; None if they are not bounded."""
    return aggregator_of(process).clip_leaf if update_leaves(process, DELTA) else None


def clip_norm_told(process: Process, told: Tensors) -> float | None:
    """The L2 bound that devices were told in the client checkpoint `told`; None if deltas are not bounded.

    Raises ArtifactInvalid (STATE_MISMATCH) for a client checkpoint without a positive bound.
    """
    name = clip_norm_leaf(process)
    if name is None:
        return None
    value = told.get(name)
    if value is None or value.shape != () or not 0 < float(value) < np.inf:
        raise ArtifactInvalid(Reason.STATE_MISMATCH, f"the client checkpoint has no positive clip norm in {name!r}")
    return float(value)


def read_contribution(process: Process, update: Tensors, clip_norm: float | None) -> Contribution:
    """Judges an update against its process and bounds it. Raises UploadRejected with the typed reason.

    `clip_norm`: what devices were told, see `clip_norm_told`. Refused: leaves missing or unknown, another shape or
    dtype, a value that is not finite, a count, weight, bit or flag out of its range, a flag of zeroing on a delta that
    is not zero, and an L2 norm over the clip norm by more than `NORM_TOLERANCE` relative.

    Formal guarantees: with a clip norm, the deltas that are returned lie on its lattice with an L2 norm of at most the
    clip norm, and the bit is one of two values, whatever the device sent. With metric noise, metric leaves and the
    zeroing flag lie on the lattice of its clip norm with an L2 norm of at most that, over all of them together; else
    they are not noised and leave the server as plain sums (spec/artifacts.md 9, consequence 3, and 10.1).
    """
    _check_layout(process, update)
    _check_scalars(process, update)
    deltas = {name: update[name] for name in update_leaves(process, DELTA)}
    bits = set(update_leaves(process, BELOW_ESTIMATE))
    metrics = {name: update[name] for name in noised_metric_leaves(process)}
    bound = float(process.metric_noise.clip_norm)
    lattice = to_lattice(clip_by_global_norm(metrics, bound), lattice_for(bound)) if metrics else {}
    real = {
        leaf.spec.name: update[leaf.spec.name].astype(np.float64)
        for leaf in process.updates
        if leaf.spec.name not in deltas and leaf.spec.name not in bits and leaf.spec.name not in metrics
    }
    if clip_norm is None:
        return Contribution(lattice, {**real, **{name: value.astype(np.float64) for name, value in deltas.items()}})
    norm = global_norm(deltas)
    if not norm <= clip_norm * (1 + NORM_TOLERANCE):
        raise UploadRejected(Reason.NORM_TOO_LARGE, f"update norm {norm:.6g} exceeds clip norm {clip_norm:.6g}")
    flags = [name for name in update_leaves(process, ZEROED) if update[name]]
    if flags and norm > 0:
        raise UploadRejected(Reason.WRONG_COUNT, f"{flags[0]} is 1, but the update norm is {norm:.6g}")
    size = sum(value.size for value in deltas.values())
    lattice |= to_lattice(deltas, lattice_for(clip_norm), clip_factor(norm, size, clip_norm))
    lattice |= to_lattice({name: update[name] for name in bits}, Lattice(BIT_STEP))
    return Contribution(lattice, real)


def empty_sum(process: Process, plan_digest: bytes, clip_norm: float | None) -> PartialSum:
    """The sum of no contribution, with every leaf in place and writable; `clip_norm` as in `read_contribution`."""
    steps: dict[str, float] = {}
    if metrics := noised_metric_leaves(process):
        steps = dict.fromkeys(metrics, lattice_for(process.metric_noise.clip_norm).step)
    if clip_norm is not None:
        steps |= dict.fromkeys(update_leaves(process, DELTA), lattice_for(clip_norm).step)
        steps |= dict.fromkeys(update_leaves(process, BELOW_ESTIMATE), BIT_STEP)
    shapes = {leaf.spec.name: spec_from_proto(leaf.spec).shape for leaf in process.updates}
    return PartialSum(
        plan_digest=plan_digest,
        num_inputs=0,
        steps=steps,
        lattice={name: np.zeros(shape, np.int64) for name, shape in shapes.items() if name in steps},
        real={name: np.zeros(shape, np.float64) for name, shape in shapes.items() if name not in steps},
    )


def add(total: PartialSum, contribution: Contribution) -> PartialSum:
    """`total` with one more contribution; adds into the arrays of `total`, which must be writable.

    Formal guarantees: lattice leaves are exact integers, so any order of contributions gives the same bytes.
    """
    for name, value in contribution.lattice.items():
        total.lattice[name][...] += value
    for name, real in contribution.real.items():
        total.real[name][...] += real
    return PartialSum(total.plan_digest, total.num_inputs + 1, total.steps, total.lattice, total.real)


def _check_scalars(process: Process, update: Tensors) -> None:
    for leaf in process.updates:
        if leaf.role in _SCALARS:
            allowed, rule = _SCALARS[leaf.role]
            value = float(update[leaf.spec.name])
            if not allowed(value):
                raise UploadRejected(Reason.WRONG_COUNT, f"{leaf.spec.name} is {value:g}, not {rule}")


def _check_layout(process: Process, update: Tensors) -> None:
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
