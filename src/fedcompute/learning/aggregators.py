"""Aggregators: how a process turns a sum of deltas into a mean, what state that takes and what it tells devices.

One entry per member of the process's `aggregator` oneof; adding a kind of aggregation adds an entry.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedcompute.privacy.gaussian import FixedGaussian
from fedcompute.privacy.lattice import Lattice, lattice_for
from fedcompute.privacy.ledger import GaussianEvent
from fedcompute.privacy.noise import NoiseSource
from fedcompute.protos import learning_pb2
from fedcompute.tensors.partial_sum import PartialSum
from fedcompute.tensors.tree import Tensors

Process = learning_pb2.LearningProcess
State = dict[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Aggregated:
    """The mean delta per leaf (float64), the aggregator's new state leaves, and the release as a ledger event."""

    mean: Mapping[str, NDArray[np.float64]]
    state: State
    event: GaussianEvent | None


@dataclass(frozen=True)
class Aggregator:
    """State leaves are named below `server/aggregator`.

    `broadcasts`: client leaf below `client` -> state leaf; `counts`: whether updates carry the int32 count;
    `clip_norm`: the L2 bound that contributions must respect, None for no bound.
    """

    broadcasts: tuple[tuple[str, str], ...]
    counts: bool
    init: Callable[[Process], State]
    clip_norm: Callable[[Process], float | None]
    release: Callable[[Process, Tensors, PartialSum, NoiseSource], Aggregated]


def delta_names(process: Process) -> list[str]:
    """Update leaves that carry the model delta, in the order of the trainable weights."""
    return [leaf.spec.name for leaf in process.updates if leaf.role == learning_pb2.UpdateLeaf.DELTA]


def _uniform_mean(process: Process, state: Tensors, total: PartialSum, noise: NoiseSource) -> Aggregated:
    count = np.float64(total.num_inputs)
    # No contribution at all gives 0/0; the round's finite check then keeps the old weights.
    with np.errstate(divide="ignore", invalid="ignore"):
        return Aggregated({name: total.real[name] / count for name in delta_names(process)}, dict(state), None)


def _fixed_gaussian_init(process: Process) -> State:
    settings = process.fixed_gaussian
    clip_norm = np.float32(settings.clip_norm)
    deviation = np.float32(np.float32(settings.noise_multiplier) * clip_norm)
    return {
        "query_state/numerator_state/l2_norm_clip": np.array(clip_norm),
        "query_state/numerator_state/stddev": np.array(deviation),
        "query_state/denominator": np.array(settings.report_goal, np.float32),
        "dp_event/module_name": np.array(b"dp_accounting.dp_event", object),
        "dp_event/class_name": np.array(b"GaussianDpEvent", object),
        "dp_event/noise_multiplier": np.array(deviation / clip_norm, np.float32),
        "is_init_state": np.array(True),
    }


def _fixed_gaussian_release(process: Process, state: Tensors, total: PartialSum, noise: NoiseSource) -> Aggregated:
    mechanism = FixedGaussian(
        clip_norm=float(state["query_state/numerator_state/l2_norm_clip"]),
        standard_deviation=float(state["query_state/numerator_state/stddev"]),
        report_goal=float(state["query_state/denominator"]),
    )
    mean = mechanism.release(total.lattice, Lattice(total.lattice_step), noise)
    new: State = {
        **state,
        "dp_event/noise_multiplier": np.array(mechanism.event.noise_multiplier, np.float32),
        "is_init_state": np.array(False),
    }
    return Aggregated(mean, new, mechanism.event)


AGGREGATORS: Mapping[str, Aggregator] = {
    "uniform_mean": Aggregator(
        broadcasts=(),
        counts=True,
        init=lambda process: {},
        clip_norm=lambda process: None,
        release=_uniform_mean,
    ),
    "fixed_gaussian": Aggregator(
        broadcasts=(("1", "query_state/numerator_state/l2_norm_clip"),),
        counts=False,
        init=_fixed_gaussian_init,
        clip_norm=lambda process: float(process.fixed_gaussian.clip_norm),
        release=_fixed_gaussian_release,
    ),
}


def aggregator_of(process: Process) -> Aggregator:
    """The entry of a validated process."""
    return AGGREGATORS[str(process.WhichOneof("aggregator"))]


def lattice_of(process: Process) -> Lattice | None:
    """The lattice of the process's deltas; None when they are added as float64."""
    clip_norm = aggregator_of(process).clip_norm(process)
    return None if clip_norm is None else lattice_for(clip_norm)
