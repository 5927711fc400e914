"""Cross-entropies from operations that devices have, equal to those of Keras (spec/artifacts.md 4.1, 10.3)."""

import math

import tensorflow as tf

from fedcompute.builder.metric_batch import Batch, Misfit, classes, distributions, pair

# Keras keeps probabilities this far from 0 and 1 before it takes their logarithm.
EPSILON = 1e-7


def binary(batch: Batch) -> tf.Tensor:
    """Of probabilities and labels 0 or 1, [n, ...]."""
    label, prediction = pair(batch)
    probability = _clipped(prediction)
    return -(label * tf.math.log(probability) + (1 - label) * tf.math.log(1 - probability))


def binary_from_logits(batch: Batch) -> tf.Tensor:
    """Of logits and labels 0 or 1, [n, ...]; no logit is too large."""
    label, logit = pair(batch)
    return tf.maximum(logit, 0.0) - logit * label + tf.math.log(1 + tf.exp(-tf.abs(logit)))


def categorical(batch: Batch) -> tf.Tensor:
    """Of probabilities, which are scaled to the sum 1, and one-hot labels, [n, ...]."""
    label, prediction = distributions(batch)
    total = tf.reduce_sum(prediction, axis=-1, keepdims=True)
    # Scores that are all 0 would make the metric, and with it the device's whole contribution, not a number.
    shares = prediction / tf.where(tf.equal(total, 0.0), 1.0, total)
    return -tf.reduce_sum(label * tf.math.log(_clipped(shares)), axis=-1)


def categorical_from_logits(batch: Batch) -> tf.Tensor:
    """Of logits and one-hot labels, [n, ...]."""
    label, logits = distributions(batch)
    return -tf.reduce_sum(label * tf.nn.log_softmax(logits), axis=-1)


def sparse_categorical(batch: Batch) -> tf.Tensor:
    """Of probabilities and class numbers, [n, ...]."""
    label, prediction = _several_classes(batch)
    return _sparse(label, tf.math.log(_clipped(prediction)))


def sparse_categorical_from_logits(batch: Batch) -> tf.Tensor:
    """Of logits and class numbers, [n, ...]."""
    return _sparse(*_several_classes(batch))


def _sparse(label: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """[n, ...]; NaN for a label that is no class, so that such data is refused and not counted as a perfect hit."""
    hot = tf.equal(label[..., tf.newaxis], tf.range(logits.shape[-1], dtype=tf.float32))
    # A select, not a product: a class that is ruled out has the logit -inf.
    of_label = tf.reduce_sum(tf.where(hot, tf.nn.log_softmax(logits), 0.0), axis=-1)
    return tf.where(tf.reduce_any(hot, axis=-1), -of_label, math.nan)


def _several_classes(batch: Batch) -> tuple[tf.Tensor, tf.Tensor]:
    label, prediction = classes(batch)
    if prediction.shape[-1] < 2:
        raise Misfit("one output per example names no class; for yes or no take binary_crossentropy")
    return label, prediction


def _clipped(probability: tf.Tensor) -> tf.Tensor:
    return tf.clip_by_value(probability, EPSILON, 1 - EPSILON)
