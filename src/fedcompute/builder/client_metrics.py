"""The device half of metrics: how one batch changes a metric's state (spec/artifacts.md 10).

The state's leaves and their finalizer are those of `learning.metrics`; here is only the arithmetic in TensorFlow.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import tensorflow as tf

State = Sequence[tf.Tensor]


@dataclass(frozen=True)
class Batch:
    """What a metric sees of a batch of n examples."""

    label: tf.Tensor  # [n, ...]
    prediction: tf.Tensor  # [n, ...]
    loss: tf.Tensor  # scalar, float32
    size: tf.Tensor  # scalar, float32: n


MetricUpdate = Callable[[State, Batch], tuple[tf.Tensor, ...]]


def loss(state: State, batch: Batch) -> tuple[tf.Tensor, ...]:
    """State: (sum of batch loss times n, sum of n), float32 scalars."""
    return state[0] + batch.loss * batch.size, state[1] + batch.size


def _mean(values: Callable[[Batch], tf.Tensor]) -> MetricUpdate:
    """A metric with state (total, count), float32 scalars, that averages one value per example."""

    def update(state: State, batch: Batch) -> tuple[tf.Tensor, ...]:
        per_example = tf.cast(values(batch), tf.float32)
        count = tf.cast(tf.reduce_prod(tf.shape(per_example)), tf.float32)
        return state[0] + tf.reduce_sum(per_example), state[1] + count

    return update


def _binary_matches(batch: Batch) -> tf.Tensor:
    """Share of outputs on the right side of 0.5, [n]."""
    prediction = _with_columns(batch.prediction)
    label = tf.cast(_with_columns(batch.label), prediction.dtype)
    # Broadcasting would compare one label with every output and count nonsense.
    prediction.shape.assert_is_compatible_with(label.shape)
    right = tf.equal(label, tf.cast(prediction > 0.5, prediction.dtype))
    return tf.reduce_mean(tf.cast(right, tf.float32), axis=-1)


def _sparse_matches(batch: Batch) -> tf.Tensor:
    """Whether the largest output is that of the class number in the label, [n, ...]."""
    label = batch.label
    if batch.prediction.shape.rank == 1:
        raise ValueError("one number per example names no class")
    if label.shape.rank == batch.prediction.shape.rank and label.shape[-1] == 1:
        label = tf.squeeze(label, axis=-1)
    best = tf.argmax(batch.prediction, axis=-1, output_type=tf.int64)
    return tf.equal(tf.cast(label, tf.int64), best)


def _with_columns(values: tf.Tensor) -> tf.Tensor:
    return values[:, tf.newaxis] if values.shape.rank == 1 else values


METRIC_UPDATES: Mapping[str, MetricUpdate] = {
    "binary_accuracy": _mean(_binary_matches),
    "sparse_categorical_accuracy": _mean(_sparse_matches),
    "loss": loss,
}
