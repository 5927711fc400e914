"""One device's update: judged, bounded and added to a sum."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

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
from fedcompute.privacy.lattice import Lattice, add_to_lattice, lattice_for
from fedcompute.tensors.partial_sum import PartialSum
from fedcompute.tensors.tree import LeafSpec, Tensors, spec_from_proto

_BLOCK = 1 << 16  # elements that are looked at together

# What a scalar of each role may be, exactly, and how to say so.
_SCALARS: Mapping[Role, tuple[Callable[[float], bool], str]] = {
    COUNT: (lambda value: value == 1, "1"),
    WEIGHT: (lambda value: value >= 0, "0 or more"),
    BELOW_ESTIMATE: (lambda value: abs(value) == BIT, f"-{BIT} or {BIT}"),
    ZEROED: (lambda value: value in (0, 1), "0 or 1"),
}


@dataclass(frozen=True)
class Multiples:
    """What a leaf adds to a lattice sum: its values times `factor`, in steps of `lattice` (see `add_to_lattice`)."""

    values: NDArray[np.floating]
    lattice: Lattice
    factor: float = 1.0


@dataclass(frozen=True)
class Contribution:
    """What one judged update adds, by leaf: `lattice` to int64 sums, `real` to float64 sums.

    Its arrays are those of the update, which is read again when it is added, and only then converted.
    """

    lattice: Mapping[str, Multiples]
    real: Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Rules:
    """What `judge` wants to know of a process, found out once. `specs`: every update leaf, in file order."""

    process: Process
    clip_norm: float | None
    specs: Mapping[str, LeafSpec]
    deltas: tuple[str, ...]
    scalars: tuple[tuple[str, Role], ...]
    bits: tuple[str, ...]
    flags: tuple[str, ...]
    noised_metrics: tuple[str, ...]
    real: tuple[str, ...]


def rules_of(process: Process, clip_norm: float | None) -> Rules:
    """The rules for updates of a process; `clip_norm` as in `read_contribution`."""
    deltas, bits = update_leaves(process, DELTA), update_leaves(process, BELOW_ESTIMATE)
    metrics = noised_metric_leaves(process)
    on_lattice = {*bits, *metrics, *(deltas if clip_norm is not None else ())}
    specs = {leaf.spec.name: spec_from_proto(leaf.spec) for leaf in process.updates}
    return Rules(
        process=process,
        clip_norm=clip_norm,
        specs=specs,
        deltas=tuple(deltas),
        scalars=tuple((leaf.spec.name, leaf.role) for leaf in process.updates if leaf.role in _SCALARS),
        bits=tuple(bits),
        flags=tuple(update_leaves(process, ZEROED)),
        noised_metrics=tuple(metrics),
        real=tuple(name for name in specs if name not in on_lattice),
    )


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
    return judge(rules_of(process, clip_norm), update)


def judge(rules: Rules, update: Tensors) -> Contribution:
    """`read_contribution` by rules that serve for many updates."""
    norm = _check_layout(rules, update)
    _check_scalars(rules, update)
    lattice: dict[str, Multiples] = {}
    if rules.noised_metrics:
        bound = float(rules.process.metric_noise.clip_norm)
        clipped = clip_by_global_norm({name: update[name] for name in rules.noised_metrics}, bound)
        lattice = {name: Multiples(value, lattice_for(bound)) for name, value in clipped.items()}
    real = {name: update[name] for name in rules.real}
    clip_norm = rules.clip_norm
    if clip_norm is None:
        return Contribution(lattice, real)
    if not norm <= clip_norm * (1 + NORM_TOLERANCE):
        raise UploadRejected(Reason.NORM_TOO_LARGE, f"update norm {norm:.6g} exceeds clip norm {clip_norm:.6g}")
    flags = [name for name in rules.flags if update[name]]
    if flags and norm > 0:
        raise UploadRejected(Reason.WRONG_COUNT, f"{flags[0]} is 1, but the update norm is {norm:.6g}")
    factor = clip_factor(norm, sum(update[name].size for name in rules.deltas), clip_norm)
    lattice |= {name: Multiples(update[name], lattice_for(clip_norm), factor) for name in rules.deltas}
    lattice |= {name: Multiples(update[name], Lattice(BIT_STEP)) for name in rules.bits}
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
    for name, one in contribution.lattice.items():
        add_to_lattice(total.lattice[name], one.values, one.lattice, one.factor)
    for name, real in contribution.real.items():
        running = total.real[name]
        np.add(running, real, out=running)
    return PartialSum(total.plan_digest, total.num_inputs + 1, total.steps, total.lattice, total.real)


def _check_scalars(rules: Rules, update: Tensors) -> None:
    for name, role in rules.scalars:
        allowed, rule = _SCALARS[role]
        value = float(update[name])
        if not allowed(value):
            raise UploadRejected(Reason.WRONG_COUNT, f"{name} is {value:g}, not {rule}")


def _check_layout(rules: Rules, update: Tensors) -> float:
    """Refuses all but finite leaves of the right names, types and shapes; returns the deltas' norm, inf without bound.

    The norm of deltas, where it is asked for, also tells whether they are finite.
    """
    expected = rules.specs
    if update.keys() != expected.keys():
        missing = sorted(expected.keys() - update.keys())
        unknown = sorted(update.keys() - expected.keys())
        raise UploadRejected(
            Reason.WRONG_LEAF_NAMES,
            f"{len(missing)} leaves missing {missing[:3]}, {len(unknown)} unknown {unknown[:3]}",
        )
    norm = math.inf
    deltas = {name: update[name] for name in rules.deltas}
    if rules.clip_norm is not None and all(_is_of(value, expected[name]) for name, value in deltas.items()):
        with np.errstate(over="ignore", invalid="ignore"):
            norm = global_norm(deltas)
    known = rules.deltas if math.isfinite(norm) else ()
    for name, spec in expected.items():
        value = update[name]
        if value.dtype != spec.dtype:
            raise UploadRejected(Reason.WRONG_LEAF_TYPE, f"{name} is {value.dtype}, not {spec.dtype}")
        if value.shape != spec.shape:
            raise UploadRejected(Reason.WRONG_LEAF_SHAPE, f"{name} has shape {value.shape}, not {spec.shape}")
        if name not in known and not _is_finite(value):
            raise UploadRejected(Reason.NOT_FINITE, f"{name} holds a value that is not finite")
    return norm


def _is_of(value: NDArray[Any], spec: LeafSpec) -> bool:
    return value.dtype == spec.dtype and value.shape == spec.shape


def _is_finite(values: NDArray[Any]) -> bool:
    flat = values.reshape(-1)
    return all(bool(np.isfinite(flat[start : start + _BLOCK]).all()) for start in range(0, flat.size, _BLOCK))
