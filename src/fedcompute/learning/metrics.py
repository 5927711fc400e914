"""Metrics: the state that devices add up and how a sum becomes a number (spec/artifacts.md 10).

The update half, which runs on the device, is in the builder; both are found under the same name.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedcompute.tensors.tree import LeafSpec

Finalizer = Callable[[Sequence[NDArray[np.float64]]], float]


@dataclass(frozen=True)
class MetricDefinition:
    """A metric's name in configurations and artifacts, its state leaves in order, and its finalizer.

    The finalizer takes the summed state, one float64 array per leaf, and returns the value.
    """

    name: str
    state: tuple[LeafSpec, ...]
    finalize: Finalizer


def _mean(state: Sequence[NDArray[np.float64]]) -> float:
    total, count = (float(leaf) for leaf in state)
    return total / count if count else 0.0


def _loss(state: Sequence[NDArray[np.float64]]) -> float:
    total, count = (float(leaf) for leaf in state)
    return total / count if count else math.nan


_TOTAL_AND_COUNT = (LeafSpec("0", (), np.dtype(np.float32)), LeafSpec("1", (), np.dtype(np.float32)))

# Always tracked, always last.
LOSS = MetricDefinition("loss", _TOTAL_AND_COUNT, _loss)

METRICS: Mapping[str, MetricDefinition] = {
    name: MetricDefinition(name, _TOTAL_AND_COUNT, _mean) for name in ("binary_accuracy", "sparse_categorical_accuracy")
}


def definition(name: str) -> MetricDefinition:
    """The definition of an accepted metric or of `loss`; KeyError for another name."""
    return LOSS if name == LOSS.name else METRICS[name]
