"""Areas under curves from confusion counts at fixed thresholds (spec/artifacts.md 10.1, 10.2)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.float64]

# Scores above threshold k count as positive at k: one threshold below 0, one above 1, the rest evenly between.
THRESHOLDS = 200


def roc_area(state: Sequence[Counts]) -> float:
    """The area under recall over false positive rate, by trapezoids.

    `state`: true positives, true negatives, false positives, false negatives, [THRESHOLDS] each. A rate without
    examples counts as 0, so data of a single class has area 0.
    """
    true_positives, true_negatives, false_positives, false_negatives = state
    recall = _ratio(true_positives, true_positives + false_negatives)
    false_rate = _ratio(false_positives, false_positives + true_negatives)
    return float(np.sum((false_rate[:-1] - false_rate[1:]) * (recall[:-1] + recall[1:]) / 2))


def precision_recall_area(state: Sequence[Counts]) -> float:
    """The area under precision over recall, with counts interpolated between thresholds. State as in `roc_area`.

    Between two thresholds true positives grow linearly with predicted positives, which makes precision a hyperbola,
    integrated in closed form (Davis and Goadrich 2006, section 4).
    """
    true_positives, _, false_positives, false_negatives = state
    predicted = true_positives + false_positives
    gained = true_positives[:-1] - true_positives[1:]
    slope = _ratio(gained, np.maximum(predicted[:-1] - predicted[1:], 0))
    intercept = true_positives[1:] - slope * predicted[1:]
    growth = np.ones_like(slope)
    both = (predicted[:-1] > 0) & (predicted[1:] > 0)
    np.divide(predicted[:-1], predicted[1:], out=growth, where=both)
    positives = np.maximum(true_positives[1:] + false_negatives[1:], 0)
    return float(np.sum(_ratio(slope * (gained + intercept * np.log(growth)), positives)))


def _ratio(numerator: Counts, denominator: Counts) -> Counts:
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator != 0)
