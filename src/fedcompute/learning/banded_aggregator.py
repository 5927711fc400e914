"""Aggregation with correlated noise: DP-FTRL by a banded matrix factorization (arXiv 2306.08153).

To devices it is a fixed Gaussian. The reference has no such type: what the noise state needs lies in leaves of our own
below `server/fedcompute`.
"""

import numpy as np

from fedcompute.errors import ArtifactInvalid, Reason
from fedcompute.learning.aggregators import (
    DELTA,
    METRIC,
    Aggregated,
    Aggregator,
    Process,
    State,
    event_leaves,
    update_leaves,
)
from fedcompute.privacy.banded import column_norm, next_noise, rounding_bound
from fedcompute.privacy.ledger import BandedEvent
from fedcompute.privacy.noise import NoiseSource
from fedcompute.tensors.partial_sum import PartialSum
from fedcompute.tensors.tree import Tensors, spec_from_proto

_QUERY = "aggregator/query_state"
_CLIP = f"{_QUERY}/numerator_state/l2_norm_clip"
_DEVIATION = f"{_QUERY}/numerator_state/stddev"
_HISTORY = "fedcompute/banded/noise"
_ROUNDS = "fedcompute/banded/rounds"


def _init(process: Process) -> State:
    settings = process.banded_mf
    clip_norm = np.float32(settings.clip_norm)
    return {
        _CLIP: np.array(clip_norm),
        # Of z: what one participation adds to C S has norm clip norm times column norm.
        _DEVIATION: np.array(settings.noise_multiplier * clip_norm * column_norm(settings.coefficients), np.float32),
        f"{_QUERY}/denominator": np.array(settings.report_goal, np.float32),
        **event_leaves("aggregator/dp_event", None),
        "aggregator/is_init_state": np.array(True),
    }


def _restart(process: Process, state: Tensors, noise: NoiseSource) -> State:
    shapes = [spec_from_proto(leaf).shape for leaf in process.trainable]
    bands = len(process.banded_mf.coefficients)
    return {
        **{f"{_HISTORY}/{index}": np.zeros((bands - 1, *shape), np.int64) for index, shape in enumerate(shapes)},
        _ROUNDS: np.array(0, np.int64),
    }


def _release(process: Process, state: Tensors, total: PartialSum, noise: NoiseSource) -> Aggregated:
    coefficients = process.banded_mf.coefficients
    names = update_leaves(process, DELTA)
    step = total.steps[names[0]]
    deviation, denominator = float(state[_DEVIATION]), float(state[f"{_QUERY}/denominator"])
    norm = column_norm(coefficients)
    multiplier = deviation / (float(state[_CLIP]) * norm)
    elements = sum(total.lattice[name].size for name in names)
    # A few millionths more, for what rounding adds to the sensitivity.
    drawn_deviation = deviation / step + multiplier * rounding_bound(elements, len(coefficients))
    new: State = {"aggregator/is_init_state": np.array(False)}
    mean = {}
    for index, name in enumerate(names):
        history = _history(state, f"{_HISTORY}/{index}", (len(coefficients) - 1, *total.lattice[name].shape))
        drawn = next_noise(coefficients, history, drawn_deviation, noise)
        mean[name] = (total.lattice[name] + drawn) * np.float64(step / denominator)
        new[f"{_HISTORY}/{index}"] = np.concatenate([drawn[np.newaxis], history])[: len(coefficients) - 1]
    rounds = int(state[_ROUNDS]) + 1
    new[_ROUNDS] = np.array(rounds, np.int64)
    return Aggregated(mean, new, (BandedEvent(multiplier, len(coefficients), rounds),))


def _history(state: Tensors, name: str, shape: tuple[int, ...]) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    # Without the noise of earlier rounds the next would not be what the accounting takes it for.
    value = state.get(name)
    if value is None or value.shape != shape or value.dtype != np.int64 or _ROUNDS not in state:
        raise ArtifactInvalid(Reason.STATE_MISMATCH, f"the noise of earlier rounds is missing in {name!r}")
    return value


BANDED_MF = Aggregator(
    layout=(("0", METRIC), ("1", DELTA)),
    release=_release,
    told=(("1", _CLIP),),
    init=_init,
    restart=_restart,
    clip_leaf="client/1",
    fixed_denominator=True,
)
