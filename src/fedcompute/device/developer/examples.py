"""Serialized training examples from plain values (spec/device.md 7.6)."""

from collections.abc import Iterator, Mapping
from typing import Any

from fedcompute.protos import tensorflow_pb2

FeatureValue = Any
"""A feature: int, bool, float, str or bytes, or a sequence or NumPy array of one of them."""


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
    items = list(_flat(value))
    texts = [item.encode() if isinstance(item, str) else item for item in items if isinstance(item, (bytes, str))]
    numbers = [item for item in items if isinstance(item, (int, float))]
    if texts and len(texts) == len(items):
        feature.bytes_list.value.extend(texts)
    elif len(numbers) == len(items) and any(isinstance(number, float) for number in numbers):
        feature.float_list.value.extend(numbers)
    elif len(numbers) == len(items):
        feature.int64_list.value.extend(int(number) for number in numbers)
    else:
        raise TypeError(f"feature {name!r} is neither numbers nor text but {type(value).__name__}")


def _flat(value: FeatureValue) -> Iterator[object]:
    if hasattr(value, "tolist"):
        # An array or a scalar of NumPy, which workers may use and this module need not load.
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)
    else:
        yield value
