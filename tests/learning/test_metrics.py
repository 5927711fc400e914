"""The server's half of metrics against Keras: summed states in, values out."""

import math

import numpy as np
import pytest

from fedcompute.learning.metrics import METRICS, definition

keras = pytest.importorskip("keras")

CONFUSION = ("true_positives", "true_negatives", "false_positives", "false_negatives")
# Names of the leaves, in the order of the artifacts, as Keras calls its variables.
LEAVES = {
    "auc-roc": CONFUSION,
    "auc-pr": CONFUSION,
    "precision": ("true_positives", "false_positives"),
    "recall": ("true_positives", "false_negatives"),
}
KERAS = {
    "auc-roc": lambda: keras.metrics.AUC(curve="ROC"),
    "auc-pr": lambda: keras.metrics.AUC(curve="PR"),
    "precision": keras.metrics.Precision,
    "recall": keras.metrics.Recall,
    "root_mean_squared_error": keras.metrics.RootMeanSquaredError,
    "mean": keras.metrics.Mean,
}
ALLOWED = [
    "auc-roc",
    "auc-pr",
    "accuracy",
    "binary_accuracy",
    "binary_crossentropy",
    "binary_crossentropy_from_logits",
    "categorical_accuracy",
    "categorical_crossentropy",
    "categorical_crossentropy_from_logits",
    "mean",
    "mean_absolute_error",
    "mean_absolute_percentage_error",
    "mean_squared_error",
    "mean_squared_logarithmic_error",
    "precision",
    "recall",
    "root_mean_squared_error",
    "sparse_categorical_accuracy",
    "sparse_categorical_crossentropy",
    "sparse_categorical_crossentropy_from_logits",
]


def by_keras(name, state):
    """What Keras makes of a state, its variables set by name since their order differs between releases."""
    metric = KERAS[name]()
    variables = {variable.name: variable for variable in metric.variables}
    for leaf, value in zip(LEAVES.get(name, ("total", "count")), state, strict=True):
        variables[leaf].assign(value)
    return float(metric.result())


def finalized(name, state):
    return definition(name).finalize([np.asarray(leaf, np.float64) for leaf in state])


def confusion(scores, labels):
    """Confusion counts per threshold, by plain comparison."""
    thresholds = np.array([-1e-7, *(i / 199 for i in range(1, 199)), 1 + 1e-7])
    over = scores[:, None] > thresholds
    yes = labels[:, None] == 1
    return [np.sum(cell, axis=0) for cell in (yes & over, ~yes & ~over, ~yes & over, yes & ~over)]


def test_the_allow_list_is_the_published_one():
    assert list(METRICS) == ALLOWED


@pytest.mark.parametrize("name", [*ALLOWED, "loss"])
def test_every_state_has_the_leaves_of_the_reference(name):
    shape = (200,) if name.startswith("auc") else (1,) if name in LEAVES else ()
    state = definition(name).state
    assert [leaf.name for leaf in state] == [str(index) for index in range(len(LEAVES.get(name, ("total", "count"))))]
    assert {(leaf.shape, leaf.dtype) for leaf in state} == {(shape, np.dtype(np.float32))}


@pytest.mark.parametrize("name", KERAS)
def test_every_state_fits_the_variables_of_keras(name):
    shapes = {variable.name: tuple(variable.shape) for variable in KERAS[name]().variables}
    leaves = LEAVES.get(name, ("total", "count"))
    assert shapes == {leaf: spec.shape for leaf, spec in zip(leaves, definition(name).state, strict=True)}


@pytest.mark.parametrize("name", ["auc-roc", "auc-pr"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("positives", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("count", [1, 400])
def test_areas_equal_those_of_keras_also_without_positives_or_negatives(name, seed, positives, count):
    rng = np.random.default_rng(seed)
    labels = (rng.random(count) < positives).astype(int)
    scores = np.clip(rng.random(count) * 0.7 + 0.3 * labels, 0, 1)
    state = confusion(scores, labels)
    assert finalized(name, state) == pytest.approx(by_keras(name, state), abs=1e-6)


@pytest.mark.parametrize("name", ["auc-roc", "auc-pr"])
@pytest.mark.parametrize("score", [0.0, 0.5, 1.0])
def test_areas_of_equal_scores_equal_those_of_keras(name, score):
    state = confusion(np.full(10, score), np.arange(10) % 2)
    assert finalized(name, state) == pytest.approx(by_keras(name, state), abs=1e-6)


@pytest.mark.parametrize("name", ["precision", "recall"])
@pytest.mark.parametrize("state", [([3], [5]), ([0], [5]), ([3], [0]), ([0], [0])])
def test_shares_equal_those_of_keras(name, state):
    assert finalized(name, state) == pytest.approx(by_keras(name, state), abs=1e-6)


@pytest.mark.parametrize("name", ["root_mean_squared_error", "mean"])
@pytest.mark.parametrize("state", [(12.5, 7), (0, 7), (0, 0)])
def test_means_equal_those_of_keras(name, state):
    assert finalized(name, state) == pytest.approx(by_keras(name, state), rel=1e-6)


def zeros(name):
    return [np.zeros(leaf.shape) for leaf in definition(name).state]


@pytest.mark.parametrize("name", ALLOWED)
def test_a_sum_of_nothing_is_zero(name):
    assert finalized(name, zeros(name)) == 0.0


def test_the_loss_of_nothing_is_not_a_number():
    assert math.isnan(finalized("loss", zeros("loss")))


@pytest.mark.parametrize("name", [*ALLOWED, "loss"])
@pytest.mark.parametrize("seed", range(5))
def test_sums_that_no_honest_device_sends_give_some_value_and_no_error(name, seed):
    rng = np.random.default_rng(seed)
    state = [rng.choice([-3e38, -1.0, 0.0, 1e-45, 1.0, 3e38], leaf.shape) for leaf in definition(name).state]
    assert isinstance(finalized(name, state), float)
