"""What a developer writes: a worker that hands out training examples (spec/device.md 7.1, 7.6)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedcompute.protos import tensorflow_pb2

FeatureValue = Any
"""A feature: int, bool, float, str or bytes, or a sequence or NumPy array of one of them."""


@dataclass(frozen=True)
class TrainingExampleInput:
    """Which examples are wanted. `task_name` is the task id; `resumption_token` is that of the last example that a
    successful run of this task used, None at first; `collection_name` is the selector's collection, if it names one.
    """

    population_name: str
    task_name: str
    resumption_token: bytes | None = None
    collection_name: str | None = None


@dataclass(frozen=True)
class TrainingExampleRecord:
    """One serialized `tf.train.Example`, and the token with which the next query resumes behind it."""

    training_example: bytes
    resumption_token: bytes | None = None


@dataclass(frozen=True)
class TrainingExampleOutput:
    """The records in training order; none at all means that there is not enough data."""

    training_example_records: Sequence[TrainingExampleRecord] = ()


class IsolatedWorker:
    """Base of a developer's worker. Hooks not overridden give empty outputs.

    A hook may block: it runs on a thread of its own. An exception fails the run, nothing else.
    """

    def on_training_examples(self, request: TrainingExampleInput) -> TrainingExampleOutput:
        """The platform's own name for the hook; override this one or `on_training_example`."""
        return self.on_training_example(request)

    def on_training_example(self, request: TrainingExampleInput) -> TrainingExampleOutput:
        """The training data of `request.population_name`."""
        return TrainingExampleOutput()


def training_example(features: Mapping[str, FeatureValue]) -> bytes:
    """A serialized `tf.train.Example`: integers and booleans as int64, floats as float32, text and bytes as bytes.

    Arrays are flattened in row-major order; the plan knows their shapes. Raises TypeError naming the feature for
    values of another kind.
    """
    example = tensorflow_pb2.Example()
    for name, value in features.items():
        _fill(example.features.feature[name], name, value)
    return example.SerializeToString(deterministic=True)


def _fill(feature: tensorflow_pb2.Feature, name: str, value: FeatureValue) -> None:
    # A list goes in as objects: NumPy would turn a list of text and numbers into text.
    mixed = isinstance(value, (list, tuple))
    items = np.ravel(np.array(value, dtype=object) if mixed else np.asarray(value)).tolist()
    if all(isinstance(item, (bytes, str)) for item in items) and items:
        feature.bytes_list.value.extend(item.encode() if isinstance(item, str) else item for item in items)
        return
    array = np.ravel(np.asarray(items if mixed else value))
    if any(isinstance(item, (bytes, str)) for item in items) or array.dtype.kind not in "iubf":
        raise TypeError(f"feature {name!r} is neither numbers nor text but {type(value).__name__}")
    if array.dtype.kind == "f":
        feature.float_list.value.extend(array.astype(np.float32).tolist())
    else:
        feature.int64_list.value.extend(array.astype(np.int64).tolist())
