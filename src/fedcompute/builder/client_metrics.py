"""The device half of metrics: how one batch changes a metric's state (spec/artifacts.md 10).

The state's leaves and their finalizer are those of `learning.metrics`; here is only the arithmetic, in operations that
devices have. Values per example equal those of Keras 3; labels and outputs that are plain vectors count as columns.
"""

from collections.abc import Callable, Mapping, Sequence

import tensorflow as tf

from fedcompute.builder import confusion_metrics, crossentropy_metrics
from fedcompute.builder.metric_batch import Batch, classes, distributions, pair, shape_of
from fedcompute.errors import ArtifactInvalid, Reason

State = Sequence[tf.Tensor]
MetricUpdate = Callable[[State, Batch], tuple[tf.Tensor, ...]]


def update_metrics(names: Sequence[str], states: Sequence[State], batch: Batch) -> tuple[tuple[tf.Tensor, ...], ...]:
    """The states after one more batch, for metrics of `METRIC_UPDATES`.

    Raises ArtifactInvalid (MODEL_UNSUPPORTED) that names every metric which the model's labels and outputs cannot
    feed, with the reason.
    """
    updated = []
    misfits: dict[str, list[str]] = {}
    for name, state in zip(names, states, strict=True):
        try:
            updated.append(METRIC_UPDATES[name](state, batch))
        # TensorFlow's own checks of shapes and types are reasons as good as ours.
        except (ValueError, TypeError, tf.errors.InvalidArgumentError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            misfits.setdefault(reason, []).append(repr(name))
    if misfits:
        refused = "; ".join(f"cannot measure {', '.join(who)} on this model: {why}" for why, who in misfits.items())
        outputs = " and ".join(map(shape_of, batch.outputs))
        raise ArtifactInvalid(
            Reason.MODEL_UNSUPPORTED,
            f"{refused} (labels {shape_of(batch.label)}, outputs {outputs})",
            remedy="leave the metric out, or change the model's output or labels",
        )
    return tuple(updated)


def loss(state: State, batch: Batch) -> tuple[tf.Tensor, ...]:
    """State: (sum of batch loss times n, sum of n), float32 scalars."""
    return state[0] + batch.loss * batch.size, state[1] + batch.size


def _mean(values: Callable[[Batch], tf.Tensor]) -> MetricUpdate:
    """A metric with state (total, count), float32 scalars: the mean over examples of each one's mean of `values`."""

    def update(state: State, batch: Batch) -> tuple[tf.Tensor, ...]:
        of_batch = tf.cast(values(batch), tf.float32)
        inner = list(range(1, of_batch.shape.rank))
        per_example = tf.reduce_mean(of_batch, axis=inner) if inner else of_batch
        count = tf.cast(tf.shape(per_example)[0], tf.float32)
        return state[0] + tf.reduce_sum(per_example), state[1] + count

    return update


def _counts(counts: Callable[[Batch], tuple[tf.Tensor, ...]]) -> MetricUpdate:
    """A metric whose state is a tuple of counts that batches add to."""

    def update(state: State, batch: Batch) -> tuple[tf.Tensor, ...]:
        return tuple(before + more for before, more in zip(state, counts(batch), strict=True))

    return update


def _equal(batch: Batch) -> tf.Tensor:
    return tf.equal(*pair(batch))


def _binary_matches(batch: Batch) -> tf.Tensor:
    """Whether an output is on the right side of 0.5, [n, ...]."""
    label, prediction = pair(batch)
    return tf.equal(label, tf.cast(prediction > 0.5, tf.float32))


def _matches(batch: Batch) -> tf.Tensor:
    """Whether the largest output is where the largest label is, [n, ...]."""
    label, prediction = distributions(batch)
    return tf.equal(tf.argmax(label, axis=-1), tf.argmax(prediction, axis=-1))


def _sparse_matches(batch: Batch) -> tf.Tensor:
    """Whether the largest output is that of the class number in the label, [n, ...]."""
    label, prediction = classes(batch)
    return tf.equal(label, tf.cast(tf.argmax(prediction, axis=-1), tf.float32))


def _predictions(batch: Batch) -> tf.Tensor:
    return batch.prediction


def _absolute(batch: Batch) -> tf.Tensor:
    label, prediction = pair(batch)
    return tf.abs(label - prediction)


def _percentage(batch: Batch) -> tf.Tensor:
    label, prediction = pair(batch)
    return 100.0 * tf.abs((label - prediction) / tf.maximum(tf.abs(label), crossentropy_metrics.EPSILON))


def _squared(batch: Batch) -> tf.Tensor:
    label, prediction = pair(batch)
    return tf.square(label - prediction)


def _squared_logarithmic(batch: Batch) -> tf.Tensor:
    label, prediction = (tf.math.log(tf.maximum(v, crossentropy_metrics.EPSILON) + 1) for v in pair(batch))
    return tf.square(label - prediction)


METRIC_UPDATES: Mapping[str, MetricUpdate] = {
    "auc-roc": _counts(confusion_metrics.confusion_by_threshold),
    "auc-pr": _counts(confusion_metrics.confusion_by_threshold),
    "accuracy": _mean(_equal),
    "binary_accuracy": _mean(_binary_matches),
    "binary_crossentropy": _mean(crossentropy_metrics.binary),
    "binary_crossentropy_from_logits": _mean(crossentropy_metrics.binary_from_logits),
    "categorical_accuracy": _mean(_matches),
    "categorical_crossentropy": _mean(crossentropy_metrics.categorical),
    "categorical_crossentropy_from_logits": _mean(crossentropy_metrics.categorical_from_logits),
    "mean": _mean(_predictions),
    "mean_absolute_error": _mean(_absolute),
    "mean_absolute_percentage_error": _mean(_percentage),
    "mean_squared_error": _mean(_squared),
    "mean_squared_logarithmic_error": _mean(_squared_logarithmic),
    "precision": _counts(confusion_metrics.precision),
    "recall": _counts(confusion_metrics.recall),
    "root_mean_squared_error": _mean(_squared),
    "sparse_categorical_accuracy": _mean(_sparse_matches),
    "sparse_categorical_crossentropy": _mean(crossentropy_metrics.sparse_categorical),
    "sparse_categorical_crossentropy_from_logits": _mean(crossentropy_metrics.sparse_categorical_from_logits),
    "loss": loss,
}
