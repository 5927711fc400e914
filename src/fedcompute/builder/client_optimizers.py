"""Optimizers that run on the device, as pairs of functions over plain tensors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import tensorflow as tf

from fedcompute.protos import task_builder_pb2

Tensors = Sequence[tf.Tensor]


@dataclass(frozen=True)
class ClientOptimizer:
    """`init(weights)` gives the state; `update(state, weights, gradients, rate)` gives (state, weights)."""

    init: Callable[[Tensors], tuple[tf.Tensor, ...]]
    update: Callable[[Tensors, Tensors, Tensors, float], tuple[tuple[tf.Tensor, ...], tuple[tf.Tensor, ...]]]


def _sgd_update(
    state: Tensors, weights: Tensors, gradients: Tensors, rate: float
) -> tuple[tuple[tf.Tensor, ...], tuple[tf.Tensor, ...]]:
    return tuple(state), tuple(w - rate * g for w, g in zip(weights, gradients, strict=True))


SGD = ClientOptimizer(init=lambda weights: (), update=_sgd_update)

CLIENT_OPTIMIZERS: Mapping[int, ClientOptimizer] = {task_builder_pb2.Optimizer.SGD: SGD}
