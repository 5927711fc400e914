"""Aggregators: what devices are told and send, how a sum becomes a mean, and what state that takes.

One entry per member of the process's `aggregator` oneof; adding a kind of aggregation adds an entry. Leaf names are
those of spec/artifacts.md 3.3 and 9.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedcompute.privacy.gaussian import FixedGaussian
from fedcompute.privacy.lattice import Lattice
from fedcompute.privacy.ledger import Event
from fedcompute.privacy.noise import NoiseSource
from fedcompute.protos import learning_pb2
from fedcompute.tensors.partial_sum import PartialSum
from fedcompute.tensors.tree import Tensors

Process = learning_pb2.LearningProcess
Role = learning_pb2.UpdateLeaf.Role
State = dict[str, NDArray[np.generic]]
Layout = tuple[tuple[str, Role], ...]

DELTA, METRIC, COUNT, WEIGHT, BELOW_ESTIMATE, ZEROED = (
    learning_pb2.UpdateLeaf.DELTA,
    learning_pb2.UpdateLeaf.METRIC,
    learning_pb2.UpdateLeaf.COUNT,
    learning_pb2.UpdateLeaf.WEIGHT,
    learning_pb2.UpdateLeaf.BELOW_ESTIMATE,
    learning_pb2.UpdateLeaf.ZEROED,
)


@dataclass(frozen=True)
class Aggregated:
    """The mean delta per update leaf (float64), the aggregator's new state leaves, ledger events, released metrics.

    `events` is empty where nothing was noised; `metrics` has the entry's `stats` as keys.
    """

    mean: Mapping[str, NDArray[np.float64]]
    state: State
    events: tuple[Event, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Aggregator:
    """State leaves are named below `server`.

    `told`: client leaf below `client` -> state leaf, or a function giving a constant; `layout`: update parts in the
    order of the file; `clip_leaf`: the client leaf that holds the L2 bound of deltas; `fixed_denominator`: whether
    the mean divides by the report goal whatever arrives; `stats`: keys of the metrics it adds, below `server`;
    `restart`: leaves of a noise state that begins anew, for mechanisms whose noise outlives a round; `overlaps`:
    whether rounds may overlap, since nothing that one leaves behind decides how the next is clipped or noised.
    """

    layout: Layout
    release: Callable[[Process, Tensors, PartialSum, NoiseSource], Aggregated]
    told: tuple[tuple[str, str | Callable[[Process], float]], ...] = ()
    init: Callable[[Process], State] = lambda process: {}
    restart: Callable[[Process, Tensors, NoiseSource], State] | None = None
    clip_leaf: str | None = None
    fixed_denominator: bool = False
    overlaps: bool = False
    stats: tuple[str, ...] = ()


def update_leaves(process: Process, role: Role) -> list[str]:
    """Names of the update leaves of one role, in file order (that of the trainable weights, for deltas)."""
    return [leaf.spec.name for leaf in process.updates if leaf.role == role]


def _uniform_mean(process: Process, state: Tensors, total: PartialSum, noise: NoiseSource) -> Aggregated:
    count = np.float64(total.num_inputs)
    # No contribution at all gives 0/0; the round's finite check then keeps the old weights.
    with np.errstate(divide="ignore", invalid="ignore"):
        return Aggregated({name: total.real[name] / count for name in update_leaves(process, DELTA)}, {})


def _weighted_mean(process: Process, state: Tensors, total: PartialSum, noise: NoiseSource) -> Aggregated:
    (weight,) = (total.real[name] for name in update_leaves(process, WEIGHT))
    with np.errstate(divide="ignore", invalid="ignore"):
        return Aggregated({name: total.real[name] / weight for name in update_leaves(process, DELTA)}, {})


def _fixed_gaussian_init(process: Process) -> State:
    settings = process.fixed_gaussian
    clip_norm = np.float32(settings.clip_norm)
    deviation = np.float32(np.float32(settings.noise_multiplier) * clip_norm)
    return {
        "aggregator/query_state/numerator_state/l2_norm_clip": np.array(clip_norm),
        "aggregator/query_state/numerator_state/stddev": np.array(deviation),
        "aggregator/query_state/denominator": np.array(settings.report_goal, np.float32),
        **event_leaves("aggregator/dp_event", float(deviation / clip_norm)),
        "aggregator/is_init_state": np.array(True),
    }


def _fixed_gaussian(process: Process, state: Tensors, total: PartialSum, noise: NoiseSource) -> Aggregated:
    mechanism = FixedGaussian(
        clip_norm=float(state["aggregator/query_state/numerator_state/l2_norm_clip"]),
        standard_deviation=float(state["aggregator/query_state/numerator_state/stddev"]),
        report_goal=float(state["aggregator/query_state/denominator"]),
    )
    names = update_leaves(process, DELTA)
    mean = mechanism.release({name: total.lattice[name] for name in names}, Lattice(total.steps[names[0]]), noise)
    new: State = {
        **event_leaves("aggregator/dp_event", mechanism.event.noise_multiplier),
        "aggregator/is_init_state": np.array(False),
    }
    return Aggregated(mean, new, (mechanism.event,))


def event_leaves(prefix: str, noise_multiplier: float | None) -> State:
    """State leaves that name an event as the reference does; None for one that it has no accounting for."""
    leaves: State = {
        f"{prefix}/module_name": np.array(b"dp_accounting.dp_event", object),
        f"{prefix}/class_name": np.array(
            b"UnsupportedDpEvent" if noise_multiplier is None else b"GaussianDpEvent", object
        ),
    }
    if noise_multiplier is not None:
        leaves[f"{prefix}/noise_multiplier"] = np.array(noise_multiplier, np.float32)
    return leaves


UNIFORM_MEAN = Aggregator(layout=(("0", COUNT), ("1", METRIC), ("2", DELTA)), release=_uniform_mean, overlaps=True)
WEIGHTED_MEAN = Aggregator(layout=(("0", METRIC), ("1", DELTA), ("2", WEIGHT)), release=_weighted_mean, overlaps=True)
FIXED_GAUSSIAN = Aggregator(
    layout=(("0", METRIC), ("1", DELTA)),
    release=_fixed_gaussian,
    told=(("1", "aggregator/query_state/numerator_state/l2_norm_clip"),),
    init=_fixed_gaussian_init,
    clip_leaf="client/1",
    fixed_denominator=True,
    overlaps=True,
)
