"""Adaptive Gaussian aggregation: a fixed Gaussian whose clip norm follows the devices (spec/artifacts.md 9.2)."""

import numpy as np

from fedcompute.learning.aggregators import (
    BELOW_ESTIMATE,
    DELTA,
    METRIC,
    Aggregated,
    Aggregator,
    Process,
    State,
    event_leaves,
    update_leaves,
)
from fedcompute.privacy.adaptive import BIT, BIT_STEP, moved_estimate, split_noise
from fedcompute.privacy.gaussian import FixedGaussian
from fedcompute.privacy.lattice import Lattice, add_noise
from fedcompute.privacy.ledger import GaussianEvent
from fedcompute.privacy.noise import NoiseSource
from fedcompute.tensors.partial_sum import PartialSum
from fedcompute.tensors.tree import Tensors

_QUERY = "aggregator/query_state"
_SUM = f"{_QUERY}/numerator_state/sum_state"
_QUANTILE = f"{_QUERY}/numerator_state/quantile_estimator_state"
_BELOW = f"{_QUANTILE}/below_estimate_state"


def _init(process: Process) -> State:
    settings = process.adaptive_gaussian
    split = split_noise(settings.noise_multiplier, settings.report_goal)
    return {
        f"{_QUERY}/numerator_state/noise_multiplier": np.array(split.value_multiplier, np.float32),
        f"{_SUM}/l2_norm_clip": np.array(settings.initial_clip_norm, np.float32),
        f"{_SUM}/stddev": np.array(split.value_multiplier * settings.initial_clip_norm, np.float32),
        f"{_QUANTILE}/current_estimate": np.array(settings.initial_clip_norm, np.float32),
        f"{_QUANTILE}/target_quantile": np.array(settings.target_quantile, np.float32),
        f"{_QUANTILE}/learning_rate": np.array(settings.learning_rate, np.float32),
        f"{_BELOW}/numerator_state/l2_norm_clip": np.array(BIT, np.float32),
        f"{_BELOW}/numerator_state/stddev": np.array(split.bit_deviation, np.float32),
        f"{_BELOW}/denominator": np.array(settings.report_goal, np.float32),
        f"{_QUERY}/denominator": np.array(settings.report_goal, np.float32),
        **_events(split.value_multiplier, split.bit_deviation),
        "aggregator/is_init_state": np.array(True),
    }


def _events(value_multiplier: float, bit_deviation: float) -> State:
    prefix = "aggregator/dp_event"
    return {
        f"{prefix}/module_name": np.array(b"dp_accounting.dp_event", object),
        f"{prefix}/class_name": np.array(b"ComposedDpEvent", object),
        **event_leaves(f"{prefix}/events/0", value_multiplier),
        **event_leaves(f"{prefix}/events/1", bit_deviation / BIT),
    }


def _release(process: Process, state: Tensors, total: PartialSum, noise: NoiseSource) -> Aggregated:
    multiplier = float(state[f"{_QUERY}/numerator_state/noise_multiplier"])
    mechanism = FixedGaussian(
        clip_norm=float(state[f"{_SUM}/l2_norm_clip"]),
        standard_deviation=float(state[f"{_SUM}/stddev"]),
        report_goal=float(state[f"{_QUERY}/denominator"]),
    )
    names = update_leaves(process, DELTA)
    mean = mechanism.release({name: total.lattice[name] for name in names}, Lattice(total.steps[names[0]]), noise)
    (bits,) = (total.lattice[name] for name in update_leaves(process, BELOW_ESTIMATE))
    deviation = float(state[f"{_BELOW}/numerator_state/stddev"])
    noised = add_noise(bits, deviation, Lattice(BIT_STEP), noise)
    estimate = moved_estimate(
        float(state[f"{_QUANTILE}/current_estimate"]),
        float(noised) * BIT_STEP,
        float(state[f"{_BELOW}/denominator"]),
        float(state[f"{_QUANTILE}/target_quantile"]),
        float(state[f"{_QUANTILE}/learning_rate"]),
    )
    clip_norm = np.float32(max(estimate, 0.0))
    new: State = {
        f"{_SUM}/l2_norm_clip": np.array(clip_norm),
        f"{_SUM}/stddev": np.array(multiplier * clip_norm, np.float32),
        f"{_QUANTILE}/current_estimate": np.array(estimate, np.float32),
        **_events(multiplier, deviation),
        "aggregator/is_init_state": np.array(False),
    }
    events = (GaussianEvent(multiplier), GaussianEvent(deviation / BIT))
    return Aggregated(mean, new, events, {"aggregator/dp_query_metrics/clip": float(clip_norm)})


ADAPTIVE_GAUSSIAN = Aggregator(
    layout=(("0", METRIC), ("1/sum_state", DELTA), ("1/quantile_estimator_state", BELOW_ESTIMATE)),
    release=_release,
    told=(
        ("1/sum_params", f"{_SUM}/l2_norm_clip"),
        ("1/quantile_estimator_params/current_estimate", f"{_QUANTILE}/current_estimate"),
        ("1/quantile_estimator_params/below_estimate_params", f"{_BELOW}/numerator_state/l2_norm_clip"),
    ),
    init=_init,
    clip_leaf="client/1/sum_params",
    fixed_denominator=True,
    stats=("aggregator/dp_query_metrics/clip",),
)
