"""Server optimizers: pairs of `init` and `update` over the leaves below `server/finalizer`.

Source: spec/artifacts.md 3.2, 8.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedcompute.protos import learning_pb2
from fedcompute.tensors.tree import Tensors

Weights = Sequence[NDArray[np.float32]]


@dataclass(frozen=True)
class ServerOptimizer:
    """`init(settings, weights)` -> state leaves below the finalizer; `update(state, weights, gradient)` -> both anew.

    Rates are read from the state, so an operator sees in the checkpoint what was applied. Gradients are float64, of
    the weights' shapes; results are float32.
    """

    init: Callable[[learning_pb2.LearningProcess, Weights], dict[str, NDArray[np.generic]]]
    update: Callable[
        [Tensors, Weights, Sequence[NDArray[np.float64]]],
        tuple[dict[str, NDArray[np.generic]], list[NDArray[np.float32]]],
    ]


def _sgd_init(process: learning_pb2.LearningProcess, weights: Weights) -> dict[str, NDArray[np.generic]]:
    return {"learning_rate": np.array(process.sgd.learning_rate, np.float32)}


def _sgd_update(
    state: Tensors, weights: Weights, gradient: Sequence[NDArray[np.float64]]
) -> tuple[dict[str, NDArray[np.generic]], list[NDArray[np.float32]]]:
    rate = float(state["learning_rate"])
    return dict(state), [(w - rate * g).astype(np.float32) for w, g in zip(weights, gradient, strict=True)]


def _adam_init(process: learning_pb2.LearningProcess, weights: Weights) -> dict[str, NDArray[np.generic]]:
    settings = process.adam
    scalars: dict[str, NDArray[np.generic]] = {
        name: np.array(getattr(settings, name), np.float32) for name in ("learning_rate", "beta_1", "beta_2", "epsilon")
    }
    slots: dict[str, NDArray[np.generic]] = {
        f"{slot}/{index}": np.zeros_like(weight)
        for slot in ("accumulator", "preconditioner")
        for index, weight in enumerate(weights)
    }
    return {**scalars, "step": np.array(0, np.int32), **slots}


def _adam_update(
    state: Tensors, weights: Weights, gradient: Sequence[NDArray[np.float64]]
) -> tuple[dict[str, NDArray[np.generic]], list[NDArray[np.float32]]]:
    rate, beta_1, beta_2, epsilon = (float(state[n]) for n in ("learning_rate", "beta_1", "beta_2", "epsilon"))
    step = int(state["step"]) + 1
    corrected = rate * np.sqrt(1 - beta_2**step) / (1 - beta_1**step)
    new: dict[str, NDArray[np.generic]] = {**state, "step": np.array(step, np.int32)}
    moved: list[NDArray[np.float32]] = []
    for index, (weight, g) in enumerate(zip(weights, gradient, strict=True)):
        first = state[f"accumulator/{index}"].astype(np.float64)
        second = state[f"preconditioner/{index}"].astype(np.float64)
        first += (g - first) * (1 - beta_1)
        second += (g * g - second) * (1 - beta_2)
        new[f"accumulator/{index}"] = first.astype(np.float32)
        new[f"preconditioner/{index}"] = second.astype(np.float32)
        moved.append((weight - corrected * first / (np.sqrt(second) + epsilon)).astype(np.float32))
    return new, moved


# By the name of the process's oneof.
OPTIMIZERS: Mapping[str, ServerOptimizer] = {
    "sgd": ServerOptimizer(_sgd_init, _sgd_update),
    "adam": ServerOptimizer(_adam_init, _adam_update),
}
