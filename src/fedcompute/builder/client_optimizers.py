"""Optimizers that run on the device, as pairs of functions over plain tensors."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import tensorflow as tf

from fedcompute.protos import task_builder_pb2

Tensors = Sequence[tf.Tensor]

_BETA_1, _BETA_2, _EPSILON = 0.9, 0.999, 1e-7


@dataclass(frozen=True)
class ClientOptimizer:
    """`init(weights)` gives the state; `update(state, weights, gradients, rate)` gives (state, weights)."""

    init: Callable[[Tensors], tuple[tf.Tensor, ...]]
    update: Callable[[Tensors, Tensors, Tensors, float], tuple[tuple[tf.Tensor, ...], tuple[tf.Tensor, ...]]]


def _sgd_update(
    state: Tensors, weights: Tensors, gradients: Tensors, rate: float
) -> tuple[tuple[tf.Tensor, ...], tuple[tf.Tensor, ...]]:
    return tuple(state), tuple(w - rate * g for w, g in zip(weights, gradients, strict=True))


def _adam_init(weights: Tensors) -> tuple[tf.Tensor, ...]:
    return (tf.constant(0.0), *(tf.zeros_like(w) for w in (*weights, *weights)))


def _adam_update(
    state: Tensors, weights: Tensors, gradients: Tensors, rate: float
) -> tuple[tuple[tf.Tensor, ...], tuple[tf.Tensor, ...]]:
    # State: step, one accumulator per weight, one preconditioner per weight; formulas of spec/artifacts.md 8.
    step = state[0] + 1.0
    count = len(weights)
    first = [a + (g - a) * (1 - _BETA_1) for a, g in zip(state[1 : 1 + count], gradients, strict=True)]
    second = [s + (g * g - s) * (1 - _BETA_2) for s, g in zip(state[1 + count :], gradients, strict=True)]
    # As exp of a product: powers of a constant base, in operations that every runtime has.
    bias_1 = 1.0 - tf.exp(step * math.log(_BETA_1))
    bias_2 = 1.0 - tf.exp(step * math.log(_BETA_2))
    corrected = rate * tf.sqrt(bias_2) / bias_1
    moved = tuple(w - corrected * a / (tf.sqrt(s) + _EPSILON) for w, a, s in zip(weights, first, second, strict=True))
    return (step, *first, *second), moved


SGD = ClientOptimizer(init=lambda weights: (), update=_sgd_update)
ADAM = ClientOptimizer(init=_adam_init, update=_adam_update)

CLIENT_OPTIMIZERS: Mapping[int, ClientOptimizer] = {
    task_builder_pb2.Optimizer.SGD: SGD,
    task_builder_pb2.Optimizer.ADAM: ADAM,
}
