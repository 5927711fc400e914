"""Tree aggregation behind zeroing, with a fixed or an adaptive clip norm (spec/artifacts.md 9.3, 9.4).

Leaves of the reference's state hold the noise as float32. The exact nodes, and what was added so far, lie in leaves of
our own below `server/fedcompute`; a state without them is read by rounding. The generator's seed leaves exist for the
reference's readers and hold zeros: noise comes from the noise source. A state without any noise cannot take part.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.learning.aggregators import (
    BELOW_ESTIMATE,
    DELTA,
    METRIC,
    ZEROED,
    Aggregated,
    Aggregator,
    Process,
    State,
    event_leaves,
    update_leaves,
)
from fedcompute.privacy.adaptive import BIT, BIT_STEP, moved_estimate, split_noise
from fedcompute.privacy.lattice import lattice_for
from fedcompute.privacy.ledger import TreeEvent
from fedcompute.privacy.noise import NoiseSource, SilentNoise
from fedcompute.privacy.tree import NoiseTree, fresh_tree, grown, prefix_noise
from fedcompute.tensors.partial_sum import PartialSum
from fedcompute.tensors.tree import Tensors, spec_from_proto

_INNER = "aggregator/inner_agg"
_QUERY = f"{_INNER}/query_state"
_FIXED = f"{_QUERY}/numerator_state"
_ADAPTIVE = f"{_FIXED}/inner_query_state"
_QUANTILE = f"{_ADAPTIVE}/quantile_estimator_state"
_BELOW = f"{_QUANTILE}/below_estimate_state"
_ZEROING = ("aggregator/zeroing_norm", "aggregator/zeroed_count")
_CLIPS = ("aggregator/zeroing/dp_query_metrics/current_clip", "aggregator/zeroing/dp_query_metrics/estimate_clip")


@dataclass(frozen=True)
class _Place:
    """Where a tree lies in the state: leaves below `path` and `exact`; a `scalar` tree has no index in its names."""

    path: str
    exact: str
    scalar: bool = False

    def indexed(self, name: str, index: int) -> str:
        return name if self.scalar else f"{name}/{index}"


_SUM_TREE = _Place(_FIXED, "fedcompute/tree")
_ADAPTIVE_SUM_TREE = _Place(f"{_ADAPTIVE}/sum_state", "fedcompute/tree")
_BIT_TREE = _Place(f"{_BELOW}/numerator_state", "fedcompute/below_estimate_tree", scalar=True)


@dataclass(frozen=True)
class _Tree:
    """A tree with the noise that is in the released sums so far, in lattice steps, one array per leaf."""

    tree: NoiseTree
    added: tuple[NDArray[np.int64], ...]
    clip_norm: float
    standard_deviation: float


def _fresh(
    shapes: list[tuple[int, ...]], clip_norm: float, standard_deviation: float, step: float, noise: NoiseSource
) -> _Tree:
    added = tuple(np.zeros(shape, np.int64) for shape in shapes)
    return _Tree(fresh_tree(shapes, standard_deviation / step, noise), added, clip_norm, standard_deviation)


def _leaves(place: _Place, tree: _Tree, step: float) -> State:
    """All state leaves of a tree."""
    leaves: State = {
        f"{place.path}/tree_state/level_buffer_idx": np.array(tree.tree.levels, np.int32),
        f"{place.path}/tree_state/value_generator_state/seeds": np.zeros(2, np.int64),
        f"{place.path}/tree_state/value_generator_state/stddev": np.array(tree.standard_deviation, np.float32),
        f"{place.path}/clip_value": np.array(tree.clip_norm, np.float32),
    }
    for index, added in enumerate(tree.added):
        buffer = np.stack([node[index] for node in tree.tree.nodes])
        values = buffer * _per_level(buffer, [step * 0.5**level for level in tree.tree.levels])
        leaves[place.indexed(f"{place.path}/tree_state/level_buffer", index)] = values.astype(np.float32)
        leaves[place.indexed(f"{place.path}/previous_tree_noise", index)] = np.asarray(added * step, np.float32)
        leaves[place.indexed(f"{place.exact}/scaled_nodes", index)] = buffer
        leaves[place.indexed(f"{place.exact}/added", index)] = added
    return leaves


def _read(place: _Place, state: Tensors, count: int, step: float) -> _Tree:
    levels = tuple(int(level) for level in state[f"{place.path}/tree_state/level_buffer_idx"])
    buffers, added, without_own = [], [], False
    for index in range(count):
        exact = state.get(place.indexed(f"{place.exact}/scaled_nodes", index))
        if exact is None:
            without_own = True
            values = state[place.indexed(f"{place.path}/tree_state/level_buffer", index)].astype(np.float64)
            exact = _lattice_steps(values / _per_level(values, [step * 0.5**level for level in levels]))
        buffers.append(exact)
        exact = state.get(place.indexed(f"{place.exact}/added", index))
        previous = state[place.indexed(f"{place.path}/previous_tree_noise", index)]
        added.append(_lattice_steps(previous.astype(np.float64) / step) if exact is None else exact)
    nodes = tuple(tuple(buffer[level] for buffer in buffers) for level in range(len(levels)))
    standard_deviation = float(state[f"{place.path}/tree_state/value_generator_state/stddev"])
    if without_own and standard_deviation > 0 and not any(buffer.any() for buffer in buffers):
        raise ArtifactInvalid(Reason.STATE_MISMATCH, f"the state below {place.path!r} was stripped of its noise")
    return _Tree(NoiseTree(nodes, levels), tuple(added), float(state[f"{place.path}/clip_value"]), standard_deviation)


def _per_level(buffer: NDArray[np.generic], factors: list[float]) -> NDArray[np.float64]:
    return np.array(factors).reshape(-1, *[1] * (buffer.ndim - 1))


def _lattice_steps(values: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.rint(values).astype(np.int64)


def _noised(
    tree: _Tree, sums: list[NDArray[np.int64]], step: float, noise: NoiseSource
) -> tuple[list[NDArray[np.int64]], _Tree]:
    """The round's sums plus the noise that the tree's prefix gained, and the tree for the next round.

    Formal guarantees: the prefix sums of what is returned equal the prefix sum plus the prefix noise, which is
    post-processing of the tree's noised nodes (see `privacy.tree.prefix_noise`).
    """
    prefix = prefix_noise(tree.tree)
    noised = [total + now - before for total, now, before in zip(sums, prefix, tree.added, strict=True)]
    following = grown(tree.tree, tree.standard_deviation / step, noise)
    return noised, _Tree(following, prefix, tree.clip_norm, tree.standard_deviation)


def _shapes(process: Process) -> list[tuple[int, ...]]:
    return [spec_from_proto(leaf).shape for leaf in process.trainable]


def _zeroing(process: Process, norm: float, total: PartialSum) -> dict[str, float]:
    (zeroed,) = (total.real[name] for name in update_leaves(process, ZEROED))
    return dict(zip(_ZEROING, (float(np.float32(norm)), float(np.rint(zeroed))), strict=True))


def _mean(
    process: Process, noised: list[NDArray[np.int64]], step: float, report_goal: float
) -> dict[str, NDArray[np.float64]]:
    names = update_leaves(process, DELTA)
    return {name: leaf * np.float64(step / report_goal) for name, leaf in zip(names, noised, strict=True)}


def _tree_init(process: Process) -> State:
    settings = process.tree_aggregation
    clip_norm = float(np.float32(settings.clip_norm))
    deviation = float(np.float32(settings.noise_multiplier * clip_norm))
    return {
        **_spec_leaves(_fresh_leaves(_SUM_TREE, _shapes(process), clip_norm, deviation, SilentNoise())),
        f"{_QUERY}/denominator": np.array(settings.report_goal, np.float32),
        **event_leaves(f"{_INNER}/dp_event", None),
        f"{_INNER}/is_init_state": np.array(True),
    }


def _tree_restart(process: Process, state: Tensors, noise: NoiseSource) -> State:
    return _restarted(_SUM_TREE, _shapes(process), state, noise)


def _restarted(place: _Place, shapes: list[tuple[int, ...]], state: Tensors, noise: NoiseSource) -> State:
    """Leaves of a fresh tree with the clip norm and deviation that the state names."""
    clip_norm = float(state[f"{place.path}/clip_value"])
    deviation = float(state[f"{place.path}/tree_state/value_generator_state/stddev"])
    return _fresh_leaves(place, shapes, clip_norm, deviation, noise)


def _fresh_leaves(
    place: _Place, shapes: list[tuple[int, ...]], clip_norm: float, standard_deviation: float, noise: NoiseSource
) -> State:
    step = BIT_STEP if place is _BIT_TREE else lattice_for(clip_norm).step
    return _leaves(place, _fresh(shapes, clip_norm, standard_deviation, step, noise), step)


def _spec_leaves(leaves: State) -> State:
    return {name: value for name, value in leaves.items() if not name.startswith("fedcompute/")}


def _tree_release(process: Process, state: Tensors, total: PartialSum, noise: NoiseSource) -> Aggregated:
    names = update_leaves(process, DELTA)
    step = total.steps[names[0]]
    tree = _read(_SUM_TREE, state, len(names), step)
    noised, following = _noised(tree, [total.lattice[name] for name in names], step, noise)
    new = {**_leaves(_SUM_TREE, following, step), f"{_INNER}/is_init_state": np.array(False)}
    return Aggregated(
        _mean(process, noised, step, float(state[f"{_QUERY}/denominator"])),
        new,
        (TreeEvent(tree.standard_deviation / tree.clip_norm, tree.tree.rounds),),
        _zeroing(process, process.tree_aggregation.zeroing_norm, total),
    )


def _adaptive_init(process: Process) -> State:
    settings = process.adaptive_tree
    split = split_noise(settings.noise_multiplier, settings.report_goal)
    clip_norm = float(np.float32(settings.initial_clip_norm))
    event = f"{_INNER}/dp_event"
    return {
        f"{_ADAPTIVE}/noise_multiplier": np.array(split.value_multiplier, np.float32),
        **_spec_leaves(_trees(process, clip_norm, split.value_multiplier, settings.report_goal, SilentNoise())),
        f"{_QUANTILE}/current_estimate": np.array(clip_norm, np.float32),
        f"{_QUANTILE}/target_quantile": np.array(settings.target_quantile, np.float32),
        f"{_QUANTILE}/learning_rate": np.array(settings.learning_rate, np.float32),
        f"{_BELOW}/denominator": np.array(settings.report_goal, np.float32),
        f"{_FIXED}/indicator_state": np.array(0, np.int32),
        f"{_QUERY}/denominator": np.array(settings.report_goal, np.float32),
        f"{event}/module_name": np.array(b"dp_accounting.dp_event", object),
        f"{event}/class_name": np.array(b"ComposedDpEvent", object),
        **event_leaves(f"{event}/events/0", None),
        **event_leaves(f"{event}/events/1", None),
        f"{_INNER}/is_init_state": np.array(True),
    }


def _trees(process: Process, clip_norm: float, multiplier: float, report_goal: float, noise: NoiseSource) -> State:
    """Leaves of a fresh pair of trees. The bits keep their deviation also where the values have none."""
    deviation = float(np.float32(multiplier * clip_norm))
    return {
        **_fresh_leaves(_ADAPTIVE_SUM_TREE, _shapes(process), clip_norm, deviation, noise),
        **_fresh_leaves(_BIT_TREE, [()], BIT, float(np.float32(0.05 * report_goal)), noise),
    }


def _adaptive_restart(process: Process, state: Tensors, noise: NoiseSource) -> State:
    return {
        **_restarted(_ADAPTIVE_SUM_TREE, _shapes(process), state, noise),
        **_restarted(_BIT_TREE, [()], state, noise),
    }


def _adaptive_release(process: Process, state: Tensors, total: PartialSum, noise: NoiseSource) -> Aggregated:
    settings = process.adaptive_tree
    names = update_leaves(process, DELTA)
    step = total.steps[names[0]]
    report_goal = float(state[f"{_QUERY}/denominator"])
    values = _read(_ADAPTIVE_SUM_TREE, state, len(names), step)
    noised, next_values = _noised(values, [total.lattice[name] for name in names], step, noise)
    bits = _read(_BIT_TREE, state, 1, BIT_STEP)
    sent = [total.lattice[name] for name in update_leaves(process, BELOW_ESTIMATE)]
    (noised_bits,), next_bits = _noised(bits, sent, BIT_STEP, noise)
    estimate = moved_estimate(
        float(state[f"{_QUANTILE}/current_estimate"]),
        float(noised_bits) * BIT_STEP,
        float(state[f"{_BELOW}/denominator"]),
        float(state[f"{_QUANTILE}/target_quantile"]),
        float(state[f"{_QUANTILE}/learning_rate"]),
    )
    counter = int(state[f"{_FIXED}/indicator_state"]) + 1
    new: State = {
        f"{_QUANTILE}/current_estimate": np.array(estimate, np.float32),
        f"{_FIXED}/indicator_state": np.array(counter, np.int32),
        f"{_INNER}/is_init_state": np.array(False),
    }
    clip_norm = values.clip_norm
    if counter % settings.restart_period == settings.restart_offset:
        clip_norm = float(np.float32(max(estimate, 0.0)))
        multiplier = float(state[f"{_ADAPTIVE}/noise_multiplier"])
        new |= _trees(process, clip_norm, multiplier, report_goal, noise)
    else:
        new |= _leaves(_ADAPTIVE_SUM_TREE, next_values, step) | _leaves(_BIT_TREE, next_bits, BIT_STEP)
    return Aggregated(
        _mean(process, noised, step, report_goal),
        new,
        (
            TreeEvent(values.standard_deviation / values.clip_norm, values.tree.rounds),
            TreeEvent(bits.standard_deviation / BIT, bits.tree.rounds),
        ),
        {
            **dict(zip(_CLIPS, (clip_norm, float(np.float32(estimate))), strict=True)),
            **_zeroing(process, settings.zeroing_norm, total),
        },
    )


TREE_AGGREGATION = Aggregator(
    layout=(("0", METRIC), ("1", DELTA), ("2", ZEROED)),
    release=_tree_release,
    told=(("1", lambda process: process.tree_aggregation.zeroing_norm), ("2", f"{_FIXED}/clip_value")),
    init=_tree_init,
    restart=_tree_restart,
    clip_leaf="client/2",
    fixed_denominator=True,
    stats=_ZEROING,
)
ADAPTIVE_TREE = Aggregator(
    layout=(
        ("0", METRIC),
        ("1/sum_state", DELTA),
        ("1/quantile_estimator_state", BELOW_ESTIMATE),
        ("2", ZEROED),
    ),
    release=_adaptive_release,
    told=(
        ("1", lambda process: process.adaptive_tree.zeroing_norm),
        ("2/sum_params", f"{_ADAPTIVE}/sum_state/clip_value"),
        ("2/quantile_estimator_params/current_estimate", f"{_QUANTILE}/current_estimate"),
        ("2/quantile_estimator_params/below_estimate_params", f"{_BELOW}/numerator_state/clip_value"),
    ),
    init=_adaptive_init,
    restart=_adaptive_restart,
    clip_leaf="client/2/sum_params",
    fixed_denominator=True,
    stats=(*_CLIPS, *_ZEROING),
)
