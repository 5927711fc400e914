"""Metrics: the state that devices add up and how a sum becomes a number (spec/artifacts.md 10).

The update half, which runs on the device, is in the builder; both are found under the same name.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedcompute.learning.auc import THRESHOLDS, precision_recall_area, roc_area
from fedcompute.tensors.tree import LeafSpec

Finalizer = Callable[[Sequence[NDArray[np.float64]]], float]


@dataclass(frozen=True)
class MetricDefinition:
    """A metric's name in configurations and artifacts, its state leaves in order, and its finalizer.

    The finalizer takes the summed state, one float64 array per leaf, and returns the value. It returns 0 where there
    is nothing to divide by and accepts any finite sums, since devices are free to send any.
    """

    name: str
    state: tuple[LeafSpec, ...]
    finalize: Finalizer


def _mean(state: Sequence[NDArray[np.float64]]) -> float:
    total, count = (float(leaf) for leaf in state)
    return total / count if count else 0.0


def _root_mean(state: Sequence[NDArray[np.float64]]) -> float:
    mean = _mean(state)
    return math.sqrt(mean) if mean >= 0 else math.nan


def _share(state: Sequence[NDArray[np.float64]]) -> float:
    """Precision of (true, false positives), recall of (true positives, false negatives), [1] each."""
    right, wrong = (float(leaf[0]) for leaf in state)
    return right / (right + wrong) if right + wrong else 0.0


def _loss(state: Sequence[NDArray[np.float64]]) -> float:
    total, count = (float(leaf) for leaf in state)
    return total / count if count else math.nan


def _leaves(count: int, shape: tuple[int, ...]) -> tuple[LeafSpec, ...]:
    return tuple(LeafSpec(str(index), shape, np.dtype(np.float32)) for index in range(count))


_TOTAL_AND_COUNT = _leaves(2, ())
_TWO_COUNTS = _leaves(2, (1,))
# True positives, true negatives, false positives, false negatives: the order of Keras 2.14. Keras 3 has another.
_CONFUSION = _leaves(4, (THRESHOLDS,))

# Always tracked, always last.
LOSS = MetricDefinition("loss", _TOTAL_AND_COUNT, _loss)

# What a configuration may name: all that is ever released about devices beside the model and the loss.
METRICS: Mapping[str, MetricDefinition] = {
    name: MetricDefinition(name, state, finalize)
    for name, state, finalize in (
        ("auc-roc", _CONFUSION, roc_area),
        ("auc-pr", _CONFUSION, precision_recall_area),
        ("accuracy", _TOTAL_AND_COUNT, _mean),
        ("binary_accuracy", _TOTAL_AND_COUNT, _mean),
        ("binary_crossentropy", _TOTAL_AND_COUNT, _mean),
        ("binary_crossentropy_from_logits", _TOTAL_AND_COUNT, _mean),
        ("categorical_accuracy", _TOTAL_AND_COUNT, _mean),
        ("categorical_crossentropy", _TOTAL_AND_COUNT, _mean),
        ("categorical_crossentropy_from_logits", _TOTAL_AND_COUNT, _mean),
        ("mean", _TOTAL_AND_COUNT, _mean),
        ("mean_absolute_error", _TOTAL_AND_COUNT, _mean),
        ("mean_absolute_percentage_error", _TOTAL_AND_COUNT, _mean),
        ("mean_squared_error", _TOTAL_AND_COUNT, _mean),
        ("mean_squared_logarithmic_error", _TOTAL_AND_COUNT, _mean),
        ("precision", _TWO_COUNTS, _share),
        ("recall", _TWO_COUNTS, _share),
        ("root_mean_squared_error", _TOTAL_AND_COUNT, _root_mean),
        ("sparse_categorical_accuracy", _TOTAL_AND_COUNT, _mean),
        ("sparse_categorical_crossentropy", _TOTAL_AND_COUNT, _mean),
        ("sparse_categorical_crossentropy_from_logits", _TOTAL_AND_COUNT, _mean),
    )
}


def definition(name: str) -> MetricDefinition:
    """The definition of an accepted metric or of `loss`; KeyError for another name."""
    return LOSS if name == LOSS.name else METRICS[name]
