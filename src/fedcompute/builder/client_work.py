"""What a device does with its batches: one entry per algorithm (spec/artifacts.md 8)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from fedcompute.builder.client_metrics import update_metrics
from fedcompute.builder.client_optimizers import ClientOptimizer
from fedcompute.builder.metric_batch import Batch
from fedcompute.models.functional_model import FunctionalModel
from fedcompute.protos import learning_pb2

Tensors = tuple[tf.Tensor, ...]


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
    """What comes out: deltas in trainable order (none for an evaluation), metric states in metric order."""

    deltas: Tensors
    metrics: Sequence[Tensors]


def federated_averaging(work: Work, weights: Weights, batches: tf.data.Dataset) -> WorkResult:
    """One pass of local training; delta is weights before minus weights after, all zero unless all are finite."""

    @tf.autograph.experimental.do_not_convert  # type: ignore[untyped-decorator]
    def train(state: Any, batch: Any) -> Any:
        trained, optimizer_state, metrics = state
        x, label = batch
        with tf.GradientTape() as tape:
            tape.watch(trained)
            output = work.model.predict_on_batch((trained, weights.non_trainable), x, training=True)
            batch_loss = work.model.loss(output, label)
        gradients = [
            tf.zeros_like(w) if g is None else tf.convert_to_tensor(g)
            for w, g in zip(trained, tape.gradient(batch_loss, trained), strict=True)
        ]
        optimizer_state, trained = work.optimizer.update(optimizer_state, trained, gradients, work.learning_rate)
        return trained, optimizer_state, _measure(work, metrics, output, label, batch_loss)

    start = (weights.trainable, work.optimizer.init(weights.trainable), _zeros(work))
    trained, _, metrics = batches.reduce(start, train)
    deltas = tuple(before - after for before, after in zip(weights.trainable, trained, strict=True))
    return WorkResult(_zero_unless_finite(deltas), metrics)


def evaluation(work: Work, weights: Weights, batches: tf.data.Dataset) -> WorkResult:
    """One pass that measures the received model and changes nothing."""

    @tf.autograph.experimental.do_not_convert  # type: ignore[untyped-decorator]
    def measure(metrics: Any, batch: Any) -> Any:
        x, label = batch
        output = work.model.predict_on_batch((weights.trainable, weights.non_trainable), x, training=False)
        return _measure(work, metrics, output, label, work.model.loss(output, label))

    return WorkResult((), batches.reduce(_zeros(work), measure))


ALGORITHMS: Mapping[int, Callable[[Work, Weights, tf.data.Dataset], WorkResult]] = {
    learning_pb2.LearningProcess.FED_AVG: federated_averaging,
}


def _zeros(work: Work) -> tuple[Tensors, ...]:
    return tuple(tuple(tf.zeros(s.shape, s.dtype) for s in metric.state) for metric in work.metrics)


def _measure(work: Work, states: Any, output: Any, label: tf.Tensor, batch_loss: tf.Tensor) -> tuple[Tensors, ...]:
    outputs = tuple(tf.nest.flatten(output))
    batch = Batch(label, outputs, tf.cast(batch_loss, tf.float32))
    return update_metrics([metric.name for metric in work.metrics], states, batch)


def _zero_unless_finite(deltas: Tensors) -> Tensors:
    # A select per leaf: branches would need identities, and no phone has a kernel for those.
    finite = tf.reduce_all(tf.stack([tf.reduce_all(tf.math.is_finite(delta)) for delta in deltas]))
    return tuple(tf.where(finite, delta, tf.zeros_like(delta)) for delta in deltas)
