"""Confusion counts: how often scores over a threshold meet labels 0 and 1 (spec/artifacts.md 10.2)."""

import tensorflow as tf

from fedcompute.builder.metric_batch import Batch, pair
from fedcompute.learning.auc import THRESHOLDS

_Counts = tuple[tf.Tensor, ...]


def precision(batch: Batch) -> _Counts:
    """True positives and false positives at threshold 0.5, float32 [1] each."""
    yes, score = _flat(batch)
    predicted = tf.cast(score > 0.5, tf.float32)
    return _sum(yes * predicted), _sum((1 - yes) * predicted)


def recall(batch: Batch) -> _Counts:
    """True positives and false negatives at threshold 0.5, float32 [1] each."""
    yes, score = _flat(batch)
    predicted = tf.cast(score > 0.5, tf.float32)
    return _sum(yes * predicted), _sum(yes * (1 - predicted))


def confusion_by_threshold(batch: Batch) -> _Counts:
    """True positives, true negatives, false positives, false negatives, float32 [THRESHOLDS] each.

    Threshold k lies at k / (THRESHOLDS - 1), the first a little below 0 and the last a little above 1. Scores outside
    of 0 to 1 count as 0 or 1.
    """
    yes, score = _flat(batch)
    steps = tf.clip_by_value(score, 0.0, 1.0) * (THRESHOLDS - 1)
    # Rounding first and comparing whole numbers puts a score that equals a threshold where Keras puts it.
    last_passed = tf.maximum(tf.math.ceil(steps) - 1, 0.0)
    passed = tf.cast(last_passed[:, tf.newaxis] >= tf.range(THRESHOLDS, dtype=tf.float32), tf.float32)
    # One product of matrices, since products of whole columns would need the memory of `passed` twice more.
    by_class = tf.matmul(tf.stack([yes, 1 - yes]), passed)
    true_positives, false_positives = by_class[0], by_class[1]
    return true_positives, _sum(1 - yes) - false_positives, false_positives, _sum(yes) - true_positives


def _flat(batch: Batch) -> tuple[tf.Tensor, tf.Tensor]:
    """Whether the label is other than 0, as 0 and 1, and the score: [m] each, over all outputs of all examples."""
    label, prediction = pair(batch)
    yes = tf.cast(tf.not_equal(label, 0.0), tf.float32)
    return tf.reshape(yes, [-1]), tf.reshape(prediction, [-1])


def _sum(values: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(values, axis=0, keepdims=True)
