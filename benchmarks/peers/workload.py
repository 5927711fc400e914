"""The work that every program of the simulation benchmark does, and the line in which it answers. NumPy alone.

1,000 clients hold 50 grey images of 28x28 each, 62 classes: a picture of its own for every class, under noise, with
the classes of a client drawn from a Dirichlet distribution. One file holds the images, the initial weights of both
models and the clients of every round, so that all programs train the same clients from the same start, in order.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CLIENTS, EXAMPLES, CLASSES, SIDE, TEST = 1_000, 50, 62, 28, 2_000
COHORT, BATCH, LEARNING_RATE, CLIP_NORM = 50, 10, 0.1, 1.0
# Small enough that the models still learn, which shows that all do the same; the time does not depend on it.
NOISE_MULTIPLIER = 0.02
MOST_ROUNDS = 1_000
SEED = 20_240_229

# Weights in Keras's layout: convolutions [height, width, in, out], dense [in, out], images flattened row by row.
MODELS: dict[str, tuple[tuple[int, ...], ...]] = {
    "linear": ((SIDE * SIDE, CLASSES), (CLASSES,)),
    "cnn": ((3, 3, 1, 32), (32,), (3, 3, 32, 64), (64,), (9_216, 128), (128,), (128, CLASSES), (CLASSES,)),
}

Array = NDArray[Any]


@dataclass(frozen=True)
class Workload:
    """`x`: float32 [clients, examples, 28, 28, 1] in 0..1; `y`: int64 [clients, examples];
    `cohorts`: int64 [rounds, clients of a round]; `weights`: as in `MODELS`.
    """

    x: Array
    y: Array
    test_x: Array
    test_y: Array
    cohorts: Array
    weights: tuple[Array, ...]


@dataclass(frozen=True)
class Arguments:
    data: Path
    model: str
    processes: int
    private: bool
    rounds: int


def write(path: Path) -> None:
    """Writes the file; equal bytes in it every time."""
    generator = np.random.default_rng(SEED)
    coarse = (generator.random((CLASSES, 7, 7)) < 0.3).astype(np.float32)
    pictures = np.kron(coarse, np.ones((4, 4), np.float32))

    def images(labels: Array) -> Array:
        noise = generator.standard_normal((*labels.shape, SIDE, SIDE), np.float32)
        return np.clip((0.5 * pictures[labels] + 0.5 * noise) * 255, 0, 255).astype(np.uint8)

    shares = generator.dirichlet(np.full(CLASSES, 1.0), CLIENTS)
    labels = np.stack([generator.choice(CLASSES, EXAMPLES, p=share) for share in shares])
    test_labels = generator.integers(0, CLASSES, TEST)
    arrays = {
        "x": images(labels),
        "y": labels.astype(np.int64),
        "test_x": images(test_labels),
        "test_y": test_labels.astype(np.int64),
        "cohorts": np.stack([generator.permutation(CLIENTS)[:COHORT] for _ in range(MOST_ROUNDS)]),
    }
    for model, shapes in MODELS.items():
        for index, shape in enumerate(shapes):
            arrays[f"{model}/{index}"] = _initial(generator, model, shape)
    partial = path.with_suffix(f".{os.getpid()}.npz")
    np.savez(partial, **arrays)
    partial.replace(path)


def _initial(generator: np.random.Generator, model: str, shape: tuple[int, ...]) -> Array:
    if model == "linear" or len(shape) == 1:
        return np.zeros(shape, np.float32)
    receptive = int(np.prod(shape[:-2]))
    limit = np.sqrt(6 / (receptive * (shape[-2] + shape[-1])))
    return generator.uniform(-limit, limit, shape).astype(np.float32)


def load(data: Path, model: str) -> Workload:
    with np.load(data) as file:
        weights = tuple(file[f"{model}/{index}"] for index in range(len(MODELS[model])))
        scale = np.float32(255)
        x, test_x = (file[name].astype(np.float32)[..., None] / scale for name in ("x", "test_x"))
        return Workload(x, file["y"], test_x, file["test_y"], file["cohorts"], weights)


def read_arguments(argv: Sequence[str] | None = None) -> Arguments:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", choices=list(MODELS), required=True)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--rounds", type=int, default=10)
    return Arguments(**vars(parser.parse_args(argv)))


def channels_first(weights: Sequence[Array]) -> list[Array]:
    """The same weights in PyTorch's layout, for images [batch, channel, height, width]."""
    found = []
    for weight in weights:
        if weight.ndim == 4:
            found.append(weight.transpose(3, 2, 0, 1))
        elif weight.shape[0] == 9_216:
            found.append(weight.reshape(12, 12, 64, -1).transpose(3, 2, 0, 1).reshape(-1, 9_216))
        elif weight.ndim == 2:
            found.append(weight.T)
        else:
            found.append(weight)
    return [np.ascontiguousarray(weight) for weight in found]


def answer(seconds: Sequence[float], startup: float, accuracy: float, versions: dict[str, str]) -> None:
    """One line of JSON on standard output: seconds of each round, the first cold."""
    line = {"seconds": list(seconds), "startup": startup, "accuracy": accuracy, "versions": versions}
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def timed(rounds: int, run: Callable[[int], None]) -> list[float]:
    """Seconds of each of the rounds."""
    seconds = []
    for number in range(rounds):
        begun = time.perf_counter()
        run(number)
        seconds.append(time.perf_counter() - begun)
    return seconds
