"""What a device does with its batches: one entry per algorithm (spec/artifacts.md 8)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import tensorflow as tf

from fedcompute.builder.client_metrics import update_metrics
from fedcompute.builder.client_optimizers import ClientOptimizer
from fedcompute.builder.metric_batch import Batch
from fedcompute.models.functional_model import FunctionalModel
from fedcompute.protos import learning_pb2

Tensors = tuple[tf.Tensor, ...]


class Batches(Protocol):
    """A device's batches in order, each a pair (x, label): a `tf.data.Dataset`, or slices of arrays in memory."""

    def reduce(self, initial_state: Any, reduce_func: Any) -> Any:
        """The state after `reduce_func(state, batch)` of every batch; states are nests of tensors of fixed shapes."""


@dataclass(frozen=True)
class Weights:
    """The model that the device received."""

    trainable: Tensors
    non_trainable: Tensors


@dataclass(frozen=True)
class MetricSpec:
    """A metric's name and the specs of its state, in the order of its update function."""

    name: str
    state: tuple[tf.TensorSpec, ...]


@dataclass(frozen=True)
class Work:
    """What is asked of the device."""

    model: FunctionalModel
    metrics: Sequence[MetricSpec]
    optimizer: ClientOptimizer
    learning_rate: float


@dataclass(frozen=True)
class WorkResult:
    """What comes out: deltas in trainable order (none for an evaluation), metric states in metric order.

    `weight`: float32 number of examples behind the delta, for algorithms that weigh devices by it.
    """

    deltas: Tensors
    metrics: Sequence[Tensors]
    weight: tf.Tensor | None = None


def federated_averaging(work: Work, weights: Weights, batches: Batches) -> WorkResult:
    """One pass of local training; delta is weights before minus weights after, all zero unless all are finite."""

    @tf.autograph.experimental.do_not_convert  # type: ignore[untyped-decorator]
    def train(state: Any, batch: Any) -> Any:
        trained, optimizer_state, metrics = state
        gradients, output, label, batch_loss = _gradients(work, trained, weights.non_trainable, batch)
        optimizer_state, trained = work.optimizer.update(optimizer_state, trained, gradients, work.learning_rate)
        return trained, optimizer_state, _measure(work, metrics, output, label, batch_loss)

    start = (weights.trainable, work.optimizer.init(weights.trainable), _zeros(work))
    trained, _, metrics = batches.reduce(start, train)
    deltas = tuple(before - after for before, after in zip(weights.trainable, trained, strict=True))
    return WorkResult(_where_finite(deltas, deltas)[0], metrics)


def federated_sgd(work: Work, weights: Weights, batches: Batches) -> WorkResult:
    """The gradient at the received weights, averaged over the examples; zero with weight zero unless finite.

    The client optimizer has no part in it. A device without examples has 0/0, and so weight 0.
    """

    @tf.autograph.experimental.do_not_convert  # type: ignore[untyped-decorator]
    def accumulate(state: Any, batch: Any) -> Any:
        sums, examples, metrics = state
        gradients, output, label, batch_loss = _gradients(work, weights.trainable, weights.non_trainable, batch)
        size = _batch_size(output)
        sums = tuple(total + size * g for total, g in zip(sums, gradients, strict=True))
        return sums, examples + size, _measure(work, metrics, output, label, batch_loss)

    start = (tuple(tf.zeros_like(w) for w in weights.trainable), tf.constant(0.0), _zeros(work))
    sums, examples, metrics = batches.reduce(start, accumulate)
    deltas = tuple(total / examples for total in sums)
    deltas, (weight,) = _where_finite(deltas, deltas, (examples,))
    return WorkResult(deltas, metrics, weight)


def evaluation(work: Work, weights: Weights, batches: Batches) -> WorkResult:
    """One pass that measures the received model and changes nothing."""

    @tf.autograph.experimental.do_not_convert  # type: ignore[untyped-decorator]
    def measure(metrics: Any, batch: Any) -> Any:
        x, label = batch
        output = work.model.predict_on_batch((weights.trainable, weights.non_trainable), x, training=False)
        return _measure(work, metrics, output, label, work.model.loss(output, label))

    return WorkResult((), batches.reduce(_zeros(work), measure))


ALGORITHMS: Mapping[int, Callable[[Work, Weights, Batches], WorkResult]] = {
    learning_pb2.LearningProcess.FED_AVG: federated_averaging,
    learning_pb2.LearningProcess.FED_SGD: federated_sgd,
}


def _gradients(work: Work, trainable: Tensors, non_trainable: Tensors, batch: Any) -> tuple[Tensors, Any, Any, Any]:
    """Gradients of one batch's loss in trainable order, with output, label and loss."""
    x, label = batch
    with tf.GradientTape() as tape:
        tape.watch(trainable)
        output = work.model.predict_on_batch((trainable, non_trainable), x, training=True)
        batch_loss = work.model.loss(output, label)
    gradients = tuple(
        tf.zeros_like(w) if g is None else tf.convert_to_tensor(g)
        for w, g in zip(trainable, tape.gradient(batch_loss, trainable), strict=True)
    )
    return gradients, output, label, batch_loss


def _batch_size(output: Any) -> tf.Tensor:
    return tf.cast(tf.shape(tf.nest.flatten(output)[0])[0], tf.float32)


def _zeros(work: Work) -> tuple[Tensors, ...]:
    return tuple(tuple(tf.zeros(s.shape, s.dtype) for s in metric.state) for metric in work.metrics)


def _measure(work: Work, states: Any, output: Any, label: tf.Tensor, batch_loss: tf.Tensor) -> tuple[Tensors, ...]:
    outputs = tuple(tf.nest.flatten(output))
    batch = Batch(label, outputs, tf.cast(batch_loss, tf.float32))
    return update_metrics([metric.name for metric in work.metrics], states, batch)


def _where_finite(judged: Tensors, *groups: Tensors) -> tuple[Tensors, ...]:
    """Each group as it is if every element of `judged` is finite, else zeros."""
    # A select per leaf: branches would need identities, and no phone has a kernel for those.
    finite = tf.reduce_all(tf.stack([tf.reduce_all(tf.math.is_finite(leaf)) for leaf in judged]))
    return tuple(tuple(tf.where(finite, leaf, tf.zeros_like(leaf)) for leaf in group) for group in groups)
