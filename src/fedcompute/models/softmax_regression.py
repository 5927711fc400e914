"""Softmax regression in NumPy: a model that trains on real data where TensorFlow would only be in the way."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Weights = Sequence[NDArray[np.floating]]


def zero_weights(features: int, classes: int) -> list[NDArray[np.float32]]:
    """A matrix [features, classes] and a bias [classes]; the loss is convex, so zeros are as good a start as any."""
    return [np.zeros((features, classes), np.float32), np.zeros(classes, np.float32)]


def local_update(
    weights: Weights, x: NDArray[np.floating], y: NDArray[np.int64], learning_rate: float, steps: int
) -> list[NDArray[np.float64]]:
    """Initial minus final weights after `steps` of gradient descent on all of one device's examples.

    `x`: [n, ...], flattened to [n, features]; `y`: class numbers [n].
    """
    inputs = x.reshape(len(y), -1).astype(np.float64)
    matrix, bias = (weight.astype(np.float64) for weight in weights)
    for _ in range(steps):
        error = _probabilities(inputs @ matrix + bias)
        error[np.arange(len(y)), y] -= 1
        matrix = matrix - learning_rate * inputs.T @ error / len(y)
        bias = bias - learning_rate * error.mean(axis=0)
    return [weights[0] - matrix, weights[1] - bias]


def accuracy(weights: Weights, x: NDArray[np.floating], y: NDArray[np.int64]) -> float:
    """The share of examples whose most probable class is the right one."""
    matrix, bias = weights
    return float(np.mean((x.reshape(len(y), -1) @ matrix + bias).argmax(axis=1) == y))


def _probabilities(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))
